"""trainer/data.py: an answer that is not one number is refused, and what is held out stays so."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from run import start
from run.options import fill
from scale import verl_data
from trainer import data


def write(path, rows):
    path.write_text("".join(row + "\n" for row in rows), "utf-8")
    return path


def row(question, answer):
    return json.dumps({"question": question, "answer": answer})


# Answers in the data that are not one number. Their first digits alone would give a wrong truth:
# 51, 3, 2, 5, 1, 0.333, ...
NOT_ONE_NUMBER = [
    *[r"\sqrt{51}", r"3\pi", "x^2", "5!", "a+1", "0.333...", "0.333…", r"0.\overline{3}", "0.(3)"],
    *["√51", "3π", "2x", "x > 5", "x>5", r"x \ge 5", "±3", "3-5", "3:4", "12:30", "2024-01-15"],
    *["½", "2½", "5²", "2^10", "1.5/2", "5 million", "5k", "12 000", "12,34", "1.234,5", "1_000"],
    *["3 or 4", "(3, 4)", "#### 3 or 4", r"\boxed{3, 4}", r"#### \frac{x}{2}", r"\boxed{\sqrt{5}}"],
    *["16 - 3 = 13", "f(5)", "log 5", "negative 5", "- 5", "--5", "H2O", "3/0", "", "none", "####"],
]


@pytest.mark.parametrize("answer", NOT_ONE_NUMBER)
def test_a_truth_that_is_not_one_number_is_refused_with_its_line(tmp_path, answer):
    path = write(tmp_path / "train.jsonl", [row("1+1?", "2"), "", row("what?", answer)])
    with pytest.raises(ValueError, match="line 3: no number to compare with") as error:
        data.load_problems(str(tmp_path), "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("4", "4"),
        ("-4", "-4"),
        ("4.5", "4.5"),
        ("1e3", "1E+3"),
        ("0.30000000000000000001", "0.30000000000000000001"),  # not the 0.3 of a float
        ('"7 cm"', "7 cm"),
        ('"$1,234"', "$1,234"),
        (r'"\\frac{3}{4}"', r"\frac{3}{4}"),
    ],
)
def test_an_answer_is_a_text_or_a_json_number(tmp_path, answer, read):
    write(tmp_path / "test.jsonl", [f'{{"question": "q", "answer": {answer}}}'])
    assert data.load_problems(str(tmp_path), "test") == [{"question": "q", "answer": read}]


@pytest.mark.parametrize("answer", ["true", "null", "NaN", "Infinity", "-Infinity", "[4]", "{}"])
def test_other_json_values_are_no_answer(tmp_path, answer):
    write(tmp_path / "test.jsonl", [row("1+1?", 2), f'{{"question": "q", "answer": {answer}}}'])
    with pytest.raises(ValueError, match="test.jsonl, line 2: n[eo]"):
        data.load_problems(str(tmp_path), "test")


def test_a_number_of_a_hub_data_set_is_an_answer():
    """datasets.load_dataset gives Python's int and float."""
    rows = [{"question": "a", "answer": 4}, {"question": "b", "answer": 0.1}]
    assert [problem["answer"] for problem in data.check(rows, "hub")] == ["4", "0.1"]


def test_of_one_file_the_last_tenth_is_held_out_and_that_is_said(tmp_path, capsys):
    path = write(tmp_path / "all.jsonl", [row(f"{n}+1?", n + 1) for n in range(40)])
    test = data.load_problems(str(path), "test")
    train_rows = data.load_problems(str(path), "train")
    assert [problem["answer"] for problem in test] == ["37", "38", "39", "40"]
    assert len(train_rows) == 36
    assert capsys.readouterr().out == f"{path}: the last 4 of its 40 problems are held out\n"


