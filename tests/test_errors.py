"""Errors of the user or the machine: one line that says what to do, status 2, and nothing lost."""

import importlib
import itertools
import json
import os
import pickle
import re
import socket
import unicodedata

import child
import huggingface_hub
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small import WORDS, change, contents, copy_tiny, lines, read, refused, run, timeless, write
from transformers import AutoTokenizer

import train
from run import checkpoint, start
from run.checks import fill
from run.commandline import command
from run.options import DEFAULTS, FIELDS
from run.parser import parse
from trainer import data, grading, sources
from trainer.methods import ALGORITHMS, MORE
from trainer.policy import load_policy
from trainer.prompts import Prompts, encode_problems

pytestmark = pytest.mark.usefixtures("quiet_run")
TINY = ROOT / "tiny"


@pytest.fixture
def no_model(monkeypatch):
    too_late = "refused only after the model was loaded"
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail(too_late))


# Options


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--algo tpo", "no algorithm 'tpo'; did you mean tepo? There are tepo, grpo,"),
        ("--algo trgpro", "did you mean trgrpo?"),
        ("--algo zzzz", "no algorithm 'zzzz'; There are tepo,"),
        ("--algo zzzz", "gtpo, grpo_s, trgrpo, clip_cov, kl_cov, ce_gppo, aspo, dppo, reweight,"),
        ("--algo more.dr_grpo", "did you mean dr_grpo?"),
        (
            "--prompts 3 --group-size 3 --updates 4",
            "--updates 4 does not divide the 9 completions of a step",
        ),
        ("--prompts 60000 --group-size 4", "--prompts 60000 x --group-size 4: 240000 completions"),
        ("--group-size 1", "--group-size 1: it must be from 2 to 65536"),
        ("--temperature nan", "--temperature nan: it must be from 1e-06 to 1000000000"),
        ("--temperature 1e-45", "--temperature 1e-45: it must"),
        ("--lr 0", "--lr 0.0: it must be from 1e-12 to 1"),
        ("--lr inf", "--lr inf"),
        ("--lr 5", "--lr 5.0"),
        ("--max-grad-norm 0", "--max-grad-norm 0.0"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: it must be from 0 to 42949"),
        ("--micro-batch 0", "--micro-batch 0: it must be from 1 to 65536, or auto"),
        ("--micro-batch 100000000000000000000", "--micro-batch 100000000000000000000: it must"),
        ("--sample-batch few", "--sample-batch few: it must"),
        ("--threads two", f"--threads two: it must be from 1 to {os.cpu_count()}, or auto"),
        ("--threads 100000", "--threads 100000: it must"),
        ("--eval-samples 100000000", "--eval-samples 100000000: it must be from 0 to 10000"),
        ("--k 4 --eval-samples 3", "--eval-samples 3 with --k 4: avg@k and pass@k need"),
        ("--k 0 --eval-samples 3", "--eval-samples 3 with --k 0"),
        ("--overlong-cache 100 --max-new-tokens 50", "--overlong-cache is over --max-new-tokens"),
        ("--columns question", "--columns question: two names, QUESTION,ANSWER"),
        ("--columns a,b,c", "--columns a,b,c: two names"),
        ("--columns ,b", "--columns ,b: two names"),
        ("--skip-bad-rows", "--skip-bad-rows have no effect with --data tiny"),
        ("--prompt Solve!", "--prompt must hold {question}"),
        ("--chat-template none --system Hi", "--system has no effect with --chat-template none"),
        ("--chat-template none --template-option a=1", "--template-option has no effect with"),
        ("--template-option a", "argument --template-option: 'a': NAME=VALUE, e.g. enable_think"),
        ("--template-option =3", "argument --template-option: '=3': NAME=VALUE"),
        ("--dtype fp16", "argument --dtype: invalid choice: 'fp16' (choose from "),
        ("--preset big", "argument --preset: invalid choice: 'big'"),
        ("--track mlflow", "argument --track: invalid choice: 'mlflow'"),
        ("--device tpu", "--device tpu: auto, cpu, cuda or cuda:N"),
        ("--device cpu:x", "--device cpu:x"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--step 3", "no option --step; did you mean --steps?"),
        ("--option eps_hgih=0.3", "tepo has no option 'eps_hgih'; it has eps_low=0.2"),
        ("--option eps_high", "--option eps_high=: a finite number"),
        ("--option eps_high=nan", "--option eps_high=nan: a finite number"),
        ("--option eps_high=-1", "--option eps_high=-1: a finite number of at least 0 is required"),
        ("--algo dapo --beta 0.1", "dapo has no option 'beta'"),
        ("--algo gtpo --option normalize=sideways", "normalize"),
        ("--algo trgrpo --option weight_inside_clip=2", "weight_inside_clip=2: true or false"),
        ("--algo cispo --option eps=1", "cispo has no option 'eps'; it has eps_low=1.0, eps_high="),
        ("--algo ha_dw --option history=1", "ha_dw has no option 'history'; it has scale=1.5"),
        ("--algo ha_dw --option window=0", "window must be at least 1"),
        ("--algo ha_dw --option window=2.5", "window=2.5: a whole number is required"),
        ("--algo dr_grpo --option max_length=-5", "max_length=-5: a whole number of at least 0"),
        ("--algo dppo --option divergence=js", "divergence"),
        ("--algo raft --option variant=raft+++", "variant must be"),
        ("--prompt a\udcff{question}", r"'a\udcff{question}': not valid UTF-8"),
        ("--out \udcff", r"'\udcff': not valid UTF-8"),
    ],
)
def test_nonsense_options(capsys, monkeypatch, tmp_path, no_model, words, line):
    """Refused before any model or data set is loaded, and before a folder is made."""
    monkeypatch.setattr(start, "load_problems", lambda *_: pytest.fail("refused after the data"))
    assert line in refused(capsys, *WORDS, "--out", tmp_path / "run", *words.split())
    assert not (tmp_path / "run").exists()


