"""Errors of the user or the machine: one line that says what to do, status 2, and nothing lost."""

import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import unicodedata

import child
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train
from run import checkpoint, start
from run.checks import fill
from run.commandline import command
from run.options import DEFAULTS
from tiny.problems import problems
from trainer import data, grading, sources
from trainer.methods import ALGORITHMS, MORE
from trainer.policy import load_policy
from trainer.prompts import Prompts, encode_problems

TINY = child.ROOT / "tiny"
# The options of every run here: four steps of four short completions, no evaluation in between.
WORDS = """--preset tiny --steps 4 --prompts 2 --group-size 2 --updates 2 --max-new-tokens 8
    --eval-n 2 --eval-every 0 --k 0""".split()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch, request):
    """No plots, and afterwards the SIGINT handler that pytest had: train.main sets its own."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "plot_runs", lambda *_: None)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "problems.jsonl"
    write(path, problems(12, 0, "train"))
    return path


def write(path, rows):
    """One line per row: a text as it is, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def error_line(capsys, *argv, status=2):
    """The only line on stderr, progress aside, of a run that ends with this exit status."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == status
    return one_line(capsys.readouterr().err)


def one_line(text):
    assert "Traceback" not in text, text
    # Progress, and what a run prints at its start.
    usual = re.compile(r"^$|^(\S+ )?step \d|^(prompt|CPU threads|micro-batch): |are held out$")
    lines = [line for line in text.split("\n") if not usual.search(line)]
    assert len(lines) == 1 and lines[0].startswith("train.py: "), lines
    return lines[0]


# Options


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--algo tpo", "no algorithm 'tpo'; did you mean tepo? There are tepo, grpo,"),
        ("--algo GRPO-S", "did you mean grpo_s?"),
        ("--algo trgpro", "did you mean trgrpo?"),
        ("--algo zzzz", "no algorithm 'zzzz'; There are tepo,"),
        ("--algo zzzz", "gtpo, grpo_s, trgrpo, clip_cov, kl_cov, ce_gppo, aspo, dppo, reweight,"),
        ("--algo cipso", "did you mean cispo?"),
        ("--algo Clip-Cov", "did you mean clip_cov?"),
        ("--algo more.dr_grpo", "did you mean dr_grpo?"),
        ("--group-size 1", "--group-size 1: the least is 2 (one completion has no group"),
        (
            "--prompts 3 --group-size 3 --updates 4",
            "--updates 4 does not divide the 9 completions of a step",
        ),
        ("--updates 0", "--updates 0: the least is 1"),
        ("--temperature 0", "--temperature 0.0: it must be above 0 and finite"),
        ("--temperature nan", "--temperature nan"),
        ("--temperature -1", "--temperature -1.0"),
        ("--temperature 1e-45", "--temperature 1e-45: the least is 1e-06"),
        ("--lr 0", "--lr 0.0"),
        ("--lr inf", "--lr inf"),
        ("--lr 5", "--lr 5.0: AdamW moves"),
        ("--max-grad-norm 0", "--max-grad-norm 0.0"),
        ("--steps 0", "--steps 0: the least is 1"),
        ("--prompts -2", "--prompts -2: the least is 1"),
        ("--epochs 0", "--epochs 0"),
        ("--max-new-tokens -5", "--max-new-tokens -5"),
        ("--eval-n 0", "--eval-n 0"),
        ("--eval-every -1", "--eval-every -1"),
        ("--save-every -1", "--save-every -1"),
        ("--samples-every -1", "--samples-every -1"),
        ("--dynamic-sampling -1", "--dynamic-sampling -1"),
        ("--warmup -1", "--warmup -1"),
        ("--k -1", "--k -1"),
        ("--k 4 --eval-samples 3", "--eval-samples 3 is below --k 4"),
        ("--k 0 --eval-samples 3", "--eval-samples 3 has no effect with --k 0"),
        ("--seed -1", "--seed -1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: it must be below 2**32"),
        ("--micro-batch 0", "--micro-batch 0: a number of rows"),
        ("--sample-batch few", "--sample-batch few"),
        ("--overlong-cache 100 --max-new-tokens 50", "--overlong-cache is over --max-new-tokens"),
        ("--columns question", "--columns question: two names, QUESTION,ANSWER"),
        ("--columns a,b,c", "--columns a,b,c: two names"),
        ("--columns ,b", "--columns ,b: two names"),
        ("--skip-bad-rows", "--skip-bad-rows have no effect with --data tiny"),
        ("--prompt Solve!", "--prompt must hold {question}"),
        ("--dtype fp16", "--dtype fp16: auto, fp32 or bf16"),
        ("--device tpu", "--device tpu: auto, cpu, cuda or cuda:N"),
        ("--device cpu:x", "--device cpu:x"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--preset big", "--preset is auto, tiny or gsm8k, not 'big'"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--step 3", "no option --step; did you mean --steps?"),
        ("--option eps_hgih=0.3", "tepo has no option 'eps_hgih'; it has eps_low=0.2"),
        ("--option eps_high", "--option eps_high=: a finite number"),
        ("--option eps_high=nan", "--option eps_high=nan: a finite number"),
        ("--option eps_high=-1", "--option eps_high=-1: a finite number, not negative"),
        ("--algo dapo --beta 0.1", "dapo has no option 'beta'"),
        ("--algo gtpo --option normalize=sideways", "normalize"),
        ("--algo cispo --option eps=1", "cispo has no option 'eps'; it has eps_low=1.0, eps_high="),
        ("--algo ha_dw --option history=1", "ha_dw has no option 'history'; it has scale=1.5"),
        ("--algo ha_dw --option window=0", "window must be at least 1"),
        ("--algo ha_dw --option window=2.5", "window=2.5: a whole number, not negative"),
        ("--algo dr_grpo --option max_length=-5", "max_length=-5: a whole number, not negative"),
        ("--algo dppo --option divergence=js", "divergence"),
        ("--algo raft --option variant=raft+++", "variant must be"),
    ],
)
def test_nonsense_options(capsys, monkeypatch, tmp_path, words, line):
    """Refused before any model or data set is loaded, and before a folder is made."""
    for name in ("load_policy", "load_problems"):
        monkeypatch.setattr(start, name, lambda *_: pytest.fail("refused only after loading"))
    assert line in error_line(capsys, *WORDS, "--out", tmp_path / "run", *words.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["prompt", "system", "out", "model", "resume", "option"])
def test_bytes_that_are_no_utf8(capsys, name):
    """Python reads such a byte of the command line as half a surrogate pair."""
    line = error_line(capsys, *WORDS, f"--{name}", "a=\udcff{question}")
    assert line.startswith(f"train.py: error: --{name} ") and "not valid UTF-8" in line


def test_every_number_is_checked():
    """No numeric option accepts -1: an option that nobody checks would."""
    for preset, defaults in DEFAULTS.items():
        for name, value in defaults.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                with pytest.raises(ValueError, match=name.replace("_", "-")):
                    fill({"preset": preset, name: -1})


def test_defaults_are_no_nonsense():
    for algo in (*ALGORITHMS, *MORE):
        for preset in DEFAULTS:
            fill({"algo": algo, "preset": preset})


# Data (tests/test_data.py has the errors of each kind of file)

GOOD = '{"question": "1+1?", "answer": "#### 2"}'


def test_bad_data_are_refused_before_the_model_is_loaded(capsys, monkeypatch, tmp_path):
    too_late = "refused only after the model was loaded"
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail(too_late))
    words = [*WORDS, "--out", tmp_path / "run", "--data"]
    path = tmp_path / "train.jsonl"
    assert f"cannot read {path}" in error_line(capsys, *words, path)
    path.write_text(GOOD)
    assert f"{path} holds one problem; two are the least" in error_line(capsys, *words, tmp_path)
    write(path, [GOOD, GOOD.replace("2", "two")])
    assert "line 2: no number to compare with" in error_line(capsys, *words, tmp_path)
    assert not (tmp_path / "run").exists()


def test_training_problems_that_are_all_held_out(capsys, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(GOOD)
    line = error_line(capsys, *WORDS, "--data", tmp_path, "--out", tmp_path / "run")
    assert "all of them are held out too" in line


def test_long_prompts_are_dropped_and_counted(capsys, tmp_path):
    """The tiny model has room for 256 tokens, 8 of them for the completion.

    So a prompt of 248 tokens is kept, and one of 249 is dropped.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    encode = Prompts(tokenizer).encode
    asked = {248: None, 249: None}
    for n in asked:
        text = "5" * n
        text = text[: n - (len(encode([text])[0]) - n)]
        assert len(encode([text])[0]) == n
        asked[n] = {"question": text, "answer": "5"}
    rows = [*asked.values(), {"question": "5" * 9000, "answer": "5"}]
    write(tmp_path / "train.jsonl", [*rows, {"question": "1+1?", "answer": "2"}])
    write(
        tmp_path / "test.jsonl",
        [{"question": "2+1?", "answer": "3"}, {"question": "6" * 9000, "answer": "6"}],
    )
    words = [*WORDS, "--data", tmp_path, "--steps", "1", "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    assert "prompts over 248 tokens: 2 of training, 1 held out" in capsys.readouterr().out
    kept, dropped = encode_problems(tokenizer, rows, "{question}", 248)
    assert dropped == 2 and [row["question"] for row in kept] == [asked[248]["question"]]


@pytest.mark.parametrize(
    ("tokens", "line"),
    [(300, "--max-new-tokens leaves no room for a prompt"), (250, "every prompt is over 6 tokens")],
)
def test_no_room_in_the_context(capsys, file, tmp_path, tokens, line):
    words = [*WORDS, "--data", file, "--max-new-tokens", tokens, "--out", tmp_path / "run"]
    assert line in error_line(capsys, *words)
    assert not (tmp_path / "run").exists()


SCRIPTS = {
    "Chinese": "小明有三个苹果，又买了２个。",
    "Arabic": "لدى أحمد ٣ تفاحات",
    "Hindi": "राम के पास ५ आम हैं",
    "emoji": "👩‍👩‍👧 + 🍎🍎 = ?",
    "combining": "cafe\u0301 q\u0323\u0307",
    "control": "a\tb\u2028c\x00d\u202ee",
    "special tokens": "<|endoftext|><|pad|> 1+1?",
}


def test_text_in_any_script(tmp_path, capsys):
    """Read, encoded without loss, trained on, and written to samples.jsonl as it was."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [{"question": text, "answer": "3"} for text in SCRIPTS.values()]
    rows[list(SCRIPTS).index("Arabic")]["answer"] = "٣"
    write(tmp_path / "train.jsonl", ["\ufeff" + json.dumps(rows[0], ensure_ascii=False), *rows[1:]])
    held_out = [{"question": text + "2", "answer": "2"} for text in SCRIPTS.values()]
    write(tmp_path / "test.jsonl", held_out)
    for row in data.load_problems(str(tmp_path), "train"):
        text = tokenizer.decode(Prompts(tokenizer).encode([row["question"]])[0])
        assert text == unicodedata.normalize("NFC", row["question"]) + "\n"
    words = [*WORDS, *f"--steps 1 --prompts {len(rows)} --samples-every 1 --eval-n 9".split()]
    words += ["--data", tmp_path, "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    # Not splitlines(): one of the questions holds U+2028.
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").split("\n")[:-1]
    shown = [json.loads(line) for line in lines]
    assert shown[0]["prompt"] in SCRIPTS.values()


# Tokenizers and models


@pytest.fixture
def model_folder(tmp_path):
    no_code = shutil.ignore_patterns("*.py", "__pycache__")
    return shutil.copytree(TINY, tmp_path / "model", ignore=no_code)


def change(path, **values):
    """Set, or with None remove, entries of a JSON file."""
    content = json.loads(path.read_text())
    content = {name: value for name, value in (content | values).items() if value is not None}
    path.write_text(json.dumps(content))


def test_tokenizer_without_pad(model_folder, file, tmp_path, capsys):
    """EOS serves as the pad, and the run is the same: the mask goes by position, not by token."""
    eos_ids, runs = load_policy(str(model_folder))[2], []
    for pad in ("5", None):
        change(model_folder / "tokenizer_config.json", pad_token=pad)
        assert (load_policy(str(model_folder))[3] in eos_ids) == (pad is None)
        out = tmp_path / f"run{pad}"
        words = [*WORDS, "--model", model_folder, "--data", file, "--steps", "2", "--out", out]
        assert train.main([str(word) for word in words]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for row in rows:  # without the timings and the memory
            for name in [name for name in row if name.endswith("_s") or name == "peak_mib"]:
                del row[name]
        runs.append(rows)
    assert runs[0] == runs[1]


def test_tokenizer_without_eos(model_folder, file, tmp_path, capsys):
    """The model's own EOS is used; without any, it is an error: no completion could ever end."""
    eos_ids = load_policy(str(model_folder))[2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (model_folder / name).read_text().replace("<|endoftext|>", "<|other|>")
        (model_folder / name).write_text(content)
    # transformers then adds an EOS of its own, beyond the model's vocabulary.
    change(model_folder / "tokenizer_config.json", eos_token=None)
    assert load_policy(str(model_folder))[2] == eos_ids
    change(model_folder / "generation_config.json", eos_token_id=None)
    change(model_folder / "config.json", eos_token_id=None)
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    assert "the model names no EOS token" in error_line(capsys, *words)


def test_chat_template(model_folder, file, tmp_path, capsys):
    """Used where there is one, plain text where not; one that fails is a line."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.chat_template is None
    plain = Prompts(tokenizer, "{question} Go.").encode(["1+1?"])[0]
    assert plain == tokenizer("1+1? Go.\n").input_ids
    template = "{% for m in messages %}U: {{ m.content }}. {% endfor %}"
    template += "{% if add_generation_prompt %}A: {% endif %}"
    change(model_folder / "tokenizer_config.json", chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    chat = Prompts(tokenizer, "{question} Go.").encode(["1+1?"])[0]
    assert chat == tokenizer("U: 1+1? Go.. A: ").input_ids
    template = "{{ raise_exception('a system turn is wanted') }}"
    change(model_folder / "tokenizer_config.json", chat_template=template)
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    assert "chat template fails: a system turn is wanted" in error_line(capsys, *words)


def test_tokenizer_of_another_model(model_folder, file, tmp_path, capsys):
    """A token beyond the model's vocabulary is a line, not "index out of range in self"."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["xylophones"])
    tokenizer.save_pretrained(model_folder)
    write(file, [{"question": f"{n} xylophones + 1?", "answer": "2"} for n in range(12)])
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    last = len(tokenizer) - 1
    told = f"makes token {last} of '0 xylophones + 1?', and the model knows {last}: "
    assert told + "do the two belong together?" in error_line(capsys, *words)


# Model folders that must be refused. The malicious ones make the folder `ran` if their code runs.


def pickle_only(folder, ran):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def evil_pickle(folder, ran):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def remote_code(folder, ran):
    source = f"import os\nos.mkdir({str(ran)!r})\n"
    source += "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n"
    (folder / "evil.py").write_text(source)
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change(folder / "config.json", model_type="evil", auto_map=auto_map)


def torn(folder, ran):
    os.truncate(folder / "model.safetensors", 100_000)


def lacking(folder, ran):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def ruined(folder, ran):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder, ran):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def with_adapter(folder, ran):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def adapter_alone(folder, ran):
    for path in folder.iterdir():
        path.unlink()
    with_adapter(folder, ran)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (with_adapter, "it holds an adapter (adapter_config.json), which would be ignored"),
        (adapter_alone, "it holds an adapter (adapter_config.json)"),
        (pickle_only, "model.safetensors"),
        (evil_pickle, "model.safetensors"),
        (remote_code, "contains custom code"),
        (torn, "cannot load"),
        (lacking, "its files lack 1 weights, model.layers.1.mlp.up_proj.weight among them"),
        (ruined, "some of its weights are not finite"),
        (no_tokenizer, "its tokenizer has no vocabulary"),
    ],
)
def test_model_files(model_folder, file, tmp_path, capsys, spoil, line):
    """Only safetensors are read, no code of the folder runs, and no missing weight is made up."""
    spoil(model_folder, tmp_path / "ran")
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    found = error_line(capsys, *words)
    assert line in found and f"cannot load the model '{model_folder}' (a local folder)" in found
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_no_network(capsys, tmp_path, monkeypatch):
    """Neither network nor cache: the line says what to pass instead, at once.

    The Hub's library would retry for a minute. `getaddrinfo` fails as it does without a network; if
    the names that it is asked for are only the one, nothing retried.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    asked = []

    def getaddrinfo(host, *_):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    words = [*WORDS, "--out", tmp_path / "run"]
    line = error_line(capsys, *words, "--model", "nobody/no-model")
    assert "Pass --model FOLDER, or --preset tiny" in line
    line = error_line(capsys, *words, "--data", "nobody/no-data")
    assert "Pass --data FILE.jsonl" in line and "or --data tiny" in line
    assert asked == ["huggingface.co"]  # once; then the libraries are switched to offline
    asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sources.offline_without_network(
        "tiny", str(TINY)
    )  # needs nothing from the Hub, so asks nothing
    assert not asked and not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("at", ["load_problems", "load_policy", "evaluate_only"])
def test_interrupt_before_the_loop(monkeypatch, file, tmp_path, capsys, at):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train if at == "evaluate_only" else start, at, interrupt)
    words = [*WORDS, "--data", file, "--out", tmp_path / "run", "--eval-only"]
    assert train.main([str(word) for word in words]) == 130
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


# Folders and disks


def test_folder_that_cannot_be(capsys, file, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = [*WORDS, "--data", file, "--out"]
    file_path = tmp_path / "file"
    assert "is a file; name a folder" in error_line(capsys, *words, file_path)
    line = error_line(capsys, *words, file_path / "a" / "b")
    assert f"{file_path} is a file; name a folder" in line
    assert "/proc/run" in error_line(capsys, *words, "/proc/run")
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_permission(capsys, file, tmp_path, monkeypatch):
    """os.access is replaced: tests may run as root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    too_late = "refused only after the model was loaded"
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail(too_late))
    line = error_line(capsys, *WORDS, "--data", file, "--out", tmp_path / "a" / "run")
    assert f"no permission to write in {tmp_path}; name another folder" in line


