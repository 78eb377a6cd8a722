"""ask.py: it draws what the trainer draws, as the run was asked, and a completion harms nothing."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from prompt_folders import chatml_folder
from transformers import AutoTokenizer

from tools import ask
from trainer.decoding import decode
from trainer.policy import load_policy
from trainer.prompts import Prompts
from trainer.sampling import sample

TINY = ROOT / "tiny"
QUESTION = "Sam has 36 cards. He uses 8, wins 1 and loses 8. How many cards now?"  # 21


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def main(capsys, *words):
    """(exit status, stdout, stderr) of ask.py."""
    capsys.readouterr()
    status = ask.main([str(word) for word in words])
    return status, *capsys.readouterr()


def completions(printed):
    """[(label, text, verdict)] of what ask.py prints."""
    found = []
    for part in printed.split("\n\n")[1:]:
        label, *lines, last = part.strip("\n").split("\n")
        assert all(line.startswith("  ") for line in lines)
        found.append((label, "\n".join(line[2:] for line in lines), last))
    return found


@pytest.mark.parametrize(
    ("question", "noted"),
    [
        ("What is 17*23?", True),
        ("Janet has 3 apples", True),
        ("How many cards now?", True),
        ("Sam has 36 cards and 2 pens. How many?", True),
        ("1 + 1", True),
        (QUESTION, False),
        (f" {QUESTION}\n", False),
        ("Mia has 5 eggs. She finds 2 and gets 3. How many eggs now?", False),
    ],
)
def test_tiny_says_what_it_has_learned(question, noted, capsys, monkeypatch, tmp_path):
    """So does a run that began with it, and no other model."""
    monkeypatch.setattr(ask, "Model", lambda _: None)
    monkeypatch.setattr(ask, "ask", lambda *_: None)
    for model in ("tiny", "other"):
        (tmp_path / model).mkdir()
        config = {"options": {"model": model}, "status": "done"}
        (tmp_path / model / "config.json").write_text(json.dumps(config))
    note = f"note: tiny has only learned problems such as: {QUESTION}\n"
    for model in ("tiny", tmp_path / "tiny", tmp_path / "other", "Qwen/Qwen2.5-0.5B"):
        said = note if noted and str(model).endswith("tiny") else ""
        assert main(capsys, model, question) == (0, said, "")


@pytest.fixture(scope="module")
def drawn():
    """{temperature: texts}: what the trainer's sampler draws for QUESTION at seed 3."""
    model, tokenizer, eos_ids, pad_id = load_policy("tiny")
    ids = Prompts(tokenizer).encode([QUESTION])
    how = {"max_new_tokens": 12, "eos_ids": eos_ids, "pad_id": pad_id}
    texts = {}
    for temperature in (0, 1.5):
        torch.manual_seed(3)
        rows = [sample(model, ids, 1, temperature=temperature, **how) for _ in range(3)]
        texts[temperature] = [decode(tokenizer, row)[0] for row in rows]
    return texts


def test_it_prints_what_the_trainer_draws(drawn, capsys):
    words = "--samples 3 --seed 3 --temperature 1.5 --max-new-tokens 12".split()
    status, printed, _ = main(capsys, "tiny", QUESTION, *words)
    greedy, *sampled = completions(printed)
    assert status == 0 and greedy[:2] == ("greedy:", drawn[0][0])
    assert [text for _, text, _ in sampled] == drawn[1.5]
    assert len({greedy[1], *drawn[1.5]}) == 4  # else this test could not tell them apart
    assert sampled[2][0] == "sample 3 of 3, temperature 1.5:"


