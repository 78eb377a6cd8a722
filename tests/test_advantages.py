"""The advantages: GRPO's, which most files share, and those of the files that define their own."""

import inspect
import math
from statistics import fmean

import pytest
import reference
import torch
from test_losses import MODULE, NAMES, as_lists, close, every_method

grpo = MODULE["grpo"]
DEFAULTS = {  # of the keyword-only parameters, in those files that have some
    "gtpo": {"alpha1": 1.0, "alpha2": 0.1},
    "grpo_s": {"beta1": 1.0, "beta2": 0.1},
    "raft": {"variant": "raft++", "signed": True},
    "ha_dw": {"history": None, "scale": 1.5, "window": 10},
    "ktae": {"completions": None, "mask": None, "alpha": 1.0, "beta_ig": 1.0, "k1": 2.0, "b": 0.5}
    | {"ignore_id": -1},
    "opo": {"mask": None},
}
SHAPED = ("gtpo", "grpo_s")
for name in SHAPED:
    DEFAULTS[name] |= dict.fromkeys(("entropy", "mask", "right"))
    DEFAULTS[name] |= {"normalize": "zeros", "entropy_low": 0.0, "entropy_high": 0.0}
OWN = (*SHAPED, "raft", "ha_dw", "ktae", "dr_grpo", "rloo", "maxrl", "opo")
NORMALIZE = ("zeros", "within", "joint")
REWARDS = ((0.0, 1.0), (-1.0, 0.0, 0.3, 0.5, 0.51, 1.2))  # of 0 and 1, and shaped ones
every_own = pytest.mark.parametrize("name", ["grpo", *OWN])
every_shaped = pytest.mark.parametrize("name", SHAPED)
every_normalize = pytest.mark.parametrize("normalize", NORMALIZE)


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


def make_ids(seed, mask, ids=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, 3 + ids, mask.shape, generator=g)


def inputs(name, mask, entropy=None, completions=None):
    """What the method's advantages take of these."""
    given = {"mask": mask, "entropy": entropy, "completions": completions}
    return {key: x for key, x in given.items() if key in DEFAULTS.get(name, {})}


def call(name, rewards, group_size=4, **options):
    """The method's advantages; a mask, entropies and ids of ones where none are given."""
    ones = torch.ones(*rewards.shape, 3, device=rewards.device)
    filled = inputs(name, ones, ones, ones.long())
    return MODULE[name].advantages(rewards, group_size, **filled | options)


def slow(name, rewards, group_size=4, **options):
    options = {key: as_lists(value) for key, value in options.items()}
    return getattr(reference, f"{name}_advantages")(rewards.tolist(), group_size, **options)


def per_row(a, mask):
    """Advantages [B] or [B, T] -> per row, the list of its tokens' advantages."""
    return [
        [row[t].item() for t in reference.tokens(m)] if row.ndim else [row.item()]
        for row, m in zip(a, mask, strict=True)
    ]


def test_a_method_without_advantages_takes_those_of_another():
    for name in NAMES:
        if name in ("dro", "topr"):
            assert MODULE[name].advantages is MODULE["dr_grpo"].advantages
        elif name not in OWN:
            assert MODULE[name].advantages is grpo.advantages


# ---- against the formulas ------------------------------------------------------------------------

