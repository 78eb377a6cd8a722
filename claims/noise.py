"""Does the noise of token ratios grow with length, and the sequence's not? GSPO, 2507.18071.

    python claims/noise.py      # writes claims/noise.csv and claims/noise.png

GRPO trains the embedded model for 25 steps, so that lengths vary. Then one rollout of 96 prompts
gives updates of 32 completions each (without a mixed group among them: none). After 1, 4 and 16 of
them, 384 completions that the old policy had sampled for other prompts are measured, which no
update has seen:
token: log w_{i,t}; mean: log s_i, the mean of a completion's log w; arithmetic: the log of the
mean of its w; product: the sum of its log w. By length, the std over completions (over tokens for
token), in nats. If the log w of a completion were independent, mean would have the variance
sum_t v_t / n^2 and product sum_t v_t, where n is the number of tokens and v_t the variance of log w
at position t over the completions of the length class.
clip_*: share of the tokens with an advantage whose gradient the clip would remove.
agree: share of the completions with A > 0 that have s > 1, and of those with A < 0 that have s < 1,
averaged over the two signs: 0.5 if s did not know of A.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import torch

from claims.kit import command, each, trainer
from run.style import new_figure, save, style
from run.table import cell

SIZES = {"steps": 25, "prompts": 96, "probe": 48}
MINI_BATCH = 32  # completions, as in a run with the default options
AFTER = (1, 4, 16)  # updates
SHOWN = 4  # updates, in the figure's last panel
EDGES = (1, 8, 16, 24, 32, 65)  # a length class is from an edge to below the next
KINDS = {  # the color and marker of each spread in the figure, its name
    "token": ("black", "s", "log w, per token"),
    "product": ("#999999", "v", "sum of log w"),
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
    """{kind: its logarithm} of the log-ratios [B, T]: token as [B, T], the others as [B]."""
    n = mask.sum(1)
    log_w = log_w * mask
    total = log_w.sum(1)
    arithmetic = ((log_w.exp() * mask).sum(1) / n).log()
    return {"token": log_w, "mean": total / n, "arithmetic": arithmetic, "product": total}


def clipped(log_ratio, A, low, high):
    """Where PPO's clip removes the gradient: ratio > 1 + high for A > 0, < 1 - low for A < 0."""
    above = (A > 0) & (log_ratio > math.log1p(high))
    return above | (A < 0) & (log_ratio < math.log1p(-low))


def position_variance(log_w, mask):
    """The variance of log w over the completions that reach a position, 0 for one alone. [T]"""
    count = mask.sum(0)
    centred = (log_w - (log_w * mask).sum(0) / count.clamp(min=1)) * mask
    return (centred**2).sum(0) / (count - 1).clamp(min=1)


def spread(log_w, mask, A):
    """A dict of one length class: its std of each kind, what independence predicts, its clips.

    log_w, mask [B, T]; A [B], 0 in groups without a signal. None where it has no such rows.
    """
    n = mask.sum(1).double()
    kinds = ratios(log_w, mask)
    row = {"rows": len(n), "length": n.mean().item()}
    row["token"] = kinds["token"][mask].std().item()
    for kind in ("mean", "arithmetic", "product"):
        row[kind] = kinds[kind].std().item()
    total = (position_variance(log_w, mask) * mask).sum(1)  # sum_t v_t
    row["mean_independent"] = (total / n**2).mean().sqrt().item()
    row["product_independent"] = total.mean().sqrt().item()
    up, down = kinds["mean"][A > 0] > 0, kinds["mean"][A < 0] < 0
    row["agree"] = None
    if len(up) and len(down):
        row["agree"] = (up.double().mean() + down.double().mean()).item() / 2
    signal = mask & (A != 0)[:, None]
    row["signal"] = signal.sum().item()
    for name, (kind, low, high) in CLIPS.items():
        ratio = kinds[kind] if kind == "token" else kinds[kind][:, None].expand(mask.shape)
        removed = clipped(ratio, A[:, None], low, high) & signal
        row[name] = removed.sum().item() / row["signal"] if row["signal"] else None
    return row


def by_length(log_w, mask, A):
    """The rows of all lengths together (class 0) and of each length class with 8 rows or more."""
    n = mask.sum(1)
    rows = [{"class": 0, **spread(log_w, mask, A)}]
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        chosen = (n >= low) & (n < high)
        if chosen.sum() >= 8:
            rows.append({"class": low, **spread(log_w[chosen], mask[chosen], A[chosen])})
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
    rows = []
    with trainer("grpo", *flags, seed=seed) as (t, _):
        for step in range(1, sizes["steps"] + 1):
            t.step(step)
        probe = draw_rollout(t, sizes["probe"])
        everyone = torch.arange(t.o.rows)
        rollout = draw_rollout(t, sizes["prompts"])
        done = 0
        for mini_batch in torch.arange(t.o.rows).split(MINI_BATCH):
            moved = t.updater.update(rollout, mini_batch, on_policy=False)["moved"]
            done += moved
            if not moved or done not in AFTER:
                continue
            with torch.no_grad():
                logp, _ = t.updater.forward(probe, everyone, t.model)
            log_w = (logp - probe.old_logprobs).double()
            found = by_length(log_w, probe.mask, probe.advantages)
            rows += [{"seed": seed, "updates": done, **row} for row in found]
    return rows


