"""claims/clip_higher.py: the counts by a slow loop, the entropy at equal accuracy, in miniature."""

import pytest
import torch

import dapo
from claims import clip_higher

RATIOS = [0.5, 1.1, 1.2, 1.21, 1.25, 1.27, 1.29, 3.0]
OLD = [0.005, 0.05, 0.3, 0.5, 0.6, 0.7, 0.2, 0.02]


def test_the_counts_by_a_loop():
    ratio, old = (torch.tensor(x, dtype=torch.float64) for x in (RATIOS, OLD))
    A = torch.tensor([1.0, 1, 1, 1, 1, -1, 1, 1], dtype=torch.float64)
    found = clip_higher.counts(ratio, old, A)
    for i in clip_higher.PARTS:
        low, high = clip_higher.EDGES[i : i + 2]
        tokens = between = above = 0
        for w, p, a in zip(RATIOS, OLD, A.tolist(), strict=True):
            inside = low <= p < high and a > 0
            tokens += inside
            between += inside and 1.2 < w <= 1.28
            above += inside and w > 1.28
        got = tuple(found[f"{name}_{i}"] for name in clip_higher.NAMES)
        assert got == (tokens, between, above)


@pytest.mark.parametrize("ratio", [w for w in RATIOS if w != 1.2])
def test_between_the_bounds_is_where_the_two_losses_differ(ratio):
    logp = torch.tensor([[ratio]], dtype=torch.float64).log()
    gets_gradient = []
    for bound in clip_higher.BOUNDS:
        leaf = logp.clone().requires_grad_()
        args = torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1)
        dapo.loss(leaf, *args, eps_high=bound).backward()
        gets_gradient.append(leaf.grad.item() != 0)
    counts = clip_higher.counts(logp.exp()[0], torch.tensor([0.05]), torch.ones(1))
    assert counts["between_1"] == (gets_gradient == [False, True])
    assert counts["above_1"] == (gets_gradient == [False, False])


def test_the_entropy_at_an_accuracy():
    """Means of five: accuracy 0, 0.2, 0.4, ...; entropy 1, 0.8, ..."""
    run = [{"accuracy": (i - 2) / 5, "entropy": 1 - (i - 2) / 5} for i in range(10)]
    assert clip_higher.entropy_at(run, 0.3) == pytest.approx(0.7)
    assert clip_higher.entropy_at(run, 2.0) is None


def test_differences_pair_the_seeds():
    rows = []
    for seed in (0, 1):
        for bound, shift in ((0.2, 0.0), (0.28, 0.01 * (seed + 1))):
            for i in range(10):
                values = {"accuracy": (i - 2) / 5, "entropy": 1 - (i - 2) / 5 + shift}
                rows.append({"eps_high": bound, "seed": seed, **values})
    assert clip_higher.differences(rows, 0.3) == pytest.approx([0.01, 0.02])


def test_in_miniature(tmp_path, monkeypatch):
    few = ("--prompts", "6", "--group-size", "6", "--updates", "1")
    monkeypatch.setattr(clip_higher, "FLAGS", (*clip_higher.FLAGS, *few))
    rows = []
    for bound in clip_higher.BOUNDS:
        rows += clip_higher.run((bound, 0), steps=5)
    first, other = rows[0], rows[5]  # the first rollout is the same
    for name in ("accuracy", "entropy", *(f"tokens_{i}" for i in clip_higher.PARTS)):
        assert first[name] == other[name]
    for row in rows:
        assert sum(row[f"tokens_{i}"] for i in clip_higher.PARTS) > 100
        # The probability would be above 1.
        assert row["between_4"] == row["above_4"] == 0
    assert any("entropy at accuracy" in line for line in clip_higher.say(rows))
    clip_higher.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