def test_overwrite(capsys, file, tmp_path):
    """Deletes the old run and no other file, and only once the new run can begin.

    It never deletes the model that the new run starts from.
    """
    out = tmp_path / "run"
    words = [*WORDS, "--data", file, "--steps", "1", "--out", out, "--overwrite"]
    assert train.main([str(word) for word in words]) == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert "cannot load" in error_line(capsys, *words, "--model", tmp_path / "no-model")
    assert "would delete" in error_line(capsys, *words, "--model", out / "model")
    assert contents(out) == before
    assert train.main([str(word) for word in [*words, "--seed", "1"]]) == 0
    assert contents(out).keys() == before.keys() and (out / "notes.txt").read_text() == "mine"
    assert contents(out)[out / "metrics.jsonl"] != before[out / "metrics.jsonl"]


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("size", "at"),
    [
        (1_500, "config.json"),
        (3_000, "metrics.jsonl"),
        (1_000_000, "checkpoints/step-"),  # in model.safetensors, of 2.7 MB
        (4_000_000, "checkpoints/step-"),  # in state.pt, once AdamW has moved
    ],
)
def test_full_disk(file, tmp_path, size, at):
    """A full disk in the middle of a write; afterwards --resume gives the run that never stopped.

    A limit on the size of a file stands for the full disk: write() fails in the same way, and the
    limit's size chooses the file in which it happens.
    """
    every = "8" if at == "metrics.jsonl" else "1"
    words = [*WORDS, *f"--steps 8 --samples-every 0 --save-every {every}".split()]
    words += ["--data", file, "--out"]
    status, log = child.run([*words, tmp_path / "run"], tmp_path / "log", "file_size_limit", size)
    assert status == 2, log
    line = one_line(log.split("\n", 1)[1])
    assert f"cannot write {tmp_path / 'run' / at}" in line and "File too large" in line
    assert not list(tmp_path.rglob("*.part"))
    if at == "config.json":
        assert not contents(tmp_path / "run")
        return
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    status, log = child.run(["--resume", tmp_path / "run"], tmp_path / "log")
    assert status == 0, log
    assert child.run([*words, tmp_path / "whole"], tmp_path / "log")[0] == 0
    assert_same_training(tmp_path / "run", tmp_path / "whole")


