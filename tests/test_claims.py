"""claims/: each closed form against autograd, each experiment in miniature."""

import itertools

import pytest
import torch
from conftest import ROOT
from test_losses import value_and_grad

from claims import pushes
from trainer.algorithm import load_algorithm

LENGTHS = [5, 3, 1, 4]
# Ratios on both sides of every clip range, for rows whose mean ratio is inside and outside it.
SPREAD = [0.0, 1e-4, 0.15, 0.25, 1.0]


def batch(algo, spread, seed):
    """(ratios, advantages, probabilities, mask), all [4, 5] in fp64, of four completions."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    w = (spread * torch.randn(4, 5, generator=g, dtype=torch.float64)).exp()
    A = torch.randn(4, 5 if algo == "gtpo" else 1, generator=g, dtype=torch.float64).expand(4, 5)
    p = torch.rand(4, 5, generator=g, dtype=torch.float64).clamp(0.01, 0.99)
    return w, A, p, mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("algo", pushes.METHODS)
def test_the_closed_form_of_each_push_is_what_autograd_says(algo, spread, seed):
    w, A, p, mask = batch(algo, spread, seed)
    given = A if algo == "gtpo" else A[:, 0]
    args = (p.log() - w.log(), given, mask)
    _, gradient = value_and_grad(load_algorithm(algo).loss, p.log(), *args)
    for i, n in enumerate(LENGTHS):
        row = w[i, :n].tolist()
        for t in range(n):
            size = {"B": 4, "N": sum(LENGTHS), "p": p[i, t].item()}
            want = pushes.push(algo, row, t, A[i, t].item(), **size)
            assert -gradient[i, t].item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_both_sides_of_each_clip_are_tried():
    """Else the test above could pass without any clip."""
    for algo in pushes.METHODS:
        found = set()
        for spread, seed in itertools.product(SPREAD, range(4)):
            w, A, p, _ = batch(algo, spread, seed)
            for i, n in enumerate(LENGTHS):
                size = {"B": 4, "N": sum(LENGTHS), "p": 0.5}
                found.add(pushes.push(algo, w[i, :n].tolist(), 0, A[i, 0].item(), **size) == 0)
        assert found == {True, False}, algo


@pytest.mark.parametrize("algo", pushes.METHODS)
def test_the_objective_is_what_the_loss_averages(algo):
    for A in (1.0, -1.0):
        for ratio in (0.5, 0.9, 1.0, 1.1, 1.5, 3.0):
            w = pushes.completion(ratio)
            logp = torch.full((1, pushes.LENGTH), 0.01, dtype=torch.float64).log()  # v is 1
            old = logp - torch.tensor([w], dtype=torch.float64).log()
            loss = load_algorithm(algo).loss(
                logp, old, torch.tensor([A], dtype=torch.float64), torch.ones(1, pushes.LENGTH)
            )
            terms = [pushes.objective(algo, w, t, A) for t in range(pushes.LENGTH)]
            assert -loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_the_table_of_the_page_is_that_of_the_code():
    page = (ROOT / "CLAIMS.md").read_text(encoding="utf-8")
    assert "\n".join(pushes.table()) in page


def test_pushes_writes_its_figure_and_its_numbers(tmp_path, capsys):
    assert pushes.main(["--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.csv").read_text() == (ROOT / "claims" / "pushes.csv").read_text()
    assert str(tmp_path / "a.csv") in capsys.readouterr().out
