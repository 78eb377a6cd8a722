"""The advantages of more/ that are not GRPO's: raft, ha_dw, ktae, dr_grpo and rloo."""

import importlib
import inspect
import math
from statistics import fmean

import more_reference
import pytest
import torch
from test_advantages import close, make_groups
from test_more_losses import MODULE, NAMES

import grpo

OWN = ("raft", "ha_dw", "ktae", "dr_grpo", "rloo")
DEFAULTS = {
    "raft": {"variant": "raft++", "signed": True},
    "ha_dw": {"history": None, "scale": 1.5, "window": 10},
    "ktae": {"completions": None, "alpha": 1.0, "beta_ig": 1.0, "k1": 2.0, "b": 0.5}
    | {"ignore_id": -1},
}
every_own = pytest.mark.parametrize("name", OWN)
every_method = pytest.mark.parametrize("name", NAMES)
REWARDS = ((0.0, 1.0), (-1.0, 0.0, 0.3, 0.51, 1.2))  # of 0 and 1, and shaped ones


def make_ids(seed, mask, ids=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, 3 + ids, mask.shape, generator=g)


def call(name, rewards, group_size=4, **options):
    """The method's advantages; ktae gets ids and a mask if none are given."""
    if name == "ktae":
        mask = torch.ones(*rewards.shape, 3, device=rewards.device)
        options = {"completions": mask.long(), "mask": mask} | options
    return MODULE[name].advantages(rewards, group_size, **options)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_the_others_have_those_of_grpo(name):
    assert MODULE[name].advantages is grpo.advantages


# ---- against the formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("group_size", [2, 4, 12])
@pytest.mark.parametrize(
    ("name", "options"),
    [
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
    ],
)
def test_they_equal_the_slow_loop(name, options, group_size, rewards):
    slow = getattr(more_reference, f"{name}_advantages")
    for seed in range(3):
        r = make_groups(seed, rewards=rewards)[0]
        r[:2] = rewards[0]  # a constant group of two
        close(call(name, r, group_size, **options), slow(r.tolist(), group_size, **options))


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("group_size", [2, 4, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0, "beta_ig": 2.0},
        {"alpha": 0.5, "beta_ig": 0.0},
        {"k1": 0.7, "b": 0.9},
        {"b": 0.0},
        {"ignore_id": 4},
    ],
    ids="-".join,
)
def test_ktae_equals_the_slow_loop(options, group_size, rewards):
    for seed in range(3):
        r, _, mask = make_groups(seed, rewards=rewards)
        mask[seed] = False  # a completion without tokens is on no side
        for ids in (2, 5, 40):  # 40: most ids are on one side only
            o = make_ids(seed, mask, ids)
            got = call("ktae", r, group_size, completions=o, mask=mask, **options)
            given = r.tolist(), group_size, o.tolist(), mask.tolist()
            close(got, more_reference.ktae_advantages(*given, **options), rtol=1e-7, atol=1e-9)


# ---- by hand -------------------------------------------------------------------------------------


def test_raft_by_hand():
    r = torch.tensor([1.0, 0, 1, 1, 0, 0, -0.5, 0.5]).double()
    close(call("raft", r, 2), [1, 0, 1, 1, 0, 0, 0, 0.5])
    close(call("raft", r, 2, variant="raft"), [1, 0, 1, 1, 0, 0, 0, 0.5])
    close(call("raft", r, 2, variant="reinforce_rej"), [1, -1, 0, 0, 0, 0, -2, 0])
    signed = {"variant": "reinforce_rej", "signed": False}
    close(call("raft", r, 2, **signed), [1, 0, 0, 0, 0, 0, -0.5, 0.5])


def test_ha_dw_by_hand():
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


def test_ha_dw_of_one_group_without_history_is_scaled_grpo():
    for seed in range(3):
        r = make_groups(seed, B=8)[0]
        close(call("ha_dw", r, 8), 1.5 * grpo.advantages(r, 8))
        for past in ([], [r.mean().item()], [r.mean().item()] * 20):
            close(call("ha_dw", r, 8, history=past), 1.5 * grpo.advantages(r, 8))


