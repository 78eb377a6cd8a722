"""docs/family.md: each cell of its tables, and its tree, against the code."""

import inspect
import math
import re

import pytest
import torch
from conftest import ROOT
from test_losses import PENALTY, close, value_and_grad

from trainer.methods import ALGORITHMS as SEVEN
from trainer.methods import MORE, load_method, named

PAGE = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")


def table(header):
    """{first cell: the other cells} of the table whose header starts so."""
    lines = PAGE[PAGE.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {row[0].strip(): [cell.strip().replace("\\|", "|") for cell in row[1:]] for row in rows}


def find(link):
    """(title, module) of a cell such as [CISPO](../more/cispo.py)."""
    title, path = re.fullmatch(r"\[(.+)\]\(\.\./(.+)\.py\)", link).groups()
    return title, load_method(path.removeprefix("more/"))


METHODS = {}  # {title: (module, cells)}
for link, cells in table("method | ratio").items():
    METHODS[find(link)[0]] = (find(link)[1], cells)
every_method = pytest.mark.parametrize("title", METHODS)


def gradient(module, w, a, old=0.1):
    """dL/dlogp of rows with the ratios w [B, T] and advantages a [B]; without KL-Cov's penalty."""
    w = torch.tensor(w, dtype=torch.float64)
    old = torch.full_like(w, old).log()
    options = PENALTY["kl_cov"] if module.__name__ == "more.kl_cov" else {}
    advantages = torch.tensor(a, dtype=torch.float64)
    args = (old, advantages, torch.ones_like(w))
    return value_and_grad(module.loss, old + w.log(), *args, **options)[1]


def test_all_methods_are_there_once():
    names = [module.__name__.removeprefix("more.") for module, _ in METHODS.values()]
    assert sorted(names) == sorted([*SEVEN, *MORE])
    files = [path.stem for path in (ROOT / "more").glob("*.py")]
    assert sorted(files) == sorted(MORE)
    assert list(table("method | A > 0")) == list(METHODS)
    for module, (*_, new) in METHODS.values():
        assert len(new.split()) <= 10, module


@every_method
def test_ratio(title):
    """Two tokens just off policy, inside every range: what their gradients are multiplied by."""
    module, (kind, *_) = METHODS[title]
    w = torch.tensor([1 + 2e-4, 1 - 1e-4], dtype=torch.float64)
    s, W = w.log().mean().exp().expand(2), w.prod().expand(2)
    right, wrong = {
        "token": (w, w),
        "arithmetic mean": (w, w),  # its derivative, too, is each token's own ratio
        "geometric mean": (s, s),
        "product": (W, W),
        "inverse where A > 0": (1 / w, w),
        "half token, half geometric mean": ((w + s) / 2, (w + s) / 2),
        "product, inverse where A > 0": (1 / W, W),
        "1 - log w / A": (1 - w.log(), 1 + w.log()),
        "none where A > 0, else token up to 1": (w**0, w.clamp(max=1)),
    }[kind]
    for a, want in ((1.0, right), (-1.0, wrong)):
        on_policy = gradient(module, [[1.0, 1.0]], [a])
        close(gradient(module, [w.tolist()], [a]) / on_policy, want[None], rtol=1e-7)
    if kind == "arithmetic mean":  # one of the two is outside the range, their mean is not
        assert gradient(module, [[1.5, 1.0]], [1.0]).all()
        assert not gradient(module, [[1.5, 1.1]], [1.0]).any()


@every_method
def test_range(title):
    """Low / high are the loss's defaults, and a token beyond them is treated in another way."""
    module, (_, text, *_) = METHODS[title]
    parameters = inspect.signature(module.loss).parameters
    names = [f"{p}_{side}" for side in ("low", "high") for p in ("eps", "delta")]
    defaults = [parameters[name].default for name in names if name in parameters]
    if text == "none":
        assert not defaults
        return
    low, high = re.match(r"(\S+) / (\S+)", text).groups()
    assert [float(low), float(high)] == defaults
    unit = text.removeprefix(f"{low} / {high}").strip()
    edge = {
        "": 1 + float(high),
        "of log w": math.exp(float(high)),
        "of probability": 1 + float(high) / 0.1,  # pi_old is 0.1
    }[unit]
    inside, outside = (gradient(module, [[edge + d]], [1.0]).item() for d in (-1e-5, 1e-5))
    if title in ("CE-GPPO", "CISPO"):
        # the slope ends, not the gradient
        assert abs(outside / inside - 1) < 1e-4 and outside == gradient(module, [[9]], [1]).item()
    elif title == "DHPO":  # at 1 + high the sequence ratio has long been silent
        assert inside != 0 and outside == 0
    else:
        assert inside < -0.5 and outside == 0


@every_method
def test_push_on_policy(title):
    """Three rows of 3, 1 and 2 tokens and other probabilities: the formula is -gradient."""
    module, (_, _, formula, *_) = METHODS[title]
    pi = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.9, 0.9], [0.4, 0.27, 0.9]], dtype=torch.float64)
    m = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
    a = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    args = (pi.log(), a, m)
    push = -value_and_grad(module.loss, pi.log(), *args)[1]
    A, o, N, B, L = a[:, None] * m, m.sum(1, keepdim=True), m.sum(), 3, 3
    v = (2 * torch.sigmoid(9 * (pi - 0.25))).clamp(1, 1.4)
    want = {
        "A / N": A / N,
        "A / (B |o|)": A / (B * o),
        "v A / (B |o|)": v * A / (B * o),
        "A / (B L)": A / (B * L),
        "A / B": A / B,
        "(0.8 + 0.2 pi_old) A / N": (0.8 + 0.2 * pi) * A / N,
    }[formula]
    close(push, want)


