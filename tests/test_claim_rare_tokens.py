"""claims/rare_tokens.py: its norms and sums against autograd, and the experiment in miniature."""

import pytest
import torch
from conftest import tiny_model

from claims import rare_tokens as rare
from run.algorithm import load_algorithm
from trainer.logprobs import by_row, token_logprobs
from trainer.rollout import Rollout

LENGTHS = [5, 3, 1, 4, 2, 2, 2, 2]  # the second group is all wrong


@pytest.fixture(scope="module")
def case():
    """(model, rollout, {method: push}, what `tokens` returns), in fp64."""
    model = tiny_model().double()
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    prompts = [[3, 4, 5]] * 4 + [[6, 7]] * 4
    completions = torch.randint(2, 24, (8, 5), generator=g)
    rollout = Rollout(prompts, completions, mask, torch.zeros(8).bool())
    rollout.rewards = rollout.right = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]).double()
    rollout.measured = torch.tensor([True] * 4 + [False] * 4)
    with torch.no_grad():
        found = token_logprobs(model, prompts, completions, mask)
    rollout.old_logprobs, rollout.entropy = found
    push = {algo: rare.pushes(algo, rollout, 4) for algo in rare.METHODS}
    return model, rollout, push, rare.tokens(model, rollout, push)


@pytest.mark.parametrize("m", range(len(rare.METHODS)))
def test_the_tokens_gradients_add_up_to_that_of_the_loss(case, m):
    model, rollout, _, (*_, g) = case
    module, mask = load_algorithm(rare.METHODS[m]), rollout.mask
    logp, _ = token_logprobs(model, rollout.prompts, rollout.completions, mask, through_head=False)
    more = {}
    if rare.METHODS[m] == "gtpo":
        more = {"entropy": rollout.entropy, "mask": mask}
    A = module.advantages(rollout.rewards, 4, **more)
    loss = module.loss(logp, rollout.old_logprobs, A, mask)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    whole = torch.cat([part.flatten() for part in whole])
    assert torch.allclose(g.sum(0)[m], -whole, atol=1e-10)


def test_the_norms_are_those_of_autograd(case):
    model, rollout, _, (p, exact, hidden, *_) = case
    weights = list(model.parameters())
    n = 0
    for row in range(4):  # the mixed group
        one = slice(row, row + 1)
        prompts, mask = rollout.prompts[one], rollout.mask[one]
        for t in range(LENGTHS[row]):
            logits = by_row(model, "logits", prompts, rollout.completions[one], mask)
            logp = logits.log_softmax(1)[t, rollout.completions[row, t]]
            parts = torch.autograd.grad(logp, weights)
            norm = sum((part**2).sum() for part in parts).sqrt()
            assert exact[n].item() == pytest.approx(norm.item(), rel=1e-9)
            assert p[n].item() == pytest.approx(logp.exp().item(), rel=1e-9)
            h = by_row(
                model.base_model, "last_hidden_state", prompts, rollout.completions[one], mask
            )
            h = h[t].detach().requires_grad_()
            W = model.get_output_embeddings().weight.detach()
            logp = (W @ h).log_softmax(0)[rollout.completions[row, t]]
            (parts,) = torch.autograd.grad(logp, h)
            assert hidden[n].item() == pytest.approx(parts.norm().item(), rel=1e-9)
            n += 1
    assert n == len(exact) == sum(LENGTHS[:4])


def test_the_residual_is_about_one_minus_p():
    """(1 - p) sqrt(V / (V - 1)) <= |onehot - p| <= sqrt(2) (1 - p), the bounds CLAIMS.md names."""
    g = torch.Generator().manual_seed(0)
    for V in (2, 3, 50):
        p = (3 * torch.randn(200, V, generator=g, dtype=torch.float64)).softmax(1)
        residual = -p.clone()
        residual[:, 0] += 1
        norm, rest = residual.norm(dim=1), 1 - p[:, 0]
        assert (norm >= rest * (V / (V - 1)) ** 0.5 - 1e-12).all()
        assert (norm <= 2**0.5 * rest + 1e-12).all()


def test_parts_are_equal_and_in_the_order_of_the_probabilities():
    p = torch.rand(53, generator=torch.Generator().manual_seed(1))
    part = rare.by_probability(p)
    counts = part.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    for d in range(9):
        assert p[part == d].max() <= p[part == d + 1].min()


def test_the_part_of_a_change_that_is_a_longer_step():
    """g_base = (2, 0) and g = (3, 1): the change (1, 1) is half along g_base."""
    row = {"kind": "batch", "exact": 2.0, "cosine": 1.0, "method": "grpo"}
    other = {"kind": "batch", "exact": 10**0.5, "cosine": 3 / 10**0.5, "method": "trgrpo"}
    assert rare.longer([row, other], "trgrpo", "grpo") == [pytest.approx(50)]


def test_miniature(tmp_path):
    """Shares add up to 1; TR-GRPO never weighs less than GRPO, Reweighting never more than DAPO."""
    rows = rare.run((0, {"start": 0}, ("--prompts", "5")))
    for method in rare.METHODS:
        part = [r for r in rows if r["kind"] == "share" and r["method"] == method]
        assert sum(r["share"] for r in part) == pytest.approx(1, abs=1e-5)
        assert sum(r["along"] for r in part) == pytest.approx(1, abs=1e-4)
        totals = [r["total"] for r in part]
        if method == "trgrpo":
            assert min(totals) > 1 - 1e-5 and 1.2 < max(totals) < 1.4 + 1e-5
        if method == "reweight":
            assert max(totals) < 1 + 1e-5 and 0.8 - 1e-5 < min(totals) < 0.9
    deciles = [r for r in rows if r["kind"] == "decile"]
    assert deciles[0]["exact"] > 5 * deciles[5]["exact"]
    (rank,) = [r["rank"] for r in rows if r["kind"] == "ranks"]
    assert rank > 0.95
    both = rows + [{**r, "policy": "trained"} for r in rows]
    both += [{**r, "seed": 1} for r in both]
    rare.draw(both, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any("TR-GRPO less GRPO" in line for line in rare.say(both))
