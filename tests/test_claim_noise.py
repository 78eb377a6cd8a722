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
    log_w = torch.tensor([[0.1, -0.3, 9.0]], dtype=torch.float64)
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
        ratio = noise.ratios(log_w, MASK)[kind]
        ratio = ratio if kind == "token" else ratio[:, None].expand(MASK.shape)
        found = noise.clipped(ratio, A[:, None], low, high)
        assert torch.equal(found[MASK], gradient[MASK] == 0)


@pytest.mark.parametrize("n", [4, 25])
def test_independent_noise_spreads_as_predicted(n):
    g = torch.Generator().manual_seed(n)
    log_w = 0.02 * torch.randn(4000, n, generator=g, dtype=torch.float64)
    row = noise.spread(log_w, torch.ones(4000, n, dtype=torch.bool), torch.ones(4000))
    assert row["token"] == pytest.approx(0.02, rel=0.05)
    assert row["mean_independent"] == pytest.approx(0.02 / n**0.5, rel=0.05)
    for kind in ("mean", "product"):
        assert row[kind] == pytest.approx(row[f"{kind}_independent"], rel=0.05)
    # and a row whose tokens move together does not
    log_w = log_w[:, :1].expand(-1, n)
    row = noise.spread(log_w, torch.ones(4000, n, dtype=torch.bool), torch.ones(4000))
    assert row["mean"] == pytest.approx(n**0.5 * row["mean_independent"], rel=0.05)


def test_the_variance_at_a_position_by_hand():
    log_w = torch.tensor([[0.1, 0.2], [0.3, 9.0], [0.5, 0.6]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    found = noise.position_variance(log_w, mask)
    assert found.tolist() == [pytest.approx(0.04), pytest.approx(0.08)]
    A = torch.tensor([1.0, -1.0, -1.0])
    assert noise.spread(log_w, mask, A)["agree"] == 0.5  # of the right all, of the wrong none


def test_the_slope_of_a_power_is_its_exponent():
    rows = [{"seed": 0, "class": n, "length": n, "mean": 0.3 * n**-0.5} for n in (4, 9, 30)]
    assert noise.slope(rows, "mean") == [pytest.approx(-0.5)]


def test_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "AFTER", (1, 3))
    monkeypatch.setattr(noise, "SHOWN", 3)
    rows = noise.run((0, {"steps": 1, "prompts": 20, "probe": 10}, ()))
    assert {row["updates"] for row in rows} == set(noise.AFTER)
    every = {row["updates"]: row for row in rows if row["class"] == 0}
    assert every[1]["token"] < every[3]["token"]
    for row in every.values():
        assert row["mean"] < row["token"] < row["product"]
        assert row["clip_gspo"] > row["clip_grpo"]
        assert row["rows"] == 80
    noise.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("  mean: std") for line in noise.say(rows))
