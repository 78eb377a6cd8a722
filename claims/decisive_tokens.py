"""Does entropy mark the decisive tokens? GTPO and GRPO-S, arXiv 2508.04349.

    python claims/decisive_tokens.py

GTPO is trained for 40 steps. Before and after, 64 held-out problems are sampled 8 times, and every
token gets the name of its place in the grammar of the task, "36-8=28", newline, ..., "#### 28".
Written are, per seed: the entropy of each kind of token; the factor with which Eq. 3 (right) and
Eq. 5 (wrong) weigh it, H or 1/H relative to the completions of the same set that still run at the
same position; and how often those have the same kind of token there. The last panel shifts one of
two equal completions by a token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from grpo import constant
from gtpo import share
from run.style import new_figure, save
from run.table import mean_interval

STEPS = 40
PROBLEMS, GROUP = 64, 8
POSITIONS = 36  # drawn
EXAMPLE = (*"36-8=28", "\n", *"28+1=29", "\n", "#", " ", *"29", "end")
COLOURS = {"before": "#999999", "after": "#009E73", "right": "#009E73", "wrong": "#D55E00"}
KINDS = (
    "line start",  # the first digit of a step, or the # of the answer: go on, or answer now
    "number",
    "operator",
    "change",
    "equals",
    "result",
    "newline",
    "answer mark",
    "answer, worked",
    "answer, guessed",  # with fewer lines of work than the problem has steps
    "end",
    "other",
)


def kinds(tokens, steps, eos):
    """The kind of each token of one completion. steps: calculations that the problem needs."""
    names, place, lines = [], "line start", 0
    for token in tokens:
        if token == eos:
            names.append("end")
            continue
        if token == "\n":
            names.append("newline")
            place, lines = "line start", lines + 1
            continue
        if place == "line start":
            names.append(place)
            place = "answer" if token.startswith("#") else "number"
        elif place == "answer":
            worked = "answer, worked" if lines >= steps else "answer, guessed"
            names.append(worked if token.isdigit() else "answer mark")
        elif token in ("+", "-"):
            names.append("operator")
            place = "change"
        elif token == "=":
            names.append("equals")
            place = "result"
        else:
            names.append(place if token.isdigit() else "other")
    return names


def codes(trainer, batch):
    """The index in KINDS of each token; -1 off the mask. [B, T]"""
    found = torch.full(batch.mask.shape, -1)
    decode, eos = trainer.tokenizer.decode, trainer.tokenizer.eos_token
    for i, (ids, n) in enumerate(zip(batch.completions.tolist(), batch.mask.sum(1), strict=True)):
        steps = batch.problems[i]["answer"].count("\n")
        names = kinds([decode([token]) for token in ids[:n]], steps, eos)
        found[i, :n] = torch.tensor([KINDS.index(name) for name in names])
    return found


def factors(entropy, right, mask, group_size):
    """What alpha2 multiplies in Eqs. 3 and 5: 1 on average over a set at a position. [B, T]"""
    on = mask.view(-1, group_size, mask.shape[1])  # [P, G, T]
    H = entropy.view_as(on).masked_fill(~on, 1).clamp(min=1e-6)
    successful = (right > 0.5).view(-1, group_size, 1)
    plus, minus = on & successful, on & ~successful
    return (share(H, plus) + share(1 / H, minus)).view_as(mask)


def same_kind(code, members, group_size):
    """Per token, the share of the other members of its group at its position with its kind.

    members [B, T]: the tokens of one set. [B, T]; NaN where there is no other member.
    """
    shape = -1, group_size, code.shape[1]
    code, on = code.view(shape), members.view(shape)
    both = on[:, :, None] & on[:, None]  # [P, G, G, T]
    both &= ~torch.eye(group_size, dtype=torch.bool)[..., None]
    same = both & (code[:, :, None] == code[:, None])
    return (same.sum(2) / both.sum(2)).view_as(members)  # 0 / 0 is NaN


def in_mixed_group(batch):
    """Which completions have both right and wrong ones in their group. [B] bool"""
    return ~constant(batch.right.view(-1, GROUP)).repeat_interleave(GROUP)


def look(trainer, problems, when, seed):
    """Rows of one rollout of the current policy: {what, when, seed, name, value}."""
    batch = kit.rollout(trainer, problems)
    code, H, on = codes(trainer, batch), batch.sampler_entropy, batch.mask
    mixed = in_mixed_group(batch)[:, None] & on  # [B, T]; in the others all advantages are 0
    right, wrong = mixed & (batch.right > 0.5)[:, None], mixed & (batch.right < 0.5)[:, None]
    weight = factors(H, batch.right, on, GROUP)
    neighbours = same_kind(code, right, GROUP)
    found = {}  # (what, name): value
    for i, name in enumerate(KINDS):
        here = on & (code == i)
        if not here.any():
            continue
        found["entropy", name] = H[here].mean()
        found["share of the tokens", name] = here.sum() / on.sum()
        found["share of the entropy", name] = H[here].sum() / H[on].sum()
        for what, members in (("factor, right", right), ("factor, wrong", wrong)):
            found[what, name] = weight[here & members].mean()  # NaN where there is none
        found["same kind beside it", name] = neighbours[here].nanmean()
    for t in range(min(POSITIONS, on.shape[1])):
        found["entropy at position", t + 1] = H[:, t][on[:, t]].mean()
        found["same kind at position", t + 1] = neighbours[:, t].nanmean()
    compared = right & ~neighbours.isnan()
    top = compared & (H >= H[compared].quantile(0.9))
    found["all", "right tokens alone at their position"] = 1 - compared.sum() / right.sum()
    found["all", "same kind beside it"] = neighbours.nanmean()
    found["all", "factor below 1 in the top tenth of H"] = (weight[top] < 1).float().mean()
    found["all", "accuracy"] = batch.right.mean()
    found["all", "entropy"] = H[on].mean()
    rows = []
    for (what, name), value in found.items():
        value = None if value != value else float(value)  # NaN is nothing
        rows.append({"what": what, "when": when, "seed": seed, "name": name, "value": value})
    return rows


def one_seed(task):
    """The rows of a seed: GTPO before and after training."""
    seed, steps, count = task
    with kit.trainer("gtpo", "--group-size", str(GROUP), seed=seed) as (trainer, held_out):
        rows = look(trainer, held_out[:count], "before", seed)
        for step in range(1, steps + 1):
            trainer.step(step)
        return rows + look(trainer, held_out[:count], "after", seed)


def measure(args, steps=STEPS, problems=PROBLEMS):
    return kit.each(one_seed, [(seed, steps, problems) for seed in args.seeds], args.jobs)


def shifted(H):
    """Eq. 3's factor of each token where the group's other right completion has the entropies H
    too: (where it is the same, where one more token stands before them). H [T] -> [T], [T]
    """
    other = torch.cat([H[:1], H[:-1]])
    same, later = torch.stack([H, H]), torch.stack([H, other])
    on = torch.ones(1, 2, len(H), dtype=torch.bool)
    return tuple(share(pair[None], on)[0, 0] for pair in (same, later))


def of(rows, what, name, when):
    """Mean and half-width over the seeds; (None, None) where no seed has a value."""
    part = [r for r in rows if (r["what"], r["name"], r["when"]) == (what, name, when)]
    part = [r["value"] for r in part if r["value"] is not None]
    return mean_interval(part) if part else (None, None)


def draw(rows, out):
    """Entropy and factor of each kind of token, entropy at each position, and one shift."""
    figure = new_figure(11, 8)
    (entropy, factor), (position, shift) = figure.subplots(2, 2)
    names = [name for name in KINDS if of(rows, "entropy", name, "before")[0] is not None]
    names = [name for name in names if name != "other"][::-1]
    for offset, when in ((0.2, "before"), (-0.2, "after")):
        found = [of(rows, "entropy", name, when) for name in names]
        bars(entropy, found, offset, COLOURS[when], f"{when} training")
        x = range(1, POSITIONS + 1)
        y = [of(rows, "entropy at position", t, when)[0] for t in x]
        y = [float("nan") if value is None else value for value in y]
        position.plot(x, y, color=COLOURS[when], marker="o", ms=3, label=f"{when} training")
    for offset, which in ((0.2, "right"), (-0.2, "wrong")):
        found = [of(rows, f"factor, {which}", name, "after") for name in names]
        text = "right completions, H (Eq. 3)" if which == "right" else "wrong, 1/H (Eq. 5)"
        bars(factor, found, offset, COLOURS[which], text)
    for ax, title, label in (
        (entropy, "Entropy of each kind of token", "nats"),
        (
            factor,
            "Weight of each kind, after training",
            "times the mean at the position",
        ),
    ):
        ax.set_yticks(range(len(names)), names)
        ax.set_title(title)
        ax.set_xlabel(label)
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    factor.axvline(1, color="0.6", lw=0.8)
    position.set(title="Entropy at each position", xlabel="position", ylabel="nats")
    position.set_ylim(bottom=0)
    position.legend(frameon=False, fontsize=8, loc="upper right")
    draw_shift(shift, rows)
    save(figure, out)


def bars(ax, found, offset, colour, label):
    """Horizontal bars with their intervals; nothing where there is no value."""
    y = [i + offset for i, (mean, _) in enumerate(found) if mean is not None]
    x = [(mean, half or 0) for mean, half in found if mean is not None]
    mean, half = zip(*x, strict=True)
    look = {"color": colour, "height": 0.38, "label": label, "ecolor": "0.3", "capsize": 2}
    ax.barh(y, mean, xerr=half, **look)


def draw_shift(ax, rows):
    names = kinds(EXAMPLE, 2, "end")
    H = torch.tensor([max(of(rows, "entropy", name, "after")[0] or 0, 1e-6) for name in names])
    same, later = (values.tolist() for values in shifted(H))
    x = range(len(H))
    ax.bar(x, later, color="#4411BB", label="the other is the same, one token later")
    ax.plot(x, same, color="#000000", lw=1.5, label="the other is the same")
    ax.set_xticks(x, ["\\n" if token == "\n" else token for token in EXAMPLE], fontsize=8)
    ax.set(title="Weight of each token, if one other is right", ylim=(0, 2.6))
    ax.set(xlabel="token", ylabel="times the mean at the position")
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def say(rows):
    lines = []

    def add(what, name, digits=3):
        values = []
        for when in ("before", "after"):
            mean, half = of(rows, what, name, when)
            if mean is not None:
                half = "" if half is None else f" ± {half:.{digits}f}"
                values.append(f"{when} {mean:.{digits}f}{half}")
        lines.append(f"{what}: {name}: {', '.join(values)}")

    whats = ("entropy", "share of the tokens", "share of the entropy", "same kind beside it")
    for what in (*whats, "factor, right", "factor, wrong"):
        for name in KINDS:
            add(what, name)
    for name in dict.fromkeys(row["name"] for row in rows if row["what"] == "all"):
        add("all", name)
    return lines


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
