"""The seven losses: against hand-worked numbers, slow loops, and identities between methods."""

import doctest
import importlib
import inspect
import math
from pathlib import Path

import pytest
import reference
import torch

NAMES = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo")
MODULE = {name: importlib.import_module(name) for name in NAMES}
REFERENCE = {name: getattr(reference, f"{name}_loss") for name in NAMES}
SEQUENCE_MEAN = ("grpo", "gspo", "grpo_s", "trgrpo")  # the others average over tokens
PER_TOKEN = tuple(name for name in NAMES if name != "grpo_s")  # take advantages [B, T] too
ROOT = Path(__file__).resolve().parent.parent

DEFAULTS = {
    "grpo": {"eps_low": 0.2, "eps_high": 0.2, "beta": 0.0, "ref_logprobs": None},
    "dapo": {"eps_low": 0.2, "eps_high": 0.28},
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
    "tepo": {"eps_low": 0.2, "eps_high": 0.28, "kl_coef": 0.0}
    | dict.fromkeys(("entropy", "old_entropy", "ref_logprobs")),
    "gtpo": {"eps_low": 0.2, "eps_high": 0.28},
    "grpo_s": {"eps_low": 0.2, "eps_high": 0.28},
    "trgrpo": {"eps_low": 0.2, "eps_high": 0.24, "alpha": 2.0, "tau": 9.0, "mu": 0.25}
    | {"lower": 1.0, "upper": 1.4, "weight_inside_clip": False},
}  # papers.md's

# TR-GRPO's constants, all of them other than the defaults.
OTHER_V = {"alpha": 1.5, "tau": 5.0, "mu": 0.4, "lower": 0.8, "upper": 1.3}
ENTROPIES = {"entropy": "entropy", "old_entropy": "old_entropy"}

