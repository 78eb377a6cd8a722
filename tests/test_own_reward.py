"""--reward FILE.py: the examples, the parts, accuracy, errors, resume, compare."""

import json
import shutil
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from small import lines, own_file, refused, run, timeless

from run import origin, ownfile, start
from run.options import Options
from run.ownfile import load_file
from run.ownreward import load_reward
from trainer.data import load_problems
from trainer.grading import Grader

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("quiet_run")
SMALL = """--preset tiny --prompts 2 --group-size 4 --updates 2 --max-new-tokens 12 --eval-n 4
    --k 0 --steps 2 --save-every 1""".split()
COUNTDOWN = ["--data", str(EXAMPLES / "countdown.jsonl")]


def trained(folder, path, *words):
    """The folder of a small run with this reward."""
    assert run(*SMALL, "--reward", path, "--out", folder, *words) == 0
    return folder


def grader(path, **options):
    return Grader(Options(**options), load_reward(str(path)))


# The examples


@pytest.mark.parametrize("name", ["format_reward", "length_reward", "countdown"])
def test_each_example_trains(tmp_path, name):
    words = COUNTDOWN if name == "countdown" else []
    folder = trained(tmp_path / "run", EXAMPLES / f"{name}.py", *words)
    for line in lines(folder, "train"):
        parts = {key: value for key, value in line.items() if key.startswith("reward/")}
        names = {"format_reward": {"right", "format"}, "countdown": {"right", "legal"}}
        assert set(parts) == {f"reward/{part}" for part in names.get(name, ())}
        if parts:
            assert line["reward"] == pytest.approx(sum(parts.values()))
            assert parts["reward/right"] == line["accuracy"]


def test_format_reward_by_hand():
    problem = {"question": "q", "answer": "7"}
    reward = grader(EXAMPLES / "format_reward.py").reward
    assert reward("7\n#### 7", problem, 5, False) == (1, 1.2, {"right": 1, "format": 0.2})
    assert reward("7\n#### 8\n", problem, 5, False) == (0, 0.2, {"right": 0, "format": 0.2})
    assert reward("#### 7 eggs", problem, 5, False) == (1, 1.0, {"right": 1, "format": 0})
    assert reward("#### 7", problem, 5, True) == (0, 0, {"right": 0, "format": 0})


def test_length_reward_by_hand():
    problem = {"question": "q", "answer": "7"}
    reward = grader(EXAMPLES / "length_reward.py").reward
    assert reward("#### 7", problem, 3, False)[:2] == (1, pytest.approx(1 - 0.5 * 6 / 200))
    assert reward("x" * 500 + "\n#### 7", problem, 3, False)[:2] == (1, 0.5)
    assert reward("#### 8", problem, 3, False)[:2] == (0, 0)


COUNTDOWN_CASES = [
    ("#### 3 * 7 + 8", True, True),
    ("so\n#### 8+7*3\nthat is it", True, True),
    ("#### 3 * 8 + 7", False, True),
    ("#### (3 + 7) * 8", False, True),
    ("#### 3 * 7 + 8 + 0", False, False),  # another number
    ("#### 21 + 8", False, False),
    ("#### 3 * 7", False, False),  # one is left out
    ("3 * 7 + 8", False, False),  # no marker
    ("#### 8 / (3 - 3)", False, False),
    ("#### 3 ** 7 ** 8", False, False),
    ("#### __import__('os').getcwd()", False, False),
    ("#### " + "(" * 99, False, False),
    ("#### " + "(" * 5000 + "1" + ")" * 5000, False, False),
    ("#### 3.0 * 7 + 8", False, False),
    ("#### True * 3 * 7 + 8", False, False),
    ("#### 3 * 7 + 8\x00", False, False),
    ("#### -3 * -7 + 8", False, False),  # signs are not among the operations
    ("####", False, False),
]


@pytest.mark.parametrize("completion, right, legal", COUNTDOWN_CASES)
def test_countdown_checks_the_expression(completion, right, legal):
    problem = {"question": "q", "answer": "29", "numbers": [3, 7, 8]}
    got = grader(EXAMPLES / "countdown.py").reward(completion, problem, 5, False)
    parts = {"right": float(right), "legal": 0.1 * legal}
    assert got == (float(right), pytest.approx(sum(parts.values())), parts)


