"""A page of a run: `python tools/view.py RUN` writes RUN/samples.html, to be opened in a browser.

The page has the curves of metrics.jsonl, the groups of samples.jsonl with their tokens shaded, and
the problems that were met at several steps. It is one file and loads nothing else: the markup, the
style and the script are tools/view.html, and the data stand in it as JSON. Completions are
hostile text. As JSON without `<` they cannot end their element, and the script makes text of them,
never markup.

torch is imported where it is used: --help and a wrong command line are answered without it.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from run.commandline import Parser, output_file, quit_on_interrupt, run_main, writing

if __name__ == "__main__":
    quit_on_interrupt()

import numpy as np

from run.names import algorithm_names
from run.runs import ORDER, finite, read_folder
from run.samples import read_groups
from run.style import NOTES, style
from tools.credit import is_complete, push, tensors
from trainer.methods import ALGORITHMS, is_file, label

TEMPLATE = Path(__file__).with_name("view.html")
BUDGET = 4_500_000  # bytes of completions, so that a page has at most 5 MB
MOST_POINTS = 2000  # of a curve
ABOUT = ("model", "data", "seed", "steps", "group_size", "temperature", "updates")


# Numbers


def short(value):
    """A number with four significant digits; None for what is no finite number."""
    value = finite(value)
    return None if value is None else float(f"{value:.4g}")


def column(values):
    """The numbers of a completion's tokens, short; one number where all are equal."""
    values = [short(value) for value in values]
    return values[0] if values and len(set(values)) == 1 else values


def power(log_value):
    """e ** log_value, or None for None. It does not overflow."""
    return None if log_value is None else math.exp(min(log_value, 700))


# What the page gets


def chosen_methods(o, algos):
    """([(algo, name, note, values of its options)], a note for the page or "").

    The method of the run is first, with the run's options; the others have their defaults. A method
    in a file of the user runs only if `algos` names it: a run may come from somebody else.
    """
    own, values, methods, note = o["algo"], dict(o.get("option", {})), [], ""
    known = own in ORDER or own in algos
    if known:
        about = NOTES.get(own, "")
        if values.pop("beta", 0):
            about += "; without its KL term, for which the reference policy is not recorded"
        words = [f"{name} = {value}" for name, value in values.items()]
        name = ", ".join(["this run", *words])
        methods.append((own, f"{style(label(own))[0]} ({name})", about, values))
    elif is_file(own):
        note = f"The run's own method is a file, {own}: view.py runs it only if --algos names it."
    else:
        note = f"This version has no method {own}, the run's own: its push is not shown."
    for algo in sorted(algos, key=[*ORDER, *algos].index):
        if algo != own or values:
            name = style(label(algo))[0]
            methods.append((algo, name, NOTES.get(algo, ""), {}))
    return methods, note


def entry(rows, methods):
    """One group for the page: what its completions share, then each completion."""
    first = rows[0]
    shared = {"step": first["step"], "prompt": first["prompt"]}
    shared["answer"] = str(first.get("answer", ""))
    shared["skipped"] = bool(first.get("skipped"))
    shared["completions"] = [completion(row) for row in rows]
    if methods and len(rows) > 1 and all(is_complete(row) for row in rows):
        add_pushes(shared["completions"], tensors(rows), methods)
    return shared


def completion(row):
    """The text of a completion and the numbers of its tokens, before the pushes."""
    found = {"text": row["completion"], "right": row["right"], "tokens": row["tokens"]}
    found["logprob"] = column(row["logprobs"])
    found["probability"] = column(map(power, row["logprobs"]))
    found["entropy"] = column(row["entropy"])
    if "old_logprobs" in row:
        found["reward"] = short(row["reward"])
        found["advantage"] = column(row["advantages"])
        pairs = zip(row["logprobs"], row["old_logprobs"], strict=True)
        log_ratios = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        found["ratio"] = column(map(power, log_ratios))
    return found


def add_pushes(completions, group, methods):
    """How each method pushes each token, and which tokens it clips (their indices)."""
    for found in completions:
        found.update(push=[], clipped=[])
    for algo, _, _, values in methods:
        pushes, clipped = push(algo, group, values)  # [G, T]
        for i, found in enumerate(completions):
            length = len(found["tokens"])
            found["push"].append(column(pushes[i, :length].tolist()))
            found["clipped"].append(clipped[i, :length].nonzero()[:, 0].tolist())