SHAPES = [  # every option of GTPO and GRPO-S; the first two weights have other names in the second
    {},
    *({"alpha1": 0.7, "alpha2": 0.4, "normalize": normalize} for normalize in NORMALIZE),
    {"entropy_low": 0.2, "entropy_high": 0.28},
    {"entropy_low": 0.5, "normalize": "joint"},
    {"entropy_high": 0.5},
]
OPTIONS = [
    *(("gtpo", options) for options in SHAPES),
    *(
        ("grpo_s", {key.replace("alpha", "beta"): value for key, value in options.items()})
        for options in SHAPES
    ),
    ("grpo", {}),
    ("raft", {}),
    ("raft", {"variant": "raft"}),
    ("raft", {"variant": "raft", "signed": False}),
    ("raft", {"variant": "reinforce_rej"}),
    ("raft", {"variant": "reinforce_rej", "signed": False}),
    ("ha_dw", {}),
    ("ha_dw", {"scale": 1.3}),
    ("ha_dw", {"history": [0.1, 0.9, 0.2]}),
    ("ha_dw", {"history": [0.1, 0.9, 0.2], "window": 3}),
    ("ha_dw", {"history": [0.1, 0.9, 0.2], "window": 1}),
    ("ha_dw", {"history": [k / 20 for k in range(20)]}),
    ("dr_grpo", {}),
    ("rloo", {}),
    ("maxrl", {}),
    ("opo", {}),
    ("ktae", {}),
    ("ktae", {"alpha": 0.0, "beta_ig": 2.0}),
    ("ktae", {"alpha": 0.5, "beta_ig": 0.0}),
    ("ktae", {"k1": 0.7, "b": 0.9}),
    ("ktae", {"b": 0.0}),
    ("ktae", {"ignore_id": 4}),
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{n}-{'-'.join(o) or 'defaults'}" for n, o in OPTIONS]
)
def test_they_equal_the_slow_loop(name, options):
    for seed in range(3):
        for rewards in REWARDS:
            for group_size in (2, 4, 6):
                r, entropy, mask = make_groups(seed, rewards=rewards)
                r = r.clamp(min=0) if name == "maxrl" else r
                r[:2] = rewards[-1]  # a constant group of two
                entropy[seed] = 0.0  # clamped to 1e-6 nats before it divides
                if name in ("ktae", "opo"):
                    mask[seed] = False  # a completion without tokens
                for ids in (2, 5, 40) if name == "ktae" else (5,):  # 40: most on one side only
                    given = inputs(name, mask, entropy, make_ids(seed, mask, ids)) | options
                    got = MODULE[name].advantages(r, group_size, **given)
                    rtol = 1e-7 if name == "ktae" else 1e-9
                    close(got, slow(name, r, group_size, **given), rtol=rtol, atol=1e-9)


@every_shaped
@every_normalize
def test_shaped_advantages_with_correctness_equal_the_slow_loop(name, normalize):
    for seed in range(3):
        r, entropy, mask = make_groups(seed, rewards=(-1.0, 0.2, 0.7, 1.0))
        given = inputs(name, mask, entropy) | {"normalize": normalize}
        given["right"] = make_groups(seed + 50)[0]
        close(MODULE[name].advantages(r, 4, **given), slow(name, r, **given))


# ---- by hand: one reward per completion ----------------------------------------------------------

# GRPO's std has Bessel's correction and + 1e-4
ONE, TWO = 0.5 + 1e-4, math.sqrt(4 / 3) + 1e-4


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("grpo", [0.75 / ONE, *[-0.25 / ONE] * 3, -1 / TWO, -1 / TWO, 1 / TWO, 1 / TWO]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3, -4 / 3, -4 / 3, 4 / 3, 4 / 3]),
        ("maxrl", [0.75 / 0.250001, *[-0.25 / 0.250001] * 3, *[-1 / 4.000001] * 2]),
        ("opo", [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1]),  # rows of equal length
    ],
)
def test_by_hand(name, want):
    r = torch.tensor([1.0, 0, 0, 0, 3, 3, 5, 5]).double()
    close(call(name, r)[: len(want)], want)


def test_by_hand_maxrl():
    """A hard and an easy prompt: with p near 0 a right answer weighs 1/p, with p near 1 about 0."""
    a = call("maxrl", torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]).double())
    close(a, [3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1], rtol=1e-5)
    for seed in range(3):
        a = call("maxrl", make_groups(seed)[0])
        assert a.view(-1, 4).mean(1).abs().max() < 1e-12 and a.any()


