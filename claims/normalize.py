"""GTPO and GRPO-S, arXiv 2508.04349, Eqs. 6 and 10: which shaped rewards are a set's R?

    python claims/normalize.py

The equations standardise the shaped rewards of the right completions over R+ and those of the wrong
ones over R-. What R+ and R- hold is the option `normalize` of gtpo.py and grpo_s.py. One rollout
(64 held-out problems, 8 completions each, of GTPO after 20 steps with "zeros") gets the advantages
of each option. Then GTPO is trained for 20 steps with each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import kit
from run.algorithm import load_algorithm
from run.style import new_figure, save
from run.table import cell, mean_interval

STEPS = 20
PROBLEMS, GROUP = 64, 8
OPTIONS = ("zeros", "within", "joint")
NAMES = {"gtpo": "GTPO", "grpo_s": "GRPO-S"}
COLOURS = {"right": "#009E73", "wrong": "#D55E00"}


def advantages(batch, algo, option):
    """(advantages, mask) of a rollout: [B, T] per token of GTPO, [B, 1] per row of GRPO-S."""
    given = {"entropy": batch.sampler_entropy, "mask": batch.mask, "right": batch.right}
    function = load_algorithm(algo).advantages
    A = function(batch.rewards, GROUP, normalize=option, **given)
    return (A, batch.mask) if A.ndim == 2 else (A[:, None], batch.mask.any(1, keepdim=True))


def of_groups(batch, seed):
    """Rows by method, option, and number of right completions in the group (1 to 7).

    Of the advantages of right and of wrong completions, one per token (GTPO) or per completion
    (GRPO-S): how many, their mean, and how many have the other sign (right and A < 0, wrong and
    A > 0).
    """
    of_group = batch.right.view(-1, GROUP).sum(1).repeat_interleave(GROUP)  # [B]
    rows = []
    for algo in NAMES:
        for option in OPTIONS:
            A, mask = advantages(batch, algo, option)
            for n in range(1, GROUP):
                for name, sign in (("right", 1), ("wrong", -1)):
                    here = (of_group == n) & (batch.right * 2 - 1 == sign)
                    here = mask & here[:, None]
                    if not here.any():
                        continue
                    about = {"algo": algo, "option": option, "seed": seed, "set": name}
                    about.update(right_in_group=n, count=int(here.sum()))
                    about["mean_A"] = A[here].double().mean().item()
                    about["other_sign"] = int((sign * A[here] < 0).sum())
                    rows.append(about)
    return rows


def one_run(task):
    """Train GTPO with one option; its greedy accuracy, and with "zeros" the rollout's rows."""
    seed, option, steps, count, tested = task
    about = {"algo": "gtpo", "option": option, "seed": seed, "set": f"after {steps} steps"}
    flags = ["--option", f"normalize={option}", "--group-size", str(GROUP)]
    with kit.trainer("gtpo", *flags, seed=seed) as (trainer, held_out):
        for step in range(1, steps + 1):
            trainer.step(step)
        right = kit.greedy(trainer, held_out[:tested])
        rows = []
        if option == "zeros":
            rows = of_groups(kit.rollout(trainer, held_out[:count]), seed)
    accuracy = sum(right) / len(right)
    nothing = dict.fromkeys(("right_in_group", "count", "mean_A", "other_sign"))
    return [{**about, **nothing, "accuracy": accuracy}] + [{**r, "accuracy": None} for r in rows]


def measure(args, steps=STEPS, problems=PROBLEMS, tested=500):
    tasks = [(seed, x, steps, problems, tested) for seed in args.seeds for x in OPTIONS]
    return kit.each(one_run, tasks, args.jobs)


def pick(rows, algo, option, name):
    wanted = algo, option, name
    return [row for row in rows if (row["algo"], row["option"], row["set"]) == wanted]


def mean(rows):
    """Mean of the advantages that the rows count."""
    return sum(row["mean_A"] * row["count"] for row in rows) / sum(row["count"] for row in rows)


def per_seed(rows, function):
    """function(rows of a seed) for each seed."""
    seeds = sorted({row["seed"] for row in rows})
    return [function([row for row in rows if row["seed"] == seed]) for seed in seeds]


def flipped(rows):
    """Share of the advantages that have the other sign."""
    return sum(row["other_sign"] for row in rows) / sum(row["count"] for row in rows)


def accuracies(rows, option):
    return [row["accuracy"] for row in rows if row["option"] == option and row["accuracy"]]


def draw(rows, out):
    """GTPO's mean advantage by the group's right completions; accuracy after training."""
    figure = new_figure(11, 3.6)
    axes = figure.subplots(1, 4)
    for ax, option in zip(axes, OPTIONS, strict=False):
        for name, colour in COLOURS.items():
            part = pick(rows, "gtpo", option, name)
            x = sorted({row["right_in_group"] for row in part})
            here = [[row for row in part if row["right_in_group"] == n] for n in x]
            ax.plot(x, [mean(group) for group in here], "o-", color=colour, label=name, ms=4)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        ax.set(title=f'"{option}"', xlabel=f"right completions of {GROUP}", ylim=(-4.2, 2.2))
        ax.set_xticks(range(1, GROUP))
    axes[0].set_ylabel("GTPO's mean advantage per token")
    axes[0].legend(title="completions that are", title_fontsize=8, frameon=False, fontsize=8)
    for i, option in enumerate(OPTIONS):
        middle, half = mean_interval(accuracies(rows, option))
        axes[3].bar(i, middle, yerr=half, color="#BBBBBB", capsize=4, width=0.6)
        axes[3].plot([i] * len(accuracies(rows, option)), accuracies(rows, option), "k.", ms=4)
    axes[3].axhline(0.132, color="#0072B2", lw=1, ls="--", label="before training")
    axes[3].set_xticks(range(len(OPTIONS)), [f'"{option}"' for option in OPTIONS])
    axes[3].set(title=f"After {STEPS} steps", ylabel="greedy accuracy, held out")
    axes[3].set_ylim(top=0.6)  # room for the legend
    axes[3].legend(frameon=False, fontsize=8)
    save(figure, out)


def say(rows):
    lines = []
    for algo, name in NAMES.items():
        for option in OPTIONS:
            for which in COLOURS:
                part = pick(rows, algo, option, which)
                A, flips = (cell(per_seed(part, f), 3) for f in (mean, flipped))
                lines.append(f"{name}, {option}, {which}: mean A {A}, other sign {flips}")
    for option in OPTIONS:
        lines.append(f"GTPO, {option}: accuracy {cell(accuracies(rows, option), 3)}")
    return lines


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