# every option set that changes a gradient; "ref" and the entropies stand for the batch's tensors
OPTIONS = [
    ("grpo", {}),
    ("grpo", {"eps_low": 0.1, "eps_high": 0.3}),
    ("grpo", {"beta": 0.4, "ref_logprobs": "ref"}),
    ("dapo", {}),
    ("dapo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("gspo", {}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.2}),
    ("tepo", {}),
    ("tepo", {"eps_low": 3e-4, "eps_high": 4e-4}),
    ("tepo", {"kl_coef": 0.5, **ENTROPIES}),
    ("tepo", {"kl_coef": 0.5, **ENTROPIES, "ref_logprobs": "ref"}),
    ("gtpo", {}),
    ("gtpo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("grpo_s", {}),
    ("grpo_s", {"eps_low": 0.1, "eps_high": 0.15}),
    ("trgrpo", {}),
    ("trgrpo", {"weight_inside_clip": True}),
    ("trgrpo", {"eps_low": 0.1, "eps_high": 0.4, **OTHER_V}),
    ("trgrpo", {**OTHER_V, "weight_inside_clip": True}),
]
CASES = [(name, options, "[B]") for name, options in OPTIONS]
CASES += [(name, options, "[B, T]") for name, options in OPTIONS if name in PER_TOKEN]
every_case = pytest.mark.parametrize(
    ("name", "options", "form"),
    CASES,
    ids=[f"{n}{f}-{'-'.join(o) or 'defaults'}" for n, o, f in CASES],
)
every_algorithm = pytest.mark.parametrize("name", NAMES)
every_form = pytest.mark.parametrize(
    ("name", "form"), [(n, "[B]") for n in NAMES] + [(n, "[B, T]") for n in PER_TOKEN], ids="".join
)


def make_batch(seed=0, B=8, T=5, spread=0.35, gaps=True):
    """A ragged batch in float64, off policy, so that the clip binds on both sides.

    `spread`: the size of the log-ratios, of single tokens and of whole rows; 3e-4 is GSPO's scale.
    "[B]" and "[B, T]" are advantages of these shapes; `gaps`: mask entries off in mid-row.
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
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs - spread * (randn(B, T) + randn(B, 1)),
        "mask": mask,
        "[B]": randn(B),
        "[B, T]": randn(B, T),
        "ref": logprobs + 0.5 * randn(B, T),
        "entropy": rand(B, T),
        "old_entropy": rand(B, T),
    }


def arguments(batch, form, options):
    """The loss's positional and keyword arguments out of a batch."""
    named = {k: batch[v] if isinstance(v, str) else v for k, v in options.items()}
    return [batch[k] for k in ("logprobs", "old_logprobs", form, "mask")], named


def value_and_grad(loss, logprobs, *args, **options):
    """Loss as a 0-d tensor, and its gradient with respect to logprobs [B, T]."""
    logprobs = logprobs.detach().clone().requires_grad_()
    value = loss(logprobs, *args, **options)
    assert value.shape == ()
    (grad,) = torch.autograd.grad(value, logprobs)
    return value.detach(), grad


def run(name, batch, form="[B]", options=None):
    args, options = arguments(batch, form, options or {})
    return value_and_grad(MODULE[name].loss, *args, **options)


def as_lists(x):
    return x.tolist() if isinstance(x, torch.Tensor) else x


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol
    )


# ---- against the equations -----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("spread", [3e-4, 0.35])
def test_value_and_gradient_equal_the_slow_loop(name, options, form, spread):
    for seed in range(2):
        batch = make_batch(seed, spread=spread)
        (logprobs, *args), named = arguments(batch, form, options)
        want = value_and_grad(
            REFERENCE[name],
            logprobs,
            *map(as_lists, args),
            **{k: as_lists(v) for k, v in named.items()},
        )
        got = run(name, batch, form, options)
        close(got[0], want[0])
        close(got[1], want[1])


@every_case
def test_the_batches_of_the_slow_loop_reach_every_branch_of_the_clip(name, options, form):
    reference.branches.clear()
    for seed in range(2):
        for spread in (3e-4, 0.35):
            (logprobs, *args), named = arguments(make_batch(seed, spread=spread), form, options)
            REFERENCE[name](
                logprobs, *map(as_lists, args), **{k: as_lists(v) for k, v in named.items()}
            )
    assert len(reference.branches) == 6


# ---- by hand -------------------------------------------------------------------------------------

W = torch.tensor([[1.5, 0.9], [0.5, 7.0]], dtype=torch.float64)  # the 7 is padding
A = torch.tensor([1.0, -1.0], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])
# The geometric mean of row 0; the arithmetic one is 1.2. Row 1 is clipped in every method.
S = math.sqrt(1.5 * 0.9)
PI = torch.tensor([[0.75, 0.27], [0.2, 0.9]], dtype=torch.float64)
# TR-GRPO's weight of 0.27, 1.0898. Those of 0.75 and 0.2 are 1.4 (capped) and 1 (raised).
V = 2 / (1 + math.exp(-9 * (0.27 - 0.25)))


@pytest.mark.parametrize(
    ("name", "options", "value", "grad"),
    [
        # (1.2 + 0.9) / 2 = 1.05 and -0.8, over two sequences
        ("grpo", {}, -(1.05 - 0.8) / 2, [[0, -0.9 / 4], [0, 0]]),
        # 1.28 + 0.9 - 0.8, over three tokens
        ("dapo", {}, -(1.28 + 0.9 - 0.8) / 3, [[0, -0.9 / 3], [0, 0]]),
        ("gtpo", {}, -(1.28 + 0.9 - 0.8) / 3, [[0, -0.9 / 3], [0, 0]]),
        ("gspo", {}, -(1.0004 - 0.9997) / 2, [[0, 0], [0, 0]]),
        ("gspo", {"eps_low": 0.2, "eps_high": 0.28}, -(S - 0.8) / 2, [[-S / 4, -S / 4], [0, 0]]),
        ("tepo", {}, -(2 * S - 0.8) / 3, [[-S / 3, -S / 3], [0, 0]]),
        ("grpo_s", {}, -(1.2 - 0.8) / 2, [[-1.5 / 4, -0.9 / 4], [0, 0]]),
        ("trgrpo", {}, -((1.4 * 1.24 + V * 0.9) / 2 - 0.8) / 2, [[0, -V * 0.9 / 4], [0, 0]]),
        # v w = 2.1 and 0.98, clipped to 1.24 and not at all
        (
            "trgrpo",
            {"weight_inside_clip": True},
            -((1.24 + V * 0.9) / 2 - 0.8) / 2,
            [[0, -V * 0.9 / 4], [0, 0]],
        ),
    ],
)
def test_by_hand(name, options, value, grad):
    got = value_and_grad(MODULE[name].loss, PI.log(), (PI / W).log(), A, MASK, **options)
    close(got[0], value)
    close(got[1], grad)


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
    eps = {"eps_low": 0.2, "eps_high": 0.28}
    value, grad = value_and_grad(MODULE["gspo"].loss, PI.log(), (PI / W).log(), A_t, MASK, **eps)
    close(value, -((2 * S - S) / 2 - 0.8) / 2)
    close(grad, [[-2 * S / 4, S / 4], [0, 0]])
    value, grad = value_and_grad(MODULE["tepo"].loss, PI.log(), (PI / W).log(), A_t, MASK, **eps)
    close(value, -(2 * S - S - 0.8) / 3)
    close(grad, [[-2 * S / 3, S / 3], [0, 0]])


