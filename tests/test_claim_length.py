"""claims/length.py: the totals of a completion against the closed form, and a miniature."""

from types import SimpleNamespace

import pytest
import torch

from claims import length as claim
from claims import pushes
from grpo import advantages


def made_up(spread, seed=0):
    """Two groups of 4 completions; spread: of the log-ratios."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([9, 2, 5, 4, 3, 8, 6, 1])[:, None]
    right = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    old = -torch.rand(8, 9, generator=g, dtype=torch.float64)
    logprobs = old + spread * torch.randn(8, 9, generator=g, dtype=torch.float64)
    return SimpleNamespace(
        rewards=right, right=right, mask=mask, logprobs=logprobs, old_logprobs=old, group_size=4
    )


def test_on_policy_a_sequence_average_ignores_length_and_a_token_average_follows_it():
    rollout = made_up(0.0)
    A, lengths = advantages(rollout.rewards, 4), rollout.mask.sum(1)
    for algo in ("grpo", "gspo"):
        assert torch.allclose(claim.totals(algo, rollout, 8).float(), A / 8, atol=1e-6)
    for algo in ("dapo", "tepo"):
        wanted = A * lengths / lengths.sum()
        assert torch.allclose(claim.totals(algo, rollout, 8).float(), wanted, atol=1e-6)


@pytest.mark.parametrize("algo", claim.METHODS)
def test_off_policy_the_totals_are_those_of_the_closed_form(algo):
    rollout = made_up(0.2)
    A, lengths = advantages(rollout.rewards, 4), rollout.mask.sum(1).tolist()
    got = claim.totals(algo, rollout, 4)  # a mini-batch is a group
    w = (rollout.logprobs - rollout.old_logprobs).exp()
    for i, n in enumerate(lengths):
        size = {"B": 4, "N": sum(lengths[i // 4 * 4 : i // 4 * 4 + 4]), "p": 0.5}
        ratios = w[i, :n].tolist()
        by_hand = sum(pushes.push(algo, ratios, t, A[i].item(), **size) for t in range(n))
        assert got[i].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-9)


def test_the_shares_of_a_method_add_up_to_1():
    rows = claim.by_length([made_up(0.01)], "dapo", 0, 8)
    shares = [row["value"] for row in rows if row["what"].endswith("share")]
    assert sum(shares) == pytest.approx(1)
    counts = [row["count"] for row in rows if row["count"]]
    assert sum(counts) == 8


def test_the_experiment_in_miniature(tmp_path):
    rows = claim.measure(SimpleNamespace(seeds=[0], jobs=1), steps=2, last=1, tested=60)
    for method in ("start", "grpo", "dapo"):
        counts = [claim.values(rows, method, "accuracy", n, "count") for n in claim.COUNTS]
        assert sum(found[0] for found in counts if found) == 60
    claim.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("gspo, wrong") for line in claim.say(rows))
