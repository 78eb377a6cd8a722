"""Averages by token or by sequence, and length: who is pushed, and which problems are learned.

    python claims/length.py

DAPO (arXiv 2503.14476, section 3.3) averages over tokens so that long completions count as much per
token as short ones; Dr. GRPO (2503.20783) says that GRPO's 1/|o_i| pushes long wrong ones too
little per token. Two measurements:
- GRPO and DAPO are trained for 20 steps; greedy accuracy by the calculations that a problem needs;
- the rollouts of GRPO's last 5 steps, with the log-probabilities before and during their updates,
  are given to the losses of GRPO, DAPO, GSPO and TEPO: the total push on each completion,
  -sum_t dL/dlogp, by its length, right and wrong apart. On policy it is A_i / B for an average
  over sequences, whatever the length, and A_i |o_i| / N for one over tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from grpo import advantages
from run.algorithm import load_algorithm
from run.runs import read_runs
from run.style import new_figure, save, style
from run.table import cell, mean_interval, per_seed, tabulate

STEPS, LAST = 20, 5
COUNTS = (2, 3, 4, 5)  # calculations of a problem
BINS = ((1, 6), (7, 14), (15, 22), (23, 30), (31, 38), (39, 64))  # tokens
RANGES = tuple(f"{low}-{high}" for low, high in BINS)
PAIRS = (("grpo", "dapo"), ("gspo", "tepo"))
METHODS = [algo for pair in PAIRS for algo in pair]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.csv"
PER_SEQUENCE, PER_TOKEN = ("grpo", "grpo_s", "trgrpo"), ("dapo", "tepo", "gtpo")
FEWEST = 7  # completions of a mean that is drawn
COLUMNS = ("method", "seed", "what", "name", "value", "count")


def push(algo, logprobs, old_logprobs, A, mask):
    """-dL/dlogp of the method's loss over one mini-batch, default options. [B, T]"""
    logprobs = logprobs.detach().clone().requires_grad_()
    loss = load_algorithm(algo).loss(logprobs, old_logprobs, A, mask)
    return -torch.autograd.grad(loss, logprobs)[0]


def totals(algo, rollout, size):
    """The push on each completion, over its tokens and in its mini-batch of `size` rows. [B]"""
    A = advantages(rollout.rewards, rollout.group_size)
    parts = []
    for rows in torch.arange(len(A)).split(size):
        given = (rollout.logprobs, rollout.old_logprobs, A, rollout.mask)
        parts.append(push(algo, *(x[rows] for x in given)).sum(1))
    return torch.cat(parts)


def by_length(rollouts, algo, seed, size):
    """Rows: mean push on the completions of a range of lengths, right and wrong apart.

    Over completions of mixed groups (the others have no advantage). Also the share of the method's
    total absolute push that goes to each range.
    """
    push_on = torch.cat([totals(algo, rollout, size) for rollout in rollouts])
    lengths = torch.cat([rollout.mask.sum(1) for rollout in rollouts])
    right = torch.cat([rollout.right for rollout in rollouts]) > 0.5
    groups = torch.cat([advantages(r.rewards, r.group_size) for r in rollouts])
    rows = []
    for name, members in (("right", right), ("wrong", ~right)):
        for low, high in BINS:
            here = members & (groups != 0) & (lengths >= low) & (lengths <= high)
            if not here.any():
                continue
            about = (algo, seed, name, f"{low}-{high}")
            rows.append((*about, push_on[here].double().mean().item(), int(here.sum())))
            share = push_on[here].abs().sum() / push_on.abs().sum()
            rows.append((algo, seed, f"{name}, share", f"{low}-{high}", share.item(), None))
    return [dict(zip(COLUMNS, values, strict=True)) for values in rows]


def by_calculations(right, problems, method, seed):
    """Rows: greedy accuracy by the calculations of the problem."""
    rows = []
    for count in COUNTS:
        grades = zip(right, problems, strict=True)
        part = [grade for grade, problem in grades if problem["answer"].count("\n") == count]
        if part:
            values = (method, seed, "accuracy", count, sum(part) / len(part), len(part))
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def one_run(task):
    """Train one method; accuracies; of GRPO also the pushes, and the accuracies before training."""
    seed, algo, steps, last, tested = task
    rows, rollouts = [], []
    with kit.trainer(algo, seed=seed) as (trainer, held_out):
        problems = held_out[:tested]
        if algo == "grpo":
            rows += by_calculations(kit.greedy(trainer, problems), problems, "start", seed)
        for step in range(1, steps + 1):
            rollout = trainer.step(step)[1]
            rollout.group_size = trainer.o.group_size
            if step > steps - last:
                rollouts.append(rollout)
        rows += by_calculations(kit.greedy(trainer, problems), problems, algo, seed)
        size = trainer.o.rows // trainer.o.updates
    if algo == "grpo":
        for method in METHODS:
            rows += by_length(rollouts, method, seed, size)
    return rows


def measure(args, steps=STEPS, last=LAST, tested=500):
    tasks = [(seed, algo, steps, last, tested) for seed in args.seeds for algo in PAIRS[0]]
    return kit.each(one_run, tasks, args.jobs) + of_docs()


