"""The credit picture: how hard each method pushes each token of one group of samples.jsonl.

`push` computes the pushes with the methods' own functions; `plot_credit` draws them, for plot.py
--credit. torch and matplotlib are imported where they are used: --help does not wait for them.
"""

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from run.runs import ORDER, finite
from run.samples import read_groups
from run.style import NOTES, new_figure, save, style
from trainer.methods import ALGORITHMS, is_file, label

WIDE = 112  # characters in a line of cells
MOST_LINES = 2  # of one completion
MOST_TALL = 9  # panels with a title above them; more have their names on the left
KEYS = (  # label, strength, whether it is clipped
    ("more likely (−∂loss/∂logprob > 0)", 1, False),
    ("less likely", -1, False),
    ("clipped: exactly 0", 0, True),
)
UNDRAWABLE = "[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]"  # no glyph, not allowed in an SVG


def push(algo, group, values=None):
    """How the algorithm pushes the tokens of one group, which is its whole mini-batch.

    values: {name: value} of its options that are not at their defaults. group: of `tensors`.

    Returns -dloss/dlogprobs [G, T], above 0 where the update makes a token more likely, and clipped
    [G, T], where the advantage is not 0 and yet the gradient is exactly 0.
    """
    import torch

    from run.algorithm import load_algorithm
    from trainer.methods import inputs, split_options

    module = load_algorithm(algo)
    advantage_options, loss_options = split_options(module, values or {})
    G, T = group.mask.shape

    def filled(function, options):
        return {**inputs(function, group, slice(None), group.entropy, T), **options}

    more = filled(module.advantages, advantage_options)
    advantages = module.advantages(group.rewards, G, **more)  # [G] or [G, T]
    logprobs = group.logprobs.detach().clone().requires_grad_()
    batch = logprobs, group.old_logprobs, advantages, group.mask
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Clip-Cov draws its tokens: every picture shows the same
        loss = module.loss(*batch, **filled(module.loss, loss_options))
    (gradient,) = torch.autograd.grad(loss, logprobs)  # [G, T]
    has_advantage = advantages.reshape(G, -1) != 0  # [G, 1] or [G, T]
    clipped = has_advantage & (group.mask != 0) & (gradient == 0)
    return -gradient, clipped