def test_a_generation_config_changes_nothing(drawn, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    hidden = {"eos_token_id": 0, "pad_token_id": 1, "do_sample": True, "top_k": 1, "top_p": 0.1}
    hidden.update(temperature=0.01, repetition_penalty=3.0)
    (folder / "generation_config.json").write_text(json.dumps(hidden))
    words = "--samples 3 --seed 3 --temperature 1.5 --max-new-tokens 12".split()
    status, printed, _ = main(capsys, folder, QUESTION, *words)
    assert status == 0
    assert [text for _, text, _ in completions(printed)] == drawn[0][:1] + drawn[1.5]


def test_length_end_and_grade_are_printed(capsys):
    # The embedded model's greedy answer is "#### N", EOS: five tokens.
    status, printed, _ = main(capsys, "tiny", QUESTION, "--samples", 0)
    (_, text, last) = completions(printed)[0]
    assert status == 0 and text.startswith("#### ") and last == "[5 tokens, ended]"
    words = QUESTION, "--samples", 0, "--answer"
    number = text.removeprefix("#### ")
    for answer, want in ((number, "ended, right"), (f"1{number}", "ended, wrong")):
        last = completions(main(capsys, "tiny", *words, answer)[1])[0][2]
        assert last == f"[5 tokens, {want}]"
    last = completions(main(capsys, "tiny", *words, number, "--max-new-tokens", 3)[1])[0][2]
    assert last == "[3 tokens, cut off, wrong]"


@pytest.mark.parametrize(
    ("text", "ended", "want"),
    [
        ("so\n#### 21", True, ", right"),
        ("#### 21.00 cards", True, ", right"),
        ("#### 21", False, ", wrong"),  # cut off: more digits might have followed
        ("#### 21\nand", False, ", right"),
        ("#### 12", True, ", wrong"),
        ("it is 21", True, ", wrong: only the lenient rule, which takes the last number, accepts"),
        ("", True, ", wrong"),
    ],
)
def test_the_grade_is_the_rewards_and_names_the_lenient_one(text, ended, want):
    said = ask.verdict(SimpleNamespace(text=text, ended=ended), "21")
    assert said == want or (want.endswith("accepts") and said.startswith(want))
    assert ask.verdict(SimpleNamespace(text=text, ended=ended), None) == ""


# A run is asked as it was trained


@pytest.fixture
def run(tmp_path):
    """A run's folder whose model has a chat template."""
    folder = tmp_path / "run"
    chatml_folder(folder / "model")
    options = {"prompt": "Q: {question}", "chat_template": "auto", "system": "be brief"}
    options.update(template_option={"shout": True}, max_new_tokens=7, temperature=0.5, dtype="fp32")
    config = {"options": {**options, "algo": "gone.py", "seed": 5, "lr": 1.0}, "status": "done"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def asked(monkeypatch):
    """[(model, prompt as text, temperature)] of each completion, which is not drawn."""
    calls = []

    def complete(model, ids, temperature):
        calls.append((model, model.tokenizer.decode(ids), temperature))
        return SimpleNamespace(text="", ended=True, length=1)

    monkeypatch.setattr(ask.Model, "complete", complete)
    return calls


def test_a_run_is_asked_with_its_own_options(run, asked, capsys):
    status, printed, _ = main(capsys, run, "3+4?", "--samples", 1)
    (model, prompt, greedy), (_, again, temperature) = asked
    assert status == 0 and prompt == again and (greedy, temperature) == (0, 0.5)
    assert prompt == (
        "<|im_start|>system\nBE BRIEF<|im_end|>\n<|im_start|>user\nQ: 3+4?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert model.o.max_new_tokens == 7 and f"taking {run / 'model'}" in printed
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.eos_ids


def test_the_command_line_overrides_the_run(run, asked, capsys):
    words = "--samples 1 --temperature 2 --max-new-tokens 9 --system hi --dtype bf16".split()
    status, *_ = main(capsys, run, "--prompt", "{question}!", *words, "3+4?")
    model, prompt, temperature = asked[1]
    assert status == 0 and "\nHI<|im_end|>" in prompt and "user\n3+4?!<|im_end|>" in prompt
    assert (temperature, model.o.max_new_tokens) == (2, 9)
    assert {weight.dtype for weight in model.policy.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("max_new_tokens", "16", 'max_new_tokens = "16"'),
        ("temperature", None, "temperature = null"),
        ("prompt", 5, "prompt = 5"),
        ("template_option", [], "template_option = []"),
    ],
)
def test_a_run_of_another_version_is_refused(run, capsys, name, value, line):
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["options"][name] = value
    path.write_text(json.dumps(config))
    status, _, error = main(capsys, run, "3+4?")
    assert status == 2 and error.startswith(f"ask.py: error: {path}: {line} is no option of this")
    assert error.count("\n") == 1


def test_a_run_that_goes_on_is_asked_at_its_latest_checkpoint(run, asked, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "status": "running"}))
    (run / "checkpoints").mkdir()
    (run / "model").rename(run / "checkpoints" / "step-000020")
    assert f"taking {run}/checkpoints/step-000020" in main(capsys, run, "3+4?")[1]
    assert len(asked) == 5  # one greedy, four sampled


