"""The 28 losses: against hand-worked numbers, slow loops, and identities between methods."""

import doctest
import inspect
import math

import pytest
import reference
import torch

from trainer.methods import ALGORITHMS, MORE, load_method

NAMES = (*ALGORITHMS, *MORE)
MODULE = {name: load_method(name) for name in NAMES}
REFERENCE = {name: getattr(reference, f"{name}_loss") for name in NAMES}
# The others average over the tokens of the batch: B counts empty rows too, N does not.
PER_B = ("grpo", "gspo", "grpo_s", "trgrpo", "ha_dw", "dr_grpo", "sapo", "rloo", "gmpo", "luspo")
ONE_ADVANTAGE = ("grpo_s", "rloo", "gmpo", "luspo", "vespo")  # take advantages [B] only
ALL_ROWS = ("clip_cov", "kl_cov", "dro")  # need the logprobs of rows without an advantage

CLIP = {"eps_low": 0.2, "eps_high": 0.2}
HIGHER = {"eps_low": 0.2, "eps_high": 0.28}
NO_CLIP = {"eps_low": 1e9, "eps_high": 1e9}
EQUAL_EPS = {"eps_low": 0.15, "eps_high": 0.25}


def keyword_only(function):
    """{name: default} of what is given by name alone."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


DEFAULTS = {name: keyword_only(loss) for name, loss in REFERENCE.items()}

# TR-GRPO's constants, all of them other than the defaults
OTHER_V = {"alpha": 1.5, "tau": 5.0, "mu": 0.4, "lower": 0.8, "upper": 1.3}
ENTROPIES = {"entropy": "entropy", "old_entropy": "old_entropy"}
# every option, at values other than the defaults; "ref", the entropies: tensors of the batch
OPTIONS = [(name, {}) for name in NAMES] + [
    ("grpo", EQUAL_EPS),
    ("grpo", {"beta": 0.4, "ref_logprobs": "ref"}),
    ("dapo", EQUAL_EPS),
    ("gspo", EQUAL_EPS),
    ("tepo", {"eps_low": 3e-4, "eps_high": 4e-4}),
    ("tepo", {"kl_coef": 0.5, **ENTROPIES}),
    ("tepo", {"kl_coef": 0.5, **ENTROPIES, "ref_logprobs": "ref"}),
    ("grpo_s", EQUAL_EPS),
    ("trgrpo", {"weight_inside_clip": True}),
    ("trgrpo", {"reading": "outside"}),
    ("trgrpo", EQUAL_EPS | OTHER_V),
    ("trgrpo", {**OTHER_V, "weight_inside_clip": True, "beta": 0.3, "ref_logprobs": "ref"}),
    ("trgrpo", OTHER_V | {"mu": 0.1, "reading": "outside", "beta": 0.3, "ref_logprobs": "ref"}),
    ("clip_cov", {"cov_ratio": 0.2, "cov_low": 0.2, "cov_high": 0.9}),
    ("clip_cov", {"cov_ratio": 0.9, "cov_low": 0.1, "eps_low": 0.1, "eps_high": 0.15}),
    ("kl_cov", {"cov_ratio": 0.3, "cov_coef": 0.7}),
    ("kl_cov", {"cov_ratio": 3.0}),  # more than there are: all tokens
    ("ce_gppo", EQUAL_EPS | {"beta1": 0.75, "beta2": 0.6}),
    ("aspo", EQUAL_EPS | {"cap": 1.5}),
    ("dppo", {"delta_low": 0.05, "delta_high": 0.1, "cap": 1.5}),
    ("dppo", {"delta_low": 0.05, "delta_high": 0.05, "divergence": "kl"}),
    ("dppo", {"delta_low": 0.02, "delta_high": 0.1, "divergence": "kl"}),
    ("reweight", EQUAL_EPS | {"alpha": 0.7}),
    ("raft", {"variant": "raft"}),
    ("raft", EQUAL_EPS | {"variant": "reinforce_rej", "dual_clip": 1.5}),
    ("dhpo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("dhpo", {"seq_eps_low": 0.1, "seq_eps_high": 0.2, "weight": 0.3}),
    ("dr_grpo", EQUAL_EPS | {"max_length": 7}),
    ("rloo", {"eps_low": 0.5, "eps_high": 0.9}),
    ("cispo", EQUAL_EPS),
    ("sapo", {"tau_pos": 3.0, "tau_neg": 0.5}),
    ("gmpo", {"eps_low": 0.1, "eps_high": 0.2}),
    ("luspo", EQUAL_EPS),
    ("vespo", {"k_pos": 0.7, "lambda_pos": 0.0, "k_neg": 1.3, "lambda_neg": 0.6}),
    ("dro", {"tau": 0.3}),
    ("topr", {"sequence": True}),
]
FORMS = {name: ["[B]"] if name in ONE_ADVANTAGE else ["[B]", "[B, T]"] for name in NAMES}
CASES = [(name, options, form) for name, options in OPTIONS for form in FORMS[name]]
every_case = pytest.mark.parametrize(
    ("name", "options", "form"),
    CASES,
    ids=[f"{n}{f}-{'-'.join(o) or 'defaults'}" for n, o, f in CASES],
)
every_method = pytest.mark.parametrize("name", NAMES)
every_form = pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n in NAMES for f in FORMS[n]], ids="".join
)
both_forms = pytest.mark.parametrize("form", ["[B]", "[B, T]"])


def make_batch(seed=0, B=8, T=5, spread=0.35, gaps=True):
    """A ragged batch in float64, off policy, so that the clip binds on both sides.

    `spread`: the size of the log-ratios, of single tokens and of whole rows; 3e-4 is GSPO's scale.
    "[B]" and "[B, T]" are advantages of these shapes; `gaps`: mask entries off in mid-row. Every
    old probability is below 1, as DPPO's KL needs.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logprobs = (0.02 + 0.96 * rand(B, T)).log()
    mask = torch.arange(T) < 1 + (rand(B, 1) * T).long()
    if gaps:
        mask &= (rand(B, T) > 0.2) | (torch.arange(T) == 0)
    old_logprobs = logprobs - spread * (randn(B, T) + randn(B, 1))
    return {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs.clamp(max=-0.01),
        "mask": mask,
        "[B]": randn(B),
        "[B, T]": randn(B, T),
        "ref": logprobs + 0.5 * randn(B, T),
        "entropy": rand(B, T),
        "old_entropy": rand(B, T),
    }


