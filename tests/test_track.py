"""--track: a tracker shows what metrics.jsonl says, no step twice, and cannot harm a run.

Each protocol is tested with a fake module, which is always there, and with the real one where it is
installed: offline, in a folder of the test.
"""

import importlib.util
import json
import math
import struct
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace

import pytest
from small import WORDS as SMALL
from small import read, refused, run, write

from run import runs, session, start, track
from run.commandline import python
from run.options import TRACKERS, Options
from run.symptoms import Watch

# A run of four steps of four short completions, a checkpoint and an evaluation every second.
WORDS = [*SMALL, *"--eval-every 2 --save-every 2 --k 1 --samples-every 0".split()]


# A stand-in for a run of train.py, which takes much longer: it writes the lines of these phases


def line_of(phase, step):
    """A line of metrics.jsonl. Its numbers depend on the step alone, as those of a resumed run."""
    line = {"phase": phase, "step": step, "accuracy": step / 8, "kl": None, "skipped": step}
    if phase == "eval":
        line.update(ci95=[step / 16, step / 4], avg_at_k=None if step == 2 else 0.5)
    return line


def go(out, tool, *phases):
    """A process of the run: `phases` are (phase, step). Each line is written, then shown."""
    out.mkdir(exist_ok=True)
    tracker = track.Tracker(Options(track=tool), out)
    trainer = SimpleNamespace(tracker=tracker, watch=Watch("fp32"))
    with trainer.tracker:
        for phase in phases:
            session.write_metrics(trainer, out, line_of(*phase))


def cut(out, phase):
    """metrics.jsonl back to this line, as a resumed run does it."""
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = [(row["phase"], row["step"]) for row in read(out / "metrics.jsonl")].index(phase)
    (out / "metrics.jsonl").write_text("".join(rows[: last + 1]))


TO_STEP_3 = ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3)
FROM_STEP_2 = ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)


def interrupted_and_resumed(tool, out):
    """A run that the tracker has seen up to step 3, resumed after step 2, to its end."""
    go(out, tool, *TO_STEP_3)
    cut(out, ("train", 2))  # the checkpoint is written before the evaluation
    go(out, tool, *FROM_STEP_2)


# Fake trackers: {run: {"rows": [(step, values)], "starts": [what it was started with], "closed"}}


class Shown(dict):
    def of(self, name):
        return self.setdefault(name, SimpleNamespace(rows=[], starts=[], closed=0))


def fake_trackio(shown):
    current = []

    def init(project, name, config, resume):
        assert project == "grpo" and config["track"] == "trackio"  # it gets the options
        assert resume == "allow"  # with "never" the real one begins a second run of this name
        current[:] = [shown.of(name)]
        current[0].starts.append(resume)

    def log(values, step):
        current[0].rows.append((step, dict(values)))

    def finish():
        current[0].closed += 1

    return {"trackio": {"init": init, "log": log, "finish": finish, "Table": dict}}


def fake_wandb(shown):
    def init(project, id, name, dir, config, resume, settings, **others):
        assert project == "grpo" and dir.endswith(name) and config["track"] == "wandb"
        assert resume == "allow" and settings == {"console": "off", "save_code": False}
        mine = shown.of(id)
        mine.starts.append(resume)

        def log(values, step):
            # The real one ignores values of a step before the latest.
            assert step >= max((at for at, _ in mine.rows), default=0)
            mine.rows.append((step, dict(values)))

        def finish():
            mine.closed += 1

        return SimpleNamespace(log=log, finish=finish)

    return {"wandb": {"init": init, "Settings": dict, "Table": dict}}


def fake_tensorboard(shown):
    class SummaryWriter:
        def __init__(self, log_dir):
            self.mine = shown.of(log_dir)
            self.mine.starts.append(log_dir)
            self.mine.texts = {}
            self.waiting = []

        def add_scalar(self, name, value, step):
            self.waiting.append((step, {name: value}))

        def add_text(self, name, text, step):
            self.mine.texts[name, step] = text

        def flush(self):
            self.mine.rows += self.waiting
            self.waiting = []

        def close(self):
            self.mine.closed += 1

    return {"tensorboard": {}, "torch.utils.tensorboard": {"SummaryWriter": SummaryWriter}}