def test_by_hand_opo():
    """Lengths 1 and 3, r = 1 and 0: the baseline is 1/4. And sum |o| A is 0 in every group."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
    r = torch.tensor([1.0, 0, 1, 0]).double()
    close(call("opo", r, 2, mask=mask), [3 / 4, -1 / 4, 0, 0])  # the empty row's reward counts 0
    close(call("opo", r, 4, mask=mask), [1 - 3 / 6, -3 / 6, 1 - 3 / 6, 0])
    for seed in range(3):
        r, _, mask = make_groups(seed, rewards=(-1.0, 0.3, 2.0))
        a = call("opo", r, mask=mask)
        assert (a * mask.sum(1)).view(-1, 4).sum(1).abs().max() < 1e-12 and a.any()
    assert not call("opo", r, mask=mask & False).any()
    for other in (mask.long(), mask.float(), mask * 2.5, mask * -0.5):
        assert torch.equal(call("opo", r, mask=other), a)


def test_by_hand_raft():
    r = torch.tensor([1.0, 0, 1, 1, 0, 0, -0.5, 0.5]).double()
    close(call("raft", r, 2), [1, 0, 1, 1, 0, 0, 0, 0.5])
    close(call("raft", r, 2, variant="raft"), [1, 0, 1, 1, 0, 0, 0, 0.5])
    close(call("raft", r, 2, variant="reinforce_rej"), [1, -1, 0, 0, 0, 0, -2, 0])
    signed = {"variant": "reinforce_rej", "signed": False}
    close(call("raft", r, 2, **signed), [1, 0, 0, 0, 0, 0, -0.5, 0.5])


def test_by_hand_ha_dw():
    # GRPO's: 0.75 and -0.25 over std 0.5 + 1e-4, and the other way round
    high, low = 0.75 / 0.5001, 0.25 / 0.5001
    r = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]).double()
    up, down = 1.5 * math.exp(0.25), 1.5 * math.exp(-0.25)  # the anchor is 0.5
    hard, easy = [up * high] + [-down * low] * 3, [down * low] * 3 + [-up * high]
    close(call("ha_dw", r), hard + easy)
    # anchor (0 + 0.5) / 2: the first group is as usual, the second 0.5 easier
    up, down = 2 * math.exp(0.5), 2 * math.exp(-0.5)
    usual, easy = [2 * high] + [-2 * low] * 3, [down * low] * 3 + [-up * high]
    close(call("ha_dw", r, history=[9.0, 0.0], window=2, scale=2.0), usual + easy)
    # what enters exp is clamped
    want = 1.5 * math.exp(20) * 0.5 / (math.sqrt(0.5) + 1e-4)
    close(call("ha_dw", torch.tensor([1.0, 0.0]).double(), 2, history=[1e3] * 9)[0], want)


def test_ha_dw_looks_at_the_last_steps_only():
    r = make_groups(1)[0]
    past = [0.1 * k for k in range(12)]
    want = call("ha_dw", r, history=past)
    assert torch.equal(call("ha_dw", r, history=[99.0] * 3 + past[3:]), want)
    assert torch.equal(call("ha_dw", r, history=tuple(past[-9:])), want)
    assert not torch.allclose(call("ha_dw", r, history=past[-8:]), want)
    assert past == [0.1 * k for k in range(12)]  # not changed


# ---- GTPO and GRPO-S by hand ---------------------------------------------------------------------

# O+: rows 0 and 1, of 2 tokens and 1; O-: rows 2 and 3, of 1 and 2
R = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
PUNISHED = torch.tensor([1.0, 0.3, -1.0, 0.0], dtype=torch.float64)
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
@pytest.mark.parametrize("shaped", [False, True])
def test_by_hand_gtpo(normalize, shaped):
    """Shaped: row 1 is right and punished to 0.3, row 2 wrong and punished to -1.

    Only alpha1 r_i differs then, r+ of row 1; r- does not, -alpha1 having no reward.
    """
    # t = 0: two of O+ share 2 * 0.1 as H, 3 : 1; two of O- share it as 1/H, 1/0.5 : 1/1.5 = 3 : 1.
    # t = 1: one of each set is still running and gets 0.1.
    last = 0.35 if shaped else 1.05
    plus, minus = [1.15, 1.1, last], [-1.15, -1.05, -1.1]
    p, m = pools(plus, minus, normalize)
    want = [
        [standardised(1.15, p), standardised(1.1, p)],
        [standardised(last, p), 0],
        [standardised(-1.15, m), 0],
        [standardised(-1.05, m), standardised(-1.1, m)],
    ]
    given = {"entropy": H, "mask": MASK, "normalize": normalize}
    if shaped:
        given["right"] = R
    rewards = PUNISHED if shaped else R
    close(MODULE["gtpo"].advantages(rewards, 4, **given), want)


@every_normalize
@pytest.mark.parametrize("shaped", [False, True])
def test_by_hand_grpo_s(normalize, shaped):
    # O+ shares 2 * 0.1 as the mean entropies, 2.5 : 1 = 5 : 2; O- as 1/0.5 : 1/0.85 = 17 : 10.
    plus = [1 + 1 / 7, (0.3 if shaped else 1) + 0.4 / 7]
    minus = [-1 - 3.4 / 27, -1 - 2 / 27]
    p, m = pools(plus, minus, normalize)
    want = [standardised(x, p) for x in plus] + [standardised(x, m) for x in minus]
    given = {"entropy": H, "mask": MASK, "normalize": normalize}
    if shaped:
        given["right"] = R
    rewards = PUNISHED if shaped else R
    close(MODULE["grpo_s"].advantages(rewards, 4, **given), want)


@every_shaped
def test_entropies_are_clamped_per_token_where_asked(name):
    """To 0.4..1.2: H = 3, 2 | 1 | 0.5 | 1.5, 0.2 become 1.2, 1.2 | 1 | 0.5 | 1.2, 0.4."""
    call_with = MODULE[name].advantages
    now = torch.tensor([[1.2, 1.2], [1.0, 9], [0.5, 9], [1.2, 0.4]], dtype=torch.float64)
    bounds = {"entropy_low": 0.4, "entropy_high": 1.2}
    want = call_with(R, 4, entropy=now, mask=MASK)
    close(call_with(R, 4, entropy=H, mask=MASK, **bounds), want)
    assert not torch.allclose(call_with(R, 4, entropy=H, mask=MASK), want)
    for key, at in (("entropy_low", 0.4), ("entropy_high", 1.2)):  # the other is no bound
        one = H.clamp(min=at) if key == "entropy_low" else H.clamp(max=at)
        want = call_with(R, 4, entropy=one, mask=MASK)
        close(call_with(R, 4, entropy=H, mask=MASK, **{key: at}), want)
    with pytest.raises(ValueError, match="entropy_low <= entropy_high; got 0.3 and 0.2"):
        call_with(R, 4, entropy=H, mask=MASK, entropy_low=0.3, entropy_high=0.2)


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
    a = call("gtpo", r, 8, entropy=entropy, mask=mask, **options)
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


@every_shaped
def test_entropy_pays_more_where_right_and_costs_less_where_wrong(name):
    entropy, mask = torch.tensor([[2.0], [1.0], [2.0], [1.0]]), torch.ones(4, 1)
    r = torch.tensor([1.0, 1.0, 0.0, 0.0])
    a = call(name, r, entropy=entropy, mask=mask).flatten()
    assert a[0] > a[1] > 0 > a[2] > a[3]


@every_shaped
@every_normalize
def test_within_loses_the_outcome(name, normalize):
    """Each set's mean advantage is 0 under "within"; else right gets over 0.5, wrong below -0.5."""
    _, entropy, mask = make_groups(3, B=8)
    r = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    a = call(name, r, 8, entropy=entropy, mask=mask, normalize=normalize)
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
    given = {"entropy": torch.rand(16, 200, generator=g) ** 3, "mask": torch.ones(16, 200)}
    share = {}
    for right in (15, 14, 8):
        a = call("gtpo", (torch.arange(16) < right).float(), 16, **given)
        share[right] = (a[:right] < 0).float().mean().item()
    assert 0.35 < share[15] < 0.5
    assert share[14] == share[8] == 0  # 14/16 < 1/1.1
    joint = call("gtpo", (torch.arange(16) < 15).float(), 16, normalize="joint", **given)
    assert (joint[:15] > 0).all()
    # With 15 of 16 wrong, most wrong tokens get A > 0: 1/H is spread more widely than H.
    a = call("gtpo", (torch.arange(16) >= 15).float(), 16, **given)
    assert (a[:15] > 0).float().mean() > 0.5


