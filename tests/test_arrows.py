"""Imports go down: methods, rewards.py <- trainer/ <- run/ <- the commands; and in no circle."""

import ast

import pytest
from conftest import ROOT

COMMANDS = ("train", "plot", "compare", "minimal")
TOP = ("tools", "claims", "examples", "scale")


def modules():
    """{name: its file} of all our modules but the tests."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    names = {}
    for file in files:
        path = file.relative_to(ROOT)
        if path.parts[0] != "tests":
            names[".".join(path.with_suffix("").parts)] = file
    return names


def imported(file, ours):
    """Those of our modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & ours.keys()


def floor(name):
    """0 methods and rewards.py, 1 trainer/, 2 run/, 3 a command or a tool."""
    if name in COMMANDS or name.split(".")[0] in TOP:
        return 3
    folder = name.rpartition(".")[0]
    return {"trainer": 1, "run": 2}.get(folder, 0)


OURS = modules()
ARROWS = {name: imported(file, OURS) for name, file in OURS.items()}


@pytest.mark.parametrize("name", OURS)
def test_a_file_imports_its_own_floor_or_those_below(name):
    above = [other for other in ARROWS[name] if floor(other) > floor(name)]
    assert not above


def test_the_arrows_are_seen():
    """The parser finds imports at the top and in functions, of modules and of names."""
    assert "grpo" in ARROWS["tepo"] and "trainer.update" in ARROWS["train"]
    assert max(map(floor, OURS)) == 3 and min(map(floor, OURS)) == 0


def test_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in ARROWS[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in OURS:
        visit(name, [])


def test_minimal_imports_the_methods_and_at_most_two_files_of_the_trainer():
    below = {name for name in ARROWS["minimal"] if floor(name) == 1}
    assert len(below) <= 2 and not any(floor(name) > 1 for name in ARROWS["minimal"])
