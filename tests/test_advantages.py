"""The advantages: GRPO's, which five files share, and GTPO's and GRPO-S's, shaped by entropy."""

import inspect
import math
from statistics import fmean

import pytest
import reference
import torch

import dapo
import grpo
import grpo_s
import gspo
import gtpo
import tepo
import trgrpo

MODULES = {m.__name__: m for m in (grpo, dapo, gspo, tepo, gtpo, grpo_s, trgrpo)}
SHAPED = {
    "gtpo": (gtpo, reference.gtpo_advantages),
    "grpo_s": (grpo_s, reference.grpo_s_advantages),
}
NORMALIZE = ("zeros", "within", "joint")
every_shaped = pytest.mark.parametrize("name", SHAPED)
every_normalize = pytest.mark.parametrize("normalize", NORMALIZE)
every_algorithm = pytest.mark.parametrize("name", MODULES)


def make_groups(seed=0, B=12, T=6, rewards=(0.0, 1.0)):
    """Ragged groups with gaps, in float64: rewards [B], entropy [B, T] in nats, mask [B, T].

    Every row has at least one token.
    """
    g = torch.Generator().manual_seed(seed)
    r = torch.tensor(rewards, dtype=torch.float64)[torch.randint(len(rewards), (B,), generator=g)]
    entropy = torch.rand(B, T, generator=g, dtype=torch.float64) ** 3 * 4
    mask = torch.arange(T) < 1 + (torch.rand(B, 1, generator=g) * T).long()
    mask &= (torch.rand(B, T, generator=g) > 0.2) | (torch.arange(T) == 0)
    return r, entropy, mask


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol
    )


def per_row(a, mask):
    """Advantages [B] or [B, T] -> per row, the list of its tokens' advantages."""
    return [
        [row[t].item() for t in reference.tokens(m)] if row.ndim else [row.item()]
        for row, m in zip(a, mask, strict=True)
    ]


# ---- GRPO ----------------------------------------------------------------------------------------


def test_grpo_by_hand():
    a = grpo.advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 5.0, 5.0]).double(), 4)
    one, two = 0.5 + 1e-4, math.sqrt(4 / 3) + 1e-4  # std with Bessel's correction, + 1e-4
    close(
        a, [0.75 / one, -0.25 / one, -0.25 / one, -0.25 / one, -1 / two, -1 / two, 1 / two, 1 / two]
    )


@pytest.mark.parametrize("group_size", [2, 3, 4, 12])
def test_grpo_equals_the_slow_loop(group_size):
    for rewards in ((0.0, 1.0), (0.1, 0.1 + 1e-5, 0.1 + 3e-5), (-1.0, 0.3, 2.0)):
        r = make_groups(group_size, rewards=rewards)[0]
        close(grpo.advantages(r, group_size), reference.grpo_advantages(r.tolist(), group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_gets_exactly_0(dtype):
    mean_is_off = std_is_off = False
    for reward in (0.0, 1.0, -1.0, 0.1, 0.7, 1 / 3):
        for group_size in range(2, 34):
            r = torch.full((group_size,), reward, dtype=dtype)
            mean_is_off |= bool((r != r.mean()).any())
            std_is_off |= bool(r.std() != 0)
            assert not grpo.advantages(r, group_size).any()
            a = grpo.advantages(torch.cat([r, torch.arange(group_size).to(dtype), r]), group_size)
            assert not a[:group_size].any() and not a[-group_size:].any()
            # The group between them keeps its advantages (with an odd size, the middle one is 0).
            assert a[group_size : 2 * group_size].all() or group_size % 2
    # The cases do hold the trap: in floats, neither r - mean nor std is always exactly 0.
    assert mean_is_off and std_is_off


@every_algorithm
def test_rewards_of_any_dtype(name):
    r, entropy, mask = torch.tensor([1, 0, 0, 1]), torch.ones(4, 2), torch.ones(4, 2)
    want = MODULES[name].advantages(r.float(), 2, entropy=entropy, mask=mask)
    for dtype in (torch.bool, torch.long, torch.bfloat16, torch.float16, torch.float32):
        got = MODULES[name].advantages(r.to(dtype), 2, entropy=entropy.bfloat16(), mask=mask)
        assert got.dtype == torch.float32 and torch.equal(got, want)
    got = MODULES[name].advantages(r.double(), 2, entropy=entropy.double(), mask=mask)
    assert got.dtype == torch.float64
    close(got.float(), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["dapo", "gspo", "tepo", "trgrpo"])
def test_shared_advantages_are_those_of_grpo(name):
    assert MODULES[name].advantages is grpo.advantages


# ---- GTPO and GRPO-S by hand ---------------------------------------------------------------------

# O+: rows 0 and 1, of 2 tokens and 1; O-: rows 2 and 3, of 1 and 2
REWARDS = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
H = [[3.0, 2.0], [1.0, 9.0], [0.5, 9.0], [1.5, 0.2]]  # the nines are padding
H = torch.tensor(H, dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]])