def arguments(batch, form, options):
    """The loss's positional and keyword arguments out of a batch."""
    named = {}
    for key, value in options.items():
        in_batch = isinstance(value, str) and value in batch
        named[key] = batch[value] if in_batch else value
    return [batch[k] for k in ("logprobs", "old_logprobs", form, "mask")], named


def value_and_grad(loss, logprobs, *args, **options):
    """Loss as a 0-d tensor, and its gradient with respect to logprobs [B, T]."""
    logprobs = logprobs.detach().clone().requires_grad_()
    value = loss(logprobs, *args, **options)
    assert value.shape == ()
    (grad,) = torch.autograd.grad(value, logprobs)
    return value.detach(), grad


def run(loss, batch, form="[B]", options=None):
    """(value, gradient) of a loss, or of the method of that name; same random choices each time."""
    args, named = arguments(batch, form, options or {})
    torch.manual_seed(0)
    return value_and_grad(MODULE[loss].loss if isinstance(loss, str) else loss, *args, **named)


def slow(name, batch, form="[B]", options=None):
    """(value, gradient) by the slow loop."""
    args, named = arguments(batch, form, options or {})
    torch.manual_seed(0)
    named = {k: as_lists(v) for k, v in named.items()}
    return REFERENCE[name](*map(as_lists, args), **named)


def one_row(name, w, a, **options):
    """(value, gradient) for one row with the ratios w, pi_old = 0.1 and the advantage a."""
    w = torch.tensor([w], dtype=torch.float64)
    old = torch.full_like(w, 0.1).log()
    a = torch.tensor([a], dtype=torch.float64)
    return value_and_grad(MODULE[name].loss, old + w.log(), old, a, torch.ones_like(w), **options)


def as_lists(x):
    return x.tolist() if isinstance(x, torch.Tensor) else x


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol
    )


def same(one, other, **tolerance):
    """Two pairs of value and gradient."""
    close(one[0], other[0], **tolerance)
    close(one[1], other[1], **tolerance)


# ---- against the equations -----------------------------------------------------------------------

# Their loop has no PPO clip. Clip-Cov's, with eps_low = 1, has no lower edge.
WITHOUT_CLIP_TERM = ("kl_cov", "ce_gppo", "aspo", "dppo", "cispo", "sapo", "gmpo")
WITHOUT_CLIP_TERM += ("vespo", "dro", "topr")


@every_case
def test_value_and_gradient_equal_the_slow_loop(name, options, form):
    reference.branches.clear()
    for spread in (3e-4, 0.35, 0.9):
        for seed in range(2):
            batch = make_batch(seed, spread=spread)
            same(run(name, batch, form, options), slow(name, batch, form, options))
    # The batches reach every branch of the clip.
    reached = 4 if name == "clip_cov" and "eps_low" not in options else 6
    unused = name in WITHOUT_CLIP_TERM or options.get("variant") == "raft"
    assert len(reference.branches) == (0 if unused else reached)


@both_forms
@pytest.mark.parametrize(
    ("name", "options"),
    [("clip_cov", {"cov_ratio": 0.4, "cov_low": 0.1}), ("kl_cov", {"cov_ratio": 0.4}), ("dro", {})],
)
def test_a_row_without_an_advantage_equals_the_slow_loop(name, options, form):
    """Its logprobs enter the means of cov; KL-Cov and DRO may push its tokens."""
    for seed in range(3):
        batch = make_batch(seed)
        batch[form] = batch[form].index_fill(0, torch.tensor([1, 4]), 0)
        same(run(name, batch, form, options), slow(name, batch, form, options))


# ---- by hand -------------------------------------------------------------------------------------

W = torch.tensor([[1.5, 0.9], [0.5, 7.0]], dtype=torch.float64)  # the 7 is padding
A = torch.tensor([1.0, -1.0], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])
# The geometric mean of row 0; the arithmetic one is 1.2. Row 1 is clipped in every method.
S = math.sqrt(1.5 * 0.9)
PI = torch.tensor([[0.75, 0.27], [0.2, 0.9]], dtype=torch.float64)
# TR-GRPO's weight of 0.27, 1.0898. Those of 0.75 and 0.2 are 1.4 (capped) and 1 (raised).
V = 2 / (1 + math.exp(-9 * (0.27 - 0.25)))
# the other reading: 2 (sigmoid(2.43) - 0.25) is above 1.4 cut off above 1.34: 0.2 has 1.2163
V_OUT = 2 * (1 / (1 + math.exp(-9 * 0.27)) - 0.25), 2 * (1 / (1 + math.exp(-9 * 0.2)) - 0.25)
PHI = math.exp(3 + 2 * math.log(1.35) - 3 * 1.35), math.exp(2 + 3 * math.log(0.5) - 2 * 0.5)


@pytest.mark.parametrize(
    ("name", "options", "value", "grad"),
    [
        # (1.2 + 0.9) / 2 = 1.05 and -0.8, over two sequences
        ("grpo", {}, -(1.05 - 0.8) / 2, [[0, -0.9 / 4], [0, 0]]),
        # 1.28 + 0.9 - 0.8, over three tokens
        ("dapo", {}, -(1.28 + 0.9 - 0.8) / 3, [[0, -0.9 / 3], [0, 0]]),
        ("gtpo", {}, -(1.28 + 0.9 - 0.8) / 3, [[0, -0.9 / 3], [0, 0]]),
        ("gspo", {}, -(1.0004 - 0.9997) / 2, [[0, 0], [0, 0]]),
        ("gspo", HIGHER, -(S - 0.8) / 2, [[-S / 4, -S / 4], [0, 0]]),
        ("tepo", {}, -(2 * S - 0.8) / 3, [[-S / 3, -S / 3], [0, 0]]),
        ("luspo", HIGHER, -(2 * S - 0.8) / 2, [[-S / 2, -S / 2], [0, 0]]),
        ("grpo_s", {}, -(1.2 - 0.8) / 2, [[-1.5 / 4, -0.9 / 4], [0, 0]]),
        ("trgrpo", {}, -((1.4 * 1.24 + V * 0.9) / 2 - 0.8) / 2, [[0, -V * 0.9 / 4], [0, 0]]),
        # v w = 2.1 and 0.98, clipped to 1.24 and not at all
        (
            "trgrpo",
            {"weight_inside_clip": True},
            -((1.24 + V * 0.9) / 2 - 0.8) / 2,
            [[0, -V * 0.9 / 4], [0, 0]],
        ),
        (
            "trgrpo",
            {"reading": "outside"},
            -((1.4 * 1.24 + V_OUT[0] * 0.9) / 2 - V_OUT[1] * 0.8) / 2,
            [[0, -V_OUT[0] * 0.9 / 4], [0, 0]],
        ),
        (
            "vespo",
            {},
            -(PHI[0] * math.log(0.75 * 0.27) - PHI[1] * math.log(0.2)) / 3,
            [[-PHI[0] / 3, -PHI[0] / 3], [PHI[1] / 3, 0]],
        ),
        (
            "topr",
            {},
            -(math.log(0.75 * 0.27) - 0.5 * math.log(0.2)) / 3,
            [[-1 / 3, -1 / 3], [0.5 / 3, 0]],
        ),
    ],
)
def test_by_hand(name, options, value, grad):
    got = value_and_grad(MODULE[name].loss, PI.log(), (PI / W).log(), A, MASK, **options)
    same(got, (value, grad))