FAKES = {"tensorboard": fake_tensorboard, "trackio": fake_trackio, "wandb": fake_wandb}


@pytest.fixture(params=TRACKERS)
def fake(request, monkeypatch):
    """(name of the tracker, Shown): a fake module of this name."""
    return request.param, put_fake(request.param, monkeypatch)


def put_fake(tool, monkeypatch, **changed):
    """changed: functions that replace those of the fake module."""
    shown = Shown()
    for name, content in FAKES[tool](shown).items():
        module = ModuleType(name)
        vars(module).update({**content, **changed})
        module.__spec__ = ModuleSpec(name, None, origin="a fake")
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return shown


# What a tracker holds: {(name, step): value}; a step that it shows twice fails


def held(rows):
    """rows: [(step, {name: value})]."""
    found = {}
    for step, values in rows:
        for name, value in values.items():
            assert (name, step) not in found, f"{name} twice at step {step}"
            found[name, step] = value
    return found


def expected(rows):
    """The same from lines of metrics.jsonl, written out here a second time."""
    found = {}
    for line in rows:
        before = {"train": "", "eval": "eval/"}[line["phase"]]
        for name, value in line.items():
            if name == "ci95":
                found[f"{before}ci95_low", line["step"]] = value[0]
                found[f"{before}ci95_high", line["step"]] = value[1]
            elif name not in ("phase", "step") and value is not None:
                found[before + name, line["step"]] = value
    return found


def check_held(found, out):
    """found: of `held`. It is what metrics.jsonl says."""
    want = expected(read(out / "metrics.jsonl"))
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert {("accuracy", 4), ("eval/accuracy", 0), ("eval/ci95_high", 4)} <= found.keys()
    assert ("eval/avg_at_k", 4) in found and ("eval/avg_at_k", 2) not in found


def test_a_resumed_run_continues_its_line_and_shows_no_step_twice(fake, tmp_path):
    tool, shown = fake
    out = tmp_path / "a run"
    interrupted_and_resumed(tool, out)
    (mine,) = shown.values()  # one line
    check_held(held(mine.rows), out)
    assert len(mine.starts) == mine.closed == 2


def test_it_may_begin_later_stop_and_go_on(fake, tmp_path):
    tool, shown = fake
    go(tmp_path, "none", *TO_STEP_3[:3])
    assert not shown and not (tmp_path / "track.json").exists()
    go(tmp_path, tool)
    (mine,) = shown.values()
    assert held(mine.rows) == expected(read(tmp_path / "metrics.jsonl"))
    go(tmp_path, "none", *TO_STEP_3[3:])
    go(tmp_path, tool, *FROM_STEP_2[2:])
    check_held(held(mine.rows), tmp_path)


def greedy_of(step):
    """Lines of held_out.jsonl: two problems, one completion with half a surrogate pair."""
    texts = ("#### 1", "<b>\n\ud800")
    line = {"step": step, "prompt": "1 + 1?", "right": step > 0}
    return [{**line, "completion": text} for text in texts]


