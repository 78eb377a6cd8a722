"""trainer/sources.py and trainer/data.py: every kind of file gives the same problems, exactly as
written; what is no problem is refused with its line; and what is held out stays so."""

import json
import shutil
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from run import start
from run.checks import fill
from run.parser import parse
from scale import verl_data
from trainer import data, sources


def write(path, rows):
    path.write_text("".join(row + "\n" for row in rows), "utf-8")
    return path


def row(question, answer):
    return json.dumps({"question": question, "answer": answer})


def asked(problems):
    return [problem["question"] for problem in problems]


def both(path, **how):
    """All problems of what has no test split, by question."""
    problems = [
        problem for split in ("test", "train") for problem in data.load_problems(path, split, **how)
    ]
    return sorted(problems, key=lambda problem: problem["question"])


# Files

PROBLEMS = [("a, b;\nor c?", "1.50"), ("naïve 2²?", "so #### 1,234"), ("x?", "7")]
OBJECTS = [{"question": question, "answer": answer} for question, answer in PROBLEMS]
NUMBERS = r"""{"question": "a, b;\nor c?", "answer": 1.50}

{"answer": "so #### 1,234", "question": "na\u00efve 2\u00b2?"}
{"question": "x?", "answer": 7, "level": 0.5}"""
LIST = "[" + NUMBERS.replace("\n\n", ",").replace("}\n", "},\n") + "]"
COMMAS = """question,answer\n"a, b;\nor c?",1.50\nnaïve 2²?,"so #### 1,234"\nx?,7\n"""
SEMICOLONS = """Question ; ANSWER\n"a, b;\nor c?";1.50\nnaïve 2²?;so #### 1,234\n\nx?; 7\n"""
TABS = """\tQUESTION\tAnswer\n0\t"a, b;\nor c?"\t1.50\n1\tnaïve 2²?\tso #### 1,234\n2\tx?\t7"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.jsonl", NUMBERS),
        ("windows.JSONL", "\ufeff" + NUMBERS.replace("\n", "\r\n")),
        ("lines.json", NUMBERS),
        ("list.json", LIST),
        ("list.jsonl", LIST),
        ("pretty.json", json.dumps(OBJECTS, indent=2)),
        ("printed_by_jq.json", "\n".join(json.dumps(one, indent=2) for one in OBJECTS)),
        ("commas.csv", COMMAS),
        ("windows.csv", "\ufeff" + COMMAS.replace("\n", "\r\n")),
        ("excel.csv", SEMICOLONS),
        ("pandas.tsv", TABS),
        ("tabs.csv", TABS),
        ("table.parquet", OBJECTS),
    ],
)
def test_a_file_of_any_kind_gives_the_problems_as_they_are_written(tmp_path, name, text):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text), path)
    else:
        path.write_text(text, "utf-8", newline="")
    found = both(str(path))
    assert [(problem["question"], problem["answer"]) for problem in found] == PROBLEMS


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("-4", "-4"),
        ("1e3", "1E+3"),
        ("0.1", "0.1"),
        ("0.30000000000000000001", "0.30000000000000000001"),  # not the 0.3 of a float
        ("12345678901234567890123", "12345678901234567890123"),  # beyond 64 bits
        (r'"\\frac{3}{4}"', r"\frac{3}{4}"),
    ],
)
def test_a_number_of_json_keeps_its_digits(tmp_path, answer, read):
    write(tmp_path / "test.jsonl", [f'{{"question": "q", "answer": {answer}, "x": [0.5]}}'])
    expected = [{"question": "q", "answer": read, "x": [0.5]}]
    assert data.load_problems(str(tmp_path), "test") == expected


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
GOOD = row("1+1?", "#### 2") + "\n"
HEADER = "question,answer\n1+1?,2\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", "", "holds no problem"),
        ("a.json", "[]", "holds no problem"),
        ("a.csv", " \n\n", "holds no problem"),
        ("a.csv", "question,answer\n", "holds no problem"),
        ("a.jsonl", GOOD, "holds one problem; two are the least"),
        ("a.jsonl", GOOD + GOOD, "holds one problem; two are the least"),
        ("a.jsonl", GOOD + "\n{question: 1}", "the value on line 3 is not JSON"),
        ("a.jsonl", GOOD + GOOD[:-4], "the value on line 2 is not JSON"),
        ("a.jsonl", GOOD + "[" * 100_000, "the value on line 2 is not JSON"),
        ("a.jsonl", GOOD + '{"answer": ' + "9" * 5000 + "}", "the value on line 2 is not JSON"),
        ("a.json", json.dumps(OBJECTS, indent=2)[:-3], "line 1 is not JSON: Expecting ',' del"),
        ("a.json", '{"v": 1, "data": [{"question": "q"}]}', "its columns: v, data; --columns"),
        ("a.json", "[[1, 2], [3, 4]]", "no row has question and answer; its columns: none"),
        ("a.jsonl", '{"prompt": "1+1?"}\n{"answer": 1}', "its columns: prompt; --columns"),
        ("a.csv", "1+1?,2\n2+2?,4\n", "its columns: 1+1?, 2; --columns QUESTION,ANSWER names"),
        ("a.csv", HEADER + "a, b?,2\n", "after line 2: more fields than the header"),
        ("a.csv", HEADER + '"a" b?,2\n', "after line 2: ',' expected after '\"'"),
        ("a.csv", HEADER + '"a?,2\nb?,3\n', "after line 2: unexpected end of data"),
        ("a.csv", "question,answer\ncafé?,2\n".encode("latin-1"), "save it as UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), "save it as UTF-8"),
        ("a.parquet", b"", "cannot read"),
        ("a.parquet", GOOD, "Parquet magic bytes not found"),
        *[(f"a{kind}", LFS, "Git LFS pointer and not the data: run git lfs pull")
          for kind in sources.FILE_TYPES],
        ("a.jsonl.gz", b"\x1f\x8b\x08", "--data takes a .jsonl, .json, .csv, .tsv or .parquet"),
        ("a", GOOD, "--data takes a .jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        data.load_problems(str(path), "train")
    assert line in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_leave_no_trace_and_are_read_again(tmp_path, monkeypatch):
    """Neither they nor tiny import datasets, which keeps a copy of what it reads."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write(tmp_path / "all.csv", ["question,answer", "a,1", "b,2"])
    assert asked(both(str(path))) == ["a", "b"]
    write(path, ["question,answer", "a,1", "c,3"])
    assert asked(both(str(path))) == ["a", "c"]
    assert list(tmp_path.iterdir()) == [path]
    assert data.load_problems("tiny", "test")