def test_countdown_does_not_take_what_was_cut():
    problem = {"question": "q", "answer": "29", "numbers": [3, 7, 8]}
    check = grader(EXAMPLES / "countdown.py").right
    assert check("#### 3 * 7 + 8", problem, True) == 0  # perhaps cut from + 80
    assert check("#### 3 * 7 + 8\n", problem, True) == 1


def test_the_countdown_problems_are_those_of_its_generator_and_can_be_solved():
    module = load_file(EXAMPLES / "countdown.py")
    text = (EXAMPLES / "countdown.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == module.problems(400)
    for problem in module.problems(20):  # left to right, by one of all choices of operations
        reached = {Fraction(problem["numbers"][0])}
        for number in problem["numbers"][1:]:
            calculate = module.OPERATIONS.values()
            reached = {f(a, number) for a in reached for f in calculate}
        assert int(problem["answer"]) in reached


LATEX = ["--data", str(EXAMPLES / "latex.jsonl")]


def test_the_reward_by_math_verify_says_in_one_line_that_the_package_is_missing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    ownfile.run.cache_clear()
    words = [*SMALL, *LATEX, "--out", tmp_path / "run", "--reward"]
    line = refused(capsys, *words, EXAMPLES / "math_verify_reward.py")
    assert "math_verify_reward.py:" in line and "pip install math-verify" in line
    assert not (tmp_path / "run").exists()


def test_the_reward_by_math_verify_with_the_real_package(tmp_path):
    pytest.importorskip("math_verify")
    ownfile.run.cache_clear()
    grade = grader(EXAMPLES / "math_verify_reward.py").right
    problems = [json.loads(line) for line in (EXAMPLES / "latex.jsonl").read_text().splitlines()]
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        for truth, right in ((problem["answer"], 1.0), (other["answer"], 0.0)):
            assert grade(f"so \\boxed{{{truth}}}", problem, False) == right
    assert grade("2^{1/2} as \\boxed{2^{1/2}}", problems[0], False) == 1.0
    assert grade(r"\sqrt{2}", problems[0], False) == grade(r"\boxed{1.41}", problems[0], False) == 0
    assert grade(r"\boxed{1} or \boxed{\sqrt2", problems[0], True) == 0.0  # the last one was cut
    assert grade(r"\boxed{9^{9^{9^{9}}}}", problems[0], False) == 0.0  # takes too long
    with pytest.raises(ValueError, match="math-verify cannot read the answer"):
        grade(r"\boxed{1}", {"question": "q", "answer": r"\frac{1"}, False)
    folder = trained(tmp_path / "run", EXAMPLES / "math_verify_reward.py", *LATEX)
    assert all(line["accuracy"] == 0.0 for line in lines(folder, "train"))


# What reaches the run


def test_accuracy_stays_what_it_is(tmp_path):
    """A constant reward gives no signal, and the same held-out accuracy as the default."""
    path = own_file(tmp_path, "def reward(completion, problem): return 1\n")
    own = trained(tmp_path / "run", path)
    assert run(*SMALL, "--out", tmp_path / "plain") == 0
    first, plain = lines(own, "eval")[0], lines(tmp_path / "plain", "eval")[0]
    assert first == plain
    assert [line["reward"] for line in lines(own, "train")] == [1.0, 1.0]
    assert [line["zero_std"] for line in lines(own, "train")] == [1.0, 1.0]


def test_a_file_with_correct_decides_accuracy(tmp_path):
    text = """
def reward(completion, problem): return {"a": 0.25, "b": -3}
def correct(completion, problem): return problem["answer"] == "yes"
"""
    train_csv = "question,answer\n" + "".join(f"q{i},yes\n" for i in range(8))
    own_file(tmp_path, train_csv, "train.csv")
    own_file(tmp_path, "question,answer\np,no\nq,no\n", "test.csv")
    folder = trained(tmp_path / "run", own_file(tmp_path, text), "--data", tmp_path)
    for line in lines(folder, "train"):
        assert (line["reward"], line["reward/a"], line["reward/b"]) == (-2.75, 0.25, -3)
    held_out = lines(folder, "eval")[0]
    assert held_out["accuracy"] == held_out["accuracy_lenient"] == 0 and held_out["n"] == 2


def test_the_fields_of_a_line_reach_the_reward(tmp_path):
    path = own_file(tmp_path, "def reward(completion, problem): return problem['more']['x'][0]\n")
    own_file(tmp_path, '{"question": "q", "answer": 1, "more": {"x": [0.5, 1]}}\n', "test.jsonl")
    (problem,) = load_problems(str(tmp_path), "test")
    assert problem == {"question": "q", "answer": "1", "more": {"x": [0.5, 1]}}
    assert grader(path).reward("", {**problem, "prompt_ids": [1]}, 1, False)[1] == 0.5


def test_the_overlong_penalty_is_added(tmp_path):
    path = own_file(tmp_path, "def reward(completion, problem): return {'x': 2}\n")
    own = grader(path, overlong_cache=4, max_new_tokens=12)
    assert own.reward("", {"question": "q", "answer": "1"}, 10, False) == (0, 1.5, {"x": 2})


def test_the_punishment_by_group_is_added_to_the_rows_of_each_group(tmp_path):
    """Two groups of four, with L = (4 + 8) / 2 and (2 + 8) / 2."""
    path = own_file(tmp_path, "def reward(completion, problem): return 2\n")
    lengths = torch.tensor([4, 4, 4, 8, 8, 8, 2, 2])
    batch = SimpleNamespace(mask=torch.arange(8) < lengths[:, None], truncated=torch.zeros(8) > 0)
    batch.texts = ["#### 1", "", "#### 1", "#### 1", "#### 1", "", "#### 1", "#### 1"]
    batch.problems = [{"question": "q", "answer": "1"}] * 8
    grader(path, group_overlong=0.75, group_size=4).grade(batch)
    assert batch.right.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert batch.rewards.tolist() == pytest.approx([2, 2, 2, 2 - 1 / 6, 1.7, 2, 2, 2])


NUMPY = "__import__('numpy')"


@pytest.mark.parametrize(
    "value", ["1", "True", "0.5", "-10.0**15", f"{NUMPY}.float32(2)", f"{NUMPY}.bool_(True)"]
)
def test_numbers_of_any_kind(tmp_path, value):
    path = own_file(tmp_path, f"def reward(completion, problem): return {value}\n")
    assert grader(path).reward("", {"question": "q", "answer": "1"}, 1, False)[1] == eval(value)


@pytest.mark.parametrize("value", ["True", "1", "1.0", f"{NUMPY}.bool_(True)", f"{NUMPY}.int64(1)"])
def test_what_is_right_is_a_bool_of_any_kind(tmp_path, value):
    for right in (1, 0):
        text = f"def reward(c, p): return 0\ndef correct(c, p): return {value} if {right} else 0\n"
        path = own_file(tmp_path, text, f"right{right}.py")
        assert grader(path).reward("", {"question": "q", "answer": "1"}, 1, False)[0] == right


def test_grading_a_batch_fills_it_in(tmp_path):
    path = own_file(tmp_path, "def reward(completion, problem): return {'n': len(completion)}\n")
    batch = SimpleNamespace(mask=torch.ones(2, 3).bool(), truncated=torch.tensor([False, True]))
    batch.texts, batch.problems = ["#### 1", ""], [{"question": "q", "answer": "1"}] * 2
    grader(path).grade(batch)
    assert batch.right.tolist() == [1, 0] and batch.rewards.tolist() == [6, 0]
    assert batch.parts == [{"n": 6}, {"n": 0}]


# Errors


BROKEN = {  # the file, and what the line must say after FILE
    "def reward(completion, problem):\n    return 1 / 0": ":2: ZeroDivisionError",
    "def reward(completion, problem):\n    raise SystemExit(3)": ":2: SystemExit",
    "def reward(completion, problem):\n    return problem['nope']": ":2: KeyError: 'nope'",
    "import math\ndef reward(c, p):\n    return math.nan": ":2: reward must return a number",
    "def reward(c, p): return 10**400": ":1: reward must return a number",
    "def reward(c, p): return {'a': -2e15}": "finite and at most 1e+15, not -2000000000000000.0",
    "def reward(completion, problem): return 'text'": ":1: reward must return a number",
    "def reward(completion, problem): return None": "not a NoneType",
    "def reward(completion, problem): return {'a': 'b'}": "a number as its part 'a', not a str",
    "def reward(completion, problem): return {1: 2}": "name its parts by printable texts, not 1",
    "def reward(c, p): return {'a\\u2028b': 1}": "printable texts, not 'a\\u2028b'",
    "def reward(c, p): return {'\\ud800': 1}": "printable texts, not '\\ud800'",
    "import itertools\nn = itertools.count()\ndef reward(c, p): return {str(next(n)): 1}": (
        ":3: reward must return the same parts for every completion; it returned 2 after 1"
    ),
    "def reward(completion): return 1": ":1: TypeError",
    "def reward(c, p): return 1\ndef correct(c, p): return 2": ":2: correct must return True",
    "def reward(c, p): return 1\ndef correct(c, p): return None": "True or False, not None",
    "import torch\ndef reward(c, p): return 1\ndef correct(c, p):\n    return torch.ones(2) > 0": (
        ":3: correct must return True or False, not tensor([True, True])"
    ),
}
LATER = "import itertools"  # wrong only from the second call on


@pytest.mark.parametrize("text", BROKEN)
def test_an_error_names_the_problem_and_the_line(tmp_path, capsys, monkeypatch, text):
    """Before the model is loaded, if a first call shows it."""
    if not text.startswith(LATER):
        monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail("loaded"))
    path = own_file(tmp_path, text)
    line = refused(capsys, *SMALL, "--reward", path, "--out", tmp_path / "run")
    assert str(path) in line and BROKEN[text] in line and "the problem is '" in line