def test_by_hand_dro():
    """At log w = 0.5 the gradient is (-A + tau / 2) / N; it pulls back without an advantage too."""
    logp, on = torch.full((1, 2), -1.0, dtype=torch.float64), torch.ones(1, 2)
    for a, tau in ((1.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (1.0, 0.2), (1.0, 0.0)):
        advantages = torch.tensor([a], dtype=torch.float64)
        got = value_and_grad(MODULE["dro"].loss, logp, logp - 0.5, advantages, on, tau=tau)
        same(got, (a + tau / 2 * 0.25, [[(-a + tau * 0.5) / 2] * 2]))


def test_by_hand_averages():
    """Averages of (1, 3), (5) and (): the 7s are padding and enter none of them."""
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [7.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert MODULE["grpo"].row_mean(x, mask).tolist() == [2, 5, 0]
    assert MODULE["grpo"].token_mean(x, mask) == 3
    close(MODULE["grpo"].sequence_mean(x, mask), 7 / 3, rtol=1e-6)


def test_by_hand_advantages_per_token():
    """GSPO-token and TEPO: one ratio per row, but each token's gradient has its own advantage."""
    A_t = torch.tensor([[2.0, -1.0], [-1.0, 9.0]], dtype=torch.float64)
    batch = PI.log(), (PI / W).log(), A_t, MASK
    got = value_and_grad(MODULE["gspo"].loss, *batch, **HIGHER)
    same(got, (-((2 * S - S) / 2 - 0.8) / 2, [[-2 * S / 4, S / 4], [0, 0]]))
    got = value_and_grad(MODULE["tepo"].loss, *batch, **HIGHER)
    same(got, (-(2 * S - S - 0.8) / 3, [[-2 * S / 3, S / 3], [0, 0]]))


def test_by_hand_kl():
    """pi_ref = 2 pi: k3 = 2 - log 2 - 1, and its derivative by log pi is 1 - 2.

    In TR-GRPO x = 2 v, so that on policy x - log x - 1 is not 0.
    """
    logp, zero = PI.log(), torch.zeros(2)
    options = {"beta": 0.04, "ref_logprobs": logp + math.log(2)}
    got = value_and_grad(MODULE["grpo"].loss, logp, logp, zero, MASK, **options)
    same(got, (0.04 * (1 - math.log(2)), [[-0.04 / 4, -0.04 / 4], [-0.04 / 2, 0]]))
    for factor in (2, 1):
        options["ref_logprobs"] = logp + math.log(factor)
        got = value_and_grad(MODULE["trgrpo"].loss, logp, logp, zero, MASK, **options)
        x, y, z = factor * 1.4, factor * V, factor * 1.0
        f = [u - math.log(u) - 1 for u in (x, y, z)]
        grad = [[0.04 * (1 - x) / 4, 0.04 * (1 - y) / 4], [0.04 * (1 - z) / 2, 0]]
        same(got, (0.04 * ((f[0] + f[1]) / 2 + f[2]) / 2, grad))


def test_by_hand_kl_mask_of_tepo():
    """Only tokens with A > 0 whose entropy fell by over 1e-4 nats pay; the mean is over all."""
    logp = torch.zeros(2, 3, dtype=torch.float64)
    old = torch.full((2, 3), math.log(2), dtype=torch.float64)
    A_t = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    H_old = torch.full((2, 3), 0.5, dtype=torch.float64)
    change = [[-2e-4, -0.5e-4, 0.1], [-0.1, -0.1, -0.1]]
    # [0, 0] and [1, 2] would pay, but [1, 2] is masked.
    batch = logp, old, A_t, torch.tensor([[1, 1, 1], [1, 1, 0]])
    entropies = {"entropy": H_old + torch.tensor(change).double(), "old_entropy": H_old}
    plain = value_and_grad(MODULE["tepo"].loss, *batch)
    # against pi_old, and against a reference of its own: pi_ref = 4 pi, derivative 1 - 4
    for factor, ref in ((2, {}), (4, {"ref_logprobs": logp + math.log(4)})):
        value, grad = value_and_grad(MODULE["tepo"].loss, *batch, kl_coef=0.1, **entropies, **ref)
        close(value - plain[0], 0.1 * (factor - 1 - math.log(factor)) / 5)
        close(grad - plain[1], [[0.1 * (1 - factor) / 5, 0, 0], [0, 0, 0]])
    # entropies alone change nothing: kl_coef is 0 by default
    assert MODULE["tepo"].loss(*batch, **entropies) == plain[0]


# ---- one token and its clip ----------------------------------------------------------------------

RATIOS = (0.25, 0.9, 1.1, 1.6, 8.0)
# What takes the place of w in the gradient -A w of one token, pi_old = 0.1, at the ratios above:
# for A > 0, then for A < 0. 0 is a clipped token.
UNCLIPPED = [0.25, 0.9, 1.1, 1.6, 8.0]
PPO = ([0.25, 0.9, 1.1, 0, 0], [0, 0.9, 1.1, 1.6, 8.0])
NARROW = ([0.25, 0.9, 0, 0, 0], [0, 0, 1.1, 1.6, 8.0])
WEIGHT = dict.fromkeys(NAMES, PPO) | {
    "gspo": NARROW,
    "luspo": NARROW,
    # pi is 0.8 at the last ratio: v = 1.4
    "trgrpo": ([0.25, 0.9, 1.1, 0, 0], [0, 0.9, 1.1, 1.6, 11.2]),
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
    # half a token ratio, 0.2 / 0.28, and half a sequence ratio, 3e-4 / 4e-4
    "dhpo": ([0.25, 0.9, 0.55, 0, 0], [0, 0.45, 1.1, 1.6, 8.0]),
    # at most 5
    "cispo": ([0.25, 0.9, 1.1, 1.6, 5.0], [0.25, 0.9, 1.1, 1.6, 5.0]),
    # 1 / cosh(tau (w - 1) / 2)^2 w
    "sapo": tuple([w / math.cosh(tau * (w - 1) / 2) ** 2 for w in RATIOS] for tau in (1.0, 1.05)),
    # log w = -1.39, -0.11, 0.10, 0.47, 2.08 against 0.4
    "gmpo": PPO,
    # e^3 w^2 e^-3w and e^2 w^3 e^-2w
    "vespo": tuple([w**k * math.exp(lam * (1 - w)) for w in RATIOS] for k, lam in ((2, 3), (3, 2))),
    # tau = 0
    "dro": ([1.0] * 5, [1.0] * 5),
    "topr": ([1.0] * 5, [0.25, 0.9, 1, 1, 1]),
}
PENALTY = {"kl_cov": {"cov_coef": 0.0}, "dro": {"tau": 0.0}}  # off: it does not depend on A


@every_method
@pytest.mark.parametrize("a", [2.0, -2.0])
def test_weight_of_one_token(name, a):
    got = [one_row(name, [w], a, **PENALTY.get(name, {}))[1].item() for w in RATIOS]
    want = [-a * weight for weight in WEIGHT[name][a < 0]]
    close(torch.tensor(got, dtype=torch.float64), want)
    # exactly 0 where it is clipped: papers' identity 6
    assert [g == 0 for g in got] == [w == 0 for w in want]


CLIPPING = [name for name in NAMES if "eps_low" in DEFAULTS[name]]
CLIPPING = [name for name in CLIPPING if name not in ("ce_gppo", "cispo")]  # never 0
INSIDE = {"lower": 1.3, "upper": 1.3, "weight_inside_clip": True}  # TR-GRPO: the ratio is v w


@pytest.mark.parametrize("a", [2.0, -2.0])
@pytest.mark.parametrize(
    ("name", "more"), [*((n, {}) for n in CLIPPING), ("trgrpo", INSIDE)], ids=lambda x: str(x)[:9]
)
def test_a_clipped_token_starts_exactly_at_the_edge(name, more, a):
    eps_low, eps_high = 0.3, 0.4
    options = {"eps_low": eps_low, "eps_high": eps_high, **more}
    if name == "dhpo":
        options |= {"seq_eps_low": eps_low, "seq_eps_high": eps_high}
    edge, step = (1 + eps_high, 1e-6) if a > 0 else (1 - eps_low, -1e-6)
    if name == "gmpo":  # a range of log w
        edge = math.exp(eps_high if a > 0 else -eps_low)
    edge /= more.get("upper", 1)
    assert one_row(name, [edge - step], a, **options)[1].item() != 0
    assert one_row(name, [edge + step], a, **options)[1].item() == 0


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
        assert (one_row("dppo", [p / q], a, **options)[1].item() == 0) == silent
    # moving against the advantage is never masked
    options = {"divergence": divergence, "delta_low": 0.0, "delta_high": 0.0}
    assert one_row("dppo", [p / q], -a, **options)[1].item() != 0


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
        *((name, CLIP, [True, False]) for name in ("grpo", "dapo", "gtpo", "trgrpo", "reweight")),
        *((name, CLIP, [False, False]) for name in ("gspo", "tepo", "luspo")),  # s = 1.04
        ("grpo_s", CLIP, [True, True]),  # the arithmetic mean is 1.425
        ("dr_grpo", {}, [True, False]),
        ("dppo", {}, [False, False]),  # 0.1 -> 0.24
        ("rloo", {}, [False, False]),  # 2.4 * 0.45 = 1.08
        ("rloo", {"eps_high": 0.07}, [True, True]),
        ("gmpo", {}, [True, False]),
        ("dhpo", {"seq_eps_low": 0.2, "seq_eps_high": 0.28}, [False, False]),  # s = 1.04
        ("dhpo", {}, [True, False]),  # s is clipped; the token ratio of 0.45 is not
    ],
)
def test_each_method_clips_its_own_ratio(name, options, zero):
    assert (one_row(name, [2.4, 0.45], 1.0, **options)[1] == 0).tolist() == [zero]