@every_normalize
def test_gtpo_without_entropy_bonus_has_one_advantage_a_sequence(normalize):
    r, entropy, mask = make_groups(2)
    given = {"entropy": entropy, "mask": mask, "alpha2": 0.0, "normalize": normalize}
    for row in per_row(call("gtpo", r, **given), mask):
        assert max(row) - min(row) < 1e-12
    if normalize == "within":  # 0.1, whose mean is not 0.1 in floats
        assert not call("gtpo", r, alpha1=0.1, **given).any()


# ---- GTPO and GRPO-S: groups of one kind, empty rows, the mask -----------------------------------


@every_shaped
@every_normalize
def test_a_group_all_right_or_all_wrong_gets_exactly_0(name, normalize):
    """By correctness, whatever the rewards."""

    def shape(r, rows=slice(None), **more):
        given = {"entropy": entropy[rows], "mask": mask[rows], "normalize": normalize, **more}
        return call(name, r, 4, **given)

    _, entropy, mask = make_groups(4, B=8)
    for reward in (0.0, 0.1, 1.0):
        r = torch.tensor([reward] * 4 + [1.0, 0, 1, 0])
        a = shape(r)
        assert not a[:4].any() and a[4:].any()
        assert torch.equal(a[4:], shape(r[4:], slice(4, 8)))
    four = slice(0, 4)
    # nor do different rewards on one side of 0.5 make two sets
    assert not shape(torch.tensor([0.6, 1.0, 0.7, 0.9]), four).any()
    # a long row's punished 0 in an all-right group: by reward it would be wrong
    punished = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert not shape(punished, four, right=torch.ones(4)).any()
    assert shape(punished, four).any()
    assert not shape(torch.tensor([0.0, 0.9, -1.0, 0.6]), four, right=torch.zeros(4)).any()


