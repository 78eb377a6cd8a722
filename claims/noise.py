"""Does the noise of token ratios grow with length, and the sequence's not? GSPO, 2507.18071.

    python claims/noise.py      # writes claims/noise.csv and claims/noise.png

GRPO trains the embedded model for 25 steps, so that lengths vary. From this one policy 32
independent updates are made, each from the same weights and AdamW state on its own fresh mini-batch
of 32 completions. After each, the same 384 completions of other prompts are measured. Their
log-ratios vary from update to update: what differs between completions (their kind, their drift)
is in none of the variances below, all of which are taken over the updates. In nats:
token: log w_{i,t}; mean: log s_i, the mean of a completion's log w; arithmetic: the log of the mean
of its w; product: the sum of its log w. Written is the root of the mean variance of the tokens or
completions of a length class. If the log w of a completion's tokens were independent, product
would have the variance sum_t v_t and mean sum_t v_t / n^2; v_t: token t's variance, n: tokens.
set: "all", or "right", the right completions, which are worked solutions: within one kind, length
is the number of lines. clip_*: share of the tokens with an advantage whose gradient the clip would
remove, mean over the updates.

Free text, where tokens are less certain, and mixtures of experts, the paper's case, may differ.
"""

import copy
import math
import sys
from pathlib import Path
from statistics import fmean, linear_regression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import torch

from claims.kit import command, each, trainer, values
from run.style import new_figure, save, style
from run.table import cell, mean_interval

SIZES = {"steps": 25, "updates": 32, "probe": 48}
MINI_BATCH = 32  # completions, as in a run with the default options
EDGES = (1, 8, 16, 24, 32, 65)  # a length class is from an edge to below the next
FEWEST = 8  # completions of a length class
KINDS = {  # the color and marker of each spread in the figure, its name
    "product": ("#999999", "v", "sum of log w"),
    "token": ("black", "s", "log w, per token"),
    "arithmetic": (style("grpo_s")[1], "P", "log of the mean w (GRPO-S)"),
    "mean": (style("gspo")[1], "D", "log s, geometric mean (GSPO)"),
}
CLIPS = {  # which ratio, eps_low, eps_high
    "clip_grpo": ("token", 0.2, 0.2),
    "clip_gspo": ("mean", 3e-4, 4e-4),
    "clip_tepo": ("mean", 0.2, 0.28),
    "clip_token_narrow": ("token", 3e-4, 4e-4),
}


def ratios(log_w, mask):
    """{kind: its logarithm} of log-ratios [K, B, T]: token as [K, B, T], the others as [K, B]."""
    n = mask.sum(1)
    log_w = log_w * mask
    total = log_w.sum(2)
    arithmetic = ((log_w.exp() * mask).sum(2) / n).log()
    return {"token": log_w, "mean": total / n, "arithmetic": arithmetic, "product": total}


def clipped(log_ratio, A, low, high):
    """Where PPO's clip removes the gradient: ratio > 1 + high for A > 0, < 1 - low for A < 0."""
    above = (A > 0) & (log_ratio > math.log1p(high))
    return above | (A < 0) & (log_ratio < math.log1p(-low))


def spread(log_w, mask, A):
    """A dict of one length class: its spreads, what independence predicts, its clips.

    log_w [K, B, T], of K updates; mask [B, T]; A [B], 0 in groups without a signal. A clip is None
    where no token has an advantage.
    """
    n = mask.sum(1).double()
    kinds = ratios(log_w, mask)
    row = {"rows": len(n), "length": n.mean().item()}
    v = kinds["token"].var(0)  # [B, T]
    row["token"] = v[mask].mean().sqrt().item()
    for kind in ("mean", "arithmetic", "product"):
        row[kind] = kinds[kind].var(0).mean().sqrt().item()
    row["mean_independent"] = (v.sum(1) / n**2).mean().sqrt().item()
    row["product_independent"] = v.sum(1).mean().sqrt().item()
    signal = mask & (A != 0)[:, None]
    for name, (kind, low, high) in CLIPS.items():
        ratio = kinds[kind] if kind == "token" else kinds[kind][..., None]
        removed = clipped(ratio, A[:, None], low, high).expand(log_w.shape)[:, signal]
        row[name] = removed.double().mean().item() if signal.any() else None
    return row


def by_length(log_w, mask, A, right):
    """The rows of both sets: of all lengths together (class 0) and of each length class."""
    n, rows = mask.sum(1), []
    classes = [(0, EDGES[0], EDGES[-1])]
    classes += [(low, low, high) for low, high in zip(EDGES, EDGES[1:], strict=False)]
    for name, members in (("all", right >= 0), ("right", right > 0.5)):
        for label, low, high in classes:
            chosen = members & (n >= low) & (n < high)
            if chosen.sum() >= FEWEST:
                found = spread(log_w[:, chosen], mask[chosen], A[chosen])
                rows.append({"set": name, "class": label, **found})
    return rows


