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
from small import change
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tools import ask
from trainer.decoding import decode
from trainer.policy import load_policy
from trainer.prompts import Prompts
from trainer.sampling import sample

TINY = ROOT / "tiny"
LENIENT = "wrong: only the lenient rule, which takes the last number, accepts it"
QUESTION = "Sam has 36 cards. He uses 8, wins 1 and loses 8. How many cards now?"  # 21


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


def test_it_prints_what_the_trainer_draws_whatever_generation_config_says(tmp_path, capsys):
    model, tokenizer, eos_ids, pad_id = load_policy("tiny")
    how = {"max_new_tokens": 12, "eos_ids": eos_ids, "pad_id": pad_id}
    drawn = {}  # {temperature: texts}: what the trainer's sampler draws at seed 3
    for temperature in (0, 1.5):
        torch.manual_seed(3)
        ids = Prompts(tokenizer).encode([QUESTION])
        rows = [sample(model, ids, 1, temperature=temperature, **how) for _ in range(3)]
        drawn[temperature] = [decode(tokenizer, row)[0] for row in rows]
    assert len({drawn[0][0], *drawn[1.5]}) == 4  # else this test could not tell them apart
    shutil.copytree(TINY, tmp_path / "model")
    hidden = {"eos_token_id": 0, "pad_token_id": 1, "do_sample": True, "top_k": 1, "top_p": 0.1}
    hidden.update(temperature=0.01, repetition_penalty=3.0)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(hidden))
    words = "--samples 3 --seed 3 --temperature 1.5 --max-new-tokens 12".split()
    for name in ("tiny", tmp_path / "model"):
        status, printed, _ = main(capsys, name, QUESTION, *words)
        labels, texts, _ = zip(*completions(printed), strict=True)
        assert status == 0 and list(texts) == drawn[0][:1] + drawn[1.5]
        assert labels[::3] == ("greedy:", "sample 3 of 3, temperature 1.5:")


def test_length_end_and_grade_are_printed(capsys):
    """The embedded model's greedy answer is "#### N", EOS: five tokens."""
    words = "tiny", QUESTION, "--samples", 0
    ((_, text, last),) = completions(main(capsys, *words)[1])
    number = text.removeprefix("#### ")
    assert last == "[5 tokens, ended]" and number.isdigit()
    for answer, length, want in (
        (number, 64, "[5 tokens, ended, right]"),
        (f"1{number}", 64, "[5 tokens, ended, wrong]"),
        (number, 3, "[3 tokens, cut off, wrong]"),
    ):
        printed = main(capsys, *words, "--answer", answer, "--max-new-tokens", length)[1]
        assert completions(printed)[0][2] == want


@pytest.mark.parametrize(
    ("text", "truncated", "want"),
    [
        ("#### 21.00 cards", False, "right"),
        ("#### 21", True, "wrong"),  # cut off: more digits might have followed
        ("#### 21\nand", True, "right"),
        ("#### 12", False, "wrong"),
        ("it is 21", False, LENIENT),
    ],
)
def test_the_grade_is_the_rewards_and_names_the_lenient_one(text, truncated, want):
    assert ask.verdict(text, "21", truncated) == want


# A run is asked as it was trained


