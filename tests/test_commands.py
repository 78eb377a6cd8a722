"""The command lines: a newcomer's mistake gets a one-line answer, at once; so does Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_plot import write_run

import compare
import plot
from run import commandline, parser
from trainer import policy
from trainer.methods import ALGORITHMS, MORE

NO_OPTION = "train.py: error: no option"
THERE_ARE = f"There are {', '.join([*ALGORITHMS, *MORE])}"
SLOW = "torch", "transformers", "matplotlib", "pandas", "datasets", "trl"  # to import


def command(*words, **environment):
    """(exit status, what was printed) of `python WORDS` in the project's folder."""
    line = [sys.executable, *map(str, words)]
    how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(line, env=os.environ | environment, **how)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("--help", 0, "--max-new-tokens"),
        ("--step 3", 2, f"{NO_OPTION} --step; did you mean --steps?"),
        ("--temprature=2", 2, f"{NO_OPTION} --temprature; did you mean --temperature?"),
        ("--group_size 4", 2, f"{NO_OPTION} --group_size; did you mean --group-size?"),
        ("--zzz", 2, f"{NO_OPTION} --zzz; --help lists the options"),
        ("tepo", 2, "train.py: error: 'tepo' belongs to no option; --help lists the options"),
        ("--algo gppo", 2, f"train.py: error: no algorithm 'gppo'; did you mean gtpo? {THERE_ARE}"),
        ("--k -1", 2, "train.py: error: --k -1: it must be from 0 to 10000"),
    ],
)
def test_help_and_a_misspelt_option_are_answered_without_importing_torch(words, status, text):
    found, printed = without_slow_imports("train.py", *words.split())
    assert found == status and text in printed
    if status:
        assert printed == text + "\n"


def without_slow_imports(*words):
    """`command` of a file and its options; an import of one of SLOW fails.

    So if the command works, it imports none of them, and the answer comes in a fraction of a
    second.
    """
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({SLOW})); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return command("-c", code, *words)


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("plot.py --help", 0, "--credit"),
        ("plot.py x --entropi", 2, "plot.py: error: no option --entropi; did you mean --entropy?"),
        ("tools/view.py --help", 0, "samples.html"),
        ("tools/view.py x --ot y", 2, "view.py: error: no option --ot; did you mean --out?"),
        ("tools/ask.py --help", 0, "--answer"),
        ("tools/ask.py tiny x --answr 3", 2, "ask.py: error: no option --answr; did you mean --an"),
        ("compare.py --help", 0, "--off-policy"),
        ("compare.py --algo x", 2, "compare.py: error: no option --algo; did you mean --algos?"),
        ("tools/bench.py --help", 0, "--peer"),
        ("tools/bench.py --stepps 3", 2, "bench.py: error: no option --stepps; did you mean --st"),
        ("scale/verl_data.py --help", 0, "--prompt"),
        ("scale/verl_data.py --out x --dta y", 2, "no option --dta; did you mean --data?"),
        ("scale/trl_trainer.py --help", 0, "GRPOConfig"),
        ("tiny/pretrain.py --help", 0, "--batch"),
        ("tiny/pretrain.py --stps 3", 2, "unrecognized arguments: --stps"),
    ],
)
def test_every_other_command_answers_so_too(words, status, text):
    found, printed = without_slow_imports(*words.split())
    assert found == status and text in printed
    if status == 0:
        assert f"usage: {Path(words.split()[0]).name} " in printed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--eps 0.2", "argument --eps: '0.2': a range is LOW/HIGH, such as 0.2/0.28"),
        ("--eps 0.2/x", "argument --eps: '0.2/x': a range is LOW/HIGH"),
        ("--eps 0.2/nan", "argument --eps: '0.2/nan': a range is LOW/HIGH"),
        ("--eps -0.2/0.2", "argument --eps: expected one argument"),
        ("--seeds x", "argument --seeds: 'x': whole numbers with commas, such as 0,1,2"),
        ("--seeds 1,,2", "argument --seeds: '1,,2': whole numbers with commas"),
        ("--out=", "argument --out: an empty path; name a folder"),
        ("--off-policy 4,1.5", "argument --off-policy: '4,1.5': whole numbers with commas"),
        ("--seed 1", "no option --seed; did you mean --seeds?"),
        ("--algos tepo,gppo", "argument --algos: no algorithm 'gppo'; did you mean gtpo? There"),
        ("--steps 10", "--steps is an option of train.py; those go after --: compare.py -- --st"),
        ("--lr=1e-5", "--lr is an option of train.py; those go after --: compare.py -- --lr=1e-5"),
        ("--beta 0.1 --seeds 1", "--beta is an option of train.py; those go after --"),
        ("--algos tepo --model x", "--model is an option of train.py; those go after --: compare"),
        ("--jobs 2 --eval-every 5", "--eval-every is an option of train.py"),
        ("--gradient-checkpointing", "--gradient-checkpointing is an option of train.py"),
        ("--algo tepo", "no option --algo; did you mean --algos?"),
        ("tepo", "'tepo' belongs to no option"),
    ],
)
def test_compare_says_what_an_option_wants(words, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(words.split())
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith(f"compare.py: error: {text}")
    assert printed.count("\n") == 1


def test_the_trl_port_says_how_to_install_trl():
    code = (
        "import runpy, sys; sys.modules['trl'] = None;"
        "runpy.run_path('scale/trl_trainer.py', run_name='__main__')"
    )
    status, printed = command("-c", code)
    assert status == 2 and printed.startswith("trl_trainer.py: error: TRL is needed")
    assert "pip install -r requirements.txt -r scale/requirements.txt" in printed
    assert printed.count("\n") == 1


# Ctrl-C while a command imports

HANGS = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    ("words", "slow"),
    [
        ("train.py", "torch"),
        ("plot.py x", "numpy"),
        ("compare.py", "tqdm"),
        ("tools/view.py x", "numpy"),
        ("tools/ask.py tiny x", "torch"),
    ],
)
def test_ctrl_c_while_importing_is_status_130_without_a_traceback(words, slow, tmp_path):
    """The package that is imported is one that takes a minute."""
    (tmp_path / f"{slow}.py").write_text(HANGS)
    line = [sys.executable, *words.split()]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(tmp_path)}, **how)
    while process.stdout.readline() != "importing\n":
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and printed == ""


