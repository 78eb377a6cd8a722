"""compare.py: what it runs, skips, resumes and refuses; the tables' intervals.

The last test runs it in miniature, with train.py.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import child
import pytest
from conftest import ROOT
from test_plot import change_lines, check_picture, write_run

import compare
from run import origin
from run.checks import fill
from run.parser import parse
from run.runs import ORDER, read_csv, read_runs
from run.style import STYLES
from run.table import cell, mean_interval, tabulate
from trainer.methods import ALGORITHMS, MORE

BAD_RANGES = "0.2 1.2.3/0.2 0.2/1.2.3 nan/0.2 0.2/nan inf/1 -1/1 a/b 1/2/3 0.2/".split()


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for train.py: writes a finished run at once.

    .asked: its command lines; .fail: folders that fail; .inputs: the data and start weights of a
    new run; .loaded: how often they were asked for.
    """
    inputs = {"checksum": 1, "weights": "aa"}
    seen = SimpleNamespace(asked=[], fail=(), env=[], running=0, most=0, inputs=inputs, loaded=0)
    lock = threading.Lock()

    def run(command, env, **_):
        flags = command[2:]
        with lock:
            seen.asked.append(flags)
            seen.env.append(env.get("OMP_NUM_THREADS"))
            seen.running += 1
            seen.most = max(seen.most, seen.running)
        time.sleep(0.01)
        with lock:
            seen.running -= 1
        at = "--resume" if "--resume" in flags else "--out"
        folder = compare.Path(flags[flags.index(at) + 1])
        if folder.name in seen.fail:
            said = "tepo step 1/9\ntrain.py: error: no disk\n \n"
            return SimpleNamespace(returncode=2, stderr=said)
        if at == "--resume":
            options = json.loads((folder / "config.json").read_text())["options"]
        else:
            options = vars(fill(parse(flags)))
        write_run(folder, **options)
        now = {"code": origin.code_checksums(options["algo"]), "versions": origin.versions()}
        change_config(folder, **seen.inputs, **now)
        return SimpleNamespace(returncode=0, stderr="")

    def data_and_weights(_):
        seen.loaded += 1
        return seen.inputs

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "data_and_weights", data_and_weights)
    return seen


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(compare, "plot_runs", lambda *_: None)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def names(asked):
    return [flags[-1].rsplit("/", 1)[-1] for flags in asked]


def test_default_is_seven_by_three(trainer, tmp_path, capsys):
    steps = ["--", "--steps", "12"]
    assert compare.main(["--out", str(tmp_path), *steps]) == 0
    assert names(trainer.asked) == [f"{algo}-s{seed}" for seed in range(3) for algo in ALGORITHMS]
    assert trainer.most == 1 and set(trainer.env) == {os.environ.get("OMP_NUM_THREADS")}
    for flags in trainer.asked:
        assert parse(flags).keys() == {"algo", "seed", "out", "steps"}
    check_picture(tmp_path / "methods.png", 1280)
    runs = read_csv(tmp_path / "methods.csv")
    assert len(runs) == 21 and (tmp_path / "methods.csv").stat().st_size < 40_000
    text = (tmp_path / "methods.md").read_text()
    assert text == compare.markdown(runs)
    rows = [line.split("|")[1:3] for line in text.splitlines()[2:9]]
    assert rows == [[f" {STYLES[algo][0]} ", " 3 "] for algo in ORDER[:7]]
    printed, errors = capsys.readouterr()
    assert compare.aligned(runs) in printed and max(map(len, printed.splitlines()[:10])) <= 80
    assert "tepo-s1: greedy 0.200 -> 0.440\n" in errors and "\r" not in errors


