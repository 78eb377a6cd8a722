"""What the user can get wrong, or the machine: one line that says what to do, exit status 2, and nothing lost."""

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
from tiny.problems import problems
from trainer import checkpoint, data, start
from trainer.options import ALGORITHMS, DEFAULTS, fill
from trainer.policy import load_policy
from trainer.prompts import Prompts, encode_problems

TINY = child.ROOT / "tiny"
WORDS = "--preset tiny --steps 4 --prompts 2 --group-size 2 --updates 2 --max-new-tokens 8".split()  # noqa: SIM905
WORDS += "--eval-n 2 --eval-every 0 --k 0".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch, request):
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
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )


def error_line(capsys, *argv, status=2):
    """The one line on stderr, bars aside, of a run that ends with this exit status."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == status
    return one_line(capsys.readouterr().err)


def one_line(text):
    assert "Traceback" not in text, text
    bars = re.compile(
        r"^(\s|\x1b\[A)*$|\d+%\||^(prompt|CPU threads): |are held out$"
    )  # what a run says at its start
    lines = [line for line in re.split("[\r\n]", text) if not bars.search(line)]
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
        ("--group-size 1", "--group-size 1: the least is 2 (one completion has no group"),
        (
            "--prompts 3 --group-size 3 --updates 4",
            "--updates 4 does not divide the 9 completions of a step",
        ),
        ("--updates 0", "--updates 0: the least is 1"),
        ("--temperature 0", "--temperature 0.0: it must be above 0 and finite"),
        ("--temperature nan", "--temperature nan"),
        ("--temperature -1", "--temperature -1.0"),
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
        ("--seed -1", "--seed -1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: it must be below 2**32"),
        ("--micro-batch 0", "--micro-batch 0: a number of rows"),
        ("--sample-batch few", "--sample-batch few"),
        ("--overlong-cache 100 --max-new-tokens 50", "--overlong-cache is over --max-new-tokens"),
        ("--prompt Solve!", "--prompt must hold {question}"),
        ("--dtype fp16", "--dtype fp16: auto, fp32 or bf16"),
        ("--device tpu", "--device tpu: auto, cpu, cuda or cuda:N"),
        ("--device cpu:x", "--device cpu:x"),
        ("--device cuda:99", "--device cuda:99: torch sees"),
        ("--preset big", "--preset is auto, tiny or gsm8k, not 'big'"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--step 3", "no option --step; did you mean --steps?"),
        ("--option eps_hgih=0.3", "tepo has no option 'eps_hgih'; it has eps_low=0.2"),
        ("--option eps_high", "--option eps_high=: a finite number"),
        ("--option eps_high=nan", "--option eps_high=nan: a finite number"),
        ("--option eps_high=-1", "--option eps_high=-1: a finite number, not negative"),
        ("--algo dapo --beta 0.1", "dapo has no option 'beta'"),
        ("--algo gtpo --option normalize=sideways", "normalize"),
    ],
)
def test_nonsense_options(capsys, monkeypatch, tmp_path, words, line):
    """Refused before any model or data set is loaded, and before a folder is made."""
    for name in ("load_policy", "load_problems"):
        monkeypatch.setattr(start, name, lambda *_: pytest.fail("refused only after loading"))
    assert line in error_line(capsys, *WORDS, "--out", tmp_path / "run", *words.split())
    assert not (tmp_path / "run").exists()


def test_every_number_is_checked():
    """No option that is a number takes -1 (but for k's like, none takes what it cannot use)."""
    for preset, defaults in DEFAULTS.items():
        for name, value in defaults.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                with pytest.raises(ValueError, match=name.replace("_", "-")):
                    fill({"preset": preset, name: -1})


def test_defaults_are_no_nonsense():
    for algo in ALGORITHMS:
        for preset in DEFAULTS:
            fill({"algo": algo, "preset": preset})


# Data

GOOD = '{"question": "1+1?", "answer": "#### 2"}'


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "holds no problem"),
        (["", "  ", ""], "holds no problem"),
        ([GOOD, "", "{question: 1}"], "line 3 is not JSON"),
        ([GOOD, GOOD[:-3]], "line 2 is not JSON"),
        ([GOOD, "[" * 100_000], "line 2 is not JSON"),
        ([GOOD, '{"question": "q", "answer": ' + "9" * 5000 + "}"], "line 2 is not JSON"),
        ([GOOD, '["1+1?", "2"]'], 'line 2: need {"question": text, "answer": text or number}'),
        ([GOOD, '{"question": "1+1?"}'], "line 2: need"),
        ([GOOD, '{"answer": "2"}'], "line 2: need"),
        ([GOOD, '{"question": "1+1?", "answer": true}'], "line 2: need"),
        ([GOOD, '{"question": "1+1?", "answer": null}'], "line 2: need"),
        ([GOOD, '{"question": " ", "answer": "2"}'], "line 2: the question is empty"),
        (
            [GOOD, '{"question": "q", "answer": "two"}'],
            "line 2: no number to compare with in the answer 'two'",
        ),
        ([GOOD, '{"question": "q", "answer": "2 or 3"}'], "line 2: no number"),
        ([GOOD, '{"question": "q", "answer": "2 #### "}'], "line 2: no number"),
        (
            [GOOD, r'{"question": "half \ud83d a pair", "answer": "2"}'],
            r"line 2: '\ud83d' is no character",
        ),
        ([GOOD], "holds one problem; two are the least"),
        ([GOOD, GOOD], "holds one problem; two are the least"),
    ],
)
def test_bad_data(capsys, monkeypatch, tmp_path, rows, line):
    monkeypatch.setattr(
        start, "load_policy", lambda *_: pytest.fail("refused only after the model was loaded")
    )
    path = tmp_path / "bad.jsonl"
    write(path, rows)
    found = error_line(capsys, *WORDS, "--data", path, "--out", tmp_path / "run")
    assert line in found and str(path) in found and len(found) < 400
    assert not (tmp_path / "run").exists()