def test_by_hand_kl_of_grpo():
    """pi_ref = 2 pi: k3 = 2 - log 2 - 1, and its derivative by log pi is 1 - 2."""
    logprobs, zero = PI.log(), torch.zeros(2)
    value, grad = value_and_grad(
        MODULE["grpo"].loss,
        logprobs,
        logprobs,
        zero,
        MASK,
        beta=0.04,
        ref_logprobs=logprobs + math.log(2),
    )
    close(value, 0.04 * (1 - math.log(2)))
    close(grad, [[-0.04 / 4, -0.04 / 4], [-0.04 / 2, 0]])


def test_by_hand_kl_mask_of_tepo():
    """Only tokens with A > 0 whose entropy fell by over 1e-4 nats pay; the mean is over all."""
    logprobs = torch.zeros(2, 3, dtype=torch.float64)
    old = torch.full((2, 3), math.log(2), dtype=torch.float64)
    A_t = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    H_old = torch.full((2, 3), 0.5, dtype=torch.float64)
    change = [[-2e-4, -0.5e-4, 0.1], [-0.1, -0.1, -0.1]]
    H = H_old + torch.tensor(change, dtype=torch.float64)
    # [0, 0] and [1, 2] would pay, but [1, 2] is masked.
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    entropies = {"entropy": H, "old_entropy": H_old}
    plain = value_and_grad(MODULE["tepo"].loss, logprobs, old, A_t, mask)
    value, grad = value_and_grad(
        MODULE["tepo"].loss, logprobs, old, A_t, mask, kl_coef=0.1, **entropies
    )
    close(value - plain[0], 0.1 * (1 - math.log(2)) / 5)
    close(grad - plain[1], [[-0.1 / 5, 0, 0], [0, 0, 0]])
    # against a reference of its own: pi_ref = 4 pi, derivative 1 - 4
    value, grad = value_and_grad(
        MODULE["tepo"].loss,
        logprobs,
        old,
        A_t,
        mask,
        kl_coef=0.1,
        ref_logprobs=logprobs + math.log(4),
        **entropies,
    )
    close(value - plain[0], 0.1 * (3 - math.log(4)) / 5)
    close(grad - plain[1], [[-0.3 / 5, 0, 0], [0, 0, 0]])
    # entropies alone change nothing: kl_coef is 0 by default
    assert MODULE["tepo"].loss(logprobs, old, A_t, mask, **entropies) == plain[0]


@every_algorithm
def test_docstring_examples_run(name):
    result = doctest.testmod(MODULE[name])
    assert result.failed == 0 and result.attempted >= 4


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("grpo", {}, -((1.2 + 0.9) / 2 - 1) / 2),
        ("dapo", {}, -(1.28 + 0.9 - 1) / 3),
        ("gspo", {"eps_low": 0.2, "eps_high": 0.2}, -(S - 1) / 2),
        ("tepo", {}, -(2 * S - 1) / 3),
        ("grpo_s", {}, -(1.2 - 1) / 2),
        ("trgrpo", {}, -((1.4 * 1.24 + V * 0.9) / 2 - 1) / 2),
    ],
)
def test_docstring_numbers(name, options, value):
    """The batch the docstrings share, at A = +-0.7070: row 1 is on policy."""
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    old = torch.tensor([[0.5, 0.3], [0.2, 1.0]]).log()
    logprobs = torch.tensor([[0.75, 0.27], [0.2, 1.0]]).log()
    got = MODULE[name].loss(logprobs, old, torch.tensor([a, -a]), MASK, **options)
    close(got, a * value, rtol=1e-5)
    assert f"{a * value:.4f}".rstrip("0") in inspect.getdoc(MODULE[name])