def of_docs():
    """Rows: three methods that average per sequence less three per token, docs/methods.csv.

    Greedy accuracy after the last step, and the length of the rollouts of the last steps.
    """
    table = per_seed(tabulate(read_runs([DOCS]))).reset_index()
    rows = []
    for seed, runs in table.groupby("seed"):
        for name, column in (("accuracy", "final"), ("length", "length")):
            by_algo = runs.set_index("algo")[column]
            less = by_algo[list(PER_SEQUENCE)].mean() - by_algo[list(PER_TOKEN)].mean()
            about = (
                DOCS.relative_to(DOCS.parents[1]).as_posix(),
                seed,
                "per sequence less per token",
            )
            rows.append(dict(zip(COLUMNS, (*about, name, float(less), None), strict=True)))
    return rows


def values(rows, method, what, name, column="value"):
    """{seed: value}."""
    wanted = method, what, str(name)
    part = [row for row in rows if (row["method"], row["what"], str(row["name"])) == wanted]
    return {row["seed"]: row[column] for row in part}


def interval(found):
    mean, half = mean_interval(list(found.values()))
    return mean, half or 0


def draw(rows, out):
    """Accuracy by calculations; push per completion by its length, in the two pairs."""
    figure = new_figure(11, 3.9)
    left, *others = figure.subplots(1, 3)
    for shift, method in zip((-0.08, 0, 0.08), ("start", *PAIRS[0]), strict=True):
        found = {n: values(rows, method, "accuracy", n) for n in COUNTS}
        found = {n: interval(value) for n, value in found.items() if value}
        x = [n + shift for n in found]
        name, colour = ("start", "#999999") if method == "start" else style(method)[:2]
        left.plot(x, [mean for mean, _ in found.values()], color=colour, lw=1.5, label=name)
        for n, place in zip(found, x, strict=True):
            seeds = list(values(rows, method, "accuracy", n).values())
            left.plot([place] * len(seeds), seeds, ".", color=colour, ms=6)
    left.set(title=f"Greedy accuracy after {STEPS} steps", xlabel="calculations of the problem")
    left.set(ylabel="share correct, held out", ylim=(0, 1.15), xticks=COUNTS)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1])
    left.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    for ax, pair in zip(others, PAIRS, strict=True):
        for method in pair:
            name, colour = style(method)[:2]
            for what, line in (("right", "-"), ("wrong", "--")):
                found = [values(rows, method, what, name) for name in RANGES]
                counts = [values(rows, method, what, name, "count") for name in RANGES]
                few = [sum(count.values()) < FEWEST for count in counts]
                found = [{} if is_few else x for x, is_few in zip(found, few, strict=True)]
                found = {i: interval(x) for i, x in enumerate(found) if x}
                mean, half = zip(*found.values(), strict=True)
                look = {"color": colour, "ls": line, "marker": "o", "ms": 4, "capsize": 3}
                ax.errorbar(list(found), mean, half, label=f"{name}, {what}", **look)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        ax.set_xticks(range(len(BINS)), RANGES, fontsize=8)
        ax.set(title=f"Push per completion: {style(pair[0])[0]}, {style(pair[1])[0]}")
        ax.set(xlabel="tokens of the completion", ylabel="sum of −∂L/∂logp over its tokens")
        ax.legend(frameon=False, fontsize=8, handlelength=3)
    figure.align_labels()
    save(figure, out)


def say(rows):
    lines = []
    for method in ("start", *PAIRS[0]):
        texts = [f"{n}: {cell(values(rows, method, 'accuracy', n).values(), 3)}" for n in COUNTS]
        lines.append(f"accuracy by calculations, {method}: {', '.join(texts)}")
    grpo, dapo = ([values(rows, algo, "accuracy", n) for n in COUNTS] for algo in PAIRS[0])
    less = [[b[seed] - a[seed] for seed in a] for a, b in zip(grpo, dapo, strict=True)]
    texts = [f"{n}: {text}" for n, text in zip(COUNTS, kit.compared(less, 3), strict=True)]
    lines.append(f"DAPO less GRPO, p by Holm: {'; '.join(texts)}")
    for name, digits in (("accuracy", 3), ("length", 2)):
        found = values(rows, "docs/methods.csv", "per sequence less per token", name)
        less = cell(found.values(), digits, "+")
        lines.append(f"docs/methods.csv, per sequence less per token, {name}: {less}")
    for method in METHODS:
        for what in ("right", "wrong", "right, share", "wrong, share"):
            found = {name: values(rows, method, what, name) for name in RANGES}
            texts = [f"{name}: {cell(x.values(), 4)}" for name, x in found.items() if x]
            lines.append(f"{method}, {what}: {', '.join(texts)}")
    for what in ("right", "wrong"):
        counts = {name: values(rows, "grpo", what, name, "count") for name in RANGES}
        texts = [f"{name}: {sum(found.values())}" for name, found in counts.items()]
        lines.append(f"completions, {what}: {', '.join(texts)}")
    return lines


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
