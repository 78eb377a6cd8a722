"""claims/kl_mask.py: the masks and the penalty's push by a slow loop, and in miniature."""

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


REF = torch.tensor([[-0.4, -0.9, -2.5], [-0.7, -0.1, 0.0]], dtype=torch.float64)


def looked(kl_coef):
    logp, old, A, mask, H, H_old = batch()
    rollout = SimpleNamespace(logprobs=logp, old_logprobs=old, advantages=A, mask=mask)
    trainer = SimpleNamespace(updater=SimpleNamespace(loss_gradient=loss_gradient))
    filled = {"entropy": H, "old_entropy": H_old, "ref_logprobs": REF, "kl_coef": kl_coef}
    rows = torch.arange(2)
    gradient = loss_gradient(rollout, rows, filled)[1]
    return kl_mask.look(trainer, rollout, rows, gradient, filled)


def test_what_the_mask_takes_and_its_push_by_a_loop():
    """M is 1 at the tokens 0 and 2 of row 0; row 1 has A < 0, and one token that falls."""
    logp, old, A, mask, *_ = batch()
    n = mask.sum().item()
    s = math.exp(sum((logp - old)[0].tolist()) / 3)
    # d k3 / dlogp = 1 - pi_ref / pi
    penalty = sum(abs(COEFFICIENT * (1 - math.exp(REF[0, t] - logp[0, t])) / n) for t in (0, 2))
    found = looked(COEFFICIENT)
    assert (found["positive"], found["negative"]) == (3, 2)
    assert (found["masked"], found["falling"]) == (2, 1)
    assert found["penalty"] == pytest.approx(penalty, rel=1e-9)
    assert found["policy"] == pytest.approx(3 * s * A[0].item() / n, rel=1e-9)


def test_the_push_grows_with_the_coefficient():
    assert looked(0)["penalty"] == 0
    assert looked(1.0)["penalty"] == pytest.approx(2 * looked(0.5)["penalty"], rel=1e-9)


def test_the_random_mask_takes_as_many_tokens_among_those_with_positive_advantage():
    *_, mask, H, H_old = batch()
    A = torch.tensor([[1.0], [1.0]], dtype=torch.float64).expand(2, 3)
    assert kl_mask.mask_of(A, H, H_old)[mask].sum() == 3
    generator = torch.Generator().manual_seed(0)
    drawn = [kl_mask.random_mask(A, H, H_old, mask, generator) for _ in range(200)]
    assert all(M.sum() == 3 and not M[~mask].any() for M in drawn)
    shares = torch.stack(drawn).double().mean(0)[mask]  # 3 of 5 tokens each
    assert (shares - 0.6).abs().max() < 0.15
    A = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    M = kl_mask.random_mask(A, H, H_old, mask, generator)
    assert M.sum() == 2 and not M[1].any()
    assert not kl_mask.random_mask(A, H_old, H_old, mask, generator).any()


def test_the_method_with_the_random_mask_is_tepo_but_for_the_mask():
    logp, old, A, mask, H, H_old = batch()
    filled = {"entropy": H, "old_entropy": H_old, "ref_logprobs": REF}
    loss = kl_mask.random_method(0).loss
    assert torch.equal(loss(logp, old, A, mask, kl_coef=0, **filled), tepo.loss(logp, old, A, mask))
    # Where all tokens with A > 0 are masked, chance has nothing to choose.
    filled["entropy"] = H_old - 1
    got = loss(logp, old, A, mask, kl_coef=2.0, **filled)
    assert got.item() == pytest.approx(tepo.loss(logp, old, A, mask, kl_coef=2.0, **filled).item())


@pytest.fixture(scope="module")
def rows():
    found = []
    for about in kl_mask.RUNS[:3]:
        found += kl_mask.run((*about, 0), steps=2)
    return found


def test_the_penalty_pushes_only_where_it_is_on(rows):
    for row in rows:
        assert 0 < row["masked"] < row["positive"]
        assert (row["force"] > 0) == (row["kl_coef"] > 0)


def test_the_first_step_differs_by_the_penalty_only(rows):
    """Its rollout is the same, and so is what it is sampled with."""
    for name in ("accuracy", "entropy", "positive"):
        assert rows[0][name] == rows[2][name] == rows[4][name]
    assert rows[2]["force"] != rows[4]["force"]


def test_lines_and_figure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(kl_mask, "RUNS", kl_mask.RUNS[:3])
    monkeypatch.setattr(kl_mask, "LOOKS", kl_mask.LOOKS[:3])
    lines = kl_mask.say(rows)
    assert sum("paper's mask less" in line for line in lines) == 2 * 3
    kl_mask.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