def measure(args):
    return each(run, [(seed, SIZES, ()) for seed in args.seeds], args.jobs)


def values(rows, key, **wanted):
    """The values of one column in the rows that agree with `wanted`: one per seed."""
    return [row[key] for row in rows if all(row[k] == v for k, v in wanted.items())]


def slope(rows, key):
    """Of the log of a spread against the log of the length, over the length classes; per seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        part = [row for row in rows if row["seed"] == seed and row["class"] > 0]
        x = [math.log(row["length"]) for row in part]
        y = [math.log(row[key]) for row in part]
        mx, my = fmean(x), fmean(y)
        products = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        found.append(products / sum((a - mx) ** 2 for a in x))
    return found


def classes(rows):
    """The length classes that every seed has, shortest first."""
    seeds = {row["seed"] for row in rows}
    found = {row["class"] for row in rows if row["class"] > 0}
    return [c for c in sorted(found) if len(values(rows, "seed", **{"class": c})) == len(seeds)]


def curve(rows, key):
    """(mean length, mean of the column) over the seeds, for each length class."""
    x, y = [], []
    for low in classes(rows):
        found = [v for v in values(rows, key, **{"class": low}) if v is not None]
        if found:
            x.append(fmean(values(rows, "length", **{"class": low})))
            y.append(fmean(found))
    return x, y


def draw(rows, out):
    """Spread against length after 1, 4 and 16 updates, and what the clips remove after 4."""
    figure = new_figure(11.5, 4.6)
    *axes, last = figure.subplots(1, len(AFTER) + 1)
    for ax, updates in zip(axes, AFTER, strict=True):
        part = [row for row in rows if row["updates"] == updates]
        for kind, (colour, marker, name) in KINDS.items():
            ax.loglog(*curve(part, kind), color=colour, marker=marker, ms=5, label=name)
        for kind in ("mean", "product"):
            colour = KINDS[kind][0]
            label = f"{'log s' if kind == 'mean' else 'sum'}, if tokens were independent"
            ax.loglog(*curve(part, f"{kind}_independent"), color=colour, ls=":", label=label)
        ax.set_title(f"after {updates} update{'s' if updates > 1 else ''}")
        ax.set_xlabel("tokens of the completion")
        ax.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
        ax.minorticks_off()
    low = min(ax.get_ylim()[0] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, max(ax.get_ylim()[1] for ax in axes))
    axes[0].set_ylabel("std over completions (tokens), nats")
    part = [row for row in rows if row["updates"] == SHOWN]
    for name, algo, label in (
        ("clip_gspo", "gspo", "GSPO, 3e-4 / 4e-4"),
        ("clip_grpo", "grpo", "GRPO, 0.2 / 0.2"),
    ):
        _, colour, _, marker = style(algo)
        x, y = curve(part, name)
        last.plot(x, [100 * v for v in y], color=colour, marker=marker, ms=5, label=label)
    last.set_title(f"clipped, after {SHOWN} updates")
    last.set_xlabel("tokens of the completion")
    last.set_ylabel("% of tokens with an advantage")
    last.set_ylim(-3, 105)
    last.legend(frameon=False, fontsize=9, loc="center")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, out)


def say(rows):
    lines = []
    for updates in AFTER:
        part = [row for row in rows if row["updates"] == updates]
        every = {"class": 0}
        lines.append(f"updates: {updates}; all lengths (std in nats):")
        for kind in KINDS:
            lines.append(
                f"  {kind}: std {cell(values(part, kind, **every), 4)}, "
                f"slope against length {cell(slope(part, kind), 2, '+')}"
            )
        for low in classes(part):
            found = {key: values(part, key, **{"class": low}) for key in part[0]}
            quotient = [
                a / b for a, b in zip(found["mean"], found["mean_independent"], strict=True)
            ]
            lines.append(
                f"  {low}+ tokens ({cell(found['length'], 1)}, {sum(found['rows'])} rows): "
                f"token {cell(found['token'], 4)}, mean {cell(found['mean'], 4)}, "
                f"{cell(quotient, 2)} times independent, product {cell(found['product'], 3)}, "
                f"GSPO clips {cell(found['clip_gspo'], 3)}, GRPO {cell(found['clip_grpo'], 4)}; "
                f"with the advantage {cell(found['agree'], 2)}"
            )
        agree = cell(values(part, "agree", **every), 3)
        lines.append(f"  s moves with the advantage: {agree}")
        for name in CLIPS:
            lines.append(f"  {name}: {cell(values(part, name, **every), 5)}")
    return lines


if __name__ == "__main__":
    sys.exit(command(__doc__, __file__, measure, draw, say))