def standardised(value, pool):
    mean = sum(pool) / len(pool)
    return (value - mean) / (math.sqrt(sum((x - mean) ** 2 for x in pool) / (len(pool) - 1)) + 1e-4)


def pools(plus, minus, normalize):
    """R+ and R- of Eq. 6."""
    return {
        "zeros": (plus + [0] * len(minus), minus + [0] * len(plus)),
        "within": (plus, minus),
        "joint": (plus + minus, plus + minus),
    }[normalize]


@every_normalize
def test_gtpo_by_hand(normalize):
    # t = 0: two of O+ share 2 * 0.1 as H, 3 : 1; two of O- share it as 1/H, 1/0.5 : 1/1.5 = 3 : 1.
    # t = 1: one of each set is still running and gets 0.1.
    plus, minus = [1.15, 1.1, 1.05], [-1.15, -1.05, -1.1]
    p, m = pools(plus, minus, normalize)
    want = [
        [standardised(1.15, p), standardised(1.1, p)],
        [standardised(1.05, p), 0],
        [standardised(-1.15, m), 0],
        [standardised(-1.05, m), standardised(-1.1, m)],
    ]
    close(gtpo.advantages(REWARDS, 4, entropy=H, mask=MASK, normalize=normalize), want)


@every_normalize
def test_grpo_s_by_hand(normalize):
    # O+ shares 2 * 0.1 as the mean entropies, 2.5 : 1 = 5 : 2; O- as 1/0.5 : 1/0.85 = 17 : 10.
    plus, minus = [1 + 1 / 7, 1 + 0.4 / 7], [-1 - 3.4 / 27, -1 - 2 / 27]
    p, m = pools(plus, minus, normalize)
    want = [standardised(x, p) for x in plus] + [standardised(x, m) for x in minus]
    close(grpo_s.advantages(REWARDS, 4, entropy=H, mask=MASK, normalize=normalize), want)


def test_docstring_numbers():
    mask, entropy = MASK[[0, 1, 2]], H[[0, 1, 2]]
    a = gtpo.advantages(REWARDS[[0, 1, 2]], 3, entropy=entropy, mask=mask)
    plus, minus = [1.15, 1.1, 1.05, 0], [0, 0, 0, -1.1]
    close(
        a,
        [
            [standardised(x, plus) for x in plus[:2]],
            [standardised(1.05, plus), 0],
            [standardised(-1.1, minus), 0],
        ],
    )
    close(a, [[0.5892, 0.4985], [0.4079, 0], [-1.4997, 0]], rtol=0, atol=5e-5)
    for a in (
        grpo.advantages(torch.tensor([1.0, 0.0]), 2),
        grpo_s.advantages(
            torch.tensor([1.0, 0.0]), 2, entropy=torch.tensor([[1.5, 0.5], [0.5, 0]]), mask=MASK[:2]
        ),
    ):
        close(a, [0.7070, -0.7070], rtol=0, atol=5e-5)


# ---- GTPO and GRPO-S against the equations -------------------------------------------------------


@every_shaped
@every_normalize
@pytest.mark.parametrize("group_size", [2, 4, 12])
@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.7, 0.4)])
def test_shaped_advantages_equal_the_slow_loop(name, normalize, group_size, weights):
    module, slow = SHAPED[name]
    keys = ("alpha1", "alpha2") if name == "gtpo" else ("beta1", "beta2")
    options = dict(zip(keys, weights, strict=True)) | {"normalize": normalize}
    for seed in range(3):
        # Rewards of 0 and 1, and shaped ones: r_i enters r+ only, and 0.5 counts as wrong.
        for rewards in ((0.0, 1.0), (0.0, 0.3, 0.5, 0.51, 1.2)):
            r, entropy, mask = make_groups(seed, rewards=rewards)
            entropy[seed] = 0.0  # clamped to 1e-6 nats before it divides
            got = module.advantages(r, group_size, entropy=entropy, mask=mask, **options)
            want = slow(r.tolist(), group_size, entropy.tolist(), mask.tolist(), **options)
            close(got, want)