def assert_same_training(run, other):
    weights, metrics = [], []
    for folder in (run, other):
        weights.append((folder / "model" / "model.safetensors").read_bytes())
        metrics.append((folder / "metrics.jsonl").read_text().splitlines())
    assert weights[0] == weights[1] and len(metrics[0]) == len(metrics[1])


def test_full_disk_later(file, tmp_path):
    """A disk that is full after a resume harms no earlier file: checkpoints and model are whole."""
    words = [*WORDS, "--data", file, "--save-every", "2", "--out", tmp_path / "run"]
    assert child.run(words, tmp_path / "log")[0] == 0
    before = contents(tmp_path / "run")
    words = ["--resume", tmp_path / "run", "--steps", "6"]
    status, log = child.run(words, tmp_path / "log", "file_size_limit", 1_000_000)
    assert status == 2 and "Traceback" not in log, log
    assert f"when that is mended: {command('train.py', '--resume', tmp_path / 'run')}" in log
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    grown = {path.name for path in after if after[path] != before[path]}
    assert grown == {"config.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    # Its lines, without the evaluation that followed the step that was the last one then.
    trained = before[metrics].rsplit(b"\n", 2)[0]
    assert after[metrics].startswith(trained + b"\n") and after[metrics].endswith(b"}\n")


def test_full_disk_at_the_end(file, tmp_path):
    """The trained model does not fit: a line says so, the run is not "done", --resume writes it."""
    words = [*WORDS, "--data", file, "--save-every", "0", "--out", tmp_path / "run"]
    status, log = child.run(words, tmp_path / "log", "file_size_limit", 1_000_000)
    line = one_line(log.split("\n", 1)[1])
    assert status == 2 and f"cannot write {tmp_path / 'run' / 'model'}: " in line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "running"
    assert child.run(["--resume", tmp_path / "run"], tmp_path / "log")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "done"


def test_append_lines_is_all_or_nothing(tmp_path, monkeypatch):
    """When a write fails half-way, what it did write is cut off again."""
    path = tmp_path / "lines.jsonl"
    checkpoint.append_lines(path, [{"x": 1.0, "y": [float("nan"), {"z": float("-inf")}]}])
    assert path.read_text() == '{"x": 1.0, "y": [null, {"z": null}]}\n'

    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file):
            self.file, self.left = file, 10

        def write(self, chunk):
            if not self.left:
                raise OSError(28, "No space left on device")
            chunk, self.left = chunk[: self.left], 0
            return self.file.write(chunk)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr("builtins.open", lambda *args, real=open, **kw: Full(real(*args, **kw)))
    with pytest.raises(OSError, match=f"cannot write {path}: .*No space left"):
        checkpoint.append_lines(path, [{"a": 1}, {"b": "long" * 9}])
    monkeypatch.undo()
    assert path.read_text() == '{"x": 1.0, "y": [null, {"z": null}]}\n'


