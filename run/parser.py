"""The command line of train.py. Nothing here imports torch."""

import argparse
import json
import sys
from pathlib import Path

from run.checks import check_values
from run.commandline import RaisingParser, quit_on_interrupt
from run.names import method
from run.options import FIELDS, GSM8K, Options, flag

HELP_GROUPS = {  # the first option of each group
    "algo": "what is trained",
    "prompt": "prompt",
    "prompts": "rollout",
    "updates": "update",
    "device": "machine",
    "eval_every": "evaluation and output",
}
EPILOG = """examples:
  python train.py --algo tepo
      on a GPU: Qwen2.5-0.5B on GSM8K; else the embedded tiny model, in minutes
  python train.py --algo gspo --preset tiny --updates 16 --option eps_high=0.01
      with an option of the algorithm; an unknown NAME prints the list of its options
  python train.py --algo my_method.py --reward examples/format_reward.py
      with a method and a reward of your own (docs/own.md)
  python train.py --model Qwen/Qwen3-0.6B --template-option enable_thinking=false --show-prompt
      print the first prompt, and the tokens that end a completion
  python train.py --preset gsm8k --lora 16 --gradient-checkpointing --keep-best
      for a card of 8 GiB: LoRA, layers computed twice; the best evaluation's model in best/
  python train.py --preset gsm8k --lora 16 --gradient-checkpointing --fit
      the memory of a step, part by part, and what fits on cards of 8 to 24 GiB
  python train.py --model ./my-model --data problems.jsonl --max-new-tokens 256
      your own model folder and problems, one {"question": ..., "answer": ...} per line
"""


def build_parser():
    parser = RaisingParser(
        prog="train.py",
        description="Train a language model by a method of the GRPO family, with or without a GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    group = parser
    for name in FIELDS:
        if name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[name])
        add_option(group, name)
        if name == "max_grad_norm":
            text = "short for --option beta=...: weight of the KL to the start policy (grpo, ha_dw)"
            group.add_argument("--beta", type=float, metavar="FLOAT", help=text)
    text = "continue the run in this folder; no other option is needed"
    group.add_argument("--resume", metavar="RUN", help=text)
    return parser


def add_option(group, name):
    """Add a field of Options to a parser or to a group of --help."""
    about = FIELDS[name]
    kind, text, choices = about.type, about.metadata["text"], about.metadata["choices"]
    if kind is bool:
        group.add_argument(flag(name), action="store_true", help=text)
        return
    if kind is dict:
        kind = template_option if name == "template_option" else option
        look = {"action": "append", "metavar": "NAME=VALUE"}
        group.add_argument(flag(name), type=kind, help=text, **look)
        return
    tiny, gsm8k = about.default, GSM8K.get(name, about.default)
    if tiny != gsm8k and name != "prompt":
        text += f" (preset tiny: {tiny}, gsm8k: {gsm8k})"
    elif tiny == gsm8k and tiny is not None:
        text += f" (default {tiny})"
    kind = kind if kind in (int, float) else str
    look = {"metavar": kind.__name__.upper(), "choices": choices, "help": text}
    if choices:
        kind = str.lower
    group.add_argument(flag(name), type=READ.get(name, kind), **look)


def option(text):
    """(name, text of the value) of "name=value"."""
    return text.partition("=")[::2]


def template_option(text):
    """(name, value) of "name=value". The value is read as JSON if it is JSON, else as text.

    True, False and None are read as JSON's true, false and null, because a template would treat
    all three texts as true. Raises ArgumentTypeError for a text that is not name=value.
    """
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE, e.g. enable_thinking=false")
    value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
    try:
        return name, json.loads(value, parse_constant=str)
    except (ValueError, RecursionError):
        return name, value


def lasting_path(text):
    """A path as config.json keeps it: no current folder changes it."""
    return str(Path(text).expanduser().absolute())


# How a text is read, where it is neither a plain text nor one of the choices.
READ = {"algo": method, "reward": lasting_path, "device": str.lower}


def parse(argv):
    """{name: value} of the options in a command line. Raises ValueError for a wrong one."""
    given = vars(build_parser().parse_args(argv))
    if "beta" in given:
        given.setdefault("option", []).append(("beta", given.pop("beta")))
    for name in {"option", "template_option"} & given.keys():
        given[name] = dict(given[name])
    return given


def check_command_line():
    """Before torch is imported: print the help or the error of train.py's command line.

    Raises SystemExit for both. Values that depend on the preset or the machine are checked later.
    Until `main` begins there is nothing to tidy up: Ctrl-C ends the process, without a traceback.
    """
    quit_on_interrupt()
    try:
        given = parse(sys.argv[1:])
        if "resume" not in given:  # else the run's own options come first
            check_values(Options(**given))
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("loading torch and transformers", flush=True)