@every_shaped
def test_defaults(name):
    module, slow = SHAPED[name]
    r, entropy, mask = make_groups(5)
    want = slow(r.tolist(), 4, entropy.tolist(), mask.tolist())
    close(module.advantages(r, 4, entropy=entropy, mask=mask), want)


def test_gtpo_conserves_reward_at_every_position():
    """With rewards of 1 and 0, the shaped rewards of each position sum to what they were paid.

    sum_{i in O+ running at t} r+_{i,t} = (alpha1 + alpha2) d_t, and -(alpha1 + alpha2) h_t for O-.
    """
    alpha1, alpha2 = 0.7, 0.4
    r = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0], dtype=torch.float64)
    entropy = make_groups(1, B=8, T=7)[1]
    mask = torch.arange(7) < torch.tensor([7, 6, 5, 5, 3, 3, 2, 1])[:, None]
    mask[1, 2] = False
    options = {"alpha1": alpha1, "alpha2": alpha2, "normalize": "joint"}
    a = gtpo.advantages(r, 8, entropy=entropy, mask=mask, **options)
    # "joint" is one affine map of r+ on O+ and r- on O-; two known points undo it. At t = 6 one row
    # of O+ runs alone: its r+ is alpha1 + alpha2. At t = 5 one of O- does: -(alpha1 + alpha2).
    high, low = a[0, 6], a[1, 5]
    shaped = ((a - low) / (high - low) * 2 - 1) * (alpha1 + alpha2)
    for t in range(7):
        plus, minus = mask[:, t] & (r == 1), mask[:, t] & (r == 0)
        close(shaped[plus, t].sum(), (alpha1 + alpha2) * plus.sum().double())
        close(shaped[minus, t].sum(), -(alpha1 + alpha2) * minus.sum().double())
    # The bonus does differ between tokens.
    assert shaped[mask].std() > 0.1 and shaped[:, 0].unique().numel() == 8


def test_entropy_pays_more_where_right_and_costs_less_where_wrong():
    entropy, mask = torch.tensor([[2.0], [1.0], [2.0], [1.0]]), torch.ones(4, 1)
    for module in (gtpo, grpo_s):
        r = torch.tensor([1.0, 1.0, 0.0, 0.0])
        a = module.advantages(r, 4, entropy=entropy, mask=mask).flatten()
        assert a[0] > a[1] > 0 > a[2] > a[3]


@every_shaped
def test_within_loses_the_outcome(name):
    """Each set's mean advantage is 0 under "within"; else right gets over 0.5, wrong below -0.5."""
    _, entropy, mask = make_groups(3, B=8)
    r = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    for normalize in NORMALIZE:
        a = SHAPED[name][0].advantages(r, 8, entropy=entropy, mask=mask, normalize=normalize)
        rows = per_row(a, mask)
        right = fmean(x for row in rows[0::2] for x in row)
        wrong = fmean(x for row in rows[1::2] for x in row)
        if normalize == "within":
            assert abs(right) < 1e-9 and abs(wrong) < 1e-9
            assert a.any()  # what is left is entropy alone
        else:
            assert right > 0.5 and wrong < -0.5


def test_zeros_turns_the_sign_of_the_least_weighted_tokens_of_a_large_set():
    """With 15 of 16 right, about 40% of the right tokens get A < 0; with 14, or "joint", none."""
    g = torch.Generator().manual_seed(0)
    entropy, mask = torch.rand(16, 200, generator=g) ** 3, torch.ones(16, 200)
    share = {}
    for right in (15, 14, 8):
        r = (torch.arange(16) < right).float()
        a = gtpo.advantages(r, 16, entropy=entropy, mask=mask)
        share[right] = (a[:right] < 0).float().mean().item()
    assert 0.35 < share[15] < 0.5
    assert share[14] == share[8] == 0  # 14/16 < 1/1.1
    joint = gtpo.advantages(
        (torch.arange(16) < 15).float(), 16, entropy=entropy, mask=mask, normalize="joint"
    )
    assert (joint[:15] > 0).all()
    # With 15 of 16 wrong, most wrong tokens get A > 0: 1/H is spread more widely than H.
    a = gtpo.advantages((torch.arange(16) >= 15).float(), 16, entropy=entropy, mask=mask)
    assert (a[:15] > 0).float().mean() > 0.5


