"""Where the seven part: far from the samples, ten seeds, contrasts fixed before the runs.

    far="--updates 16 --lr 3e-4 --steps 40 --eval-every 5 --k 8"
    python compare.py --seeds 0,1,2,3,4,5,6,7,8,9 --out runs/apart -- $far
    python compare.py --seeds 0,1,2,3,4,5,6,7,8,9 --out runs/apart-wide \\
        --algos gspo --eps 0.2/0.2 -- $far
    for lr in 1e-4 2e-4 5e-4 8e-4; do python compare.py --out runs/apart-$lr -- \\
        --updates 16 --lr $lr --steps 40 --eval-every 40 --k 0; done
    python claims/apart.py                                       # reads runs/apart*

With the defaults the policy hardly leaves its samples, and only the averages differ. Here 16
updates per rollout at three times the learning rate take it far enough that ratios and clips act.

Each contrast changes one thing; GSPO runs with GRPO's range too, so that GRPO and GSPO differ in
the ratio alone. The endpoints: greedy accuracy after the last step, its mean over the evaluations
(speed), pass@8 after the last step, and the length of the wrong greedy completions.

Every method ran on the same seeds (data order and random numbers), so the model is value = method +
seed + residual. The residual variance s^2 is pooled over all methods, with (methods - 1) x (seeds -
1) degrees of freedom; the difference of two methods has the standard error sqrt(2 s^2 / seeds).
Intervals are 95% t-intervals, each for itself; p-values are corrected by Holm's method for the
number of contrasts of an endpoint.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy import stats

from claims import kit
from run.runs import read_config
from run.style import new_figure, save, style

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo")
WIDE = "gspo, 0.2 / 0.2"
LR = 3e-4  # of the ten seeds
CONTRASTS = (  # text, method, less method
    ("ratio per token - per sequence: DAPO - TEPO", "dapo", "tepo"),
    ("the same at 0.2 / 0.2: GRPO - GSPO", "grpo", WIDE),
    ("average per sequence - per token: GRPO - DAPO", "grpo", "dapo"),
    ("weights by probability: TR-GRPO - GRPO", "trgrpo", "grpo"),
    ("shaped per token: GTPO - DAPO", "gtpo", "dapo"),
    ("shaped per sequence: GRPO-S - GRPO", "grpo_s", "grpo"),
)
ENDPOINTS = {  # name: title
    "final": "final accuracy",
    "speed": "mean accuracy of the evaluations",
    "pass": "pass@8",
    "wrong": "length of wrong completions, tokens",
}
KEYS = ("accuracy", "pass_at_k", "length", "length_wrong", "truncated", "n")


def measure(args):
    """A row per evaluation of each run under runs/apart*."""
    rows = []
    for path in sorted((ROOT / "runs").glob("apart*/*/metrics.jsonl")):
        options = read_config(path.parent)["options"]
        wide = options["algo"] == "gspo" and options["option"]
        about = {"method": WIDE if wide else options["algo"], "lr": options["lr"]}
        about["seed"] = options["seed"]
        for line in map(json.loads, path.read_text().splitlines()):
            if line["phase"] == "eval":
                rows.append({**about, "step": line["step"], **{key: line[key] for key in KEYS}})
    if not rows:
        raise ValueError("no runs/apart*: make them first, by the commands in claims/apart.py")
    return rows


def evaluations(rows, method, lr=LR):
    """{seed: its rows in the order of their steps}."""
    runs = kit.runs_of(rows, method=method, lr=lr)
    return {run[0]["seed"]: sorted(run, key=lambda row: row["step"]) for run in runs}


def endpoint(run, name):
    """One number of a run, the list of its evaluations' rows."""
    if name == "speed":
        return float(np.mean([row["accuracy"] for row in run[1:]]))  # without that of step 0
    key = {"final": "accuracy", "pass": "pass_at_k", "wrong": "length_wrong"}[name]
    return run[-1][key]


def table(rows, name):
    """(methods, values [methods, seeds]) of an endpoint, over the seeds that all methods have."""
    runs = {method: evaluations(rows, method) for method in (*METHODS, WIDE)}
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in runs.values())))
    if len(seeds) < 2:
        raise ValueError("each method needs runs of the same two seeds or more")
    values = [[endpoint(of_seed[seed], name) for seed in seeds] for of_seed in runs.values()]
    return list(runs), np.array(values, dtype=float)


def residual(values):
    """(s^2, degrees of freedom) of method + seed + residual, values [methods, seeds]."""
    by_method, by_seed = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = values - by_method - by_seed + values.mean()
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    return (rest**2).sum() / freedom, freedom