# Numbers that break


def spoil(monkeypatch, calls, how):
    """Make grpo.loss not finite in these calls, counted from 1; calls without a gradient aside.

    how: "loss", its value is NaN; "push", only the gradient of the first row is; "gradient", the
    gradient's entries are finite, but its norm over the weights overflows.
    """
    grpo = importlib.import_module("grpo")
    real, count = grpo.loss, [0]

    def loss(logprobs, old_logprobs, *args, **options):
        value = real(logprobs, old_logprobs, *args, **options)
        if not logprobs.requires_grad:
            return value
        count[0] += 1
        if count[0] in calls:
            if how == "loss":
                value = value * float("nan")
            elif how == "push":
                value = value + (logprobs[0] * float("inf")).sum() * 0
            else:
                logprobs.register_hook(lambda grad: grad * 1e38)
        return value

    monkeypatch.setattr(grpo, "loss", loss)


@pytest.fixture
def half_right(monkeypatch):
    """Rewards 0, 1, 0, 1, ...: they differ in every group, so that every update has a gradient."""
    turns = itertools.cycle((0.0, 1.0))
    monkeypatch.setattr(grading, "correct", lambda *_: next(turns))


GRPO = [*WORDS, *"--algo grpo --samples-every 0 --group-size 4 --save-every 1 --lr 0.001".split()]


