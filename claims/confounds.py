"""Three controls: what the comparisons of RESULTS.md mixed.

    python claims/confounds.py

1. `--updates N` splits a rollout of 128 rows into N mini-batches: more optimizer steps, and smaller
   ones. Here GRPO takes 4 or 16 steps per rollout with the mini-batches of one size or another,
   and the optimizer steps really taken are counted (groups with equal rewards give none).
2. GSPO and TEPO differ in the clip range, and in the average. GSPO is run with TEPO's range, 0.2 /
   0.28; the other three combinations are in docs/methods.csv and docs/eps.csv.
3. DAPO's objective (arXiv 2503.14476) divides by the tokens of one prompt's group and then
   averages over prompts; dapo.py, like verl, divides by the tokens of the mini-batch. Both pushes
   are computed on the same rollouts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import kit
from grpo import advantages
from run.runs import read_runs
from run.style import new_figure, save
from run.table import cell, mean_interval

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {  # name: --updates, --epochs
    "4 steps of 32 rows": (4, 1),
    "4 steps of 128 rows": (1, 4),
    "16 steps of 8 rows": (16, 1),
    "16 steps of 32 rows": (4, 4),
}
STEPS, STOPS = 20, (25, 50)
WIDE = ("--option", "eps_low=0.2", "--option", "eps_high=0.28")
PROBLEMS, GROUP, PROMPTS = 64, 8, 4  # of the rollout; PROMPTS in a mini-batch
COUNTS = (2, 3, 4, 5)  # calculations of a problem


def run_updates(task):
    """GRPO with one setting: accuracy after the steps, and optimizer steps taken per rollout."""
    seed, name, steps, tested, count = task
    updates, epochs = SETTINGS[name]
    flags = ["--updates", str(updates), "--epochs", str(epochs), "--group-size", str(GROUP)]
    taken = []
    with kit.trainer("grpo", *flags, seed=seed) as (trainer, held_out):
        trainer.updater.optimizer.register_step_post_hook(lambda *_: taken.append(1))
        for step in range(1, steps + 1):
            trainer.step(step)
        right = kit.greedy(trainer, held_out[:tested])
        rows = []
        if (updates, epochs) == (4, 1):
            rows = of_averages(kit.rollout(trainer, held_out[:count]), seed)
    about = {"what": "updates", "name": name, "seed": seed}
    of_run = {"accuracy": sum(right) / len(right), "per_rollout": len(taken) / steps}
    return [row(**about, step=steps, **of_run), *rows]


def row(what, name, seed, step=None, accuracy=None, per_rollout=None, clipped=None, share=None):
    """A row of the .csv. share: of the total push, see of_averages."""
    numbers = {"step": step, "accuracy": accuracy, "per_rollout": per_rollout}
    return {"what": what, "name": name, "seed": seed, **numbers, "clipped": clipped, "share": share}


def run_gspo(task):
    """GSPO with DAPO's range: accuracy at 25 and 50 steps, and the mean clip fraction."""
    seed, stops, tested = task
    rows, clipped = [], []
    with kit.trainer("gspo", *WIDE, seed=seed) as (trainer, held_out):
        for step in range(1, stops[-1] + 1):
            clipped.append(trainer.step(step)[0]["clip_frac"])
            if step in stops:
                right = kit.greedy(trainer, held_out[:tested])
                about = {"accuracy": sum(right) / len(right)}
                about["clipped"] = sum(clipped) / len(clipped)
                rows.append(row("range", "GSPO, 0.2 / 0.28", seed, step, **about))
    return rows


def from_docs():
    """The other three combinations of ratio and range, of docs/."""
    runs = [run for run in read_runs([ROOT / "docs" / "methods.csv"]) if run["algo"] == "gspo"]
    named = [("GSPO, 3e-4 / 4e-4", run) for run in runs]
    for run in read_runs([ROOT / "docs" / "eps.csv"]):
        wide = run["settings"]["eps_low"] == 0.2
        named.append(("TEPO, 0.2 / 0.28" if wide else "TEPO, 3e-4 / 4e-4", run))
    rows = []
    for name, run in named:
        for line in run["rows"].to_dict("records"):
            if line["phase"] == "eval" and line["step"] in STOPS:
                rows.append(row("range", name, run["seed"], line["step"], line["accuracy"]))
    return rows


def pushes(A, mask, group_size):
    """(ours, own), -dL/dlogp on policy of DAPO over a mini-batch: A_i / N, and A_i / (P N_g).

    N: tokens of the mini-batch, N_g: of a prompt's group, P: prompts. [B], the same at each token.
    """
    lengths = mask.sum(1).to(A.dtype)  # [B]
    of_group = lengths.view(-1, group_size).sum(1).repeat_interleave(group_size)  # N_g [B]
    prompts = len(A) // group_size
    return A / lengths.sum(), A / (prompts * of_group)