def test_every_number_is_checked_from_both_sides():
    """No numeric option accepts -1 or 10**12: an option that nobody checks would."""
    names = [name for name, about in FIELDS.items() if about.type in (int, float)]
    assert len(names) >= 20
    for preset, name, value in itertools.product(DEFAULTS, names, (-1, 10**12)):
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            fill({"preset": preset, name: value})


def test_defaults_are_no_nonsense():
    for algo, preset in itertools.product((*ALGORITHMS, *MORE), DEFAULTS):
        fill({"algo": algo, "preset": preset})


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--algo TEPO", "tepo"),
        ("--algo Tr-GRPO", "trgrpo"),
        ("--algo TR-GRPO", "trgrpo"),
        ("--algo GRPO-S", "grpo_s"),
        ("--algo Dr.GRPO", "dr_grpo"),
        ("--algo CE-GPPO", "ce_gppo"),
        ("--algo Clip-Cov", "clip_cov"),
        ("--preset Tiny", "tiny"),
        ("--dtype BF16", "bf16"),
        ("--device CPU", "cpu"),
        ("--chat-template NONE", "none"),
        ("--track TensorBoard", "tensorboard"),
    ],
)
def test_a_name_may_be_written_as_papers_and_people_do(words, name):
    assert list(parse(words.split()).values()) == [name]


# Data (tests/test_data.py has the errors of each kind of file)

GOOD = '{"question": "1+1?", "answer": "#### 2"}'