@every_shaped
@every_normalize
def test_an_empty_row_is_in_neither_set(name, normalize):
    r, entropy, mask = make_groups(6, B=5)
    for reward in (0.0, 1.0):
        r = torch.tensor([1.0, 0.0, reward, 1.0, 0.0], dtype=torch.float64)
        mask[2] = False
        keep = torch.tensor([0, 1, 3, 4])
        a = call(name, r, 5, entropy=entropy, mask=mask, normalize=normalize)
        fewer = {"entropy": entropy[keep], "mask": mask[keep], "normalize": normalize}
        close(a[keep], call(name, r[keep], 4, **fewer))
        assert not a[2].any()
        # and a set whose only rows are empty is no second set
        r, off = torch.full((4,), reward), mask[:4].clone()
        r[1], off[1], off[2] = 1 - reward, False, True
        a = call(name, r, 4, entropy=entropy[:4], mask=off, normalize=normalize)
        assert not a.any()
    off = mask & False  # a batch without a token
    r = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert not call(name, r, 5, entropy=entropy, mask=off, normalize=normalize).any()


@every_shaped
@every_normalize
def test_a_set_of_one_has_nothing_to_be_normalised_by_within(name, normalize):
    """One right of four: its own std does not exist, and "within" gives it 0, never NaN."""
    _, entropy, mask = make_groups(9, B=4)
    r = torch.tensor([1.0, 0, 0, 0])
    a = call(name, r, entropy=entropy, mask=mask, normalize=normalize)
    assert a.isfinite().all()
    assert a[0].any() == (normalize != "within")


@every_shaped
@every_normalize
def test_what_stands_where_mask_is_0_changes_nothing(name, normalize):
    r, entropy, mask = make_groups(10)
    mask[3] = False
    given = {"normalize": normalize, "entropy_high": 1.5}
    want = call(name, r, entropy=entropy, mask=mask, **given)
    for poison in (math.nan, math.inf, -math.inf, 1e30, -1.0):
        got = call(name, r, entropy=entropy.masked_fill(~mask, poison), mask=mask, **given)
        assert torch.equal(got, want) and got.isfinite().all()
    if name == "gtpo":
        assert not want[~mask].any() and want[mask].any()
    for other in (mask.long(), mask.float(), mask * 2.5, mask * -0.5):
        assert torch.equal(call(name, r, entropy=entropy, mask=other, **given), want)


@every_shaped
def test_entropies_of_0_stay_finite(name):
    r, entropy, mask = make_groups(11)
    for dtype in (torch.float32, torch.float64):
        a = call(name, r.to(dtype), entropy=entropy.to(dtype) * 0, mask=mask)
        assert a.isfinite().all() and a.any()
        # All equally certain: shared equally, as with any other constant entropy.
        ones = entropy.to(dtype) * 0 + 1
        close(a, call(name, r.to(dtype), entropy=ones, mask=mask), rtol=1e-5, atol=1e-5)


@every_shaped
def test_right_may_be_of_any_dtype_and_defaults_to_rewards_above_a_half(name):
    r, entropy, mask = make_groups(5, rewards=(0.0, 0.5, 0.51, 1.0))
    want = call(name, r, entropy=entropy, mask=mask)
    for right in (r > 0.5, (r > 0.5).long(), (r > 0.5).bfloat16()):
        assert torch.equal(call(name, r, entropy=entropy, mask=mask, right=right), want)


# ---- KTAE ----------------------------------------------------------------------------------------


