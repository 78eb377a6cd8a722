"""train.py from outside, as a user runs it, and those parts of a step that only show inside."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import child
import pytest
import torch
from conftest import ROOT, tiny_model

import grpo
import train
from rewards import group_overlong_penalty
from run import evaluation, session, start
from run.algorithm import checked_options, load_algorithm
from run.checks import fill
from run.options import DEFAULTS
from run.parser import parse
from trainer import grading
from trainer.bf16 import sampling_copy
from trainer.methods import ALGORITHMS, MORE, inputs, keywords

# A step that takes a second: 2 prompts x 4 completions of 12 tokens, 2 updates of 4 rows each.
SMALL = """--preset tiny --prompts 2 --group-size 4 --updates 2 --max-new-tokens 12
    --eval-n 8 --k 2 --samples-every 1""".split()
# What each line of metrics.jsonl must hold.
TRAIN_KEYS = """phase step reward accuracy entropy kl clip_frac ratio_first grad_norm length
    truncated zero_std lr rollout_s update_s tokens_per_s peak_mib""".split()
EVAL_KEYS = "phase step accuracy accuracy_lenient ci95 avg_at_k pass_at_k k n".split()


def command(*args):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=240)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_trains_two_steps(tmp_path):
    """With one advantage per token; below, all methods in process."""
    algo, out = "gtpo", tmp_path / "run"
    done = command("--algo", algo, "--steps", 2, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == "loading torch and transformers" and second.startswith("preset tiny (as asked)")
    assert "held-out problems" in done.stdout
    lines = read(out / "metrics.jsonl")
    assert [line["phase"] for line in lines] == ["eval", "train", "train", "eval"]
    for line in lines:
        assert set(line) >= set(TRAIN_KEYS if line["phase"] == "train" else EVAL_KEYS)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    assert config["status"] == "done" and config["options"]["algo"] == algo
    assert config["versions"]["torch"]
    held_out = read(out / "held_out.jsonl")  # the first four problems, before and after training
    assert [line["step"] for line in held_out] == [0] * 4 + [2] * 4
    assert [line["prompt"] for line in held_out[:4]] == [line["prompt"] for line in held_out[4:]]
    for line in held_out:
        assert len(line["tokens"]) == len(line["logprobs"]) == len(line["entropy"]) > 0
        assert max(line["logprobs"]) <= 0 and line["right"] in (True, False)
        assert "".join(line["tokens"]).removesuffix("<|endoftext|>") == line["completion"]
    samples = read(out / "samples.jsonl")
    assert len(samples) == 8 and {s["step"] for s in samples} == {1, 2}
    for s in samples:
        lengths = [len(s[key]) for key in ("advantages", "logprobs", "old_logprobs", "entropy")]
        assert lengths == [len(s["tokens"])] * 4 and lengths[0] > 0
        assert "".join(s["tokens"]).removesuffix("<|endoftext|>") == s["completion"]
    words = ["--eval-only", "--model", out / "model", "--eval-n", 4, "--out", tmp_path / "eval"]
    again = command(*words, "--preset", "tiny")
    assert again.returncode == 0 and json.loads((tmp_path / "eval/eval.json").read_text())["n"] == 4


@pytest.mark.parametrize(
    "argv, cuda, told",
    [
        ("", False, "tiny (no CUDA GPU was found): tiny on tiny; --preset gsm8k"),
        ("", True, "gsm8k (a CUDA GPU was found)"),
        ("--eval-only --data gsm8k", False, "gsm8k (for --eval-only on GSM8K)"),
        ("--eval-only --data gsm8k", True, "gsm8k (a CUDA GPU was found)"),
        ("--preset gsm8k", False, "gsm8k (as asked)"),
    ],
)
def test_a_run_says_why_it_has_its_preset(argv, cuda, told, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(start, "why_no_gpu", lambda: "no CUDA GPU was found")
    start.chosen(parse(argv.split()))
    assert capsys.readouterr().out.startswith(f"preset {told}")


# For each method an option that is not its default.
OPTIONS = {
    "tepo": ("kl_coef", 0.1),
    "grpo": ("beta", 0.1),
    "dapo": ("eps_high", 0.3),
    "gspo": ("eps_low", 0.1),
    "gtpo": ("normalize", "joint"),
    "grpo_s": ("eps_low", 0.1),
    "trgrpo": ("reading", "outside"),
    "clip_cov": ("cov_ratio", 0.1),
    "kl_cov": ("cov_ratio", 0.2),
    "ce_gppo": ("beta1", 0.75),
    "aspo": ("cap", 2.0),
    "dppo": ("divergence", "kl"),
    "reweight": ("alpha", 0.3),
    "raft": ("variant", "reinforce_rej"),
    "ha_dw": ("window", 2),
    "ktae": ("ignore_id", 0),
    "dhpo": ("weight", 0.25),
    "dr_grpo": ("max_length", 100),
    "rloo": ("eps_high", 0.3),
    "cispo": ("eps_high", 0.2),
    "sapo": ("tau_neg", 2.0),
    "gmpo": ("eps_low", 0.2),
    "luspo": ("eps_low", 1e-3),
    "vespo": ("k_pos", 3.0),
    "maxrl": ("eps_high", 0.3),
    "opo": ("eps_high", 0.3),
    "dro": ("tau", 0.5),
    "topr": ("sequence", True),
}


@pytest.mark.parametrize("algo", [*ALGORITHMS, *MORE])
def test_all_28_train_two_steps_with_an_option(algo, tmp_path, monkeypatch):
    """In this process, without pictures, and with rewards that differ within a group."""
    monkeypatch.setattr(grading, "correct", child.parity)
    monkeypatch.setattr(train, "plot_runs", lambda *_: None)
    (name, value), out = OPTIONS[algo], tmp_path / "run"
    words = f"--algo {algo} --option {name}={value} --steps 2 --eval-n 4 --k 0 --save-every 0"
    assert train.main([*SMALL, *words.split(), "--out", str(out)]) == 0
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["algo"], options["option"]) == (algo, {name: value})
    lines = [line for line in read(out / "metrics.jsonl") if line["phase"] == "train"]
    assert len(lines) == 2
    assert lines[0]["ratio_first_max"] < 1e-3  # step 2 may learn from the pass that measures
    for line in lines:
        assert line["skipped"] == 0 and line["grad_norm"] > 0


@pytest.mark.parametrize("given", [(), ("--option", "max_length=5")])
def test_a_keyword_with_a_known_name_is_filled_in(given, tmp_path, monkeypatch):
    """A hand-made method in place of sapo.py: what its functions get in two steps."""
    seen = {"advantages": [], "loss": []}

    def advantages(
        rewards,
        group_size,
        *,
        entropy=None,
        mask=None,
        right=None,
        history=None,
        completions=None,
        max_length=None,
    ):
        seen["advantages"].append(dict(locals()))
        return grpo.advantages(rewards, group_size)

    def loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        *,
        completions=None,
        history=None,
        entropy=None,
        old_entropy=None,
        ref_logprobs=None,
        max_length=0,
    ):
        seen["loss"].append(dict(locals()))
        return grpo.loss(logprobs, old_logprobs, advantages, mask)

    module = SimpleNamespace(advantages=advantages, loss=loss)
    monkeypatch.setitem(sys.modules, "more.sapo", module)
    monkeypatch.setattr(grading, "correct", child.parity)
    t = trainer(tmp_path, "--algo", "sapo", "--lr", "0.01", *given)
    for calls in seen.values():
        calls.clear()  # of try_out
    torch.manual_seed(0)
    (_, first, _), (_, second, _) = t.step(1), t.step(2)
    means = [first.rewards.mean().item(), second.rewards.mean().item()]
    assert [call["history"] for call in seen["advantages"]] == [[], means[:1]]
    assert t.history == means
    for call, rollout in zip(seen["advantages"], (first, second), strict=True):
        for name in ("completions", "mask", "right", "entropy"):
            assert torch.equal(call[name], getattr(rollout, name))
        assert call["max_length"] == (5 if given else 12)  # 12: --max-new-tokens of SMALL
    assert len(seen["loss"]) == 4
    for i, call in enumerate(seen["loss"]):
        rollout, rows = (first, second)[i // 2], slice(4 * (i % 2), 4 * (i % 2) + 4)
        assert torch.equal(call["completions"], rollout.completions[rows])
        assert torch.equal(call["old_entropy"], rollout.entropy[rows])
        # Of the current policy: the same before the first update, another after it.
        assert torch.equal(call["entropy"], call["old_entropy"]) == (i % 2 == 0)
        assert call["history"] == means[: i // 2] and call["ref_logprobs"] is None
        assert call["max_length"] == (5 if given else 12)


def test_each_input_of_the_28_is_filled_in():
    """A keyword without a default that a user could set is one that the trainer knows."""
    ones = torch.ones(2, 1)
    batch = SimpleNamespace(
        mask=ones, completions=ones, right=ones, history=[], entropy=ones, ref_logprobs=ones
    )
    for algo in (*ALGORITHMS, *MORE):
        module = load_algorithm(algo)
        for function in (module.advantages, module.loss):
            given = inputs(function, batch, slice(None), ones, 1)
            for name, parameter in keywords(function).items():
                assert parameter.default is not None or given[name] is not None, (algo, name)


def test_evaluations_draw_before_and_after_and_halve_their_rows(tmp_path, monkeypatch, capsys):
    """Memory for 16 rows: the first evaluation tries 32, four times the step's 8, then 16; the
    others keep 16.
    """
    real, rows = evaluation.evaluate, []

    def small(*args, rows_at_once, **kwargs):
        rows.append(rows_at_once)
        if rows_at_once > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, rows_at_once=rows_at_once, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", small)
    out = tmp_path / "run"
    assert train.main(["--steps", "2", "--eval-every", "1", "--out", str(out), *SMALL]) == 0
    lines = [line for line in read(out / "metrics.jsonl") if line["phase"] == "eval"]
    assert [line["pass_at_k"] is None for line in lines] == [False, True, False]
    assert rows == [32, 16, 16, 16]
    assert "--sample-batch goes from 8 to 4" in capsys.readouterr().out


def test_the_picture_is_drawn_after_an_evaluation_or_when_it_is_a_minute_old(tmp_path):
    o = fill(parse(["--eval-every", "3", "--steps", "7", *SMALL]))
    assert all(session.draws(o, tmp_path, step) for step in range(1, 8))  # there is none yet
    picture = tmp_path / "curves.png"
    picture.touch()
    assert [step for step in range(1, 8) if session.draws(o, tmp_path, step)] == [3, 6, 7]
    old = time.time() - session.PICTURE_AGE - 1
    os.utime(picture, (old, old))
    assert all(session.draws(o, tmp_path, step) for step in range(1, 8))


def trainer(tmp_path, *args):
    """A Trainer on the tiny model, set up as `main` does it, with SMALL and further options."""
    o = fill(parse(["--out", str(tmp_path), *SMALL, *args]))
    model, tokenizer, generation, problems, _ = start.set_up(o)
    return train.Trainer(o, model, tokenizer, generation, problems)


def test_one_seed_has_one_order_of_data_for_every_algorithm(tmp_path):
    orders = []
    for args in (["--algo", "tepo"], ["--algo", "gtpo", "--updates", "1"], ["--seed", "1"]):
        t = trainer(tmp_path, *args)
        t.problems = t.problems[:5]
        drawn = t.next_problems(3) + t.next_problems(4) + t.next_problems(8)
        orders.append([p["question"] for p in drawn])
    assert orders[0] == orders[1] != orders[2]
    for first in (0, 5, 10):  # every pass over the data has each problem once, in a new order
        assert len(set(orders[0][first : first + 5])) == 5
    assert orders[0][:5] != orders[0][5:10]


def test_a_step_is_on_policy_first_and_moves_after(tmp_path):
    words = "--prompts 8 --group-size 8 --updates 4 --max-new-tokens 40".split()
    t = trainer(tmp_path, *words)
    torch.manual_seed(0)
    line, rollout, bad = t.step(1)
    assert line["ratio_first"] == pytest.approx(1, abs=1e-4) and not bad
    assert line["lr"] == pytest.approx(DEFAULTS["tiny"]["lr"] / DEFAULTS["tiny"]["warmup"])
    assert 0 < line["kl"] < 0.1 and not torch.equal(rollout.logprobs, rollout.old_logprobs)
    assert torch.equal(rollout.logprobs[:16], rollout.old_logprobs[:16])  # the first mini-batch
    assert line["length"] == pytest.approx(rollout.mask.sum(1).float().mean().item())
    assert line["accuracy"] == pytest.approx(rollout.right.mean().item())
    assert line["entropy"] == pytest.approx(rollout.entropy[rollout.mask].mean().item())


def fake_rewards(t, monkeypatch, rewards):
    """The next completions get these rewards, one after another, both shaped and unshaped."""
    queue = iter(rewards)
    monkeypatch.setattr(t.grader, "reward", lambda *_: (*(next(queue),) * 2, {}))


def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path, monkeypatch):
    t = trainer(tmp_path, "--dynamic-sampling", "2")
    constant, mixed = [0.0] * 4, [0.0, 1.0, 0.0, 1.0]
    fake_rewards(t, monkeypatch, constant + mixed + [1.0] * 4 + mixed)
    rollout, every = t.sample_and_reward()
    assert rollout.rewards.tolist() == mixed * 2
    assert len(every.prompts) == 16 and t.cursor == 4
    # After two further draws it stops, and a constant group fills the batch.
    fake_rewards(t, monkeypatch, constant * 2 + mixed + constant * 3)
    rollout, every = t.sample_and_reward()
    assert rollout.rewards.tolist() == mixed + constant
    assert len(every.prompts) == 20


def test_a_truncated_completion_earns_nothing_for_a_line_that_is_cut(tmp_path, monkeypatch):
    """All completions are made to read as the right answer, but without a line end.

    So exactly those that ended with EOS before the limit of 8 tokens are right.
    """
    t = trainer(tmp_path, "--prompts", "4", "--max-new-tokens", "8")
    problem = {"answer": "#### 7"}
    assert t.grader.reward("#### 7", problem, 8, True) == (0.0, 0.0, {})  # perhaps cut from #### 72
    assert t.grader.reward("#### 7\n", problem, 8, True) == (1.0, 1.0, {})
    answers = [f"#### {i}" for i in range(len(t.problems))]
    for p, answer in zip(t.problems, answers, strict=True):
        p["answer"] = answer
    monkeypatch.setattr(train, "decode", lambda _, batch: [p["answer"] for p in batch.problems])
    torch.manual_seed(0)
    rollout, _ = t.sample_and_reward()
    assert 0 < rollout.truncated.sum() < len(rollout.truncated)
    assert torch.equal(rollout.right == 1, ~rollout.truncated)


def test_overlong_punishment_is_added_but_is_not_accuracy(tmp_path, monkeypatch):
    t = trainer(tmp_path, "--overlong-cache", "4")
    problem = {"answer": "#### 7"}
    reward = t.grader.reward
    assert reward("#### 7", problem, 8, False) == (1.0, 1.0, {})
    assert reward("#### 7", problem, 10, False) == (1.0, 0.5, {})
    assert reward("#### 8", problem, 13, True) == (0.0, -1.0, {})
    monkeypatch.setattr(grading, "correct", lambda *_: float("nan"))
    with pytest.raises(grading.BadReward, match="so it says"):
        reward("so it says", problem, 1, False)


def test_rewards_that_a_method_cannot_take_stop_the_run_in_a_line(tmp_path, capsys):
    """MaxRL divides by the mean reward; a completion cut at the limit has -1."""
    words = "--algo maxrl --overlong-cache 12 --eval-n 4 --k 0 --out".split()
    assert train.main([*SMALL, *words, str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("train.py: error: MaxRL needs rewards of 0 and 1; the mean of a group")
    assert "when that is mended: " in line and "train.py --resume" in line and "\n" not in line


def test_the_length_punishment_of_a_group_reaches_the_reward_but_is_not_accuracy(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(grading, "correct", lambda *_: 1.0)
    t = trainer(tmp_path, "--group-overlong", "0.75")
    torch.manual_seed(0)
    rollout, _ = t.sample_and_reward()
    lengths = rollout.mask.sum(1).view(-1, t.o.group_size).tolist()
    want = [group_overlong_penalty(group, [1.0] * len(group)) for group in lengths]
    assert (rollout.right == 1).all() and rollout.rewards.min() < 1
    assert torch.equal(rollout.rewards, 1 + torch.tensor(sum(want, [])))


def test_beta_and_the_kl_mask_get_what_they_need(tmp_path):
    for words in ("--algo grpo --beta 0.1", "--algo tepo --option kl_coef=0.1"):
        t = trainer(tmp_path, *words.split())
        torch.manual_seed(0)
        line, rollout, _ = t.step(1)
        assert line["skipped"] == 0 and (rollout.ref_logprobs is not None) == ("--beta" in words)


def test_bf16_samples_from_a_copy_and_trains_fp32(tmp_path):
    words = "--dtype bf16 --prompts 8 --max-new-tokens 40 --lr 1e-6".split()
    t = trainer(tmp_path, *words)
    assert sampling_copy(t.model, t.o.dtype).dtype == torch.bfloat16
    assert t.model.dtype == torch.float32
    before = t.model.lm_head.weight.clone()
    torch.manual_seed(0)
    line, _, _ = t.step(1)
    assert line["ratio_first"] == pytest.approx(1, abs=1e-3)
    # The step is below half a bf16 ulp: bf16 weights would not have moved.
    assert not torch.equal(before, t.model.lm_head.weight)
    copy = sampling_copy(t.model, t.o.dtype)
    assert torch.equal(copy.lm_head.weight, t.model.lm_head.weight.bfloat16())


def test_options_of_an_algorithm_are_typed_and_known():
    typed = {"eps_high": 0.3, "kl_coef": 0.05}
    assert checked_options("tepo", {"eps_high": "0.3", "kl_coef": "0.05"}) == typed
    assert checked_options("trgrpo", {"weight_inside_clip": "true"}) == {"weight_inside_clip": True}
    assert checked_options("dr_grpo", {"max_length": "9"}) == {"max_length": 9}
    assert checked_options("ktae", {"ignore_id": "-2"}) == {"ignore_id": -2}
    typed = {"normalize": "joint", "alpha2": 0.2}
    assert checked_options("gtpo", {"normalize": "joint", "alpha2": "0.2"}) == typed
    for algo, given, message in (
        ("gspo", {"eps_hihg": "1"}, "eps_low=0.0003, eps_high=0.0004"),
        ("gtpo", {"normalize": "no"}, "zeros"),
        ("tepo", {"eps_low": "x"}, "number"),
        ("tepo", {"entropy": "1"}, "no option"),
        ("dapo", {"beta": "1"}, "no option"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_options(algo, given)


def test_a_learning_policy_learns(tmp_path):
    """All parts together: by reward alone, a two-layer model learns to begin with one given token.

    If the sign of any part were wrong, the accuracy could not rise from chance, 1/24, to 0.9.
    """
    model = tiny_model()

    class Tokenizer:
        """The text of a completion is the number of its first token, as a GSM8K answer."""

        chat_template = bos_token_id = pad_token_id = None

        @staticmethod
        def decode(ids, **_):
            return f"#### {(ids or [1])[0]}\n"

    words = "--prompts 4 --group-size 8 --lr 0.01 --max-new-tokens 2 --warmup 0".split()
    o = fill(parse([*SMALL, *words]))
    problems = [{"question": str(i), "answer": "#### 7", "prompt_ids": [i]} for i in range(8, 20)]
    generation = {"max_new_tokens": 2, "eos_ids": [1], "pad_id": 0}
    t = train.Trainer(o, model, Tokenizer, generation, problems)
    torch.manual_seed(0)
    accuracy = [t.step(step)[0]["accuracy"] for step in range(1, 25)]
    assert sum(accuracy[:3]) / 3 < 0.3 and sum(accuracy[-3:]) / 3 > 0.9
