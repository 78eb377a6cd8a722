"""Which tokens DAPO's clip-higher lets grow, and what it does to the entropy (arXiv 2503.14476).

A token with A > 0 gets no push once its ratio w = pi / pi_old is above 1 + eps_high. With 0.2 a
token of pi_old 0.01 may grow to 0.012 before that, with 0.28 to 0.0128; one of pi_old above
1 / 1.2 = 0.83 never reaches the bound. DAPO is trained with both, in a regime where the clip acts:
temperature 1.3, four passes over each rollout, three times the default learning rate. The .csv has
a row per training step, with the numbers of tokens with A > 0 over all its updates, by their
pi_old, part i of EDGES:

    tokens_i     all of them
    between_i    with 1.2 < w <= 1.28: clipped at 0.2 and pushed at 0.28
    above_i      with w > 1.28: clipped by both
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from run.style import new_figure, save
from run.table import cell

BOUNDS = (0.2, 0.28)  # eps_high: GRPO's, DAPO's
STEPS = 20
FLAGS = ["--lr", "3e-4", "--warmup", "2", "--epochs", "4", "--temperature", "1.3"]
EDGES = (0.0, 0.01, 0.1, 0.5, 1 / 1.2, 1.0)  # of pi_old
PARTS = range(len(EDGES) - 1)
LEVELS = (0.3, 0.4, 0.5, 0.6)  # accuracies at which the entropies are compared
NAMES = ("tokens", "between", "above")
WINDOW = 5  # steps of the running means of accuracy and entropy
COLOURS = ("#0072B2", "#E69F00")


def counts(ratio, p_old, A):
    """{tokens_i, between_i, above_i} of the tokens with A > 0; all three [N]."""
    part = torch.bucketize(p_old, torch.tensor(EDGES[1:-1]).to(p_old), right=True)
    low, high = (1 + bound for bound in BOUNDS)
    kinds = {
        "tokens": ratio > 0,
        "between": (ratio > low) & (ratio <= high),
        "above": ratio > high,
    }
    found = {}
    for name, kind in kinds.items():
        for i in PARTS:
            found[f"{name}_{i}"] = (kind & (part == i) & (A > 0)).sum().item()
    return found


def look(rollout, rows, gradient, loss_inputs):
    """`counts` of the mini-batch of an update."""
    on = rollout.mask[rows]
    A = rollout.advantages[rows][:, None].expand(on.shape)[on]
    old = rollout.old_logprobs[rows][on]
    return counts((rollout.logprobs[rows][on] - old).exp(), old.exp(), A)


def run(task, steps=STEPS):
    """The rows of one run; task: (eps_high, seed)."""
    eps_high, seed = task
    flags = (*FLAGS, "--option", f"eps_high={eps_high}")
    rows = []
    with kit.trainer("dapo", *flags, seed=seed) as (trainer, _):
        seen = kit.watch(trainer, look)
        for step in range(1, steps + 1):
            line, _, _ = trainer.step(step)
            row = {"eps_high": eps_high, "seed": seed}
            row.update((name, line[name]) for name in ("step", "accuracy", "entropy", "clip_frac"))
            row.update((name, sum(update[name] for update in seen)) for name in seen[0])
            rows.append(row)
            seen.clear()
    return rows


def measure(args):
    tasks = [(eps_high, seed) for seed in args.seeds for eps_high in BOUNDS]
    return kit.each(run, tasks, args.jobs)


def running_mean(values):
    """The mean of every WINDOW values in a row."""
    return [fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def entropy_at(run, level):
    """The entropy where the running mean of the accuracy first reaches a level, or None.

    Linear between the two steps.
    """
    accuracy, entropy = (
        running_mean([row[name] for row in run]) for name in ("accuracy", "entropy")
    )
    for i in range(1, len(accuracy)):
        if accuracy[i - 1] < level <= accuracy[i]:
            part = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return entropy[i - 1] + part * (entropy[i] - entropy[i - 1])
    return None


def differences(rows, level):
    """Entropy with 0.28 less that with 0.2 at an accuracy, of each seed that reaches it in both."""
    narrow, wide = (kit.runs_of(rows, eps_high=bound) for bound in BOUNDS)
    found = []
    for runs in zip(narrow, wide, strict=True):
        low, high = (entropy_at(run, level) for run in runs)
        if low is not None and high is not None:
            found.append(high - low)
    return found


def total(rows, name, i):
    """The sum of name_i over rows."""
    return sum(row[f"{name}_{i}"] for row in rows)


def shares(rows, name, i):
    """name_i in percent of tokens_i, of each seed."""
    runs = kit.runs_of(rows)
    return [100 * total(run, name, i) / max(1, total(run, "tokens", i)) for run in runs]


def span(i):
    """Part i of EDGES in words."""
    return f"{EDGES[i]:.2g} to {EDGES[i + 1]:.2g}"


def say(rows):
    lines = []
    for bound in BOUNDS:
        part = [row for row in rows if row["eps_high"] == bound]
        clip_frac = 100 * fmean(row["clip_frac"] for row in part)
        lines.append(f"eps_high {bound}: {clip_frac:.3f}% of all tokens with an advantage clipped")
        for i in PARTS:
            tokens, between, above = (total(part, name, i) for name in NAMES)
            lines.append(
                f"    pi_old {span(i)}: {tokens} tokens with A > 0, {between} between the bounds "
                f"({cell(shares(part, 'between', i), 3)}%), {above} above both"
            )
        sums = [sum(total(part, name, i) for i in PARTS) for name in NAMES]
        lines.append("    all: {} tokens, {} between, {} above".format(*sums))
    for level in LEVELS:
        found = differences(rows, level)
        both = [
            entropy_at(run, level) for bound in BOUNDS for run in kit.runs_of(rows, eps_high=bound)
        ]
        reached = [value for value in both if value is not None]
        lines.append(
            f"entropy at accuracy {level}: {cell(reached, 3)} in {len(reached)} runs; "
            f"0.28 less 0.2: {cell(found, 4, '+')} ({len(found)} seeds)"
        )
    return lines


def draw(rows, out):
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    draw_clipped(left, rows)
    for bound, colour in zip(BOUNDS, COLOURS, strict=True):
        for i, run in enumerate(kit.runs_of(rows, eps_high=bound)):
            x, y = (running_mean([row[name] for row in run]) for name in ("accuracy", "entropy"))
            label = f"eps_high {bound}" if i == 0 else None
            right.plot(x, y, color=colour, lw=1.3, label=label)
    right.set_xlabel(f"accuracy (means over {WINDOW} steps)")
    right.set_ylabel("entropy [nats per token]")
    right.set_title("Entropy against accuracy")
    right.legend(frameon=False, fontsize=9)
    save(figure, out)


def draw_clipped(ax, rows):
    """The share of tokens between the bounds and above both, a dot per seed, and their number."""
    looks = (("between", "#009E73", "w in (1.2, 1.28]"), ("above", "#777777", "w above 1.28"))
    for side, (name, colour, label) in zip((-0.2, 0.2), looks, strict=True):
        for i in PARTS:
            seeds, n = shares(rows, name, i), total(rows, name, i)
            x = [i + side + 0.08 * (k - (len(seeds) - 1) / 2) for k in range(len(seeds))]
            ax.plot(x, seeds, "o", color=colour, ms=5, label=label if i == 0 else None)
            ax.text(i + side, max(seeds) + 0.6, n, ha="center", va="bottom", fontsize=8)
    ax.margins(y=0.12)
    ax.set_xticks(PARTS, [span(i).replace(" to ", "\nto ") for i in PARTS], fontsize=8)
    ax.set_xlabel("probability when sampled")
    ax.set_ylabel("% of the tokens with A > 0")
    ax.set_title("Tokens at the clip, and their number")
    ax.legend(frameon=False, fontsize=9)


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