def test_trgrpo_weight_inside_the_clip_silences_confident_right_tokens_on_the_first_update():
    # v = 1.4 > 1 + eps_high, and v = 1
    logprobs = torch.tensor([[0.95, 0.1]], dtype=torch.float64).log()
    for a, want in ((1.0, [[0, -1 / 2]]), (-1.0, [[1.4 / 2, 1 / 2]])):
        args = logprobs, logprobs, torch.tensor([a]), torch.ones(1, 2)
        close(value_and_grad(MODULE["trgrpo"].loss, *args)[1], [[-a * 1.4 / 2, -a / 2]])
        # v > 1 is never below 1 - eps_low: nothing is silenced in a wrong answer
        inside = value_and_grad(MODULE["trgrpo"].loss, *args, weight_inside_clip=True)[1]
        close(inside, want)
        assert (inside[0, 0] == 0) == (a > 0)


def test_trgrpo_readings_leave_1_and_reach_their_limit_where_the_docstring_says():
    weight, constants = MODULE["trgrpo"].weight, (2.0, 9.0, 0.25, 1.0, 1.4)
    for reading, low, high in (("shifted", 0.25, 0.344), ("outside", 0.122, 0.327)):
        pi = torch.linspace(0, 1, 2001, dtype=torch.float64)
        v = weight(pi, *constants, reading)
        assert pi[v > 1][0].item() == pytest.approx(low, abs=1e-3)
        assert pi[v == 1.4][0].item() == pytest.approx(high, abs=1e-3)
        assert (v.diff() >= 0).all()
        assert f"{high}" in MODULE["trgrpo"].__doc__
    assert "pi = 0.122" in MODULE["trgrpo"].__doc__
    third = 2 * (torch.sigmoid(torch.linspace(0, 1, 9) / 9) - 0.25)
    assert (third < 1).all()  # sigmoid(pi / tau): clipped to 1 everywhere


