"""A run that was interrupted, killed or lost a checkpoint, and is resumed, equals the whole run.

Equal to the bit: its metrics, its samples and its trained weights.
"""

import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import child
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small import change, contents, lines, read, refused, run, timeless

import train
from run import checkpoint, start
from run.checks import fill
from run.parser import parse
from tiny.problems import problems
from trainer import grading
from trainer.policy import load_policy

STEPS = 8
# The options of every run here. They switch on what a resume could lose: a reference policy (beta),
# several updates per step, further draws of prompts, evaluations and samples in between.
WORDS = f"""--preset tiny --algo grpo --beta 0.01 --steps {STEPS} --prompts 2 --group-size 4
    --updates 2 --max-new-tokens 8 --dynamic-sampling 1 --eval-every 3 --eval-n 3 --k 2
    --samples-every 3 --save-every 1 --threads 1""".split()


@pytest.fixture(autouse=True)
def as_in_a_child(monkeypatch, quiet_run):
    """The reward that child.py gives its runs."""
    monkeypatch.setattr(grading, "correct", child.parity)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems(30, 0, "train")))
    return path


def in_child(folder, words, *fault, status=0):
    """Run train.py in a process of its own. Returns what it printed."""
    found, log = child.run(words, folder / "log", *fault)
    assert found == status and "Traceback" not in log, log
    return log


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run to which nothing happens; beside it the file `lines`, see child.write_line_counts."""
    out = tmp_path_factory.mktemp("whole")
    words = [*WORDS, "--data", data, "--out", out / "run"]
    in_child(out, words, "write_line_counts", str(out / "lines"))
    # It does learn: otherwise a lost update would go unnoticed.
    assert sum(row["grad_norm"] > 0 for row in lines(out / "run", "train")) > STEPS / 2
    return out / "run"


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run, stopped by Ctrl-C in step 5, with the checkpoints of steps 4 and 5."""
    out = tmp_path_factory.mktemp("stopped")
    words = [*WORDS, "--data", data, "--out", out / "run"]
    in_child(out, words, "interrupt_in_step", 5, 1, status=130)
    assert sorted(os.listdir(out / "run" / "checkpoints")) == ["step-000004", "step-000005"]
    return out / "run"


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


def interrupted(monkeypatch, step, words, times=1, number=signal.SIGINT):
    """The exit status of a run in this process that gets signals in the middle of its step."""
    with monkeypatch.context() as patch:
        patch.setattr(train.Updater, "measure", train.Updater.measure)  # to be restored
        child.interrupt_in_step(step, times, number)
        return run(*words)