# Rows

# Answers in the data that are not one number. Their first digits alone would give a wrong truth:
# 51, 3, 2, 5, 1, 0.333, ...
NOT_ONE_NUMBER = [
    *[r"\sqrt{51}", r"3\pi", "x^2", "5!", "a+1", "0.333...", "0.333…", r"0.\overline{3}", "0.(3)"],
    *["√51", "3π", "2x", "x > 5", "x>5", r"x \ge 5", "±3", "3-5", "3:4", "12:30", "2024-01-15"],
    *["½", "2½", "5²", "2^10", "1.5/2", "5 million", "5k", "12 000", "12,34", "1.234,5", "1_000"],
    *["3 or 4", "(3, 4)", "#### 3 or 4", r"\boxed{3, 4}", r"#### \frac{x}{2}", r"\boxed{\sqrt{5}}"],
    *["16 - 3 = 13", "f(5)", "log 5", "negative 5", "--5", "H2O", "3/0", "", "none", "####"],
    *[True, None, float("nan"), float("inf"), [4], {}, "half \ud83d a pair"],
]


def test_rows_that_are_no_problems_are_counted_shown_and_dropped_if_asked(tmp_path, capsys):
    """Good rows on lines 1 and 3, a blank line, then one bad row per line."""
    bad = [row("what?", answer) for answer in NOT_ONE_NUMBER]
    deep = "[" * 700 + "]" * 700
    bad += ['"1+1? 2"', row(" ", 2), row(5, 2), f'{{"question": "q", "answer": 1, "x": {deep}}}']
    path = write(tmp_path / "test.jsonl", [row("1+1?", "2"), "", row("2+2?", 4), *bad])
    count = f"{len(bad)} of its {len(bad) + 2} rows"
    with pytest.raises(ValueError) as error:
        data.load_problems(str(tmp_path), "test")
    message = str(error.value)
    start = f"{path}: {count} cannot be used (--skip-bad-rows drops them): line 4: no number to"
    assert message.startswith(start) and r"'3\\pi'" in message and "'x^2'" in message
    assert message.count("line ") == 3 and "\n" not in message
    kept = data.load_problems(str(tmp_path), "test", skip_bad_rows=True)
    assert [(p["question"], p["answer"]) for p in kept] == [("1+1?", "2"), ("2+2?", "4")]
    assert f"{path}: dropped {count}: line 4: no number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(" ", 2), "the question is empty"),
        (row("q", True), "need text in question, text or a number in answer: {'question': 'q'"),
        ('{"question": "q"}', "need text in question"),
        ('["1+1?", "2"]', "need text in question, text or a number in answer: ['1+1?'"),
        (row("half \ud83d a pair", 2), r"'\ud83d' is no character"),
    ],
)
def test_the_reason_names_what_is_wrong_with_a_row(tmp_path, bad, reason):
    path = write(tmp_path / "a.jsonl", [row("1+1?", "2"), "", bad])
    with pytest.raises(ValueError) as error:
        data.load_problems(str(path), "train")
    assert "1 of its 2 rows cannot be used" in str(error.value)
    assert f"line 3: {reason}" in str(error.value)


