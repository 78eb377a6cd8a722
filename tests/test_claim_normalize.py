"""claims/normalize.py in miniature."""

from types import SimpleNamespace

import pytest
import torch

from claims import normalize as claim


def made_up(count, seed=0):
    """A rollout of one group of 8 of which `count` are right."""
    g = torch.Generator().manual_seed(seed)
    right = (torch.arange(8) < count).float()
    mask = torch.arange(12) < torch.randint(3, 13, (8, 1), generator=g)
    H = torch.rand(8, 12, generator=g) * mask
    return SimpleNamespace(right=right, rewards=right, mask=mask, sampler_entropy=H)


@pytest.mark.parametrize("count", range(1, 8))
def test_within_loses_the_outcome_and_the_others_keep_it(count):
    rows = claim.of_groups(made_up(count), 0)
    for algo in claim.NAMES:
        for option in claim.OPTIONS:
            right, wrong = (claim.pick(rows, algo, option, name) for name in ("right", "wrong"))
            assert sum(row["right_in_group"] == count for row in right + wrong) == 2
            if option == "within":
                assert claim.mean(right) == pytest.approx(0, abs=2e-3)
                assert claim.mean(wrong) == pytest.approx(0, abs=2e-3)
            else:
                assert claim.mean(right) > 0 > claim.mean(wrong)


def test_other_signs_are_counted():
    A, mask = claim.advantages(made_up(4), "gtpo", "within")
    rows = claim.of_groups(made_up(4), 0)
    (right,) = claim.pick(rows, "gtpo", "within", "right")
    assert right["other_sign"] == int((A[:4][mask[:4]] < 0).sum()) > 0
    assert right["count"] == int(mask[:4].sum())
    assert claim.pick(rows, "grpo_s", "within", "right")[0]["count"] == 4


def test_the_experiment_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "OPTIONS", ("zeros", "within"))
    rows = claim.measure(SimpleNamespace(seeds=[0], jobs=1), steps=1, problems=16, tested=40)
    assert [len(claim.accuracies(rows, option)) for option in claim.OPTIONS] == [1, 1]
    claim.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(claim.say(rows)) == 2 * 2 * 2 + 2
