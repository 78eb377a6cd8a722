"""What methods look like in every figure, and how a figure is begun and saved.

matplotlib is imported where it is used: --help does not wait for it. pyplot is not used: within a
trainer there is neither a display nor a global state.
"""

import csv
import textwrap
from pathlib import Path

from run.commandline import replacing
from run.table import CURVE

# methods.csv has for each method its name, its look and, for the credit picture, a note. The seven
# have the colours of Okabe and Ito, without their yellow, which is lost on white, and with a violet
# in place of their second blue; the others, those furthest (in CIELAB) from these and one another.
# Dashes and markers distinguish the methods in grey.
STYLES, NOTES = {}, {}  # {algo: (name, colour, dashes, marker)}, {algo: note}
with open(Path(__file__).with_name("methods.csv"), encoding="utf-8") as _file:
    for _row in csv.DictReader(_file):
        _dashes = (0, [float(x) for x in _row["dashes"].split()]) if _row["dashes"] else "-"
        STYLES[_row["algo"]] = _row["name"], _row["colour"], _dashes, _row["marker"]
        NOTES[_row["algo"]] = _row["note"]
OWN = ("#775522", "#444499", "#22bb55", "#bbbb77", "#55bbbb", "#7799ff")  # of the user's methods
own = {}  # {label: how many of them were drawn before}
MAX_BYTES = 300_000  # of a picture that is to be committed


def style(algo):
    """Name, colour, dashes and marker of an algorithm.

    Of ours the same in every figure, of the user's the same in this process.
    """
    if algo in STYLES:
        return STYLES[algo]
    i = own.setdefault(algo, len(own)) % len(OWN)
    return algo, OWN[i], (0, (3, 1)), "os^DvP"[i]


def method_name(algo, variant):
    """The name of a method in a table or a note, with its variant if there is one."""
    return ", ".join(filter(None, [style(algo)[0], variant]))


def looks_of(table):
    """{(algo, variant): (name, colour, dashes, marker)} of all curves, in their order.

    A method with one variant looks as in every figure. The variants of a lone method have the
    colours of viridis; beside other methods, paler and paler ones of their own.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    variants = {}  # {algo: its variants}
    for algo, variant in table[CURVE].drop_duplicates().sort_values(CURVE).itertuples(index=False):
        variants.setdefault(algo, []).append(variant)
    looks = {}
    for algo in variants:
        name, colour, dashes, marker = style(algo)
        for i, variant in enumerate(variants[algo]):
            if len(variants[algo]) > 1:
                _, _, dashes, marker = list(STYLES.values())[i % len(STYLES)]
                part = i / (len(variants[algo]) - 1)
                pale = [c + 0.65 * part * (1 - c) for c in to_rgb(style(algo)[1])]
                colour = colormaps["viridis"](0.8 * part) if len(variants) == 1 else pale
            settings = [textwrap.shorten(s, 26, placeholder="…") for s in variant.split(", ") if s]
            looks[algo, variant] = "\n".join([name, *settings]), colour, dashes, marker
    return looks


def new_figure(width, height, layout="constrained"):
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save(figure, out):
    """Write the figure whole or not at all.

    A PNG that is too large to commit gets a palette of 256 colours, a third of the size, or of 96.
    """
    with replacing(Path(out)) as part:
        kind = part.suffix[1:] or "png"
        part.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=160, format=kind)
        if kind == "png" and part.stat().st_size > MAX_BYTES:
            from PIL import Image  # a dependency of matplotlib

            image = Image.open(part).convert("RGB")
            look = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
            for colours in (256, 96):
                image.quantize(colours, **look).save(part, kind, optimize=True)
                if part.stat().st_size <= MAX_BYTES:
                    break