def test_the_line_of_a_csv_is_where_its_row_begins(tmp_path):
    rows = ["question,answer", '"one\n\nrow?",2', "", '"a\nbad one?",two', "x,3", '"y\n",']
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(ValueError, match="2 of its 4 rows .* line 6: .* line 9: "):
        data.load_problems(str(path), "train")


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


VERL = {"prompt": chat(("system", "s"), ("user", "q")), "extra_info": {"answer": "so #### 5"}}
VERL["reward_model"] = {"style": "rule", "ground_truth": "5"}


@pytest.mark.parametrize(
    ("fields", "columns", "problem", "note"),
    [
        ({"QUESTION": "q", "Answer": 5, "problem": "p"}, None, ("q", "5"), ""),
        ({"problem": "q", "solution": "5"}, None, ("q", "5"), "problem is the question, solution"),
        ({"problem": "q", "solution": "s", "answer": "5"}, None, ("q", "5"), ", answer the answer"),
        ({"question": "x", "Problem": "q", "Solution": "5"}, None, ("q", "5"), "problem is the"),
        ({"input": "q", "target": 5}, None, ("q", "5"), "input is the question, target the"),
        ({"query": "q", "response": "5"}, None, ("q", "5"), "query is the question, response"),
        ({"instruction": "q", "output": "5", "input": ""}, None, ("q", "5"), "instruction is"),
        ({"instruction": "q", "output": 5, "input": "r"}, None, ("q\nr", "5"), "an input follows"),
        (
            {"messages": chat(("user", "q"), ("assistant", "5"))},
            None,
            ("q", "5"),
            "the user's turn in messages is the question, the assistant's turn in messages the",
        ),
        (VERL, None, ("q", "5"), "reward_model.ground_truth the answer; system turns are left out"),
        (VERL, "prompt,extra_info.answer", ("q", "so #### 5"), "extra_info.answer the answer"),
        ({"answer": "no", "Frage": "q", "final": 5}, "frage,final", ("q", "5"), "frage is the"),
        ({"a.b": "q", "a": {"b": "no"}, "c": 5}, "a.b,c", ("q", "5"), "a.b is the question"),
    ],
)
def test_columns(tmp_path, capsys, fields, columns, problem, note):
    """question and answer in any case, else a known pair, else those of --columns; it is said."""
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), path)
    (found,) = data.load_problems(str(tmp_path), "test", columns=columns)
    assert (found["question"], found["answer"]) == problem
    others = fields.keys() - {"question", "answer"}
    assert {name: found[name] for name in others} == {name: fields[name] for name in others}
    printed = capsys.readouterr().out
    assert note in printed and printed.count("\n") == (note != "")