def test_data_that_are_no_text(capsys, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode("utf-16"))
    assert f"cannot read {path}" in error_line(
        capsys, *WORDS, "--data", path, "--out", tmp_path / "run"
    )


def test_data_that_are_not_there(capsys, tmp_path):
    words = [*WORDS, "--out", tmp_path / "run", "--data"]
    assert f"cannot read {tmp_path / 'no.jsonl'}" in error_line(
        capsys, *words, tmp_path / "no.jsonl"
    )
    (tmp_path / "train.jsonl").write_text(GOOD)
    assert "holds no test.jsonl" in error_line(capsys, *words, tmp_path)
    (tmp_path / "test.jsonl").write_text(GOOD)
    assert "all of them are held out too" in error_line(capsys, *words, tmp_path)


def test_duplicates_and_overlap(capsys, tmp_path):
    """Of a repeated question the first stays, and that is said; what is held out is not trained on."""
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in (1, 2, 1, 3, 1)]
    rows[4]["answer"] = "7"
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[1:2])
    words = [*WORDS, "--data", tmp_path, "--steps", "1", "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "train.jsonl: 2 problems repeat a question; the first of each is kept" in printed
    assert "dropped problems: 1 of training that are held out too" in printed
    found = data.load_problems(str(tmp_path), "train")
    assert [(row["question"], row["answer"]) for row in found] == [
        ("1+1?", "2"),
        ("2+1?", "3"),
        ("3+1?", "4"),
    ]


def test_one_file_is_split_for_good(tmp_path, capsys):
    """The last tenth is held out, duplicates or not; both calls see the same split, and one tells of the duplicates."""
    rows = [{"question": f"{n % 30}+1?", "answer": str(n % 30 + 1)} for n in range(40)]
    write(tmp_path / "all.jsonl", rows)
    train_rows, test_rows = (
        data.load_problems(str(tmp_path / "all.jsonl"), split) for split in ("train", "test")
    )
    assert train_rows + test_rows == rows[:30] and len(test_rows) == 3
    assert capsys.readouterr().out.count("10 problems repeat a question") == 1


def test_long_prompts_are_dropped_and_counted(capsys, tmp_path):
    """The tiny model has room for 256 tokens, 8 of them for the completion: a prompt of 248 stays, of 249 does not."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    encode = Prompts(tokenizer).encoder()
    asked = {248: None, 249: None}
    for n in asked:
        text = "5" * n
        text = text[: n - (len(encode(text)) - n)]
        assert len(encode(text)) == n
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
    """Read, encoded whole, trained on and written down as it was."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [
        {"question": text, "answer": "٣" if name == "Arabic" else "3"}
        for name, text in SCRIPTS.items()
    ]
    write(tmp_path / "train.jsonl", ["\ufeff" + json.dumps(rows[0], ensure_ascii=False), *rows[1:]])
    write(
        tmp_path / "test.jsonl",
        [{"question": text + "2", "answer": "2"} for text in SCRIPTS.values()],
    )
    for row in data.load_problems(str(tmp_path), "train"):
        text = tokenizer.decode(Prompts(tokenizer).encoder()(row["question"]))
        assert text == unicodedata.normalize("NFC", row["question"]) + "\n"
    words = [
        *WORDS,
        "--data",
        tmp_path,
        "--steps",
        "1",
        "--prompts",
        len(rows),
        "--samples-every",
        "1",
    ]
    words += ["--eval-n", "9", "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    shown = [
        json.loads(line)
        for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert shown[0]["prompt"] in SCRIPTS.values()


# Tokenizers and models


@pytest.fixture
def model_folder(tmp_path):
    return shutil.copytree(
        TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )


def change(path, **values):
    """Set, or with None remove, entries of a JSON file."""
    content = json.loads(path.read_text())
    content = {name: value for name, value in (content | values).items() if value is not None}
    path.write_text(json.dumps(content))


def test_tokenizer_without_pad(model_folder, file, tmp_path, capsys):
    """EOS pads: the mask goes by position, so nothing else changes, be there a pad of its own or not."""
    eos_ids, runs = load_policy(str(model_folder))[2], []
    for pad in ("5", None):
        change(model_folder / "tokenizer_config.json", pad_token=pad)
        assert (load_policy(str(model_folder))[3] in eos_ids) == (pad is None)
        out = tmp_path / f"run{pad}"
        words = [*WORDS, "--model", model_folder, "--data", file, "--steps", "2", "--out", out]
        assert train.main([str(word) for word in words]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs.append(
            [
                {k: v for k, v in row.items() if not k.endswith("_s") and k != "peak_mib"}
                for row in rows
            ]
        )
    assert runs[0] == runs[1]


def test_tokenizer_without_eos(model_folder, file, tmp_path, capsys):
    """The model's own EOS will do; if there is none at all, the policy could never learn to stop."""
    eos_ids = load_policy(str(model_folder))[2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (model_folder / name).read_text().replace("<|endoftext|>", "<|other|>")
        (model_folder / name).write_text(content)
    change(
        model_folder / "tokenizer_config.json", eos_token=None
    )  # transformers adds one, beyond the vocabulary
    assert load_policy(str(model_folder))[2] == eos_ids
    change(model_folder / "generation_config.json", eos_token_id=None)
    change(model_folder / "config.json", eos_token_id=None)
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    assert "the model names no EOS token" in error_line(capsys, *words)


def test_chat_template(model_folder, file, tmp_path, capsys):
    """Used where there is one, plain text where not; one that fails is a line."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.chat_template is None
    plain = Prompts(tokenizer, "{question} Go.").encoder()("1+1?")
    assert plain == tokenizer("1+1? Go.\n").input_ids
    template = "{% for m in messages %}U: {{ m.content }}. {% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    change(model_folder / "tokenizer_config.json", chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    chat = Prompts(tokenizer, "{question} Go.").encoder()("1+1?")
    assert chat == tokenizer("U: 1+1? Go.. A: ").input_ids
    change(
        model_folder / "tokenizer_config.json",
        chat_template="{{ raise_exception('a system turn is wanted') }}",
    )
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
    told = f"makes token {last} of '0 xylophones + 1?', and the model knows {last}: do the two belong together?"
    assert told in error_line(capsys, *words)


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
    source = f"import os\nos.mkdir({str(ran)!r})\nfrom transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n"
    (folder / "evil.py").write_text(source)
    change(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )


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
    """safetensors alone, no code of the folder's own, and nothing made up."""
    spoil(model_folder, tmp_path / "ran")
    words = [*WORDS, "--model", model_folder, "--data", file, "--out", tmp_path / "run"]
    found = error_line(capsys, *words)
    assert line in found and f"cannot load the model '{model_folder}' (a local folder)" in found
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_no_network(capsys, tmp_path, monkeypatch):
    """Neither network nor cache: what to pass instead, and at once, not after a minute of the Hub's library's tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def getaddrinfo(host, *_):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    words = [*WORDS, "--out", tmp_path / "run"]
    assert "Pass --model FOLDER, or --preset tiny" in error_line(
        capsys, *words, "--model", "nobody/no-model"
    )
    line = error_line(capsys, *words, "--data", "nobody/no-data")
    assert "Pass --data FILE.jsonl" in line and "or --data tiny" in line
    assert asked == ["huggingface.co"]  # once; from then on the libraries know
    asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    data.offline_without_network("tiny", str(TINY))
    assert (
        not asked and not huggingface_hub.constants.HF_HUB_OFFLINE
    )  # nothing is wanted of the Hub


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
    assert "is a file; name a folder" in error_line(capsys, *words, tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file; name a folder" in error_line(
        capsys, *words, tmp_path / "file" / "a" / "b"
    )
    assert "/proc/run" in error_line(capsys, *words, "/proc/run")
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_permission(capsys, file, tmp_path, monkeypatch):
    """os.access, since the superuser may write anywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(
        start, "load_policy", lambda *_: pytest.fail("refused only after the model was loaded")
    )
    line = error_line(capsys, *WORDS, "--data", file, "--out", tmp_path / "a" / "run")
    assert f"no permission to write in {tmp_path}; name another folder" in line


def test_overwrite(capsys, file, tmp_path):
    """Deletes the run and nothing else, once the new one can begin; never the model that the new one starts from."""
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
    """A limit on the size of a file stands for the full disk. Afterwards --resume goes on as if nothing had been."""
    every = "8" if at == "metrics.jsonl" else "1"
    words = [
        *WORDS,
        "--data",
        file,
        "--save-every",
        every,
        "--samples-every",
        "0",
        "--steps",
        "8",
        "--out",
    ]
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
    assert (run / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(
        (other / "metrics.jsonl").read_text().splitlines()
    )


def test_full_disk_later(file, tmp_path):
    """What was there stays whole: the checkpoint before, and the model of the run before."""
    words = [*WORDS, "--data", file, "--save-every", "2", "--out", tmp_path / "run"]
    assert child.run(words, tmp_path / "log")[0] == 0
    before = contents(tmp_path / "run")
    words = ["--resume", tmp_path / "run", "--steps", "6"]
    status, log = child.run(words, tmp_path / "log", "file_size_limit", 1_000_000)
    assert status == 2 and "Traceback" not in log, log
    assert f"when that is mended: python train.py --resume {tmp_path / 'run'}" in log
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    grown = {path.name for path in after if after[path] != before[path]}
    assert grown == {"config.json", "metrics.jsonl", "samples.jsonl"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    trained = before[metrics].rsplit(b"\n", 2)[0]  # without the evaluation after what was the last
    assert after[metrics].startswith(trained + b"\n") and after[metrics].endswith(b"}\n")


def test_full_disk_at_the_end(file, tmp_path):
    """The trained model does not fit: the line says so, the run is not "done", and --resume writes it."""
    words = [*WORDS, "--data", file, "--save-every", "0", "--out", tmp_path / "run"]
    status, log = child.run(words, tmp_path / "log", "file_size_limit", 1_000_000)
    assert status == 2 and f"cannot write {tmp_path / 'run' / 'model'}: " in one_line(
        log.split("\n", 1)[1]
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "running"
    assert child.run(["--resume", tmp_path / "run"], tmp_path / "log")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "done"


def test_append_lines_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    checkpoint.append_lines(path, [{"x": 1.0, "y": [float("nan"), {"z": float("-inf")}]}])
    assert path.read_text() == '{"x": 1.0, "y": [null, {"z": null}]}\n'

    class Full:
        """A file that takes ten bytes, and then none."""

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
    """Make the loss, or only its gradient, not finite in these calls of it, counted from 1 after the try of options."""
    grpo = train.importlib.import_module("grpo")
    real, count = grpo.loss, [0]

    def loss(logprobs, old_logprobs, *args, **options):
        value = real(logprobs, old_logprobs, *args, **options)
        if not logprobs.requires_grad:
            return value
        count[0] += 1
        if count[0] in calls:
            if how == "loss":
                value = value * float("nan")
            elif how == "push":  # of the first row alone
                value = value + (logprobs[0] * float("inf")).sum() * 0
            else:
                logprobs.register_hook(
                    lambda grad: grad * 1e38
                )  # finite, and its norm over the weights is not
        return value

    monkeypatch.setattr(grpo, "loss", loss)


@pytest.fixture
def half_right(monkeypatch):
    monkeypatch.setattr(train, "correct", child.parity)


GRPO = [
    *WORDS,
    "--algo",
    "grpo",
    "--samples-every",
    "0",
    "--group-size",
    "4",
    "--save-every",
    "1",
    "--lr",
    "0.001",
]


@pytest.mark.parametrize("how", ["loss", "push", "gradient"])
def test_skipped_update(monkeypatch, half_right, file, tmp_path, capsys, how):
    """Two updates in a row of four are skipped and counted, their rows are in samples.jsonl, and the run goes on."""
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
    assert not any(moves for bad, moves in moved if bad) and any(
        moves for bad, moves in moved if not bad
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if row["phase"] == "train"] == [0, 2, 0, 0]
    shown = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {2} and all(row["skipped"] for row in shown)
    assert len(shown) == (2 if how == "push" else 8)  # the rows to blame, or the whole mini-batches
    assert all(
        len(row["tokens"]) == len(row["advantages"]) == len(row["logprobs"]) for row in shown
    )


def test_skips_that_are_not_in_a_row(monkeypatch, half_right, file, tmp_path, capsys):
    spoil(monkeypatch, {1, 2, 4, 5, 7, 8}, "loss")
    assert (
        train.main([str(word) for word in [*GRPO, "--data", file, "--out", tmp_path / "run"]]) == 0
    )


def test_three_skipped_in_a_row(monkeypatch, half_right, file, tmp_path, capsys):
    """... end the run with exit 1; the checkpoint before is the last, and its weights are what they were."""
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
    assert train.main(["--resume", str(out)]) == 0  # the fault is mended: it goes on after step 3
    assert "after step 3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1.5, -2.0])
def test_reward_that_is_none(monkeypatch, file, tmp_path, capsys, reward):
    """Refused, with the completion that it was given to."""
    seen = []

    def correct(text, answer, truncated):
        seen.append(text)
        return 0.5 if len(seen) < 4 else reward

    monkeypatch.setattr(train, "correct", correct)
    line = error_line(capsys, *WORDS, "--data", file, "--out", tmp_path / "run")
    told = f"the reward {reward} is not a number in [-1, 1]; it was given to {seen[3]!r}"
    assert " ".join(told.split()) in line
