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
from safetensors.torch import load_file, save_file

import train
from run import start
from run.checks import fill
from run.parser import parse
from tiny.problems import problems

STEPS = 12
TIMINGS = ("rollout_s", "update_s", "tokens_per_s", "peak_mib")
# The options of every run here. They switch on what a resume could lose: a reference policy (beta),
# several updates per step, further draws of prompts, evaluations and samples in between.
WORDS = f"""--preset tiny --algo grpo --beta 0.01 --steps {STEPS} --prompts 2 --group-size 4
    --updates 2 --max-new-tokens 8 --dynamic-sampling 1 --eval-every 5 --eval-n 3 --k 2
    --samples-every 3""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems(30, 0, "train")))
    return path


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run to which nothing happens; beside it the file `lines`, see child.write_line_counts."""
    out = tmp_path_factory.mktemp("whole")
    words = [*WORDS, "--data", data, "--save-every", 1, "--out", out / "run"]
    status, log = child.run(words, out / "log", "write_line_counts", str(out / "lines"))
    assert status == 0, log
    rows = metrics(out / "run")
    # It does learn: otherwise a lost update would go unnoticed.
    assert sum(row["phase"] == "train" and row["grad_norm"] > 0 for row in rows) > STEPS / 2
    return out / "run"


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run, stopped by Ctrl-C in step 8, with the checkpoints of steps 7 and 8."""
    out = tmp_path_factory.mktemp("stopped")
    words = [*WORDS, "--data", data, "--save-every", 1, "--out", out / "run"]
    status, log = child.run(words, out / "log", "interrupt_in_step", 8, 1)
    assert status == 130, log
    assert sorted(os.listdir(out / "run" / "checkpoints")) == ["step-000007", "step-000008"]
    return out / "run"


def metrics(run):
    """metrics.jsonl without its timings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(TIMINGS) <= row.keys() for row in rows if row["phase"] == "train")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same(run, other):
    assert metrics(run) == metrics(other)
    for name in ("samples.jsonl", "held_out.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((run / "config.json").read_text())["status"] == "done"
    assert not list(run.rglob("*.part"))


def test_killed_twenty_times(whole, data, tmp_path):
    """SIGKILL before a random line of ours, sixteen times, and four times in the middle of a write.

    SIGKILL leaves the program no chance to tidy up. If the run still ends as the whole run does,
    what is on the disk is enough to go on from at each of these points.
    """
    before_loop, last = map(int, (whole.parent / "lines").read_text().split())
    a_step = (last - before_loop) / STEPS
    rng = random.Random(0)
    # Each life is at most 1.8 steps long, so twenty of them do not reach the end.
    faults = [("kill_at_line", rng.randint(1, int(before_loop + 1.8 * a_step))) for _ in range(16)]
    for what in ("model", "state", "written", "renamed"):
        faults.insert(rng.randint(1, len(faults)), ("kill_in_write", what))
    run, parts, past = tmp_path / "run", 0, []
    for fault in faults:
        words = [*WORDS, "--data", data, "--save-every", 1, "--out", run, "--overwrite"]
        if (run / "config.json").exists():
            words = ["--resume", run]
        status, log = child.run(words, tmp_path / "log", *fault)
        assert status == -signal.SIGKILL, log
        parts += any(run.glob("checkpoints/*.part"))
        past += [int(step) for step in re.findall(r"resuming .* after step (\d+) of", log)]
    assert parts >= 3  # it was killed during writes
    assert past == sorted(past) and past[-1] >= 3  # no checkpoint was lost, and it made progress
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0, log
    assert_same(run, whole)


def test_killed_at_any_time(whole, data, tmp_path):
    """SIGKILL from outside at a random time: also inside torch, where no line of ours runs."""
    run, rng = tmp_path / "run", random.Random(1)
    words = [*WORDS, "--data", data, "--save-every", 1, "--out", run]
    log = tmp_path / "log"

    def started():
        if "--resume" in words:
            return "after step" in log.read_text()
        return any(run.glob("m*"))  # metrics.jsonl

    for _ in range(3):
        process = child.start(words, log)
        deadline = time.monotonic() + 60
        while not started():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        words = ["--resume", run]
    status, printed = child.run(words, log)
    assert status == 0, printed
    assert_same(run, whole)


def test_interrupt(whole, data, tmp_path):
    """Ctrl-C, in two lives of a run: the step is finished and saved, and a command is printed.

    That command goes on from there. --save-every 50 saves nothing by itself.
    """
    words = [*WORDS, "--data", data, "--out", tmp_path / "a run", "--save-every", "50"]
    for at in (3, 8):
        status, log = child.run(words, tmp_path / "log", "interrupt_in_step", at, 1)
        assert status == 130 and "Traceback" not in log, log
        assert "finishing this step" in log
        line = re.search(r"stopped after step \d+\. Go on with: \S+ \S*train\.py (.*)", log)
        words = shlex.split(line[1])
        assert words == ["--resume", str(tmp_path / "a run")]
    assert metrics(tmp_path / "a run")[-1]["step"] == 11
    status, log = child.run(words, tmp_path / "log")
    assert status == 0, log
    assert "after step 11 of 12" in log
    assert_same(tmp_path / "a run", whole)


def test_other_free_memory(whole, data, tmp_path):
    """--micro-batch auto: a resumed run keeps what the run began with, though 1 row fits now."""
    words = [*WORDS, "--data", data, "--out", tmp_path / "run"]
    status, log = child.run(words, tmp_path / "log", "interrupt_in_step", 3, 1)
    assert status == 130 and "micro-batch: 4 rows (auto" in log, log
    status, log = child.run(["--resume", tmp_path / "run"], tmp_path / "log", "little_memory")
    assert status == 0 and "micro-batch: 4 rows instead of 1" in log, log
    assert_same(tmp_path / "run", whole)
    one = [*words, "--overwrite"]  # and with 1 row it would differ
    status, log = child.run(one, tmp_path / "log", "little_memory")
    assert status == 0 and "micro-batch: 1 rows" in log, log
    assert metrics(tmp_path / "run") != metrics(whole)


def test_second_interrupt(whole, data, tmp_path):
    """A second Ctrl-C exits at once: its step is not written, and --resume does it again."""
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", 2, "--out", run]
    status, log = child.run(words, tmp_path / "log", "interrupt_in_step", 6, 2)
    assert status == 130 and "Traceback" not in log and "stopped after" not in log, log
    assert metrics(run)[-1]["step"] == 5
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0 and "after step 4 of 12" in log, log
    assert_same(run, whole)


def test_interrupt_of_the_command(data, tmp_path):
    """The same with the real command and reward, a signal from outside, and the printed line."""
    cwd, env = child.ROOT, os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*WORDS, "--data", str(data), "--k", "0", "--steps", "30", "--eval-every", "0"]
    run = tmp_path / "run"
    command = [sys.executable, "train.py", *words, "--out", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=env, **pipes)
    deadline = time.monotonic() + 120
    lines = run / "metrics.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    again = shlex.split(printed.splitlines()[-1].split("Go on with: ")[1])
    done = subprocess.run(again, cwd=cwd, env=env, **pipes, timeout=120)
    assert done.returncode == 0, done.stderr
    status, log = child.run([*words, "--out", tmp_path / "whole"], tmp_path / "log", "true_reward")
    assert status == 0, log
    assert_same(run, tmp_path / "whole")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def garble(path):
    path.write_bytes(bytes(reversed(path.read_bytes())))