def test_ha_dw_looks_at_the_last_steps_only():
    r = make_groups(1)[0]
    past = [0.1 * k for k in range(12)]
    want = call("ha_dw", r, history=past)
    assert torch.equal(call("ha_dw", r, history=[99.0] * 3 + past[3:]), want)
    assert torch.equal(call("ha_dw", r, history=tuple(past[-9:])), want)
    assert not torch.allclose(call("ha_dw", r, history=past[-8:]), want)
    assert past == [0.1 * k for k in range(12)]  # not changed


def test_ha_dw_clamps_what_enters_exp():
    r = torch.tensor([1.0, 0.0]).double()
    want = 1.5 * math.exp(20) * 0.5 / (math.sqrt(0.5) + 1e-4)
    close(call("ha_dw", r, 2, history=[1e3] * 9)[0], want)


def test_dr_grpo_by_hand():
    r = torch.tensor([1.0, 0, 0, 0, 3, 3, 5, 5]).double()
    close(call("dr_grpo", r), [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1])
    for seed in range(3):
        r = make_groups(seed, rewards=(-1.0, 0.3, 2.0))[0]
        std = r.view(-1, 4).std(1, keepdim=True).expand(-1, 4).flatten()
        close(call("dr_grpo", r), grpo.advantages(r, 4) * (std + 1e-4))


def test_rloo_by_hand():
    r = torch.tensor([1.0, 0, 0, 0, 3, 3, 5, 5]).double()
    close(call("rloo", r), [1, -1 / 3, -1 / 3, -1 / 3, -4 / 3, -4 / 3, 4 / 3, 4 / 3])
    for group_size in (2, 3, 12):
        r = make_groups(group_size, rewards=(-1.0, 0.3, 2.0))[0]
        scale = group_size / (group_size - 1)
        close(call("rloo", r, group_size), scale * call("dr_grpo", r, group_size))


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


# ---- KTAE's properties ---------------------------------------------------------------------------


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
    got = call("ktae", r, completions=o, mask=mask)
    close(got[:, 0], grpo.advantages(r, 4))


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.6, 1.0, 0.7, 0.9], [0.5, 0, -1, 0.2]])
def test_ktae_without_two_sides_has_no_keys(rewards):
    _, _, mask = make_groups(3, B=4)
    r = torch.tensor(rewards).double()
    got = call("ktae", r, completions=make_ids(3, mask), mask=mask)
    assert torch.equal(got, grpo.advantages(r, 4)[:, None] * mask)
    assert bool(got.any()) == (max(rewards) > min(rewards))


def test_ktae_one_half_is_wrong():
    _, _, mask = make_groups(3, B=4)
    given = {"completions": make_ids(3, mask), "mask": mask}
    r = torch.tensor([0.5, 1, 0.5, 1]).double()
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
    r, mask[:] = torch.tensor([1.0, 1, 0, 1, 1]), mask
    got = call("ktae", r, 5, completions=o, mask=mask)
    assert torch.equal(got, grpo.advantages(r, 5)[:, None] * mask)


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


def test_ktae_a_batch_without_a_token_is_0():
    r, _, mask = make_groups(8)
    for width in (6, 0):
        off = torch.zeros(len(r), width)
        got = call("ktae", r, completions=off.long(), mask=off)
        assert got.shape == off.shape and not got.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"completions": None}, r"None, \[4, 3\]"),
        ({"mask": None}, r"\[4, 3\], None"),
        ({"mask": torch.ones(4, 2)}, r"\[4, 3\], \[4, 2\]"),
        ({"mask": torch.ones(2, 6), "completions": torch.ones(2, 6)}, r"\[4\], \[2, 6\]"),
        ({"mask": torch.ones(4), "completions": torch.ones(4)}, r"\[4\], \[4\], \[4\]"),
        ({"alpha": 0.0, "beta_ig": 0.0}, "alpha"),
        ({"k1": 0.0}, "k1"),
        ({"b": 1.1}, "b of at most 1"),
    ],
)
def test_ktae_refuses_what_does_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        call("ktae", torch.tensor([1.0, 0, 1, 0]), 2, **options)


# ---- all of them ---------------------------------------------------------------------------------


