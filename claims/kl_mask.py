"""What TEPO's masked KL penalty takes hold of (arXiv 2604.12736), and how hard it pushes.

    loss = policy term + kl_coef 1/N sum M k3,  M = 1 where A > 0 and H < H_old - 1e-4, else 0

H and H_old are a token's entropy now and when it was sampled. Before the first update of a rollout
both are equal, so M is 0: everything here is counted at the updates after it. The .csv has a row
per training step, with sums or means over those updates:

    positive, masked      tokens with A > 0, and those of them with M = 1
    negative, falling     tokens with A < 0, and those of them whose entropy falls in the same way
    fall                  mean of H - H_old over the masked tokens, nats
    force                 sum |push of the penalty| / sum |push of the policy term|, masked tokens
    positive_i, masked_i  the two by the probability at which the token was sampled, part i of EDGES

With kl_coef 0 the mask is computed, but nothing is penalised.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from run.style import new_figure, save
from run.table import cell, mean_interval

COEFFICIENTS = (0, 0.01, 0.1, 10)
STEPS = 20
UPDATES = 8  # per rollout, as the paper trains
FLAGS = ("--lr", "2e-4", "--warmup", "2", "--updates", str(UPDATES))
EDGES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)  # of the probability
# Colour, dashes and width of each: the curves lie on one another.
LOOKS = (("#BBBBBB", "-", 6), ("#E69F00", "-", 3), ("#000000", "--", 1.2), ("#0072B2", "-", 1.2))
LAST = 5  # steps that the table's accuracy and entropy are means over


def mask_of(A, entropy, old_entropy):
    """M of tepo.py, as a bool."""
    return (A > 0) & (entropy < old_entropy - 1e-4)


def look(trainer, rollout, rows, gradient, loss_inputs):
    """What an update's mask takes, as {name: number}."""
    on = rollout.mask[rows]
    A = rollout.advantages[rows][:, None].expand(on.shape)[on]
    H, H_old = (loss_inputs[name][on] for name in ("entropy", "old_entropy"))
    M = mask_of(A, H, H_old)
    without = {**loss_inputs, "kl_coef": 0.0}
    _, policy = trainer.updater.loss_gradient(rollout, rows, without)
    p = rollout.old_logprobs[rows][on].exp()
    part = torch.bucketize(p, torch.tensor(EDGES[1:-1]).to(p), right=True)
    found = {
        "positive": (A > 0).sum().item(),
        "masked": M.sum().item(),
        "negative": (A < 0).sum().item(),
        "falling": mask_of(-A, H, H_old).sum().item(),
        "fall": (H - H_old)[M].sum().item(),
        "penalty": (gradient - policy)[rows][on][M].abs().sum().item(),
        "policy": policy[rows][on][M].abs().sum().item(),
    }
    for i in range(len(EDGES) - 1):
        found[f"positive_{i}"] = (A[part == i] > 0).sum().item()
        found[f"masked_{i}"] = M[part == i].sum().item()
    return found


def step_row(line, updates):
    """The row of a step. line: its metrics. updates: what `look` said of each of its updates."""
    total = {name: sum(update[name] for update in updates[1:]) for name in updates[0]}
    penalty, policy = total.pop("penalty"), total.pop("policy")
    row = {name: line[name] for name in ("step", "accuracy", "entropy", "kl")}
    row.update(total)
    row["fall"] = total["fall"] / total["masked"] if total["masked"] else None
    row["force"] = penalty / policy if policy else None
    return row


def run(task, steps=STEPS):
    """The rows of one run; task: (kl_coef, seed)."""
    kl_coef, seed = task
    flags = (*FLAGS, "--option", f"kl_coef={kl_coef}")
    rows = []
    with kit.trainer("tepo", *flags, seed=seed) as (trainer, _):
        # With kl_coef 0 too, so that all runs compute the same but for the penalty.
        trainer.updater.needs_entropy = trainer.updater.needs_all_rows = True
        seen = kit.watch(trainer, lambda *update: look(trainer, *update))
        for step in range(1, steps + 1):
            line, _, _ = trainer.step(step)
            rows.append({"kl_coef": kl_coef, "seed": seed, **step_row(line, seen)})
            seen.clear()
    return rows