DAMAGE = {
    "model.safetensors cut": lambda folder: cut(folder / "model.safetensors"),
    "state.pt cut": lambda folder: cut(folder / "state.pt"),
    "model.safetensors garbled": lambda folder: garble(folder / "model.safetensors"),
    "state.pt garbled": lambda folder: garble(folder / "state.pt"),
    "state.pt empty": lambda folder: os.truncate(folder / "state.pt", 0),
    "model.safetensors gone": lambda folder: (folder / "model.safetensors").unlink(),
    "a weight gone": lambda folder: remove_weight(folder / "model.safetensors"),
    "metrics.jsonl short": lambda folder: cut_last_line(folder.parent.parent / "metrics.jsonl"),
}


def remove_weight(path):
    """Removes one weight. transformers would fill it with random numbers."""
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


def cut_last_line(path):
    """Cuts ten bytes: as after a power cut, if checkpoints were synced before lines."""
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(whole, stopped, tmp_path, damage):
    run = shutil.copytree(stopped, tmp_path / "run")
    DAMAGE[damage](run / "checkpoints" / "step-000008")
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0, log
    note = r"checkpoint step-000008 cannot be read \(.+\); falling back to the one before\n"
    assert re.search(note, log), log
    assert "after step 7 of 12" in log
    assert_same(run, whole)


