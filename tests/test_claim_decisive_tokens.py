"""claims/decisive_tokens.py: kinds of tokens, weights and neighbours by hand, and a miniature."""

from types import SimpleNamespace

import pytest
import torch

from claims import decisive_tokens as claim
from gtpo import advantages

END = "<|endoftext|>"


def test_kinds_of_a_worked_and_of_a_guessed_answer():
    tokens = [*"36-8=28", "\n", *"28+1=29", "\n", "####", " ", *"29", END]
    line = ["line start", "number", "operator", "change", "equals", "result", "result", "newline"]
    end = ["line start", "answer mark", "answer, worked", "answer, worked", "end"]
    assert claim.kinds(tokens, 2, END) == line * 2 + end
    guessed = claim.kinds(["####", " ", "2", "9", END], 2, END)
    assert guessed[2:] == ["answer, guessed"] * 2 + ["end"]
    assert claim.kinds([" and", "8", "x"], 2, END) == ["line start", "number", "other"]
    assert set(claim.kinds(tokens, 2, END)) <= set(claim.KINDS)


def test_factors_are_those_of_gtpos_shaped_rewards():
    """From the factor, Eqs. 3, 5 and 6 by hand give the advantages of gtpo.py."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    H, right = torch.rand(4, 5, generator=g) + 0.1, torch.tensor([1.0, 1.0, 0.0, 0.0])
    factor = claim.factors(H, right, mask, 4)
    shaped = torch.where(right[:, None] > 0.5, 1 + 0.1 * factor, -1 - 0.1 * factor)
    A = torch.zeros(4, 5)
    for sign in (1, -1):
        here = mask & ((right > 0.5) == (sign > 0))[:, None]
        values = (shaped * here)[mask]  # with the zeros of the other set
        A += ((shaped - values.mean()) / (values.std() + 1e-4)) * here
    expected = advantages(right, 4, entropy=H, mask=mask)
    assert torch.allclose(A, expected, atol=1e-5)


def test_same_kind_counts_the_other_members_only():
    code = torch.tensor([[1, 2], [1, 3], [5, 2], [1, 2]])
    members = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0]]).bool()
    share = claim.same_kind(code, members, 4)
    assert share[:3, 0].tolist() == [0.5, 0.5, 0.0]  # of two others
    assert share[:2, 1].tolist() == [0.0, 0.0]
    assert share[3].isnan().all() and share[2, 1].isnan()


def test_the_squared_change_by_hand():
    """Halves of two draws each: success rates 0, 1/2, 1 and 1/2, 1/2, 1."""
    wins = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
    assert claim.squared_change(wins).tolist() == [0.0, 0.25]


def test_the_squared_change_has_no_bias():
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.5, 0.9])[:, None]
    found = [claim.squared_change(torch.rand(3, 8, generator=g) < p) for _ in range(3000)]
    assert torch.stack(found).mean(0).tolist() == pytest.approx([0, 0.16], abs=0.01)


def test_the_experiment_in_miniature(tmp_path, monkeypatch):
    args = SimpleNamespace(seeds=[0], jobs=1)
    monkeypatch.setattr(claim, "DRAWS", 2)
    rows = claim.measure(args, steps=1, problems=8)
    shares = [r["value"] for r in rows if r["what"] == "share of the change"]
    assert sum(value or 0 for value in shares) == pytest.approx(1)
    for when in ("before", "after"):
        shares = [
            r["value"] for r in rows if (r["what"], r["when"]) == ("share of the tokens", when)
        ]
        assert sum(shares) == pytest.approx(1)
    guess = claim.of(rows, "entropy", "answer, guessed", "before")[0]
    assert guess > 10 * claim.of(rows, "entropy", "answer, worked", "before")[0]
    assert 0 <= claim.of(rows, "all", "same kind beside it", "before")[0] <= 1
    claim.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any("line start" in line for line in claim.say(rows))
