"""--fit: its parts by hand, its bytes per token against memory.py's, the tables made of it."""

import csv
import re

import pytest
import torch
from conftest import ROOT
from small import refused, run
from test_architectures import loaded
from transformers import LlamaConfig, Qwen2Config

from run import fit
from run.checks import fill
from run.parser import parse
from run.start import adapt
from trainer.memory import bytes_per_token

LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}
WAYS = ("", "--gradient-checkpointing", "--lora 16", "--lora 16 --gradient-checkpointing")
QWEN = {  # hidden, intermediate, layers, heads, of 2 for keys and values: the public configs
    "0.5B": (896, 4864, 24, 14),
    "1.5B": (1536, 8960, 28, 12),
    "3B": (2048, 11008, 36, 16),
}


@pytest.fixture
def same_weights(monkeypatch):
    """No random weights: to draw them takes longer than all else, and no size depends on them."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: self.fill_(0.01))


def printed(capsys, *words):
    """({group: {part: GiB}}, {GiB of a card: the rest of its line}) that --fit prints."""
    capsys.readouterr()
    assert run("--fit", *words) == 0
    groups, cards, title = {}, {}, None
    for line in capsys.readouterr().out.splitlines():
        if part := re.fullmatch(r"  (\w* +)(.+?) +([\d.]+)", line):
            title = part[1].strip() or title
            groups.setdefault(title, {})[part[2]] = float(part[3])
        if card := re.fullmatch(r" +(\d+) GiB +(.*)", line):
            cards[int(card[1])] = " ".join(card[2].split())
    return groups, cards


def test_the_parts_of_full_training_by_hand(tmp_path, capsys, same_weights):
    """A Llama of 8 layers of 4 x 1024^2 + 3 x 1024 x 2048 weights, and a head of 2^15 x 1024."""
    LlamaConfig(
        vocab_size=2**15,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    words = ["--model", tmp_path, "--max-new-tokens", "56", "--prompts", "8"]
    groups, cards = printed(capsys, *words)
    weights = (8 * (4 * 2**20 + 3 * 2**21) + 2**25) / 2**30  # x 2^30, without the norms
    held = {"weights": 4 * weights, "AdamW's two moments": 8 * weights}
    update = {
        "gradients": 4 * weights,
        "three chunks of logits": 3 * 4 * 2**26 / 2**30,
        "fp32 weights in bf16": 2 * weights,
        "gradient of the head in bf16": 2 * 2**25 / 2**30,
    }
    cache = 64 * (2 * 2 * 8 * 1024 * 2 * 256 + 12 * 2**15) / 2**30  # keys and values, room for 512
    rollout = {"the copy that samples": 2 * weights, "64 x 256 tokens": cache}
    token = groups["update"]["1 x 256 tokens"]
    for title, parts, before in (
        ("always", {**held, "CUDA itself (assumed)": 0.5}, 0),
        ("update", {**update, "1 x 256 tokens": token}, groups["always"]["in all"]),
        ("rollout", rollout, groups["always"]["in all"]),
    ):
        expected = {**parts, "in all": before + sum(parts.values())}
        assert groups[title] == pytest.approx(expected, abs=0.011), title
    left = 0.9 * (8 - groups["update"]["in all"] + token)
    assert int(cards[8].split()[0]) == min(16, int(left / token))
    groups, cards = printed(capsys, *words, "--device", "cpu", "--preset", "gsm8k")
    assert groups["always"]["weights"] == pytest.approx(4 * weights, abs=0.01) and not cards
    assert groups["rollout"]["weights packed for this CPU"] == pytest.approx(4 * weights, abs=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_token_needs_what_micro_batch_auto_counts_in_the_whole_model(kind, way, dtype):
    """gemma2 has no plain head: its logits are kept."""
    model = loaded(kind, **LLAMA)
    o = fill(parse(f"--preset tiny --device cpu --dtype {dtype} {way}".split()))
    got = fit.bytes_of_token(o, model.config)
    if o.lora:
        adapt(o, model)
    want = bytes_per_token(model, dtype, kind == "llama", o.gradient_checkpointing)
    assert got == pytest.approx(want, rel=0.002 if kind == "gemma2" else 0)


def test_it_needs_no_gpu_no_weights_and_no_data_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**LLAMA, vocab_size=64, num_attention_heads=4).save_pretrained("model")
    _, cards = printed(capsys, "--model", "model", "--data", "/nope")
    assert cards == dict.fromkeys((8, 12, 16, 24), "16 64 2,048 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "no config of '/nope'" in refused(capsys, "--fit", "--model", "/nope")


def qwen_config(size):
    hidden, intermediate, layers, heads = QWEN[size]
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )


def cells(path, name):
    """{way: the cells of its row} of the table in a .md file whose first column is `name`."""
    lines = path.read_text("utf-8").split(f"| {name} |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].replace("full", "").strip(): row[1:] for row in rows}


def test_the_tables_are_what_fit_prints(tmp_path, capsys, same_weights, monkeypatch):
    short = cells(ROOT / "README.md", "rows per pass")
    known, count = {}, fit.kept_per_token

    def counted(model, *how):  # the same with and without checkpointing
        key = sum(p.numel() for p in model.parameters())
        known[key] = known.get(key) or count(model, *how)
        return known[key]

    monkeypatch.setattr(fit, "kept_per_token", counted)
    for column, size in enumerate(QWEN):
        qwen_config(size).save_pretrained(tmp_path / size)
        long = cells(ROOT / "docs" / "benchmarks.md", f"Qwen2.5-{size}")
        assert short.keys() == long.keys() == set(WAYS)
        for way in WAYS:
            groups, cards = printed(capsys, "--model", tmp_path / size, *way.split())
            assert ("start" in groups) == bool("lora" in way)
            fits = [line.split()[0] if "fit" not in line else "-" for line in cards.values()]
            assert short[way][column] == " / ".join(fits)
            most = [re.sub(r".* ([\d,]+) tokens", r"\1", line) for line in cards.values()]
            needs = [f"{groups[title]['in all']:.1f}" for title in ("update", "rollout")]
            assert long[way] == [*needs, *("-" if "fit" in cell else cell for cell in most)]


def test_measured_peaks_are_within_15_percent():
    with open(ROOT / "docs" / "fit.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        assert float(row["arithmetic_gib"]) == pytest.approx(float(row["measured_gib"]), rel=0.15)
