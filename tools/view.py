"""A page of one run or of two: `python tools/view.py RUN [RUN]`, to be opened in a browser.

The page has a summary of each run, the curves of metrics.jsonl, the groups of samples.jsonl with
their tokens shaded, and the problems that were met at several steps. It is one file and loads
nothing else: the markup, the style and the script are tools/view.html, and the data stand in it as
JSON. Completions are hostile text. As JSON without `<` they cannot end their element, and the
script makes text of them, never markup.

torch is imported where it is used: --help and a wrong command line are answered without it.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from run.commandline import Parser, output_file, quit_on_interrupt, replacing, run_main

if __name__ == "__main__":
    quit_on_interrupt()

import numpy as np

from run.curves import PANELS
from run.names import algorithm_names
from run.options import DEFAULTS, flag
from run.runs import ORDER, finite, read_config, read_folder
from run.samples import read_groups
from run.style import NOTES, style
from tools.credit import is_complete, push, tensors
from trainer.methods import ALGORITHMS, is_file, label

TEMPLATE = Path(__file__).with_name("view.html")
BUDGET = 4_500_000  # bytes of completions, so that a page has at most 5 MB
MOST_POINTS = 1000  # of a curve
WAIT = 10  # seconds; --watch looks this often for new lines
# Options that the summary names elsewhere, or that say nothing about the experiment.
UNSAID = ("algo", "model", "data", "preset", "out", "overwrite", "track", "device", "dtype")


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
    if own in ORDER or own in algos:
        about = NOTES.get(own, "")
        if values.pop("beta", 0):
            about += "; without its KL term, for which the reference policy is not recorded"
        words = ", ".join(["this run", *(f"{name} = {value}" for name, value in values.items())])
        methods.append((own, f"{style(label(own))[0]} ({words})", about, values))
    elif is_file(own):
        note = f"The run's own method is a file, {own}: view.py runs it only if --algos names it."
    else:
        note = f"This version has no method {own}, the run's own: its push is not shown."
    for algo in sorted(algos, key=[*ORDER, *algos].index):
        if algo != own or values:
            methods.append((algo, style(label(algo))[0], NOTES.get(algo, ""), {}))
    return methods, note


def entry(rows, methods):
    """One group for the page: what its completions share, then each completion."""
    first = rows[0]
    shared = {"step": first["step"], "prompt": first["prompt"]}
    shared.update(answer=str(first.get("answer", "")), skipped=bool(first.get("skipped")))
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


def thinned(what, entries, budget, notes):
    """The entries of as many steps as have room in `budget` bytes, evenly spaced; at least one.

    The first and the last step are among them, unless only one has room. Adds to the page's notes.
    """
    sizes, kept = Counter(), []
    for found in entries:
        sizes[found["step"]] += len(json_text(found))
    for count in range(len(sizes), 0, -1):
        places = np.linspace(len(sizes) - 1, 0, count).round().astype(int)
        kept = np.array(sorted(sizes))[places]
        if sum(sizes[step] for step in kept) <= budget:
            break
    if len(kept) < len(sizes):
        text = f"Thinned out to keep the page below 5 MB: {what} of {len(kept)} of the "
        notes.append(f"{text}{len(sizes)} recorded steps, evenly spaced.")
    return [found for found in entries if found["step"] in kept]


def curves(rows):
    """{phase: {"step": steps, metric: values}} of the training steps and of the evaluations."""
    found = {}
    for phase in ("train", "eval"):
        lines = rows[rows["phase"] == phase]
        lines = lines.iloc[:: 1 + len(lines) // MOST_POINTS]
        found[phase] = {"step": lines["step"].tolist()}
        for name in lines.drop(columns=["phase", "step"]).dropna(axis=1, how="all"):
            found[phase][name] = [short(value) for value in lines[name]]
    return found


def summary(config, rows):
    """{what: text} of a run, for a report. config: of config.json."""
    o = config["options"]
    preset = o.get("preset", "tiny")
    words = [f"--preset {preset}"]
    for name, default in DEFAULTS.get(preset, {}).items():
        if name not in UNSAID and o.get(name, default) != default:
            words += option_words(name, o[name])
    found = {"method": style(label(o["algo"]))[0], "model": o.get("model"), "data": o.get("data")}
    found["options"] = " ".join(words)
    train, held_out = (rows[rows["phase"] == phase] for phase in ("train", "eval"))
    known = held_out.dropna(subset="accuracy").to_dict("records")
    for when, line in zip(("at the start", "at the end"), known[:1] + known[-1:], strict=False):
        text = f"{line['accuracy']:.3f} at step {line['step']} (95%: {line['ci_lo']:.3f} to "
        text += f"{line['ci_hi']:.3f}; greedy, {line['n']:.0f} held-out problems)"
        found[f"accuracy {when}"] = text
    minutes, status = train["seconds"].sum() / 60, config.get("status", "unknown")
    of = f"{train['step'].max()} of {o.get('steps')}" if len(train) else f"0 of {o.get('steps')}"
    found["time"] = f"{minutes:.1f} minutes of sampling and updates; {of} steps, {status}"
    versions = [" ".join(pair) for pair in config.get("versions", {}).items()]
    found["versions"] = ", ".join(versions)
    machine = config.get("machine"), o.get("device"), o.get("dtype")
    found["machine"] = ", ".join(filter(None, machine))
    return {what: str(text) for what, text in found.items() if text}


def option_words(name, value):
    """The words of a command line that give an option its value."""
    if isinstance(value, dict):
        return [f"{flag(name)} {key}={json.dumps(one)}" for key, one in value.items()]
    is_plain = re.fullmatch(r"[\w./,:-]+", str(value))
    return [flag(name), *([] if value is True else [str(value) if is_plain else json.dumps(value)])]


def run_data(run, algos, budget):
    """What the page shows of a run's folder, in about `budget` bytes. Raises ValueError."""
    metrics = read_folder(run)
    config, path = read_config(run), run / "samples.jsonl"
    groups = read_groups(path) if path.is_file() else []
    if not groups:
        why = "no completions in it: was it trained with --samples-every 0?"
        raise ValueError(f"{path}: {why}" if path.is_file() else f"{path}: no such file")
    path = run / "held_out.jsonl"
    held_out = read_groups(path, held_out=True) if path.is_file() else []
    methods, note = chosen_methods(config["options"], algos)
    entries = [entry(rows, methods) for rows in groups]
    greedy = [entry(rows, []) for rows in held_out]
    data = {"name": run.resolve().name, "summary": summary(config, metrics["rows"])}
    data["methods"] = [{"name": name, "note": about} for _, name, about, _ in methods]
    data["curves"] = curves(metrics["rows"])
    data["notes"] = [note] if note else []
    data["held_out"] = thinned("greedy", greedy, budget // 5, data["notes"])
    budget -= len(json_text(data["held_out"]))
    data["groups"] = thinned("groups", entries, budget, data["notes"])
    return data


def page_data(folders, algos, reload=None):
    """What the page shows, as one JSON object. Raises ValueError.

    reload: after so many seconds the page loads itself again.
    """
    runs = [run_data(folder, algos, BUDGET // len(folders)) for folder in folders]
    if len({run["name"] for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run["name"] = str(folder)
    titles = {name: f"{title} [{unit}]" for name, (title, unit) in PANELS.items()}
    return {"runs": runs, "titles": titles, "reload": reload}


# Writing


def json_text(value):
    """JSON in ASCII without < and >: nothing in it ends a <script> element or begins markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def write_page(data, out):
    """Write the page whole or not at all. Raises OSError, with the path."""
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", json_text(data))
    with replacing(out) as part:
        part.write_text(page, encoding="utf-8")


# Command line

EPILOG = """examples:
  python tools/view.py runs/tepo-tiny-s0
      writes runs/tepo-tiny-s0/samples.html
  python tools/view.py runs/tepo-tiny-s0 runs/gspo-tiny-s0
      two runs side by side
  python tools/view.py --watch runs/tepo-tiny-s0
      writes the page again while the run goes on; the page reloads itself
  python tools/view.py runs/tepo-tiny-s0 --algos grpo,cispo --out page.html
      the push of each token under the run's own method, GRPO and CISPO

The page lists its keys. Its address keeps the step and what else is chosen.
"""


def build_parser():
    parser = Parser(
        prog="view.py",
        description="Write a page of a run of train.py, or of two, to be opened in a browser: a "
        "summary, curves, completions with each token shaded by how hard a method pushes it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run of train.py; at most 2")
    text = "the page to write; default: samples.html in RUN; of two, beside-NAME.html in the first"
    add("--out", metavar="FILE", type=output_file, help=text)
    text = "compute the push under these methods, or all, besides the run's own; default: the seven"
    add("--algos", metavar="A,B", help=text, type=algorithm_names, default=list(ALGORITHMS))
    text = "write the page again until the runs are done, or until Ctrl-C"
    add("--watch", action="store_true", help=text)
    return parser


def watch(folders, algos, out):
    """Write the page whenever the runs have new lines, until all of them are done or Ctrl-C."""
    files, seen = [folder / "metrics.jsonl" for folder in folders], None
    try:
        while any(read_config(folder).get("status") == "running" for folder in folders):
            now = [path.stat().st_mtime for path in files if path.exists()]
            if now != seen:
                seen = now
                try:
                    write_page(page_data(folders, algos, reload=WAIT), out)
                    print(f"{out}: written", flush=True)
                except ValueError as error:  # no completions so far
                    print(f"{error}; waiting for more", flush=True)
            time.sleep(WAIT)
    except KeyboardInterrupt:
        print()


def main(argv=None):
    """Run the command line. Raises SystemExit with status 2 on an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        parser.error("at most two runs stand side by side; plot.py draws the curves of more")
    first, *others = args.runs
    name = f"beside-{others[0].resolve().name}.html" if others else "samples.html"
    out = args.out or first / name
    try:
        for run in args.runs:
            if not run.is_dir():
                raise ValueError(f"{run}: no such run")
            read_folder(run)  # raises ValueError if it is none
        if args.watch:
            watch(args.runs, args.algos, out)
        data = page_data(args.runs, args.algos)
        write_page(data, out)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for note in [note for run in data["runs"] for note in run["notes"]]:
        print(note)
    steps = len({found["step"] for run in data["runs"] for found in run["groups"]})
    size = out.stat().st_size / 1e6
    print(f"{out}: groups of {steps} steps, {size:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
