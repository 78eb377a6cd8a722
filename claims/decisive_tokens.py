"""Does entropy mark the decisive tokens? GTPO and GRPO-S, arXiv 2508.04349.

    python claims/decisive_tokens.py

GTPO is trained for 40 steps. Before and after, 64 held-out problems are sampled 8 times, and every
token gets the name of its place in the grammar of the task, "36-8=28", newline, ..., "#### 28".

What a token decides is measured by forks, before training: 32 continuations of each completion
after 0, 1, 2, ... of its tokens. V_t is the success rate after t tokens, a token's change is
(V_t - V_{t-1})^2. The square of an estimate would count its noise, so the two factors come from
two halves of the continuations (`squared_change`). A kind's share is its sum over the total.

GTPO's weight (Eq. 3 for right completions, Eq. 5 for wrong ones) is not H or 1/H, but H or 1/H
relative to the completions of the same set that still run at the same position. `same kind beside
it` is how often those have the same kind of token there. (Figure 1 of v6, as reported to us, speaks
of suppressing high-entropy tokens of wrong answers; Eq. 5 does the opposite, and gtpo.py follows
it.) Weights and neighbours are those of mixed groups. Where right answers differ in wording,
positions do not line up, and weights vary without a reason in the token.
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
from trainer.decoding import text_of
from trainer.sampling import sample

STEPS = 40
PROBLEMS, GROUP = 64, 8
DRAWS = 32  # continuations at each token
COLOURS = {"before": "#999999", "after": "#009E73", "right": "#009E73", "wrong": "#D55E00"}
COLOURS |= {"entropy": "#56B4E9", "change": "#000000"}
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


def of_forks(trainer, batch, code):
    """{(what, name): value} of the changes at all tokens of the rollout."""
    on = batch.mask
    change = torch.cat([forks(trainer, batch, row) for row in range(len(on))])
    code, H, found = code[on], batch.sampler_entropy[on], {}
    for i, name in enumerate(KINDS):
        if (code == i).any():
            found["share of the change", name] = change[code == i].sum() / change.sum()
    top = change[H >= H.quantile(0.8)].sum() / change.sum()
    return {**found, ("all", "share of the change in the top fifth of H"): top}


@torch.no_grad()
def forks(trainer, batch, row):
    """The change of the success rate at each token of a completion, squared. [n]"""
    ids, limit = batch.completions[row][batch.mask[row]].tolist(), trainer.o.max_new_tokens
    problem, prompt = batch.problems[row], batch.prompts[row]
    prefixes = [ids[:t] for t in range(len(ids))]
    starts = [prompt + prefix for prefix in prefixes]
    more = sample(trainer.model, starts, DRAWS, temperature=1.0, **trainer.generation)
    lengths, wins = more.mask.sum(1).tolist(), []
    for i, (new, n) in enumerate(zip(more.completions.tolist(), lengths, strict=True)):
        prefix = prefixes[i // DRAWS]
        truncated = bool(more.truncated[i]) or len(prefix) + n > limit
        whole = (prefix + new[: n - (not more.truncated[i])])[:limit]  # without EOS
        wins.append(trainer.grader.right(text_of(trainer.tokenizer, whole), problem, truncated))
    end = batch.right[row].expand(1, DRAWS)  # after the last token nothing is open
    return squared_change(torch.cat([torch.tensor(wins).view(-1, DRAWS), end]))


def squared_change(wins):
    """(V_t - V_{t-1})^2 of each token, without bias: each factor from one half of the draws.

    wins [n + 1, draws], 0 or 1: after 0, 1, ..., n tokens. [n]; an estimate can be below 0.
    """
    first, second = (half.double().mean(1).diff() for half in wins.chunk(2, dim=1))
    return first * second


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
    if when == "before":
        found |= of_forks(trainer, batch, code)
    compared = right & ~neighbours.isnan()
    top = compared & (H >= H[compared].quantile(0.9)) if compared.any() else compared
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


def of(rows, what, name, when):
    """Mean and half-width over the seeds; (None, None) where no seed has a value."""
    part = [r for r in rows if (r["what"], r["name"], r["when"]) == (what, name, when)]
    part = [r["value"] for r in part if r["value"] is not None]
    return mean_interval(part) if part else (None, None)


def draw(rows, out):
    """Entropy, share of entropy and of change, and GTPO's weight of each kind of token."""
    figure = new_figure(11, 4.6)
    entropy, shares, factor = figure.subplots(1, 3, sharey=True)
    names = [name for name in KINDS if of(rows, "entropy", name, "before")[0] is not None]
    names = [name for name in names if name != "other"][::-1]
    for offset, when in ((0.2, "before"), (-0.2, "after")):
        found = [of(rows, "entropy", name, when) for name in names]
        bars(entropy, found, offset, COLOURS[when], f"{when} training")
    for offset, which in ((0.2, "right"), (-0.2, "wrong")):
        found = [of(rows, f"factor, {which}", name, "after") for name in names]
        text = "right completions, H (Eq. 3)" if which == "right" else "wrong, 1/H (Eq. 5)"
        bars(factor, found, offset, COLOURS[which], text)
    for offset, what in ((0.2, "entropy"), (-0.2, "change")):
        found = [of(rows, f"share of the {what}", name, "before") for name in names]
        text = "of the entropy" if what == "entropy" else "of the change of the success rate"
        bars(shares, found, offset, COLOURS[what], text)
    shares.set(title="Shares, before training", xlabel="share of the total")
    entropy.set(title="Entropy of each kind of token", xlabel="nats")
    factor.set(title="GTPO's weight, after training", xlabel="times the mean at the position")
    factor.axvline(1, color="0.6", lw=0.8)
    for ax in (entropy, shares, factor):
        ax.set_yticks(range(len(names)), names)
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, out)


def bars(ax, found, offset, colour, label):
    """Horizontal bars with their intervals; nothing where there is no value."""
    y = [i + offset for i, (mean, _) in enumerate(found) if mean is not None]
    x = [(mean, half or 0) for mean, half in found if mean is not None]
    mean, half = zip(*x, strict=True)
    look = {"color": colour, "height": 0.38, "label": label, "ecolor": "0.3", "capsize": 2}
    ax.barh(y, mean, xerr=half, **look)


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

    shares = ("share of the tokens", "share of the entropy", "share of the change")
    for what in ("entropy", *shares, "same kind beside it", "factor, right", "factor, wrong"):
        for name in KINDS:
            add(what, name)
    for name in dict.fromkeys(row["name"] for row in rows if row["what"] == "all"):
        add("all", name)
    return lines


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