def test_each_evaluation_hands_over_its_completions(fake, tmp_path):
    """... those of before the tracker was begun, too; as text that any file can take."""
    tool, shown = fake
    go(tmp_path, "none", ("eval", 0), ("train", 1))
    write(tmp_path / "held_out.jsonl", greedy_of(0))
    tracker = track.Tracker(Options(track=tool), tmp_path)
    tracker.log(line_of("eval", 2), greedy_of(2))
    (mine,) = shown.values()
    for step, grade in ((0, "wrong"), (2, "right")):
        want = [["1 + 1?", grade, "#### 1"], ["1 + 1?", grade, "<b>\n?"]]
        if tool == "tensorboard":  # Markdown's blocks of code
            texts = ["\n\n".join(row) for row in want]
            texts = ["".join(f"    {line}\n" for line in text.split("\n")) for text in texts]
            assert [mine.texts[f"eval/held_out/{i}", step] for i in (0, 1)] == texts
        else:
            rows = dict(mine.rows if step == 2 else mine.rows[:1])
            table = rows[step]["eval/held_out"]
            assert table == {"columns": ["problem", "grade", "completion"], "data": want}
    assert "eval/held_out" not in str(mine.rows[1])  # of a training step
    if tool == "tensorboard":
        assert json.loads(mine.texts["options", 0])["track"] == "tensorboard"


@pytest.mark.parametrize("found", [True, False])
def test_the_command_that_opens_tensorboard_is_printed(found, tmp_path, monkeypatch, capsys):
    put_fake("tensorboard", monkeypatch)
    monkeypatch.setattr(track.shutil, "which", lambda name: f"/bin/{name}" if found else None)
    track.Tracker(Options(track="tensorboard"), tmp_path)
    program = "tensorboard" if found else f"{python()} -m tensorboard.main"
    assert capsys.readouterr().out == f"open it with: {program} --logdir {tmp_path}\n"


def test_a_run_has_a_line_of_its_own_in_each_tracker(tmp_path, monkeypatch):
    shown = {tool: put_fake(tool, monkeypatch) for tool in ("trackio", "wandb")}
    for tool in ("trackio", "wandb", "trackio"):
        go(tmp_path / "run", tool, *TO_STEP_3[:3] if tool == "trackio" else ())
        cut(tmp_path / "run", ("train", 2))
    # Two runs of one name in different folders are two lines.
    go(tmp_path / "run" / "run", "trackio", *TO_STEP_3)
    assert [len(lines) for lines in shown.values()] == [2, 1]
    (mine,) = shown["wandb"].values()
    assert held(mine.rows) == expected(read(tmp_path / "run" / "metrics.jsonl")[:3])


# train.py calls it


def test_train_py_shows_its_metrics_and_resumes(quiet_run, tmp_path, monkeypatch):
    shown = put_fake("trackio", monkeypatch)
    out = tmp_path / "run"
    write_metrics = session.write_metrics

    def full_disk(trainer, out, line, *greedy):
        if (line["phase"], line["step"]) == ("train", 4):
            raise OSError("no space left")
        write_metrics(trainer, out, line, *greedy)

    with monkeypatch.context() as patch:
        patch.setattr(session, "write_metrics", full_disk)
        assert run(*WORDS, "--out", out, "--track", "trackio") == 2
    assert run("--resume", out) == 0
    (mine,) = shown.values()
    found, want = held(mine.rows), expected(read(out / "metrics.jsonl"))
    assert found.keys() == want.keys() and len(mine.starts) == mine.closed == 2
    times = "rollout_s", "update_s", "tokens_per_s", "peak_mib"  # not repeated by a resumed run
    assert {key: x for key, x in found.items() if key[0] not in times} == {
        key: x for key, x in want.items() if key[0] not in times
    }
    # Another run in the same folder begins a line of its own.
    (out / "tensorboard").mkdir()
    words = "--track trackio --steps 1 --overwrite".split()
    assert run(*WORDS, "--out", out, *words) == 0
    assert len(shown) == 2 and not (out / "tensorboard").exists()


# What goes wrong


def broken(*_, **__):
    raise RuntimeError("the server\nis gone")


def test_a_tracker_that_fails_costs_one_line_and_no_metrics(tmp_path, monkeypatch, capsys):
    calls = []

    def log(values, step):
        calls.append(step)
        if step == 1:
            broken()

    put_fake("trackio", monkeypatch, log=log)
    go(tmp_path, "trackio", *TO_STEP_3)
    said = "warning: --track trackio failed and is off now (the server is gone); training goes on"
    assert capsys.readouterr().out == said + "\n"
    assert calls == [0, 1] and len(read(tmp_path / "metrics.jsonl")) == len(TO_STEP_3)