def contrasts(rows, name):
    """[(text, difference, half-width of its 95% interval, p by Holm), ...] of an endpoint."""
    methods, values = table(rows, name)
    variance, freedom = residual(values)
    error = np.sqrt(2 * variance / values.shape[1])
    half = stats.t.ppf(0.975, freedom) * error
    found, p = [], []
    for text, a, b in CONTRASTS:
        difference = (values[methods.index(a)] - values[methods.index(b)]).mean()
        found.append((text, difference))
        p.append(2 * stats.t.sf(abs(difference) / error, freedom))
    return [(*pair, half, q) for pair, q in zip(found, kit.holm(p), strict=True)]


def band(rows, method):
    """(steps, mean accuracy, half-width over the seeds), each [steps]."""
    runs = list(evaluations(rows, method).values())
    accuracy = np.array([[row["accuracy"] for row in run] for run in runs])  # [seeds, steps]
    half = np.zeros(accuracy.shape[1])
    if len(runs) > 1:
        half = stats.t.ppf(0.975, len(runs) - 1) * accuracy.std(0, ddof=1) / np.sqrt(len(runs))
    return [row["step"] for row in runs[0]], accuracy.mean(0), half


def rates(rows):
    """The learning rates that were run, in order."""
    return sorted({row["lr"] for row in rows})


def name_of(method):
    return "GSPO, 0.2 / 0.2" if method == WIDE else style(method)[0]


def draw(rows, out):
    """Accuracy over the steps; the contrasts of the endpoints; accuracy against learning rate."""
    figure = new_figure(11, 7.4)
    curves, forest, length, against = figure.subplots(2, 2).flatten()
    for method in METHODS:
        steps, mean, half = band(rows, method)
        colour = style(method)[1]
        curves.plot(steps, mean, color=colour, lw=1.5, label=name_of(method))
        curves.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.12, lw=0)
        finals = [list(evaluations(rows, method, lr).values()) for lr in rates(rows)]
        values = [np.mean([run[-1]["accuracy"] for run in runs]) for runs in finals]
        against.plot(rates(rows), values, "o-", ms=4, lw=1.2, color=colour, label=name_of(method))
    places = np.arange(len(CONTRASTS))[::-1]
    for shift, name, colour in ((0.22, "final", "C0"), (0, "speed", "C1"), (-0.22, "pass", "C2")):
        draw_forest(forest, contrasts(rows, name), places + shift, colour, ENDPOINTS[name])
    draw_forest(length, contrasts(rows, "wrong"), places, "C3", ENDPOINTS["wrong"])
    for ax in (forest, length):
        ax.set_yticks(places, [text.replace(": ", ":\n") for text, *_ in CONTRASTS], fontsize=7.5)
        ax.axvline(0, color="0.6", lw=0.8, zorder=0)
        ax.set_xlabel("difference of the means, with its 95% interval")
    forest.set_title("Contrasts: accuracy")
    forest.legend(frameon=False, fontsize=7.5)
    length.set_title("Contrasts: length of wrong completions, tokens")
    against.set(xscale="log", xlabel="learning rate", ylabel="final greedy accuracy")
    against.set_title("A margin of stability (three seeds; ten at 3e-4)")
    curves.set(xlabel="step", ylabel="greedy accuracy")
    curves.set_title("16 updates per rollout, learning rate 3e-4, ten seeds")
    curves.legend(frameon=False, fontsize=7.5)
    for ax in (curves, forest, length, against):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, out)


def draw_forest(ax, found, places, colour, label):
    """Differences with their intervals; filled where p by Holm is below 0.05."""
    for (_, difference, half, p), y in zip(found, places, strict=True):
        face = colour if p < 0.05 else "white"
        look = {"color": colour, "capsize": 2, "lw": 1.2, "marker": "o", "ms": 5}
        ax.errorbar(difference, y, xerr=half, markerfacecolor=face, label=label, **look)
        label = None


def say(rows):
    lines = []
    for name, title in ENDPOINTS.items():
        methods, values = table(rows, name)
        seeds = values.shape[1]
        means = zip(methods, values.mean(1), strict=True)
        lines.append(f"{title}, means of {seeds} seeds: ")
        lines.append("  " + ", ".join(f"{name_of(m)} {mean:.3f}" for m, mean in means))
        for text, difference, half, p in contrasts(rows, name):
            lines.append(f"  {text}: {difference:+.3f} ± {half:.3f}, p {p:.2g} by Holm")
    lines.append("final accuracy by learning rate:")
    for method in METHODS:
        words = []
        for lr in rates(rows):
            final = [run[-1]["accuracy"] for run in evaluations(rows, method, lr).values()]
            words.append(f"{lr:g} {np.mean(final):.3f} ({min(final):.3f}-{max(final):.3f})")
        lines.append(f"  {name_of(method)}: {'; '.join(words)}")
    return lines


def main(argv=None):
    return kit.command(__doc__, str(ROOT / "docs" / "apart.py"), measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