# ---- the clip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["below", "in", "above"])
@pytest.mark.parametrize("a", [2.0, -2.0])
@every_form
@pytest.mark.parametrize("inside", [False, True])
def test_sign_table_of_the_clip(name, form, a, side, inside):
    """No gradient where A > 0 and the ratio is above, or A < 0 and below; else -A ratio / |o|."""
    loss = MODULE[name].loss
    eps_low, eps_high = DEFAULTS[name]["eps_low"], DEFAULTS[name]["eps_high"]
    inside = inside and name == "trgrpo"  # then v w is the ratio, else w
    v = 1.3 if name == "trgrpo" else 1.0
    options = {"lower": v, "upper": v, "weight_inside_clip": inside} if name == "trgrpo" else {}
    for edge in (0.99, 1.01):  # just within the clip and just beyond it
        ratio = {
            "below": 1 - edge * eps_low,
            "in": 1 + 0.5 * edge * eps_high,
            "above": 1 + edge * eps_high,
        }[side]
        w = ratio / v if inside else ratio
        logprobs = torch.full((1, 2), math.log(w), dtype=torch.float64)
        advantages = torch.full((1,) if form == "[B]" else (1, 2), a, dtype=torch.float64)
        _, grad = value_and_grad(
            loss, logprobs, torch.zeros(1, 2), advantages, torch.ones(1, 2), **options
        )
        clipped = edge > 1 and side == ("above" if a > 0 else "below")
        if clipped:
            assert torch.equal(grad, torch.zeros(1, 2, dtype=torch.float64))
        else:
            close(grad, [[-a * w * v / 2] * 2])


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("grpo", [True, False]),
        ("dapo", [True, False]),
        ("gtpo", [True, False]),
        ("trgrpo", [True, False]),
        ("gspo", [False, False]),  # s = sqrt(2.4 x 0.45) = 1.04
        ("tepo", [False, False]),
        ("grpo_s", [True, True]),  # the arithmetic mean is 1.425
    ],
)
def test_each_algorithm_clips_its_own_ratio(name, zero):
    w = torch.tensor([[2.4, 0.45]], dtype=torch.float64)
    eps = {"eps_low": 0.2, "eps_high": 0.2}
    _, grad = value_and_grad(
        MODULE[name].loss, w.log(), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2), **eps
    )
    assert (grad == 0).tolist() == [zero]


def test_trgrpo_weight_inside_the_clip_silences_confident_right_tokens_on_the_first_update():
    # v = 1.4 > 1 + eps_high, and v = 1
    logprobs = torch.tensor([[0.95, 0.1]], dtype=torch.float64).log()
    args = (logprobs, logprobs, torch.ones(1), torch.ones(1, 2))
    _, outside = value_and_grad(MODULE["trgrpo"].loss, *args)
    _, inside = value_and_grad(MODULE["trgrpo"].loss, *args, weight_inside_clip=True)
    close(outside, [[-1.4 / 2, -1 / 2]])
    assert inside[0, 0] == 0
    close(inside, [[0, -1 / 2]])
    # not so for wrong answers: v > 1 is never below 1 - eps_low
    _, inside = value_and_grad(
        MODULE["trgrpo"].loss, *args[:2], -torch.ones(1), torch.ones(1, 2), weight_inside_clip=True
    )
    close(inside, [[1.4 / 2, 1 / 2]])


# ---- identities ----------------------------------------------------------------------------------

EQUAL_EPS = {"eps_low": 0.15, "eps_high": 0.25}


def same(one, other):
    close(one[0], other[0])
    close(one[1], other[1])