def assert_same(run, other):
    assert timeless(run) == timeless(other)
    for name in ("samples.jsonl", "held_out.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((run / "config.json").read_text())["status"] == "done"
    assert not list(run.rglob("*.part"))


# Killed and interrupted


def test_killed_at_random_lines_and_in_the_middle_of_writes(whole, data, tmp_path):
    """SIGKILL before a random line of ours, eight times, and four times in the middle of a write.

    SIGKILL leaves the program no chance to tidy up. If the run still ends as the whole run does,
    what is on the disk is enough to go on from at each of these points.
    """
    before_loop, last = map(int, (whole.parent / "lines").read_text().split())
    a_step = (last - before_loop) / STEPS
    rng = random.Random(0)
    # Each life is at most 1.8 steps long, so twelve of them do not reach the end.
    faults = [("kill_at_line", rng.randint(1, int(before_loop + 1.8 * a_step))) for _ in range(8)]
    for what in ("model", "state", "written", "renamed"):
        faults.insert(rng.randint(1, len(faults)), ("kill_in_write", what))
    out, parts, past = tmp_path / "run", 0, []
    for fault in faults:
        words = [*WORDS, "--data", data, "--out", out, "--overwrite"]
        if (out / "config.json").exists():
            words = ["--resume", out]
        log = in_child(tmp_path, words, *fault, status=-signal.SIGKILL)
        parts += any(out.glob("checkpoints/*.part"))
        past += [int(step) for step in re.findall(r"resuming .* after step (\d+) of", log)]
    assert parts >= 2  # it was killed during writes
    assert past == sorted(past) and past[-1] >= 2  # no checkpoint was lost, and it made progress
    assert run("--resume", out) == 0
    assert_same(out, whole)


def test_killed_at_any_time(whole, data, tmp_path):
    """SIGKILL from outside at a random time: also inside torch, where no line of ours runs."""
    out, rng = tmp_path / "run", random.Random(1)
    words = [*WORDS, "--data", data, "--out", out]
    log = tmp_path / "log"

    def started():
        if "--resume" in words:
            return "after step" in log.read_text()
        return any(out.glob("m*"))  # metrics.jsonl

    for _ in range(2):
        process = child.start(words, log)
        deadline = time.monotonic() + 60
        while not started():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        words = ["--resume", out]
    assert run(*words) == 0
    assert_same(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(whole, data, tmp_path, capfd, monkeypatch, number):
    """Ctrl-C, or the SIGTERM of Slurm, in two lives of a run: a command is printed that goes on.

    --save-every 50 saves nothing by itself.
    """
    words = [*WORDS, "--data", data, "--out", tmp_path / "a run", "--save-every", "50"]
    for at in (2, 3):
        assert interrupted(monkeypatch, at, words, number=number) == 128 + number
        printed, errors = capfd.readouterr()
        assert "finishing this step" in errors
        line = re.search(r"stopped after step \d+\. Go on with: \S+ \S*train\.py (.*)", printed)
        words = shlex.split(line[1])
        assert words == ["--resume", str(tmp_path / "a run")]
    assert read(tmp_path / "a run" / "metrics.jsonl")[-1]["step"] == 5
    assert run(*words) == 0
    assert "after step 5 of 8" in capfd.readouterr().out
    assert_same(tmp_path / "a run", whole)


def test_a_second_signal_exits_at_once(whole, data, tmp_path):
    """Its step is not written, and --resume does it again."""
    out = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", 2, "--out", out]
    for number, step, status in ((signal.SIGINT, 4, 130), (signal.SIGTERM, 2, 143)):
        log = in_child(tmp_path, words, "interrupt_in_step", step, 2, number, status=status)
        assert "stopped after" not in log
        words = ["--resume", out]
    assert "after step 2 of 8" in log and read(out / "metrics.jsonl")[-1]["step"] == 3
    assert run(*words) == 0
    assert_same(out, whole)


def test_interrupt_of_the_command(data, tmp_path):
    """The same with the real command and reward, a signal from outside, and the printed line."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*WORDS, "--data", str(data), "--k", "0", "--steps", "12", "--eval-every", "0"]
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *words, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    again = shlex.split(printed.splitlines()[-1].split("Go on with: ")[1])
    done = subprocess.run(again, cwd=ROOT, env=env, **pipes, timeout=120)
    assert done.returncode == 0, done.stderr
    in_child(tmp_path, [*words, "--out", tmp_path / "whole"], "true_reward")
    assert_same(out, tmp_path / "whole")


def test_other_free_memory(whole, half, data, tmp_path, capsys, monkeypatch):
    """--micro-batch auto: a resumed run keeps what the run began with, though 1 row fits now."""
    log = in_child(tmp_path, ["--resume", half], "little_memory")
    assert "micro-batch: 4 rows instead of 1" in log
    assert_same(half, whole)
    words = [*WORDS, "--data", data, "--out", tmp_path / "one"]  # and with 1 row it would differ
    assert "micro-batch: 1 rows" in in_child(tmp_path, words, "little_memory")
    assert timeless(tmp_path / "one") != timeless(whole)


# Damage


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def garble(path):
    path.write_bytes(bytes(reversed(path.read_bytes())))


def remove_weight(path):
    """transformers would fill it with random numbers."""
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


def cut_last_line(path):
    """As after a power cut, if checkpoints were synced before lines."""
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", garble),
        ("model.safetensors", os.unlink),
        ("model.safetensors", remove_weight),
        ("state.pt", cut),
        ("state.pt", garble),
        ("state.pt", lambda path: os.truncate(path, 0)),
        ("../../metrics.jsonl", cut_last_line),
    ],
)
def test_a_damaged_checkpoint_leaves_the_one_before(half, capsys, name, damage):
    damage(half / "checkpoints" / "step-000005" / name)
    model = load_policy("tiny")[0]
    optimizer = torch.optim.AdamW(model.parameters())
    assert checkpoint.load(half, model, optimizer, STEPS)["step"] == 4
    note = r"checkpoint step-000005 cannot be read \(.+\); taking the one before\n"
    assert re.search(note, capsys.readouterr().out)
    assert read(half / "metrics.jsonl")[-1]["step"] == 4


def test_a_later_checkpoint_that_could_not_be_read_is_dropped(whole, half, monkeypatch):
    """Step 5's is unreadable and named 7: kept, it would count as the latest one later on."""
    cut(half / "checkpoints" / "step-000005" / "state.pt")
    (half / "checkpoints" / "step-000005").rename(half / "checkpoints" / "step-000007")
    assert interrupted(monkeypatch, 2, ["--resume", half]) == 130
    assert sorted(os.listdir(half / "checkpoints")) == ["step-000005", "step-000006"]
    assert run("--resume", half) == 0
    assert_same(half, whole)


@pytest.mark.parametrize("line", ["x", "{}", '{"phase": "eval", "step": 1, "accuracy": [0]}', "["])
def test_a_damaged_line_of_metrics_is_refused_before_training(half, capsys, line):
    path = half / "metrics.jsonl"
    first, second, *others = path.read_text().split("\n")
    line = line.ljust(len(second), "[" if line == "[" else " ")
    path.write_text("\n".join([first, line, *others]))
    before = contents(half)
    assert "metrics.jsonl: line 2 is not a" in refused(capsys, "--resume", half)
    assert contents(half) == before


def test_no_checkpoint_left(half, capsys):
    for folder in (half / "checkpoints").iterdir():
        cut(folder / "state.pt")
    before = contents(half)
    assert refused(capsys, "--resume", half).endswith("mend that, or start again with --overwrite")
    assert contents(half) == before


def test_state_is_never_unpickled(half, tmp_path, capsys):
    """Code in a state.pt, which would make the folder `ran`, does not run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for folder in (half / "checkpoints").iterdir():
        torch.save({"step": Evil()}, folder / "state.pt", pickle_module=pickle)
    refused(capsys, "--resume", half)
    assert not (tmp_path / "ran").exists()


# What --resume refuses


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--algo tepo", "its --algo is grpo, not tepo; only --steps (upwards), --save-every"),
        ("--data tiny", "not tiny; only --steps (upwards), --save-every and --track may change"),
        ("--model other", "its --model is tiny, not other"),
        ("--seed 1", "its --seed is 0, not 1"),
        ("--steps 7", "it has 8 steps, and --steps may only be raised"),
        ("--eval-only", "its --eval-only is False, not True"),
        ("--option beta=0.5", "its --option is {'beta': 0.01}, not {'beta': 0.5}"),
        ("--option eps_low=0.1", "its --option is {'beta': 0.01}, not {'eps_low': 0.1}"),
        ("--stepz 30", "no option --stepz; did you mean --steps?"),
    ],
)
def test_resume_with_other_options(stopped, capsys, monkeypatch, words, line):
    too_late = "refused only after the model was loaded"
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail(too_late))
    before = contents(stopped)
    assert line in refused(capsys, "--resume", stopped, *words.split())
    assert contents(stopped) == before


def option(run, **values):
    """Change options in a run's config.json."""
    options = json.loads((run / "config.json").read_text())["options"]
    change(run / "config.json", options=options | values)


def test_resume_with_other_data_or_without_its_model(half, data, tmp_path, capsys):
    rows = data.read_text().splitlines()
    (tmp_path / "problems.jsonl").write_text("\n".join([*rows[1:], rows[0]]))
    gone = str(tmp_path / "gone")
    for name, value, line in (
        ("data", str(tmp_path / "problems.jsonl"), "the data are not what they were when the run"),
        ("model", gone, f"cannot load the model '{gone}'"),
    ):
        option(half, **{name: value})
        before = contents(half)
        assert line in refused(capsys, "--resume", half)
        assert contents(half) == before


@pytest.mark.parametrize("config", [None, "", "{", "[]", "{}", '{"options": 1}', '{"options": {}}'])
def test_resume_of_no_run(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert "holds no run to resume" in refused(capsys, "--resume", tmp_path)


@pytest.fixture
def begun(tmp_path):
    """A run that has begun and made no step: its config.json is all there is."""
    words = "--preset tiny --algo grpo --beta 0.1 --option eps_low=0.3 --lr 1e-3".split()
    words += ["--template-option", "thinking=false"]
    config = {"options": asdict(fill(parse(words))), "status": "running", "micro_batch": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "--beta 0.1",
        "--option beta=1e-1 --option eps_low=.30",
        "--preset tiny --algo GRPO --lr 0.001 --template-option thinking=false",
        "--save-every 3 --track none --steps 200",
    ],
)
def test_resume_with_its_own_options(begun, words):
    option(begun, temperature=1)  # a number without a point is one too
    o, _, _ = start.chosen(parse(["--resume", str(begun), *words.split()]))
    assert o.option == {"beta": 0.1, "eps_low": 0.3} and o.lr == 1e-3 and o.temperature == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonsense", 1),
        ("lr", "x"),
        ("temperature", True),
        ("updates", 4.0),
        ("seed", [1]),
        ("overwrite", 1),
        ("system", 5),
        ("option", None),
    ],
)
def test_resume_of_a_run_of_another_version(begun, capsys, name, value):
    """Or of a config.json that was edited: the line names the file and the option."""
    option(begun, **{name: value})
    before = contents(begun)
    line = refused(capsys, "--resume", begun)
    told = f"{begun / 'config.json'}: {name} = {json.dumps(value)} is no option of this version"
    assert told in line and contents(begun) == before


