"""claims/covariance.py: each prediction against a softmax of three actions, and in miniature."""

import math

import pytest
import torch

from claims import covariance, kit

Z = torch.tensor([[0.3, -1.0, 0.5], [2.0, 0.0, -0.5]], dtype=torch.float64)
A = torch.tensor([[1.0, -0.5, 0.0], [-1.0, 2.0, 0.3]], dtype=torch.float64)


def centred(advantage):
    """With the mean 0 under softmax(Z), as an advantage has."""
    return advantage - (Z.softmax(1) * advantage).sum(1, keepdim=True)


def cov(p, x, y):
    """Cov(x, y) under p by a loop, of lists."""
    mean_x = sum(q * a for q, a in zip(p, x, strict=True))
    mean_y = sum(q * b for q, b in zip(p, y, strict=True))
    return sum(q * (a - mean_x) * (b - mean_y) for q, a, b in zip(p, x, y, strict=True))


def test_the_entropy_is_the_sum():
    for row, H in zip(Z.softmax(1).tolist(), covariance.entropy_of(Z).tolist(), strict=True):
        assert H == pytest.approx(-sum(p * math.log(p) for p in row), rel=1e-12)


@pytest.mark.parametrize("theorem", [1, 2])
def test_the_theorems_by_hand(theorem):
    """One policy-gradient step of a tabular softmax: dz = lr pi A (natural: lr A)."""
    lr, p, advantage = 1e-5, Z.softmax(1), centred(A)
    dz = p * advantage if theorem == 1 else advantage
    if theorem == 1:  # the step is the gradient of J = sum pi A
        z = Z.clone().requires_grad_()
        (z.softmax(1) * advantage).sum().backward()
        torch.testing.assert_close(z.grad, dz)
    change = (covariance.entropy_of(Z + lr * dz) - covariance.entropy_of(Z)) / lr
    for i in range(2):
        want = -cov(p[i].tolist(), p[i].log().tolist(), dz[i].tolist())
        assert covariance.lemma(Z, dz)[i].item() == pytest.approx(want, rel=1e-12)
        assert change[i].item() == pytest.approx(want, rel=1e-3)


def test_one_sampled_action_is_theorem_1_on_average():
    p, advantage = Z.softmax(1), centred(A)
    mean = torch.zeros(2, dtype=torch.float64)
    for a in range(3):
        change = covariance.own_change(Z, torch.tensor([a, a]), advantage[:, a])
        mean += p[:, a] * change
    torch.testing.assert_close(mean, covariance.lemma(Z, p * advantage))


def test_the_covariance_of_a_batch_by_a_loop():
    x, y = torch.tensor([-0.1, -2.0, -0.7]), torch.tensor([1.0, -1.0, 0.5])
    assert covariance.covariance(x, y).item() == pytest.approx(
        cov([1 / 3] * 3, x.tolist(), y.tolist())
    )


def test_the_entropy_of_a_run_splits_into_two():
    steps = [(1.0, -0.1), (0.7, -0.2), (0.6, 0.0), (0.2, 5.0)]
    run = [{"entropy": H, "change": change} for H, change in steps]
    assert covariance.on_the_same_states(run) == pytest.approx([1.0, 0.9, 0.7, 0.7])
    assert covariance.falls(run) == pytest.approx((1.5 / 3 - 2.3 / 3, 2.3 / 3 - 2.6 / 3))


@pytest.fixture(scope="module")
def rows(all_problems):
    return covariance.run(("grpo", 0), steps=4)


def test_a_step_is_predicted_by_its_logits_and_by_its_weights(rows):
    for row in rows:
        assert row["change"] != 0
        for key in ("lemma", "weights"):
            assert abs(row[key] - row["change"]) < 0.5 * abs(row["change"]) + 1e-3


def test_measuring_does_not_change_the_training(rows):
    with kit.trainer("grpo", *covariance.FLAGS) as (trainer, _):
        for row in rows:
            line, _, _ = trainer.step(row["step"])
            assert line["accuracy"] == row["accuracy"]
            assert line["entropy"] == pytest.approx(row["entropy"], abs=1e-5)


def test_lines_and_figure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(covariance, "METHODS", ("grpo",))
    lines = covariance.say(rows)
    assert sum(line.startswith("    GRPO: ") for line in lines) == 2
    found = covariance.agreements(rows, "lemma")
    assert found["grpo"] == found["all"] and -1 <= found["all"][0] <= 1
    covariance.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
