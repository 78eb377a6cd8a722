"""The fifteen losses of more/: against hand-worked numbers, slow loops, and identities."""

import doctest
import importlib
import inspect
import math
import re

import more_reference
import pytest
import torch
from conftest import ROOT
from test_losses import as_lists, close, make_batch, same, value_and_grad

import dapo
import grpo
import gspo
import tepo

NAMES = (
    *("clip_cov", "kl_cov", "ce_gppo", "aspo", "dppo", "reweight", "raft", "ha_dw"),
    *("ktae", "dhpo", "dr_grpo", "rloo", "cispo", "sapo", "gmpo"),
)
MODULE = {name: importlib.import_module(f"more.{name}") for name in NAMES}
REFERENCE = {name: getattr(more_reference, f"{name}_loss") for name in NAMES}
SEQUENCE_MEAN = ("ha_dw", "dr_grpo", "sapo", "rloo", "gmpo")  # the others average over tokens
CLIPPING = ("clip_cov", "aspo", "reweight", "raft", "ha_dw", "ktae", "dhpo", "dr_grpo")
CLIPPING += ("rloo", "gmpo")  # a token far enough from 1 has no gradient
ONE_ADVANTAGE = ("rloo", "gmpo")  # take advantages [B] only
ALL_ROWS = ("clip_cov", "kl_cov")  # need the logprobs of rows without an advantage