def test_ctrl_c_later_is_status_130_too():
    def interrupted():
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            commandline.run_main(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130


# Paths


@pytest.mark.parametrize(
    "build_parser", [parser.build_parser, plot.build_parser, compare.build_parser]
)
def test_the_paths_that_help_prints_exist_from_the_users_folder(
    build_parser, tmp_path, monkeypatch
):
    for folder in (ROOT, ROOT / "docs", tmp_path):
        monkeypatch.chdir(folder)
        printed = build_parser().format_help()
        paths = re.findall(r"[\w./-]+\.(?:py|md|csv)", printed)
        ours = [path for path in paths if path not in ("FILE.py", "my_method.py")]
        assert len(ours) >= 5 and all((folder / path).is_file() for path in ours), ours
        assert ("docs/own.md" in paths) == (folder == ROOT and build_parser != plot.build_parser)


# Disks

FULL = OSError(28, "No space left on device")
LOCKED = PermissionError(13, "Permission denied")
READ_ONLY = OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    ("where", "error", "name", "words"),
    [
        ("matplotlib.figure.Figure.savefig", FULL, "a.png", "{run} --out a.png"),
        ("matplotlib.figure.Figure.savefig", READ_ONLY, "a.pdf", "{run} --out a.pdf"),
        ("pathlib.Path.mkdir", LOCKED, "sub/a.png", "{run} --out sub/a.png"),
        ("os.replace", READ_ONLY, "{run}/curves.png", "{run}"),
        ("matplotlib.figure.Figure.savefig", FULL, "e.png", "--entropy {run} --out e.png"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    where, error, name, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(SystemExit) as stopped:
        plot.main(words.format(run=folder).split())
    told = f"plot.py: error: cannot write {name.format(run=folder)}: {error.strerror}\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == told


def test_the_numbers_and_the_table_of_a_comparison_are_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "tepo-s0")
    args = compare.parse_args(["--out", str(tmp_path)])
    monkeypatch.setattr(compare, "plot_runs", lambda *_: None)
    for name, at in (("write_csv", "methods.csv"), ("markdown", "methods.md")):
        with monkeypatch.context() as patch, pytest.raises(OSError) as found:
            patch.setattr(compare, name, lambda *_: (_ for _ in ()).throw(FULL))
            compare.write_results(args, [folder])
        assert str(found.value) == f"cannot write {tmp_path / at}: No space left on device"


# Threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Model:
    """A model of any number of weights; on the meta device they take no memory."""

    def __init__(self, weights):
        self.weights = weights

    def parameters(self):
        return [torch.empty(self.weights, device="meta")]


@pytest.mark.parametrize(
    ("asked", "weights", "variable", "want"),
    [
        ("auto", 700_000, None, 1),
        ("auto", 9_999_999, None, 1),
        ("auto", 10_000_000, None, 2),
        ("auto", 700_000, "2", 2),
        ("2", 700_000, None, 2),
        ("1", 494_000_000, "2", 1),
    ],
)
def test_a_small_model_runs_on_one_thread_unless_the_user_says_otherwise(
    asked, weights, variable, want, threads, monkeypatch, capsys
):
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    policy.use_threads(asked, Model(weights))
    assert torch.get_num_threads() == want
    assert capsys.readouterr().out.startswith(f"CPU threads: {want} (")