def test_ktae_by_hand():
    """Right: 5 6, 5 6; wrong: 5 6, 5 7, each 4 tokens, so K = k1. The docstring's group."""
    o = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 7]])
    mask = torch.ones(4, 2)
    r = torch.tensor([1.0, 1, 0, 0]).double()
    a = grpo.advantages(r, 4)[0].item()
    # Of the four ways to leave out one, two have x = 2 and two x = 1: p = 1, F = 0.
    gain = 1 - 3 / 4 * (-(2 / 3) * math.log2(2 / 3) - 1 / 3 * math.log2(1 / 3))
    tf_r, tf_w = 3 * 0.5 / 2.5, 3 * 0.25 / 2.25
    D = math.pi / 2 - math.pi / 4 + tf_r / (tf_w + 1e-5) - tf_w / (tf_r + 1e-5)
    six = math.tanh(gain * D / 2 / 2)
    seven = math.tanh(gain * (-math.pi / 4 - tf_w / 1e-5) / 2 / 2)  # once in a wrong one: -1
    got = call("ktae", r, completions=o, mask=mask)
    close(got, [[a, a + six], [a, a + six], [-a, -a + six], [-a, -a + seven]])
    assert abs(six - 0.1567) < 5e-5 and seven == -1
    got = call("ktae", r, completions=o, mask=mask, ignore_id=6)
    close(got, [[a, a], [a, a], [-a, -a], [-a, -a + seven]])


def test_ktae_by_hand_with_a_significant_id():
    """Id 1 is in 4 of 4 right and 1 of 4 wrong completions: p = (4 + 4) / 56, F = exp(-2 / 7)."""
    o = torch.tensor([[1, 2]] * 5 + [[2, 2]] * 3)
    r = torch.tensor([1.0] * 4 + [0.0] * 4).double()
    options = {"alpha": 3.0, "beta_ig": 0.5, "k1": 1.5, "b": 0.3}
    mask = torch.ones(8, 2)
    mask[7, 0] = 0  # 8 right tokens, 7 wrong ones
    got = call("ktae", r, 8, completions=o, mask=mask, **options)
    # five have it, four of them right; the other three are wrong
    gain = 1 - 5 / 8 * (-0.8 * math.log2(0.8) - 0.2 * math.log2(0.2))
    f_r, f_w = 4 / 8, 1 / 7
    K_r, K_w = (1.5 * (0.7 + 0.3 * n / 7.5) for n in (8, 7))
    tf_r, tf_w = 2.5 * f_r / (f_r + K_r), 2.5 * f_w / (f_w + K_w)
    D = math.pi / 2 - math.asin(math.sqrt(1 / 4)) + tf_r / (tf_w + 1e-5) - tf_w / (tf_r + 1e-5)
    z = (3 * math.exp(-2 / 7) + 0.5 * gain) * D / 3.5
    assert 0.5 < math.tanh(z / 2) < 0.99
    close(got[0, 0] - grpo.advantages(r, 8)[0], math.tanh(z / 2))


def test_ktae_fisher_by_hand():
    """The lady tasting tea: 3 of 4 right has p = 34/70, 4 of 4 has 2/70, 2 of 4 has 1."""
    fisher = MODULE["ktae"].fisher
    assert math.isclose(fisher(3, 1, 4, 4), 34 / 70)
    assert math.isclose(fisher(4, 0, 4, 4), 2 / 70)
    assert math.isclose(fisher(0, 4, 4, 4), 2 / 70)
    assert math.isclose(fisher(2, 2, 4, 4), 1)
    assert fisher(4, 4, 4, 4) == fisher(0, 0, 4, 4) == 1
    for R in range(1, 6):  # a tie is told by the tolerance: swapping sides changes nothing
        for x in range(R + 1):
            for y in range(R + 1):
                assert math.isclose(fisher(x, y, R, R), fisher(y, x, R, R))


def test_ktae_turned_rewards_turn_the_sign():
    for seed in range(3):
        r, _, mask = make_groups(seed)
        given = {"completions": make_ids(seed, mask), "mask": mask}
        got = call("ktae", r, **given)
        close(call("ktae", 1 - r, **given), -got, rtol=1e-9, atol=1e-9)
        assert (got - grpo.advantages(r, 4)[:, None])[mask].abs().max() > 0.1


def test_ktae_an_id_that_all_completions_have_keeps_the_advantage():
    r, _, mask = make_groups(2, B=8)
    r[:4] = torch.tensor([1.0, 0, 1, 1])
    o = make_ids(2, mask, ids=9)
    o[:, 0] = 2
    close(call("ktae", r, completions=o, mask=mask)[:, 0], grpo.advantages(r, 4))


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.6, 1.0, 0.7, 0.9], [0.5, 0, -1, 0.2]])
def test_ktae_without_two_sides_has_no_keys(rewards):
    _, _, mask = make_groups(3, B=4)
    given = {"completions": make_ids(3, mask), "mask": mask}
    r = torch.tensor(rewards).double()
    got = call("ktae", r, **given)
    assert torch.equal(got, grpo.advantages(r, 4)[:, None] * mask)
    assert bool(got.any()) == (max(rewards) > min(rewards))
    r = torch.tensor([0.5, 1, 0.5, 1]).double()  # one half is wrong
    assert not torch.equal(call("ktae", r, **given), grpo.advantages(r, 4)[:, None] * mask)


