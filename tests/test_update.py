"""update.py: the gradient in two halves is the plain one, in micro-batches of any size; nothing
runs without need.
"""

import copy

import pytest
import torch
from conftest import tiny_model

from run.algorithm import load_algorithm
from run.checks import fill
from trainer import update
from trainer.cache import cache_argument
from trainer.logprobs import Layout, token_logprobs
from trainer.methods import ALGORITHMS, named
from trainer.sampling import Rollout
from trainer.update import Updater, kl_estimate

B, T, G = 8, 6, 4


def rollout(seed=0, dtype=torch.float64):
    """Eight ragged rows of two prompts, both groups mixed but for one dull row pair."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 2, 5, 1, 3, 6, 4, 2])
    mask = torch.arange(T) < lengths[:, None]
    completions = torch.randint(2, 24, (B, T), generator=g)
    prompts = [[3, 4, 5]] * G + [[6, 7]] * G
    rewards = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0], dtype=dtype)
    r = Rollout(prompts, completions, mask, torch.zeros(B).bool(), right=rewards, rewards=rewards)
    r.sampler_logprobs = -3.0 * mask  # as different from the policy's as can be told apart
    r.sampler_entropy = 9.0 * mask
    return r


def updater(model, algo, loss_options=None, **options):
    given = {
        "algo": algo,
        "preset": "tiny",
        "prompts": 2,
        "group_size": G,
        "updates": 2,
        "lr": 1e-3,
        "device": "cpu",
    }
    o = fill(given | {"dtype": "fp32", "temperature": 0.9} | options)
    return Updater(model, load_algorithm(algo), loss_options or {}, o, 16, Layout(True, True))


def two_updates(algo, dtype, loss_options=None, r=None, keep_graph=False, **options):
    """Measure and update twice, on policy and then off it. Returns the trained model, what update
    returned, and the rollout, `r` if given.
    """
    model, r = tiny_model().to(dtype), rollout(dtype=dtype) if r is None else r
    u = updater(model, algo, loss_options, **options)
    u.optimizer.register_step_pre_hook(
        lambda *_: setattr(r, "gradient", [p.grad for p in model.parameters()])
    )
    if u.reference is not None:
        torch.manual_seed(1)
        for p in u.reference.parameters():
            p.data += 0.05 * torch.randn_like(p)
    mini_batches = torch.arange(B).split(B // 2)

    def advantages(r):
        more = named(u.algo.advantages, {"entropy": r.entropy, "mask": r.mask})
        return u.algo.advantages(r.rewards, G, **more)

    u.measure(r, mini_batches, keep_graph, advantages)
    r.advantages = advantages(r)
    torch.manual_seed(2)  # Clip-Cov draws tokens
    return (
        model,
        [u.update(r, rows, on_policy=i == 0) for i, rows in enumerate(mini_batches * 2)],
        r,
    )


KINDS = [(algo, None) for algo in ALGORITHMS] + [
    ("grpo", {"beta": 0.1}),
    ("tepo", {"kl_coef": 0.5}),
    ("clip_cov", {"cov_ratio": 0.3, "cov_low": 0.0}),
    ("kl_cov", {"cov_ratio": 0.3}),
]


@pytest.mark.parametrize(("algo", "loss_options"), KINDS)
def test_a_micro_batch_does_not_change_the_parameters(algo, loss_options):
    whole, said, _ = two_updates(algo, torch.float64, loss_options)
    for size in ("1", "3"):
        split, said_split, _ = two_updates(algo, torch.float64, loss_options, micro_batch=size)
        for a, b in zip(whole.parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        for a, b in zip(said, said_split, strict=True):
            assert (a["signal"], a["clipped"]) == (b["signal"], b["clipped"])
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-10)


@pytest.mark.parametrize("size", ["4", "3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("algo", "loss_options"), KINDS)
def test_one_pass_that_measures_and_learns_changes_no_bit(algo, loss_options, checkpointing, size):
    """Size 4 keeps the graph of the mini-batch of 4 rows; size 3 guesses its gradient."""
    how = {"gradient_checkpointing": checkpointing, "micro_batch": size}
    twice, said, first = two_updates(algo, torch.float32, loss_options, **how)
    once, said_once, second = two_updates(algo, torch.float32, loss_options, keep_graph=True, **how)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.old_logprobs, second.old_logprobs) and not once.training
    guessed = algo in ("grpo", "dapo", "gspo", "tepo") and not loss_options
    in_one_pass = size == "4" or guessed
    # 1 by construction where it was one pass: not measured
    assert said[0]["ratio"] and (said_once[0]["ratio"] == []) == in_one_pass
    for a, b in zip(said, said_once, strict=True):
        assert {**a, "ratio": []} == {**b, "ratio": []}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_micro_batch_does_not_change_the_gradient_in_fp32(algo):
    grads = {}
    for size in ("auto", "1", "3"):
        _, _, r = two_updates(algo, torch.float32, micro_batch=size, lr=1e-6)
        grads[size] = r.gradient
        assert max(g.abs().max() for g in grads[size]) > 1e-3
    for size in ("1", "3"):
        for a, b in zip(grads["auto"], grads[size], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize(("algo", "loss_options"), KINDS)
def test_two_halves_are_the_plain_gradient(algo, loss_options, one_sided):
    """Four optimizer steps against a loop that backpropagates the whole mini-batch at once.

    one_sided: the second group is all wrong; only a KL to the reference, or KL-Cov, pushes it.
    """
    r = rollout()
    if one_sided:
        r.right[G:] = r.rewards[G:] = 0
    trained, _, r = two_updates(algo, torch.float64, loss_options, r, micro_batch="3")
    model, options = tiny_model().double(), dict(loss_options or {})
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    for p in reference.parameters():
        p.data += 0.05 * torch.randn_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    torch.manual_seed(2)
    for rows in torch.arange(B).split(B // 2) * 2:
        where = ([r.prompts[i] for i in rows], r.completions[rows], r.mask[rows])
        logprobs, entropy = token_logprobs(model, *where, temperature=0.9)
        # Two passes of the same weights differ by rounding, and KL-Cov's |log w| has its kink at 0.
        old = r.old_logprobs[rows]
        same = (logprobs - old).abs() < 1e-12
        logprobs = torch.where(same, old + (logprobs - logprobs.detach()), logprobs)
        if "kl_coef" in options:
            options |= {"entropy": entropy, "old_entropy": r.entropy[rows]}
        if "beta" in options:
            options["ref_logprobs"] = token_logprobs(reference, *where, temperature=0.9)[0].detach()
        loss = load_algorithm(algo).loss
        loss = loss(logprobs, r.old_logprobs[rows], r.advantages[rows], r.mask[rows], **options)
        optimizer.zero_grad()
        loss.backward()
        if not any(p.grad.any() for p in model.parameters()):
            continue  # all clipped: no step on momentum alone
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, _, _ = two_updates("tepo", torch.float64)
    checkpointed, _, _ = two_updates("tepo", torch.float64, gradient_checkpointing=True)
    assert not checkpointed.training
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    torch.manual_seed(0)
    calls = []
    checkpointed.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: calls.append(k[cache_argument(checkpointed)]), with_kwargs=True
    )
    checkpointed.generate(
        torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False, eos_token_id=99
    )
    assert all(cache is not None for cache in calls)  # generation keeps its cache


def test_a_checkpointed_layer_runs_again_in_the_backward_pass():
    model, r, passes = tiny_model(), rollout(dtype=torch.float32), []
    u = updater(model, "grpo", updates=1, micro_batch="8", gradient_checkpointing=True)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    u.update(r, torch.arange(B), on_policy=True)
    assert len(passes) == 2  # transformers checkpoints in train mode alone


def test_the_ratio_before_the_first_update_is_1_and_measured():
    for size in ("auto", "1", "3"):
        _, said, r = two_updates("gspo", torch.float32, micro_batch=size)
        assert len(said[0]["ratio"]) == r.mask[:G].sum()
        assert max(abs(x - 1) for x in said[0]["ratio"]) < 1e-5
        assert said[1]["ratio"] == []
    # were the two sides of the ratio not one code path, this would see it
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo")
    u.measure(r, torch.arange(B).split(4))
    r.old_logprobs -= 0.1
    r.advantages = u.algo.advantages(r.rewards, G)
    assert u.update(r, torch.arange(4), on_policy=True)["ratio"][0] == pytest.approx(
        2.718281828**0.1, rel=1e-4
    )


@pytest.fixture
def rows_run(monkeypatch):
    """How many rows each forward pass had."""
    calls = []

    def counted(model, prompts, *args, **kwargs):
        calls.append((len(prompts), torch.is_grad_enabled()))
        return token_logprobs(model, prompts, *args, **kwargs)

    monkeypatch.setattr(update, "token_logprobs", counted)
    return calls


def test_no_forward_pass_without_need(rows_run):
    two_updates("grpo", torch.float64)
    # measure: 2 mini-batches; then one pass each, with the graph: the first update takes the old
    # log-probabilities for
    # the current ones, the others fit one micro-batch
    assert rows_run == [(4, False)] * 2 + [(4, True)] * 4
    rows_run.clear()
    two_updates("grpo", torch.float64, micro_batch="2")
    first, second = rows_run[4:6], rows_run[6:10]
    assert first == [(2, True)] * 2 and second == [(2, False)] * 2 + [(2, True)] * 2


def test_the_pass_that_measures_is_the_pass_that_learns_where_it_fits(rows_run):
    two_updates("gtpo", torch.float64, keep_graph=True, micro_batch="4")
    assert rows_run == [(4, True), (4, False)] + [(4, True)] * 3
    rows_run.clear()
    two_updates("gtpo", torch.float64, keep_graph=True, micro_batch="2")
    assert rows_run[:6] == [(2, False)] * 4 + [(2, True)] * 2
    rows_run.clear()
    two_updates("dapo", torch.float64, keep_graph=True, micro_batch="2")
    assert rows_run[:4] == [(2, True)] * 2 + [(2, False)] * 2
    assert rows_run[4:6] == [(2, False)] * 2  # already the second update, off policy


def one_mixed_group():
    """A rollout whose second group is all right."""
    r = rollout()
    r.right = r.rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.float64)
    return r


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_group_without_signal_is_not_run(rows_run, keep_graph):
    _, _, r = two_updates("grpo", torch.float64, r=one_mixed_group(), keep_graph=keep_graph)
    assert rows_run[0] == (4, keep_graph) and {n for n, _ in rows_run} == {4}
    # One pass that measures (and learns), and the pass of the first mini-batch's second update.
    assert len(rows_run) == (2 if keep_graph else 3)
    assert r.measured.tolist() == [True] * 4 + [False] * 4
    assert (r.entropy[4:] == 9.0 * r.mask[4:]).all() and (r.old_logprobs[:4] != -3).all()


def test_groups_that_differ_in_rewards_or_in_right_answers_are_run():
    r = one_mixed_group()
    r.rewards, r.right = torch.ones(B), torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    u = updater(tiny_model(), "grpo")
    assert u.may_have_signal(r).tolist() == [True] * 4 + [False] * 4
    r.rewards = torch.tensor([0.0, 0, 0, 0, 1, 2, 1, 1])
    assert u.may_have_signal(r).all()


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("micro_batch", ["2", "4"])
def test_a_constant_group_with_an_advantage_is_measured_after_all(micro_batch, keep_graph):
    """RAFT trains on groups that are all right. The result is that of a file that needs all."""
    trained = []
    for needs in (False, True):
        r, u = (
            one_mixed_group(),
            updater(tiny_model().double(), "raft", updates=1, micro_batch=micro_batch),
        )
        u.needs_all_rows = needs

        def advantages(r, u=u):
            return u.algo.advantages(r.rewards, G)

        u.measure(r, [torch.arange(B)], keep_graph, advantages)
        r.advantages = advantages(r)
        left_out = not r.measured.all()
        assert u.measure_rest(r, [torch.arange(B)]) == left_out
        u.update(r, torch.arange(B), on_policy=True)
        trained.append((r, list(u.model.parameters())))
    (a, some), (b, every) = trained
    assert a.measured.all() and torch.equal(a.old_logprobs, b.old_logprobs)
    assert all(torch.equal(*pair) for pair in zip(some, every, strict=True))


def test_a_wrong_guess_is_undone(monkeypatch, rows_run):
    """TR-GRPO's gradient depends on the probabilities themselves."""
    how = {"keep_graph": True, "micro_batch": "2"}
    want, _, _ = two_updates("trgrpo", torch.float64, **how)
    monkeypatch.setattr(update, "takes_ratios_only", lambda *_: True)
    rows_run.clear()
    got, said, _ = two_updates("trgrpo", torch.float64, **how)
    assert rows_run[:6] == [(2, True)] * 2 + [(2, False)] * 2 + [(2, True)] * 2 and said[0]["ratio"]
    for a, b in zip(want.parameters(), got.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_of_several_kinds_keep_their_graphs_together(rows_run):
    """The first group is all wrong, so its rows are a micro-batch of their own."""
    r = rollout(dtype=torch.float32)
    r.rewards = torch.tensor([0.0, 0, 0, 0, 0, 1, 0, 0])
    u = updater(tiny_model(), "grpo", {"beta": 0.1}, updates=1, micro_batch="8")
    u.measure(r, [torch.arange(B)], keep_graph=True)
    r.advantages = u.algo.advantages(r.rewards, G)
    assert rows_run == [(G, False)] * 2 + [(G, True)] * 2 and len(u.graphs) == 2
    assert u.update(r, torch.arange(B), on_policy=True)["moved"]
    assert len(rows_run) == 4 and not u.graphs


def test_no_graph_outlives_a_skipped_step_or_an_error_of_memory():
    r = rollout(dtype=torch.float32)
    u = updater(tiny_model(), "grpo", updates=1, micro_batch="auto")
    u.measure(r, [torch.arange(B)], keep_graph=True)
    r.advantages = u.algo.advantages(r.rewards, G)
    r.advantages[0] = float("nan")
    assert u.graphs and u.update(r, torch.arange(B), on_policy=True)["bad_rows"] == [0]
    assert not u.graphs
    u.measure(r, [torch.arange(B)], keep_graph=True)

    def work(size):
        if u.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    assert u.with_smaller_batches("micro_batch", work) == B // 2


def test_rows_without_push_are_not_run(rows_run):
    model, r = tiny_model(), rollout(dtype=torch.float32)
    r.rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])  # the second group is all wrong
    u = updater(model, "tepo", updates=1, micro_batch="8")
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    rows_run.clear()
    assert u.update(r, torch.arange(B), on_policy=True)["signal"] == r.mask[:G].sum()
    assert rows_run == [(4, True)]
    before = [p.clone() for p in model.parameters()]
    rows_run.clear()
    said = u.update(
        r, torch.arange(4, 8), on_policy=False
    )  # nothing to learn from: no pass, no step on momentum alone
    assert rows_run == [] and said["grad_norm"] == 0 and said["signal"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_file_that_needs_all_rows_has_current_logprobs_of_rows_without_advantage(monkeypatch):
    """KL-Cov with every token in S, by hand: 0.5 |log w| / N pushes by 0.5 sign(log w) / N."""
    model, r = tiny_model(), rollout(dtype=torch.float32)
    r.rewards = r.right = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])  # the second group is all wrong
    u = updater(model, "kl_cov", {"cov_ratio": 1.0, "cov_coef": 0.5}, updates=1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    current = r.old_logprobs.clone()
    r.old_logprobs[4] += 1.0  # log w = -1 on 3 tokens
    r.old_logprobs[5] -= 1.0  # log w = 1 on 6 tokens
    r.logprobs[:] = -9.0  # what an earlier update left here
    said, pushes, real = None, [], u.loss_gradient

    def recorded(*args):
        loss, push = real(*args)
        pushes.append(push)
        return loss, push

    monkeypatch.setattr(u, "loss_gradient", recorded)
    said = u.update(r, torch.arange(B), on_policy=False)
    torch.testing.assert_close(r.logprobs[r.mask], current[r.mask], rtol=0, atol=1e-6)
    want = torch.zeros(4, T)
    want[0, :3], want[1, :6] = -0.5 / 29, 0.5 / 29  # N is 29
    torch.testing.assert_close(pushes[0][4:6], want[:2], rtol=0, atol=1e-9)
    assert said["signal"] == r.mask[:G].sum() and said["clipped"] == 0
    # Without any advantage the penalty alone moves the weights, and only off policy.
    r.rewards = torch.zeros(B)
    r.advantages = u.algo.advantages(r.rewards, G)
    said = u.update(r, torch.arange(B), on_policy=False)
    assert said["moved"] and said["signal"] == 0 and said["grad_norm"] > 0


@pytest.mark.parametrize(
    ("algo", "loss_options", "rows"),
    [
        ("dapo", {}, G),
        ("clip_cov", {}, B),
        ("kl_cov", {}, B),
        ("tepo", {}, G),
        ("tepo", {"kl_coef": 0.5}, B),
        ("grpo", {"beta": 0.0}, G),
        ("grpo", {"beta": 0.1}, B),
        ("ha_dw", {"beta": 0.1}, B),
    ],
)
def test_one_rule_says_which_rows_are_run(algo, loss_options, rows, rows_run):
    """Those with an advantage, half of them here; all for NEEDS_ALL_ROWS and for any KL."""
    r = rollout(dtype=torch.float32)
    r.rewards = r.right = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    u = updater(tiny_model(), algo, loss_options, updates=1, micro_batch="8")
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    rows_run.clear()
    u.update(r, torch.arange(B), on_policy=False)
    current = [count for count, _ in rows_run]
    assert sum(current[: 1 + (rows == B)]) == rows  # the pass that measures; groups run apart


@pytest.mark.parametrize("size", ["8", "3"])
def test_rows_left_out_do_not_pad_the_others_otherwise(size, monkeypatch):
    """In bf16 another padding rounds otherwise, and the ratio is off by that: rows run beside the
    same rows again.
    """
    runs = []

    def recorded(model, prompts, completions, mask, **options):
        runs.append((torch.is_grad_enabled(), completions.tolist(), mask.tolist()))
        return token_logprobs(model, prompts, completions, mask, **options)

    monkeypatch.setattr(update, "token_logprobs", recorded)
    r = rollout(dtype=torch.float32)
    r.rewards = torch.tensor([0.0, 0, 0, 0, 0, 1, 0, 0])  # the first group is all wrong
    u = updater(tiny_model(), "grpo", updates=1, micro_batch=size)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    measured = [run[1:] for run in runs]
    assert sum(len(ids) for ids, _ in measured) == B
    runs.clear()
    u.update(r, torch.arange(B), on_policy=True)
    assert runs and all(grad and tuple(run) in measured for grad, *run in runs)
    runs.clear()
    u.update(r, torch.arange(B), on_policy=False)
    assert runs and all(
        grad or tuple(run) in measured for grad, *run in runs
    )  # the backward pass may have fewer rows


def test_clip_frac_counts_tokens_with_advantage_and_no_push():
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", updates=1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    r.old_logprobs[0] -= 1.0  # right, ratio e > 1.2: clipped, all 6 tokens
    r.old_logprobs[1] -= 1.0  # wrong, ratio e: not clipped
    r.old_logprobs[2, 0] += 1.0  # wrong, ratio 1/e < 0.8: clipped, one token
    said = u.update(r, torch.arange(B), on_policy=False)
    assert (said["signal"], said["clipped"]) == (r.mask.sum().item(), 7)


@pytest.mark.parametrize("loss_options", [{"beta": 0.1}, {"beta": 5.0}])
def test_clip_frac_is_of_the_policy_term_where_a_kl_pushes_too(loss_options):
    """The same seven tokens as above: the KL to a reference elsewhere moves every one of them."""
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", loss_options, updates=1)
    with torch.no_grad():
        for p in u.reference.parameters():
            p.mul_(1.1)
    u.measure(r, [torch.arange(B)])
    assert (r.ref_logprobs - r.old_logprobs)[r.mask].abs().min() > 1e-4
    r.advantages = u.algo.advantages(r.rewards, G)
    r.old_logprobs[0] -= 1.0
    r.old_logprobs[1] -= 1.0
    r.old_logprobs[2, 0] += 1.0
    said = u.update(r, torch.arange(B), on_policy=False)
    assert (said["signal"], said["clipped"]) == (r.mask.sum().item(), 7)


def test_clip_frac_is_of_the_policy_term_under_the_kl_mask_of_tepo():
    """Rows 0 and 3 are right, s = e for both: clipped, 6 + 1 tokens, though the KL mask has them
    all.
    """
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "tepo", {"kl_coef": 0.5}, updates=1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    r.old_logprobs[[0, 1, 3]] -= 1.0
    r.entropy += 1.0  # so the entropy has decreased everywhere
    said = u.update(r, torch.arange(B), on_policy=False)
    assert (said["signal"], said["clipped"]) == (r.mask.sum().item(), 7)


def test_signal_and_clip_are_counted_in_the_mini_batch_alone_and_without_rows_of_advantage_0():
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", updates=2)
    u.measure(r, torch.arange(B).split(4))
    r.advantages = u.algo.advantages(r.rewards, G)
    r.advantages[1] = 0.0
    r.old_logprobs[:2] -= 1.0  # row 0 is clipped, 6 tokens; row 1 is as far off, without advantage
    r.old_logprobs[5] -= 1.0  # clipped, 6 tokens of the other mini-batch
    said = u.update(r, torch.arange(4), on_policy=False)
    assert (said["signal"], said["clipped"]) == (6 + 5 + 1, 6)
    kl = kl_estimate(r.logprobs, r.old_logprobs)
    assert said["kl"] == pytest.approx(kl[[0, 2, 3]].sum().item(), rel=1e-5)
    assert said["kl"] > 6 * 0.7  # e - 1 - 1 for each of the six


# Eight draws in the proportions of pi_old: over them a mean is the expectation under pi_old.
DRAWN = [0, 0, 0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    "new",
    [
        [0.4, 0.4, 0.1, 0.1],
        [0.5, 0.25, 0.125, 0.125],
        [0.05, 0.05, 0.1, 0.8],
        [0.57, 0.2999, 0.13, 1e-4],  # pi_old / pi_theta = 1250 on one token: k3 of it is 1242
    ],
)
def test_kl_is_the_exact_kl_of_old_and_new_over_an_enumerated_vocabulary(new, monkeypatch):
    old = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    new = torch.tensor(new, dtype=torch.float64)
    model, r = tiny_model().double(), rollout()
    r.mask, r.completions = r.mask[:, :1] | True, torch.tensor(DRAWN)[:, None]
    u = updater(model, "grpo", updates=1)
    r.old_logprobs, r.entropy = old[r.completions].log(), torch.ones(B, 1).double()
    r.logprobs, r.advantages = r.old_logprobs.clone(), u.algo.advantages(r.rewards, G)

    def forward(rollout, rows, model, with_entropy=True):
        graph = 0 * next(model.parameters()).sum()
        logprobs = new[rollout.completions[rows]].log()
        return logprobs + graph, torch.zeros_like(logprobs)

    monkeypatch.setattr(u, "forward", forward)
    said = u.update(r, torch.arange(B), on_policy=False)
    exact = (old * (old / new).log()).sum().item()
    assert said["signal"] == B
    assert said["kl"] / said["signal"] == pytest.approx(exact, abs=1e-12)


def test_kl_of_whole_sequences_is_the_sum_of_their_tokens_expectations():
    """All nine completions of two tokens over three words, each weighted by its chance under
    pi_old.
    """
    g = torch.Generator().manual_seed(0)
    old, new = torch.rand(2, 4, 3, generator=g, dtype=torch.float64).log_softmax(-1)
    expected = exact = 0.0
    for first in range(3):
        for second in range(3):
            # the second word's distribution, row 1 + first, depends on the first word
            of_old = torch.stack([old[0, first], old[1 + first, second]])
            of_new = torch.stack([new[0, first], new[1 + first, second]])
            chance = of_old.sum().exp()
            expected += chance * kl_estimate(of_new, of_old).sum()
            exact += chance * (of_old.sum() - of_new.sum())
    assert exact > 1e-3
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=0)


