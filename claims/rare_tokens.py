"""Do improbable tokens dominate the gradient? TR-GRPO (2511.00066), Reweighting (2505.12929).

    python claims/rare_tokens.py      # writes claims/rare_tokens.csv and claims/rare_tokens.png

One rollout of the embedded task, as one mini-batch on policy, from the start model and from one
that GRPO has trained. Of every token of its mixed groups:
exact: |dlogp/dtheta|, theta being all weights; one backward pass per token.
hidden: |dlogp/dh|, h the last hidden state: |(onehot - p) W|, W the output head. No backward pass.
The tokens are sorted by probability into ten equal parts, the deciles. Of each method and decile:
share: sum of |push| * exact, divided by that of all tokens. push is -dL/dlogp.
along: the decile's part of the batch's gradient g, <g_decile, g> / <g, g>; the parts add up to 1.
total: sum of |push| * exact, divided by that of GRPO (for DAPO and TR-GRPO) or of DAPO (for
Reweighting and GTPO, which average like DAPO). cosine: of g with that method's g.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import torch

from claims.kit import command, each, fisher_cell, trainer, values
from run.algorithm import load_algorithm
from run.style import new_figure, save, style
from run.table import cell
from trainer.logprobs import by_row, token_logprobs
from trainer.methods import inputs

METHODS = ("grpo", "dapo", "trgrpo", "reweight", "gtpo")
# What a method would be without its weights: total and cosine compare it with that.
BASE = {"grpo": 0, "dapo": 0, "trgrpo": 0, "reweight": 1, "gtpo": 1}
POLICIES = {"start": 0, "trained": 25}  # training steps
DRAWN = 150  # tokens of each policy in the figure, of the first seed
PARTS = 10
COLUMNS = ("seed", "policy", "kind", "method", "part", "p", "exact", "hidden", "share", "along")
EMPTY = dict.fromkeys((*COLUMNS, "total", "cosine", "rank"))


def pushes(algo, rollout, group_size):
    """-dL/dlogp [B, T] of the rollout as one mini-batch, on policy."""
    module, rows = load_algorithm(algo), slice(None)
    old, entropy = rollout.old_logprobs, rollout.entropy
    more = inputs(module.advantages, rollout, rows, entropy, old.shape[1])
    A = module.advantages(rollout.rewards, group_size, **more)
    logp = old.clone().requires_grad_()
    more = inputs(module.loss, rollout, rows, entropy, old.shape[1])
    loss = module.loss(logp, old, A, rollout.mask, **more)
    return -torch.autograd.grad(loss, logp)[0]


def gradients(model, rollout, row):
    """Yield dlogp/dtheta of each token of a row, flat [weights]."""
    weights = list(model.parameters())
    mask = rollout.mask[row : row + 1]
    prompts, ids = [rollout.prompts[row]], rollout.completions[row : row + 1]
    logprobs, _ = token_logprobs(model, prompts, ids, mask, through_head=False)
    for logp in logprobs[mask]:
        parts = torch.autograd.grad(logp, weights, retain_graph=True)
        yield torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def hidden_norms(model, rollout, row):
    """|(onehot - p) W| of each token of a row: the norm of dlogp/dh, h the last hidden state."""
    mask = rollout.mask[row : row + 1]
    prompts, ids = [rollout.prompts[row]], rollout.completions[row : row + 1]
    h = by_row(model.base_model, "last_hidden_state", prompts, ids, mask)  # [N, D]
    W = model.get_output_embeddings().weight  # [V, D]
    residual = -(h @ W.T).softmax(1)  # [N, V]
    residual[torch.arange(len(h)), ids[mask]] += 1
    return (residual @ W).norm(dim=1)


def by_probability(p):
    """The part of each token, 0 the least probable: PARTS parts of equal size. [N]"""
    order = p.argsort(stable=True)
    part = torch.empty(len(p), dtype=torch.long)
    part[order] = torch.arange(len(p)) * PARTS // len(p)
    return part


def tokens(model, rollout, push):
    """(p, exact, hidden, push, part, g) of the tokens of mixed groups, row after row.

    push: {method: [B, T]}. Returns push as [methods, N], and g [PARTS, methods, weights]: the sum
    of push * dlogp/dtheta over the tokens of each part.
    """
    on = rollout.mask & rollout.measured[:, None]
    p = rollout.old_logprobs[on].exp()
    part = by_probability(p)
    push = torch.stack([values[on] for values in push.values()])
    count = sum(weight.numel() for weight in model.parameters())
    g = torch.zeros(PARTS, len(push), count, dtype=push.dtype)
    exact, hidden = [], []
    for row in rollout.measured.nonzero()[:, 0].tolist():
        hidden.append(hidden_norms(model, rollout, row))
        for gradient in gradients(model, rollout, row):
            n = len(exact)
            exact.append(gradient.norm())
            g[part[n]].addr_(push[:, n], gradient)
    return p, torch.stack(exact), torch.cat(hidden), push, part, g


def rank_correlation(x, y):
    """Spearman's: Pearson's correlation of the ranks."""
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def table(p, exact, hidden, push, part, g):
    """The rows of one rollout: of its deciles, of its methods, and of their deciles."""
    rows = [{"kind": "ranks", "rank": rank_correlation(exact, hidden)}]
    size = push.abs() * exact  # [methods, N]
    whole = g.sum(0).double()  # [methods, weights]
    for d in range(PARTS):
        chosen = part == d
        row = {"kind": "decile", "part": d}
        row["p"] = p[chosen].mean().item()
        row["exact"] = exact[chosen].mean().item()
        row["hidden"] = hidden[chosen].mean().item()
        rows.append(row)
        for m, method in enumerate(METHODS):
            row = {"kind": "share", "method": method, "part": d}
            own = size[m, chosen].sum()
            row["share"] = (own / size[m].sum()).item()
            along = g[d, m].double() @ whole[m]
            row["along"] = (along / (whole[m] @ whole[m])).item()
            base = size[BASE[method], chosen].sum()
            row["total"] = (own / base).item()
            rows.append(row)
    for m, method in enumerate(METHODS):
        row = {"kind": "batch", "method": method}
        base = BASE[method]
        row["total"] = (size[m].sum() / size[base].sum()).item()
        row["exact"] = whole[m].norm().item()
        cosine = torch.cosine_similarity(whole[m], whole[base], dim=0)
        row["cosine"] = cosine.item()
        rows.append(row)
    return rows


def drawn_tokens(p, exact, hidden):
    """The rows of DRAWN tokens for the figure, evenly spaced in the rollout."""
    drawn = torch.linspace(0, len(p) - 1, min(DRAWN, len(p))).long()
    rows = []
    for n in drawn.tolist():
        row = {"kind": "token", "p": p[n].item()}
        row["exact"] = exact[n].item()
        row["hidden"] = hidden[n].item()
        rows.append(row)
    return rows


def run(task):
    """The rows of one seed. task: (seed, {policy: training steps}, options of train.py)."""
    seed, policies, flags = task
    rows, done = [], 0
    with trainer("grpo", *flags, seed=seed) as (t, _):
        for policy, steps in policies.items():
            while done < steps:
                done += 1
                t.step(done)
            rollout, _ = t.sample_and_reward()
            t.updater.measure(rollout, [torch.arange(t.o.rows)])
            push = {algo: pushes(algo, rollout, t.o.group_size) for algo in METHODS}
            p, exact, hidden, *rest = tokens(t.model, rollout, push)
            found = table(p, exact, hidden, *rest)
            if seed == 0:
                found += drawn_tokens(p, exact, hidden)
            rows += [{**EMPTY, "seed": seed, "policy": policy, **row} for row in found]
    return rows


def measure(args):
    return each(run, [(seed, POLICIES, ()) for seed in args.seeds], args.jobs)


def draw(rows, out):
    """A row of panels for each policy: norms, shares, and what the weights do by decile."""
    figure = new_figure(12, 7.4)
    axes = figure.subplots(2, 3)
    for line, policy in zip(axes, POLICIES, strict=True):
        part = [row for row in rows if row["policy"] == policy]
        draw_norms(line[0], part, policy)
        draw_shares(line[1], part)
        draw_weights(line[2], part)
    axes[0, 0].set_title("Gradient norm of single tokens")
    axes[0, 1].set_title("Share of the total push x norm")
    axes[0, 2].set_title("What the weights change")
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[0, 1].legend(frameon=False, fontsize=9)
    look = {"frameon": False, "fontsize": 9, "loc": "lower center"}
    axes[0, 2].legend(ncols=2, columnspacing=0.8, handlelength=1.6, **look)
    save(figure, out)


def by_decile(rows, key, **wanted):
    """The mean over the seeds of one column, for each decile."""
    return [fmean(values(rows, key, part=d, **wanted)) for d in range(PARTS)]


def draw_norms(ax, rows, policy):
    """|dlogp/dtheta| against p, and (onehot - p) W scaled to the same mean."""
    points = [row for row in rows if row["kind"] == "token"]
    p = [row["p"] for row in points]
    exact = [row["exact"] for row in points]
    hidden = [row["hidden"] for row in points]
    scale = fmean(exact) / fmean(hidden)
    ax.plot(p, exact, ".", color="black", ms=5, label="exact: all weights")
    label = f"last hidden state, x {scale:.0f}"
    ax.plot(p, [scale * x for x in hidden], "+", color="#D55E00", ms=6, label=label)
    ax.set(yscale="log", xlabel="probability of the token")
    ax.set_ylabel(f"{policy} policy\n\nnorm of its gradient")


def draw_shares(ax, rows):
    for method in METHODS:
        name, colour, dashes, marker = style(method)
        share = by_decile(rows, "share", kind="share", method=method)
        look = {"color": colour, "ls": dashes, "marker": marker, "ms": 5}
        ax.plot(range(1, PARTS + 1), [100 * x for x in share], label=name, **look)
    ax.set_ylabel("% of the method's total")
    decile_axis(ax, rows)


def draw_weights(ax, rows):
    """The total of a decile beside that of the base method, as it is and at equal totals."""
    for method, base in (("trgrpo", "GRPO"), ("reweight", "DAPO")):
        name, colour, _, marker = style(method)
        raw = by_decile(rows, "total", kind="share", method=method)
        whole = fmean(values(rows, "total", kind="batch", method=method))
        x = range(1, PARTS + 1)
        ax.plot(x, raw, color=colour, marker=marker, ms=5, label=f"{name} / {base}")
        equal = [value / whole for value in raw]
        label = "at equal totals"
        ax.plot(x, equal, color=colour, ls=":", marker=marker, ms=5, mfc="white", label=label)
    ax.axhline(1, color="0.7", lw=0.8, zorder=0)
    ax.set_ylim(0.45, 1.5)
    ax.set_ylabel("push x norm, with / without weights")
    decile_axis(ax, rows)


def decile_axis(ax, rows):
    """Name each decile by its number and the mean probability of its tokens."""
    p = by_decile(rows, "p", kind="decile")
    labels = [f"{d + 1}\n{x:.2f}" for d, x in enumerate(p)]
    ax.set_xticks(range(1, PARTS + 1), labels, fontsize=8)
    ax.set_xlabel("decile of the tokens; their mean probability")


def first(rows, key, count, method):
    """The sum over the `count` least probable deciles, one per seed."""
    columns = [values(rows, key, kind="share", method=method, part=d) for d in range(count)]
    return [100 * sum(column) for column in zip(*columns, strict=True)]


def difference(rows, method, base):
    """How many points of the total the least probable tokens have less, at equal seed."""
    words = []
    for count in (1, 2):
        of_both = first(rows, "share", count, method), first(rows, "share", count, base)
        less = [a - b for a, b in zip(*of_both, strict=True)]
        words.append(f"decile 1{'-2' if count == 2 else ''} {cell(less, 1, '+')} points")
    whole = values(rows, "total", kind="batch", method=method)
    own = values(rows, "total", kind="share", method=method, part=0)
    equal = [a / b for a, b in zip(own, whole, strict=True)]
    words.append(f"decile 1 weighs {cell(own, 3)} times, at equal totals {cell(equal, 3)} times")
    length = cell(longer(rows, method, base), 0)
    words.append(f"{length}% of the change of g is the step's length")
    return "; ".join(words)


def longer(rows, method, base):
    """% of |g - g_base|^2 that lies along g_base: a longer (or shorter) step, per seed.

    Along it, g - g_base has |g| cos - |g_base|; across it, |g| sin.
    """
    norms = values(rows, "exact", kind="batch", method=method)
    bases = values(rows, "exact", kind="batch", method=base)
    cosines = values(rows, "cosine", kind="batch", method=method)
    found = []
    for norm, own, cosine in zip(norms, bases, cosines, strict=True):
        along = norm * cosine - own
        across_squared = norm**2 * (1 - cosine**2)
        found.append(100 * along**2 / (along**2 + across_squared))
    return found


def say(rows):
    lines = []
    for policy in POLICIES:
        part = [row for row in rows if row["policy"] == policy]
        ranks = fisher_cell(values(part, "rank", kind="ranks"), 3)
        lines.append(f"{policy} policy: rank correlation of exact and hidden {ranks}")
        for d in (0, 1, 2, 4, 9):
            p = cell(values(part, "p", kind="decile", part=d), 4)
            norm = cell(values(part, "exact", kind="decile", part=d), 4)
            lines.append(f"  decile {d + 1}: mean p {p}, mean norm {norm}")
        for method in METHODS:
            one = cell(first(part, "share", 1, method), 1)
            two = cell(first(part, "share", 2, method), 1)
            along = cell(first(part, "along", 2, method), 1)
            batch = {"kind": "batch", "method": method}
            total = cell(values(part, "total", **batch), 3)
            norm = cell(values(part, "exact", **batch), 3)
            cosine = cell(values(part, "cosine", **batch), 4)
            lines.append(
                f"  {style(method)[0]}: decile 1 has {one}%, deciles 1-2 have "
                f"{two}% of push x norm, {along}% along g; "
                f"total {total}, |g| {norm}, cosine {cosine}"
            )
        for method, base in (("trgrpo", "grpo"), ("reweight", "dapo")):
            names = f"{style(method)[0]} less {style(base)[0]}"
            lines.append(f"  {names}: {difference(part, method, base)}")
    return lines


if __name__ == "__main__":
    sys.exit(command(__doc__, __file__, measure, draw, say))
