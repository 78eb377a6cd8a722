"""run/progress.py: one line on a terminal of any width, plain lines in a log; the next command."""

import contextlib
import os
import shlex
import shutil
import sys
import termios
from types import SimpleNamespace

import pytest
from conftest import ROOT

from run import commandline, progress, session

WORDS = session.step_in_words({"accuracy": 0.27, "entropy": 0.3, "tokens_per_s": 826.4})


@contextlib.contextmanager
def terminal(columns):
    """(a file that is a terminal of so many columns, the descriptor that reads what it shows)."""
    shown, inside = os.openpty()
    termios.tcsetwinsize(inside, (30, columns))
    with open(inside, "w", encoding="utf-8") as file:
        yield file, shown
    os.close(shown)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, "acc 0.27  H 0.30  826 tok/s"),
        (80, "acc 0.27  H 0.30  826 tok/s"),
        (70, "acc 0.27  H 0.30"),
        (60, "acc 0.27"),
        (48, None),
        (34, None),
    ],
)
def test_the_bar_is_one_line_of_any_terminal(monkeypatch, columns, shown):
    """Words for which there is no room are left out before the bar loses its six characters."""
    with terminal(columns) as (file, shows):
        monkeypatch.setattr(sys, "stderr", file)
        with progress.Progress("tepo step 0/100", 100) as bar:
            for step in (1, 37, 100):
                bar.show(step, f"tepo step {step}/100", WORDS)
        seen = b""
        while not seen.endswith(b"\n"):  # of its end
            seen += os.read(shows, 10_000)
    lines = seen.decode().strip().split("\r")
    last = lines[-1].rstrip()
    assert all(len(line) < columns for line in lines)
    assert last.startswith("tepo step 100/100 |" + "█" * (6 if columns > 40 else 1))
    assert last.endswith(f", {shown}" if shown else "<00:00")


def test_a_log_gets_plain_lines_every_few_seconds_and_the_last(clock, capsys):
    """40 steps are made in 20 s, at one speed; nothing is said twice."""
    with progress.Progress("tepo step 0/40", 40) as bar:
        for step in range(1, 41):
            clock.seconds += 0.5
            bar.show(step, f"tepo step {step}/40", WORDS)
            bar.show(step, f"tepo step {step}/40", WORDS)
    printed, errors = capsys.readouterr()
    steps, left = [1, 11, 21, 31, 40], ["00:19", "00:14", "00:09", "00:04", "00:00"]
    words = "acc 0.27  H 0.30  826 tok/s"
    want = [f"tepo step {n}/40  {t} left  {words}" for n, t in zip(steps, left, strict=True)]
    assert errors.splitlines() == want and printed == ""


def test_a_resumed_run_knows_its_speed_from_its_own_steps(clock, capsys):
    with progress.Progress("grpo step 90/100", 100, done=90) as bar:
        bar.show(90, "grpo step 90/100")
        clock.seconds += 10
        bar.show(92, "grpo step 92/100")
    assert capsys.readouterr().err == "grpo step 90/100\ngrpo step 92/100  00:40 left\n"


def test_a_quick_evaluation_leaves_no_line_and_a_long_one_some(clock, capsys):
    with progress.Evaluation(range(8), k=4) as bar:
        bar.update(8)
        bar.update(8)
    assert capsys.readouterr() == ("", "")
    with progress.Evaluation(range(8), k=0) as bar:
        clock.seconds += 6
        bar.update(4)
    assert capsys.readouterr().err == "evaluate 4/8  00:06 left\n"


@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({"k": 0, "truncated": 0.03}, "length 14.1, 3% cut off"),
        ({"k": 4, "pass_at_k": 0.75, "truncated": 0}, "pass@4 0.750, length 14.1, 0% cut off"),
        ({"k": 0, "truncated": 0.002}, "length 14.1, 0.2% cut off"),
    ],
)
def test_an_evaluation_in_words(more, want):
    line = {"step": 25, "accuracy": 0.532, "ci95": [0.4881, 0.5751], "length": 14.14, **more}
    said = session.evaluation_in_words(line)
    assert said == f"step 25: greedy 0.532 (95% 0.488-0.575), {want}"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs", ROOT.parent])
def test_a_next_command_runs_from_the_current_folder(monkeypatch, folder):
    monkeypatch.chdir(folder)
    program, script, run = shlex.split(commandline.command("tools/view.py", "runs/a b"))
    assert (folder / script).resolve() == ROOT / "tools" / "view.py" and run == "runs/a b"
    assert shutil.which(program) == sys.executable or (folder / program).samefile(sys.executable)
    monkeypatch.setenv("PATH", str(commandline.Path(sys.executable).parent))
    assert commandline.python() == commandline.Path(sys.executable).name