@pytest.mark.parametrize(
    ("name", "value", "words", "line"),
    [
        ("device", "cuda:99", "--device cpu", "its --device is cuda:99, not cpu"),
        ("device", "cuda:99", "", "--device cuda:99: "),
        ("algo", "gone", "--beta 0.1", "no algorithm 'gone'"),
        ("option", {"beta": None}, "", "--option beta=None: a finite number"),
    ],
)
def test_resume_of_a_run_that_cannot_go_on_here(begun, capsys, name, value, words, line):
    option(begun, **{name: value})
    assert line in refused(capsys, "--resume", begun, *words.split())


# More steps


@pytest.fixture(scope="module")
def longer(data, tmp_path_factory):
    """The whole run with two more steps, without a stop."""
    out = tmp_path_factory.mktemp("longer")
    in_child(out, [*WORDS, "--data", data, "--steps", STEPS + 2, "--out", out / "run"])
    return out / "run"


@pytest.mark.parametrize("base", ["stopped", "whole"])
def test_more_steps(request, longer, tmp_path, capsys, base):
    """--steps may be raised, also of a finished run: then it equals the longer run.

    The evaluation after the former last step is removed, because the longer run has none there.
    """
    copy = shutil.copytree(request.getfixturevalue(base), tmp_path / "run")
    assert run("--resume", copy, "--steps", STEPS + 2) == 0
    assert f"after step {5 if base == 'stopped' else 8} of 10" in capsys.readouterr().out
    assert_same(copy, longer)