def test_vespo_weight_is_1_on_policy_and_largest_at_k_over_lambda():
    options = {"k_pos": 0.9, "lambda_pos": 0.4, "k_neg": 5.0, "lambda_neg": 7.0}
    for given in ({}, options):
        k = DEFAULTS["vespo"] | given
        for a, peak in ((1.0, k["k_pos"] / k["lambda_pos"]), (-1.0, k["k_neg"] / k["lambda_neg"])):
            close(one_row("vespo", [1.0, 1.0], a, **given)[1], [[-a / 2, -a / 2]])
            W = torch.linspace(0.05, 4, 400, dtype=torch.float64)[:, None]
            rows = 0 * W, torch.full((400,), a), torch.ones_like(W)
            phi = value_and_grad(MODULE["vespo"].loss, W.log(), *rows, **given)[1].abs()
            assert W[phi.argmax()].item() == pytest.approx(peak, abs=0.01)


def test_what_is_clamped_at_20():
    one = torch.ones(1, dtype=torch.float64)

    def of(name, log_ratios, a, old=0.0, **options):
        lr = torch.tensor([log_ratios], dtype=torch.float64)
        old = torch.full_like(lr, old)
        return value_and_grad(MODULE[name].loss, old + lr, old, a * one, 1 + 0 * lr, **options)

    # what enters exp, at a token that is not clipped
    whole = {"kl_cov": {"cov_coef": 0.0}, "trgrpo": {"upper": 1.0}, "reweight": {"alpha": 0.0}}
    methods = [n for n in NAMES if WEIGHT[n][1][-1] > 6 and n != "dppo"]
    assert len(methods) == 20
    for name in methods:
        for a, lr, want in ((-1, 19.5, 19.5), (-1, 1e4, 20), (1, -19.5, -19.5), (1, -1e4, -20)):
            value, grad = of(name, [lr], a, **whole.get(name, {}))
            close(value, -a * math.exp(want))
            assert grad.isfinite().all()
    close(of("rloo", [15.0, 4.0], -1)[0], math.exp(19))
    close(of("rloo", [15.0, 9.0], -1)[0], math.exp(20))  # the sum, not its terms
    close(of("rloo", [25.0, -10.0], -1)[0], math.exp(15))
    close(of("gmpo", [36.0, 2.0], -1)[0], math.exp(19))  # the mean, not its terms
    close(of("gmpo", [36.0, 12.0], -1)[0], math.exp(20))
    # vespo: each term, then their sum, to log 1e-8 from below; phi = e^2 W^3 e^-2W underflows above
    for log_ratios in ([25.0, -20.0], [20.0, -25.0]):
        close(of("vespo", log_ratios, -1)[1], [[0.5, 0.5]])
    low = math.exp(2 + 0.1 * math.log(1e-8) - 2e-8) / 2
    close(of("vespo", [-15.0, -15.0], -1, k_neg=0.1)[1], [[low, low]])
    assert not of("vespo", [9.0, 9.0], -1)[1].any()
    assert not of("vespo", [9.0], -1, k_neg=1e4, lambda_neg=0.0)[1].any()  # infinite: 0
    # kl_cov: |log w| is not clamped; dro: nor is its square
    same(of("kl_cov", [-100.0], 0), (100.0, [[-1.0]]))
    same(of("dro", [-100.0], 0), (5000.0, [[-100.0]]))
    # dppo: the divergence is not clamped: 0.1 * 100 + 0.9 log 0.9 = 9.9
    old = math.log(0.1)
    assert of("dppo", [-100.0], -1, old, divergence="kl", delta_low=9.8)[1].item() == 0
    assert of("dppo", [-100.0], -1, old, divergence="kl", delta_low=10.0)[1].item() != 0
    assert of("sapo", [1e4], -1)[0].isfinite()
    # tokens that keep a gradient by design keep it there too
    close(of("ce_gppo", [-30.0], -1)[1], [[0.4]])
    close(of("cispo", [30.0], 1)[1], [[-5.0]])
    close(of("aspo", [-30.0], 1)[1], [[-3.0]])
    close(of("topr", [30.0, -30.0], -1)[1], [[0.5, math.exp(-20) / 2]])


@pytest.mark.parametrize("name", ["grpo", "tepo", "trgrpo"])
def test_kl_does_not_overflow(name):
    logprobs, mask = torch.full((1, 2), -1e4), torch.ones(1, 2)
    options = {"beta": 1.0}
    if name == "tepo":
        options = {"kl_coef": 1.0, "entropy": mask * 0, "old_entropy": mask}
    value, grad = value_and_grad(
        MODULE[name].loss, logprobs, logprobs, torch.ones(1), mask, ref_logprobs=mask * 0, **options
    )
    close(value, math.exp(20), rtol=1e-6)
    assert grad.isfinite().all()
    if name == "trgrpo":  # v = 0, whose log is not finite
        options |= {"lower": 0.0, "alpha": 0.0, "ref_logprobs": mask * 0}
        value, grad = value_and_grad(
            MODULE[name].loss, mask * 0, mask * 0, torch.ones(1), mask, **options
        )
        close(value, math.exp(-20) + 19)
        assert not grad.any()


# ---- on policy -----------------------------------------------------------------------------------


def gradient_on_policy(name, batch, form):
    """-A over the denominator that the method's average has, by hand. [B, T]"""
    m = batch["mask"].double()
    a = batch[form] if form == "[B, T]" else batch[form][:, None]
    B, T = m.shape
    if name == "reweight":
        a = a * (0.2 * batch["logprobs"].exp() + 0.8)
    if name == "trgrpo":
        a = a * (2 * torch.sigmoid(9 * (batch["logprobs"].exp() - 0.25))).clamp(1, 1.4)
    if name in ("rloo", "luspo"):
        return -a * m / B
    if name == "dr_grpo":
        return -a * m / (B * T)
    if name in PER_B:
        return -a * m / (B * m.sum(1, keepdim=True).clamp(min=1))
    return -a * m / m.sum()