def test_kl_estimate_is_not_lost_to_rounding_nor_to_overflow():
    """(w - 1) - log w is log(w)^2 / 2 close to w = 1, far below fp32's rounding of w."""
    log_w = torch.tensor([1e-4, -1e-4, 1e-3])
    want = [5e-9, 5e-9, 5e-7]
    assert kl_estimate(log_w, torch.zeros(3)).tolist() == pytest.approx(want, rel=2e-3)
    far = kl_estimate(torch.tensor([90.0, -90.0]), torch.zeros(2))
    assert far.isfinite().all() and far[1] == 89  # e^-90 - 1 + 90


def test_groups_left_out_by_correctness_do_not_pad_the_others_otherwise(monkeypatch):
    """Shaped rewards: GTPO leaves out group 0 (all right, one row punished), and keeps group 1."""
    runs = []

    def recorded(model, prompts, completions, mask, **options):
        runs.append((torch.is_grad_enabled(), completions.tolist(), mask.tolist()))
        return token_logprobs(model, prompts, completions, mask, **options)

    monkeypatch.setattr(update, "token_logprobs", recorded)
    r = rollout(dtype=torch.float32)
    r.right = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0])
    r.rewards = r.right - torch.tensor([0.5, 0, 0, 0, 0, 0, 0, 0])
    u = updater(tiny_model(), "gtpo", updates=1, micro_batch="8")
    u.measure(r, [torch.arange(B)])
    inputs = {"entropy": r.entropy, "mask": r.mask, "right": r.right}
    r.advantages = u.algo.advantages(r.rewards, G, **inputs)
    assert not r.advantages[:G].any() and r.advantages[G:].any()
    measured = [run[1:] for run in runs]
    runs.clear()
    said = u.update(r, torch.arange(B), on_policy=True)
    assert len(runs) == 1 and len(runs[0][1]) == G and runs[0][1:] in measured
    assert said["signal"] == r.mask[G:].sum() and len(said["ratio"]) == said["signal"]