def test_ktae_a_completion_without_tokens_is_on_no_side():
    r, _, mask = make_groups(4, B=5)
    o = make_ids(4, mask)
    keep = torch.tensor([0, 1, 3, 4])
    for reward in (0.0, 1.0):
        r = torch.tensor([1.0, 0, reward, 1, 0]).double()
        mask[2] = False
        got = call("ktae", r, 5, completions=o, mask=mask)
        fewer = call("ktae", r[keep], 4, completions=o[keep], mask=mask[keep])
        key = fewer - grpo.advantages(r[keep], 4)[:, None] * mask[keep]
        close(got[keep] - grpo.advantages(r, 5)[keep, None] * mask[keep], key)
        assert not got[2].any()
    # nor does it make a second side
    r = torch.tensor([1.0, 1, 0, 1, 1])
    got = call("ktae", r, 5, completions=o, mask=mask)
    assert torch.equal(got, grpo.advantages(r, 5)[:, None] * mask)
    for width in (6, 0):  # a batch without a token
        off = torch.zeros(5, width)
        got = call("ktae", r, 5, completions=off.long(), mask=off)
        assert got.shape == off.shape and not got.any()


def test_ktae_what_stands_where_mask_is_0_changes_nothing():
    r, _, mask = make_groups(5)
    mask[3] = False
    o = make_ids(5, mask)
    want = call("ktae", r, completions=o, mask=mask)
    assert not want[~mask].any() and want[mask].all() and want.isfinite().all()
    for junk in (0, 5, -7, 151643):
        got = call("ktae", r, completions=o.masked_fill(~mask, junk), mask=mask)
        assert torch.equal(got, want)
    for other in (mask.long(), mask.float(), mask * 2.5, mask * -0.5):
        assert torch.equal(call("ktae", r, completions=o, mask=other), want)
    assert torch.equal(call("ktae", r, completions=o.int(), mask=mask), want)


# ---- all of them ---------------------------------------------------------------------------------


@every_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_gets_exactly_0(name, dtype):
    """Also where, in floats, r - mean or std is not 0. raft and raft++ keep right answers."""
    options = {"variant": "reinforce_rej"} if name == "raft" else {}
    mean_is_off = std_is_off = False
    for reward in (0.0, 1.0, -1.0, 0.1, 0.7, 1 / 3):
        reward = abs(reward) if name == "maxrl" else reward
        for group_size in (2, 3, 4, 6, 7, 13, 33):
            r = torch.full((group_size,), reward, dtype=dtype)
            mean_is_off |= bool((r != r.mean()).any())
            std_is_off |= bool(r.std() != 0)
            other = torch.arange(group_size).to(dtype)
            a = call(name, torch.cat([r, other, r]), group_size, **options)
            assert not a[:group_size].any() and not a[-group_size:].any()
            # The group between them keeps its advantages, of whatever sign.
            assert a[group_size : 2 * group_size].any()
    assert mean_is_off and std_is_off  # the cases do hold the trap
    assert call("raft", torch.ones(4, dtype=dtype)).tolist() == [1] * 4


@every_method
def test_rewards_of_any_dtype(name):
    r, ones = torch.tensor([1, 0, 0, 1]), torch.ones(4, 2)
    given = inputs(name, ones, ones.bfloat16(), ones.long())
    want = MODULE[name].advantages(r.float(), 2, **given)
    for dtype in (torch.bool, torch.long, torch.bfloat16, torch.float16, torch.float32):
        got = MODULE[name].advantages(r.to(dtype), 2, **given)
        assert got.dtype == torch.float32 and torch.equal(got, want)
    got = MODULE[name].advantages(r.double(), 2, **inputs(name, ones, ones.double(), ones.long()))
    assert got.dtype == torch.float64
    close(got.float(), want, rtol=1e-6)