def test_all_28_in_one_table(trainer, no_figure, tmp_path):
    words = ["--algos", "all", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main(words) == 0
    assert names(trainer.asked) == [f"{algo}-s0" for algo in (*ALGORITHMS, *MORE)]
    lines = (tmp_path / "methods.md").read_text().splitlines()[2:30]
    assert [line.split("|")[1].strip() for line in lines] == [STYLES[a][0] for a in ORDER]
    assert max(map(len, compare.aligned(read_runs([tmp_path])).splitlines())) <= 80
    trainer.asked.clear()
    assert compare.main(words) == 0 and trainer.asked == []  # their code has not changed


def test_done_is_skipped_and_interrupted_resumed(trainer, no_figure, tmp_path):
    line = ["--algos", "tepo,gspo", "--seeds", "0,1", "--out", str(tmp_path), "--", "--steps", "9"]
    assert compare.main(line) == 0 and len(trainer.asked) == 4
    assert all(parse(flags)["steps"] == 9 for flags in trainer.asked)
    trainer.asked.clear()
    assert compare.main(line) == 0 and trainer.asked == []
    change_config(tmp_path / "gspo-s1", status="running")
    assert compare.main(line) == 0
    assert trainer.asked == [["--resume", str(tmp_path / "gspo-s1")]]
    trainer.asked.clear()
    assert compare.main(["--overwrite", *line]) == 0
    assert len(trainer.asked) == 4 and all("--overwrite" in flags for flags in trainer.asked)


def test_progress_counts_the_steps_of_all_runs(tmp_path, capsys, monkeypatch):
    """Of two runs of 10 steps one is done, one had 4 before and is at 7 now: 17 of 20."""

    def run(name, first, started, last):
        path = tmp_path / name / "metrics.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps({"phase": "train", "step": last}) + '\n{"phase": "tr')
        return compare.Run(path.parent, [], 10, first, first == 10, started)

    runs = [run("a", 10, None, 10), run("b", 4, time.time() - 60, 7)]
    said = []
    bar = SimpleNamespace(show=lambda *words: said.append(words))
    compare.show(bar, runs, 1, runs[1:])
    os.utime(tmp_path / "b" / "metrics.jsonl", (0, 0))  # of before: it has not begun
    compare.show(bar, runs, 1, runs[1:])
    assert said == [(17, "1/2 runs", ["b 7/10"]), (14, "1/2 runs", ["b 4/10"])]
    assert compare.last_step(tmp_path / "nowhere") == 0


def test_other_options_are_not_taken_for_done(trainer, no_figure, tmp_path, capsys):
    line = ["--algos", "tepo", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main(line) == 0
    trainer.asked.clear()
    for more in (["--lr", "0.5"], ["--option", "eps_low=0.1"], ["--group-size", "4"]):
        capsys.readouterr()
        assert compare.main([*line, "--", *more]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "--overwrite" in told
        assert more[0].strip("-").replace("-", "_") in told
    assert trainer.asked == []
    (tmp_path / "tepo-s0" / "config.json").write_text('{"opti')
    assert compare.main(line) == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["done", "running"])
def test_a_run_of_other_data_weights_code_or_versions_is_not_taken(
    trainer, no_figure, tmp_path, capsys, status
):
    """... nor resumed; the line says what differs. The model is loaded once for all runs."""
    line = ["--algos", "gspo,tepo", "--seeds", "1", "--out", str(tmp_path)]
    assert compare.main(line) == 0 and trainer.loaded == 0
    out = tmp_path / "tepo-s1"
    config = json.loads((out / "config.json").read_text())
    code, versions = config["code"], config["versions"]
    cases = {
        "other data": {"checksum": 2},
        "other start weights": {"weights": "bb"},
        "unrecorded start weights": {"weights": None},
        "(tepo.py; trainer/update.py)": {"code": code | {"tepo.py": "0", "trainer/update.py": "0"}},
        "(code not recorded)": {"code": None},
        f"(torch 1.0, now {versions['torch']})": {"versions": versions | {"torch": "1.0"}},
    }
    for told, change in cases.items():
        trainer.asked.clear()
        capsys.readouterr()
        trainer.loaded = 0
        change_config(out, **{**config, **change, "status": status})
        assert compare.main(line) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"compare.py: error: {out} was made with ")
        assert told in err and "--overwrite" in err and "another --out" in err
        assert trainer.loaded == 1 and trainer.asked == []
        kept = compare.main([*line, "--keep"])  # accepts code and versions, no other experiment
        assert kept == (0 if "(" in told else 2) and ("--keep" in err) == (kept == 0)
        resumed = [["--resume", str(out)]] if (kept, status) == (0, "running") else []
        assert trainer.asked == resumed
    assert compare.main([*line, "--overwrite"]) == 0


def test_variants(trainer, no_figure, tmp_path):
    line = ["--algos", "grpo,gspo", "--seeds", "0,1", "--out", str(tmp_path)]
    assert compare.main(line) == 0 and len(trainer.asked) == 4
    line += ["--off-policy", "1,4,16"]
    assert compare.main(line) == 0 and len(trainer.asked) == 12  # 4 are the default: done
    assert compare.main([*line, "--", "--k", "0"]) == 0
    assert len(trainer.asked) == 12  # nor do more draws make others
    runs = read_csv(tmp_path / "off-policy.csv")
    ways = ["1 update per rollout", "4 updates per rollout", "16 updates per rollout"]
    assert list(tabulate(runs)["variant"].cat.categories) == ways and len(runs) == 12
    text = compare.aligned(runs).splitlines()
    assert [line for line in text if line.endswith(":")] == [f"{way}:" for way in ways]
    assert (tmp_path / "off-policy.md").read_text().count("GSPO, 16 updates per rollout") == 1
    trainer.asked.clear()
    line = ["--eps", "0.2/0.28,3e-4/4e-4", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main(line) == 0
    given = [parse(flags) for flags in trainer.asked]
    clips = [("0.2", "0.28"), ("3e-4", "4e-4")]
    assert [g["option"] for g in given] == [{"eps_low": a, "eps_high": b} for a, b in clips]
    assert {g["algo"] for g in given} == {"tepo"}


def test_failed_run_is_told_and_the_rest_go_on(trainer, no_figure, tmp_path, capsys):
    trainer.fail = ("gspo-s0",)
    assert compare.main(["--algos", "gspo,tepo,grpo", "--seeds", "0", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert f"{tmp_path / 'gspo-s0'} failed with exit status 2: train.py: error: no disk" in told.err
    assert len(trainer.asked) == 3 and "TEPO" in told.out and "GSPO" not in told.out
    assert {run["algo"] for run in read_csv(tmp_path / "methods.csv")} == {"tepo", "grpo"}


def test_jobs_share_the_cores(trainer, no_figure, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 6)
    assert compare.main(["--algos", "gspo,tepo", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert trainer.most == 2 and set(trainer.env) == {"3"} and len(trainer.asked) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--algos tepo,gpro", "gpro"),
        ("--seeds one", "--seeds"),
        *((f"--eps={text}", f"--eps: {text!r}: a range is LOW/HIGH") for text in BAD_RANGES),
        ("--jobs 0", "--jobs"),
        ("--off-policy 3", "--updates 3 does not divide"),
        ("-- --group-size 1", "--group-size 1"),
        ("-- --option zeta=1", "has no option 'zeta'"),
        ("-- --seed=7", "--seed cannot stand after --"),
        ("--off-policy 1 -- --updates 4", "--updates cannot stand after --"),
        ("-- --nonsense", "--nonsense"),
        ("--table nowhere", "no such run"),
        ("--out a-file", "argument --out: a-file is not a folder; name another one"),
        ("--out a-file/runs", "argument --out: a-file is not a folder; name another one"),
    ],
)
def test_refuses_in_one_line_before_anything_runs(
    trainer, tmp_path, monkeypatch, capsys, words, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    try:
        status = compare.main(words.split())
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and told in err and err.startswith("compare.py: error: ")
    assert err.count("\n") == 1 and trainer.asked == []


def test_t_interval():
    """Against the textbook: three numbers of standard deviation 1 have 4.303 / sqrt(3)."""
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_interval([0.5, 0.7]) == pytest.approx((0.6, 12.706 * 0.02**0.5 / 2**0.5))
    assert mean_interval([0.5]) == (0.5, None)
    assert mean_interval([0.0, 0.0, 3.0])[0] == 1  # the mean; the median is 0
    twenty = [float(i) for i in range(20)]
    exact = 2.093 * statistics.stdev(twenty) / 20**0.5
    assert exact < mean_interval(twenty)[1] < 1.07 * exact


def test_a_cell_of_equal_numbers_has_no_interval():
    assert cell([0.132, 0.132, 0.132], 3) == "0.132" and cell([None], 3) == "–"
    assert (
        cell([0.32 - 0.3, 0.44 - 0.42, 0.56 - 0.54], 3, "+") == "+0.020"
    )  # equal but for rounding
    assert cell([0.5, None], 1) == "0.5" and cell([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"


def test_tables_by_hand(tmp_path):
    """Final accuracies 0.32, 0.44, 0.56 of TEPO, and of GRPO 0.02 less at every seed.

    The mean is 0.44, the t-interval 4.303 * 0.12 / sqrt(3) = 0.298. The difference is 0.020 at
    every seed, which the two intervals alone would never show.
    """
    for s in range(3):
        write_run(tmp_path / "r" / f"t{s}", "tepo", s)
        path = write_run(tmp_path / "r" / f"g{s}", "grpo", s) / "metrics.jsonl"
        change_lines(path, lambda _, row: {**row, "accuracy": row["accuracy"] - 0.02})
    runs = read_runs([tmp_path / "r"])
    runs[-1]["rows"].loc[1, "seconds"] = 500.0  # the laptop was closed
    rows = [line.split("|")[1:-1] for line in compare.markdown(runs).splitlines()[:4]]
    head, _, grpo, tepo = [[cell.strip() for cell in row] for row in rows]
    assert head[2:6] == ["accuracy before", "final accuracy", "final less GRPO's", "pass@4"]
    # entropy 1 / (t + 1) and length 10 + t, over t = 8..12; two seconds a step
    left = statistics.fmean(1 / (t + 1) for t in range(8, 13))
    rest = ["0.500", f"{left:.3f}", "20.0", "24"]
    assert grpo == ["GRPO", "3", "0.180", "0.420 ± 0.298", "–", *rest]
    assert tepo == ["TEPO", "3", "0.200", "0.440 ± 0.298", "+0.020", *rest]
    assert compare.aligned(runs).splitlines() == [
        "method  accuracy       less GRPO's  pass@4  entropy  length  seconds",
        f"GRPO    0.420 ± 0.298  –            0.500   {left:.3f}    20.0    24",
        f"TEPO    0.440 ± 0.298  +0.020       0.500   {left:.3f}    20.0    24",
        "Greedy accuracy at the last evaluation; at the first it was 0.180 to 0.200.",
        "Means of 3 seeds, ± the half-width of the 95% t-interval.",
    ]
    one = compare.aligned(runs[:1]).splitlines()
    assert one[-1] == "One seed, so there are no intervals." and "±" not in "".join(one)
    waiting = read_runs([write_run(tmp_path / "w", steps=0)])
    waiting[0]["rows"] = waiting[0]["rows"].iloc[:0]
    assert compare.markdown(waiting).count("–") == 0 or "unknown" in compare.aligned(waiting)


def test_ctrl_c_ends_with_130_and_starts_no_more(tmp_path):
    """The whole process group gets the signal, as from a terminal.

    The trainer in progress ends by itself.
    """
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(parents=True)\n"
        "time.sleep(60)\n"
    )
    code = (
        "import compare, pathlib, signal, sys\n"
        # a job in the background starts with the signal ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "compare.TRAIN = pathlib.Path(sys.argv.pop(1))\n"
        "sys.exit(compare.main())"
    )
    words = [str(tmp_path / "train.py"), "--algos", "tepo,gspo", "--out", str(tmp_path / "r")]
    how = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code, *words], **how)
    deadline = time.monotonic() + 50
    while not (tmp_path / "r" / "tepo-s0").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert "the same command goes on" in process.communicate(timeout=50)[1]
    assert process.returncode == 130
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["tepo-s0"]


def test_compare_in_miniature(tmp_path, monkeypatch, capsys):
    """Two algorithms, two steps of the real trainer; then again from the same runs."""

    def run(command, **_):
        status, output = child.run(command[2:], tmp_path / "log")
        return SimpleNamespace(returncode=status, stderr=output)

    monkeypatch.setattr(compare.subprocess, "run", run)
    # 64 tokens: nothing is cut off, so the figure has no panel for it, and is 1280 pixels wide
    small = "--steps 2 --prompts 4 --group-size 4 --eval-n 8 --k 0 --max-new-tokens 64".split()
    words = ["--algos", "tepo,gspo", "--seeds", "0", "--out", str(tmp_path / "r"), "--", *small]
    assert compare.main(words) == 0
    first = capsys.readouterr().out
    check_picture(tmp_path / "r" / "methods.png", 1280)
    runs = read_csv(tmp_path / "r" / "methods.csv")
    assert [(run["algo"], run["seed"]) for run in runs] == [("tepo", 0), ("gspo", 0)]
    for run in runs:
        lines = zip(run["rows"]["phase"], run["rows"]["step"], strict=True)
        assert list(lines) == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    # the same problems at one seed, so the same rollouts on the first step
    a, b = (run["rows"].loc[1, ["entropy", "length"]].tolist() for run in runs)
    assert a == b and a[1] > 0
    (tmp_path / "log").unlink()
    assert compare.main(words) == 0
    assert first == capsys.readouterr().out and not (tmp_path / "log").exists()
