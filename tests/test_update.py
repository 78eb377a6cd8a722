"""update.py: the gradient in two halves is the plain one, in micro-batches of any size; nothing
runs without need.
"""

import copy

import pytest
import torch
from conftest import DEVICE, tiny_model

from run.algorithm import load_algorithm
from run.checks import fill
from trainer import update
from trainer.cache import cache_argument
from trainer.logprobs import Layout, token_logprobs
from trainer.methods import ALGORITHMS, MORE, inputs
from trainer.records import kl_estimate
from trainer.rollout import Rollout
from trainer.update import Updater

B, T, G = 8, 6, 4


def rollout(seed=0, dtype=torch.float64):
    """Eight ragged rows of two prompts, both groups mixed but for one dull row pair."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 2, 5, 1, 3, 6, 4, 2])
    mask = (torch.arange(T) < lengths[:, None]).to(DEVICE)
    completions = torch.randint(2, 24, (B, T), generator=g).to(DEVICE)
    prompts = [[3, 4, 5]] * G + [[6, 7]] * G
    rewards = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0], dtype=dtype, device=DEVICE)
    ended = torch.zeros(B, device=DEVICE).bool()
    r = Rollout(prompts, completions, mask, ended, right=rewards, rewards=rewards)
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
        "device": DEVICE,
    }
    o = fill(given | {"dtype": "fp32", "temperature": 0.9} | options)
    return Updater(model, load_algorithm(algo), loss_options or {}, o, 16, Layout(True, True))


def advantages(u, r):
    """What train.py's Trainer.advantages gives, without its checks."""
    return u.algo.advantages(
        r.rewards, G, **inputs(u.algo.advantages, r, slice(None), r.entropy, T)
    )


def measured(algo, loss_options=None, r=None, model=None, **options):
    """(updater, rollout with its advantages) before the only update, whose rows are all eight."""
    model = tiny_model() if model is None else model
    r = rollout(dtype=model.dtype) if r is None else r
    u = updater(model, algo, loss_options, **{"updates": 1, "micro_batch": "8"} | options)
    u.measure(r, [torch.arange(B)])
    r.advantages = advantages(u, r)
    return u, r


def two_updates(algo, dtype, loss_options=None, r=None, learn_at_once=False, **options):
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

    u.measure(r, mini_batches, learn_at_once)
    r.advantages = advantages(u, r)
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


@pytest.mark.parametrize(("algo", "size"), [("grpo", "1"), ("tepo", "3"), ("gtpo", "3")])
def test_a_micro_batch_does_not_change_the_parameters(algo, size):
    """Below, each method with micro-batches of 3 is the plain gradient."""
    whole, said, _ = two_updates(algo, torch.float64)
    split, said_split, _ = two_updates(algo, torch.float64, micro_batch=size)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(said, said_split, strict=True):
        assert (a["signal"], a["clipped"]) == (b["signal"], b["clipped"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-10)


# Those whose gradient on policy depends on probabilities, entropy or rows without an advantage.
MEASURED_FIRST = {"gtpo", "grpo_s", "trgrpo", "clip_cov", "kl_cov", "raft", "reweight", "dro"}


@pytest.mark.parametrize(
    ("algo", "loss_options", "size", "checkpointing"),
    [
        *((*kind, "3", False) for kind in [*KINDS, *((algo, None) for algo in MORE)]),
        *((algo, None, "4", False) for algo in ("tepo", "gtpo")),
        *((algo, None, "3", True) for algo in ("tepo", "gtpo")),
    ],
)
def test_one_pass_that_measures_and_learns_changes_no_bit(algo, loss_options, size, checkpointing):
    how = {"gradient_checkpointing": checkpointing, "micro_batch": size}
    twice, said, first = two_updates(algo, torch.float32, loss_options, **how)
    how["learn_at_once"] = True
    once, said_once, second = two_updates(algo, torch.float32, loss_options, **how)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not once.training
    for name in ("old_logprobs", "entropy", "measured"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    # A ratio that is 1 by construction is not measured.
    learns_at_once = algo not in MEASURED_FIRST and not loss_options
    assert said[0]["ratio"] and (said_once[0]["ratio"] == []) == learns_at_once
    for a, b in zip(said, said_once, strict=True):
        assert {**a, "ratio": []} == {**b, "ratio": []}


def test_a_micro_batch_does_not_change_the_gradient_in_fp32():
    grads = {}
    for size in ("auto", "3"):
        grads[size] = two_updates("tepo", torch.float32, micro_batch=size, lr=1e-6)[2].gradient
        assert max(g.abs().max() for g in grads[size]) > 1e-3
    for a, b in zip(grads["auto"], grads["3"], strict=True):
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
    model, passes = tiny_model(), []
    u, r = measured("grpo", model=model, gradient_checkpointing=True)
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
    u, r = measured("grpo")
    r.old_logprobs -= 0.1
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
    """A pass without a graph measures; the first update takes its log-probabilities as current."""
    passes = {
        # one micro-batch: off policy its graph is kept
        ("gtpo", "4"): [(4, False)] * 2 + [(4, True)] * 4,
        ("grpo", "4"): [(4, False)] + [(4, True)] * 4,  # the first update measures its own rows
        ("gtpo", "2"): [(2, False)] * 4 + [(2, True)] * 2 + [(2, False)] * 2 + [(2, True)] * 2,
        ("grpo", "2"): [(2, False)] * 2 + [(2, True)] * 2 + [(2, False)] * 2 + [(2, True)] * 2,
    }
    for (algo, size), want in passes.items():
        rows_run.clear()
        two_updates(algo, torch.float64, micro_batch=size, learn_at_once=True)
        assert rows_run[: len(want)] == want


def one_mixed_group(constant=1.0):
    """A rollout whose second group is all right, or all wrong."""
    r = rollout()
    r.right = r.rewards = torch.tensor([1.0, 0, 0, 1, *[constant] * 4], dtype=torch.float64)
    return r


@pytest.mark.parametrize("learn_at_once", [False, True])
def test_a_group_without_signal_is_not_run(rows_run, learn_at_once):
    r = one_mixed_group()
    _, said, _ = two_updates("grpo", torch.float64, r=r, learn_at_once=learn_at_once)
    # The pass that measures, that of the first update, and that of its second time.
    assert rows_run == [(4, False)] * (not learn_at_once) + [(4, True)] * 2
    assert r.measured.tolist() == [True] * 4 + [False] * 4
    assert (r.entropy[4:] == 9.0 * r.mask[4:]).all() and (r.old_logprobs[:4] != -3).all()
    # Nothing to learn from: no pass, and no step on momentum alone.
    assert (said[1]["moved"], said[1]["grad_norm"], said[1]["signal"]) == (False, 0, 0)


@pytest.mark.parametrize(
    ("rewards", "right", "run"),
    [
        ([1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0], [0]),
        ([1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1], [0]),
        ([0, 0, 0, 0, 1, 2, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1], [0, 1]),
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], []),
    ],
)
def test_groups_that_differ_in_rewards_or_in_right_answers_are_run(rewards, right, run):
    r, u = rollout(), updater(tiny_model(), "grpo")
    r.rewards, r.right = torch.tensor(rewards).double(), torch.tensor(right).double()
    assert u.has_signal(r).view(2, G).all(1).nonzero()[:, 0].tolist() == run
    assert u.has_signal(r).sum() == G * len(run)