def test_what_is_mended_goes_on(tmp_path, capsys):
    text = "import itertools\nn = itertools.count()\ndef reward(c, p): return 1 / (13 - next(n))\n"
    path, folder = own_file(tmp_path, text), tmp_path / "run"
    line = refused(capsys, *SMALL, "--reward", path, "--out", folder)
    assert f"--resume {folder}" in line and len(lines(folder, "train")) == 1
    path.write_text("def reward(c, p): return 1\n")
    assert run("--resume", folder) == 0
    assert f"changed since the run began: {path}" in capsys.readouterr().out


UNUSABLE = {
    "x = 1": "there is no function reward(completion, problem) in it",
    "reward = 3": "there is no function reward(completion, problem) in it",
    "def reward(": "SyntaxError",
    "import nothing_like_it": ":1: ModuleNotFoundError",
    "raise SystemExit": ":1: SystemExit",
    None: "no such file",
}


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_file_that_is_no_reward_is_refused_before_the_model(tmp_path, capsys, monkeypatch, text):
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail("loaded"))
    path = tmp_path if text is None else own_file(tmp_path, text)
    line = refused(capsys, *SMALL, "--reward", path, "--out", tmp_path / "run")
    assert UNUSABLE[text] in line and not (tmp_path / "run").exists()


# Resume and reuse


def test_a_run_goes_on_exactly_from_anywhere(tmp_path, monkeypatch):
    shutil.copy(EXAMPLES / "format_reward.py", tmp_path / "r.py")
    monkeypatch.chdir(tmp_path)
    whole = trained(tmp_path / "whole", "r.py", "--steps", "3")
    part = trained(tmp_path / "part", "r.py")
    monkeypatch.chdir("/")
    assert run("--resume", part, "--steps", "3") == 0
    assert timeless(part) == timeless(whole)


def test_the_file_is_part_of_what_a_run_was_made_from(tmp_path):
    path = own_file(tmp_path, "from rewards import correct\ndef reward(c, p): return 1\n")
    before = origin.code_checksums("grpo", str(path))
    assert before.keys() - origin.code_checksums("grpo").keys() == {str(path)}
    path.write_text("from rewards import correct\ndef reward(c, p): return 2\n")
    after = origin.code_checksums("grpo", str(path))
    assert {name for name in before if before[name] != after[name]} == {str(path)}