def draw_rollout(t, prompts):
    """A rollout of so many prompts with its log-probabilities and advantages."""
    t.o.prompts = prompts
    rollout, _ = t.sample_and_reward()
    with torch.no_grad():
        found = t.updater.forward(rollout, torch.arange(t.o.rows), t.model)
    rollout.old_logprobs, rollout.entropy = found
    rollout.logprobs = rollout.old_logprobs.clone()
    rollout.measured = torch.ones(t.o.rows, dtype=torch.bool)
    rollout.advantages = t.advantages(rollout)
    return rollout


def run(task):
    """The rows of one seed. task: (seed, sizes as SIZES, options of train.py)."""
    seed, sizes, flags = task
    with trainer("grpo", *flags, seed=seed) as (t, _):
        for step in range(1, sizes["steps"] + 1):
            t.step(step)
        probe, optimizer, log_w = draw_rollout(t, sizes["probe"]), t.updater.optimizer, []
        start = copy.deepcopy((t.model.state_dict(), optimizer.state_dict()))
        while len(log_w) < sizes["updates"]:
            rollout = draw_rollout(t, MINI_BATCH // t.o.group_size)
            if not t.updater.update(rollout, torch.arange(MINI_BATCH), on_policy=True)["moved"]:
                continue  # no mixed group
            with torch.no_grad():
                logp, _ = t.updater.forward(probe, torch.arange(len(probe.mask)), t.model)
            log_w.append((logp - probe.old_logprobs).double())
            t.model.load_state_dict(start[0])
            optimizer.load_state_dict(copy.deepcopy(start[1]))
        rows = by_length(torch.stack(log_w), probe.mask, probe.advantages, probe.right)
    return [{"seed": seed, **row} for row in rows]


def measure(args):
    return each(run, [(seed, SIZES, ()) for seed in args.seeds], args.jobs)


def slope(rows, key):
    """Of the log of a spread against the log of the length, over the length classes; per seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        part = [row for row in rows if row["seed"] == seed and row["class"] > 0]
        if len(part) < 2:
            continue
        x = [math.log(row["length"]) for row in part]
        y = [math.log(row[key]) for row in part]
        found.append(linear_regression(x, y).slope)
    return found


def classes(rows):
    """The length classes that every seed has, shortest first."""
    seeds = {row["seed"] for row in rows}
    found = {row["class"] for row in rows if row["class"] > 0}
    return [c for c in sorted(found) if len(values(rows, "seed", **{"class": c})) == len(seeds)]


def draw(rows, out):
    """Spread against length, right completions, and what independent tokens would give."""
    figure = new_figure(7, 4.6)
    ax = figure.subplots()
    rows = [row for row in rows if row["set"] == "right"]
    lengths = [fmean(values(rows, "length", **{"class": c})) for c in classes(rows)]
    for kind, (colour, marker, name) in KINDS.items():
        found = [mean_interval(values(rows, kind, **{"class": c})) for c in classes(rows)]
        mean, half = [m for m, _ in found], [h or 0 for _, h in found]
        look = {"color": colour, "marker": marker, "ms": 5, "capsize": 3, "label": name}
        ax.errorbar(lengths, mean, half, **look)
    for kind in ("product", "mean"):
        y = [fmean(values(rows, f"{kind}_independent", **{"class": c})) for c in classes(rows)]
        label = "if a completion's tokens were independent" if kind == "mean" else None
        ax.plot(lengths, y, color=KINDS[kind][0], ls=":", lw=1.8, label=label)
    ax.set(xscale="log", yscale="log", xlabel="tokens of the completion")
    ax.set_ylabel("std over independent updates, nats")
    ax.set_xticks([10, 20, 30, 40], ["10", "20", "30", "40"])
    ax.minorticks_off()
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save(figure, out)


def say(rows):
    lines = []
    for name in ("all", "right"):
        part = [row for row in rows if row["set"] == name]
        lines.append(f"completions: {name} (std over the updates, in nats)")
        for kind in KINDS:
            whole = cell(values(part, kind, **{"class": 0}), 5)
            lines.append(
                f"  {kind}: {whole}, slope against length {cell(slope(part, kind), 2, '+')}"
            )
        for low in classes(part):
            found = {key: values(part, key, **{"class": low}) for key in part[0]}
            pairs = zip(found["mean"], found["mean_independent"], strict=True)
            words = [f"{kind} {cell(found[kind], 5)}" for kind in KINDS]
            words.append(f"mean {cell([a / b for a, b in pairs], 2)} times independent")
            about = f"{cell(found['length'], 1)}, {sum(found['rows'])} rows"
            lines.append(f"  {low}+ tokens ({about}): {', '.join(words)}")
        for clip in CLIPS:
            lines.append(f"  {clip}: {cell(values(part, clip, **{'class': 0}), 5)}")
    return lines


if __name__ == "__main__":
    sys.exit(command(__doc__, __file__, measure, draw, say))
