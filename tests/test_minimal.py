"""minimal.py is the specification of train.py: from one seed both compute the same numbers."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from prompt_folders import chatml_folder
from safetensors.torch import load_file, save_file
from small import change, copy_tiny

import minimal
import train
from run import start
from run.checks import fill
from run.options import DEFAULTS
from run.parser import parse
from tiny.problems import problems
from trainer import grading
from trainer.methods import ALGORITHMS, MORE

METRICS = ("reward", "accuracy", "entropy", "kl", "clip_frac", "grad_norm", "length", "truncated")
# 16 completions per step, and 4 updates of one group each.
STEP = "--prompts 4 --group-size 4 --max-new-tokens 8 --steps 4 --lr 2e-5 --temperature 0.9"
OTHER = "--sample-batch 8 --micro-batch 3"
HELD_OUT = {"question": "How many?", "answer": "1000000"}
PATTERN = "1001 0110 1000 0111  0000 1001 0011 1010"  # what is right in two steps


class Correct:
    """In place of rewards.correct: says by turns what is right, and keeps what it was asked.

    In every other step a group is all wrong. It is the first: where a later mini-batch has no
    advantages, rounding decides what KL-Cov does, whose |log w| has a kink at w = 1.
    """

    def __init__(self):
        self.asked = []  # of training

    def __call__(self, text, answer, truncated):
        if answer == HELD_OUT["answer"]:  # minimal.py evaluates, before and after training
            return 1.0
        self.asked.append((text, answer, truncated))
        return float(PATTERN.replace(" ", "")[(len(self.asked) - 1) % 32])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of eleven problems and one that is held out."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in {"train": problems(11, seed=1, split="train"), "test": [HELD_OUT]}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def loaded(data):
    """What train.py loads for the embedded model: without a random number, as minimal.py does."""
    o = fill(parse(f"--preset tiny --data {data} {STEP}".split()))
    result = start.set_up(o)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(o.seed).get_state())
    return result


@pytest.fixture(scope="module")
def shallow(data, tmp_path_factory):
    """(options, what train.py loads) for the first layer of the embedded model: half the time."""
    folder = copy_tiny(tmp_path_factory.mktemp("shallow") / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not re.search(r"layers\.[12]\.", name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    line = f"--model {folder} --data {data} {STEP} --prompt {{question}} --updates 4 --warmup 5"
    return line, start.set_up(fill(parse(f"--preset tiny {line}".split())))


def run_minimal(monkeypatch, tmp_path, line):
    """(the lines of training, the trained model, what was asked of `correct`)"""
    monkeypatch.setattr(minimal, "correct", Correct())
    log = tmp_path / "log.jsonl"
    model = minimal.main([*line.split(), "--log", str(log)])
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [row["phase"] for row in lines] == ["eval", *["train"] * (len(lines) - 2), "eval"]
    return lines[1:-1], model, minimal.correct.asked


def run_trainer(monkeypatch, loaded, line):
    """The same of train.py, without its evaluations."""
    monkeypatch.setattr(grading, "correct", Correct())
    o = fill(parse(f"--preset tiny {line}".split()))
    model, tokenizer, generation, train_problems, _ = loaded
    trainer = train.Trainer(o, copy.deepcopy(model), tokenizer, generation, train_problems)
    torch.manual_seed(o.seed)
    lines = [trainer.step(step)[0] for step in range(1, o.steps + 1)]
    return lines, trainer.model, grading.correct.asked


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def assert_same(got, want, started):
    assert got[2] == want[2]  # completions, answers, truncation
    for line, other in zip(got[0], want[0], strict=True):
        for name in set(METRICS) & set(other):
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
        assert line["kl"] == pytest.approx(other["kl"], rel=0.01, abs=1e-9)
    # AdamW divides by the gradient's size: where that is rounding, a weight may move by 2 lr.
    moved, difference = weights(want[1]) - weights(started), weights(got[1]) - weights(want[1])
    assert moved.abs().max() > 3e-5 and difference.abs().max() < 1e-5
    assert difference.norm() < 0.004 * moved.norm()


@pytest.mark.parametrize("algo", [*ALGORITHMS, *MORE])
def test_minimal_and_train_compute_the_same(algo, shallow, tmp_path, monkeypatch):
    line, loaded = f"{shallow[0]} --algo {algo}", shallow[1]
    want = run_minimal(monkeypatch, tmp_path, line + " --micro-batch 32")
    assert_same(run_trainer(monkeypatch, loaded, f"{line} {OTHER}"), want, loaded[0])
    if algo in ALGORITHMS:
        assert_same(run_trainer(monkeypatch, loaded, line), want, loaded[0])


def test_with_their_defaults_they_compute_the_same(data, loaded, tmp_path, monkeypatch):
    """On the embedded model: lr, updates, warm-up and prompt are those of the presets."""
    line = f"--data {data} {STEP}"
    want = run_minimal(monkeypatch, tmp_path, line)
    assert_same(run_trainer(monkeypatch, loaded, line), want, loaded[0])


OWN = """
from grpo import k3, prepare, sequence_mean