@pytest.mark.parametrize("algo", [*ALGORITHMS, *MORE])
def test_a_method_that_gives_a_constant_group_an_advantage_needs_all_rows(algo):
    """Else its rows would be pushed from the sampler's log-probabilities, and never run."""
    for constant in (0.0, 1.0):
        u, r = measured(algo, r=one_mixed_group(constant), model=tiny_model().double())
        r.history = [0.2, 0.4]
        pushes = advantages(u, r).view(B, -1)[G:].any()
        assert u.needs_all_rows or not pushes


def test_a_file_of_the_user_runs_all_rows_unless_it_says_not_to(tmp_path):
    body = "from grpo import loss\n"
    for line, needs in (("", True), ("NEEDS_ALL_ROWS = False\n", False)):
        path = tmp_path / f"own{needs}.py"
        path.write_text(body + line)
        assert updater(tiny_model(), str(path)).needs_all_rows == needs


def test_no_graph_outlives_a_skipped_step_or_an_error_of_memory(monkeypatch):
    u, r = measured("grpo", micro_batch="auto")
    r.advantages[0] = float("nan")
    assert u.update(r, torch.arange(B), on_policy=False)["bad_rows"] == [0]
    assert u.graph is None and u.sizes.rows["micro_batch"] == B
    r.advantages[0] = 0.0
    real, graphs = u.loss_gradient, []

    def small(*args):
        graphs.append(u.graph)
        if len(graphs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(u, "loss_gradient", small)
    assert u.update(r, torch.arange(B), on_policy=False)["moved"]
    assert graphs[0] is not None and graphs[1] is None  # two micro-batches keep none


def test_a_file_that_needs_all_rows_has_current_logprobs_of_rows_without_advantage(monkeypatch):
    """KL-Cov with every token in S, by hand: 0.5 |log w| / N pushes by 0.5 sign(log w) / N."""
    u, r = measured("kl_cov", {"cov_ratio": 1.0, "cov_coef": 0.5}, one_mixed_group(0.0))
    current = r.old_logprobs.clone()
    r.old_logprobs[4] += 1.0  # log w = -1 on 3 tokens
    r.old_logprobs[5] -= 1.0  # log w = 1 on 6 tokens
    r.logprobs[:] = -9.0  # what an earlier update left here
    gradients, real = [], u.loss_gradient

    def recorded(*args):
        loss, gradient = real(*args)
        gradients.append(gradient)
        return loss, gradient

    monkeypatch.setattr(u, "loss_gradient", recorded)
    said = u.update(r, torch.arange(B), on_policy=False)
    torch.testing.assert_close(r.logprobs[r.mask], current[r.mask], rtol=0, atol=1e-6)
    want = torch.zeros(4, T)
    want[0, :3], want[1, :6] = -0.5 / 29, 0.5 / 29  # N is 29
    torch.testing.assert_close(gradients[0][4:6], want[:2], rtol=0, atol=1e-9)
    assert said["signal"] == r.mask[:G].sum() and said["clipped"] == 0
    # Without any advantage the penalty alone moves the weights, and only off policy.
    r.advantages = torch.zeros(B)
    said = u.update(r, torch.arange(B), on_policy=False)
    assert said["moved"] and said["signal"] == 0 and said["grad_norm"] > 0


@pytest.mark.parametrize(
    ("algo", "loss_options", "rows"),
    [
        ("dapo", {}, G),
        ("clip_cov", {}, B),
        ("raft", {}, B),
        ("tepo", {}, G),
        ("tepo", {"kl_coef": 0.5}, B),
        ("grpo", {"beta": 0.0}, G),
        ("grpo", {"beta": 0.1}, B),
        ("ha_dw", {"beta": 0.1}, B),
    ],
)
def test_one_rule_says_which_rows_are_run(algo, loss_options, rows, rows_run):
    """Those of mixed groups, half of them here; all for NEEDS_ALL_ROWS and for any KL."""
    u, r = measured(algo, loss_options, one_mixed_group(0.0))
    rows_run.clear()
    u.update(r, torch.arange(B), on_policy=False)
    assert rows_run == [(rows, True)]


@pytest.mark.parametrize("size", ["8", "3"])
@pytest.mark.parametrize("algo", ["grpo", "gtpo"])
def test_rows_left_out_do_not_pad_the_others_otherwise(algo, size, monkeypatch):
    """In bf16 another padding rounds otherwise, and the ratio is off by that: rows run beside the
    same rows again. Group 0 is all right; for gtpo one of its rows is punished: A = 0 all the same.
    """
    runs = []

    def recorded(model, prompts, completions, mask, **options):
        runs.append((torch.is_grad_enabled(), completions.tolist(), mask.tolist()))
        return token_logprobs(model, prompts, completions, mask, **options)

    monkeypatch.setattr(update, "token_logprobs", recorded)
    r = rollout(dtype=torch.float32)
    r.right = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0])
    r.rewards = r.right - torch.tensor([0.5, 0, 0, 0, 0, 0, 0, 0]) * (algo == "gtpo")
    u, r = measured(algo, r=r, micro_batch=size)
    assert not r.advantages[:G].any() and r.advantages[G:].any()
    before = [run[1:] for run in runs]
    assert sum(len(ids) for ids, _ in before) == (B if algo == "gtpo" else G)
    runs.clear()
    said = u.update(r, torch.arange(B), on_policy=True)
    assert runs and all(grad and tuple(run) in before for grad, *run in runs)
    assert said["signal"] == r.mask[G:].sum()
    runs.clear()
    u.update(r, torch.arange(B), on_policy=False)
    # The backward pass may have fewer rows.
    assert runs and all(grad or tuple(run) in before for grad, *run in runs)