@every_method
def test_advantages_of_one_right_and_three_wrong(title):
    module, (_, _, _, numbers, _) = METHODS[title]
    ones = torch.ones(4, 1)
    inputs = {"entropy": ones, "mask": ones, "completions": ones.long()}
    inputs = named(module.advantages, inputs)
    a = module.advantages(torch.tensor([1.0, 0, 0, 0]), 4, **inputs).flatten()
    assert ", ".join(f"{x:.2f}" for x in a[:2].tolist()) == numbers
    assert a[1] == a[2] == a[3]


@every_method
def test_weight_in_the_gradient(title):
    cells = table("method | A > 0")[title]
    got = []
    for a in (1.0, -1.0):
        for w in (8.0, 1 / 8):
            weight = -gradient(METHODS[title][0], [[w]], [a]).item() / a
            got.append(f"{abs(weight):.3g}" if weight == 0 else f"{weight:.3g}")
    assert got == cells


def test_the_tree_is_what_the_files_say():
    """Each method stands below the one that its docstring names: "DAPO, but ..."."""
    tree = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    above, seen = [], []
    for line in tree:
        depth = (len(line) - len(line.lstrip())) // 2
        title = re.split(r"\s{2,}", line.strip())[0]
        seen.append(title)
        above = [*above[:depth], title]
        if depth:
            doc = METHODS[title][0].__doc__
            parent = re.search(r"^(\S+), but\b", doc, re.MULTILINE)[1]
            assert parent == above[depth - 1], title
    assert sorted(seen) == sorted(METHODS)


def test_what_the_page_says_of_the_second_table():
    ppo = ["0", "0.125", "8", "0"]
    weights = table("method | A > 0")
    other = [title for title, cells in weights.items() if cells != ppo]
    never_0 = [title for title in other if "0" not in weights[title]]
    assert never_0 == ["KL-Cov", "CE-GPPO", "CISPO", "SAPO", "VESPO", "DRO", "TOPR"]
    limited = [title for title in other if float(weights[title][2]) < 6]
    assert limited == ["ASPO", "RAFT", "CISPO", "SAPO", "VESPO", "DRO", "TOPR"]
    assert [t for t in other if any("-" in c and "e-" not in c for c in weights[t])] == ["DRO"]
    assert len(other) < len(weights) / 2
