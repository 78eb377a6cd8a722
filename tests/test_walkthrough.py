"""examples/walkthrough.py prints what slow loops over the tokens give, and draws its picture."""

import runpy
import sys

import pytest
import reference
import torch
from conftest import ROOT
from test_plot import check_picture

from trainer.logprobs import token_logprobs
from trainer.policy import load_policy

SCRIPT = ROOT / "examples" / "walkthrough.py"
NAMES = ["GRPO", "DAPO", "GSPO", "TEPO", "GTPO", "GRPO-S", "TR-GRPO"]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(what the script prints as {title: lines}, its variables), run in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setattr(sys, "path", sys.path[:])
        said = []
        patch.setattr(
            "builtins.print",
            lambda *words, sep=" ", end="\n": said.append(sep.join(map(str, words)) + end),
        )
        found = runpy.run_path(str(SCRIPT), run_name="__main__")
        check_picture(found["Path"]("walkthrough.png"), 1280)
    sections = {}
    for part in "".join(said).strip().split("\n\n"):
        title, underline, *lines = part.split("\n")
        assert underline == "-" * len(title) and lines[0][0].isupper()  # a sentence
        sections[title] = lines
    return sections, found


def want_advantages(found):
    rewards = found["rewards"]
    more = {"entropy": found["entropy"].tolist(), "mask": found["mask"].tolist()}
    want = dict.fromkeys(NAMES, reference.grpo_advantages(rewards, 8))
    want["GTPO"] = reference.gtpo_advantages(rewards, 8, **more)
    want["GRPO-S"] = reference.grpo_s_advantages(rewards, 8, **more)
    return want


def want_pushes(found):
    """{method: -dL/dlogp [8][T]} of the slow loops on policy, in float64."""
    old, mask, want = found["old_logprobs"].tolist(), found["mask"].tolist(), {}
    for name, advantages in want_advantages(found).items():
        function = getattr(reference, name.lower().replace("tr-", "tr").replace("-", "_") + "_loss")
        _, gradient = function(old, old, advantages, mask)
        want[name] = [[-g for g in row] for row in gradient]
    return want


def numbers(line, count):
    return [float(word) for word in line.split()[-count:]]


def test_the_group_is_mixed_and_graded(walk):
    sections, found = walk
    assert 2 <= sum(found["rewards"]) <= 6 and sum(map(len, sections.values())) < 90
    for line, reward in zip(sections["Eight completions"][2:], found["rewards"], strict=True):
        assert float(line.split()[1]) == reward
        assert line.endswith("#### 39'") == (reward == 1)  # 36 + 8 - 5


def test_the_seven_advantages_are_those_of_the_slow_loops(walk):
    sections, found = walk
    want = want_advantages(found)
    for i, line in enumerate(sections["The seven advantages"][3:]):
        tokens = want["GTPO"][i][: found["lengths"][i]]
        row = [i, found["rewards"][i], want["GRPO"][i], want["GRPO-S"][i], tokens[0], tokens[-1]]
        assert numbers(line, 6) == pytest.approx(row, abs=6e-5)
    assert i == 7


def test_what_is_worked_out_by_hand_can_be_followed(walk):
    """The printed sums, from their own printed numbers."""
    sections, found = walk
    sums = []
    for line in sum(sections.values(), []):
        if line.count(" = ") == 1 + line.startswith("  A = ") and any(
            sign in line for sign in "(x/"
        ):
            left, right = line.removeprefix("  A = ").strip().rstrip(".").split(" = ")
            if left.split()[0] in NAMES:  # NAME push = sum
                left, right = right, left.split()[1]
            if "exp" not in left and "by" not in left:
                assert eval(left.replace(" x ", " * ")) == pytest.approx(float(right), abs=6e-5)
                sums.append(line)
    assert len(sums) == 4 + 2 + 7 + 1  # advantages, shaped rewards, pushes, the loss


def test_the_pushes_are_those_of_the_slow_loops(walk):
    sections, found = walk
    want = want_pushes(found)
    for name in NAMES:
        values = found["pushes"][name].tolist()
        for row, wanted in zip(values, want[name], strict=True):
            assert row == pytest.approx(wanted, abs=1e-6)
    for i, line in enumerate(sections["The pushes"][2:]):
        sums = [1000 * sum(want[name][i]) for name in NAMES]
        assert numbers(line, 7) == pytest.approx(sums, abs=6e-3)


def test_the_update_is_that_of_the_machinery(walk):
    """The gradient in two halves, as trainer/update.py takes it, makes the same step."""
    sections, found = walk
    model, *_ = load_policy("tiny")
    rows = [found["prompt"]] * 8, found["completions"], found["mask"]

    def logprobs():
        return token_logprobs(model, *rows, temperature=1.0)[0]

    before = logprobs()
    before.backward(gradient=-torch.tensor(want_pushes(found)["TEPO"]).float())
    with torch.no_grad():
        for weight in model.parameters():
            weight -= found["LR"] * weight.grad
        after = logprobs()
    for i, line in enumerate(sections["What became more likely"][2:]):
        row, reward, was, now, change, _ = numbers(line, 6)
        assert (row, reward) == (i, found["rewards"][i])
        assert was == pytest.approx(before[i].sum().item(), abs=2e-3)
        assert now == pytest.approx(after[i].sum().item(), abs=2e-3)
        assert change == pytest.approx(now - was, abs=1e-9)  # of the printed numbers
        assert (change > 0) == (reward == 1)  # what the step is for


def test_a_notebook_without_a_file_finds_the_project(monkeypatch):
    setup = SCRIPT.read_text().split("# %%\n")[1].split("import torch")[0]
    monkeypatch.setattr(sys, "path", sys.path[:])
    for folder in (ROOT, ROOT / "examples"):
        monkeypatch.chdir(folder)
        found = {}
        exec(setup, found)
        assert found["ROOT"] == ROOT and sys.path[0] == str(ROOT)
