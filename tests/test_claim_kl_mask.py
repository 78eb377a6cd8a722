"""claims/kl_mask.py: the mask and the penalty's push by a slow loop, and in miniature."""

import math
from types import SimpleNamespace

import pytest
import torch

import tepo
from claims import kl_mask

COEFFICIENT = 0.5


def batch():
    """(log-probabilities, old ones, A, mask, H, H_old) of two completions, of 3 and 2 tokens."""
    logp = torch.tensor([[-0.1, -1.0, -3.0], [-0.5, -0.2, 0.0]], dtype=torch.float64)
    old = torch.tensor([[-0.3, -0.8, -2.0], [-0.9, -0.2, 0.0]], dtype=torch.float64)
    H = torch.tensor([[0.1, 0.5, 1.0], [0.2, 0.3, 0.0]], dtype=torch.float64)
    H_old = torch.tensor([[0.2, 0.4, 1.5], [0.6, 0.3, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    return logp, old, torch.tensor([1.0, -0.5], dtype=torch.float64), mask, H, H_old


def loss_gradient(rollout, rows, loss_inputs):
    """As Updater.loss_gradient, of TEPO."""
    logprobs = rollout.logprobs.clone().requires_grad_()
    args = logprobs, rollout.old_logprobs, rollout.advantages, rollout.mask
    loss = tepo.loss(*args, **loss_inputs)
    return loss, torch.autograd.grad(loss, logprobs)[0]


def looked(kl_coef):
    logp, old, A, mask, H, H_old = batch()
    rollout = SimpleNamespace(logprobs=logp, old_logprobs=old, advantages=A, mask=mask)
    trainer = SimpleNamespace(updater=SimpleNamespace(loss_gradient=loss_gradient))
    filled = {"entropy": H, "old_entropy": H_old, "kl_coef": kl_coef}
    rows = torch.arange(2)
    gradient = loss_gradient(rollout, rows, filled)[1]
    return kl_mask.look(trainer, rollout, rows, gradient, filled)


def test_what_the_mask_takes_and_its_push_by_a_loop():
    """M is 1 at the tokens 0 and 2 of row 0; row 1 has A < 0, and one token that falls."""
    logp, old, A, mask, H, H_old = batch()
    n = mask.sum().item()
    s = math.exp(sum((logp - old)[0].tolist()) / 3)
    penalty = policy = fall = 0.0
    for t in (0, 2):
        # d k3 / dlogp = 1 - pi_old / pi
        penalty += abs(COEFFICIENT * (1 - math.exp(old[0, t] - logp[0, t])) / n)
        policy += s * A[0].item() / n
        fall += (H - H_old)[0, t].item()
    found = looked(COEFFICIENT)
    assert (found["positive"], found["negative"]) == (3, 2)
    assert (found["masked"], found["falling"]) == (2, 1)
    assert found["penalty"] == pytest.approx(penalty, rel=1e-9)
    assert found["policy"] == pytest.approx(policy, rel=1e-9)
    assert found["fall"] == pytest.approx(fall, rel=1e-9)
    # exp(-0.3) = 0.74, exp(-0.8) = 0.45, exp(-2) = 0.14
    assert [found[f"positive_{i}"] for i in range(5)] == [0, 2, 1, 0, 0]
    assert [found[f"masked_{i}"] for i in range(5)] == [0, 1, 1, 0, 0]


def test_the_push_grows_with_the_coefficient():
    assert looked(0)["penalty"] == 0
    assert looked(1.0)["penalty"] == pytest.approx(2 * looked(0.5)["penalty"], rel=1e-9)


@pytest.fixture(scope="module")
def rows(all_problems):
    found = []
    for kl_coef in (0, 10):
        found += kl_mask.run((kl_coef, 0), steps=2)
    return found


def test_the_penalty_pushes_only_where_it_is_on(rows):
    for row in rows:
        assert 0 < row["masked"] < row["positive"]
        assert row["masked"] == sum(row[f"masked_{i}"] for i in range(5))
        assert row["fall"] < -1e-4
        assert (row["force"] > 0) == (row["kl_coef"] == 10)


def test_the_first_step_differs_by_the_penalty_only(rows):
    """Its rollout is the same, and so is what it is sampled with."""
    without, penalised = rows[0], rows[2]
    assert without["accuracy"] == penalised["accuracy"]
    assert without["positive"] == penalised["positive"]
    assert penalised["kl"] <= without["kl"]


def test_lines_and_figure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(kl_mask, "COEFFICIENTS", (0, 10))
    lines = kl_mask.say(rows)
    assert sum("the mask takes" in line for line in lines) == 2 + 5
    kl_mask.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
