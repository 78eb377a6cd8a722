"""claims/room.py: longer problems, the seven's table, the command in miniature."""

import json

import pandas as pd
import pytest

from claims import room
from tiny.problems import problems
from trainer.data import load_problems


def test_the_problems_have_three_to_six_steps_and_the_splits_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SIZES", {"train": 300, "test": 100})
    data = room.write_problems(tmp_path)
    asked = {}
    for split in room.SIZES:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        assert {row["answer"].count("\n") for row in rows} == {3, 4, 5, 6}  # a line per step
        asked[split] = {row["question"] for row in rows}
        assert len(asked[split]) == room.SIZES[split]
    assert not asked["train"] & asked["test"]
    assert len(load_problems(str(data), "train")) == 300


def test_the_embedded_task_draws_what_it_drew_before():
    assert problems(50, 3, "test") == problems(50, 3, "test", 2, 5) != problems(50, 3, "test", 3, 6)


def run_of(algo, seed, *accuracies):
    rows = [{"phase": "eval", "step": i, "accuracy": a} for i, a in enumerate(accuracies)]
    return {"algo": algo, "seed": seed, "rows": pd.DataFrame(rows)}


def test_differences_are_taken_seed_by_seed():
    runs = [run_of("grpo", 0, 0.1, 0.2, 0.4), run_of("grpo", 1, 0.1, 0.4, 0.6)]
    runs += [run_of("tepo", 1, 0.1, 0.5, 0.5), run_of("tepo", 0, 0.1, 0.4, 0.5)]
    found = room.against_grpo(runs, lambda run: room.measures(run)["final"])
    assert found["grpo"] == (pytest.approx(0.5), None, None)
    difference, half, p = found["tepo"]
    # Residuals are +-0.05: s^2 is 0.01 with one degree of freedom, the error sqrt(2 * 0.01 / 2).
    assert difference == pytest.approx(0) and p == pytest.approx(1)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-4)
    mean = room.against_grpo(runs, lambda run: room.measures(run)["mean"])
    assert mean["tepo"][0] == pytest.approx(0.075)  # without the start
    lines = room.say(runs)
    assert lines[3].startswith("| TEPO | +0.000 ± 1.271 | 1 | +0.075 ± ")
    assert lines[-1] == "step 2, less GRPO's 0.500: TEPO +0.000"


def test_the_command_in_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "SIZES", {"train": 40, "test": 10})
    monkeypatch.setattr(room, "FLAGS", ["--max-new-tokens", "16", "--steps", "1", "--k", "0"])
    out, runs = tmp_path / "room.png", tmp_path / "runs"
    asked = ["--algos", "grpo,tepo", "--seeds", "0", "--jobs", "1"]
    assert room.main([*asked, "--runs", str(runs), "--out", str(out)]) == 0
    assert "| TEPO | " in capsys.readouterr().out
    assert room.main(["--by-steps", str(runs / "grpo-s0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(int(line.split()[-1]) for line in lines) == 10
    out.unlink()
    assert room.main(["--redraw", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_said_in_a_line(tmp_path, capsys):
    assert room.main(["--redraw", "--out", str(tmp_path / "room.png")]) == 2
    assert "run it without --redraw first" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "empty", "run"])  # the last has no problems beside it
def test_by_steps_of_what_is_no_run_of_room_is_refused_in_a_line(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert room.main(["--by-steps", str(tmp_path / name)]) == 2
    told = f"error: --by-steps {tmp_path / name}: not a run of this script, such as "
    assert capsys.readouterr().err == f"{told}runs/room/grpo-s0\n"