def test_bad_data_are_refused_before_the_model_is_loaded(capsys, no_model, tmp_path):
    words = [*WORDS, "--out", tmp_path / "run", "--data"]
    path = tmp_path / "train.jsonl"
    assert f"cannot read {path}" in refused(capsys, *words, path)
    write(path, [GOOD])
    assert f"{path} holds one problem; two are the least" in refused(capsys, *words, tmp_path)
    write(path, [GOOD, GOOD.replace("2", "two")])
    assert "line 2: no number to compare with" in refused(capsys, *words, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--data none.jsonl", "cannot read none.jsonl"),
        ("--data none", "cannot load the data set 'none'"),
        ("--data words.csv", "words.csv"),
        ("--algo tpo", "no algorithm 'tpo'"),
        ("--reward none.py", "none.py: no such file"),
        ("--reward mine.py", "mine.py: there is no function reward"),
        ("", "run holds a run already: --resume run continues it, --overwrite deletes it"),
    ],
)
def test_an_existing_run_is_the_last_error(capsys, no_model, tmp_path, monkeypatch, words, line):
    """... that is found before the model is loaded; the run stays as it is."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "words.csv", ["a,b", "1,2"])
    write(tmp_path / "mine.py", ["x = 1"])
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "config.json", ["{}"])
    before = contents(tmp_path)
    assert line in refused(capsys, *WORDS, "--out", "run", *words.split())
    assert contents(tmp_path) == before


def test_training_problems_that_are_all_held_out(capsys, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [GOOD])
    line = refused(capsys, *WORDS, "--data", tmp_path, "--out", tmp_path / "run")
    assert "all of them are held out too" in line


def test_long_prompts_are_dropped_and_counted(capsys, tmp_path):
    """The tiny model has room for 256 tokens, 8 of them for the completion.

    So a prompt of 248 tokens is kept, and one of 249 is dropped.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    encode = Prompts(tokenizer).encode
    asked = {248: None, 249: None}
    for n in asked:
        text = "5" * (2 * n - len(encode(["5" * n])[0]))
        assert len(encode([text])[0]) == n
        asked[n] = {"question": text, "answer": "5"}
    rows = [*asked.values(), {"question": "5" * 9000, "answer": "5"}]
    held_out = [{"question": "2+1?", "answer": "3"}, {"question": "6" * 9000, "answer": "6"}]
    write(tmp_path / "train.jsonl", [*rows, {"question": "1+1?", "answer": "2"}])
    write(tmp_path / "test.jsonl", held_out)
    assert run(*WORDS, "--data", tmp_path, "--steps", "1", "--out", tmp_path / "run") == 0
    assert "prompts over 248 tokens: 2 of training, 1 held out" in capsys.readouterr().out
    kept, dropped = encode_problems(tokenizer, rows, "{question}", 248)
    assert dropped == 2 and [row["question"] for row in kept] == [asked[248]["question"]]


@pytest.mark.parametrize("tokens", [254, 256, 257, 300, 2**20])
def test_too_many_new_tokens_are_told_the_most_that_fits(capsys, file, tmp_path, tokens):
    """... and with that number of tokens, no prompt is dropped."""
    words = [*WORDS, "--data", file, "--steps", "1", "--out", tmp_path / "run", "--max-new-tokens"]
    line = refused(capsys, *words, tokens)
    assert f"--max-new-tokens {tokens} leaves no room for a prompt in the model's context" in line
    assert "of 256 tokens: the most for the shortest prompt is " in line
    assert not (tmp_path / "run").exists()
    shortest, longest = map(
        int, re.search(r"prompt is (\d+), for the longest (\d+)$", line).groups()
    )
    for most, dropped in ((shortest, True), (longest, False)):
        o = fill(parse([*map(str, words), str(most)]))
        tokenizer, (train_rows, _, _) = (
            AutoTokenizer.from_pretrained(TINY),
            start.load_data(o, False),
        )
        room = 256 - o.max_new_tokens
        assert (encode_problems(tokenizer, train_rows, o.prompt, room)[1] > 0) == dropped