@every_normalize
def test_gtpo_without_entropy_bonus_has_one_advantage_a_sequence(normalize):
    r, entropy, mask = make_groups(2)
    a = gtpo.advantages(r, 4, entropy=entropy, mask=mask, alpha2=0.0, normalize=normalize)
    for row in per_row(a, mask):
        assert max(row) - min(row) < 1e-12
    if normalize == "within":  # 0.1, whose mean is not 0.1 in floats
        assert not gtpo.advantages(
            r, 4, entropy=entropy, mask=mask, alpha1=0.1, alpha2=0.0, normalize=normalize
        ).any()


# ---- groups of one kind, empty rows, the mask ----------------------------------------------------


@every_shaped
@every_normalize
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_a_group_all_right_or_all_wrong_gets_exactly_0(name, normalize, reward):
    advantages = SHAPED[name][0].advantages
    r, entropy, mask = make_groups(4, B=8)
    r[:4], r[4:] = reward, torch.tensor([1.0, 0, 1, 0])
    a = advantages(r, 4, entropy=entropy, mask=mask, normalize=normalize)
    assert not a[:4].any()
    assert torch.equal(
        a[4:], advantages(r[4:], 4, entropy=entropy[4:], mask=mask[4:], normalize=normalize)
    )
    assert a[4:].any()
    # nor do different rewards on one side of 0.5 make two sets
    a = advantages(
        torch.tensor([0.6, 1.0, 0.7, 0.9]),
        4,
        entropy=entropy[:4],
        mask=mask[:4],
        normalize=normalize,
    )
    assert not a.any()


@every_shaped
@every_normalize
def test_an_empty_row_is_in_neither_set(name, normalize):
    advantages = SHAPED[name][0].advantages
    r, entropy, mask = make_groups(6, B=5)
    for reward in (0.0, 1.0):
        r = torch.tensor([1.0, 0.0, reward, 1.0, 0.0], dtype=torch.float64)
        mask[2] = False
        keep = torch.tensor([0, 1, 3, 4])
        a = advantages(r, 5, entropy=entropy, mask=mask, normalize=normalize)
        close(
            a[keep],
            advantages(r[keep], 4, entropy=entropy[keep], mask=mask[keep], normalize=normalize),
        )
        assert not a[2].any()


@every_shaped
@every_normalize
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_set_whose_only_rows_are_empty_is_no_second_set(name, normalize, reward):
    r, entropy, mask = make_groups(7, B=4)
    r[:], r[1] = reward, 1 - reward
    mask[1] = False
    a = SHAPED[name][0].advantages(r, 4, entropy=entropy, mask=mask, normalize=normalize)
    assert not a.any()


@every_shaped
@every_normalize
def test_a_batch_without_a_token_is_0(name, normalize):
    r, entropy, mask = make_groups(8)
    mask &= False
    a = SHAPED[name][0].advantages(r, 4, entropy=entropy, mask=mask, normalize=normalize)
    assert not a.any()


@every_normalize
def test_a_set_of_one_has_nothing_to_be_normalised_by_within(normalize):
    """One right of four: its own std does not exist, and "within" gives it 0, never NaN."""
    _, entropy, mask = make_groups(9, B=4)
    r = torch.tensor([1.0, 0, 0, 0])
    for module in (gtpo, grpo_s):
        a = module.advantages(r, 4, entropy=entropy, mask=mask, normalize=normalize)
        assert a.isfinite().all()
        assert a[0].any() == (normalize != "within")