CLIP = {"eps_low": 0.2, "eps_high": 0.2}
NO_CLIP = {"eps_low": 1e9, "eps_high": 1e9}
EQUAL_EPS = {"eps_low": 0.15, "eps_high": 0.25}
DEFAULTS = {
    "clip_cov": {"eps_low": 1.0, "eps_high": 1.0}
    | {"cov_ratio": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    "kl_cov": {"cov_ratio": 2e-3, "cov_coef": 1.0},
    "ce_gppo": CLIP | {"beta1": 0.5, "beta2": 1.0},
    "aspo": CLIP | {"cap": 3.0},
    "dppo": {"delta_low": 0.15, "delta_high": 0.15, "cap": 20.0, "divergence": "tv"},
    "reweight": {"eps_low": 0.2, "eps_high": 0.24, "alpha": 0.2},
    "raft": CLIP | {"dual_clip": 3.0, "variant": "raft++"},
    "ha_dw": CLIP | {"beta": 0.0, "ref_logprobs": None},
    "ktae": {"eps_low": 0.2, "eps_high": 0.28},
    "dhpo": {"eps_low": 0.2, "eps_high": 0.28}
    | {"seq_eps_low": 3e-4, "seq_eps_high": 4e-4, "weight": 0.5},
    "dr_grpo": CLIP | {"max_length": 0},
    "rloo": CLIP,
    "cispo": {"eps_low": 1.0, "eps_high": 4.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gmpo": {"eps_low": 0.4, "eps_high": 0.4},
}

# every option, at values other than the defaults; "ref" stands for the batch's tensor
OPTIONS = [(name, {}) for name in NAMES]
OPTIONS += [
    ("clip_cov", {"cov_ratio": 0.2, "cov_low": 0.2, "cov_high": 0.9}),
    ("clip_cov", {"cov_ratio": 0.9, "cov_low": 0.1, "eps_low": 0.1, "eps_high": 0.15}),
    ("kl_cov", {"cov_ratio": 0.3, "cov_coef": 0.7}),
    ("kl_cov", {"cov_ratio": 3.0}),  # more than there are: all tokens
    ("ce_gppo", {"eps_low": 0.1, "eps_high": 0.3, "beta1": 0.75, "beta2": 0.6}),
    ("aspo", {"eps_low": 0.1, "eps_high": 0.3, "cap": 1.5}),
    ("dppo", {"delta_low": 0.05, "delta_high": 0.1, "cap": 1.5}),
    ("dppo", {"delta_low": 0.05, "delta_high": 0.05, "divergence": "kl"}),
    ("dppo", {"delta_low": 0.02, "delta_high": 0.1, "divergence": "kl"}),
    ("reweight", {"eps_low": 0.1, "eps_high": 0.3, "alpha": 0.7}),
    ("raft", {"variant": "raft"}),
    ("raft", {"variant": "reinforce_rej", "eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.5}),
    ("ha_dw", {"eps_low": 0.1, "eps_high": 0.3, "beta": 0.4, "ref_logprobs": "ref"}),
    ("ktae", {"eps_low": 0.1, "eps_high": 0.15}),
    ("dhpo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("dhpo", {"seq_eps_low": 0.1, "seq_eps_high": 0.2, "weight": 0.3}),
    ("dr_grpo", {"eps_low": 0.1, "eps_high": 0.3, "max_length": 7}),
    ("rloo", {"eps_low": 0.5, "eps_high": 0.9}),
    ("cispo", {"eps_low": 0.1, "eps_high": 0.3}),
    ("sapo", {"tau_pos": 3.0, "tau_neg": 0.5}),
    ("gmpo", {"eps_low": 0.1, "eps_high": 0.2}),
]
CASES = [(name, options, "[B]") for name, options in OPTIONS]
CASES += [(name, options, "[B, T]") for name, options in OPTIONS if name not in ONE_ADVANTAGE]
every_case = pytest.mark.parametrize(
    ("name", "options", "form"),
    CASES,
    ids=[f"{n}{f}-{'-'.join(o) or 'defaults'}" for n, o, f in CASES],
)
every_method = pytest.mark.parametrize("name", NAMES)
every_form = pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n, o, f in CASES if not o], ids="".join
)


def batch_of(seed=0, **options):
    """test_losses' batch, off policy; every old probability is below 1, as DPPO's KL needs."""
    batch = make_batch(seed, **options)
    batch["old_logprobs"] = batch["old_logprobs"].clamp(max=-0.01)
    return batch


def arguments(batch, form, options):
    """The loss's positional and keyword arguments out of a batch."""
    named = {k: batch["ref"] if v == "ref" else v for k, v in options.items()}
    return [batch[k] for k in ("logprobs", "old_logprobs", form, "mask")], named


def run(loss, batch, form="[B]", options=None):
    """(value, gradient) of a loss, or of the method of that name; same random choices each time."""
    args, named = arguments(batch, form, options or {})
    torch.manual_seed(0)
    return value_and_grad(MODULE[loss].loss if isinstance(loss, str) else loss, *args, **named)


def one_row(w, a, **options):
    """Gradient of each method's loss for one row with the ratios w, pi_old = 0.1, advantage a."""
    w = torch.tensor([w], dtype=torch.float64)
    old = torch.full_like(w, math.log(0.1))
    name = options.pop("name")
    advantages = torch.tensor([a], dtype=torch.float64)
    return value_and_grad(
        MODULE[name].loss, old + w.log(), old, advantages, torch.ones_like(w), **options
    )[1]


# ---- against the equations -----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("spread", [3e-4, 0.35, 0.9])
def test_value_and_gradient_equal_the_slow_loop(name, options, form, spread):
    for seed in range(3):
        batch = batch_of(seed, spread=spread)
        got = run(name, batch, form, options)
        args, named = arguments(batch, form, options)
        torch.manual_seed(0)
        named = {k: as_lists(v) for k, v in named.items()}
        want = REFERENCE[name](*map(as_lists, args), **named)
        close(got[0], want[0])
        close(got[1], want[1])


@pytest.mark.parametrize("form", ["[B]", "[B, T]"])
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_row_without_an_advantage_equals_the_slow_loop(name, form):
    """Its logprobs enter the means, and KL-Cov may take its tokens into S."""
    options = {"cov_ratio": 0.4} | ({"cov_low": 0.1} if name == "clip_cov" else {})
    for seed in range(3):
        batch = batch_of(seed)
        batch[form] = batch[form].index_fill(0, torch.tensor([1, 4]), 0)
        got = run(name, batch, form, options)
        torch.manual_seed(0)
        args = [as_lists(x) for x in arguments(batch, form, {})[0]]
        want = REFERENCE[name](*args, **options)
        close(got[0], want[0])
        close(got[1], want[1])


# ---- by hand -------------------------------------------------------------------------------------

RATIOS = (0.25, 0.9, 1.1, 1.6, 8.0)
# What takes the place of w in the gradient -A w of one token, pi_old = 0.1, at the ratios above:
# for A > 0, then for A < 0. 0 is a clipped token.
UNCLIPPED = [0.25, 0.9, 1.1, 1.6, 8.0]
PPO = ([0.25, 0.9, 1.1, 0, 0], [0, 0.9, 1.1, 1.6, 8.0])
WEIGHT = {
    # 1 / 1: w above 2 only
    "clip_cov": ([0.25, 0.9, 1.1, 1.6, 0], UNCLIPPED),
    "kl_cov": (UNCLIPPED, UNCLIPPED),
    # beta2 * 1.2 above, beta1 * 0.8 below
    "ce_gppo": ([0.25, 0.9, 1.1, 1.2, 1.2], [0.4, 0.9, 1.1, 1.6, 8.0]),
    # 1 / w, at most 3; w, at most 3
    "aspo": ([3.0, 1 / 0.9, 1 / 1.1, 0, 0], [0, 0.9, 1.1, 1.6, 3.0]),
    # |p - q| = 0.075, 0.01, 0.01, 0.06, 0.7: only the last is above 0.15, and it has risen
    "dppo": ([0.25, 0.9, 1.1, 1.6, 0], UNCLIPPED),
    # 0.2 * 0.1 + 0.8 = 0.82
    "reweight": ([0.205, 0.738, 0.902, 0, 0], [0, 0.738, 0.902, 1.312, 6.56]),
    # the dual clip: 8 > 3
    "raft": ([0.25, 0.9, 1.1, 0, 0], [0, 0.9, 1.1, 1.6, 0]),
    "ha_dw": PPO,
    "ktae": PPO,
    # half a token ratio, 0.2 / 0.28, and half a sequence ratio, 3e-4 / 4e-4
    "dhpo": ([0.25, 0.9, 0.55, 0, 0], [0, 0.45, 1.1, 1.6, 8.0]),
    "dr_grpo": PPO,
    "rloo": PPO,
    # at most 5
    "cispo": ([0.25, 0.9, 1.1, 1.6, 5.0], [0.25, 0.9, 1.1, 1.6, 5.0]),
    # 1 / cosh(tau (w - 1) / 2)^2 w
    "sapo": tuple([w / math.cosh(tau * (w - 1) / 2) ** 2 for w in RATIOS] for tau in (1.0, 1.05)),
    # log w = -1.39, -0.11, 0.10, 0.47, 2.08 against 0.4
    "gmpo": PPO,
}


@every_method
@pytest.mark.parametrize("a", [2.0, -2.0])
def test_weight_of_one_token(name, a):
    options = {"cov_coef": 0.0} if name == "kl_cov" else {}
    got = [one_row([w], a, name=name, **options).item() for w in RATIOS]
    want = [-a * weight for weight in WEIGHT[name][a < 0]]
    close(torch.tensor(got, dtype=torch.float64), want)
    # exactly 0 where it is clipped: papers' identity 6
    assert [g == 0 for g in got] == [w == 0 for w in want]


@pytest.mark.parametrize("a", [2.0, -2.0])
@pytest.mark.parametrize("name", CLIPPING)
def test_a_clipped_token_starts_exactly_at_the_edge(name, a):
    eps_low, eps_high = 0.3, 0.4
    options = {"eps_low": eps_low, "eps_high": eps_high}
    if name == "dhpo":
        options |= {"seq_eps_low": eps_low, "seq_eps_high": eps_high}
    edge, step = (1 + eps_high, 1e-6) if a > 0 else (1 - eps_low, -1e-6)
    if name == "gmpo":  # a range of log w
        edge = math.exp(eps_high if a > 0 else -eps_low)
    assert one_row([edge - step], a, name=name, **options).item() != 0
    assert one_row([edge + step], a, name=name, **options).item() == 0


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize(("a", "p"), [(1.0, 0.35), (-1.0, 0.05)])
def test_dppo_mask_starts_at_delta(a, p, divergence):
    q = 0.1
    D = abs(p - q)
    if divergence == "kl":
        D = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    mine, other = ("delta_high", "delta_low") if a > 0 else ("delta_low", "delta_high")
    for delta, silent in ((D * 1.001, False), (D * 0.999, True)):
        options = {"divergence": divergence, mine: delta, other: 9.0}
        assert (one_row([p / q], a, name="dppo", **options).item() == 0) == silent
    # moving against the advantage is never masked
    options = {"divergence": divergence, "delta_low": 0.0, "delta_high": 0.0}
    assert one_row([p / q], -a, name="dppo", **options).item() != 0


def test_dppo_divergence_stays_finite_where_a_probability_is_1():
    old = torch.tensor([[0.999]], dtype=torch.float64).log()
    D = 0.999 * math.log(0.999) + 0.001 * math.log((0.001 + 1e-8) / 1e-8)  # 0.0105
    for delta, silent in ((D + 1e-6, False), (D - 1e-6, True)):
        options = {"divergence": "kl", "delta_high": delta}
        args = (old, torch.ones(1, dtype=torch.float64), torch.ones(1, 1))
        _, grad = value_and_grad(MODULE["dppo"].loss, 0 * old, *args, **options)
        assert (grad == 0).item() == silent


@pytest.mark.parametrize(
    ("name", "options", "zero"),
    [
        ("dr_grpo", {}, [True, False]),
        ("reweight", CLIP, [True, False]),
        ("dppo", {}, [False, False]),  # 0.1 -> 0.24
        ("rloo", {}, [False, False]),  # 2.4 * 0.45 = 1.08
        ("rloo", {"eps_high": 0.07}, [True, True]),
        ("gmpo", {}, [True, False]),
        ("dhpo", {"seq_eps_low": 0.2, "seq_eps_high": 0.28}, [False, False]),  # s = 1.04
        ("dhpo", {}, [True, False]),  # s is clipped; the token ratio of 0.45 is not
    ],
)
def test_each_method_clips_its_own_ratio(name, options, zero):
    grad = one_row([2.4, 0.45], 1.0, name=name, **options)
    assert (grad == 0).tolist() == [zero]


def test_clamps_at_20_what_enters_exp_and_only_that():
    one = torch.ones(1, dtype=torch.float64)

    def value(name, log_ratios, a, old=0.0, **options):
        lr = torch.tensor([log_ratios], dtype=torch.float64)
        old = torch.full_like(lr, old)
        return value_and_grad(MODULE[name].loss, old + lr, old, a * one, 1 + 0 * lr, **options)

    for name in ("ce_gppo", "reweight", "ha_dw", "ktae", "dr_grpo", "rloo", "gmpo", "clip_cov"):
        factor = 0.8 + 0.2 * math.exp(0) if name == "reweight" else 1
        got, grad = value(name, [1e4], -1)
        close(got, factor * math.exp(20))
        assert grad.isfinite().all()
    close(value("rloo", [15.0, 4.0], -1)[0], math.exp(19))
    close(value("rloo", [15.0, 9.0], -1)[0], math.exp(20))  # the sum, not its terms
    close(value("rloo", [25.0, -10.0], -1)[0], math.exp(15))
    close(value("gmpo", [36.0, 2.0], -1)[0], math.exp(19))  # the mean, not its terms
    close(value("gmpo", [36.0, 12.0], -1)[0], math.exp(20))
    # kl_cov: |log w| is not clamped
    close(value("kl_cov", [-100.0], 0)[0], 100.0)
    close(value("kl_cov", [-100.0], 0)[1], [[-1.0]])
    # dppo: the divergence is not clamped: 0.1 * 100 + 0.9 log 0.9 = 9.9
    old = math.log(0.1)
    assert value("dppo", [-100.0], -1, old, divergence="kl", delta_low=9.8)[1].item() == 0
    assert value("dppo", [-100.0], -1, old, divergence="kl", delta_low=10.0)[1].item() != 0
    assert value("sapo", [1e4], -1)[0].isfinite()
    # tokens that keep a gradient by design keep it there too
    close(value("ce_gppo", [-30.0], -1)[1], [[0.4]])
    close(value("cispo", [30.0], 1)[1], [[-5.0]])
    close(value("aspo", [-30.0], 1)[1], [[-3.0]])


# ---- on policy -----------------------------------------------------------------------------------


def push_on_policy(name, batch, form):
    """-A over the denominator that the method's average has, by hand. [B, T]"""
    m = batch["mask"].double()
    a = batch[form] if form == "[B, T]" else batch[form][:, None]
    B, T = m.shape
    if name == "reweight":
        a = a * (0.2 * batch["logprobs"].exp() + 0.8)
    if name == "rloo":
        return -a * m / B
    if name == "dr_grpo":
        return -a * m / (B * T)
    if name in SEQUENCE_MEAN:
        return -a * m / (B * m.sum(1, keepdim=True).clamp(min=1))
    return -a * m / m.sum()


@every_form
def test_push_on_policy(name, form):
    batch = batch_of(3)
    batch["old_logprobs"] = batch["logprobs"]
    options = {"cov_low": 9.0, "cov_high": 9.0} if name == "clip_cov" else {}
    close(run(name, batch, form, options)[1], push_on_policy(name, batch, form))


@every_form
def test_old_logprobs_may_be_the_very_same_tensor(name, form):
    """On policy a caller may pass logprobs twice; the old ones must not cancel the gradient."""
    batch = batch_of(14)
    logprobs = batch["logprobs"].requires_grad_()
    args = (batch[form], batch["mask"])
    options = {"cov_low": 9.0, "cov_high": 9.0} if name == "clip_cov" else {}
    value = MODULE[name].loss(logprobs, logprobs, *args, **options)
    (grad,) = torch.autograd.grad(value, logprobs)
    close(grad, push_on_policy(name, batch | {"logprobs": logprobs.detach()}, form))


# ---- identities, method by method ----------------------------------------------------------------

every_two = pytest.mark.parametrize("form", ["[B]", "[B, T]"])


@every_two
def test_clip_cov_without_a_candidate_is_dapo(form):
    for options in (EQUAL_EPS, {"eps_low": 1.0, "eps_high": 1.0}):
        nothing = options | {"cov_low": 0.3, "cov_high": 0.3}
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        args, _ = arguments(batch_of(1), form, {})
        MODULE["clip_cov"].loss(*args, **nothing)
        assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn
        same(
            run("clip_cov", batch_of(1), form, nothing), run(dapo.loss, batch_of(1), form, options)
        )


def test_clip_cov_takes_the_push_from_k_random_candidates():
    batch = batch_of(2, B=40, T=10, spread=0.0)  # on policy: nothing else is silent
    args, _ = arguments(batch, "[B, T]", {})
    N = int(batch["mask"].sum())
    chosen = {}
    for seed in (0, 1, 0):
        for cov_ratio in (1e-4, 0.05, 1.0):
            torch.manual_seed(seed)
            options = {"cov_ratio": cov_ratio, "cov_low": 0.2}
            _, grad = value_and_grad(MODULE["clip_cov"].loss, *args, **options)
            silent = batch["mask"] & (grad == 0)
            before = chosen.setdefault((seed, cov_ratio), silent)
            assert torch.equal(before, silent)  # same seed, same choice
            cov = more_reference.covariance(*(as_lists(args[i]) for i in (0, 2, 3)))
            candidates = {key for key, c in cov.items() if 0.2 < c < 5}
            assert {tuple(x) for x in silent.nonzero().tolist()} <= candidates
            k = min(max(1, int(cov_ratio * N)), len(candidates))
            assert silent.sum() == k
            close(grad[batch["mask"] & ~silent], (-batch["[B, T]"] / N)[batch["mask"] & ~silent])
    assert not torch.equal(chosen[0, 0.05], chosen[1, 0.05])


def test_clip_cov_takes_no_token_whose_cov_is_a_bound():
    one = torch.ones(1, 1, dtype=torch.float64)  # alone, a token has cov 0
    for cov_low, cov_high, chosen in ((-1.0, 1.0, True), (-1.0, 0.0, False), (0.0, 1.0, False)):
        options = {"cov_low": cov_low, "cov_high": cov_high}
        _, grad = value_and_grad(MODULE["clip_cov"].loss, -one, -one, one[0], one, **options)
        assert (grad == 0).item() == chosen


def test_clip_cov_counts_with_a_float_product():
    """int(0.29 * 100) is 28: the product of Python floats, rounded down, as in verl."""
    batch = batch_of(2, B=10, T=10, spread=0.0, gaps=False)
    batch["mask"][:] = True
    options = {"cov_ratio": 0.29, "cov_low": -99.0, "cov_high": 99.0}
    assert (run("clip_cov", batch, "[B, T]", options)[1] == 0).sum() == 28


@every_two
def test_kl_cov_without_its_penalty_is_unclipped(form):
    batch = batch_of(3)
    got = run("kl_cov", batch, form, {"cov_coef": 0.0})

    def unclipped(logprobs, old, advantages, mask):
        a = advantages if advantages.ndim == 2 else advantages[:, None]
        return -((logprobs - old).exp() * a * mask).sum() / mask.sum()

    same(got, run(unclipped, batch, form))


def test_kl_cov_pushes_the_tokens_of_largest_cov():
    batch = batch_of(4)
    plain = run("kl_cov", batch, "[B, T]", {"cov_coef": 0.0})[1]
    for cov_ratio, k in ((2e-3, 1), (0.25, None)):
        extra = run("kl_cov", batch, "[B, T]", {"cov_ratio": cov_ratio})[1] - plain
        N = int(batch["mask"].sum())
        lists = [as_lists(batch[key]) for key in ("logprobs", "[B, T]", "mask")]
        cov = more_reference.covariance(*lists)
        largest = sorted(cov, key=cov.get)[-(k or int(0.25 * N)) :]
        found = [tuple(x) for x in (extra.abs() > 1e-12).nonzero().tolist()]
        assert sorted(found) == sorted(largest)
    # on policy it does nothing
    batch["old_logprobs"] = batch["logprobs"]
    same(
        run("kl_cov", batch, "[B, T]", {"cov_ratio": 1.0}),
        run("kl_cov", batch, "[B, T]", {"cov_coef": 0.0}),
    )


@every_two
def test_ce_gppo_lies_between_dapo_and_its_value(form):
    batch = batch_of(5)
    want = run(dapo.loss, batch, form, EQUAL_EPS)
    zero = run("ce_gppo", batch, form, EQUAL_EPS | {"beta1": 0.0, "beta2": 0.0})
    one = run("ce_gppo", batch, form, EQUAL_EPS | {"beta1": 1.0, "beta2": 1.0})
    close(zero[1], want[1])
    close(one[0], want[0])
    assert abs(zero[0] - want[0]) > 1e-3 and (one[1] - want[1]).abs().max() > 1e-3


def test_aspo_turns_the_ratio_of_right_tokens_over():
    # A = 1, w = 1/2, two tokens: -2 / 2 each, where PPO has -0.5 / 2
    close(one_row([0.5, 0.5], 1.0, name="aspo"), [[-1.0, -1.0]])
    close(one_row([0.5, 0.5], 1.0, name="dr_grpo"), [[-0.25, -0.25]])


@every_two
def test_aspo_is_dapo_where_answers_are_wrong(form):
    batch = batch_of(6)
    batch[form] = -batch[form].abs()
    log_ratio = (batch["logprobs"] - batch["old_logprobs"]).clamp(max=math.log(3))
    batch["old_logprobs"] = batch["logprobs"] - log_ratio
    same(run("aspo", batch, form, EQUAL_EPS), run(dapo.loss, batch, form, EQUAL_EPS))


@every_two
@pytest.mark.parametrize("cap", [1.5, 20.0])
def test_dppo_without_a_mask_is_cispo(form, cap):
    batch = batch_of(7, spread=0.9)
    open_ = {"delta_low": 1.0, "delta_high": 1.0, "cap": cap}
    want = run("cispo", batch, form, {"eps_low": 1.0, "eps_high": cap - 1})
    same(run("dppo", batch, form, open_), want)


def test_dppo_lets_rare_tokens_pass():
    w, a, on = torch.tensor([[10.0]]).double(), torch.ones(1).double(), torch.ones(1, 1)
    for old, want in ((1e-3, -10.0), (0.05, 0.0)):  # 0.001 -> 0.01, 0.05 -> 0.5
        old = torch.full_like(w, old).log()
        close(value_and_grad(MODULE["dppo"].loss, old + w.log(), old, a, on)[1], [[want]])


@every_two
def test_reweight_without_weights_is_dapo(form):
    batch, eps = batch_of(8), {"eps_low": 0.2, "eps_high": 0.24}
    same(run("reweight", batch, form, {"alpha": 0.0}), run(dapo.loss, batch, form, eps))
    batch["old_logprobs"] = torch.zeros(8, 5).double()  # pi_old = 1
    same(run("reweight", batch, form, {"alpha": 1.0}), run(dapo.loss, batch, form, eps))


@every_two
def test_raft_variants_have_one_gradient_on_policy(form):
    batch = batch_of(9)
    batch["old_logprobs"] = batch["logprobs"]
    grads = [
        run("raft", batch, form, {"variant": v})[1] for v in ("raft", "raft++", "reinforce_rej")
    ]
    close(grads[1], grads[0])
    close(grads[2], grads[0])


def test_raft_is_supervised_training_on_the_right_answers():
    batch = batch_of(10)
    rewards = (batch["[B]"] > 0).double()
    batch["[B]"] = MODULE["raft"].advantages(rewards, 4, variant="raft")
    right = batch["mask"] & (rewards > 0)[:, None]

    def supervised(logprobs, old, advantages, mask):
        return -logprobs[right].sum() / mask.sum()

    same(run("raft", batch, "[B]", {"variant": "raft"}), run(supervised, batch))
    # the old policy plays no part
    value = run("raft", batch, "[B]", {"variant": "raft"})[0]
    batch["old_logprobs"] = batch["old_logprobs"] - 3
    assert run("raft", batch, "[B]", {"variant": "raft"})[0] == value


def test_ha_dw_and_ktae_have_the_losses_of_grpo_and_dapo():
    assert MODULE["ha_dw"].loss is grpo.loss
    assert MODULE["ktae"].loss is dapo.loss


@every_two
def test_dr_grpo_with_rows_of_length_L_is_grpo(form):
    batch = batch_of(11)
    batch["mask"] = torch.ones(8, 5).index_fill(1, torch.tensor([3]), 0)  # four tokens, a gap
    want = run(grpo.loss, batch, form, EQUAL_EPS)
    same(run("dr_grpo", batch, form, EQUAL_EPS | {"max_length": 4}), want)
    batch["mask"] = torch.ones(8, 5)
    same(run("dr_grpo", batch, form, EQUAL_EPS), run(grpo.loss, batch, form, EQUAL_EPS))


def one_token_rows(seed):
    batch = batch_of(seed)
    batch["mask"] = torch.nn.functional.one_hot(torch.arange(8) % 5, 5)
    batch["[B, T]"] = batch["[B]"][:, None].expand(8, 5)
    return batch


def test_rows_of_one_token():
    """Identity 2: rloo and gmpo are GRPO, gmpo in a range of logs; dhpo with one range is DAPO."""
    batch = one_token_rows(12)
    same(run("rloo", batch, "[B]", EQUAL_EPS), run(grpo.loss, batch, "[B]", EQUAL_EPS))
    eps = {"eps_low": 1 - math.exp(-0.4), "eps_high": math.exp(0.4) - 1}
    same(run("gmpo", batch), run(grpo.loss, batch, "[B]", eps))
    options = EQUAL_EPS | {"seq_eps_low": 0.15, "seq_eps_high": 0.25}
    for form in ("[B]", "[B, T]"):
        same(run("dhpo", batch, form, options), run(dapo.loss, batch, form, EQUAL_EPS))
        want = run(grpo.loss, batch, form, EQUAL_EPS)
        same(run("dr_grpo", batch, form, EQUAL_EPS | {"max_length": 1}), want)


@every_two
def test_cispo_inside_its_range_is_unclipped_and_outside_never_0(form):
    batch = batch_of(13)
    wide = run("cispo", batch, form, {"eps_low": 1.0, "eps_high": 99.0})[1]
    close(wide, run(dapo.loss, batch, form, NO_CLIP)[1])
    for options in ({}, {"eps_low": 0.1, "eps_high": 0.1}):
        grad = run("cispo", batch, form, options)[1]
        assert (grad[batch["mask"]] != 0).all()


@every_two
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_sapo_on_policy_is_grpo_with_another_value(form, tau):
    batch = batch_of(14)
    batch["old_logprobs"] = batch["logprobs"]
    value, grad = run("sapo", batch, form, {"tau_pos": tau, "tau_neg": tau})
    want = run(grpo.loss, batch, form)
    close(grad, want[1])
    close(value, 2 / tau * want[0])


def test_sapo_never_ends():
    for dtype in (torch.float32, torch.float64):
        w = torch.linspace(0.05, 14.9, 50, dtype=dtype)[:, None]
        for a in (1.0, -1.0):
            args = (torch.zeros_like(w), torch.full((50,), a), torch.ones_like(w))
            assert (value_and_grad(MODULE["sapo"].loss, w.log(), *args)[1] != 0).all()


def test_gmpo_without_a_clip_is_gspo():
    same(run("gmpo", batch_of(15), "[B]", NO_CLIP), run(gspo.loss, batch_of(15), "[B]", NO_CLIP))


def test_gmpo_clips_a_token_and_not_its_row():
    # log w = 0.405 and -0.105; clipped: 0.4
    grad = one_row([1.5, 0.9], 1.0, name="gmpo")
    assert grad[0, 0] == 0
    close(grad[0, 1], -math.exp((0.4 + math.log(0.9)) / 2) / 2)


@every_two
def test_dhpo_is_dapo_or_tepo_at_its_ends(form):
    batch = batch_of(16)
    same(run("dhpo", batch, form, {"weight": 1.0}), run(dapo.loss, batch, form))
    narrow = {"eps_low": 3e-4, "eps_high": 4e-4}
    same(run("dhpo", batch, form, {"weight": 0.0}), run(tepo.loss, batch, form, narrow))
    options = {"weight": 0.0, "seq_eps_low": 0.1, "seq_eps_high": 0.3}
    wide = {"eps_low": 0.1, "eps_high": 0.3}
    same(run("dhpo", batch, form, options), run(tepo.loss, batch, form, wide))


@every_form
def test_only_clip_cov_and_kl_cov_need_rows_without_an_advantage(name, form):
    """Stale logprobs of rows with A = 0 change no other method's gradient."""
    batch = batch_of(17)
    batch[form] = batch[form].index_fill(0, torch.tensor([0, 3]), 0)
    stale = batch | {"logprobs": batch["logprobs"].clone()}
    stale["logprobs"][[0, 3]] -= 2.0
    options = {"clip_cov": {"cov_ratio": 1.0, "cov_low": 0.5}, "kl_cov": {"cov_ratio": 0.3}}
    now = run(name, batch, form, options.get(name))[1]
    then = run(name, stale, form, options.get(name))[1]
    needs = getattr(MODULE[name], "NEEDS_ALL_ROWS", False)
    assert needs == (name in ALL_ROWS)
    assert torch.equal(now, then) != needs


# ---- what stands where the mask is off, and what carries no gradient -----------------------------


@every_case
def test_what_stands_where_mask_is_0_changes_nothing(name, options, form):
    batch = batch_of(9)
    batch["mask"][2] = False
    off, zero, poisoned = ~batch["mask"], {}, {}
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).double()
    poison = poison[torch.arange(40).view(8, 5) % 4]
    for key, x in batch.items():
        per_token = x.shape == off.shape and key != "mask"
        zero[key] = x.masked_fill(off, 0) if per_token else x
        poisoned[key] = torch.where(off, poison, x) if per_token else x
    poisoned["[B]"] = zero["[B]"].masked_fill(off.all(1), math.nan)
    want, got = run(name, zero, form, options), run(name, poisoned, form, options)
    assert torch.equal(got[0], want[0]) and got[0].isfinite()
    assert torch.equal(got[1], want[1])
    assert (got[1][off] == 0).all() and (got[1][batch["mask"]] != 0).any()


@every_case
def test_any_mask_that_is_not_0_is_on(name, options, form):
    batch = batch_of(10)
    want = run(name, batch, form, options)
    on = batch["mask"]
    for mask in (on.long(), on.float(), on * 2.5, on * -0.5):
        got = run(name, batch | {"mask": mask}, form, options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@every_case
def test_an_empty_row_adds_0_and_counts_in_B(name, options, form):
    batch = batch_of(11)
    value, grad = run(name, batch, form, options)
    padded = {k: torch.cat([x, x[:1]]) for k, x in batch.items()}
    padded["mask"][-1] = False
    got = run(name, padded, form, options)
    shrink = 8 / 9 if name in SEQUENCE_MEAN else 1
    close(got[0], value * shrink)
    close(got[1], torch.cat([grad * shrink, torch.zeros(1, 5)]))


@every_case
@pytest.mark.parametrize("shape", [(8, 5), (8, 0), (0, 5)])
def test_a_batch_without_a_token_is_0(name, options, form, shape):
    batch = {
        k: x[: shape[0], : shape[1]] if x.ndim == 2 else x[: shape[0]]
        for k, x in batch_of(12).items()
    }
    batch["mask"] = torch.zeros(shape)
    value, grad = run(name, batch, form, options)
    assert value == 0
    assert torch.equal(grad, torch.zeros(shape, dtype=torch.float64))


@every_case
def test_rows_without_an_advantage_get_no_gradient(name, options, form):
    """A constant group's advantages are 0; only KL-Cov's penalty may push it, as KL terms do."""
    batch = batch_of(13)
    batch[form] = batch[form].index_fill(0, torch.arange(4), 0)
    if name == "kl_cov" or options.get("beta"):
        options = options | {"cov_coef" if name == "kl_cov" else "beta": 0.0}
    grad = run(name, batch, form, options)[1]
    assert not grad[:4].any() and grad[4:].any()


@every_case
def test_only_logprobs_get_a_gradient(name, options, form):
    batch = {
        k: x.clone() if k == "mask" else x.clone().requires_grad_() for k, x in batch_of(13).items()
    }
    batch["mask"] = batch["mask"].double().requires_grad_()
    (logprobs, *args), named = arguments(batch, form, options)
    value = MODULE[name].loss(logprobs, *args, **named)
    others = args + [x for x in named.values() if isinstance(x, torch.Tensor)]
    grad, *rest = torch.autograd.grad(value, [logprobs, *others], allow_unused=True)
    assert grad.any()
    assert all(g is None for g in rest)


# ---- numerics ------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_less_than_fp32_is_raised(name, options, form, low):
    batch = {k: x if k == "mask" else x.to(low) for k, x in batch_of(15).items()}
    raised = {k: x if k == "mask" else x.float() for k, x in batch.items()}
    got, want = run(name, batch, form, options), run(name, raised, form, options)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], want[0]) and want[0] != 0
    assert torch.equal(got[1], want[1].to(low))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_loss_is_that_of_logprobs(name, options, form, dtype):
    batch = batch_of(16)
    others = {k: x if k == "mask" else x.to(torch.float32) for k, x in batch.items()}
    value, grad = run(name, others | {"logprobs": batch["logprobs"].to(dtype)}, form, options)
    assert value.dtype == grad.dtype == dtype
    close(value.double(), run(name, batch, form, options)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(  # these two count tokens, which meta tensors cannot
    ("name", "options", "form"), [case for case in CASES if case[0] not in ALL_ROWS]
)
def test_nothing_moves_devices(name, options, form):
    batch = {k: x.to("meta") for k, x in batch_of(17).items()}
    value, grad = run(name, batch, form, options)
    assert value.device.type == grad.device.type == "meta"


# ---- signatures, errors, docstrings --------------------------------------------------------------


@every_method
def test_signature(name):
    parameters = inspect.signature(MODULE[name].loss).parameters
    assert list(parameters)[:4] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert all(p.default is p.empty for p in list(parameters.values())[:4])
    options = {k: p for k, p in parameters.items() if k not in list(parameters)[:4]}
    assert {k: p.default for k, p in options.items()} == DEFAULTS[name]
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())
    assert not {"beta", "kl_coef"} & set(options) or name == "ha_dw"  # update.py reads these


@every_method
@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"advantages": (4, 1)}, "[4, 1]"),
        ({"advantages": (3,)}, "[3]"),
        ({"advantages": ()}, "[]"),
        ({"advantages": (4, 3, 1)}, "[4, 3, 1]"),
        ({"old_logprobs": (4, 2)}, "[4, 2]"),
        ({"mask": (4,)}, "[4]"),
        ({"logprobs": (4, 4)}, "[4, 4]"),
    ],
)
def test_shapes_that_do_not_fit(name, change, shape):
    shapes = {"logprobs": (4, 3), "old_logprobs": (4, 3), "advantages": (4,), "mask": (4, 3)}
    shapes |= change
    with pytest.raises(ValueError) as error:
        MODULE[name].loss(*(torch.zeros(s) for s in shapes.values()))
    assert shape in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dppo", {"divergence": "js"}, "'tv' or 'kl'; got 'js'"),
        ("raft", {"variant": "raft+"}, "'reinforce_rej'; got 'raft\\+'"),
        ("sapo", {"tau_pos": 0.0}, "above 0; got 0.0 and 1.05"),
        ("sapo", {"tau_neg": 0.0}, "above 0; got 1.0 and 0.0"),
    ],
)
def test_an_option_without_meaning(name, options, says):
    args = (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.ones(4, 3))
    with pytest.raises(ValueError, match=says):
        MODULE[name].loss(*args, **options)