def measure(args):
    tasks = [(kl_coef, seed) for seed in args.seeds for kl_coef in COEFFICIENTS]
    return kit.each(run, tasks, args.jobs)


def ratio(run, above, below):
    """The ratio of two sums over a run's steps."""
    return sum(row[above] for row in run) / sum(row[below] for row in run)


def mean(run, name, last=0):
    """The mean of a column over a run, or over its last steps, without gaps."""
    return fmean(row[name] for row in run[-last:] if row[name] is not None)


def say(rows):
    lines = []
    base = kit.runs_of(rows, kl_coef=0)
    for kl_coef in COEFFICIENTS:
        runs = kit.runs_of(rows, kl_coef=kl_coef)
        share = cell([ratio(r, "masked", "positive") for r in runs], 3)
        other = cell([ratio(r, "falling", "negative") for r in runs], 3)
        force = cell([100 * mean(r, "force") for r in runs], 4)
        fall = cell([mean(r, "fall") for r in runs], 4)
        lines.append(
            f"kl_coef {kl_coef}: the mask takes {share} of the tokens with A > 0 (falling with "
            f"A < 0: {other}); their entropy has moved by {fall} nats; the penalty's push is "
            f"{force}% of the policy term's"
        )
        for name in ("accuracy", "entropy", "kl"):
            ends = [mean(r, name, LAST) for r in runs]
            paired = [a - mean(b, name, LAST) for a, b in zip(ends, base, strict=True)]
            less = cell(paired, 4, "+")
            lines.append(f"    {name}, last {LAST} steps: {cell(ends, 4)}, less that at 0: {less}")
    for i, edges in enumerate(zip(EDGES, EDGES[1:], strict=False)):
        shares = [ratio(r, f"masked_{i}", f"positive_{i}") for r in base]
        part = [ratio(r, f"masked_{i}", "masked") for r in base]
        lines.append(
            "probability {:g} to {:g}: ".format(*edges)
            + f"the mask takes {cell(shares, 3)}, {cell(part, 3)} of all it takes"
        )
    return lines


def draw(rows, out):
    figure = new_figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)  # entropy, ratio of the pushes, what is taken
    for kl_coef, (colour, dashes, width) in zip(COEFFICIENTS, LOOKS, strict=False):
        runs = kit.runs_of(rows, kl_coef=kl_coef)
        steps = [row["step"] for row in runs[0]]
        for ax, name in ((left, "entropy"), (middle, "force")):
            if name == "force" and kl_coef == 0:
                continue  # no push on a log scale
            columns = ([run[i][name] for run in runs] for i in range(len(steps)))
            curve = [fmean(x for x in column if x is not None) for column in columns]
            ax.plot(steps, curve, dashes, color=colour, lw=width, label=f"kl_coef {kl_coef}")
    base, places = kit.runs_of(rows, kl_coef=0), range(len(EDGES) - 1)
    shares = [
        mean_interval([100 * ratio(r, f"masked_{i}", f"positive_{i}") for r in base])
        for i in places
    ]
    errors = [half or 0 for _, half in shares]
    right.bar(places, [m for m, _ in shares], yerr=errors, color="#56B4E9", capsize=3)
    names = [f"{a:g} to\n{b:g}" for a, b in zip(EDGES, EDGES[1:], strict=False)]
    right.set_xticks(places, names, fontsize=8)
    right.set_xlabel("probability when sampled")
    right.set_ylabel("masked, % of the tokens with A > 0")
    right.set_title("What the mask takes, kl_coef 0")
    left.set_title("Entropy of the rollouts")
    left.set_ylabel("nats per token")
    middle.axhline(1, color="0.6", lw=0.8)
    middle.set(title="Push of the penalty", yscale="log", ylim=(1e-6, 3))
    middle.set_ylabel("times the policy term's push")
    for ax in (left, middle):
        ax.set_xlabel("step")
        ax.set_xticks(range(0, steps[-1] + 1, 5))
        ax.legend(frameon=False, fontsize=9)
    save(figure, out)


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