@every_shaped
@every_normalize
def test_what_stands_where_mask_is_0_changes_nothing(name, normalize):
    advantages = SHAPED[name][0].advantages
    r, entropy, mask = make_groups(10)
    mask[3] = False
    want = advantages(r, 4, entropy=entropy, mask=mask, normalize=normalize)
    for poison in (math.nan, math.inf, -math.inf, 1e30, -1.0):
        got = advantages(
            r, 4, entropy=entropy.masked_fill(~mask, poison), mask=mask, normalize=normalize
        )
        assert torch.equal(got, want) and got.isfinite().all()
    if name == "gtpo":
        assert not want[~mask].any() and want[mask].any()
    for other in (mask.long(), mask.float(), mask * 2.5, mask * -0.5):
        assert torch.equal(advantages(r, 4, entropy=entropy, mask=other, normalize=normalize), want)


@every_shaped
def test_entropies_of_0_stay_finite(name):
    r, entropy, mask = make_groups(11)
    for dtype in (torch.float32, torch.float64):
        a = SHAPED[name][0].advantages(r.to(dtype), 4, entropy=entropy.to(dtype) * 0, mask=mask)
        assert a.isfinite().all() and a.any()
        # All equally certain: shared equally, as with any other constant entropy.
        ones = entropy.to(dtype) * 0 + 1
        equal = SHAPED[name][0].advantages(r.to(dtype), 4, entropy=ones, mask=mask)
        close(a, equal, rtol=1e-5, atol=1e-5)


@every_algorithm
def test_advantages_carry_no_gradient_and_keep_the_device(name):
    r, entropy, mask = make_groups(12)
    for x in (r, entropy):
        x.requires_grad_()
    a = MODULES[name].advantages(r, 4, entropy=entropy, mask=mask)
    assert not a.requires_grad
    a = MODULES[name].advantages(r.to("meta"), 4, entropy=entropy.to("meta"), mask=mask.to("meta"))
    assert a.device.type == "meta"


# ---- success is correctness, the reward may be shaped --------------------------------------------


@every_shaped
@every_normalize
def test_an_all_right_group_with_one_punished_row_gets_exactly_0(name, normalize):
    """Three rewards of 1 and one long row's 0: by reward that row would be wrong, at A about -1."""
    _, entropy, mask = make_groups(4, B=4)
    rewards, right = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4)
    shape = SHAPED[name][0].advantages
    options = {"entropy": entropy, "mask": mask, "normalize": normalize}
    assert not shape(rewards, 4, right=right, **options).any()
    assert shape(rewards, 4, **options).any()


@every_shaped
def test_a_group_all_wrong_gets_exactly_0_whatever_its_rewards(name):
    _, entropy, mask = make_groups(4, B=4)
    rewards = torch.tensor([0.0, 0.9, -1.0, 0.6])
    a = SHAPED[name][0].advantages(rewards, 4, entropy=entropy, mask=mask, right=torch.zeros(4))
    assert not a.any()


@every_normalize
def test_gtpo_by_hand_with_a_shaped_reward(normalize):
    """Row 1 is right and punished to 0.3, row 2 wrong and punished to -1: only alpha1 r_i differs.

    r+ is test_gtpo_by_hand's but for row 1, 1.05 - 0.7; r- is the same, -alpha1 having no reward.
    """
    rewards = torch.tensor([1.0, 0.3, -1.0, 0.0], dtype=torch.float64)
    plus, minus = [1.15, 1.1, 0.35], [-1.15, -1.05, -1.1]
    p, m = pools(plus, minus, normalize)
    want = [
        [standardised(1.15, p), standardised(1.1, p)],
        [standardised(0.35, p), 0],
        [standardised(-1.15, m), 0],
        [standardised(-1.05, m), standardised(-1.1, m)],
    ]
    options = {"entropy": H, "mask": MASK, "normalize": normalize}
    close(gtpo.advantages(rewards, 4, right=REWARDS, **options), want)


@every_normalize
def test_grpo_s_by_hand_with_a_shaped_reward(normalize):
    rewards = torch.tensor([1.0, 0.3, -1.0, 0.0], dtype=torch.float64)
    plus, minus = [1 + 1 / 7, 0.3 + 0.4 / 7], [-1 - 3.4 / 27, -1 - 2 / 27]
    p, m = pools(plus, minus, normalize)
    want = [standardised(x, p) for x in plus] + [standardised(x, m) for x in minus]
    options = {"entropy": H, "mask": MASK, "normalize": normalize}
    close(grpo_s.advantages(rewards, 4, right=REWARDS, **options), want)


