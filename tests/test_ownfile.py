"""A file of the user's: loaded by its path, and every error one line with the file and its line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from run.names import ROOT
from run.ownfile import files_of, load_file, place


@pytest.fixture(autouse=True)
def same_sys_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def written(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load_file(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_functions_of_a_file_are_there(tmp_path):
    module = load_file(written(tmp_path, "def twice(x):\n    return 2 * x\n"))
    assert module.twice(4) == 8
    assert Path(module.__file__) == tmp_path / "mine.py"
    assert sys.modules[module.__name__] is module


def test_a_file_is_run_once_until_it_changes(tmp_path):
    log = tmp_path / "log"
    path = written(tmp_path, f"open({str(log)!r}, 'a').write('x')\nvalue = 1\n")
    assert load_file(path) is load_file(path)
    assert log.read_text() == "x"
    # The same size within the same second: a file in __pycache__ would be taken for this text.
    written(tmp_path, path.read_text().replace("value = 1", "value = 2"))
    assert load_file(path).value == 2


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    a = load_file(written(tmp_path / "a", "value = 'a'\n"))
    b = load_file(written(tmp_path / "b", "value = 'b'\n"))
    assert (a.value, b.value) == ("a", "b")
    assert a.__name__ != b.__name__


def test_a_name_of_ours_hides_nothing(tmp_path):
    import rewards

    module = load_file(written(tmp_path, "value = 1\n", "rewards.py"))
    assert module.value == 1
    assert sys.modules["rewards"] is rewards


def test_dataclasses_and_pickle_find_the_module(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
    text += "@dataclass\nclass Point:\n    x: int = 3\n"
    module = load_file(written(tmp_path, text))
    assert pickle.loads(pickle.dumps(module.Point(5))) == module.Point(5)


def test_a_file_may_have_a_name_that_is_no_identifier(tmp_path):
    assert load_file(written(tmp_path, "value = 1\n", "my-2nd reward.py")).value == 1


def test_the_files_beside_it_can_be_imported(tmp_path):
    written(tmp_path, "value = 7\n", "beside_it_1.py")
    assert load_file(written(tmp_path, "from beside_it_1 import value\n")).value == 7


def test_no_future_statement_of_ours_reaches_the_file(tmp_path):
    # With our `annotations` the annotation would be text.
    module = load_file(written(tmp_path, "def f(x: int):\n    return x\n"))
    assert module.f.__annotations__ == {"x": int}


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.py"
    assert refusal(path) == f"{path}: cannot read the file: No such file or directory"


def test_a_folder_is_no_file(tmp_path):
    path = tmp_path / "folder.py"
    path.mkdir()
    assert refusal(path) == f"{path}: cannot read the file: Is a directory"


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = written(tmp_path, "value = 1\n", "mine.txt")
    assert refusal(path) == f"{path}: not a Python file, whose name ends in .py"


def test_a_syntax_error_has_its_line(tmp_path):
    path = written(tmp_path, "value = 1\n\ndef f(:\n    pass\n")
    assert refusal(path) == f"{path}:3: SyntaxError: invalid syntax"
    with pytest.raises(ValueError, match=r"mine\.py:3: SyntaxError"):
        read_source(path)  # without running it


@pytest.mark.parametrize("source", [b"x = '\xff'\n", b"x = 1\0\n", b"x = " + b"(" * 10_000])
def test_what_python_cannot_read_is_one_line(source, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(source)
    assert refusal(path).startswith(f"{path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ValueError('two\\n\\nlines')", "ValueError: two lines"),
        ("import json; json.loads('{')", "JSONDecodeError: Expecting property name"),
    ],
)
def test_an_exception_has_the_line_of_the_file(line, message, tmp_path):
    path = written(tmp_path, f"value = 1\n\n{line}\n")
    before = set(sys.modules)
    assert refusal(path).startswith(f"{path}:3: {message}")
    assert not [name for name in set(sys.modules) - before if name.startswith("mine_")]


def test_an_exception_beside_the_file_has_the_line_there(tmp_path):
    beside = written(tmp_path, "def f():\n    return {}['x']\n", "beside_it_2.py")
    path = written(tmp_path, "import beside_it_2\n\nbeside_it_2.f()\n")
    assert refusal(path) == f"{beside}:2: KeyError: 'x'"


def test_a_syntax_error_beside_the_file_has_the_line_there(tmp_path):
    beside = written(tmp_path, "x = 1\nx = = 1\n", "beside_it_3.py")
    path = written(tmp_path, "import beside_it_3\n")
    assert refusal(path) == f"{beside}:2: SyntaxError: invalid syntax"


def test_a_syntax_error_in_text_that_the_file_evaluates_is_the_files(tmp_path):
    path = written(tmp_path, "x = 1\neval('1 +')\n")
    assert refusal(path).startswith(f"{path}:2: SyntaxError")


def test_ctrl_c_is_not_caught(tmp_path):
    path = written(tmp_path, "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_file(path)


def test_a_long_message_is_cut(tmp_path):
    path = written(tmp_path, "raise ValueError('x' * 10_000)\n")
    assert len(refusal(path)) < len(str(path)) + 250


def test_an_exception_from_nowhere_in_the_file_has_the_file_alone(tmp_path):
    assert place(ValueError("never raised"), tmp_path / "mine.py") == f"{tmp_path / 'mine.py'}"


def test_a_path_is_recorded_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "trainer")
    assert full_path("../rewards.py") == ROOT / "rewards.py"
    monkeypatch.chdir(tmp_path)
    assert full_path("mine.py") == tmp_path / "mine.py"
    monkeypatch.setenv("HOME", f"{tmp_path}")
    assert full_path("~/mine.py") == tmp_path / "mine.py"


def test_a_recorded_path_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_file("run/lock.py").__doc__


def test_the_files_that_a_file_imports(tmp_path):
    written(tmp_path, "value = 1\n", "constant.py")
    written(tmp_path, "import os.path\nimport pack.part\n", "middle.py")
    (tmp_path / "pack").mkdir()
    written(tmp_path / "pack", "", "__init__.py")
    written(tmp_path / "pack", "import constant\n", "part.py")
    written(tmp_path, "1 / 0\n", "not_imported.py")
    text = "import rewards\nfrom tiny import problems\n\n\ndef f():\n    import middle\n"
    path = written(tmp_path, text)
    names = ("mine.py", "middle.py", "constant.py", "pack/__init__.py", "pack/part.py")
    expected = {tmp_path / name for name in names}
    assert set(files_of(path)) == expected | {ROOT / "rewards.py", ROOT / "tiny/problems.py"}


def test_files_that_import_each_other_end(tmp_path):
    other = written(tmp_path, "import mine\n", "other.py")
    path = written(tmp_path, "import other\n")
    assert files_of(path) == [path, other]


def test_loading_a_file_imports_no_torch(tmp_path):
    path = written(tmp_path, "value = 1\n")
    code = f"import sys; from run.ownfile import load_file; load_file({str(path)!r}); "
    code += "sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
