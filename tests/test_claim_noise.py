"""claims/noise.py: its ratios and clips against the losses, and the experiment in miniature."""

import math

import pytest
import torch

from claims import noise
from run.algorithm import load_algorithm

MASK = torch.arange(6) < torch.tensor([6, 4, 3, 2, 1])[:, None]


def log_ratios(scale, seed):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 6, generator=g, dtype=torch.float64)


def test_the_ratios_of_a_row_by_hand():
    log_w = torch.tensor([[[0.1, -0.3, 9.0]]], dtype=torch.float64)
    found = noise.ratios(log_w, torch.tensor([[True, True, False]]))
    assert found["product"].item() == pytest.approx(-0.2)
    assert found["mean"].item() == pytest.approx(-0.1)
    want = math.log((math.exp(0.1) + math.exp(-0.3)) / 2)
    assert found["arithmetic"].item() == pytest.approx(want)


@pytest.mark.parametrize("scale", [1e-3, 0.3])
@pytest.mark.parametrize("algo", ["grpo", "gspo", "tepo"])
def test_clipped_is_where_the_loss_has_no_gradient(algo, scale):
    kind, low, high = noise.CLIPS[f"clip_{algo}"]
    for seed in range(5):
        log_w = log_ratios(scale, seed)
        A = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0], dtype=torch.float64)
        logp = log_w.clone().requires_grad_()
        loss = load_algorithm(algo).loss(logp, torch.zeros_like(log_w), A, MASK)
        (gradient,) = torch.autograd.grad(loss, logp)
        ratio = noise.ratios(log_w[None], MASK)[kind][0]
        ratio = ratio if kind == "token" else ratio[:, None].expand(MASK.shape)
        found = noise.clipped(ratio, A[:, None], low, high)
        assert torch.equal(found[MASK], gradient[MASK] == 0)


@pytest.mark.parametrize("n", [4, 25])
def test_independent_noise_spreads_as_predicted(n):
    """1000 updates of 20 completions; what differs between completions is no noise."""
    g = torch.Generator().manual_seed(n)
    log_w = 0.02 * torch.randn(1000, 20, n, generator=g, dtype=torch.float64)
    drift = torch.randn(20, n, generator=g, dtype=torch.float64)
    on, A = torch.ones(20, n, dtype=torch.bool), torch.ones(20)
    row = noise.spread(log_w + drift, on, A)
    assert row["token"] == pytest.approx(0.02, rel=0.05)
    assert row["mean_independent"] == pytest.approx(0.02 / n**0.5, rel=0.05)
    for kind in ("mean", "product"):
        assert row[kind] == pytest.approx(row[f"{kind}_independent"], rel=0.05)
    # and a row whose tokens move together does not
    row = noise.spread(log_w[..., :1].expand(-1, -1, n), on, A)
    assert row["mean"] == pytest.approx(n**0.5 * row["mean_independent"], rel=0.05)


def test_the_slope_of_a_power_is_its_exponent():
    rows = [{"seed": 0, "class": n, "length": n, "mean": 0.3 * n**-0.5} for n in (4, 9, 30)]
    assert noise.slope(rows, "mean") == [pytest.approx(-0.5)]


def test_miniature(tmp_path):
    rows = noise.run((0, {"steps": 1, "updates": 3, "probe": 10}, ()))
    (row,) = (row for row in rows if (row["set"], row["class"]) == ("all", 0))
    assert row["rows"] == 80 and 0 < row["mean"] < row["token"] < row["product"]
    assert row["clip_gspo"] > row["clip_grpo"] == row["clip_tepo"] == 0
    rows += [{**row, "set": "right", "class": n, "length": 1.5 * n} for n in (16, 24)]
    noise.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("  mean: ") for line in noise.say(rows))