@pytest.mark.parametrize(
    ("fields", "columns", "line"),
    [
        ({"question": "q", "label": 5}, None, "no row has question and answer; its columns: quest"),
        ({"question": "q", "label": 5}, "question,lable", "no row has question,lable; its columns"),
        ({"que\nstion": "q", "b": 5}, None, "its columns: que stion, b; --columns QUESTION,ANSWER"),
        ({"messages": "1+1? #### 2"}, None, "need the turns of a chat in messages"),
        ({"messages": chat(("user", "q"))}, None, "need one turn of the assistant, not 0"),
        (
            {"messages": chat(("user", "q"), ("assistant", "5"), ("user", "r"))},
            None,
            "need one turn of the user, not 2",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused_in_one_line(tmp_path, fields, columns, line):
    write(tmp_path / "test.jsonl", [json.dumps(fields)])
    with pytest.raises(ValueError) as error:
        data.load_problems(str(tmp_path), "test", columns=columns)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_options_reach_the_data(tmp_path):
    path = write(tmp_path / "a.csv", ["Q,A", "1+1?,2", "1+2?,3", "1+3?,four"])
    options = fill(parse(f"--preset tiny --data {path} --columns q,a --skip-bad-rows".split()))
    train, held_out, _ = start.load_data(options, False)
    assert sorted(asked(train + held_out)) == ["1+1?", "1+2?"]


# Splits


def test_a_tenth_of_one_file_is_drawn_by_a_fixed_seed(tmp_path, capsys):
    """Files sorted by kind would hold out another distribution at their end."""
    path = write(tmp_path / "all.jsonl", [row(f"{n % 400}+1?", n + 1) for n in range(440)])
    test = data.load_problems(str(path), "test")
    train = data.load_problems(str(path), "train")
    numbers = [int(problem["answer"]) for problem in test]
    assert len(test) == 40 and 150 < sum(numbers) / 40 < 250 and min(numbers) < 40
    assert sorted(asked(train + test)) == sorted(f"{n}+1?" for n in range(400))
    assert data.load_problems(str(path), "test") == test
    assert max(int(problem["answer"]) for problem in train) <= 400  # the first of a question
    assert numbers == sorted(numbers)  # in the order of the file
    repeated = f"{path}: 40 problems repeat a question; the first of each is kept\n"
    drawn = f"{path}: 40 of its 400 problems, drawn by a fixed seed, are held out\n"
    assert capsys.readouterr().out == 2 * (repeated + drawn)


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        (["train.jsonl", "TEST.Csv"], "train.jsonl", "TEST.Csv"),
        (["train.csv", "test.csv", "validation.csv", "README.md"], "train.csv", "test.csv"),
        (["train.csv", "validation.jsonl"], "train.csv", "validation.jsonl"),
        (["train.csv"], "train.csv", "train.csv"),
        (["test.jsonl"], "holds no train split; --data takes", "test.jsonl"),
        (["validation.csv"], "holds no train split", "validation.csv"),
        (["train-00000-of-00001.csv"], "holds no train split", "holds no train split"),
        ([], "holds no train split", "holds no train split"),
        (["train.csv", "train.jsonl"], "train.csv and train.jsonl: rem", "holds train.csv and"),
    ],
)
def test_the_files_of_a_folder(tmp_path, capsys, files, train, test):
    """Each file's questions name the file; a split that is no file is an error with those words."""
    for name in files:
        rows = [row(f"{name} {n}", n) for n in range(20)]
        if name.lower().endswith(".csv"):
            rows = ["question,answer", *[f"{name} {n},{n}" for n in range(20)]]
        write(tmp_path / name, rows)
    for split, source in (("train", train), ("test", test)):
        if source not in files:
            with pytest.raises(ValueError, match=source) as error:
                data.load_problems(str(tmp_path), split)
            assert str(tmp_path) in str(error.value)
            continue
        problems = data.load_problems(str(tmp_path), split)
        assert {question.split()[0] for question in asked(problems)} == {source}
        held_out = {"test": 2, "train": 18}[split]
        assert len(problems) == (held_out if train == test else 20)
    said = "validation is held out" in capsys.readouterr().out
    assert said == test.startswith("validation")


@pytest.mark.parametrize(
    ("splits", "train", "test"),
    [(["train", "test"], 20, 20), (["train", "validation"], 20, 20), (["train"], 18, 2)],
)
def test_a_data_set_of_the_hub(monkeypatch, splits, train, test):
    """Its numbers are Python's; a column of pictures or the like is not decoded."""
    rows = [{"Problem": f"{n}+1?", "answer": n + 0.1} for n in range(20)]
    found = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})
    calls = []

    def load_dataset(*words):
        calls.append(words)
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(data.load_problems("owner/name:config", "train")) == train
    problems = data.load_problems("owner/name", "test")
    assert len(problems) == test and problems[0]["answer"].endswith(".1")
    assert calls == [("owner/name", "config"), ("owner/name", None)]