def test_another_model_gets_the_question_alone(run, asked, capsys):
    main(capsys, run / "model", "3+4?", "--samples", 0, "--chat-template", "none")
    main(capsys, "tiny", "3+4?", "--samples", 0)
    assert [prompt for _, prompt, _ in asked] == ["3+4?\n", "3+4?\n"]
    # the embedded model's, and half the context of the other, which is below 512
    context = load_policy("tiny")[0].config.max_position_embeddings
    assert [model.o.max_new_tokens for model, *_ in asked] == [context // 2, 64]


# The question


def test_a_question_comes_from_a_pipe_or_from_the_keyboard(asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2?\n"))
    assert main(capsys, "tiny", "--samples", 0)[0] == 0
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    typed = iter(["3+4?", "5+6?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(capsys, "tiny", "--samples", 0)[0] == 0
    assert [prompt for _, prompt, _ in asked] == ["1+2?\n", "3+4?\n", "5+6?\n"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny", ""], "the question is empty"),
        (["tiny", " \n"], "the question is empty"),
        (["tiny", "a\udcffb"], r"'a\udcffb': not valid UTF-8"),
        (["tiny", "what", "now"], "'now' stands alone: put the question in quotes"),
        ([], "the following arguments are required: MODEL"),
        (["tiny", "x", "--answer", "Paris"], "--answer: no number to compare with in"),
        (["tiny", "x", "--temperature", "0"], "--temperature 0.0: it must be from 1e-06 to"),
        (["tiny", "x", "--temprature", "1"], "no option --temprature; did you mean --temperature?"),
        (["tiny", "x", "--temperature", "1e-45"], "--temperature 1e-45: it must be from 1e-06 to"),
        (["tiny", "x", "--prompt", "\udcff{question}"], r"'\udcff{question}': not valid"),
        (["tiny", "x", "--system", "\udcff"], r"'\udcff': not valid UTF-8"),
        (["tiny", "x", "--samples", "-1"], "--samples -1: 0 to 1000"),
        (["tiny", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: it must be from 1 to"),
        (["tiny", "x", "--prompt", "hello"], "--prompt must hold {question}"),
        (["tiny", "x", "--system", "hello"], "--system needs a chat template"),
        (["tiny", "x", "--device", "tpu"], "--device tpu: auto, cpu, cuda or cuda:N"),
        (["./nope", "x"], "cannot load the model './nope': no such folder."),
        (["nope/nope", "x"], "cannot load the model 'nope/nope' (no local folder, and not found"),
        (
            ["tiny", "x" * 3000],
            "the prompt has 3001 tokens, and the model's context less --max-new",
        ),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    status, _, error = main(capsys, *words)
    assert status == 2 and error.startswith(f"ask.py: error: {line}"), error
    assert error.count("\n") == 1 and "--preset" not in error


def test_an_answer_needs_its_question(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    status, _, error = main(capsys, "tiny", "--answer", 3)
    assert status == 2 and "--answer needs a QUESTION" in error


# A completion is text of unknown content


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\x9b2Jb\x07\x00\x7f", "a\\x9b2Jb\\x07\\x00\\x7f"),
        ("1\r2\x0b3\x0c4\x855\u20286", "1\\r2\\x0b3\\x0c4\\x855\\u20286"),
        ("\u202eabc\u2066\ufeff\U000e0041", "\\u202eabc\\u2066\\ufeff\\U000e0041"),
        ("é € 😀 \u0628 a\u0301 👩\u200d👧\t|", "é € 😀 \u0628 a\u0301 👩\u200d👧\t|"),
        ("x\n[5 tokens, ended, right]", "x\n  [5 tokens, ended, right]"),
    ],
)
def test_what_could_steer_a_terminal_is_escaped(text, want):
    assert ask.harmless(text) == want


def streamed(tokenizer, ids, eos_ids, capsys):
    """(what a Stream printed after each token, the stream)."""
    capsys.readouterr()
    stream = ask.Stream(tokenizer, eos_ids)
    stream.put(torch.tensor([[5, 6]]))  # the prompt is not printed
    printed = [capsys.readouterr().out]
    for token in ids:
        stream.put(torch.tensor([token]))
        printed.append(capsys.readouterr().out)
    stream.end()
    return [*printed, capsys.readouterr().out], stream


def test_a_character_of_several_tokens_is_printed_once_it_is_whole(tokenizer, capsys):
    text = "a€\x1b"  # the tiny tokenizer has a token per byte: 1, 3 and 1 of them
    ids = tokenizer(text).input_ids
    assert len(ids) == 5
    printed, stream = streamed(tokenizer, ids, [0], capsys)
    assert printed == ["  ", "a", "", "", "€", "\\x1b", "\n"]
    assert stream.text == text and not stream.ended and stream.length == 5
    printed, stream = streamed(tokenizer, ids[:2], [0], capsys)  # cut off within the character
    assert printed == ["  ", "a", "", "\ufffd\n"]


def test_what_follows_the_end_is_not_printed_even_if_it_is_no_special_token(tokenizer, capsys):
    a, b = (tokenizer(letter).input_ids[0] for letter in "ab")
    printed, stream = streamed(tokenizer, [a, b, a], [0, b], capsys)
    assert "".join(printed) == "  a\n" and stream.ended
    assert stream.length == 2  # with the EOS, as in metrics.jsonl
