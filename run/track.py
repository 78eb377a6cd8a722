"""Show the metrics in a tracker too: --track tensorboard, trackio or wandb (docs/watching.md).

metrics.jsonl stays the truth. The tracker gets its numbers, those of evaluations with the prefix
eval/, the options, and the completions of held_out.jsonl. track.json in the run's folder holds the
run's name there and the last step of each phase that was handed over; only a line of a later step
is handed over. So a resumed run, which repeats the steps after its checkpoint with the same
numbers, shows no step twice. What the tracker lacks of metrics.jsonl is handed over at the start.
"""

import json
import math
import os
import secrets
import shlex
import shutil
from dataclasses import asdict

from tqdm import tqdm

from run import checkpoint
from run.commandline import python
from run.runs import read_log

PROJECT = "grpo"  # the runs of this folder, in trackio and (unless WANDB_PROJECT is set) in wandb


class Tracker:
    """Hands lines of metrics.jsonl to a tracker; as a context manager it closes the tracker.

    A tracker that fails is switched off, with one printed line: training goes on.
    """

    def __init__(self, o, out):
        """out: the run's folder. Raises ValueError, in one line, if the tracker does not start."""
        self.tool = o.track
        if self.tool == "none":
            return
        self.path = out / "track.json"
        self.records = json.loads(self.path.read_text()) if self.path.exists() else {}
        name = f"{out.resolve().name}-{secrets.token_hex(3)}"  # of this run alone
        self.record = self.records.setdefault(self.tool, {"name": name, "train": -1, "eval": -1})
        try:
            self.send, self.close = START[self.tool](o, out, self.record["name"])
        except Exception as error:  # of any type: not logged in, no server, an old version
            raise ValueError(f"--track {self.tool} does not start: {error}") from None
        if self.tool == "tensorboard":
            found = shutil.which("tensorboard")
            program = "tensorboard" if found else f"{python()} -m tensorboard.main"
            print(f"open it with: {program} --logdir {shlex.quote(str(out))}")
        shown = {}  # {step of an evaluation: its completions}
        for row in lines(out / "held_out.jsonl"):
            shown.setdefault(row["step"], []).append(row)
        for line in lines(out / "metrics.jsonl"):
            is_evaluation = line["phase"] == "eval"
            self.log(line, shown.get(line["step"], ()) if is_evaluation else ())

    def log(self, line, greedy=()):
        """Hand over a line of metrics.jsonl, unless its step has been handed over before.

        greedy: the lines of held_out.jsonl that belong to an evaluation.
        """
        if self.tool == "none" or line["step"] <= self.record[line["phase"]]:
            return
        self.record[line["phase"]] = line["step"]
        try:
            # First: if the process is killed here, a step is missing, but none comes twice.
            checkpoint.write_json(self.path, self.records)
            self.send(numbers(line), line["step"], table(greedy))
        except Exception as error:
            self.give_up(error)

    def give_up(self, error):
        why = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"warning: --track {self.tool} failed and is off now ({why}); training goes on")
        self.tool = "none"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tool == "none":
            return
        try:
            self.close()
        except Exception as error:
            self.give_up(error)


def numbers(line):
    """{name: number} of a line of metrics.jsonl; what has no value (None, NaN) is left out."""
    prefix = "eval/" if line["phase"] == "eval" else ""
    values = {key: value for key, value in line.items() if key not in ("phase", "step", "ci95")}
    if "ci95" in line:
        values["ci95_low"], values["ci95_high"] = line["ci95"]
    found = {}
    for key, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            found[prefix + key] = value
    return found


def lines(path):
    """The objects of a .jsonl file; none if there is no such file."""
    return [line for _, line in read_log(path)] if path.exists() else []


def table(greedy):
    """A row of texts, COLUMNS, for each of these lines of held_out.jsonl."""
    rows = []
    for line in greedy:
        row = line["prompt"], "right" if line["right"] else "wrong", line["completion"]
        # What cannot be encoded, a lone surrogate, would end the tracker.
        rows.append([text.encode(errors="replace").decode() for text in row])
    return rows


# How to start each tracker: (the run's options, its folder, its name) -> (send, close).
# send(values, step, rows) hands over {name: number} and the rows of `table`.

COLUMNS = ["problem", "grade", "completion"]
HELD_OUT = "eval/held_out"


def start_tensorboard(o, out, name):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))

    def write_text(name, text, step):
        """As a block of code: TensorBoard reads a text as Markdown."""
        writer.add_text(name, "".join(f"    {line}\n" for line in text.split("\n")), step)

    def send(values, step, rows):
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        for i, row in enumerate(rows):
            write_text(f"{HELD_OUT}/{i}", "\n\n".join(row), step)
        writer.flush()  # by itself it writes every two minutes

    write_text("options", json.dumps(asdict(o), indent=1), 0)
    return send, writer.close


def send_with_table(log, Table):
    """The `send` of a tracker that has tables, such as wandb.Table."""

    def send(values, step, rows):
        more = {HELD_OUT: Table(columns=COLUMNS, data=rows)} if rows else {}
        log({**values, **more}, step=step)

    return send


def start_trackio(o, out, name):
    import trackio

    trackio.init(project=PROJECT, name=name, config=asdict(o), resume="allow")
    return send_with_table(trackio.log, trackio.Table), trackio.finish


def start_wandb(o, out, name):
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=name,
        name=out.resolve().name,
        dir=str(out),
        config=asdict(o),
        allow_val_change=True,  # --steps may be raised when a run is resumed
        resume="allow",
        settings=wandb.Settings(console="off", save_code=False),
    )
    return send_with_table(run.log, wandb.Table), run.finish


START = {"tensorboard": start_tensorboard, "trackio": start_trackio, "wandb": start_wandb}