def test_more_steps_where_an_evaluation_was_due(data, longer, tmp_path):
    """The last step's evaluation has pass@k samples (k = 2), those in between have none (k = 0).

    So the evaluation of the former last step is made again without them, even after another stop.
    """
    out = tmp_path / "run"
    words = [*WORDS, "--data", data, "--steps", "6", "--save-every", "50", "--out", out]
    assert run(*words) == 0
    assert (lines(out, "eval")[-1]["step"], lines(out, "eval")[-1]["k"]) == (6, 2)
    words = ["--resume", out, "--steps", STEPS + 2]
    in_child(tmp_path, words, "interrupt_in_step", 2, 2, status=130)
    assert [row["k"] for row in lines(out, "eval")] == [2, 0, 0]
    assert run("--resume", out) == 0
    assert_same(out, longer)


def test_resume_of_a_finished_run(whole, tmp_path, capsys):
    """It writes the model again and nothing else; without checkpoints it is refused."""
    copy = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(copy / "model")
    assert run("--resume", copy) == 0
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same(copy, whole)
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    assert "no checkpoint in" in refused(capsys, "--resume", copy)
    assert contents(copy) == before


def test_a_finished_run_keeps_the_group_of_its_last_step(data, tmp_path):
    """Nobody would sample it again. With more steps it goes, as in the run of so many steps."""
    out, more = tmp_path / "run", tmp_path / "more"
    words = [*WORDS, "--data", data, "--samples-every", 2, "--eval-every", 0, "--k", 0]
    for steps, folder in ((3, out), (4, more)):
        assert run(*words, "--steps", steps, "--out", folder) == 0
    before = (out / "samples.jsonl").read_bytes()
    assert run("--resume", out) == 0
    assert (out / "samples.jsonl").read_bytes() == before and b'"step": 3' in before
    assert run("--resume", out, "--steps", "4") == 0
    assert (out / "samples.jsonl").read_bytes() == (more / "samples.jsonl").read_bytes()
    assert b'"step": 3' not in (out / "samples.jsonl").read_bytes()


