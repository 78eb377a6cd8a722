"""claims/: each closed form against autograd, each experiment in miniature."""

import itertools

import pytest
import torch
from conftest import ROOT
from test_losses import value_and_grad

from claims import kit, length, pushes
from run.algorithm import load_algorithm

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


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize(
    ("algo", "reading"),
    [*((algo, {}) for algo in pushes.METHODS), ("trgrpo", {"reading": "outside"})],
)
def test_the_closed_form_of_each_push_is_what_autograd_says(algo, reading, spread):
    for seed in range(4):
        check_push(algo, reading, *batch(algo, spread, seed))


def check_push(algo, reading, w, A, p, mask):
    given = A if algo == "gtpo" else A[:, 0]
    args = (p.log() - w.log(), given, mask)
    _, gradient = value_and_grad(load_algorithm(algo).loss, p.log(), *args, **reading)
    for i, n in enumerate(LENGTHS):
        row = w[i, :n].tolist()
        for t in range(n):
            size = {"B": 4, "N": sum(LENGTHS), "p": p[i, t].item()}
            want = pushes.push(algo, row, t, A[i, t].item(), **size, **reading)
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


def test_pushes_makes_the_folder_and_refuses_a_file_in_its_place(tmp_path, capsys):
    assert pushes.main(["--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.csv").is_file() and capsys.readouterr().err == ""
    for out in (tmp_path, tmp_path / "new" / "a.csv" / "x.png"):
        with pytest.raises(SystemExit) as exit:
            pushes.main(["--out", str(out)])
        told = capsys.readouterr().err
        assert exit.value.code == 2 and told.count("\n") == 1 and "folder" in told


def test_what_cannot_be_written_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pushes, "save", fail)
    assert pushes.main(["--out", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_correlations_are_averaged_as_fishers_z():
    """atanh of 0.5 and 0.9 by hand: 0.5493 and 1.4722, mean 1.0108, half-width 5.864."""
    assert kit.fisher([0.5, 0.9]) == pytest.approx((0.7661, -0.9999, 1), abs=1e-3)
    assert kit.fisher([0.3]) == pytest.approx((0.3, 0.3, 0.3))


def test_paired_differences_with_the_p_of_a_t_test_times_their_number():
    """Mean 2, std 1, n 3: t = 3.464 with 2 degrees of freedom, p 0.0742."""
    assert kit.compared([[1, 2, 3], [-1, 0, 1]], 1) == ["+2.0 ± 2.5, p 0.15", "+0.0 ± 2.5, p 1"]
    assert kit.compared([[1.0]], 1) == ["+1.0"]


HEAD = "method,seed,what,name,value,count\n"
DAMAGED = {  # of claims/length.py: what the line says
    "": "{}: no rows in it; measure again, without --redraw",
    HEAD: "{}: no rows in it; measure again, without --redraw",
    "a,b\n1,2\n": "{} cannot be drawn: it has no column 'method', only a, b; is it",
    HEAD + "grpo,0,right\n": "{}: line 2 does not have as many cells as line 1",
    HEAD + "grpo,0,right,1-6,0.5,3,9\n": "{}: line 2 does not have as many cells as line 1",
    HEAD + "dapo,1,accuracy,2,much,3\n": "{} cannot be drawn: ",
    HEAD + "grpo,0,accuracy,2,0.5,3\n": "{} cannot be drawn: KeyError(0); is it a table of length",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_refused_in_a_line_and_nothing_is_drawn(text, tmp_path, capsys):
    table = tmp_path / "dam.csv"
    table.write_text(text)
    assert length.main(["--redraw", "--out", str(tmp_path / "dam.png")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: " + DAMAGED[text].format(table))
    assert table.read_text() == text and list(tmp_path.iterdir()) == [table]


def test_the_committed_tables_are_drawn(tmp_path):
    (tmp_path / "a.csv").write_text((ROOT / "claims" / "length.csv").read_text())
    assert length.main(["--redraw", "--out", str(tmp_path / "a.png")]) == 0
