"""What each trick of trainer/ saves: CPU seconds of a training step without it, over those with it.

  python tools/tricks.py                                  the embedded model, the preset's defaults
  python tools/tricks.py --model FOLDER --data FOLDER     2 x 8 completions of at most 96 tokens

Each round runs the same step once as train.py does and once without each trick, from the same
weights and random numbers. The table has the median ratio of the rounds, and the smallest and the
largest. Below 1.05 in each setting, a trick is not worth its lines.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from run.commandline import Parser, output_file

MORE_OPTIONS = "--prompts 2 --max-new-tokens 96 --updates 1"  # of a step of --model FOLDER
WARM_UP = 20  # steps before, of the embedded model: it first learns to write more


def parse_args(argv):
    parser = Parser(
        "tricks.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, or a folder (default tiny)")
    add("--data", default="gsm8k", help="with --model FOLDER: as --data of train.py")
    add("--algo", default="grpo", help="the method (default grpo)")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the compute (default fp32)")
    add("--updates", help="updates per rollout (default 4; 1 with --model FOLDER)")
    add("--rounds", type=int, default=5, help="rounds (default 5)")
    add("--csv", type=output_file, help="add the rows to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help and a wrong option do not wait for torch to be imported
    parse_args(sys.argv[1:])

import contextlib
import copy
import functools
from dataclasses import replace

import torch

from run import start
from run.checks import fill
from run.parser import parse
from tools.bench import worth
from train import Trainer
from trainer import memory, sampling
from trainer.update import Updater


def build(args):
    """A Trainer that has made its first steps."""
    line = f"--preset tiny --algo {args.algo} --dtype {args.dtype}".split()
    if args.model != "tiny":
        line = ["--preset", "gsm8k", *line[2:], *MORE_OPTIONS.split()]
        line += ["--model", args.model, "--data", args.data]
    line += ["--updates", args.updates] if args.updates else []
    o = fill(parse(line))
    model, tokenizer, generation, problems, _ = start.set_up(o)
    trainer = Trainer(o, model, tokenizer, generation, problems)
    if args.model != "tiny":
        trainer.grader.reward = by_length
    for step in range(1, 1 + (WARM_UP if args.model == "tiny" else 1)):
        trainer.step(step)
    return trainer


def by_length(text, problem, length, truncated):
    return worth(text), worth(text), {}


def without(trainer):
    """{trick: [(object, name, what stands there without the trick), ...]}."""
    u, layout = trainer.updater, trainer.generation["layout"]

    def sampled(**changes):
        generation = {**trainer.generation, "layout": replace(layout, **changes)}
        return trainer, "generation", generation

    def all_rows(rollout):
        return torch.ones(len(rollout.prompts), dtype=torch.bool)

    def run(*args, keep_graph=False):
        Updater.run(u, *args)

    whole = functools.partial(sampling.generate, segment=trainer.o.max_new_tokens)
    tricks = {
        "a prompt runs once, in sampling": [sampled(share_prompts=False)],
        "a prompt runs once, in the update": [(u, "share_prompts", False)],
        "rows without a signal are left out": [(u, "has_signal", all_rows)],
        "the only micro-batch keeps its graph": [(u, "run", run)],
        "the first update measures": [(u, "learns_at_once", lambda *_: False)],
        "ended rows leave": [(sampling, "generate", whole)],
        "a cache with room": [(sampling, "with_room", lambda cache: cache)],
        "the draw by blocks": [(sampling, "first_above", first_above)],
    }
    if layout.packed:
        tricks["packed weights"] = [sampled(packed=False)]
        tricks["freed memory goes back"] = [(memory, "TRIM_FROM", math.inf)]
    if u.in_place:
        tricks["gradients in place"] = [(u, "in_place", False)]
    return tricks


def first_above(u, blocks, sums):
    """sampling.first_above, by the cumulative sum of all tokens."""
    ends = blocks.flatten(1).double().cumsum(1)
    return torch.searchsorted(ends, u * ends[:, -1:], right=True)


@contextlib.contextmanager
def patched(changes):
    before = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    try:
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


class Repeated:
    """The same step again and again: each time from the same state."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.weights = copy.deepcopy(trainer.model.state_dict())
        self.moments = copy.deepcopy(trainer.updater.optimizer.state_dict())
        self.counters = trainer.cursor, trainer.history

    def seconds(self, changes=()):
        """CPU seconds of the step, all threads together."""
        trainer = self.trainer
        trainer.model.load_state_dict(self.weights)
        trainer.updater.optimizer.load_state_dict(copy.deepcopy(self.moments))
        trainer.cursor, trainer.history = self.counters
        torch.manual_seed(0)
        with patched(changes):
            started = time.process_time()
            trainer.step(len(self.counters[1]) + 1)
            return time.process_time() - started


def measure(trainer, rounds):
    """{trick: [its ratio in each round]}."""
    step, tricks = Repeated(trainer), without(trainer)
    ratios = {name: [] for name in tricks}
    step.seconds()  # the first is slower
    for _ in range(rounds):
        for name, changes in tricks.items():
            own = step.seconds()  # beside each: the machine's speed drifts
            ratios[name].append(step.seconds(changes) / own)
    return ratios


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        trainer = build(args)
    except (ValueError, OSError) as error:
        print(f"tricks.py: error: {error}", file=sys.stderr)
        return 2
    model = Path(args.model).name
    about = {"model": model, "algo": args.algo, "dtype": args.dtype, "updates": trainer.o.updates}
    rows = []
    for name, ratios in measure(trainer, args.rounds).items():
        found = [f"{f(ratios):.3f}" for f in (statistics.median, min, max)]
        ratio, least, most = found
        rows.append({**about, "trick": name, "ratio": ratio, "least": least, "most": most})
        print(f"{name:38} {found[0]}  ({found[1]} to {found[2]})")
    if args.csv:
        import pandas as pd

        is_new = not args.csv.exists()
        pd.DataFrame(rows).to_csv(args.csv, mode="a", header=is_new, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
