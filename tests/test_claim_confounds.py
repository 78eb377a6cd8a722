"""claims/confounds.py: DAPO's two averages against autograd, and the experiment in miniature."""

import pytest
import torch

from claims import confounds as claim
from grpo import token_mean
from run.algorithm import load_algorithm


def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1), generator=g)
    A = torch.randn(6, generator=g, dtype=torch.float64)
    return torch.randn(6, 9, generator=g, dtype=torch.float64), A, mask


def test_both_pushes_are_what_autograd_says():
    """Ours is dapo.py's; own is the mean over prompts of the token mean of each group."""
    logprobs, A, mask = batch()
    ours, own = claim.pushes(A, mask, group_size=3)

    def gradient(loss_of):
        x = logprobs.clone().requires_grad_()
        return torch.autograd.grad(loss_of(x), x)[0]

    dapo = load_algorithm("dapo").loss
    got = gradient(lambda x: dapo(x, logprobs, A, mask))
    assert torch.allclose(-got, ours[:, None] * mask)

    def per_prompt(x):
        ratio = (x - logprobs).exp() * A[:, None]
        groups = [slice(0, 3), slice(3, 6)]
        return -sum(token_mean(ratio[rows], mask[rows]) for rows in groups) / 2

    assert torch.allclose(-gradient(per_prompt), own[:, None] * mask)


def test_the_two_averages_agree_where_all_groups_have_equally_many_tokens():
    _, A, _ = batch()
    ours, own = claim.pushes(A, torch.ones(6, 4).bool(), group_size=3)
    assert torch.allclose(ours, own)


def test_the_docs_hold_the_other_three_combinations():
    found = {line["name"] for line in claim.from_docs()}
    assert found == set(claim.RANGES) - {"GSPO, 0.2 / 0.28"}
    rows = claim.from_docs()
    assert all(len(claim.values(rows, "range", name, "accuracy", 50)) == 3 for name in found)


def test_the_experiment_in_miniature(tmp_path, monkeypatch):
    names = ("4 steps of 32 rows", "16 steps of 8 rows")
    monkeypatch.setattr(claim, "SETTINGS", {name: claim.SETTINGS[name] for name in names})
    monkeypatch.setattr(claim, "PAIRS", ((0, 1),))
    (line,) = claim.run_updates((0, names[1], 1, 20, 16))
    assert 1 <= line["per_rollout"] < 16  # some groups have equal rewards
    rows = claim.run_updates((0, names[0], 1, 20, 16)) + [line]
    assert rows[0]["per_rollout"] == 4
    wide = claim.run_gspo((0, (1, 2), 20))
    assert [line["step"] for line in wide] == [1, 2]
    for line, step in zip(wide, claim.STOPS, strict=True):  # beside those of the docs
        line["step"] = step
    rows += wide + claim.from_docs()
    for way in claim.WAYS:
        shares = [claim.values(rows, way, str(n), "share") for n in claim.COUNTS]
        assert sum(value for (value,) in shares) == pytest.approx(1)
    claim.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