@every_form
def test_on_policy(name, form):
    """Identity 1. A caller may pass the very same tensor twice: it must not cancel the gradient."""
    batch = make_batch(3)
    logprobs = batch["old_logprobs"] = batch["logprobs"].requires_grad_()
    options = {"cov_low": 9.0, "cov_high": 9.0} if name == "clip_cov" else {}
    want = gradient_on_policy(name, batch, form).detach()
    value, grad = run(name, batch, form, options)
    close(grad, want)
    if name not in ("dppo", "cispo", "vespo", "dro", "topr", "sapo", "rloo"):
        close(value, want.sum())  # every ratio is 1
    args, _ = arguments(batch, form, {})
    close(torch.autograd.grad(MODULE[name].loss(*args, **options), logprobs)[0], want)


# ---- identities between methods ------------------------------------------------------------------


def per_row(batch):
    """The batch with one advantage per row in both forms."""
    return batch | {"[B, T]": batch["[B]"][:, None].expand(batch["mask"].shape)}


def of_length(batch, *on):
    """The batch with the same tokens on in every row."""
    mask = torch.zeros_like(batch["mask"])
    mask[:, list(on)] = True
    return batch | {"mask": mask}


def test_losses_that_are_another_methods():
    grpo, dapo = MODULE["grpo"].loss, MODULE["dapo"].loss
    assert MODULE["ha_dw"].loss is grpo
    assert all(MODULE[name].loss is dapo for name in ("gtpo", "ktae", "maxrl", "opo"))


def test_sequences_of_one_token():
    """Identity 2: a sequence's ratio is its token's. In one token per row, not always the first."""
    batch = per_row(make_batch(4))
    batch["mask"] = torch.nn.functional.one_hot(torch.arange(8) % 5, 5)
    by_sequence = ["gspo", "grpo_s", "rloo", "dr_grpo"]
    for form in ("[B]", "[B, T]"):
        for name in [n for n in by_sequence if form in FORMS[n]]:
            length = {"max_length": 1} if name == "dr_grpo" else {}
            same(run(name, batch, form, EQUAL_EPS | length), run("grpo", batch, form, EQUAL_EPS))
        same(run("tepo", batch, form, EQUAL_EPS), run("dapo", batch, form, EQUAL_EPS))
        options = EQUAL_EPS | {"seq_eps_low": 0.15, "seq_eps_high": 0.25}
        same(run("dhpo", batch, form, options), run("dapo", batch, form, EQUAL_EPS))
        both = [run("topr", batch, form, {"sequence": s}) for s in (True, False)]
        same(*both)
    eps = {"eps_low": 1 - math.exp(-0.4), "eps_high": math.exp(0.4) - 1}
    same(run("gmpo", batch), run("grpo", batch, "[B]", eps))


@both_forms
def test_sequences_of_equal_length(form):
    """Identity 3: four tokens per row, with a gap."""
    batch = of_length(make_batch(5), 0, 1, 2, 4)
    same(run("tepo", batch, form, EQUAL_EPS), run("gspo", batch, form, EQUAL_EPS))
    same(run("dapo", batch, form, EQUAL_EPS), run("grpo", batch, form, EQUAL_EPS))
    want = run("grpo", batch, form, EQUAL_EPS)
    same(run("dr_grpo", batch, form, EQUAL_EPS | {"max_length": 4}), want)
    full = of_length(batch, 0, 1, 2, 3, 4)  # the width is the length
    same(run("dr_grpo", full, form, EQUAL_EPS), run("grpo", full, form, EQUAL_EPS))
    if form == "[B]":
        value, grad = run("gspo", batch, form, EQUAL_EPS)
        same(run("luspo", batch, form, EQUAL_EPS), (4 * value, 4 * grad))


def test_grpo_s_is_grpo_until_the_clip_binds():
    """An arithmetic mean of ratios, averaged over sequences, is GRPO's average of them."""
    wide, batch = {"eps_low": 0.9, "eps_high": 9.0}, make_batch(3, spread=0.05)
    same(run("grpo_s", batch, "[B]", wide), run("grpo", batch, "[B]", wide))


def test_gspo_token_is_gspo_where_the_advantage_is_constant_along_the_sequence():
    batch = per_row(make_batch(6, spread=4e-4))
    for name in ("gspo", "tepo"):
        same(run(name, batch, "[B, T]"), run(name, batch, "[B]"))


@both_forms
def test_clip_cov_without_a_candidate_is_dapo(form):
    for options in (EQUAL_EPS, {"eps_low": 1.0, "eps_high": 1.0}):
        nothing = options | {"cov_low": 0.3, "cov_high": 0.3}
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        args, _ = arguments(make_batch(1), form, {})
        MODULE["clip_cov"].loss(*args, **nothing)
        assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn
        batch = make_batch(1)
        same(run("clip_cov", batch, form, nothing), run("dapo", batch, form, options))


def test_clip_cov_takes_the_gradient_from_k_random_candidates():
    batch = make_batch(2, B=40, T=10, spread=0.0)  # on policy: nothing else is silent
    batch["old_logprobs"] = batch["logprobs"]
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
            cov = reference.covariance(*(as_lists(args[i]) for i in (0, 2, 3)))
            candidates = {key for key, c in cov.items() if 0.2 < c < 5}
            assert {tuple(x) for x in silent.nonzero().tolist()} <= candidates
            assert silent.sum() == min(max(1, int(cov_ratio * N)), len(candidates))
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
    batch = of_length(make_batch(2, B=10, T=10), *range(10))
    batch["old_logprobs"] = batch["logprobs"]
    options = {"cov_ratio": 0.29, "cov_low": -99.0, "cov_high": 99.0}
    assert (run("clip_cov", batch, "[B, T]", options)[1] == 0).sum() == 28


def test_kl_cov_pushes_the_tokens_of_largest_cov():
    batch = make_batch(4)
    plain = run("kl_cov", batch, "[B, T]", {"cov_coef": 0.0})
    same(plain, run("dapo", batch, "[B, T]", NO_CLIP))
    for cov_ratio, k in ((2e-3, 1), (0.25, None)):
        extra = run("kl_cov", batch, "[B, T]", {"cov_ratio": cov_ratio})[1] - plain[1]
        N = int(batch["mask"].sum())
        lists = [as_lists(batch[key]) for key in ("logprobs", "[B, T]", "mask")]
        cov = reference.covariance(*lists)
        largest = sorted(cov, key=cov.get)[-(k or int(0.25 * N)) :]
        found = [tuple(x) for x in (extra.abs() > 1e-12).nonzero().tolist()]
        assert sorted(found) == sorted(largest)
    # on policy it does nothing
    batch["old_logprobs"] = batch["logprobs"]
    both = [run("kl_cov", batch, "[B, T]", o) for o in ({"cov_ratio": 1.0}, {"cov_coef": 0.0})]
    same(*both)