@every_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_gets_exactly_0(name, dtype):
    """Also where, in floats, r - mean is not 0. raft and raft++ keep a group of right answers."""
    options = {"variant": "reinforce_rej"} if name == "raft" else {}
    for reward in (0.0, 1.0, -1.0, 0.1, 0.7, 1 / 3):
        for group_size in (2, 3, 6, 7, 13):
            r = torch.full((group_size,), reward, dtype=dtype)
            other = torch.arange(group_size).to(dtype)
            a = call(name, torch.cat([r, other]), group_size, **options)
            assert not a[:group_size].any() and a[group_size:].any()
    assert call("raft", torch.ones(4, dtype=dtype)).tolist() == [1] * 4


@every_own
def test_rewards_of_any_dtype(name):
    r = torch.tensor([1, 0, 0, 1])
    want = call(name, r.float(), 2)
    for dtype in (torch.bool, torch.long, torch.bfloat16, torch.float16, torch.float32):
        got = call(name, r.to(dtype), 2)
        assert got.dtype == torch.float32 and torch.equal(got, want)
    got = call(name, r.double(), 2)
    assert got.dtype == torch.float64
    close(got.float(), want, rtol=1e-6)


@every_own
def test_advantages_carry_no_gradient_and_keep_the_device(name):
    r = make_groups(12)[0].requires_grad_()
    assert not call(name, r).requires_grad
    if name != "ktae":  # it counts ids, which meta tensors cannot
        assert call(name, r.to("meta")).device.type == "meta"


@every_method
def test_signature(name):
    parameters = inspect.signature(MODULE[name].advantages).parameters
    assert list(parameters)[:2] == ["rewards", "group_size"]
    keyword_only = list(parameters.values())[2:]
    want = {"entropy": None, "mask": None} | DEFAULTS.get(name, {})
    assert {p.name: p.default for p in keyword_only} == want
    assert all(p.kind is p.KEYWORD_ONLY for p in keyword_only)


@every_own
@pytest.mark.parametrize(
    ("shape", "group_size", "says"),
    [
        ((6,), 4, r"\[6\].*4"),
        ((6,), 1, r"\[6\].*1"),
        ((6,), -2, r"\[6\].*-2"),
        ((6, 1), 2, r"\[6, 1\]"),
        ((), 2, r"\[\]"),
    ],
)
def test_rewards_that_do_not_fit(name, shape, group_size, says):
    with pytest.raises(ValueError, match=says):
        call(name, torch.zeros(shape), group_size)


@pytest.mark.parametrize("bad", ["raft+", "", None])
def test_unknown_variant(bad):
    with pytest.raises(ValueError, match=r"raft\+\+"):
        call("raft", torch.tensor([1.0, 0.0]), 2, variant=bad)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_this_step(window):
    with pytest.raises(ValueError, match=f"at least 1.*{window}"):
        call("ha_dw", torch.tensor([1.0, 0.0]), 2, window=window)


def test_docstring_numbers():
    """Those of dr_grpo, rloo, raft, ha_dw and ktae, from the slow loops and the example's batch."""
    logp = [[math.log(1.5), math.log(0.9)], [0.0, 0.0]]
    rest = [[0.0, 0.0], [0.0, 0.0]], [[1, 1], [1, 0]]
    for name, options in (("dr_grpo", {"max_length": 5}), ("rloo", {}), ("raft", {})):
        A = getattr(more_reference, f"{name}_advantages")([1.0, 0.0], 2)
        loss = getattr(more_reference, f"{name}_loss")
        value = loss(logp, rest[0], A, rest[1], **options)[0]
        assert f"tensor({value:.4f})" in importlib.import_module(f"more.{name}").__doc__
    a = more_reference.ha_dw_advantages([1.0, 0, 0, 0, 1, 1, 1, 0], 4)
    assert all(f"{abs(x):.4f}" in MODULE["ha_dw"].__doc__ for x in a)
    o = [[5, 6], [5, 6], [5, 6], [5, 7]]
    a = more_reference.ktae_advantages([1.0, 1.0, 0, 0], 4, o, [[1, 1]] * 4)
    assert "[{:.4f}, {:.4f}]".format(*a[2]) in MODULE["ktae"].__doc__
    assert fmean(a[0]) > 0 > fmean(a[2])