@pytest.mark.parametrize("form", ["[B]", "[B, T]"])
def test_first_update_has_the_gradient_of_grpo_or_of_dapo(form):
    batch = make_batch(3)
    batch["old_logprobs"] = batch["logprobs"]
    m, a = batch["mask"].double(), batch[form] if form == "[B, T]" else batch[form][:, None]
    by_sequence = -a * m / m.sum(1, keepdim=True) / len(m)
    by_token = -a * m / m.sum()
    for name in ("grpo", "gspo", *(["grpo_s"] if form == "[B]" else [])):
        value, grad = run(name, batch, form)
        close(grad, by_sequence)
        close(value, by_sequence.sum())  # every ratio is 1
    for name in ("dapo", "tepo", "gtpo"):
        value, grad = run(name, batch, form)
        close(grad, by_token)
        close(value, by_token.sum())


def test_methods_differ_once_the_policy_has_moved():
    batch = make_batch(3)  # off policy enough for the clip to bind: before that GRPO-S is GRPO
    distinct = [
        run(name, batch)[1] for name in ("grpo", "dapo", "gspo", "tepo", "grpo_s", "trgrpo")
    ]
    for k, grad in enumerate(distinct):
        assert all(not torch.allclose(grad, other, rtol=1e-3) for other in distinct[:k])


def test_grpo_s_is_grpo_until_the_clip_binds():
    """An arithmetic mean of ratios, averaged over sequences, is GRPO's average of them."""
    wide = {"eps_low": 0.9, "eps_high": 9.0}
    same(
        run("grpo_s", make_batch(3, spread=0.05), "[B]", wide),
        run("grpo", make_batch(3, spread=0.05), "[B]", wide),
    )


def test_sequences_of_one_token():
    batch = make_batch(4)
    # One token per row, not always the first.
    batch["mask"] = torch.nn.functional.one_hot(torch.arange(8) % 5, 5)
    batch["[B, T]"] = batch["[B]"][:, None].expand(8, 5)
    for form in ("[B]", "[B, T]"):
        same(run("gspo", batch, form, EQUAL_EPS), run("grpo", batch, form, EQUAL_EPS))
        same(run("tepo", batch, form, EQUAL_EPS), run("dapo", batch, form, EQUAL_EPS))
    same(run("grpo_s", batch, "[B]", EQUAL_EPS), run("grpo", batch, "[B]", EQUAL_EPS))


@pytest.mark.parametrize("form", ["[B]", "[B, T]"])
def test_sequences_of_equal_length(form):
    batch = make_batch(5)
    # Four tokens per row, with a gap.
    batch["mask"] = torch.ones(8, 5).index_fill(1, torch.tensor([3]), 0)
    same(run("tepo", batch, form, EQUAL_EPS), run("gspo", batch, form, EQUAL_EPS))
    same(run("dapo", batch, form, EQUAL_EPS), run("grpo", batch, form, EQUAL_EPS))


def test_gspo_token_is_gspo_where_the_advantage_is_constant_along_the_sequence():
    for name in ("gspo", "tepo"):
        batch = make_batch(6, spread=4e-4)
        batch["[B, T]"] = batch["[B]"][:, None].expand(8, 5)
        same(run(name, batch, "[B, T]"), run(name, batch, "[B]"))


@pytest.mark.parametrize("form", ["[B]", "[B, T]"])
def test_trgrpo_without_weights_is_grpo(form):
    batch = make_batch(7)
    for inside in (False, True):
        options = {"lower": 1.0, "upper": 1.0, "weight_inside_clip": inside, **EQUAL_EPS}
        same(run("trgrpo", batch, form, options), run("grpo", batch, form, EQUAL_EPS))


def test_gtpo_loss_is_dapo_loss():
    same(run("gtpo", make_batch(8), "[B, T]"), run("dapo", make_batch(8), "[B, T]"))


# ---- what stands where the mask is off, and what carries no gradient -----------------------------


@every_case
def test_what_stands_where_mask_is_0_changes_nothing(name, options, form):
    batch = make_batch(9)
    batch["mask"][2] = False
    off, zero, poisoned = ~batch["mask"], {}, {}
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).double()[
        torch.arange(40).view(8, 5) % 4
    ]
    for key, x in batch.items():
        per_token = x.shape == off.shape and key != "mask"
        zero[key] = x.masked_fill(off, 0) if per_token else x
        poisoned[key] = torch.where(off, poison, x) if per_token else x
    poisoned["[B]"] = zero["[B]"].masked_fill(off.all(1), math.nan)
    want, got = run(name, zero, form, options), run(name, poisoned, form, options)
    assert torch.equal(got[0], want[0]) and got[0].isfinite()
    assert torch.equal(got[1], want[1])
    assert (got[1][off] == 0).all()
    assert (got[1][batch["mask"]] != 0).any() or name == "gspo"


