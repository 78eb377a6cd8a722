"""Is the group-relative advantage biased by difficulty? 2601.08521, and its remedy HA-DW.

    python claims/biased_advantage.py   # writes biased_advantage.csv and .png beside itself

Rewards are 0 or 1, p is the chance of a right answer, a group has G completions, k of them right:
k is binomial. A group teaches only if it is mixed, 0 < k < G. Exact sums over k give
baseline: E[k / G | mixed], where r - p would subtract p;
right_std: E[GRPO's advantage of a right completion | mixed], beside sqrt((1 - p) / p) at the
true p; right_hadw: the same of HA-DW, for an anchor of 0.5, without its constant factor `scale`;
plain, grpo, hadw: the weight c in E[1/G sum_i A_i grad log pi(o_i)] = c grad p, over all groups,
mixed or not: without std, with it, and for HA-DW. Derivation: `gradient_weight`.
Measured: of 32 problems of the embedded task under a policy trained for 25 steps, 256 completions
each. One half of them sorts the problems by p; the other half gives p and the groups.
"""

import math
import sys
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import torch
from scipy import stats

from claims.kit import command, each, trainer
from grpo import advantages as grpo_advantages
from more.ha_dw import advantages as ha_dw_advantages
from run.style import new_figure, save, style

GROUPS = (4, 8, 16)
ANCHOR = 0.5  # HA-DW's, in the exact sums
SCALE = 1.5  # HA-DW's default
SIZES = {"steps": 25, "problems": 32, "draws": 256}
BINS = {"hard": (0.02, 0.25), "middle": (0.25, 0.75), "easy": (0.75, 0.98)}  # of p
COLOURS = {4: "#56B4E9", 8: "#0072B2", 16: "#00305A"}
EMPTY = dict.fromkeys(
    ("kind", "seed", "G", "p", "first", "baseline", "right_std", "right_hadw")
    + ("plain", "grpo", "hadw", "groups")
)


def chance(G, p, k):
    """P(k right of G)."""
    return math.comb(G, k) * p**k * (1 - p) ** (G - k)


def given_mixed(G, p, value):
    """E[value(k) | 0 < k < G]."""
    mixed = [chance(G, p, k) for k in range(1, G)]
    return sum(c * value(k) for k, c in enumerate(mixed, 1)) / sum(mixed)


def right_advantage(G, k):
    """GRPO's advantage of a right completion of a group with k right: grpo.py's, in closed form."""
    std = math.sqrt(k * (G - k) / (G * (G - 1)))
    return (1 - k / G) / (std + 1e-4)


def hadw_weights(G, k, anchor=ANCHOR):
    """HA-DW's exp(-sign(A) sign(d) |d|), d = k / G - anchor: (of right, of wrong completions)."""
    d = k / G - anchor
    return math.exp(-d), math.exp(d)


def gradient_weight(G, p, right, weights=lambda G, k: (1, 1)):
    """c in E[1/G sum_i A_i grad log pi(o_i)] = c grad p. right(G, k): A of a right completion.

    grad p = p E[grad log pi | right], and p E[.. | right] + (1 - p) E[.. | wrong] = 0: a right
    completion brings grad p / p on average, a wrong one - grad p / (1 - p). A group's advantages
    add up to 0, so the k right ones have k right(G, k), the others minus that. Constant groups
    have 0.
    """
    total = 0.0
    for k in range(1, G):
        up, down = weights(G, k)
        share = k / G * right(G, k)
        total += chance(G, p, k) * share * (up / p + down / (1 - p))
    return total


def exact(G, p):
    """The row of the .csv for one G and p."""

    def hadw(k):
        return right_advantage(G, k) * hadw_weights(G, k)[0]

    return {
        "kind": "exact",
        "G": G,
        "p": p,
        "baseline": given_mixed(G, p, lambda k: k / G),
        "right_std": given_mixed(G, p, lambda k: right_advantage(G, k)),
        "right_hadw": given_mixed(G, p, hadw),
        "plain": gradient_weight(G, p, lambda G, k: 1 - k / G),
        "grpo": gradient_weight(G, p, right_advantage),
        "hadw": gradient_weight(G, p, right_advantage, hadw_weights),
    }


def observed(rewards, G):
    """What groups of G show: a dict. rewards [problems, draws], 0 or 1. Means over mixed groups.

    HA-DW's anchor is the mean of all rewards here, its scale is divided out.
    """
    flat = rewards.flatten()
    A = grpo_advantages(flat, G).view(-1, G)
    weighted = ha_dw_advantages(flat, G, window=1).view(-1, G) / SCALE
    groups = flat.view(-1, G)
    k = groups.sum(1)
    mixed = (k > 0) & (k < G)
    rows = []
    for own in torch.arange(len(groups)).chunk(len(rewards)):
        used = own[mixed[own]]
        row = {"G": G, "p": groups[own].mean().item(), "groups": len(used)}
        if len(used):
            row["baseline"] = (k[used] / G).mean().item()
            first = groups[used].argmax(1, keepdim=True)  # a right completion of each group
            row["right_std"] = A[used].gather(1, first).mean().item()
            row["right_hadw"] = weighted[used].gather(1, first).mean().item()
        rows.append(row)
    return rows


def draw_problems(t, count, draws):
    """Rewards [count, draws] of the next problems of the run."""
    t.o.prompts, t.o.group_size = 1, draws
    return torch.stack([t.sample_and_reward()[0].right for _ in range(count)])