@every_own
def test_advantages_carry_no_gradient_and_keep_the_device(name):
    r, entropy, mask = (x.requires_grad_() for x in (*make_groups(12)[:2], torch.ones(12, 6)))
    given = inputs(name, mask.detach(), entropy, mask.long())
    assert not MODULE[name].advantages(r, 4, **given).requires_grad
    # ktae counts ids, and maxrl looks for a negative mean, which meta tensors cannot
    if name not in ("ktae", "maxrl"):
        given = {key: x.to("meta") for key, x in given.items()}
        assert MODULE[name].advantages(r.to("meta"), 4, **given).device.type == "meta"


@every_method
def test_signature(name):
    parameters = inspect.signature(MODULE[name].advantages).parameters
    assert list(parameters)[:2] == ["rewards", "group_size"]
    keyword_only = list(parameters.values())[2:]
    assert {p.name: p.default for p in keyword_only} == DEFAULTS.get(name, {})
    assert all(p.kind is p.KEYWORD_ONLY for p in keyword_only)


@every_own
def test_rewards_that_do_not_fit(name):
    """No whole groups, a group of one, of none, a negative size, no [B]."""
    for shape, group_size in (((6,), 4), ((6,), 1), ((6,), 0), ((6,), -2)):
        with pytest.raises(ValueError, match=rf"\[6\].*{group_size}"):
            call(name, torch.zeros(shape), group_size)
    for shape in ((6, 1), (2, 3), ()):
        with pytest.raises(ValueError) as error:
            call(name, torch.zeros(shape), 2)
        assert str(list(shape)) in str(error.value)


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("names", "given", "says"),
    [
        (SHAPED, {"entropy": None, "mask": None}, r"\[4\]"),
        (SHAPED, {"mask": None}, r"\[4, 3\]"),
        (SHAPED, {"entropy": None}, r"\[4, 3\]"),
        (SHAPED, {"entropy": ONES, "mask": torch.ones(4, 2)}, r"\[4, 3\].*\[4, 2\]"),
        (SHAPED, {"entropy": torch.ones(2, 6), "mask": torch.ones(2, 6)}, r"\[4\].*\[2, 6\]"),
        (SHAPED, {"entropy": torch.ones(4), "mask": torch.ones(4)}, r"\[4\]"),
        (SHAPED, dict.fromkeys(("entropy", "mask"), torch.ones(4, 3, 1)), r"\[4, 3, 1\]"),
        *((SHAPED, {"right": torch.ones(s)}, r"right \[B\].*\[4\]") for s in ((3,), (4, 1), ())),
        *(
            (SHAPED, {"normalize": bad}, "zeros.*within.*joint")
            for bad in ("zero", "Zeros", "", None)
        ),
        (["ktae"], {"completions": None}, r"None, \[4, 3\]"),
        (["ktae"], {"mask": None}, r"\[4, 3\], None"),
        (["ktae"], {"mask": torch.ones(4, 2)}, r"\[4, 3\], \[4, 2\]"),
        (["ktae"], dict.fromkeys(("mask", "completions"), torch.ones(2, 6)), r"\[4\], \[2, 6\]"),
        (["ktae"], dict.fromkeys(("mask", "completions"), torch.ones(4)), r"\[4\], \[4\], \[4\]"),
        (["ktae"], {"alpha": 0.0, "beta_ig": 0.0}, "alpha"),
        (["ktae"], {"k1": 0.0}, "k1"),
        (["ktae"], {"b": 1.1}, "b of at most 1"),
        (["opo"], {"mask": None}, r"\[4\], None"),
        (["opo"], {"mask": torch.ones(2, 6)}, r"\[4\], \[2, 6\]"),
        (["opo"], {"mask": torch.ones(4)}, r"\[4\], \[4\]"),
        *((["raft"], {"variant": bad}, r"raft\+\+") for bad in ("raft+", "", None)),
        *((["ha_dw"], {"window": bad}, f"at least 1.*{bad}") for bad in (0, -1)),
    ],
    ids=str,
)
def test_what_does_not_fit(names, given, says):
    for name in names:
        with pytest.raises(ValueError, match=says):
            call(name, torch.tensor([1.0, 0, 1, 0]), 2, **given)


def test_maxrl_refuses_a_negative_mean():
    assert call("maxrl", torch.tensor([-1.0, 1.0, 0.0, -0.0]), 2).tolist()[2:] == [0, 0]
    for rewards in ([-0.5, 0.0, 1.0, 1.0], [1.0, 0.0, -1.0, 0.9]):
        with pytest.raises(ValueError, match="needs rewards of 0 and 1"):
            call("maxrl", torch.tensor(rewards), 2)
