"""claims/amplifies.py: the recursion and the levels against small optimisations, in miniature."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import grpo
from claims import amplifies as amp
from claims import kit

REF = torch.tensor([0.1, 0.15, 0.5, 0.25], dtype=torch.float64)  # four completions of one question
RIGHT = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def advantage(p):
    return (RIGHT - p) / math.sqrt(p * (1 - p) + amp.EPS)


@pytest.mark.parametrize("beta", [0.7, 2.0])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.6])
def test_the_recursion_is_the_maximum_of_the_objective(beta, p):
    """E_pi[A] - beta KL(pi || pi_ref) over softmax policies, by gradient ascent."""
    z = REF.log().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(400):
        pi = z.softmax(0)
        kl = (pi * (pi / REF).log()).sum()
        loss = beta * kl - (pi * advantage(p)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pi = z.detach().softmax(0)
    closed = REF * (advantage(p) / beta).exp()
    torch.testing.assert_close(pi, closed / closed.sum(), atol=1e-6, rtol=0)
    assert amp.after(p, 0.25, beta) == pytest.approx((pi * RIGHT).sum().item(), abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("p_ref", [0.05, 0.2, 0.4])
def test_the_limit_is_a_fixed_point_above_the_start(beta, p_ref):
    p = amp.limit(p_ref, beta)
    assert amp.after(p, p_ref, beta) == pytest.approx(p, abs=1e-6)
    assert p > p_ref + 0.02
    # and the bandit, which takes a gradient step at a time, ends there
    assert amp.bandit(p_ref, beta)[-1] == pytest.approx(p, abs=0.005)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_the_gap_of_groups_is_that_of_all_groups_one_by_one(p):
    group, gap = 5, 0.0
    for rewards in itertools.product([0.0, 1.0], repeat=group):
        r = torch.tensor(rewards, dtype=torch.float64)
        chance = math.prod(p if x else 1 - p for x in rewards)
        a = grpo.advantages(r, group)
        # the score of "right" is r - p; its mean with a is p (1 - p) gap
        gap += chance * (a * (r - p)).mean().item() / (p * (1 - p))
    assert amp.gap_of_group(p, group) == pytest.approx(gap, rel=1e-9)
    assert amp.gap_of_group(p, 200) == pytest.approx(amp.gap(p), rel=0.02)


@pytest.mark.parametrize("p_ref", [0.1, 0.3])
def test_one_choice_that_decides_all_is_the_recursion(p_ref):
    want = amp.limit(p_ref, 1.5, amp.gap_of_group)
    assert amp.limit_lines([p_ref], [0.0, 1.0], 1.5) == pytest.approx(want, abs=1e-6)


def test_two_lines_by_gradient_ascent():
    """E[A] - beta KL over a policy with two choices, A from the policy of the step before."""
    stay_ref, right, beta = [0.4, 0.6], [0.05, 0.1, 0.9], 1.5
    assert amp.success(stay_ref, right)[0] == pytest.approx(0.6 * 0.05 + 0.4 * (0.4 * 0.1 + 0.54))
    ref = torch.tensor(stay_ref, dtype=torch.float64)
    ref_ends = ends(ref)
    z = ref.logit().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(600):
        pi = ends(z.sigmoid())
        p = (pi * torch.tensor(right)).sum()
        loss = beta * (pi * (pi / ref_ends).log()).sum() - p * amp.gap_of_group(p.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert amp.limit_lines(stay_ref, right, beta) == pytest.approx(p.item(), abs=1e-4)


def ends(stay):
    """The probabilities to answer after 0, 1 and 2 lines."""
    return torch.stack([1 - stay[0], stay[0] * (1 - stay[1]), stay[0] * stay[1]])


def test_the_kl_in_the_reward_has_the_gradient_of_the_kl():
    """E over groups of 1/G sum_i kl_i dlog pi(o_i) is dKL(pi || pi_ref), by enumeration."""
    z = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    pi = z.softmax(0)
    (want,) = torch.autograd.grad((pi * (pi / ref).log()).sum(), z, retain_graph=True)
    got, G = torch.zeros(3, dtype=torch.float64), 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "GROUP", G)
        for group in itertools.product(range(3), repeat=G):
            chance = math.prod(pi[a].item() for a in group)
            old = torch.stack([pi[a].detach().log() for a in group])[:, None]
            given = {"old_logprobs": old, "ref_logprobs": ref[list(group)].log()[:, None]}
            kl = amp.kl_of(SimpleNamespace(**given, mask=torch.ones(G, 1)))
            for a, weight in zip(group, kl.tolist(), strict=True):
                (score,) = torch.autograd.grad(pi[a].log(), z, retain_graph=True)
                got += chance * weight * score / G
    torch.testing.assert_close(got, want)


def test_the_problems_are_of_their_kinds():
    chosen = amp.choose()
    for i, problem in enumerate(chosen):
        assert problem["answer"].count("=") == amp.steps_of(i)
    assert len({problem["question"] for problem in chosen}) == 16


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "STEPS", 3)
        patch.setattr(amp, "DRAWS", 32)
        patch.setattr(amp, "BETAS", (2.0,))
        return amp.measure(SimpleNamespace(seeds=[0], jobs=1))


def test_the_rows_in_miniature(rows):
    for part in ("before", "after"):
        for q, counts in amp.tally(rows, part, beta=2.0).items():
            assert amp.rate(counts)[0] == 32, q
    (steps,) = kit.runs_of(rows, part="steps", beta=2.0)
    assert [r["step"] for r in steps] == [0, 1, 2]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)  # the start policy itself
    assert steps[2]["kl"] > 0.01
    assert steps[2]["p"] > steps[0]["p"]
    (bandit,) = kit.runs_of(rows, part="bandit", beta=2.0)
    assert bandit[0]["p"] == pytest.approx(amp.BANDIT_START) and bandit[-1]["p"] > 0.4


def test_lines_and_figure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "BETAS", (2.0,))
    lines = amp.say(rows)
    assert sum("steps: p from" in line for line in lines) == 2
    amp.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