def test_nor_does_one_that_fails_to_close(tmp_path, monkeypatch, capsys):
    put_fake("trackio", monkeypatch, finish=broken)
    go(tmp_path, "trackio", *TO_STEP_3)
    assert capsys.readouterr().out.startswith("warning: --track trackio failed")


def test_one_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    put_fake("trackio", monkeypatch, init=broken)
    with pytest.raises(ValueError, match="--track trackio does not start: the server\nis gone"):
        go(tmp_path, "trackio")


@pytest.mark.parametrize("tool", TRACKERS)
def test_a_missing_package_is_named_before_the_model_is_loaded(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "set_up", lambda *_: pytest.fail("the model was loaded"))
    words = [*WORDS, "--out", tmp_path / "run", "--track", tool]
    want = f"--track {tool}: it is not installed; pip install {tool}"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, tool, None)
        assert refused(capsys, *words) == want
    # wandb makes a folder wandb where it runs: to Python that is a package without any content.
    (tmp_path / tool).mkdir()
    look = PathFinder.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: look(name, [str(tmp_path)]))
    assert importlib.util.find_spec(tool) is not None
    assert refused(capsys, *words) == want
    assert not (tmp_path / "run").exists()


def test_runs_that_differ_in_their_tracker_are_one_experiment():
    assert "track" in runs.DETAILS


def test_only_numbers_are_shown():
    line = {"phase": "train", "step": 3, "entropy": 0.5, "kl": None, "grad_norm": math.nan}
    line.update(reward=math.inf, skipped=0, **{"reward/format": 0.25})
    assert track.numbers(line) == {"entropy": 0.5, "skipped": 0, "reward/format": 0.25}
    line = {"phase": "eval", "step": 3, "accuracy": 0.5, "ci95": [0.25, 0.75], "avg_at_k": None}
    found = {"eval/accuracy": 0.5, "eval/ci95_low": 0.25, "eval/ci95_high": 0.75}
    assert track.numbers(line) == found


# The real ones


def installed(tool):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (pip install {tool})")


@pytest.mark.filterwarnings("ignore")  # of what the packages do among themselves
def test_the_real_tensorboard(tmp_path):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    interrupted_and_resumed("tensorboard", out)
    assert len(list((out / "tensorboard").glob("events.*"))) == 2  # of the two processes
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = []
    for name in read.Tags()["scalars"]:
        rows += [(event.step, {name: event.value}) for event in read.Scalars(name)]
    check_held(held(rows), out)


@pytest.mark.filterwarnings("ignore")
def test_the_real_trackio(tmp_path, monkeypatch):
    installed("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads TRACKIO_DIR when it is imported
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    out = tmp_path / "run"
    interrupted_and_resumed("trackio", out)
    (mine,) = trackio.Api().runs("grpo")
    assert mine.name.startswith("run-")
    rows = []
    for row in SQLiteStorage.get_logs("grpo", mine.name, run_id=mine.id):
        rows.append((row.pop("step"), {k: v for k, v in row.items() if k != "timestamp"}))
    check_held(held(rows), out)


@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    out = tmp_path / "run"
    interrupted_and_resumed("wandb", out)
    import wandb

    wandb.teardown()
    files = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # two processes, one run
    check_held(held([row for path in files for row in wandb_rows(path)]), out)
    assert not any(path.name == "output.log" for path in out.rglob("*"))  # what was printed


def wandb_rows(path):
    """[(step, values)] of a .wandb file: LevelDB's log of Record messages, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    rows = []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the message is complete
            record, message = Record.FromString(message), b""
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                step = values.pop("_step")
                rows.append((step, {k: v for k, v in values.items() if k[0] != "_"}))
    return rows
