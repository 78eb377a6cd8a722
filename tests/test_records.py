"""What a step writes down: every key of metrics.jsonl against a rollout worked out by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import gtpo
import train
from run.checks import fill
from run.parser import parse
from trainer import records, update
from trainer.logprobs import token_logprobs
from trainer.records import group_to_show, metrics_line, peak_mib, sample_lines
from trainer.rollout import Rollout, sampler_weights

G = 2
X = math.nan  # stands where the mask is off: it must reach nothing


def rollout(lengths, width, right, rewards, truncated):
    B = len(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    problems = [{"question": f"q{i // G}", "answer": f"#### {i // G}"} for i in range(B)]
    return Rollout(
        prompts=[[3, 4 + i // G] for i in range(B)],
        completions=torch.arange(B * width).view(B, width),
        mask=mask,
        truncated=torch.tensor(truncated),
        sampler_logprobs=torch.zeros(mask.shape),
        sampler_entropy=torch.zeros(mask.shape),
        problems=problems,
        texts=[f"text {i}" for i in range(B)],
        right=torch.tensor(right),
        rewards=torch.tensor(rewards),
    )


def hand_made():
    """(trained on, everything sampled, the updates): three groups of two, the last two trained on.

    The first group is all right, and two right rows are punished to a reward below a half. The
    batches are 3 and 4 tokens wide.
    """
    first = rollout([1, 3, 1, 3], 3, [1.0, 1, 1, 0], [1.0, 0.38, 0.4, -1], [False] * 4)
    second = rollout([4, 3], 4, [0.0, 0], [0.0, 0], [True, False])
    trained = Rollout.join([first.pick([2, 3]), second])  # of 1, 3, 4 and 3 tokens
    trained.entropy = torch.tensor(
        [[0.5, X, X, X], [0.1, 0.2, 0.3, X], [1.0, 1, 1, 1], [0.4, 0.9, 0.7, X]]
    )
    trained.advantages = torch.tensor(
        [[-0.5, X, X, X], [-1.0, 2, -1, 9], [0.0, 0, 0, 0], [-0.5, 0, 0, 9]]
    )
    trained.old_logprobs = torch.zeros(4, 4)
    trained.measured = torch.tensor([True, True, False, True])
    trained.sampler_logprobs[0] = torch.tensor([-math.log(5), X, X, X])  # pi_old / sampler = 5
    trained.sampler_logprobs[1, 1] = math.log(2)  # a half
    trained.sampler_logprobs[3, 3:] = X
    updates = [
        {"signal": 3, "clipped": 1, "kl": 0.2, "ratio": [1.4, 0.6], "grad_norm": 3.0},
        {"signal": 6, "clipped": 2, "kl": 0.3, "ratio": [1.0], "grad_norm": None},
        {"signal": 1, "clipped": 0, "kl": 0.0, "ratio": [], "grad_norm": 5.0},
    ]
    for said, bad_rows in zip(updates, ([], [1, 3], []), strict=True):
        said["bad_rows"], said["moved"] = bad_rows, not bad_rows
    return trained, Rollout.join([first, second]), updates


EXPECTED = {
    "reward": (1 + 0.38 + 0.4 - 1 + 0 + 0) / 6,  # all sampled
    "accuracy": 3 / 6,  # all sampled
    "accuracy_trained": 1 / 4,
    "entropy": (0.5 + 0.1 + 0.2 + 0.3 + 4 * 1 + 0.4 + 0.9 + 0.7)
    / 11,  # tokens of the rows trained on
    "kl": (0.2 + 0.3 + 0.0) / 10,  # over the tokens with an advantage of all updates
    "clip_frac": (1 + 2 + 0) / 10,
    "ratio_first": (1.4 + 0.6 + 1.0) / 3,
    "ratio_first_max": 0.4,
    "sampler_kl": (5 - 1 - math.log(5) + 0.5 - 1 + math.log(2))
    / 7,  # without the row that was not measured
    "sampler_ratio_max": 5,
    "grad_norm": (3 + 5) / 2,  # of the updates that were made
    "length": (1 + 3 + 1 + 3 + 4 + 3) / 6,  # all sampled
    "length_wrong": (3 + 4 + 3) / 3,  # all sampled
    "truncated": 1 / 6,  # all sampled
    "zero_std": 1 / 3,  # all sampled: the last group; the first is all right, its rewards differ
    "sign_flip": 2 / 11,  # trained on: a right token with A < 0, a wrong one with A > 0
    "skipped": 1,  # an update with two rows to blame is one update
    "prompts": 3,  # all sampled
}


@pytest.mark.parametrize("key", EXPECTED)
def test_each_statistic_of_a_rollout_by_hand(key):
    assert metrics_line(*hand_made(), G)[key] == pytest.approx(EXPECTED[key], abs=1e-6)


def test_the_line_has_these_keys_and_no_others():
    assert list(metrics_line(*hand_made(), G)) == list(EXPECTED)


def test_no_two_expected_statistics_are_equal_so_none_can_stand_in_for_another():
    assert len({round(value, 6) for value in EXPECTED.values()} - {1.0}) == len(EXPECTED) - 2


def test_sign_flip_of_an_advantage_per_sequence_counts_its_tokens():
    trained, every, updates = hand_made()
    trained.advantages = torch.tensor([-0.5, -1.0, 0.0, 2.0])  # row 0 is right, row 3 wrong
    assert metrics_line(trained, every, updates, G)["sign_flip"] == pytest.approx(4 / 11)


def test_what_no_update_measured_is_null_and_no_signal_is_0():
    trained, every, updates = hand_made()
    nothing = {"signal": 0, "clipped": 0, "kl": 0.0, "ratio": [], "grad_norm": None, "bad_rows": []}
    line = metrics_line(trained, every, [nothing], G)
    assert line["ratio_first"] is line["ratio_first_max"] is line["grad_norm"] is None
    assert line["kl"] == line["clip_frac"] == line["skipped"] == 0


def test_a_ratio_that_is_nan_is_not_hidden_by_larger_ones():
    assert math.isnan(records.furthest_from_1([1.0, math.nan, 2.0]))
    assert records.furthest_from_1([1.0, 0.5, 1.25]) == 0.5


# ---- samples.jsonl -------------------------------------------------------------------------------


def test_a_sample_line_has_the_tokens_that_are_on_and_correctness_beside_the_reward():
    trained, _, _ = hand_made()
    trained.logprobs = torch.arange(16.0).view(4, 4) / -7
    trained.old_logprobs = torch.arange(16.0).view(4, 4) / -8
    trained.rewards[0] = 0.3  # right, and punished
    tokenizer = SimpleNamespace(bos_token_id=None, pad_token_id=None)
    tokenizer.decode = lambda ids, **_: "".join(f"<{token}>" for token in ids)
    lines = sample_lines(7, trained, [0, 3], tokenizer, skipped=True)
    assert lines[0] == {
        "step": 7,
        "prompt": "q1",
        "completion": "text 2",
        "answer": "#### 1",
        "right": True,
        "reward": pytest.approx(0.3),
        "tokens": ["<6>"],
        "advantages": [-0.5],
        "logprobs": [0.0],
        "old_logprobs": [0.0],
        "entropy": [0.5],
        "skipped": True,
    }
    assert lines[1]["right"] is False and lines[1]["tokens"] == ["<4>", "<5>", "<6>"]
    assert lines[1]["logprobs"] == [-1.714286, -1.857143, -2.0]  # 12 / 7, ..., six digits
    assert lines[1]["old_logprobs"] == [-1.5, -1.625, -1.75]
    assert lines[1]["entropy"] == pytest.approx([0.4, 0.9, 0.7])
    assert lines[1]["advantages"] == [-0.5, 0, 0]
    trained.advantages = torch.tensor([0.25, 0.0, 0.0, -0.25])
    assert sample_lines(7, trained, [3], tokenizer)[0]["advantages"] == [-0.25] * 3
    assert "skipped" not in sample_lines(7, trained, [3], tokenizer)[0]


@pytest.mark.parametrize(
    ("right", "rows"),
    [
        ([1, 0, 0, 1, 1, 1], [2, 3]),  # the last group that is mixed
        ([1, 1, 0, 0, 0, 0], [4, 5]),  # none is: the last
        ([1, 0, 1, 1, 0, 0], [0, 1]),
    ],
)
def test_the_group_to_show_is_mixed_by_correctness(right, rows):
    shown = SimpleNamespace(prompts=[0] * 6, right=torch.tensor(right), rewards=torch.arange(6))
    assert list(group_to_show(shown, G)) == rows


# ---- the step's own keys -------------------------------------------------------------------------


class Tokenizer:
    chat_template = bos_token_id = pad_token_id = None

    @staticmethod
    def decode(ids, **_):
        return f"#### {ids[0]}\n" if ids else ""


def trainer(*args):
    """A Trainer of a tiny model whose problems have the answer 7; prompts 2, groups of 4."""
    common = "--preset tiny --prompts 2 --group-size 4 --updates 2 --max-new-tokens 3 --device cpu"
    o = fill(parse([*common.split(), "--dtype", "fp32", *args]))
    problems = [{"question": str(i), "answer": "#### 7", "prompt_ids": [i]} for i in range(8, 14)]
    generation = {"max_new_tokens": 3, "eos_ids": [1], "pad_id": 0}
    return train.Trainer(o, tiny_model(), Tokenizer, generation, problems)


def sampled_by_hand(t, monkeypatch, lengths=(3, 2, 1, 3, 2, 3, 3, 1)):
    """Trainer.sample gives eight rows of these lengths; a row is right if its first token is 7."""
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    completions = torch.tensor([[7, 5, 1], [8, 1, 0], [1, 0, 0], [9, 9, 9]] * 2)

    def sample(prompts, n):
        assert len(prompts) == 2 and n == 4
        rows = [prompt for prompt in prompts for _ in range(n)]
        return Rollout(
            rows,
            completions.clone(),
            mask.clone(),
            torch.zeros(8, dtype=torch.bool),
            torch.zeros(mask.shape),
            torch.zeros(mask.shape),
        )

    monkeypatch.setattr(t, "sample", sample)


def test_times_rate_and_memory_by_hand(monkeypatch):
    t = trainer()
    sampled_by_hand(t, monkeypatch)
    clock = iter([100.0, 102.5, 108.5])  # started, rewarded, done
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(train, "peak_mib", lambda device: (device.type, 321.0))
    line, _, _ = t.step(2)
    assert (line["phase"], line["step"]) == ("train", 2)
    assert line["lr"] == pytest.approx(1e-4 * 2 / 5)  # the second of five steps of warm-up
    assert (line["rollout_s"], line["update_s"]) == (2.5, 6.0)
    assert line["tokens_per_s"] == pytest.approx(18 / 8.5)
    assert line["peak_mib"] == ("cpu", 321.0)
    own = ["lr", "rollout_s", "update_s", "tokens_per_s", "peak_mib"]
    assert list(line) == ["phase", "step", *EXPECTED, *own]


@pytest.mark.parametrize(
    ("step", "warmup", "share"), [(1, 5, 0.2), (5, 5, 1), (9, 5, 1), (1, 0, 1), (1, 1, 1)]
)
def test_learning_rate_rises_over_the_warm_up_and_stays(step, warmup, share, monkeypatch):
    t = trainer("--warmup", str(warmup), "--lr", "0.01")
    sampled_by_hand(t, monkeypatch)
    line, _, _ = t.step(step)
    assert line["lr"] == pytest.approx(0.01 * share)
    assert t.updater.optimizer.param_groups[0]["lr"] == line["lr"]


def test_peak_mib_is_the_process_high_water_mark_or_cuda_s_allocator(monkeypatch):
    status = Path("/proc/self/status")
    if status.exists():
        (kib,) = (x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        assert peak_mib(torch.device("cpu")) == pytest.approx(int(kib) / 1024, rel=0.05)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    assert peak_mib(torch.device("cuda")) == 3


# ---- what the step does with its options ---------------------------------------------------------


def test_epochs_is_how_often_each_mini_batch_is_trained_on(monkeypatch):
    t = trainer("--epochs", "3")
    sampled_by_hand(t, monkeypatch)
    calls = []
    real = t.updater.update

    def recorded(rollout, rows, on_policy):
        calls.append((rows.tolist(), on_policy))
        return real(rollout, rows, on_policy)

    monkeypatch.setattr(t.updater, "update", recorded)
    t.step(1)
    assert [rows for rows, _ in calls] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    assert [first for _, first in calls] == [True] + [False] * 5


def test_options_of_the_advantages_and_correctness_reach_them(monkeypatch):
    given = ["--algo", "gtpo", "--option", "alpha2=0.7", "--option", "normalize=joint"]
    t = trainer(*given, "--overlong-cache", "3")
    sampled_by_hand(t, monkeypatch)
    _, rollout, _ = t.step(1)
    assert rollout.right.tolist() == [1, 0, 0, 0] * 2
    assert rollout.rewards[0] == 0  # right, at the limit of three tokens: punished by 1
    common = {"entropy": rollout.entropy, "mask": rollout.mask}
    options = {"right": rollout.right, "alpha2": 0.7, "normalize": "joint"}
    want = gtpo.advantages(rollout.rewards, 4, **common, **options)
    assert torch.equal(rollout.advantages, want)
    for name in options:
        fewer = {key: value for key, value in options.items() if key != name}
        other = gtpo.advantages(rollout.rewards, 4, **common, **fewer)
        assert not torch.equal(want, other), name


def test_options_of_the_loss_reach_it(monkeypatch):
    t = trainer("--algo", "grpo", "--option", "eps_low=0.05", "--option", "eps_high=0.06")
    sampled_by_hand(t, monkeypatch)
    seen = []

    def loss(*args, **options):
        seen.append(options)
        return real(*args, **options)

    real = t.algo.loss
    monkeypatch.setattr(t.algo, "loss", loss)
    t.step(1)
    assert seen == [{"eps_low": 0.05, "eps_high": 0.06}] * 2


def test_dynamic_sampling_goes_by_correctness_where_the_reward_is_shaped(monkeypatch):
    """An all-right group with a punished row makes way; a mixed one of equal rewards stays."""
    t = trainer("--dynamic-sampling", "1")
    punished = [(1.0, 1.0)] * 3 + [(1.0, 0.2)]
    mixed = [(1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    last = [(0.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    queue = iter(punished + mixed + last)
    monkeypatch.setattr(t.grader, "reward", lambda *_: (*next(queue), {}))
    rollout, every = t.sample_and_reward()
    assert list(zip(rollout.right.tolist(), rollout.rewards.tolist(), strict=True)) == mixed + last
    assert len(every.prompts) == 8 + 4


# ---- ratios before the first update --------------------------------------------------------------


def test_noise_that_cancels_in_the_mean_ratio_shows_in_the_largest(monkeypatch):
    """Log-ratios of +-0.05: the mean ratio is cosh 0.05 = 1.00125, the largest is off by 0.0513."""
    t = trainer()
    sampled_by_hand(t, monkeypatch, [2] * 8)

    def noisy(model, prompts, completions, mask, **options):
        logprobs, entropy = token_logprobs(model, prompts, completions, mask, **options)
        noise = torch.tensor([0.05, -0.05, 0.0]) * torch.is_grad_enabled()
        return logprobs + noise * mask, entropy

    monkeypatch.setattr(update, "token_logprobs", noisy)
    line, _, _ = t.step(1)
    assert line["ratio_first"] == pytest.approx(math.cosh(0.05), abs=1e-5)
    assert line["ratio_first_max"] == pytest.approx(math.exp(0.05) - 1, abs=1e-5)
    assert len(t.watch.see(line)) == 1  # test_symptoms.py has its limits


def test_sampler_correction_weighs_each_row_and_truncates():
    trained, _, _ = hand_made()
    log_ratio = trained.old_logprobs - trained.sampler_logprobs
    want = [
        min(math.prod(math.exp(x) for x in row[:n]), 2.0)
        for row, n in zip(log_ratio.tolist(), (1, 3, 4, 2), strict=True)
    ]
    weights = sampler_weights(trained, 2.0)
    assert want == pytest.approx([2.0, 0.5, 1.0, 1.0]) and weights.tolist() == pytest.approx(want)


@pytest.mark.parametrize("algo", ["tepo", "gtpo"])  # advantages [B] and [B, T]
def test_sampler_correction_multiplies_the_advantages(algo):
    trained, _, _ = hand_made()
    trained.right = trained.rewards = torch.tensor([1.0, 0, 1, 0])
    trained.entropy = trained.entropy.masked_fill(~trained.mask, 0)
    plain = trainer("--algo", algo, "--group-size", "2", "--updates", "1")
    corrected = trainer(
        "--algo", algo, "--group-size", "2", "--updates", "1", "--sampler-correction", "2"
    )
    want = plain.advantages(trained)
    weights = torch.tensor([2.0, 0.5, 1.0, 1.0])
    want = want * (weights if want.ndim == 1 else weights[:, None])
    torch.testing.assert_close(corrected.advantages(trained), want)
    assert want.any()