KL = {"beta": 0.4, "ref_logprobs": "ref"}
V_IS_1 = {"lower": 1.0, "upper": 1.0, **EQUAL_EPS}
WIDE_DPPO = {"delta_low": 1.0, "delta_high": 1.0}
IDENTITIES = [  # a method with these options is another with those: in value and gradient
    ("trgrpo", V_IS_1, "grpo", EQUAL_EPS),
    ("trgrpo", {**V_IS_1, **KL, "weight_inside_clip": True}, "grpo", EQUAL_EPS | KL),
    ("reweight", EQUAL_EPS | {"alpha": 0.0}, "dapo", EQUAL_EPS),
    ("dppo", WIDE_DPPO | {"cap": 1.5}, "cispo", {"eps_low": 1.0, "eps_high": 0.5}),
    ("dhpo", {"weight": 1.0}, "dapo", {}),
    ("dhpo", {"weight": 0.0}, "tepo", {"eps_low": 3e-4, "eps_high": 4e-4}),
    ("dro", {"tau": 0.0}, "raft", {"variant": "raft"}),  # both are REINFORCE
]


@both_forms
@pytest.mark.parametrize(("name", "options", "other", "others"), IDENTITIES)
def test_a_method_with_some_options_is_another(name, options, other, others, form):
    batch = make_batch(7)
    same(run(name, batch, form, options), run(other, batch, form, others))


def test_gmpo_without_a_clip_is_gspo():
    same(run("gmpo", make_batch(15), "[B]", NO_CLIP), run("gspo", make_batch(15), "[B]", NO_CLIP))


@both_forms
def test_topr_where_answers_are_wrong_is_cispo_with_a_cap_of_1(form):
    batch = make_batch(14)
    batch[form] = -batch[form].abs()
    at_most_1 = {"eps_low": 1.0, "eps_high": 0.0}
    same(run("topr", batch, form), run("cispo", batch, form, at_most_1))


def test_dppo_lets_rare_tokens_pass():
    w, a, on = torch.tensor([[10.0]]).double(), torch.ones(1).double(), torch.ones(1, 1)
    for old, want in ((1e-3, -10.0), (0.05, 0.0)):  # 0.001 -> 0.01, 0.05 -> 0.5
        old = torch.full_like(w, old).log()
        close(value_and_grad(MODULE["dppo"].loss, old + w.log(), old, a, on)[1], [[want]])


def test_raft_is_supervised_training_on_the_right_answers():
    batch = make_batch(10)
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


# ---- what stands where the mask is off, and what carries no gradient -----------------------------