@pytest.mark.parametrize("how", ["loss", "push", "gradient"])
def test_skipped_update(monkeypatch, half_right, file, tmp_path, capsys, how):
    """Updates 3 and 4 of 8 are skipped and counted, and the run goes on.

    The rows that caused it are in samples.jsonl. No skipped update moves a weight.
    """
    spoil(monkeypatch, {3, 4}, how)
    moved = []
    real = train.Updater.update

    def update(self, *args, **more):
        before = [weight.detach().clone() for weight in self.model.parameters()]
        stats = real(self, *args, **more)
        pairs = zip(before, self.model.parameters(), strict=True)
        moved.append((bool(stats["bad_rows"]), any(not torch.equal(a, b) for a, b in pairs)))
        assert all(weight.isfinite().all() for weight in self.model.parameters())
        return stats

    monkeypatch.setattr(train.Updater, "update", update)
    out = tmp_path / "run"
    assert train.main([str(word) for word in [*GRPO, "--data", file, "--out", out]]) == 0
    assert [bad for bad, _ in moved] == [False, False, True, True, False, False, False, False]
    assert not any(moves for bad, moves in moved if bad)
    assert any(moves for bad, moves in moved if not bad)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if row["phase"] == "train"] == [0, 2, 0, 0]
    shown = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {2} and all(row["skipped"] for row in shown)
    # The rows that caused the skip; where that cannot be known, the whole mini-batches.
    assert len(shown) == (2 if how == "push" else 8)
    for row in shown:
        assert len(row["tokens"]) == len(row["advantages"]) == len(row["logprobs"])