def thinned(entries, budget):
    """The entries of as many steps as have room in `budget` bytes, evenly spaced; at least one.

    The first and the last step are among them, unless only one has room.
    """
    sizes = {}
    for found in entries:
        step = found["step"]
        sizes[step] = sizes.get(step, 0) + len(json_text(found))
    steps, kept = sorted(sizes), set()
    for count in range(len(steps), 0, -1):
        places = np.linspace(len(steps) - 1, 0, count)
        kept = {steps[round(place)] for place in places}
        if sum(sizes[step] for step in kept) <= budget:
            break
    return [found for found in entries if found["step"] in kept]


def curves(rows):
    """{phase: {column: values}} of the training steps and of the evaluations."""
    found = {}
    names = ("step", "accuracy", "ci_lo", "ci_hi", "entropy", "length", "n")
    for phase in ("train", "eval"):
        lines = rows[rows["phase"] == phase]
        lines = lines.iloc[:: 1 + len(lines) // MOST_POINTS]
        found[phase] = {name: [short(value) for value in lines[name]] for name in names}
        found[phase]["step"] = lines["step"].tolist()
    return found


def page_data(run, algos):
    """What the page shows of the run's folder, as one JSON object. Raises ValueError."""
    metrics = read_folder(run)
    o = json.loads((run / "config.json").read_text(encoding="utf-8"))["options"]
    path = run / "samples.jsonl"
    groups = read_groups(path) if path.is_file() else []
    if not groups:
        why = "no completions in it: was it trained with --samples-every 0?"
        raise ValueError(f"{path}: {why}" if path.is_file() else f"{path}: no such file")
    path = run / "held_out.jsonl"
    held_out = read_groups(path, held_out=True) if path.is_file() else []
    methods, note = chosen_methods(o, algos)
    entries = [entry(rows, methods) for rows in groups]
    greedy = [entry(rows, []) for rows in held_out]
    data = {"name": run.resolve().name, "algo": style(metrics["algo"])[0]}
    data["about"] = {name: str(o[name]) for name in ABOUT if name in o}
    data["methods"] = [{"name": name, "note": about} for _, name, about, _ in methods]
    data["curves"] = curves(metrics["rows"])
    data["held_out"] = thinned(greedy, BUDGET // 5)
    data["groups"] = thinned(entries, BUDGET - len(json_text(data["held_out"])))
    data["notes"] = [note] if note else []
    for what, kept, of in (("groups", "groups", entries), ("greedy", "held_out", greedy)):
        steps, all_steps = ({found["step"] for found in part} for part in (data[kept], of))
        if len(steps) < len(all_steps):
            data["notes"].append(
                f"Thinned out to keep the page below 5 MB: {what} of {len(steps)} of the "
                f"{len(all_steps)} recorded steps, evenly spaced."
            )
    return data


# Writing


def json_text(value):
    """JSON in ASCII without < and >: nothing in it ends a <script> element or begins markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def write_page(data, out):
    """Write the page under a temporary name, then rename it. Raises OSError, with the path."""
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", json_text(data))
    part = out.with_name(f".{out.name}.part")
    try:
        with writing(out):
            part.write_text(page, encoding="utf-8")
            os.replace(part, out)
    finally:
        if part.is_file():
            part.unlink()


# Command line

EPILOG = """examples:
  python tools/view.py runs/tepo-tiny-s0
      writes runs/tepo-tiny-s0/samples.html; works while the run goes on, too
  python tools/view.py runs/tepo-tiny-s0 --algos grpo,cispo --out page.html
      the push of each token under the run's own method, GRPO and CISPO

on the page:
  left, right  another step        j, k  the next and the previous completion
  /            search              h, l  the previous and the next token
  1 to 5       push, advantage, entropy, probability, ratio
  ?            all keys
"""


def build_parser():
    parser = Parser(
        prog="view.py",
        description="Write a page of a run of train.py, to be opened in a browser: its curves, its "
        "completions with each token shaded by how hard a method pushes it, search.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run of train.py")
    text = "the page to write; default: samples.html in RUN"
    parser.add_argument("--out", metavar="FILE", type=output_file, help=text)
    text = "compute the push under these methods, or all, besides the run's own; default: the seven"
    kind = {"type": algorithm_names, "default": list(ALGORITHMS)}
    parser.add_argument("--algos", metavar="A,B", help=text, **kind)
    return parser


def main(argv=None):
    """Run the command line. Raises SystemExit with status 2 on an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    out = args.out or args.run / "samples.html"
    try:
        if not args.run.is_dir():
            raise ValueError(f"{args.run}: no such run")
        data = page_data(args.run, args.algos)
        write_page(data, out)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for note in data["notes"]:
        print(note)
    steps = len({found["step"] for found in data["groups"]})
    size = out.stat().st_size / 1e6
    print(f"{out}: groups of {steps} steps, {size:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
