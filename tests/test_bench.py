"""bench.py on small models: it measures what it says, and each ratio is ours over the other's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from tools import bench, tricks

TINY = str(ROOT / "tiny")

STEP = {"step_s": 10.0, "tokens_per_s": 90.0, "peak_mib": 1500.0}
PEER = {"step_s": 20.0, "tokens_per_s": 45.0, "peak_mib": 6000.0}
SPEEDS = {
    "plain": {"peak": 8000, "seconds": 40.0},
    "head": {"peak": 4000, "seconds": 30.0},
    "row": {"peak": 1000, "seconds": 44.0},
    "ours": {**STEP, "rollout_s": 4.0, "prompts": ["a", "a"]},
    "trl": {**PEER, "prompts": ["a", "a"]},
}


def test_ratios_are_ours_over_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure", lambda name, argv: dict(SPEEDS[name]))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1.16.0")
    argv = ["--only", "logprobs,step", "--peer", "--model", TINY]
    bench.main([*argv, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["logprobs"] == {"memory_ratio": 1 / 8, "time_ratio": 1.1}
    assert found["step"]["tokens_per_s"] == 90 and found["step"]["peak_mib"] == 1500
    assert found["peer"]["tokens_per_s_ratio"] == 2 and found["peer"]["memory_ratio"] == 1 / 4
    assert "2.00x the tokens/s, 0.25x the memory" in capsys.readouterr().out


def test_other_prompts_are_not_compared(monkeypatch):
    speeds = SPEEDS | {"trl": SPEEDS["trl"] | {"prompts": ["a", "b"]}}
    monkeypatch.setattr(bench, "measure", lambda name, argv: dict(speeds[name]))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="not given the same prompts"):
        bench.main(["--only", "step", "--peer", "--model", TINY])


@pytest.fixture
def sums(tmp_path):
    """The options that name the embedded model, a few sums as problems, and one step."""
    for name, first in {"train": 0, "test": 9}.items():
        numbers = range(first, first + 9)
        rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--model", TINY, "--data", str(tmp_path), "--steps", "1"]


@pytest.fixture
def beside_trl(sums, monkeypatch):
    argv = ["--only", "step", "--peer", *sums, "--max-new-tokens", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(bench.importlib.util, "find_spec", lambda name: name)
        return bench.parse_args(argv)


def test_beside_a_peer_each_completion_is_rewarded_by_its_text_alone(beside_trl, monkeypatch):
    rewarded = []
    monkeypatch.setattr(bench, "worth", lambda text: rewarded.append(text) or 1.0)
    prompts = bench.ours(beside_trl, "cpu")["prompts"]
    assert len(prompts) == 2 * 16 and len(set(prompts)) == 4  # two steps
    assert all(len(set(prompts[i : i + 8])) == 1 for i in range(0, 32, 8))
    assert set(map(type, rewarded)) == {str}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between TRL and transformers
def test_the_peer_is_given_the_same_prompts(beside_trl):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -r scale/requirements.txt")
    found, peer = bench.ours(beside_trl, "cpu"), bench.trl(beside_trl, "cpu")
    assert found["prompts"] == peer["prompts"]
    assert found["tokens_per_s"] > 0 and peer["tokens_per_s"] > 0


def test_a_model_is_measured_in_processes_of_its_own(sums, tmp_path, capsys):
    words = ["--only", "rollout,step", *sums, "--max-new-tokens", "16"]
    bench.main([*words, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"]["tokens_per_s"] > 0 and 50 < found["step"]["peak_mib"] < 5000
    assert 0.1 < found["rollout"]["tokens_per_s_ratio"] < 20
    assert "16 rows" in capsys.readouterr().out


def test_the_ways_held_against_each_other_are_one_gradient(monkeypatch):
    small = {**bench.QWEN, "num_hidden_layers": 1, "hidden_size": 28, "intermediate_size": 32}
    config = Qwen2Config(**{**small, "vocab_size": 50})
    grads = []
    for size, through_head in ((4, False), (4, True), (1, True)):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        batch = bench.random_batch(50, 4, 6, "cpu")
        bench.backward(model, batch, torch.randn(4, 6), size, through_head=through_head)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-3, atol=1e-4)


def test_a_trick_changes_no_number(monkeypatch, tmp_path, capsys):
    parse = tricks.parse
    monkeypatch.setattr(tricks, "parse", lambda line: parse([*line, "--prompts", "4"]))
    monkeypatch.setattr(tricks, "WARM_UP", 1)
    lines = []
    step = tricks.Trainer.step
    monkeypatch.setattr(
        tricks.Trainer, "step", lambda *args: lines.append(step(*args)[0]) or [lines[-1]]
    )
    assert tricks.main(["--rounds", "1", "--csv", str(tmp_path / "tricks.csv")]) == 0
    table = pd.read_csv(tmp_path / "tricks.csv")
    assert len(table) == 8 and (table.ratio > 0.2).all() and len(lines) == 2 + 2 * 8
    for line in lines[2:]:
        for name in ("accuracy", "entropy", "kl", "length", "grad_norm"):
            assert line[name] == pytest.approx(lines[1][name], rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--only", "speed"], "no part 'speed'"),
        (["--peer"], "--model FOLDER"),
        (["--peer", "--only", "rollout", "--model", TINY], "the part step"),
        (["--peer", "--model", TINY, "--micro-batch", "3"], "does not divide the 16 completions"),
        (["--prompts", "0"], "--prompts 0: the least is 1"),
        (["--json", "/nope/found.json"], "its folder does not exist"),
        (["--json", "/"], "it is a folder"),
        (["--model", "nope"], "bench.py: error: --model nope: no such folder"),
    ],
)
def test_a_wrong_command_is_one_line(argv, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    printed = "".join(capsys.readouterr())
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("bench.py: error: ") and told in printed


def test_the_checks_for_a_gpu_run_on_a_cpu(tmp_path):
    line = ["bash", str(ROOT / "tools" / "gpu.sh"), "--device", "cpu", str(tmp_path / "gpu.json")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]  # the third one after a resume
    assert found["tests"].startswith("3 passed") and 0.1 < found["peak_gib"] / found["fit_gib"] < 10
    assert found["tokens_per_s"].keys() == {"plain", "static", "ours"}
    assert min(found["tokens_per_s"].values()) > 0 and "resuming" in done.stdout
