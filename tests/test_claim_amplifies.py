"""claims/amplifies.py: the recursion and the levels against small optimisations, in miniature."""

import itertools
import math

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
    # Nothing is spent but on right against wrong.
    kl = (pi * (pi / REF).log()).sum().item()
    assert amp.cheapest_kl(amp.after(p, 0.25, beta), 0.25) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("p_ref", [0.05, 0.2, 0.4])
def test_the_limit_is_a_fixed_point_above_the_start(beta, p_ref):
    p = amp.limit(p_ref, beta)
    assert amp.after(p, p_ref, beta) == pytest.approx(p, abs=1e-6)
    assert p > p_ref + 0.02


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


def push_up(p, p_ref, beta, n=10_000):
    """- d loss / d logit p of grpo.py on n completions of one token, a share p of them right."""
    z = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    right = torch.arange(n) < round(p * n)
    logp = torch.where(right, torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z))
    ref = torch.where(right, math.log(p_ref), math.log(1 - p_ref)).double()
    a = grpo.advantages(right.double(), n)
    one = torch.ones(n, 1)
    loss = grpo.loss(
        logp[:, None], logp.detach()[:, None], a, one, beta=beta, ref_logprobs=ref[:, None]
    )
    loss.backward()
    return -z.grad.item()


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_gradient_of_the_loss_vanishes_at_k3s_level(beta):
    p = round(amp.limit_k3(0.25, beta, amp.gap), 4)  # a share that 10,000 completions can have
    assert abs(push_up(p, 0.25, beta)) < 1e-3
    assert push_up(p - 0.05, 0.25, beta) > 5e-3
    assert push_up(p + 0.05, 0.25, beta) < -5e-3


def test_one_choice_that_decides_all_is_k3s_level():
    for p_ref, beta in ((0.1, 1.0), (0.3, 2.0)):
        want = amp.limit_k3(p_ref, beta)
        assert amp.limit_lines([p_ref], [0.0, 1.0], beta) == pytest.approx(want, abs=1e-6)


def test_two_lines_by_enumeration():
    """All completions of a policy with two choices: the mean gradient of grpo's loss is 0."""
    stay_ref, right, beta = [0.4, 0.6], [0.05, 0.1, 0.9], 1.5
    values, z = amp.success(stay_ref, right), torch.zeros(2, dtype=torch.float64)
    assert values[0] == pytest.approx(0.6 * 0.05 + 0.4 * (0.4 * 0.1 + 0.6 * 0.9))
    z.requires_grad_()
    ref = torch.tensor(stay_ref, dtype=torch.float64).logit()
    outcomes = [((0,), right[0]), ((1, 0), right[1]), ((1, 1), right[2])]  # choices, P(right)
    for _ in range(400):
        logps = [chosen(z, choices) for choices, _ in outcomes]
        pi = [logp.detach().sum().exp().item() for logp in logps]
        p = sum(x * chance for x, (_, chance) in zip(pi, outcomes, strict=True))
        loss = 0
        for logp, share, (choices, chance) in zip(logps, pi, outcomes, strict=True):
            a = (chance - p) * amp.gap_of_group(p)
            penalty = grpo.k3(chosen(ref, choices), logp).sum()
            loss = loss + share * (beta * penalty - a * logp.sum())
        (gradient,) = torch.autograd.grad(loss, z)
        z.data -= 2 * gradient
    assert gradient.abs().max() < 1e-6
    assert amp.limit_lines(stay_ref, right, beta) == pytest.approx(p, abs=1e-4)


def chosen(z, choices):
    """Log-probabilities of going on (1) or not (0), one choice after the other. [T]"""
    signs = torch.tensor([1.0 if c else -1.0 for c in choices], dtype=torch.float64)
    return torch.nn.functional.logsigmoid(signs * z[: len(choices)])


def test_the_problems_are_of_their_kinds():
    chosen = amp.choose()
    for i, problem in enumerate(chosen):
        assert problem["answer"].count("=") == amp.steps_of(i)
    assert len({problem["question"] for problem in chosen}) == 16


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "STEPS", 3)
        patch.setattr(amp, "EPOCHS", 2)
        patch.setattr(amp, "EVERY", 2)
        patch.setattr(amp, "DRAWS", 32)
        return amp.run((0, 2.0))


def test_the_rows_in_miniature(rows):
    for part in ("before", "after"):
        for q, counts in amp.tally(rows, part, beta=2.0).items():
            assert amp.rate(counts)[0] == 32, q
    (steps,) = kit.runs_of(rows, part="steps", beta=2.0)
    assert [r["step"] for r in steps] == [0, 1, 2]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)  # the start policy itself
    assert steps[2]["kl"] > 0.01
    assert steps[2]["p"] > steps[0]["p"]
    assert [r["clip"] for r in rows if r["part"] == "epochs"] == list(amp.CLIPS)


def test_lines_and_figure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "BETAS", (2.0,))
    lines = amp.say(rows)
    assert sum("steps: p from" in line for line in lines) == 2
    amp.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