# Further states


def test_the_history_of_ha_dw_survives(data, tmp_path, monkeypatch, capsys):
    """Its advantages depend on the rewards of earlier steps: they are saved with a checkpoint."""
    words = [*WORDS, *"--algo ha_dw --option window=4 --steps 5 --eval-every 0 --k 0".split()]
    words += ["--data", data, "--out"]
    assert run(*words, tmp_path / "whole") == 0
    out = tmp_path / "run"
    assert interrupted(monkeypatch, 3, [*words, out]) == 130
    rewards = [row["reward"] for row in lines(out, "train")]
    state = torch.load(out / "checkpoints/step-000003/state.pt", weights_only=True)
    assert len(set(rewards)) > 1 and len(state["history"]) == 3
    assert run("--resume", out) == 0
    assert "after step 3 of 5" in capsys.readouterr().out
    assert_same(out, tmp_path / "whole")


def test_stopped_before_the_first_checkpoint(whole, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", 0, "--out", out]
    assert interrupted(monkeypatch, 2, words) == 130
    assert "stopped after step 2. Nothing was saved." in capsys.readouterr().out
    assert run("--resume", out) == 0
    assert "after step 0 of 8" in capsys.readouterr().out
    assert_same(out, whole)


def test_same_seed_same_metrics(whole, data, tmp_path):
    """Same seed, other --eval-every, --k and --save-every: the training is the same."""
    words = [*WORDS, *"--save-every 7 --eval-every 1 --k 3".split(), "--data", data, "--out"]
    assert run(*words, tmp_path / "run") == 0
    trained = []
    for folder in (whole, tmp_path / "run"):
        trained.append([row for row in timeless(folder) if row["phase"] == "train"])
    assert trained[0] == trained[1]
    assert run(*words, tmp_path / "other", "--seed", 1, "--steps", 1) == 0
    assert timeless(tmp_path / "other")[1] != trained[0][0]