@pytest.mark.parametrize("line", ["x", "{}", '{"phase": "eval", "step": 1, "accuracy": [0]}', "["])
def test_a_damaged_line_of_metrics_is_refused_before_training(stopped, tmp_path, capsys, line):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = run / "metrics.jsonl"
    first, second, *others = path.read_text().split("\n")
    line = line.ljust(len(second), "[" if line == "[" else " ")
    path.write_text("\n".join([first, line, *others]))
    before = contents(run)
    assert "metrics.jsonl: line 2 is not a" in refused(capsys, "--resume", run)
    assert contents(run) == before


def test_a_finished_run_keeps_the_group_of_its_last_step(data, tmp_path, capsys):
    """Nobody would sample it again. With more steps it goes, as in the run of so many steps."""
    run, more = tmp_path / "run", tmp_path / "more"
    words = [*WORDS, "--data", data, "--samples-every", 2, "--eval-every", 0]
    for steps, out in ((3, run), (4, more)):
        assert train.main([str(word) for word in [*words, "--steps", steps, "--out", out]]) == 0
    before = contents(run)
    assert train.main(["--resume", str(run)]) == 0
    after = contents(run)
    assert after[run / "samples.jsonl"] == before[run / "samples.jsonl"]
    assert b'"step": 3' in after[run / "samples.jsonl"]
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert (run / "samples.jsonl").read_bytes() == (more / "samples.jsonl").read_bytes()
    assert b'"step": 3' not in (run / "samples.jsonl").read_bytes()