NOT_THERE = ["./nope", "../nope", "/no/nope", "~/nope", "a/b/nope", r"data\nope"]


@pytest.mark.parametrize("name", [*NOT_THERE, "foo/bar.txt", "nope.json", "nope.tsv"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_data_set(name):
    with pytest.raises(ValueError, match="no such file or folder") as error:
        data.load_problems(name, "train")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["gsm8k", "openai/gsm8k:main", "owner/name-v1.5", "owner/name.v2:all", "owner/tiny.en"]
)
def test_the_name_of_a_data_set_is_no_path(name):
    assert not sources.is_path(name)


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
    evaluated, but is held out all the same. The first held-out prompt is too long.
    """
    write(tmp_path / "train.jsonl", [row(f"What is {n}+1?", n + 1) for n in range(4)])
    held_out = [row("Is this held out? 5", 5), row(" what is  0+1?", 1), row("What is 2+1?", 3)]
    write(tmp_path / "test.jsonl", [row("5" * 9000, 5), *held_out])
    return tmp_path


def test_training_leaves_out_the_whole_test_split_and_eval_n_counts_what_fits(overlapping, capsys):
    options = fill({"preset": "tiny", "data": str(overlapping), "eval_n": 1})
    *_, problems, held_out = start.set_up(options)
    assert asked(problems) == ["What is 1+1?", "What is 3+1?"]
    assert asked(held_out) == ["Is this held out? 5"]
    printed = capsys.readouterr().out
    assert "2 of training that are held out too" in printed and ", 1 held out" in printed


def test_verls_files_leave_it_out_too(overlapping, capsys):
    pandas = pytest.importorskip("pandas")
    verl_data.main(
        ["--data", str(overlapping), "--prompt", "{question}", "--out", str(overlapping / "verl")]
    )
    rows = pandas.read_parquet(overlapping / "verl" / "train.parquet")
    assert [prompt[0]["content"] for prompt in rows["prompt"]] == ["What is 1+1?", "What is 3+1?"]
    assert len(pandas.read_parquet(overlapping / "verl" / "test.parquet")) == 4
    assert "dropped 2 problems" in capsys.readouterr().out
    assert asked(data.load_problems(str(overlapping / "verl"), "train")) == [
        "What is 1+1?",
        "What is 3+1?",
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_problems_need_no_check(split, monkeypatch):
    monkeypatch.setattr(data, "TINY_TRAIN", 2000)
    rows = data.load_problems("tiny", split)
    assert data.check(sources.numbered(rows), "tiny") == (rows, [])


# Without the folder tiny/


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
