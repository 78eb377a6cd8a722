"""A file of the user's: loaded by its path, and every error one line with the file and its line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small import own_file

from run.ownfile import files_of, load_file, place


@pytest.fixture(autouse=True)
def same_sys_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load_file(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_functions_of_a_file_are_there_whatever_its_name(tmp_path):
    import rewards

    for name in ("mine.py", "my-2nd reward.py", "rewards.py"):
        module = load_file(own_file(tmp_path, "def twice(x: int):\n    return 2 * x\n", name))
        assert module.twice(4) == 8 and Path(module.__file__) == tmp_path / name
        assert sys.modules[module.__name__] is module
        # With our `from __future__ import annotations` the annotation would be text.
        assert module.twice.__annotations__ == {"x": int}
    assert sys.modules["rewards"] is rewards  # a name of ours hides nothing


def test_a_file_is_run_once_until_it_changes(tmp_path):
    log = tmp_path / "log"
    path = own_file(tmp_path, f"open({str(log)!r}, 'a').write('x')\nvalue = 1\n")
    assert load_file(path) is load_file(path)
    assert log.read_text() == "x"
    # The same size within the same second: a file in __pycache__ would be taken for this text.
    own_file(tmp_path, path.read_text().replace("value = 1", "value = 2"))
    assert load_file(path).value == 2


def test_two_files_of_one_name_are_two_modules(tmp_path):
    a, b = (load_file(own_file(tmp_path / name, f"value = {name!r}\n")) for name in "ab")
    assert (a.value, b.value) == ("a", "b") and a.__name__ != b.__name__


def test_dataclasses_and_pickle_find_the_module(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
    module = load_file(own_file(tmp_path, text + "@dataclass\nclass Point:\n    x: int = 3\n"))
    assert pickle.loads(pickle.dumps(module.Point(5))) == module.Point(5)


def test_the_files_beside_it_can_be_imported(tmp_path):
    own_file(tmp_path, "value = 7\n", "beside_it_1.py")
    assert load_file(own_file(tmp_path, "from beside_it_1 import value\n")).value == 7


def test_what_is_no_python_file_is_named(tmp_path):
    (tmp_path / "folder.py").mkdir()
    own_file(tmp_path, "value = 1\n", "mine.txt")
    for name, why in (
        ("missing.py", "cannot read the file: No such file or directory"),
        ("folder.py", "cannot read the file: Is a directory"),
        ("mine.txt", "not a Python file, whose name ends in .py"),
    ):
        assert refusal(tmp_path / name) == f"{tmp_path / name}: {why}"


@pytest.mark.parametrize("source", [b"x = '\xff'\n", b"x = 1\0\n", b"x = " + b"(" * 10_000])
def test_what_python_cannot_read_is_one_line(source, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(source)
    assert refusal(path).startswith(f"{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("value = 1\n\ndef f(:\n", "mine.py:3: SyntaxError: invalid syntax"),
        ("\n\n1 / 0", "mine.py:3: ZeroDivisionError: division by zero"),
        ("import no_such_thing", "mine.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("\nraise SystemExit(3)", "mine.py:2: SystemExit: 3"),
        ("raise ValueError('two\\n\\nlines')", "mine.py:1: ValueError: two lines"),
        ("import json; json.loads('{')", "mine.py:1: JSONDecodeError: Expecting property name"),
        ("x = 1\neval('1 +')\n", "mine.py:2: SyntaxError"),  # of text that the file evaluates
        ("import beside_it_2\n\nbeside_it_2.f()\n", "beside_it_2.py:2: KeyError: 'x'"),
        ("import beside_it_3\n", "beside_it_3.py:2: SyntaxError: invalid syntax"),
        ("raise ValueError('x' * 10_000)", f"mine.py:1: ValueError: {'x' * 150}"),
    ],
)
def test_an_exception_has_the_line_of_the_file_or_of_one_beside_it(text, message, tmp_path):
    own_file(tmp_path, "def f():\n    return {}['x']\n", "beside_it_2.py")
    own_file(tmp_path, "x = 1\nx = = 1\n", "beside_it_3.py")
    before = set(sys.modules)
    found = refusal(own_file(tmp_path, text))
    assert found.startswith(f"{tmp_path}/{message}") and len(found) < len(str(tmp_path)) + 260
    assert not [name for name in set(sys.modules) - before if name.startswith("mine_")]


def test_ctrl_c_is_not_caught(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_file(own_file(tmp_path, "raise KeyboardInterrupt\n"))


def test_an_exception_from_nowhere_in_the_file_has_the_file_alone(tmp_path):
    assert place(ValueError("never raised"), tmp_path / "mine.py") == f"{tmp_path / 'mine.py'}"


def test_a_path_in_the_project_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_file("run/lock.py").__doc__


def test_the_files_that_a_file_imports(tmp_path):
    """At the top or in a function, packages, ours, in circles; not those that nobody imports."""
    own_file(tmp_path, "import mine\n", "constant.py")
    own_file(tmp_path, "import os.path\nimport pack.part\n", "middle.py")
    own_file(tmp_path / "pack", "", "__init__.py")
    own_file(tmp_path / "pack", "import constant\n", "part.py")
    own_file(tmp_path, "1 / 0\n", "not_imported.py")
    text = "import rewards\nfrom tiny import problems\n\n\ndef f():\n    import middle\n"
    names = ("mine.py", "middle.py", "constant.py", "pack/__init__.py", "pack/part.py")
    expected = {tmp_path / name for name in names}
    found = files_of(own_file(tmp_path, text))
    assert set(found) == expected | {ROOT / "rewards.py", ROOT / "tiny/problems.py"}
    assert len(found) == len(set(found)) and found[0] == tmp_path / "mine.py"


def test_loading_a_file_imports_no_torch(tmp_path):
    path = own_file(tmp_path, "value = 1\n")
    code = f"import sys; from run.ownfile import load_file; load_file({str(path)!r}); "
    code += "sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