def test_no_checkpoint_left(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        cut(folder / "state.pt")
    before = contents(run)
    assert refused(capsys, "--resume", run).endswith("mend that, or start again with --overwrite")
    assert contents(run) == before


def test_state_is_never_unpickled(stopped, tmp_path, capsys):
    """A state.pt that would run code when it is unpickled is refused, and the code does not run.

    The code would make the folder `ran`.
    """

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run = shutil.copytree(stopped, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        torch.save({"step": Evil()}, folder / "state.pt", pickle_module=pickle)
    refused(capsys, "--resume", run)
    assert not (tmp_path / "ran").exists()


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refused(capsys, *argv):
    """Runs train.main: it exits with status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--algo tepo", "its --algo is grpo, not tepo; only --steps (upwards), --save-every"),
        ("--data tiny", "not tiny; only --steps (upwards), --save-every and --track may change"),
        ("--model other", "its --model is tiny, not other"),
        ("--seed 1", "its --seed is 0, not 1"),
        ("--steps 11", "it has 12 steps, and --steps may only be raised"),
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


def test_resume_with_changed_data(stopped, data, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    copy = tmp_path / "problems.jsonl"
    rows = data.read_text().splitlines()
    copy.write_text("\n".join([*rows[1:], rows[0]]))
    config = json.loads((run / "config.json").read_text())
    config["options"]["data"] = str(copy)
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    assert "the data are not what they were when the run began" in refused(capsys, "--resume", run)
    assert contents(run) == before


def test_resume_without_its_model(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["options"]["model"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    assert f"cannot load the model '{tmp_path / 'gone'}'" in refused(capsys, "--resume", run)
    assert contents(run) == before


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
    options = asdict(fill(parse(words)))
    config = {"options": options, "status": "running", "micro_batch": 4}
    config.update(code={"train.py": "0f"}, versions={"torch": "2"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "--beta 0.1",
        "--option beta=1e-1 --option eps_low=.30",
        "--preset tiny --algo grpo --lr 0.001 --template-option thinking=false",
        "--save-every 3 --track none --steps 200",
    ],
)
def test_resume_with_its_own_options(begun, words):
    o, _ = start.resumed(parse(["--resume", str(begun), *words.split()]), begun)
    assert o.option == {"beta": 0.1, "eps_low": 0.3} and o.lr == 1e-3


@pytest.mark.parametrize(
    ("entry", "value", "line"),
    [
        ("options nonsense", 1, "no option is called 'nonsense'"),
        ("options lr", "x", 'lr is "x", not a number'),
        ("options temperature", None, "temperature is null, not a number"),
        ("options temperature", True, "temperature is true, not a number"),
        ("options steps", "5", 'steps is "5", not a whole number'),
        ("options updates", 4.0, "updates is 4.0, not a whole number"),
        ("options max_new_tokens", "16", 'max_new_tokens is "16", not a whole number'),
        ("options seed", [1], "seed is [1], not a whole number"),
        ("options k", False, "k is false, not a whole number"),
        ("options overwrite", 1, "overwrite is 1, not true or false"),
        ("options prompt", 5, "prompt is 5, not a text"),
        ("options prompt", "\ud800{question}", "a text in it is not valid UTF-8"),
        ("options system", 5, "system is 5, not a text or null"),
        ("options algo", 5, "algo is 5, not a text"),
        ("options data", 5, "data is 5, not a text"),
        ("options model", 5, "model is 5, not a text"),
        ("options option", None, "option is null, not an object"),
        ("options option", [1], "option is [1], not an object"),
        ("options option", {"beta": None}, "option beta is null, not a number, a text, true"),
        ("code", [], "code is [], not an object"),
        ("code", {"train.py": 1}, "code train.py is 1, not a text"),
        ("versions", "2", 'versions is "2", not an object'),
        ("micro_batch", "x", 'micro_batch is "x", not a whole number'),
        ("micro_batch", 0, "micro_batch is 0, not 1 to 65536"),
    ],
)
def test_resume_of_a_run_of_another_version(begun, capsys, entry, value, line):
    """Or of a config.json that was edited: the line names the file and the entry."""
    path = begun / "config.json"
    config = json.loads(path.read_text())
    *table, name = entry.split()
    (config[table[0]] if table else config)[name] = value
    path.write_text(json.dumps(config))
    before = contents(begun)
    found = refused(capsys, "--resume", begun)
    assert f"{path}: {line}" in found and "another version of this code made the run" in found
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("name", "value", "words", "line"),
    [
        ("device", "cuda:99", "--device cpu", "its --device is cuda:99, not cpu"),
        ("algo", "gone", "--beta 0.1", "no algorithm 'gone'"),
    ],
)
def test_resume_of_a_run_that_cannot_go_on_here(begun, capsys, name, value, words, line):
    path = begun / "config.json"
    config = json.loads(path.read_text())
    config["options"][name] = value
    path.write_text(json.dumps(config))
    assert line in refused(capsys, "--resume", begun, *words.split())


def test_a_number_without_a_point_is_a_number(begun):
    path = begun / "config.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 1'))
    assert start.resumed({"resume": str(begun)}, begun)[0].temperature == 1


@pytest.fixture(scope="module")
def longer(data, tmp_path_factory):
    """The whole run with two more steps, without a stop."""
    out = tmp_path_factory.mktemp("longer")
    words = [*WORDS, "--data", data, "--steps", STEPS + 2, "--out", out / "run"]
    status, log = child.run(words, out / "log")
    assert status == 0, log
    return out / "run"


@pytest.mark.parametrize("interrupted", [True, False])
def test_more_steps(whole, stopped, longer, tmp_path, interrupted):
    """--steps may be raised, also of a finished run: then it equals the longer run.

    The evaluation after the former last step is removed, because the longer run has none there.
    """
    run = shutil.copytree(stopped if interrupted else whole, tmp_path / "run")
    status, log = child.run(["--resume", run, "--steps", STEPS + 2], tmp_path / "log")
    assert status == 0 and f"after step {8 if interrupted else 12} of 14" in log, log
    assert_same(run, longer)


def test_more_steps_where_an_evaluation_was_due(data, longer, tmp_path):
    """The last step's evaluation has pass@k samples (k = 2), those in between have none (k = 0).

    So the evaluation of the former last step is made again without them, even after another stop.
    """
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--steps", "10", "--save-every", "50", "--out", run]
    assert child.run(words, tmp_path / "log")[0] == 0
    assert metrics(run)[-1]["step"] == 10 and metrics(run)[-1]["k"] == 2
    words = ["--resume", run, "--steps", STEPS + 2]
    assert child.run(words, tmp_path / "log", "interrupt_in_step", 2, 2)[0] == 130
    assert [row["k"] for row in metrics(run) if row["phase"] == "eval"] == [2, 0, 0]
    assert child.run(["--resume", run], tmp_path / "log")[0] == 0
    assert_same(run, longer)


def test_resume_of_a_finished_run(whole, tmp_path, capsys):
    """It writes the model again and nothing else; without checkpoints it is refused."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "model")
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0, log
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same(run, whole)
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert "no checkpoint in" in refused(capsys, "--resume", run)
    assert contents(run) == before


def test_the_history_of_ha_dw_survives(data, tmp_path):
    """Its advantages depend on the rewards of earlier steps: they are saved with a checkpoint."""
    words = [*WORDS, *"--algo ha_dw --option window=4 --steps 6 --eval-every 0 --k 0".split()]
    words += ["--data", data, "--save-every", 1]
    status, log = child.run([*words, "--out", tmp_path / "whole"], tmp_path / "log")
    assert status == 0, log
    run = tmp_path / "run"
    status, log = child.run([*words, "--out", run], tmp_path / "log", "interrupt_in_step", 4, 1)
    assert status == 130, log
    rewards = [row["reward"] for row in metrics(run) if row["phase"] == "train"]
    state = torch.load(run / "checkpoints/step-000004/state.pt", weights_only=True)
    assert len(set(rewards)) > 1 and len(state["history"]) == 4
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0 and "after step 4 of 6" in log, log
    assert_same(run, tmp_path / "whole")


def test_killed_before_the_first_checkpoint(whole, data, tmp_path):
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", 0, "--out", run]
    status, log = child.run(words, tmp_path / "log", "interrupt_in_step", 2, 1)
    assert status == 130 and "stopped after step 2. Nothing was saved." in log, log
    status, log = child.run(["--resume", run], tmp_path / "log")
    assert status == 0 and "after step 0 of 12" in log, log
    assert_same(run, whole)


def test_later_checkpoints_are_dropped(stopped, tmp_path):
    """A checkpoint that could not be read is removed once the run has gone on from an earlier one.

    Step 8's is unreadable and named 11: kept, it would count as the latest one later on.
    """
    run = shutil.copytree(stopped, tmp_path / "run")
    cut(run / "checkpoints" / "step-000008" / "state.pt")
    (run / "checkpoints" / "step-000008").rename(run / "checkpoints" / "step-000011")
    status, log = child.run(["--resume", run], tmp_path / "log", "interrupt_in_step", 3, 1)
    assert status == 130, log
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000009", "step-000010"]


def test_a_run_is_not_overwritten_unasked(stopped, tmp_path, capsys):
    before = contents(stopped)
    line = refused(capsys, *WORDS, "--out", stopped)
    assert "holds a run already" in line and "--resume" in line and "--overwrite" in line
    assert contents(stopped) == before


def test_same_seed_same_metrics(whole, data, tmp_path):
    """Same seed, other --eval-every, --k and --save-every: the training is the same."""
    words = [*WORDS, *"--save-every 7 --eval-every 1 --k 3".split()]
    words += ["--data", data, "--out", tmp_path / "run"]
    status, log = child.run(words, tmp_path / "log")
    assert status == 0, log
    trained = []
    for run in (whole, tmp_path / "run"):
        trained.append([row for row in metrics(run) if row["phase"] == "train"])
    assert trained[0] == trained[1]
    words = [*WORDS, "--data", data, "--seed", 1, "--steps", 2, "--out", tmp_path / "other"]
    assert child.run(words, tmp_path / "log")[0] == 0
    assert metrics(tmp_path / "other")[1] != trained[0][0]