def run(task):
    """The measured rows of one seed. task: (seed, sizes as SIZES, options of train.py)."""
    seed, sizes, flags = task
    with trainer("grpo", *flags, seed=seed) as (t, _):
        for step in range(1, sizes["steps"] + 1):
            t.step(step)
        rewards = draw_problems(t, sizes["problems"], sizes["draws"])
    first, second = rewards.chunk(2, dim=1)
    rows = []
    for G in GROUPS:
        for p, row in zip(first.mean(1).tolist(), observed(second, G), strict=True):
            more = {"kind": "measured", "seed": seed, "first": p}
            rows.append({**EMPTY, **more, **row})
    return rows


def measure(args):
    grid = [i / 50 for i in range(1, 50)] + [0.01, 0.05, 0.95, 0.99]
    rows = [{**EMPTY, **exact(G, p)} for G in GROUPS for p in sorted(grid)]
    return rows + each(run, [(seed, SIZES, ()) for seed in args.seeds], args.jobs)


def measured(rows, G, name):
    """[(row, exact row at its p), ...] of the measured problems of a bin that had mixed groups."""
    low, high = BINS[name]
    found = []
    for row in rows:
        of_bin = row["kind"] == "measured" and row["G"] == G and low <= row["first"] < high
        if of_bin and row["groups"]:
            found.append((row, exact(G, row["p"])))
    return found


def biases(found):
    """E[k / G | mixed] - p of each problem."""
    return [row["baseline"] - row["p"] for row, _ in found]


def draw(rows, out):
    """The baseline's bias, the bias of GRPO's advantage, and the weight of a problem's gradient."""
    figure = new_figure(11.5, 4.3)
    left, middle, right = figure.subplots(1, 3)
    for G in GROUPS:
        part = [row for row in rows if row["kind"] == "exact" and row["G"] == G]
        p = [row["p"] for row in part]
        look = {"color": COLOURS[G], "label": f"G = {G}"}
        left.plot(p, [row["baseline"] - row["p"] for row in part], **look)
        truth = [math.sqrt((1 - x) / x) for x in p]
        pairs = list(zip(part, truth, strict=True))
        middle.semilogy(p, [row["right_std"] / true for row, true in pairs], **look)
        right.semilogy(p, [row["grpo"] for row in part], **look)
        if G == 8:
            _, colour, _, _ = style("ha_dw")
            look = {"color": colour, "ls": "--", "label": "G = 8, HA-DW"}
            middle.plot(p, [row["right_hadw"] / true for row, true in pairs], **look)
            right.plot(p, [row["hadw"] for row in part], **look)
            right.plot(p, [row["plain"] for row in part], color="0.5", label="G = 8, without std")
            right.plot(p, [1 / math.sqrt(x * (1 - x)) for x in p], "k:", label="std of the true p")
    draw_measured(left, rows)
    left.set_title("baseline of mixed groups, less p")
    left.set_ylabel("E[mean reward | mixed] - p")
    middle.set_title("A of a right completion, mixed groups")
    middle.set_ylabel("times its value at the true p")
    right.set_title("weight c of a problem in the update")
    right.set_ylabel("E[gradient] = c times the gradient of p")
    for ax, ticks in ((middle, (0.25, 0.5, 1, 2, 4)), (right, (0.5, 1, 2, 4, 8))):
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    for ax, level in ((left, 0), (middle, 1)):
        ax.axhline(level, color="0.7", lw=0.8, zorder=0)
    for ax in (left, middle, right):
        ax.set_xlabel("p, the chance of a right answer")
        ax.legend(frameon=False, fontsize=9)
    save(figure, out)


def over_problems(values):
    """Mean and half-width of the 95% t-interval over the problems, not over the seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), half


def draw_measured(ax, rows):
    """Mean and 95% interval over the problems of each bin, at G = 8."""
    for name in BINS:
        found = measured(rows, 8, name)
        if len(found) < 2:
            continue
        mean, half = over_problems(biases(found))
        x = fmean(row["p"] for row, _ in found)
        label = "measured, G = 8" if name == "hard" else None
        ax.errorbar(x, mean, half, fmt="o", color=COLOURS[8], capsize=3, label=label)


def say(rows):
    lines = ["exact:"]
    for row in rows:
        if row["kind"] == "exact" and row["p"] in (0.05, 0.2, 0.5, 0.8, 0.94):
            p = row["p"]
            truth = math.sqrt((1 - p) / p)
            lines.append(
                f"  G {row['G']}, p {p}: baseline {row['baseline']:.3f}; A of a right one "
                f"{row['right_std']:.3f}, HA-DW's {row['right_hadw']:.3f}, at the true p "
                f"{truth:.3f}; weight without std {row['plain']:.3f}, GRPO {row['grpo']:.3f}, "
                f"HA-DW {row['hadw']:.3f}, std of p {1 / math.sqrt(p * (1 - p)):.3f}"
            )
    lines.append("measured, mean and 95% over the problems:")
    for G in GROUPS:
        for name, (low, high) in BINS.items():
            found = measured(rows, G, name)
            if not found:
                continue
            p = fmean(row["p"] for row, _ in found)
            predicted = fmean(want["baseline"] - want["p"] for _, want in found)
            bias, A = (
                "{:+.3f} ± {:.3f}".format(*over_problems(values))
                if len(values) > 1
                else "one problem"
                for values in (biases(found), [row["right_std"] for row, _ in found])
            )
            lines.append(
                f"  G {G}, {name} (p in {low} to {high}): {len(found)} problems, p {p:.2f}; "
                f"baseline - p {bias}, exact {predicted:+.3f}; A of a right one {A}, exact "
                f"{fmean(want['right_std'] for _, want in found):.2f}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(command(__doc__, __file__, measure, draw, say))