def tensors(rows):
    """The completions of one group for `push`, in fp64: rewards, right [G]; the others [G, T].

    samples.jsonl has the texts of the tokens and not their ids: equal texts get equal ids.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(lists):
        values = [torch.tensor(row, dtype=torch.float64) for row in lists]
        return pad_sequence(values, batch_first=True)  # [G, T]

    ids = {}  # {text of a token: its id}
    for row in rows:
        for token in row["tokens"]:
            ids.setdefault(token, len(ids))
    group = SimpleNamespace(history=None, ref_logprobs=None)
    for name in ("entropy", "logprobs", "old_logprobs"):
        setattr(group, name, padded(row[name] for row in rows))
    group.rewards = torch.tensor([row["reward"] for row in rows]).double()
    group.right = torch.tensor([row["right"] for row in rows])
    group.mask = padded([1.0] * len(row["tokens"]) for row in rows).float()
    group.completions = padded([ids[token] for token in row["tokens"]] for row in rows).long()
    return group


def is_complete(row):
    """Whether a row of `read_groups` has tokens, a finite reward and finite numbers per token.

    Single rows that made the trainer skip an update are logged too; they are marked "skipped".
    """
    if row.get("skipped") or not row["tokens"]:
        return False
    numbers = [row["reward"], *row["logprobs"], *row["old_logprobs"], *row["entropy"]]
    return None not in map(finite, numbers)


def read_group(path, step=None):
    """One prompt's completions at one step, with right and wrong ones among them.

    path: a run folder or a samples.jsonl. Without a `step`: groups with two of each come before
    others, and of these the one whose policy moved most, by mean |log ratio|. Raises ValueError.
    """
    path = path / "samples.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    mixed = []
    for rows in read_groups(path):
        rows = list(filter(is_complete, rows))
        right = sum(row["right"] for row in rows)
        if 0 < right < len(rows):
            moved = [np.subtract(row["logprobs"], row["old_logprobs"]) for row in rows]
            moved = np.abs(np.concatenate(moved)).mean()
            mixed.append((min(right, len(rows) - right, 2), moved, rows))
    what = "no group with both right and wrong completions, with tokens and finite numbers"
    if not mixed:
        raise ValueError(f"{path}: {what}")
    chosen = [group for group in mixed if step in (None, group[2][0]["step"])]
    if not chosen:
        steps = sorted({rows[0]["step"] for _, _, rows in mixed})
        at = f"at step {step}; at {', '.join(map(str, steps))} it has one"
        raise ValueError(f"{path}: {what}, {at}")
    return max(chosen, key=lambda group: group[:2])[2]


def pick(rows, shown):
    """Indices of the rows to show, the right ones first, at most `shown` of each kind.

    Of each kind, the shortest, the longest and what lies between.
    """
    picked = []
    for right in (True, False):
        kind = [i for i, row in enumerate(rows) if row["right"] == right]
        kind.sort(key=lambda i: len(rows[i]["tokens"]))
        places = np.linspace(0, len(kind) - 1, shown).round().astype(int)
        picked += [kind[place] for place in np.unique(places)]
    return picked


def plot_credit(path, out, step=None, shown=2, algos=ALGORITHMS):
    """Draw one group of completions under some algorithms.

    Of its right and of its wrong ones, `shown` each are drawn; advantages and losses are those of
    the whole group. path: a run folder or a samples.jsonl. Raises ValueError.
    """
    rows = read_group(Path(path), step)
    panels = credit_panels(tensors(rows), algos)
    picked = pick(rows, shown if len(panels) <= MOST_TALL else 1)
    panels = [(title, x[picked], clipped[picked]) for title, x, clipped in panels]
    caption = f"Step {rows[0]['step']}, {len(picked)} of {len(rows)} completions of: "
    caption += re.sub(UNDRAWABLE, "�", rows[0]["prompt"])
    draw_panels([rows[i] for i in picked], panels, caption, out)


def credit_panels(group, algos):
    """[(title, values [G, T], clipped [G, T]), ...]: the entropy, then what each method does.

    Methods that push every token equally share a panel.
    """
    import torch

    panels = [["Entropy of the policy that sampled, in nats", group.entropy, group.mask < 0]]
    for algo in sorted(algos, key=[*ORDER, *algos].index):
        values, clipped = push(algo, group)
        name = style(label(algo))[0]
        for panel in panels[1:]:
            if torch.allclose(panel[1], values, rtol=1e-6, atol=1e-12):
                panel[0] = panel[0].replace(":", f" = {name}:", 1)
                break
        else:
            panels.append([f"{name}: {note(algo)}", values, clipped])
    return panels


def note(algo):
    """What the credit picture says about a method; of a user's file, how its docstring begins."""
    if not is_file(algo):
        return NOTES[algo]
    from run.algorithm import load_algorithm

    text = load_algorithm(algo).__doc__ or Path(algo).name
    return textwrap.shorten(text.strip().split("\n\n")[0], 80, placeholder=" …")