@pytest.fixture
def run(tmp_path):
    """A run's folder whose model has a chat template."""
    chatml_folder(tmp_path / "run" / "model")
    options = {"prompt": "Q: {question}", "chat_template": "auto", "system": "be brief"}
    options.update(template_option={"shout": True}, max_new_tokens=7, temperature=0.5, dtype="fp32")
    config = {"options": {**options, "algo": "gone.py", "seed": 5, "lr": 1.0}, "status": "done"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


@pytest.fixture
def asked(monkeypatch):
    """[(model, prompt as text, temperature)] of each completion, which is not drawn."""
    calls = []

    def complete(m, ids, temperature):
        calls.append((m, m.tokenizer.decode(ids), temperature))
        return SimpleNamespace(text="", ended=True, ids=[])

    monkeypatch.setattr(ask, "complete", complete)
    return calls


def test_a_run_is_asked_with_its_own_options_unless_the_command_line_says_otherwise(
    run, asked, capsys
):
    status, printed, _ = main(capsys, run, "3+4?", "--samples", 1)
    (m, prompt, greedy), (_, again, temperature) = asked
    assert status == 0 and prompt == again and (greedy, temperature) == (0, 0.5)
    assert prompt == (
        "<|im_start|>system\nBE BRIEF<|im_end|>\n<|im_start|>user\nQ: 3+4?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert m.o.max_new_tokens == 7 and f"taking {run / 'model'}" in printed
    assert m.tokenizer.convert_tokens_to_ids("<|im_end|>") in m.eos_ids
    words = "--samples 1 --temperature 2 --max-new-tokens 9 --system hi --dtype bf16".split()
    status, *_ = main(capsys, run, "--prompt", "{question}!", *words, "3+4?")
    m, prompt, temperature = asked[3]
    assert status == 0 and "\nHI<|im_end|>" in prompt and "user\n3+4?!<|im_end|>" in prompt
    assert (temperature, m.o.max_new_tokens) == (2, 9)
    assert {weight.dtype for weight in m.policy.parameters()} == {torch.bfloat16}


def test_a_run_that_goes_on_is_asked_at_its_latest_checkpoint(run, asked, capsys):
    change(run / "config.json", status="running")
    (run / "checkpoints").mkdir()
    (run / "model").rename(run / "checkpoints" / "step-000020")
    assert f"taking {run}/checkpoints/step-000020" in main(capsys, run, "3+4?")[1]
    assert len(asked) == 5  # one greedy, four sampled


def test_another_model_gets_the_question_alone(run, asked, capsys):
    """tiny says what it has learned, and so does a run that began with it."""
    _, printed, _ = main(capsys, run / "model", "3+4?", "--samples", 0, "--chat-template", "none")
    assert "note" not in printed
    _, printed, _ = main(capsys, "tiny", "3+4?", "--samples", 0)
    assert f"note: tiny has only learned problems such as: {QUESTION}\n" in printed
    assert [prompt for _, prompt, _ in asked] == ["3+4?\n", "3+4?\n"]
    # the embedded model's, and half the context of the other, which is below 512
    context = load_policy("tiny")[0].config.max_position_embeddings
    assert [m.o.max_new_tokens for m, *_ in asked] == [context // 2, 64]
    assert "note" not in main(capsys, "tiny", f" {QUESTION}\n", "--samples", 0)[1]
    change(run / "config.json", options={"model": "tiny"})
    assert ask.run_options(run)[1] and not ask.run_options(run / "model")[1]


# The question


def test_a_question_comes_from_a_pipe_or_from_the_keyboard(asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2?\n"))
    assert main(capsys, "tiny", "--samples", 0)[0] == 0
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    for last in ("", EOFError()):
        typed = iter(["3+4?", last])

        def answer(_, typed=typed):
            found = next(typed)
            if isinstance(found, EOFError):
                raise found
            return found

        monkeypatch.setattr("builtins.input", answer)
        assert main(capsys, "tiny", "--samples", 0)[0] == 0
    assert [prompt for _, prompt, _ in asked] == ["1+2?\n", "3+4?\n", "3+4?\n"]
    status, _, error = main(capsys, "tiny", "--answer", 3)
    assert status == 2 and "--answer needs a QUESTION" in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny", " \n"], "the question is empty"),
        (["tiny", "a\udcffb"], r"'a\udcffb': not valid UTF-8"),
        (["tiny", "what", "now"], "'now' belongs to no option"),
        ([], "the following arguments are required: MODEL"),
        (["tiny", "x", "--answer", "Paris"], "no number to compare with in"),
        (["tiny", "x", "--temperature", "0"], "--temperature 0.0: it must be from 1e-06 to"),
        (["tiny", "x", "--temprature", "1"], "no option --temprature; did you mean --temperature?"),
        (["tiny", "x", "--samples", "-1"], "--samples -1: 0 to 1000"),
        (["tiny", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: it must be from 1 to"),
        (["tiny", "x", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["tiny", "x", "--prompt", "hello"], "--prompt must hold {question}"),
        (["tiny", "x", "--system", "hello"], "--system needs a chat template"),
        (["tiny", "x", "--device", "tpu"], "--device tpu: auto, cpu, cuda or cuda:N"),
        (["./nope", "x"], "cannot load the model './nope': no such folder."),
        (["nope/nope", "x"], "cannot load the model 'nope/nope' (no local folder, and not found"),
        (["tiny", "x" * 3000], "every prompt fills the model's context of"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    status, _, error = main(capsys, *words)
    assert status == 2 and error.startswith(f"ask.py: error: {line}"), error
    assert error.count("\n") == 1 and "--preset" not in error


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", "16"), ("temperature", None), ("template_option", [])]
)
def test_a_run_of_another_version_is_refused(run, capsys, name, value):
    options = json.loads((run / "config.json").read_text())["options"]
    change(run / "config.json", options={**options, name: value})
    status, _, error = main(capsys, run, "3+4?")
    line = f"ask.py: error: {run / 'config.json'}: {name} = {json.dumps(value)} is no option of"
    assert status == 2 and error.startswith(line) and error.count("\n") == 1


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


def test_a_character_is_printed_once_it_is_whole_and_an_eos_never(capsys):
    """... although `b` is no special token. The tiny tokenizer has a token per byte."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "a€\x1b"  # of 1, 3 and 1 bytes
    ids = tokenizer(text).input_ids
    printed, stream = streamed(tokenizer, ids, [0], capsys)
    assert printed == ["", "a", "", "", "€", "\\x1b", "\n"]
    assert stream.text == text and not stream.ended
    printed, stream = streamed(tokenizer, ids[:2], [0], capsys)  # cut off within the character
    assert printed == ["", "a", "", "\ufffd\n"]
    a, b = (tokenizer(letter).input_ids[0] for letter in "ab")
    printed, stream = streamed(tokenizer, [a, b], [0, b], capsys)
    assert "".join(printed) == "a\n" and stream.ended and len(stream.ids) == 2


def test_a_line_keeps_the_space_it_begins_with(capsys):
    """SentencePiece's decoders strip a first space; transformers.TextStreamer loses it."""
    vocabulary = {"▁a": 0, "\n": 1, "▁": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    printed, _ = streamed(tokenizer, [0, 1, 2, 0], [9], capsys)
    assert "".join(printed) == "a\n    a\n"  # two of ours, two of the completion