def of_averages(batch, seed):
    """Rows: the share of the total absolute push by the calculations of the problem, both ways.

    In mini-batches of 4 prompts, as in the run.
    """
    total = {"mini-batch": dict.fromkeys(COUNTS, 0.0), "prompt": dict.fromkeys(COUNTS, 0.0)}
    A = advantages(batch.rewards, GROUP)
    for start in range(0, len(A), GROUP * PROMPTS):
        rows = slice(start, start + GROUP * PROMPTS)
        both = pushes(A[rows], batch.mask[rows], GROUP)
        for way, push in zip(total, both, strict=True):
            whole = push.abs() * batch.mask[rows].sum(1)  # [B], over the tokens
            for problem, value in zip(batch.problems[rows], whole.tolist(), strict=True):
                total[way][problem["answer"].count("\n")] += value
    return [
        row(f"tokens of the {way}", str(count), seed, share=value / sum(of_count.values()))
        for way, of_count in total.items()
        for count, value in of_count.items()
    ]


def measure(args, steps=STEPS, stops=STOPS, tested=500, count=PROBLEMS):
    tasks = [(seed, name, steps, tested, count) for seed in args.seeds for name in SETTINGS]
    rows = kit.each(run_updates, tasks, args.jobs)
    rows += kit.each(run_gspo, [(seed, stops, tested) for seed in args.seeds], args.jobs)
    return rows + [line for line in from_docs() if line["seed"] in args.seeds]


def values(rows, what, name, column, step=None):
    """One number per seed."""
    part = [line for line in rows if (line["what"], str(line["name"])) == (what, name)]
    return [line[column] for line in part if step in (None, line["step"])]


RANGES = ("GSPO, 3e-4 / 4e-4", "TEPO, 3e-4 / 4e-4", "GSPO, 0.2 / 0.28", "TEPO, 0.2 / 0.28")
WAYS = ("tokens of the mini-batch", "tokens of the prompt")
PAIRS = ((0, 1), (2, 3), (2, 0), (3, 0))  # of SETTINGS, the first less the second


def draw(rows, out):
    """Paired differences of the updates and of DAPO's averages; the ranges, not paired."""
    figure = new_figure(11.5, 3.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    names = list(SETTINGS)
    pairs = {f"{names[a]}\nless {names[b]}": less(rows, names[a], names[b]) for a, b in PAIRS}
    shares = {f"{n} calculations": [100 * x for x in less_ours(rows, n)] for n in COUNTS}
    last = max(line["step"] for line in rows if line["what"] == "range")
    ranges = {name: values(rows, "range", name, "accuracy", last) for name in RANGES}
    dots(left, pairs, f"GRPO after {STEPS} rollouts", "difference of accuracy at equal seed")
    dots(middle, ranges, f"After {STOPS[-1]} rollouts", "greedy accuracy, held out")
    dots(right, shares, "DAPO's two averages", "points of the push")
    for ax in (left, right):
        ax.axvline(0, color="0.5", lw=1)
    save(figure, out)


def dots(ax, found, title, label):
    """A line per name: its values, a dot per seed, and their mean with the 95% interval."""
    for y, seeds in enumerate(list(found.values())[::-1]):
        mean, half = mean_interval(seeds)
        ax.errorbar(mean, y, xerr=half, fmt="o", color="#000000", capsize=4)
        ax.plot(seeds, [y + 0.2] * len(seeds), ".", color="#777777", ms=5)
    ax.set_yticks(range(len(found)), list(found)[::-1], fontsize=9)
    ax.set(title=title, xlabel=label, ylim=(-0.5, len(found) - 0.5))
    ax.grid(axis="x", color="0.9")


def less(rows, a, b):
    """Accuracy of setting a less that of b at the same seed, a list."""
    pair = zip(*(values(rows, "updates", name, "accuracy") for name in (a, b)), strict=True)
    return [x - y for x, y in pair]


def less_ours(rows, count):
    """Share of the push by DAPO's own average less that by ours, a list."""
    ours, own = (values(rows, way, str(count), "share") for way in WAYS)
    return [y - x for x, y in zip(ours, own, strict=True)]


def say(rows):
    lines = []
    for name in SETTINGS:
        accuracy = cell(values(rows, "updates", name, "accuracy"), 3)
        taken = cell(values(rows, "updates", name, "per_rollout"), 2)
        lines.append(f"GRPO, {name}: accuracy {accuracy}, steps taken per rollout {taken}")
    names = list(SETTINGS)
    pairs = [(names[a], names[b]) for a, b in PAIRS]
    texts = kit.compared([less(rows, *pair) for pair in pairs], 3)
    for (a, b), text in zip(pairs, texts, strict=True):
        lines.append(f"  {a} less {b}: {text} by Holm")
    for name in RANGES:
        for step in sorted({line["step"] for line in rows if line["what"] == "range"}):
            found = values(rows, "range", name, "accuracy", step)
            if found:
                lines.append(f"{name}, step {step}: {cell(found, 3)}")
    clipped = [line["clipped"] for line in rows if line["clipped"] is not None]
    lines.append(f"GSPO, 0.2 / 0.28: clip fraction at most {max(clipped):.6f}")
    for way in WAYS:
        found = {count: values(rows, way, str(count), "share") for count in COUNTS}
        shares = [f"{count}: {cell(share, 3)}" for count, share in found.items()]
        lines.append(f"push, over the {way}, by calculations: {', '.join(shares)}")
    found = kit.compared([less_ours(rows, count) for count in COUNTS], 3)
    texts = [f"{count}: {text}" for count, text in zip(COUNTS, found, strict=True)]
    lines.append(f"  the second less the first, p by Holm: {'; '.join(texts)}")
    return lines


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