def test_prompts_that_fill_the_context(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [{"question": "5" * 300, "answer": "5"}]
    with pytest.raises(ValueError, match="every prompt fills the model's context of 256 tokens"):
        encode_problems(tokenizer, rows, "{question}", 248, most=8)


SCRIPTS = {
    "Chinese": "小明有三个苹果，又买了２个。",
    "Arabic": "لدى أحمد ٣ تفاحات",
    "Hindi": "राम के पास ५ आम हैं",
    "emoji": "👩‍👩‍👧 + 🍎🍎 = ?",
    "combining": "cafe\u0301 q\u0323\u0307",
    "control": "a\tb\u2028c\x00d\u202ee",
    "special tokens": "<|endoftext|><|pad|> 1+1?",
}


def test_text_in_any_script(tmp_path):
    """Read, encoded without loss, trained on, and written to samples.jsonl as it was."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [{"question": text, "answer": "3"} for text in SCRIPTS.values()]
    rows[list(SCRIPTS).index("Arabic")]["answer"] = "٣"
    write(tmp_path / "train.jsonl", ["\ufeff" + json.dumps(rows[0], ensure_ascii=False), *rows[1:]])
    write(tmp_path / "test.jsonl", [{**row, "question": row["question"] + "2"} for row in rows])
    for row in data.load_problems(str(tmp_path), "train"):
        text = tokenizer.decode(Prompts(tokenizer).encode([row["question"]])[0])
        assert text == unicodedata.normalize("NFC", row["question"]) + "\n"
    words = f"--steps 1 --prompts {len(rows)} --samples-every 1 --eval-n 9".split()
    assert run(*WORDS, *words, "--data", tmp_path, "--out", tmp_path / "run") == 0
    assert read(tmp_path / "run" / "samples.jsonl")[0]["prompt"] in SCRIPTS.values()


# Tokenizers and models


@pytest.fixture
def model_folder(tmp_path):
    return copy_tiny(tmp_path / "model")


def test_tokenizer_without_pad(model_folder, file, tmp_path):
    """EOS serves as the pad, and the run is the same: the mask goes by position, not by token."""
    eos_ids, runs = load_policy(str(model_folder))[2], []
    for pad in ("5", None):
        change(model_folder / "tokenizer_config.json", pad_token=pad)
        assert (load_policy(str(model_folder))[3] in eos_ids) == (pad is None)
        words = [
            "--model",
            model_folder,
            "--data",
            file,
            "--steps",
            2,
            "--out",
            tmp_path / f"{pad}",
        ]
        assert run(*WORDS, *words) == 0
        runs.append(timeless(tmp_path / f"{pad}"))
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
    for name in ("generation_config.json", "config.json"):
        change(model_folder / name, eos_token_id=None)
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    assert "the model names no EOS token" in refused(capsys, *words)


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
    assert "chat template fails: a system turn is wanted" in refused(capsys, *words)


def test_tokenizer_of_another_model(model_folder, file, tmp_path, capsys):
    """A token beyond the model's vocabulary is a line, not "index out of range in self"."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["xylophones"])
    tokenizer.save_pretrained(model_folder)
    write(file, [{"question": f"{n} xylophones + 1?", "answer": "2"} for n in range(12)])
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    last = len(tokenizer) - 1
    told = f" xylophones + 1?', and the model knows {last}: do the two belong together?"
    assert told in refused(capsys, *words)


# Model folders that must be refused. The malicious ones make the folder `ran` if their code runs.


class Evil:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def pickle_only(folder, ran):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def evil_pickle(folder, ran):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran)))


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


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
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
    found = refused(capsys, *words)
    assert line in found and f"cannot load the model '{model_folder}' (a local folder)" in found
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


@pytest.fixture
def no_network(monkeypatch):
    """The host names that were asked for, in vain, as it is without a network."""
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
    return asked


def test_no_network(capsys, tmp_path, monkeypatch, no_network):
    """Neither network nor cache: the line says so, and what to pass instead, at once.

    The Hub's library would retry for a minute. If the names that are asked for are only the one,
    nothing retried.
    """
    words = [*WORDS, "--out", tmp_path / "run"]
    line = refused(capsys, *words, "--model", "nobody/no-model")
    assert "Pass --model FOLDER, or --preset tiny" in line
    for name in ("nobody/no-data", "gsm8k"):
        line = refused(capsys, *words, "--data", name)
        assert "on the Hub (no network" in line and "Offline" not in line
        assert "Pass --data FILE.jsonl" in line and "or --data tiny" in line
    assert no_network == ["huggingface.co"]  # once; then the libraries are switched to offline
    no_network.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sources.offline_without_network("tiny", str(TINY))  # needs nothing from the Hub
    assert not no_network and not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "name",
    ["OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError"],
)
def test_no_name_of_a_class_stands_for_the_missing_network(name):
    error = ConnectionError(f"Couldn't reach 'a/b' on the Hub ({name})")
    told = "Couldn't reach 'a/b' on the Hub (no network, or HF_HUB_OFFLINE is set)"
    assert sources.first_words(error) == told
    assert sources.first_words(ValueError("a (b) c")) == "a (b) c"