@every_case
def test_any_mask_that_is_not_0_is_on(name, options, form):
    batch = make_batch(10)
    want = run(name, batch, form, options)
    on = batch["mask"]
    for mask in (on.long(), on.float(), on * 2.5, on * -0.5):
        got = run(name, batch | {"mask": mask}, form, options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@every_case
def test_an_empty_row_adds_0_and_counts_in_B(name, options, form):
    batch = make_batch(11)
    value, grad = run(name, batch, form, options)
    padded = {k: torch.cat([x, x[:1]]) for k, x in batch.items()}
    padded["mask"][-1] = False
    got = run(name, padded, form, options)
    shrink = 8 / 9 if name in SEQUENCE_MEAN else 1
    close(got[0], value * shrink)
    close(got[1], torch.cat([grad * shrink, torch.zeros(1, 5)]))


@every_case
def test_a_batch_without_a_token_is_0(name, options, form):
    batch = make_batch(12)
    batch["mask"] = torch.zeros(8, 5)
    value, grad = run(name, batch, form, options)
    assert value == 0
    assert torch.equal(grad, torch.zeros(8, 5, dtype=torch.float64))


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
    assert grad.any() or name == "gspo"
    assert all(g is None for g in rest)


@every_algorithm
def test_old_logprobs_may_be_the_very_same_tensor(name):
    """On policy a caller may pass logprobs twice; the old ones must not cancel the gradient."""
    logprobs = make_batch(14)["logprobs"].requires_grad_()
    value = MODULE[name].loss(
        logprobs, logprobs, torch.ones(8), torch.ones(8, 5), eps_low=0.2, eps_high=0.9
    )
    (grad,) = torch.autograd.grad(value, logprobs)
    assert (grad <= -1 / 40 + 1e-9).all()


# ---- numerics ------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_less_than_fp32_is_raised(name, options, form, low):
    batch = {k: x if k == "mask" else x.to(low) for k, x in make_batch(15).items()}
    raised = {k: x if k == "mask" else x.float() for k, x in batch.items()}
    got, want = run(name, batch, form, options), run(name, raised, form, options)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], want[0]) and want[0] != 0
    assert torch.equal(got[1], want[1].to(low))


def test_a_ratio_of_1_0005_in_bf16_is_clipped_at_1_0004():
    # In bf16 its exp is 1, inside GSPO's clip; in fp32 it is above.
    logprobs = torch.full((1, 4), 5e-4, dtype=torch.bfloat16)
    assert logprobs.exp().eq(1).all()
    value, grad = value_and_grad(
        MODULE["gspo"].loss, logprobs, torch.zeros(1, 4), torch.ones(1), torch.ones(1, 4)
    )
    close(value, -1.0004, rtol=1e-6)
    assert not grad.any()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_loss_is_that_of_logprobs(name, options, form, dtype):
    batch = make_batch(16)
    others = {k: x if k == "mask" else x.to(torch.float32) for k, x in batch.items()}
    value, grad = run(name, others | {"logprobs": batch["logprobs"].to(dtype)}, form, options)
    assert value.dtype == grad.dtype == dtype
    close(value.double(), run(name, batch, form, options)[0], rtol=1e-3, atol=1e-5)


@every_form
def test_log_ratios_are_clamped_at_20(name, form):
    old, mask = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2)
    options = {"lower": 1.0, "upper": 1.0} if name == "trgrpo" else {}
    for a, log_ratio, want in [(-1, 19.5, 19.5), (-1, 1e4, 20), (1, -19.5, -19.5), (1, -1e4, -20)]:
        advantages = torch.full((1,) if form == "[B]" else (1, 2), a, dtype=torch.float64)
        value, grad = value_and_grad(
            MODULE[name].loss, old + log_ratio, old, advantages, mask, **options
        )
        close(value, -a * math.exp(want))
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["grpo", "tepo"])
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