def test_a_kl_to_the_reference_runs_and_pushes_groups_without_advantage(rows_run):
    r = rollout(dtype=torch.float32)
    r.rewards = r.right = torch.zeros(B)
    u = updater(tiny_model(), "grpo", {"beta": 0.1}, updates=1, micro_batch="8")
    with torch.no_grad():
        for p in u.reference.parameters():
            p.mul_(1.1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    rows_run.clear()
    said = u.update(r, torch.arange(B), on_policy=True)
    assert rows_run == [(B, True)]
    assert said["moved"] and said["grad_norm"] > 0 and said["signal"] == 0


def test_out_of_memory_halves_and_loses_nothing(monkeypatch, capsys):
    whole, _, _ = two_updates("tepo", torch.float64)

    def small(model, prompts, *args, **kwargs):
        if len(prompts) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logprobs(model, prompts, *args, **kwargs)

    monkeypatch.setattr(update, "token_logprobs", small)
    halved, _, _ = two_updates("tepo", torch.float64)
    for a, b in zip(whole.parameters(), halved.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert "--micro-batch goes from 4 to 2" in capsys.readouterr().out
    with pytest.raises(MemoryError, match="--micro-batch 4"):
        two_updates("tepo", torch.float64, micro_batch="4")


@pytest.mark.parametrize("fault", [0.0, float("nan")])
def test_no_gradient_is_held_after_an_update(fault):
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", updates=1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G) + fault
    assert u.update(r, torch.arange(B), on_policy=True)["moved"] == (fault == 0)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_not_finite_is_skipped_and_blamed():
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", updates=1)
    u.measure(r, [torch.arange(B)])
    r.advantages = u.algo.advantages(r.rewards, G)
    r.old_logprobs[2, 1] = float("nan")
    before = [p.clone() for p in model.parameters()]
    said = u.update(r, torch.arange(B), on_policy=False)
    assert said["bad_rows"] == [2] and said["grad_norm"] is None and u.bad_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    r.old_logprobs[2, 1] = 0.0
    assert u.update(r, torch.arange(B), on_policy=False)["bad_rows"] == [] and u.bad_steps == 0