@pytest.mark.parametrize("name", ONE_ADVANTAGE)
def test_advantages_per_token_are_refused(name):
    args = (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"\[B\]; got \[4, 3\]"):
        MODULE[name].loss(*args)


@every_method
def test_docstring_examples_run(name):
    result = doctest.testmod(MODULE[name])
    assert result.failed == 0 and result.attempted >= 3


@pytest.mark.parametrize(
    ("name", "options", "old"),
    [
        ("clip_cov", {"cov_low": 0.1}, None),
        ("kl_cov", {}, None),
        ("ce_gppo", {}, None),
        ("aspo", {}, None),
        ("dppo", {}, [[0.5, 0.3], [0.2, 1.0]]),
        ("reweight", {}, [[0.5, 0.3], [0.2, 1.0]]),
        ("dhpo", {}, None),
        ("cispo", {"eps_high": 0.2}, None),
        ("sapo", {}, None),
        ("gmpo", {}, None),
    ],
)
def test_docstring_numbers_are_those_of_the_slow_loop(name, options, old):
    """The batch of most examples, at A = +-0.7070. The other examples: test_more_advantages.py."""
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    old = old or [[1.0, 1.0], [1.0, 1.0]]
    ratios = [[1.5, 0.9], [1.0, 1.0]]
    logp = [
        [math.log(p * w) for p, w in zip(*rows, strict=True)]
        for rows in zip(old, ratios, strict=True)
    ]
    old = [[math.log(p) for p in row] for row in old]
    value, grad = REFERENCE[name](logp, old, [a, -a], [[1, 1], [1, 0]], **options)
    text = inspect.getdoc(MODULE[name])
    if name in ("ce_gppo", "aspo", "dppo", "cispo"):
        for row in grad:
            assert all(f"{abs(g):.4f}" in text for g in row)
    if name not in ("dppo", "cispo"):
        assert f"{value:.4f}".rstrip("0") in text


@every_method
def test_file_reads_like_the_others(name):
    """At most 90 lines: title, the method it varies, equations; then advantages and loss."""
    source = (ROOT / "more" / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 90
    title, varies = source.split("\n\n")[:2]
    assert title.startswith('"""') and re.search(r"\d{4}\.\d{5}", title)
    assert re.match(r"(GRPO|DAPO|GSPO|CISPO|Clip-Cov), but ", varies)
    assert MODULE[name].advantages.__doc__ and MODULE[name].loss.__doc__
    if "\ndef advantages(" in source and "\ndef loss(" in source:
        assert source.index("\ndef advantages(") < source.index("\ndef loss(")