def test_skips_that_are_not_in_a_row(monkeypatch, half_right, file, tmp_path, capsys):
    spoil(monkeypatch, {1, 2, 4, 5, 7, 8}, "loss")
    words = [*GRPO, "--data", file, "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0


def test_three_skipped_in_a_row(monkeypatch, half_right, file, tmp_path, capsys):
    """... end the run with status 1; the last checkpoint is the one before, with finite weights."""
    spoil(monkeypatch, {6, 7, 8, 9}, "loss")
    out = tmp_path / "run"
    line = error_line(capsys, *GRPO, "--data", file, "--out", out, status=1)
    assert "stopped at step 4: 3 updates in a row had a loss or gradient that is not finite" in line
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000002", "step-000003"]
    assert not (out / "model").exists()
    for weight in load_file(out / "checkpoints" / "step-000003" / "model.safetensors").values():
        assert weight.isfinite().all()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if row["phase"] == "train"] == [0, 0, 1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(train, "plot_runs", lambda *_: None)
    assert train.main(["--resume", str(out)]) == 0  # without the fault, it goes on after step 3
    assert "after step 3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1.5, -2.0])
def test_reward_that_is_none(monkeypatch, file, tmp_path, capsys, reward):
    """Refused, with the completion that it was given to."""
    seen = []

    def correct(text, answer, truncated):
        seen.append(text)
        return 0.5 if len(seen) < 4 else reward

    monkeypatch.setattr(grading, "correct", correct)
    line = error_line(capsys, *WORDS, "--data", file, "--out", tmp_path / "run")
    told = f"the reward {reward} is not a number in [-1, 1]; it was given to {seen[3]!r}"
    assert " ".join(told.split()) in line