def draw_panels(rows, panels, caption, out):
    """Draw panels [(title, values [rows, T], clipped [rows, T]), ...] of the tokens of some rows.

    The first is an amount, the others go to both sides of 0. Each has a scale of its own. Of many
    panels, the first words of the titles stand on the left.
    """
    cells = [cells_of(cell_texts(row)) for row in rows]
    starts = np.cumsum([0, *(row[-1][0] + 1 if row else 1 for row in cells)])  # lines of cells
    is_tall = len(panels) <= MOST_TALL
    titles = [title_of(*panel[:2], is_tall) for panel in panels]
    line, gap, size = (0.18, 0.33, 8) if is_tall else (0.15, 0.03, 6)  # inches, and a font's size
    more = 0.16 * sum(title.count("\n") for title in titles) if is_tall else 0
    figure = new_figure(8, 1.1 + more + len(panels) * (line * starts[-1] + gap))
    figure.get_layout_engine().set(hspace=0, h_pad=0.05 if is_tall else 0.01)
    caption = textwrap.fill(caption, 116, max_lines=2, placeholder=" …")
    figure.suptitle(caption, x=0.01, ha="left", fontsize=8.5, parse_math=False)
    wide = WIDE if is_tall else max(x + width for row in cells for _, x, width, _ in row)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for i, (ax, (_, values, clipped)) in enumerate(zip(axes, panels, strict=True)):
        ax.set(xlim=(0, wide), ylim=(starts[-1], 0))
        ax.set_axis_off()
        if is_tall:
            ax.set_title(titles[i], loc="left", fontsize=9, pad=3, parse_math=False)
        else:
            how = {"ha": "right", "va": "center", "fontsize": 6.8, "parse_math": False}
            ax.text(-0.08 * wide, starts[-1] / 2, titles[i], **how)
        shade = values / (values.abs().max() or 1)  # -1..1
        for j, row in enumerate(rows):
            grade = "right" if row["right"] else "WRONG"
            ax.text(-1, starts[j] + 0.5, grade, ha="right", va="center", fontsize=size)
            colours = "RdBu" if i else "PRGn_r"
            draw_tokens(ax, starts[j], cells[j], shade[j].tolist(), clipped[j], colours)
    add_key(figure)
    save(figure, out)


def title_of(title, values, is_tall):
    """The title of a panel above its cells, or the name of one on their left; with its scale."""
    name = title if is_tall else re.split(",|:", title)[0]
    words = f"{name} (full colour: {values.abs().max():.2g})"
    return textwrap.fill(words, 100 if is_tall else 34)


def add_key(figure):
    """What the colours mean, at the bottom."""
    from matplotlib.patches import Patch

    keys = [Patch(label=label, **look_of(*how, "RdBu")) for label, *how in KEYS]
    title = "At its default options, the method's update makes a token (a scale for each method)"
    how = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 8.5}
    figure.legend(handles=keys, title=title, title_fontsize=8.5, **how)


def cell_texts(row):
    """What the cells of a row's tokens show. Its EOS, which is not in the completion, is EOS."""
    texts = [cell_text(token) for token in row["tokens"]]
    if not row["completion"].endswith(row["tokens"][-1]):
        texts[-1] = "EOS"
    return texts


def cell_text(token):
    """A token as its cell shows it; ◌ adds no text, as the first part of a character does not."""
    if not token:
        return "◌"
    text = token.replace("\n", "↵").strip()
    return re.sub(UNDRAWABLE, "�", text) or "␣"


def cells_of(texts):
    """(line, place in it, width, text) of each token's cell, in characters; wraps at WIDE.

    After MOST_LINES the rest is left out, and the last cell is an ellipsis.
    """
    cells, line, x = [], 0, 0.0
    for text in texts:
        width = len(text) + 0.7
        if x + width > WIDE - 2:
            line, x = line + 1, 0.0
        if line == MOST_LINES:
            return [*cells, (line - 1, WIDE - 2, 1.7, "…")]
        cells.append((line, x, width, text))
        x += width
    return cells


def draw_tokens(ax, start, cells, shade, clipped, colours):
    """Draw the cells of one completion from line `start` on. shade [T] in -1..1; clipped [T]."""
    from matplotlib.patches import Rectangle

    for (line, x, width, text), value, is_clipped in zip(cells, shade, clipped, strict=False):
        place, look = (x, start + line + 0.04), look_of(value, is_clipped, colours)
        if text == "…":
            look = look_of(0, False, colours)
        ax.add_patch(Rectangle(place, width, 0.92, **look))
        how = {"family": "DejaVu Sans Mono", "fontsize": 6.8, "parse_math": False}
        how["color"] = "white" if abs(value) > 0.56 else "black"
        ax.text(x + width / 2, start + line + 0.52, text, ha="center", va="center", **how)


def look_of(value, is_clipped, colours):
    """The look of a cell: by the square root of |value|, so that a small push can be seen.

    The ends of a colour map are too dark to read text on.
    """
    from matplotlib import colormaps

    colour = colormaps[colours](0.5 + 0.38 * np.sign(value) * abs(value) ** 0.5)
    edge = {"ec": "#CFCFCF", "hatch": "///"} if is_clipped else {"ec": "white"}
    return {"fc": colour, "lw": 0.4, **edge}