@every_case
def test_nothing_moves_devices(name, options, form):
    batch = {k: x.to("meta") for k, x in make_batch(17).items()}
    value, grad = run(name, batch, form, options)
    assert value.device.type == grad.device.type == "meta"


# ---- signatures and errors -----------------------------------------------------------------------


@every_algorithm
def test_signature(name):
    parameters = inspect.signature(MODULE[name].loss).parameters
    assert list(parameters)[:4] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert all(p.default is p.empty for p in list(parameters.values())[:4])
    options = {k: p for k, p in parameters.items() if k not in list(parameters)[:4]}
    assert {k: p.default for k, p in options.items()} == DEFAULTS[name]
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())


@every_algorithm
@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"advantages": (4, 1)}, "[4, 1]"),
        ({"advantages": (1,)}, "[1]"),
        ({"advantages": (3,)}, "[3]"),
        ({"advantages": ()}, "[]"),
        ({"advantages": (1, 3)}, "[1, 3]"),
        ({"advantages": (4, 3, 1)}, "[4, 3, 1]"),
        ({"old_logprobs": (4, 2)}, "[4, 2]"),
        ({"old_logprobs": (1, 3)}, "[1, 3]"),
        ({"mask": (4, 1)}, "[4, 1]"),
        ({"mask": (4,)}, "[4]"),
        ({"logprobs": (4, 4)}, "[4, 4]"),
        ({"logprobs": (4,), "old_logprobs": (4,), "mask": (4,)}, "[4]"),
        ({"logprobs": (4, 3, 2), "old_logprobs": (4, 3, 2), "mask": (4, 3, 2)}, "[4, 3, 2]"),
    ],
)
def test_shapes_that_do_not_fit(name, change, shape):
    shapes = {"logprobs": (4, 3), "old_logprobs": (4, 3), "advantages": (4,), "mask": (4, 3)}
    shapes |= change
    with pytest.raises(ValueError) as error:
        MODULE[name].loss(*(torch.zeros(s) for s in shapes.values()))
    assert shape in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("grpo", "ref_logprobs", {"beta": 0.1}),
        ("tepo", "entropy", {"kl_coef": 0.1, "old_entropy": torch.zeros(4, 3)}),
        ("tepo", "old_entropy", {"kl_coef": 0.1, "entropy": torch.zeros(4, 3)}),
        (
            "tepo",
            "ref_logprobs",
            {"kl_coef": 0.1, "entropy": torch.zeros(4, 3), "old_entropy": torch.zeros(4, 3)},
        ),
    ],
)
def test_optional_tensors_must_fit_too(name, key, options):
    batch = [torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.ones(4, 3)]
    with pytest.raises(ValueError, match=r"\[4, 1\]"):
        MODULE[name].loss(*batch, **options | {key: torch.zeros(4, 1)})


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("grpo", {"beta": 0.04}, "ref_logprobs"),
        ("tepo", {"kl_coef": 0.1}, "entropy"),
        ("tepo", {"kl_coef": 0.1, "entropy": torch.zeros(4, 3)}, "old_entropy"),
        ("tepo", {"kl_coef": 0.1, "old_entropy": torch.zeros(4, 3)}, "entropy"),
    ],
)
def test_a_penalty_without_its_tensors(name, options, names):
    with pytest.raises(ValueError, match=names):
        MODULE[name].loss(
            torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.ones(4, 3), **options
        )


def test_grpo_s_refuses_advantages_per_token():
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        MODULE["grpo_s"].loss(
            torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 3)
        )


def test_files_stay_short():
    limits = dict.fromkeys(NAMES, 120) | {"train": 350}
    for name, limit in limits.items():
        path = ROOT / f"{name}.py"
        if name in NAMES or path.exists():
            assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path.name


@every_algorithm
def test_files_read_in_one_order(name):
    """Docstring, advantages, loss; or GRPO's advantages, imported."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert MODULE[name].advantages is MODULE["grpo"].advantages or source.index(
        "\ndef advantages("
    ) < source.index("\ndef loss(")
    assert MODULE[name].__doc__ and MODULE[name].advantages.__doc__ and MODULE[name].loss.__doc__