@pytest.mark.parametrize("at", ["load_problems", "load_policy", "evaluate_only"])
def test_interrupt_before_the_loop(monkeypatch, file, tmp_path, capsys, at):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train if at == "evaluate_only" else start, at, interrupt)
    assert run(*WORDS, "--data", file, "--out", tmp_path / "run", "--eval-only") == 130
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


# Folders and disks


@pytest.mark.parametrize("out", ["file", "file/a/b", "/proc/run", "locked"])
def test_a_folder_that_cannot_be_written(capsys, file, tmp_path, monkeypatch, no_model, out):
    """In the last nothing can be made; os.open is replaced, for root may write anywhere."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    real = os.open

    def refuse(path, *args, **more):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    line = refused(capsys, *WORDS, "--data", file, "--out", tmp_path / out)
    assert line.startswith(f"cannot write to the folder {tmp_path / out} (")
    assert out != "locked" or "Permission denied" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_overwrite(capsys, file, tmp_path):
    """Deletes the old run and no other file, and only once the new run can begin.

    It never deletes the model that the new run starts from.
    """
    out = tmp_path / "run"
    words = [*WORDS, "--data", file, "--steps", "1", "--out", out, "--overwrite"]
    assert run(*words) == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert "cannot load" in refused(capsys, *words, "--model", tmp_path / "no-model")
    for model in (out / "model", out):
        assert f"would delete {out / 'model'}" in refused(capsys, *words, "--model", model)
    assert contents(out) == before
    assert run(*words, "--seed", "1") == 0
    assert contents(out).keys() == before.keys() and (out / "notes.txt").read_text() == "mine"
    assert contents(out)[out / "metrics.jsonl"] != before[out / "metrics.jsonl"]


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
    out, log = tmp_path / "run", tmp_path / "log"
    status, told = child.run([*words, out], log, "file_size_limit", size)
    assert status == 2 and "Traceback" not in told, told
    line = told.splitlines()[-1]
    assert f"error: cannot write {out / at}" in line and "File too large" in line
    assert not list(tmp_path.rglob("*.part"))
    if at == "config.json":
        assert not contents(out)
        return
    assert read(out / "metrics.jsonl")  # each line is whole
    assert child.run(["--resume", out], log)[0] == 0
    assert child.run([*words, tmp_path / "whole"], log)[0] == 0
    weights = [folder / "model" / "model.safetensors" for folder in (out, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(read(out / "metrics.jsonl")) == len(read(tmp_path / "whole" / "metrics.jsonl"))


def test_full_disk_later_and_at_the_end(file, tmp_path):
    """A disk that is full after a resume harms no earlier file: checkpoints and model are whole.

    If only the trained model does not fit, the run is not "done", and --resume writes it.
    """
    out, log = tmp_path / "run", tmp_path / "log"
    words = [*WORDS, "--data", file, "--save-every", "2", "--out", out]
    assert child.run(words, log)[0] == 0
    before = contents(out)
    again = ["--resume", out, "--steps", "6"]
    status, told = child.run(again, log, "file_size_limit", 1_000_000)
    assert status == 2 and "Traceback" not in told, told
    assert f"when that is mended: {command('train.py', '--resume', out)}" in told
    after = contents(out)
    assert after.keys() == before.keys()
    grown = {path.name for path in after if after[path] != before[path]}
    assert grown == {"config.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl"}
    metrics = out / "metrics.jsonl"
    # Its lines, without the evaluation that followed the step that was the last one then.
    trained = before[metrics].rsplit(b"\n", 2)[0]
    assert after[metrics].startswith(trained + b"\n") and after[metrics].endswith(b"}\n")

    words = [*words, "--save-every", "0", "--overwrite"]
    status, told = child.run(words, log, "file_size_limit", 1_000_000)
    assert status == 2 and f"cannot write {out / 'model'}: " in told.splitlines()[-1]
    assert json.loads((out / "config.json").read_text())["status"] == "running"
    assert child.run(["--resume", out], log)[0] == 0
    assert json.loads((out / "config.json").read_text())["status"] == "done"


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


def spoil(monkeypatch, spoiled, how):
    """Make grpo.loss not finite in these updates of the run, counted from 1.

    how: "loss", its value is NaN; "push", only the gradient of the first row is; "gradient", the
    gradient's entries are finite, but its norm over the weights overflows.
    """
    grpo = importlib.import_module("grpo")
    real, real_update, updates, now = grpo.loss, train.Updater._update, itertools.count(1), [0]

    def update(*args):
        now[0] = next(updates)
        try:
            return real_update(*args)
        finally:
            now[0] = 0

    def loss(logprobs, *args, **options):
        value = real(logprobs, *args, **options)
        if now[0] not in spoiled or not logprobs.requires_grad:
            return value
        if how == "loss":
            return value * float("nan")
        if how == "push":
            return value + (logprobs[0] * float("inf")).sum() * 0
        logprobs.register_hook(lambda grad: grad * 1e38)
        return value

    monkeypatch.setattr(train.Updater, "_update", update)
    monkeypatch.setattr(grpo, "loss", loss)


@pytest.fixture
def half_right(monkeypatch):
    """Rewards 0, 1, 0, 1, ...: they differ in every group, so that every update has a gradient."""
    turns = itertools.cycle((0.0, 1.0))
    monkeypatch.setattr(grading, "correct", lambda *_: next(turns))


GRPO = [*WORDS, *"--algo grpo --samples-every 0 --group-size 4 --save-every 1 --lr 0.001".split()]


@pytest.mark.parametrize("how", ["loss", "push", "gradient"])
def test_skipped_update(monkeypatch, half_right, file, tmp_path, how):
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
    assert run(*GRPO, "--data", file, "--out", out) == 0
    assert [bad for bad, _ in moved] == [False, False, True, True, False, False, False, False]
    assert not any(moves for bad, moves in moved if bad)
    assert any(moves for bad, moves in moved if not bad)
    assert [row["skipped"] for row in lines(out, "train")] == [0, 2, 0, 0]
    shown = read(out / "samples.jsonl")
    assert {row["step"] for row in shown} == {2} and all(row["skipped"] for row in shown)
    # The rows that caused the skip; where that cannot be known, the whole mini-batches.
    assert len(shown) == (2 if how == "push" else 8)
    for row in shown:
        assert len(row["tokens"]) == len(row["advantages"]) == len(row["logprobs"])


def test_skips_that_are_not_in_a_row(monkeypatch, half_right, file, tmp_path):
    spoil(monkeypatch, {1, 2, 4, 5, 7, 8}, "loss")
    assert run(*GRPO, "--data", file, "--out", tmp_path / "run") == 0


def test_three_skipped_in_a_row(monkeypatch, half_right, file, tmp_path, capsys):
    """... end the run with status 1; the last checkpoint is the one before, with finite weights."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, {6, 7, 8, 9}, "loss")
        line = refused(capsys, *GRPO, "--data", file, "--out", out, status=1)
    told = "stopped at step 4: 3 updates in a row had a loss or gradient that is not finite"
    assert told in line and line.endswith("The last good checkpoint is kept.")
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000002", "step-000003"]
    assert not (out / "model").exists()
    for weight in load_file(out / "checkpoints" / "step-000003" / "model.safetensors").values():
        assert weight.isfinite().all()
    assert [row["skipped"] for row in lines(out, "train")] == [0, 0, 1, 2]
    assert run("--resume", out) == 0  # without the fault, it goes on after step 3
    assert "after step 3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1.5, -2.0])
def test_reward_that_is_none(monkeypatch, file, tmp_path, capsys, reward):
    """Refused, with the completion that it was given to."""
    seen = []

    def correct(text, answer, truncated):
        seen.append(text)
        return 0.5 if len(seen) < 4 else reward

    monkeypatch.setattr(grading, "correct", correct)
    line = refused(capsys, *WORDS, "--data", file, "--out", tmp_path / "run")
    told = f"the reward {reward} is not a number in [-1, 1]; it was given to {seen[3]!r}"
    assert " ".join(told.split()) in line