@every_shaped
@every_normalize
def test_shaped_advantages_with_correctness_equal_the_slow_loop(name, normalize):
    module, slow = SHAPED[name]
    for seed in range(3):
        rewards, entropy, mask = make_groups(seed, rewards=(-1.0, 0.2, 0.7, 1.0))
        right = make_groups(seed + 50)[0]
        got = module.advantages(
            rewards, 4, entropy=entropy, mask=mask, right=right, normalize=normalize
        )
        given = rewards.tolist(), 4, entropy.tolist(), mask.tolist()
        close(got, slow(*given, right=right.tolist(), normalize=normalize))


@every_shaped
def test_right_may_be_of_any_dtype_and_defaults_to_rewards_above_a_half(name):
    rewards, entropy, mask = make_groups(5, rewards=(0.0, 0.5, 0.51, 1.0))
    advantages = SHAPED[name][0].advantages
    want = advantages(rewards, 4, entropy=entropy, mask=mask)
    for right in (rewards > 0.5, (rewards > 0.5).long(), (rewards > 0.5).bfloat16()):
        got = advantages(rewards, 4, entropy=entropy, mask=mask, right=right)
        assert torch.equal(got, want)


@every_shaped
@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1), ()])
def test_right_misshapen(name, shape):
    mask = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"right \[B\].*\[4\]"):
        SHAPED[name][0].advantages(
            torch.tensor([1.0, 0, 1, 0]), 2, entropy=mask, mask=mask, right=torch.ones(shape)
        )


# ---- signatures and errors -----------------------------------------------------------------------


@every_algorithm
def test_signature(name):
    options = {
        "gtpo": {"alpha1": 1.0, "alpha2": 0.1, "normalize": "zeros"},
        "grpo_s": {"beta1": 1.0, "beta2": 0.1, "normalize": "zeros"},
    }.get(name, {})
    parameters = inspect.signature(MODULES[name].advantages).parameters
    assert list(parameters)[:2] == ["rewards", "group_size"]
    keyword_only = list(parameters.values())[2:]
    inputs = {"entropy": None, "mask": None} | ({"right": None} if options else {})
    assert {p.name: p.default for p in keyword_only} == inputs | options
    assert all(p.kind is p.KEYWORD_ONLY for p in keyword_only)


@every_algorithm
@pytest.mark.parametrize(
    ("shape", "group_size", "says"),
    [
        ((6,), 4, r"\[6\].*4"),  # does not divide
        ((6,), 1, r"\[6\].*1"),  # a group of one
        ((6,), 0, r"\[6\].*0"),
        ((6,), -2, r"\[6\].*-2"),
        ((6, 1), 2, r"\[6, 1\]"),
        ((2, 3), 3, r"\[2, 3\]"),
        ((), 2, r"\[\]"),
    ],
)
def test_rewards_that_do_not_fit(name, shape, group_size, says):
    with pytest.raises(ValueError, match=says):
        MODULES[name].advantages(
            torch.zeros(shape),
            group_size,
            entropy=torch.ones(*shape, 5),
            mask=torch.ones(*shape, 5),
        )


@every_shaped
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"\[4\]"),
        ({"entropy": (4, 3)}, r"\[4, 3\]"),
        ({"mask": (4, 3)}, r"\[4, 3\]"),
        ({"entropy": (4, 3), "mask": (4, 2)}, r"\[4, 3\].*\[4, 2\]"),
        ({"entropy": (2, 6), "mask": (2, 6)}, r"\[4\].*\[2, 6\]"),
        ({"entropy": (4,), "mask": (4,)}, r"\[4\]"),
        ({"entropy": (4, 3, 1), "mask": (4, 3, 1)}, r"\[4, 3, 1\]"),
    ],
)
def test_entropy_and_mask_missing_or_misshapen(name, options, says):
    with pytest.raises(ValueError, match=says):
        SHAPED[name][0].advantages(
            torch.tensor([1.0, 0, 1, 0]), 2, **{k: torch.ones(v) for k, v in options.items()}
        )


@every_shaped
def test_unknown_normalize(name):
    for bad in ("zero", "Zeros", "", None):
        with pytest.raises(ValueError, match="zeros.*within.*joint"):
            SHAPED[name][0].advantages(
                torch.tensor([1.0, 0.0]),
                2,
                entropy=torch.ones(2, 3),
                mask=torch.ones(2, 3),
                normalize=bad,
            )