def loss(logprobs, old_logprobs, advantages, mask, *, beta=0.1, ref_logprobs=None, entropy=None,
         old_entropy=None, completions=None, right=None, history=None, max_length=0):
    logp, old, A, on, ref = prepare(logprobs, old_logprobs, advantages, mask, ref=ref_logprobs)
    scale = (1 + entropy - old_entropy) * (1 + completions % 3) * (1 + right[:, None])
    scale = scale / max_length * (1 + sum(history))
    return sequence_mean(beta * k3(ref, logp) - scale * (logp - old).exp() * A, on)
"""


def test_a_file_of_ones_own_is_handed_the_same(data, loaded, tmp_path, monkeypatch):
    """Without advantages of its own, and with a KL term that it switches on by its default."""
    own = tmp_path / "grpo.py"  # not ours
    own.write_text(OWN)
    line = f"--algo {own} --data {data} {STEP}"
    want = run_minimal(monkeypatch, tmp_path, line)
    lines = want[0]
    for line_of_step in lines:
        del line_of_step["clip_frac"]  # train.py takes it without the KL term
    assert_same(run_trainer(monkeypatch, loaded, line), want, loaded[0])


def test_a_model_with_a_chat_template_is_asked_and_trained_the_same(data, tmp_path, monkeypatch):
    """As Qwen2.5-0.5B it has two EOS: that of its config, and the end of a turn in its template."""
    folder = chatml_folder(tmp_path / "model")
    line = f"--algo tepo --model {folder} --data {data} {STEP} --steps 2"
    line += " --prompt {question}=? --updates 4 --warmup 5"
    want = run_minimal(monkeypatch, tmp_path, line + " --micro-batch 32")
    loaded = start.set_up(fill(parse(f"--preset tiny {line}".split())))
    _, tokenizer, generation, train_problems, _ = loaded
    assert generation["eos_ids"] == want[1].generation_config.eos_token_id
    assert [tokenizer.decode(i) for i in generation["eos_ids"]] == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.decode(train_problems[0]["prompt_ids"]).endswith(
        "=?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert_same(run_trainer(monkeypatch, loaded, line), want, loaded[0])


def test_the_defaults_are_those_of_the_presets_of_train():
    """But for the micro-batch, which train.py chooses, and the log."""
    for name, tiny, other, meaning in minimal.OPTIONS:
        assert meaning
        if name not in ("micro_batch", "log"):
            assert (tiny, other) == (DEFAULTS["tiny"][name], DEFAULTS["gsm8k"][name])


def test_a_step_is_short_enough_to_be_read(monkeypatch):
    """Step 2 of GRPO with the defaults: at most 45 functions and 220 lines of ours, in 5 files."""
    seen = set()

    def trace(frame, event, _):
        path = frame.f_code.co_filename
        if not path.startswith(str(ROOT)) or "site-packages" in path or path == __file__:
            return None  # a venv may lie within the project
        seen.add((path, frame.f_code, frame.f_lineno))
        return trace

    step = minimal.step

    def traced(*args):
        seen.clear()  # those of step 1
        sys.settrace(trace)
        try:
            return step(*args)
        finally:
            sys.settrace(None)

    monkeypatch.setattr(minimal, "step", traced)
    minimal.main("--algo grpo --steps 2 --eval-n 1".split())
    files = {path for path, _, _ in seen}
    functions = {
        code for _, code, _ in seen if not code.co_name.startswith("<")
    }  # no comprehension
    lines = {(path, line) for path, _, line in seen}
    assert len(files) <= 5 and 20 < len(functions) <= 45 and 100 < len(lines) <= 220
    assert len(Path(minimal.__file__).read_text().splitlines()) <= 250
