"""examples/walkthrough.py runs from any folder, and prints what slow loops over the tokens give."""

import json
import os
import subprocess
import sys

import pytest
import reference
import torch
from conftest import ROOT

from trainer.logprobs import token_logprobs
from trainer.policy import load_policy

SCRIPT = ROOT / "examples" / "walkthrough.py"
NAMES = ["GRPO", "DAPO", "GSPO", "TEPO", "GTPO", "GRPO-S", "TR-GRPO"]
# Runs the script as `python SCRIPT` does, and writes some of its variables to a file.
RUN = """
import json, runpy, sys
found = runpy.run_path(sys.argv[1], run_name="__main__")
kept = {name: found[name] for name in ("prompt", "rewards", "LR", "one_right", "one_wrong")}
for name in ("completions", "mask", "old_logprobs", "entropy"):
    kept[name] = found[name].tolist()
json.dump(kept, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(what the script prints as {title: lines}, some of its variables)."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-c", RUN, str(SCRIPT), "kept.json"]
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    sections = {}
    for part in done.stdout.strip().split("\n\n"):
        title, underline, *lines = part.split("\n")
        assert underline == "-" * len(title)
        sections[title] = lines
    return sections, json.loads((folder / "kept.json").read_text())


def floats(words):
    return [float(word) for word in words]


def want_advantages(kept):
    rewards = kept["rewards"]
    more = {"entropy": kept["entropy"], "mask": kept["mask"]}
    found = dict.fromkeys(NAMES, reference.grpo_advantages(rewards, 8))
    found["GTPO"] = reference.gtpo_advantages(rewards, 8, **more)
    found["GRPO-S"] = reference.grpo_s_advantages(rewards, 8, **more)
    return found


def test_the_group_is_mixed_and_graded(walk):
    sections, kept = walk
    assert 2 <= sum(kept["rewards"]) <= 6 and len(kept["rewards"]) == 8
    assert sections["The rewards"][0] == "rewards: " + " ".join(f"{r:g}" for r in kept["rewards"])
    for line, reward in zip(sections["Eight completions"], kept["rewards"], strict=True):
        assert line.endswith("#### 39'") == (reward == 1)  # 36 + 8 - 5


def test_the_seven_advantages_are_those_of_the_slow_loops(walk):
    sections, kept = walk
    want = want_advantages(kept)
    table = sections["The seven advantages"][2:]
    for i, line in enumerate(table):
        row, reward, same, grpo_s, first, last = floats(line.split())
        tokens = sum(kept["mask"][i])
        assert (row, reward) == (i, kept["rewards"][i])
        assert same == pytest.approx(want["GRPO"][i], abs=6e-5)
        assert grpo_s == pytest.approx(want["GRPO-S"][i], abs=6e-5)
        assert first == pytest.approx(want["GTPO"][i][0], abs=6e-5)
        assert last == pytest.approx(want["GTPO"][i][tokens - 1], abs=6e-5)
    assert len(table) == 8


def test_advantages_by_hand_can_be_followed(walk):
    """Each line A = (value - mean) / (std + 0.0001) = A, from its own printed numbers."""
    sections, _ = walk
    count = 0
    for line in sum(sections.values(), []):
        if line.startswith("  A = "):
            sum_, result = line.removeprefix("  A = ").split(" = ")
            assert eval(sum_) == pytest.approx(float(result), abs=6e-5)  # of our own text
            count += 1
    assert count == 5


def want_pushes(kept):
    """{method: (loss, -dL/dlogp [8][T])} of the slow loops on policy, in float64."""
    old, mask, found = kept["old_logprobs"], kept["mask"], {}
    for name, advantages in want_advantages(kept).items():
        function = getattr(reference, name.lower().replace("tr-", "tr").replace("-", "_") + "_loss")
        value, gradient = function(old, old, advantages, mask)
        found[name] = value, [[-g for g in row] for row in gradient]
    return found


def test_the_pushes_are_those_of_the_slow_loops(walk):
    sections, kept = walk
    want = want_pushes(kept)
    for line, name in zip(sections["The losses before the update"], NAMES, strict=True):
        assert line.split()[0] == name
        assert float(line.split()[1]) == pytest.approx(want[name][0], abs=6e-5)
    for i in (kept["one_right"], kept["one_wrong"]):
        header, *table = sections[f"The pushes on completion {i}, times 1000"]
        assert header.split() == ["token", *NAMES] and len(table) == sum(kept["mask"][i])
        for t, line in enumerate(table):
            for value, name in zip(line.split()[-7:], NAMES, strict=True):
                assert float(value) == pytest.approx(1000 * want[name][1][i][t], abs=6e-4)
    for i, line in enumerate(sections["The sum of the pushes on each completion, times 1000"][1:]):
        for value, name in zip(line.split()[2:], NAMES, strict=True):
            assert float(value) == pytest.approx(1000 * sum(want[name][1][i]), abs=6e-3)


def test_the_update_is_that_of_the_machinery(walk):
    """The gradient in two halves, as trainer/update.py takes it, makes the same step."""
    sections, kept = walk
    model, *_ = load_policy("tiny")
    mask = torch.tensor(kept["mask"])
    rows = [kept["prompt"]] * 8, torch.tensor(kept["completions"]), mask

    def logprobs():
        return token_logprobs(model, *rows, temperature=1.0)[0]

    push = torch.tensor(want_pushes(kept)["TEPO"][1]).float()
    before = logprobs()
    before.backward(gradient=-push)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= kept["LR"] * weight.grad
        after = logprobs()
    table = sections["What became more likely"][1:9]
    for i, line in enumerate(table):
        row, reward, was, now, change, factor = floats(line.split())
        assert (row, reward) == (i, kept["rewards"][i])
        assert was == pytest.approx(before[i].sum().item(), abs=2e-3)
        assert now == pytest.approx(after[i].sum().item(), abs=2e-3)
        assert change == pytest.approx(now - was, abs=2e-5)
        assert (change > 0) == (reward == 1)  # what the step is for


def test_a_notebook_without_a_file_finds_the_project(monkeypatch):
    setup = SCRIPT.read_text().split("# %%\n")[1].split("import torch")[0]
    monkeypatch.setattr(sys, "path", sys.path[:])
    for folder in (ROOT, ROOT / "examples"):
        monkeypatch.chdir(folder)
        found = {}
        exec(setup, found)
        assert found["ROOT"] == ROOT and sys.path[0] == str(ROOT)
