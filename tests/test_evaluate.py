"""Figures that can be trusted: the interval, pass@k and a whole evaluation against values worked by
hand.
"""

import itertools
import json
import shutil

import pytest
import torch
from child import parity
from conftest import ROOT

import train
from run import evaluation, start
from run.checks import fill
from trainer import evaluate, grading
from trainer.logprobs import Layout
from trainer.policy import load_policy
from trainer.prompts import encode_problems
from trainer.rollout import Rollout
from trainer.sampling import completion_mask


# The intervals of Newcombe's comparison of seven methods, Statistics in Medicine 17 (1998), table
# I, his method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes, n, low, high):
    assert evaluate.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluate.wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_pass_at_k():
    """4 completions, 2 right: of the 6 pairs one has none right. In general: the share of subsets
    with a right one.
    """
    assert evaluate.pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


@pytest.fixture(scope="module")
def tiny():
    """(model, tokenizer, generation)"""
    model, tokenizer, eos_ids, pad_id = load_policy("tiny")
    return model, tokenizer, {"max_new_tokens": 12, "eos_ids": eos_ids, "pad_id": pad_id}


def test_evaluate_by_hand(tiny, monkeypatch):
    """Four problems; greedy: right, right but without the marker, wrong, and cut after what looks
    right. Samples: 3, 1, 0 and 0 of 3 are right; the last but one is cut like the greedy one.
    """
    model, tokenizer, generation = tiny
    greedy = ["2+1=3\n#### 3", "2+2=4", "#### 9", "2+2=4\n#### 6"]
    good, bad = "#### {}", "#### 99"
    drawn = [good, good, good, bad, good, "so {}", bad, bad, bad, bad, "", bad]
    drawn = [text.format(3 + i // 3) for i, text in enumerate(drawn)]
    drawn[10] = "#### 6"
    calls = []

    def sample(_, prompts, n, *, temperature, **more):
        texts = greedy if temperature == 0 else drawn
        calls.append((n, temperature, more["max_new_tokens"]))
        cut = 3 if temperature == 0 else 10
        ended = [i != cut for i in range(len(texts))]
        rows = [
            tokenizer(t).input_ids + generation["eos_ids"] * end
            for t, end in zip(texts, ended, strict=True)
        ]
        rows = [
            row + tokenizer("#### 3").input_ids if end else row
            for row, end in zip(rows, ended, strict=True)
        ]
        width = max(map(len, rows))  # what stands after EOS is no part of the completion
        ids = torch.tensor([row + [generation["pad_id"]] * (width - len(row)) for row in rows])
        mask = completion_mask(ids, generation["eos_ids"])
        mask[cut, len(rows[cut]) :] = False
        return Rollout([], ids, mask, ~torch.tensor(ended))

    monkeypatch.setattr(evaluate, "sample", sample)
    problems = [{"prompt_ids": [5], "answer": f"#### {n}"} for n in (3, 4, 5, 6)]
    got = evaluate.evaluate(
        model, tokenizer, problems, k=2, samples=3, temperature=0.7, seed=1, **generation
    )
    assert calls == [(1, 0, 12), (3, 0.7, 12)]
    assert (
        got["accuracy"] == 1 / 4 and got["accuracy_lenient"] == 2 / 4 and got["truncated"] == 1 / 4
    )
    assert got["ci95"] == pytest.approx([0.0456, 0.6994], abs=5e-5)
    assert got["avg_at_k"] == pytest.approx(4 / 12)
    assert got["pass_at_k"] == pytest.approx(
        (1 + 2 / 3 + 0 + 0) / 4
    )  # of 3 with 1 right, 2 of the 3 pairs have it
    assert got["n"] == 4 and got["k"] == 2
    lengths = [len(tokenizer(t).input_ids) + (i < 3) for i, t in enumerate(greedy)]
    assert got["length"] == pytest.approx(sum(lengths) / 4)
    wrong = [n for n, text in zip(lengths, greedy, strict=True) if "#### 3" not in text]
    assert len(wrong) == 3 and got["length_wrong"] == pytest.approx(sum(wrong) / 3)


@pytest.fixture
def by_chance(monkeypatch):
    """About every other text is right, so that the figures depend on what was drawn."""
    monkeypatch.setattr(grading, "correct", parity)


def test_evaluate_leaves_the_generator_alone(tiny, by_chance):
    model, tokenizer, generation = tiny
    problems = [{"question": "Tom has 3 eggs. He buys 2. How many eggs now?", "answer": "5"}]
    problems, _ = encode_problems(tokenizer, problems, "{question}", 100)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = {"k": 2, "samples": 16, "temperature": 1.0, **generation}
    first = evaluate.evaluate(model, tokenizer, problems, seed=1, **figures)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert evaluate.evaluate(model, tokenizer, problems, seed=1, **figures) == first
    assert evaluate.evaluate(model, tokenizer, problems, seed=2, **figures) != first


@pytest.fixture
def test_set(tmp_path):
    rows = [
        {"question": f"Tom has {n} eggs. He buys 2. How many eggs now?", "answer": str(n + 2)}
        for n in range(3, 9)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_eval_only(tiny, by_chance, test_set, tmp_path, capsys):
    """No train split is needed; figures on stdout and in eval.json, a bar on stderr, and nothing
    else is written.
    """
    model, tokenizer, generation = tiny
    out = tmp_path / "out"
    words = ["--eval-only", "--model", "tiny", "--data", str(test_set)]
    words += ["--k", "2", "--eval-samples", "7"]
    words += ["--eval-n", "5", "--max-new-tokens", "12", "--seed", "4", "--out", str(out)]
    assert train.main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no terminal: no bar
    found = json.loads((out / "eval.json").read_text())
    assert [path.name for path in out.iterdir()] == ["eval.json"]
    problems = [json.loads(line) for line in (test_set / "test.jsonl").read_text().splitlines()][:5]
    problems, _ = encode_problems(tokenizer, problems, "{question}", 200)
    want = evaluate.evaluate(
        model,
        tokenizer,
        problems,
        k=2,
        samples=7,
        temperature=1.0,
        seed=10_004,
        layout=Layout(through_head=True, share_prompts=True),  # as the command's
        **generation,
    )
    assert {name: found[name] for name in want} == want
    assert found["options"]["model"] == "tiny" and found["options"]["eval_samples"] == 7
    assert (
        f"{want['accuracy']:.3f} (95%: {want['ci95'][0]:.3f}-{want['ci95'][1]:.3f})" in printed.out
    )
    assert (
        f"pass@2 {want['pass_at_k']:.3f}" in printed.out
        and f"truncated {want['truncated']:.3f}" in printed.out
    )


def test_an_evaluation_is_replaced_only_if_asked_for(test_set, tmp_path, monkeypatch, capsys):
    """... and refused before the model is loaded. A/model and B/model have folders of their own."""
    monkeypatch.chdir(tmp_path)
    for name in "AB":
        ignore = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(ROOT / "tiny", tmp_path / name / "model", ignore=ignore)
    words = "--eval-only --preset tiny --k 0 --eval-n 2 --max-new-tokens 8 --data data".split()
    for name in "AB":
        assert train.main([*words, "--model", f"./{name}/model"]) == 0
    found = sorted((tmp_path / "runs").glob("*/eval.json"))
    names = [path.parent.name for path in found]
    assert names == ["eval-A-model-data-s0", "eval-B-model-data-s0"]
    (found[0].parent / "notes.txt").write_text("mine")
    words += ["--out", str(found[0].parent), "--model", "B/model"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(start, "load_policy", lambda *_: pytest.fail("the model was loaded"))
        assert train.main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "holds an evaluation already: --overwrite" in line
    assert train.main([*words, "--overwrite"]) == 0
    assert json.loads(found[0].read_text())["options"]["model"] == "B/model"
    assert (found[0].parent / "notes.txt").exists()


def test_eval_only_out_of_gpu_memory_is_one_line(test_set, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "evaluate", out_of_memory)
    argv = [
        "--preset",
        "tiny",
        "--eval-only",
        "--data",
        str(test_set),
        "--out",
        str(tmp_path / "out"),
    ]
    assert train.main(argv) == 2
    assert capsys.readouterr().err == (
        "train.py: error: out of GPU memory with 512 rows at once: pass --sample-batch 256\n"
    )


def test_eval_only_goes_by_its_data():
    """Without a GPU the preset is tiny, but GSM8K asked in 64 tokens and without its prompt would
    be no evaluation.
    """
    options = fill({"eval_only": True, "data": "gsm8k", "model": "X"})
    assert options.preset == "gsm8k" and options.max_new_tokens == 512 and "####" in options.prompt


def test_eval_only_in_bf16(test_set, tmp_path, monkeypatch):
    """The weights themselves are bf16, as in the copy that samples in training."""
    seen = []

    def look(model, *_, **__):
        seen.append(model.dtype)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(evaluation, "evaluate", look)
    for dtype in ("bf16", "fp32"):
        words = ["--eval-only", "--preset", "tiny", "--data", str(test_set), "--dtype", dtype]
        assert train.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert seen == [torch.bfloat16, torch.float32] and not (tmp_path / "out").exists()


def test_eval_only_is_refused_before_the_work(test_set, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    words = ["--eval-only", "--model", "tiny", "--data", str(test_set), "--out"]
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        assert train.main([*words, str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("train.py: error: "), error