def test_split_overlap_takes_questions_for_one_up_to_white_space_and_case():
    held_out = [{"question": "Tom has 3 Eggs.\nHow many?"}, {"question": "Straße ①"}]
    others = ["tom  has 3 eggs. how many? ", "TOM HAS 3 EGGS.\u00a0HOW MANY?", "STRASSE 1"]
    kept = ["Tom has 4 eggs. How many?", "Tomhas 3 eggs. How many?"]
    rows = [{"question": question} for question in others + kept]
    assert data.split_overlap(rows, held_out) == (rows[3:], 3)


@pytest.fixture
def overlapping(tmp_path):
    """Four training problems, of which the test split repeats the first and the third.

    The first is written differently there, and the third stands beyond --eval-n 1: it is not
    evaluated, but is held out all the same.
    """
    write(tmp_path / "train.jsonl", [row(f"What is {n}+1?", n + 1) for n in range(4)])
    held_out = [row("Is this held out? 5", 5), row(" what is  0+1?", 1), row("What is 2+1?", 3)]
    write(tmp_path / "test.jsonl", held_out)
    return tmp_path


def test_training_leaves_out_the_whole_test_split(overlapping, capsys):
    options = fill({"preset": "tiny", "data": str(overlapping), "eval_n": 1})
    *_, problems, held_out = start.set_up(options)
    assert [p["question"] for p in problems] == ["What is 1+1?", "What is 3+1?"]
    assert [p["question"] for p in held_out] == ["Is this held out? 5"]
    assert "2 of training that are held out too" in capsys.readouterr().out


def test_verls_files_leave_it_out_too(overlapping, capsys):
    pandas = pytest.importorskip("pandas")
    verl_data.main(
        ["--data", str(overlapping), "--prompt", "{question}", "--out", str(overlapping)]
    )
    rows = pandas.read_parquet(overlapping / "train.parquet")
    asked = [prompt[0]["content"] for prompt in rows["prompt"]]
    assert asked == ["What is 1+1?", "What is 3+1?"]
    assert len(pandas.read_parquet(overlapping / "test.parquet")) == 3
    assert "dropped 2 problems" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_problems_need_no_check(split, monkeypatch):
    monkeypatch.setattr(data, "TINY_TRAIN", 2000)
    rows = data.load_problems("tiny", split)
    assert data.check(rows, "tiny") == rows


NOT_THERE = ["./nope", "../nope", "/no/nope", "~/nope", "a/b/nope", r"data\nope"]


@pytest.mark.parametrize("name", [*NOT_THERE, "foo/bar.txt", "nope.json"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_data_set(name):
    with pytest.raises(ValueError, match="no such file or folder") as error:
        data.load_problems(name, "train")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["gsm8k", "openai/gsm8k:main", "owner/name-v1.5", "owner/name.v2:all", "owner/tiny.en"]
)
def test_the_name_of_a_data_set_is_no_path(name):
    assert not data.is_path(name)


@pytest.fixture(scope="module")
def without_tiny(tmp_path_factory):
    """A copy of the code without the folder tiny/, and a copy of that folder elsewhere."""
    root = tmp_path_factory.mktemp("checkout")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for folder in ("trainer", "run"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copytree(ROOT / "tiny", root / "model")
    rows = [row(f"What is {n}+1?", n + 1) for n in range(20)]
    write(root / "problems.jsonl", rows)
    return root


def run_train(root, line):
    command = [sys.executable, "train.py", "--preset", "tiny", *line.split()]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_training_needs_no_folder_tiny(without_tiny):
    size = "--steps 1 --prompts 2 --group-size 2 --updates 1 --max-new-tokens 4 --eval-n 2 --k 0"
    done = run_train(without_tiny, f"--model model --data problems.jsonl {size} --out out")
    assert done.returncode == 0, done.stderr
    assert "tiny/problems.py" not in (without_tiny / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "the embedded data set is missing"),
        ("--model model --data tiny", "the embedded data set is missing"),
        ("--model tiny --data problems.jsonl", "the embedded model is missing"),
    ],
)
def test_without_the_folder_tiny_its_names_are_refused_in_one_line(without_tiny, line, text):
    done = run_train(without_tiny, line)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train.py: error: {text}")