@every_case
def test_what_stands_where_mask_is_0_changes_nothing(name, options, form):
    batch = make_batch(9)
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
    assert (got[1][off] == 0).all()
    assert (got[1][batch["mask"]] != 0).any() or name in ("gspo", "luspo")
    # any entry that is not 0 is on
    on = batch["mask"]
    for mask in (on.long(), on.float(), on * 2.5, on * -0.5):
        got = run(name, zero | {"mask": mask}, form, options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@every_case
def test_an_empty_row_adds_0_and_counts_in_B(name, options, form):
    batch = make_batch(11)
    value, grad = run(name, batch, form, options)
    padded = {k: torch.cat([x, x[:1]]) for k, x in batch.items()}
    padded["mask"][-1] = False
    shrink = 8 / 9 if name in PER_B else 1
    want = value * shrink, torch.cat([grad * shrink, torch.zeros(1, 5)])
    same(run(name, padded, form, options), want)


@every_case
def test_a_batch_without_a_token_is_0(name, options, form):
    for rows, width in ((8, 5), (8, 0), (0, 5)):
        batch = {
            k: x[:rows, :width] if x.ndim == 2 else x[:rows] for k, x in make_batch(12).items()
        }
        batch["mask"] = torch.zeros(rows, width)
        value, grad = run(name, batch, form, options)
        assert value == 0
        assert torch.equal(grad, torch.zeros(rows, width, dtype=torch.float64))


@every_case
def test_rows_without_an_advantage_get_no_gradient(name, options, form):
    """A constant group's advantages are 0; only KL terms, KL-Cov's penalty or DRO's may push it."""
    batch = make_batch(13)
    batch[form] = batch[form].index_fill(0, torch.arange(4), 0)
    penalty = {"kl_cov": "cov_coef", "dro": "tau"}.get(name, "beta")
    if penalty in DEFAULTS[name]:
        options = options | {penalty: 0.0}
    grad = run(name, batch, form, options)[1]
    assert not grad[:4].any() and (grad[4:].any() or name in ("gspo", "luspo"))


@every_form
def test_stale_logprobs_of_rows_without_an_advantage(name, form):
    """They change the gradient of three that say so, and no other's. (RAFT's loss ignores them.)"""
    batch = make_batch(17)
    batch[form] = batch[form].index_fill(0, torch.tensor([0, 3]), 0)
    stale = batch | {"logprobs": batch["logprobs"].clone()}
    stale["logprobs"][[0, 3]] -= 2.0
    options = {"clip_cov": {"cov_ratio": 1.0, "cov_low": 0.5}, "kl_cov": {"cov_ratio": 0.3}}
    now, then = (run(name, b, form, options.get(name))[1] for b in (batch, stale))
    needs = getattr(MODULE[name], "NEEDS_ALL_ROWS", False)
    assert needs == (name in (*ALL_ROWS, "raft"))
    assert torch.equal(now, then) == (name not in ALL_ROWS)


@every_case
def test_only_logprobs_get_a_gradient(name, options, form):
    batch = {
        k: x.clone() if k == "mask" else x.clone().requires_grad_()
        for k, x in make_batch(13).items()
    }
    batch["mask"] = batch["mask"].double().requires_grad_()
    (logprobs, *args), named = arguments(batch, form, options)
    value = MODULE[name].loss(logprobs, *args, **named)
    others = args + [x for x in named.values() if isinstance(x, torch.Tensor)]
    grad, *rest = torch.autograd.grad(value, [logprobs, *others], allow_unused=True)
    assert grad.any() or name in ("gspo", "luspo")
    assert all(g is None for g in rest)


# ---- numerics ------------------------------------------------------------------------------------


@every_case
def test_dtypes_and_devices(name, options, form):
    """Less than fp32 is raised; the loss has the dtype of logprobs; nothing moves devices."""
    floats = {k: x for k, x in make_batch(15).items() if k != "mask"}
    mask = {"mask": make_batch(15)["mask"]}
    for low in (torch.bfloat16, torch.float16):
        batch = {k: x.to(low) for k, x in floats.items()} | mask
        raised = {k: x.float() for k, x in batch.items() if k != "mask"} | mask
        got, want = run(name, batch, form, options), run(name, raised, form, options)
        assert got[0].dtype == torch.float32
        assert torch.equal(got[0], want[0]) and want[0] != 0
        assert torch.equal(got[1], want[1].to(low))
    want = run(name, floats | mask, form, options)[0]
    for dtype in (torch.float32, torch.float64):
        others = {k: x.to(torch.float32) for k, x in floats.items()} | mask
        others["logprobs"] = floats["logprobs"].to(dtype)
        value, grad = run(name, others, form, options)
        assert value.dtype == grad.dtype == dtype
        close(value.double(), want, rtol=1e-3, atol=1e-5)
    if name not in ("clip_cov", "kl_cov"):  # they count tokens, which meta tensors cannot
        batch = {k: x.to("meta") for k, x in (floats | mask).items()}
        value, grad = run(name, batch, form, options)
        assert value.device.type == grad.device.type == "meta"


def test_a_ratio_of_1_0005_in_bf16_is_clipped_at_1_0004():
    # In bf16 its exp is 1, inside GSPO's clip; in fp32 it is above.
    logprobs = torch.full((1, 4), 5e-4, dtype=torch.bfloat16)
    assert logprobs.exp().eq(1).all()
    value, grad = value_and_grad(
        MODULE["gspo"].loss, logprobs, torch.zeros(1, 4), torch.ones(1), torch.ones(1, 4)
    )
    close(value, -1.0004, rtol=1e-6)
    assert not grad.any()


# ---- signatures and errors -----------------------------------------------------------------------


@every_method
def test_signature(name):
    """Its options and their defaults are those of the slow loop, written from the papers."""
    loss = MODULE[name].loss
    positional = ["logprobs", "old_logprobs", "advantages", "mask"]
    assert list(inspect.signature(loss).parameters) == [*positional, *DEFAULTS[name]]
    assert keyword_only(loss) == DEFAULTS[name]
    # update.py reads these two: they switch on a KL term
    has_kl = name in ("grpo", "tepo", "trgrpo", "ha_dw")
    assert bool({"beta", "kl_coef"} & DEFAULTS[name].keys()) == has_kl


def zeros(**shapes):
    shape = {"logprobs": (4, 3), "old_logprobs": (4, 3), "advantages": (4,), "mask": (4, 3)}
    return [torch.zeros(s) for s in (shape | shapes).values()]


WRONG_SHAPES = [
    *({"advantages": shape} for shape in ((4, 1), (1,), (3,), (), (1, 3), (4, 3, 1))),
    *({"old_logprobs": shape} for shape in ((4, 2), (1, 3))),
    *({"mask": shape} for shape in ((4, 1), (4,))),
    {"logprobs": (4, 4)},
    {"logprobs": (4,), "old_logprobs": (4,), "mask": (4,)},
    {"logprobs": (4, 3, 2), "old_logprobs": (4, 3, 2), "mask": (4, 3, 2)},
]


@every_method
def test_shapes_that_do_not_fit(name):
    for change in WRONG_SHAPES:
        with pytest.raises(ValueError) as error:
            MODULE[name].loss(*zeros(**change))
        shape = str(list(next(iter(change.values()))))
        assert shape in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        # a penalty without its tensors
        ("grpo", {"beta": 0.04}, "ref_logprobs"),
        ("trgrpo", {"beta": 0.04}, "ref_logprobs"),
        ("tepo", {"kl_coef": 0.1}, "entropy"),
        ("tepo", {"kl_coef": 0.1, "entropy": torch.zeros(4, 3)}, "old_entropy"),
        ("tepo", {"kl_coef": 0.1, "old_entropy": torch.zeros(4, 3)}, "entropy"),
        # optional tensors must fit too
        ("grpo", {"beta": 0.1, "ref_logprobs": torch.zeros(4, 1)}, r"\[4, 1\]"),
        ("trgrpo", {"beta": 0.1, "ref_logprobs": torch.zeros(4, 1)}, r"\[4, 1\]"),
        # an option without meaning
        ("trgrpo", {"reading": "inside"}, "'shifted' or 'outside'; got 'inside'"),
        ("dppo", {"divergence": "js"}, "'tv' or 'kl'; got 'js'"),
        ("raft", {"variant": "raft+"}, "'reinforce_rej'; got 'raft\\+'"),
        ("sapo", {"tau_pos": 0.0}, "above 0; got 0.0 and 1.05"),
        ("sapo", {"tau_neg": 0.0}, "above 0; got 1.0 and 0.0"),
        ("dro", {"tau": -0.1}, "at least 0; got -0.1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_options_that_do_not_fit(name, options, says):
    with pytest.raises(ValueError, match=says):
        MODULE[name].loss(*zeros(), **options)


@pytest.mark.parametrize("key", ["entropy", "old_entropy", "ref_logprobs"])
def test_optional_tensors_of_tepo_must_fit_too(key):
    given = {"entropy": torch.zeros(4, 3), "old_entropy": torch.zeros(4, 3), key: torch.zeros(4, 1)}
    with pytest.raises(ValueError, match=rf"{key} \[4, 1\]"):
        MODULE["tepo"].loss(*zeros(), kl_coef=0.1, **given)


@pytest.mark.parametrize("name", ONE_ADVANTAGE)
def test_advantages_per_token_are_refused(name):
    with pytest.raises(ValueError, match=r"one advantage per sequence; got \[4, 3\]"):
        MODULE[name].loss(*zeros(advantages=(4, 3)))


@every_method
def test_docstring_examples_run(name):
    result = doctest.testmod(MODULE[name])
    assert result.failed == 0 and result.attempted >= 2