@pytest.mark.parametrize("beta", [0.0, 0.1, 5.0])
def test_clip_frac_is_of_the_policy_term_also_where_a_kl_pushes(beta):
    """The KL to a reference elsewhere moves every token."""
    model, r = tiny_model(), rollout(dtype=torch.float32)
    u = updater(model, "grpo", {"beta": beta}, updates=1)
    for p in u.reference.parameters() if beta else ():
        p.data *= 1.1
    u.measure(r, [torch.arange(B)])
    assert not beta or (r.ref_logprobs - r.old_logprobs)[r.mask].abs().min() > 1e-4
    r.advantages = u.algo.advantages(r.rewards, G)
    r.old_logprobs[0] -= 1.0  # right, ratio e > 1.2: clipped, all 6 tokens
    r.old_logprobs[1] -= 1.0  # wrong, ratio e: not clipped
    r.old_logprobs[2, 0] += 1.0  # wrong, ratio 1/e < 0.8: clipped, one token
    said = u.update(r, torch.arange(B), on_policy=False)
    assert (said["signal"], said["clipped"]) == (r.mask.sum().item(), 7)


def test_clip_frac_is_of_the_policy_term_under_the_kl_mask_of_tepo():
    """Rows 0 and 3, 6 + 1 tokens, are right and s = e: clipped, though the KL mask has them all."""
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


def test_kl_estimate_is_not_lost_to_rounding_nor_to_overflow():
    """(w - 1) - log w is log(w)^2 / 2 close to w = 1, far below fp32's rounding of w."""
    log_w = torch.tensor([1e-4, -1e-4, 1e-3])
    want = [5e-9, 5e-9, 5e-7]
    assert kl_estimate(log_w, torch.zeros(3)).tolist() == pytest.approx(want, rel=2e-3)
    far = kl_estimate(torch.tensor([90.0, -90.0]), torch.zeros(2))
    assert far.isfinite().all() and far[1] == 89  # e^-90 - 1 + 90


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
