"""Every option of train.py: its default in each preset, its meaning, and its allowed values.

torch is imported only in the functions that need it, so --help and errors in the command line do
not wait for it.
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from trainer.methods import ALGORITHMS, MORE, is_file, label

ROOT = Path(__file__).resolve().parents[1]
TRACKERS = ("tensorboard", "trackio", "wandb")
MOST = 10**9  # a larger whole number is a typing error
MOST_ROWS = 65_536  # completions of one step: all of them are held in memory


def setting(default, text, least=0, most=MOST):
    """A field of Options that defines the experiment: runs that differ in it are not averaged.

    text: for --help. least, most: bounds of a whole number; of another number, least alone.
    """
    about = {"text": text, "least": least, "most": most, "experiment": True}
    return field(default=default, metadata=about)


def detail(default, text, least=0, most=MOST):
    """A field of Options in which two runs of one experiment may differ."""
    about = {"text": text, "least": least, "most": most, "experiment": False}
    return field(default=default, metadata=about)


@dataclass
class Options:
    """The options of a run, with the defaults of the preset tiny. --eval-n is eval_n here."""

    preset: str = detail(
        "auto",
        "set of defaults: tiny, gsm8k, or auto (gsm8k on a CUDA GPU, or with --eval-only on GSM8K)",
    )

    # What is trained
    algo: str = detail(
        "tepo",
        f"the method: {', '.join(ALGORITHMS)}; in more/: {', '.join(MORE)}; or your own FILE.py, "
        "with loss(logprobs, old_logprobs, advantages, mask, *, ...) and, unless GRPO's are meant, "
        "advantages(rewards, group_size, *, ...)",
    )
    model: str = setting(
        "tiny", "tiny (embedded), the folder of a model or of a run, or a Hub name"
    )
    data: str = setting(
        "tiny",
        "tiny (generated), gsm8k, a Hub name[:config], a folder with train.* and test.*, or one "
        "file (.jsonl, .json, .csv, .tsv or .parquet), of which a tenth (at most 500 problems, "
        "drawn by a fixed seed) is held out",
    )
    columns: str | None = setting(
        None,
        "QUESTION,ANSWER: the two columns of --data; default: question,answer or a known pair, "
        "such as problem,solution; a.b is the field b of column a",
    )
    skip_bad_rows: bool = setting(False, "drop rows of --data whose answer is not one number")
    steps: int = detail(100, "training steps; each is one rollout and its updates", least=1)
    seed: int = detail(0, "seed of the data order and of sampling", most=math.inf)

    # Prompt
    prompt: str = setting(
        "{question}",
        "text of the prompt; {question} is filled in (preset gsm8k adds an instruction)",
    )
    chat_template: str = setting("auto", "auto: the tokenizer's, if it has one; none: plain text")
    system: str | None = setting(None, "system turn of the chat template, before the question")
    template_option: dict = field(default_factory=dict, metadata={"experiment": True})

    # Rollout
    prompts: int = setting(16, "prompts per step", least=1, most=MOST_ROWS)
    group_size: int = setting(8, "completions per prompt (G)", least=2, most=MOST_ROWS)
    temperature: float = setting(
        1.0, "divides the logits, both in sampling and in training", least=1e-6
    )
    max_new_tokens: int = setting(
        64,
        "most tokens per completion; a truncated one has an answer only in a complete line",
        least=1,
        most=2**20,
    )
    dynamic_sampling: int = setting(
        0,
        "DAPO: rounds of replacing groups that are all right or all wrong; 0: never",
        most=1000,
    )
    overlong_cache: int = setting(
        0,
        "DAPO: over this many last tokens before --max-new-tokens the reward falls by up to 1; "
        "0: no penalty",
    )
    reward: str | None = setting(
        None,
        "FILE.py with reward(completion, problem), which returns a number, or a dict of numbers "
        "that are added up; default: 1 for a right answer, 0 for another",
    )
    sampler_correction: float = setting(
        0.0,
        "multiply a row's advantage by pi_old / sampler of its completion, at most this; 0: never",
    )

    # Update
    updates: int = setting(
        4,
        "mini-batches per rollout, one optimizer step each; with 1 no clip acts",
        least=1,
    )
    epochs: int = setting(1, "passes over each rollout", least=1, most=1000)
    lr: float = setting(1e-4, "AdamW's learning rate after the warm-up (no weight decay)")
    warmup: int = setting(5, "steps over which the learning rate rises linearly; 0: none")
    max_grad_norm: float = setting(1.0, "a gradient of larger norm is scaled down to this norm")
    option: dict = field(default_factory=dict, metadata={"experiment": True})

    # Machine
    device: str = detail("auto", "cpu, cuda, cuda:N, or auto (cuda if there is a GPU)")
    dtype: str = setting(
        "auto",
        "dtype of the compute: fp32, bf16, or auto (bf16 if a GPU has it); weights are always fp32",
    )
    threads: str = detail(
        "auto", "CPU threads; auto: OMP_NUM_THREADS, else 1 below 10 M weights, else torch's choice"
    )
    micro_batch: str = detail(
        "auto", "rows per pass of an update; the gradient stays the same; auto: what fits"
    )
    sample_batch: str = detail(
        "auto", "rows per generate call; auto: all of a step, fewer if GPU memory runs out"
    )
    cache: str = detail(
        "dynamic",
        "keys and values in sampling: dynamic, or static (fixed shape, which generate compiles on "
        "CUDA; rows that have ended stay in the batch)",
    )
    gradient_checkpointing: bool = detail(False, "use less memory; updates take longer")

    # Evaluation and output
    eval_every: int = detail(25, "steps between evaluations; 0: only before and after training")
    eval_n: int = detail(500, "how many held-out problems to evaluate on, at most", least=1)
    k: int = detail(
        4, "the k of avg@k and pass@k, before and after training; 0: neither", most=10_000
    )
    eval_samples: int = detail(0, "completions per problem for avg@k and pass@k; 0: k", most=10_000)
    samples_every: int = detail(
        10, "steps between groups in samples.jsonl, besides the first and last step; 0: none"
    )
    save_every: int = detail(20, "steps between checkpoints; 0: none to resume from")
    out: str | None = detail(None, "the run's folder (default runs/<algo>-<preset>-s<seed>)")
    overwrite: bool = detail(
        False, "delete the run that --out holds (with --eval-only: replace its eval.json)"
    )
    track: str = detail(
        "none",
        f"show the metrics there too, beside metrics.jsonl: {', '.join(TRACKERS)} (pip install it)",
    )
    eval_only: bool = detail(False, "evaluate the model and write eval.json; no training")
    show_prompt: bool = detail(False, "print the first prompt and what ends a completion, and exit")

    @property
    def rows(self):
        """Completions per step."""
        return self.prompts * self.group_size

    @property
    def draws(self):
        """Completions per problem from which avg@k and pass@k are estimated."""
        return self.eval_samples or self.k


GSM8K = {  # the preset gsm8k, where it differs
    "model": "Qwen/Qwen2.5-0.5B",
    "data": "gsm8k",
    "prompt": (
        "{question}\nReason step by step, then end with the answer alone on a line: #### number"
    ),
    "steps": 500,
    "prompts": 8,
    "max_new_tokens": 512,
    "lr": 1e-6,
    "warmup": 10,
    "eval_every": 50,
    "eval_n": 200,
    "save_every": 50,
}
PRESETS = {"tiny": {}, "gsm8k": GSM8K}
DEFAULTS = {preset: vars(Options(**changes)) for preset, changes in PRESETS.items()}
TYPES = {
    about.name: about.type if about.type in (int, float, bool) else str for about in fields(Options)
}
CHANGEABLE_ON_RESUME = ("steps", "save_every", "track", "show_prompt")
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
  python train.py --algo my_method.py --option power=0.25
      a method of your own: docs/own.md, "Add a method in ten minutes"
  python train.py --reward examples/format_reward.py
      a reward of your own: docs/own.md
  python train.py --preset gsm8k --model HuggingFaceTB/SmolLM2-360M-Instruct \\
          --gradient-checkpointing --micro-batch 2
      for a GPU of 8 GiB, too small for an update of Qwen2.5-0.5B (docs/benchmarks.md)
  python train.py --model Qwen/Qwen3-0.6B --template-option enable_thinking=false --show-prompt
      print the first prompt, and the tokens that end a completion
  python train.py --model ./my-model --data problems.jsonl --max-new-tokens 256 --micro-batch 4
      your own model folder and problems, one {"question": ..., "answer": ...} per line
"""


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option, and raises ValueError instead of exiting."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --seed is not short for --seeds

    def parse_args(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self.refusal(unknown[0]))
        return args

    def error(self, message):
        raise ValueError(message)

    def refusal(self, word):
        """The error message for a word that is no option, with the nearest option."""
        name = word.split("=")[0]
        if not name.startswith("-"):
            return f"{word!r} belongs to no option; --help lists the options"
        options = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name.replace("_", "-"), options, n=1)
        if near:
            return f"no option {name}; did you mean {near[0]}?"
        return f"no option {name}; --help lists the options"


def build_parser():
    parser = Parser(
        prog="train.py",
        description="Train a language model by a method of the GRPO family, with or without a GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    group = parser
    for about in fields(Options):
        if about.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[about.name])
        add_option(group, about)
        if about.name == "max_grad_norm":
            text = "short for --option beta=...: weight of the KL to the start policy (grpo, ha_dw)"
            group.add_argument("--beta", type=float, metavar="FLOAT", help=text)
    text = "continue the run in this folder; no other option is needed"
    group.add_argument("--resume", metavar="RUN", help=text)
    return parser


def add_option(group, about):
    """Add one field of Options to a group of --help."""
    if about.name == "option":
        text = "option of the algorithm's advantages or loss, such as eps_high=0.3; repeatable"
        group.add_argument("--option", action="append", metavar="NAME=VALUE", help=text)
        return
    if about.name == "template_option":
        add_template_option(group)
        return
    text = about.metadata["text"]
    if about.type is bool:
        group.add_argument(flag(about.name), action="store_true", help=text)
        return
    tiny, gsm8k = about.default, GSM8K.get(about.name, about.default)
    if tiny != gsm8k and about.name != "prompt":
        text += f" (preset tiny: {tiny}, gsm8k: {gsm8k})"
    elif tiny == gsm8k and tiny is not None:
        text += f" (default {tiny})"
    kind = TYPES[about.name]
    group.add_argument(flag(about.name), type=kind, metavar=kind.__name__.upper(), help=text)


def add_template_option(parser):
    text = "variable of the chat template, such as enable_thinking=false; repeatable"
    parser.add_argument("--template-option", action="append", metavar="NAME=VALUE", help=text)


def flag(name):
    return "--" + name.replace("_", "-")


def parse(argv):
    """{name: value} of the options in a command line. Raises ValueError for a wrong one."""
    given = vars(build_parser().parse_args(argv))
    if "algo" in given:
        given["algo"] = method(given["algo"])
    if "reward" in given:  # as config.json keeps it: a path that no current folder changes
        given["reward"] = str(Path(given["reward"]).expanduser().absolute())
    pairs = given.pop("option", [])
    if "beta" in given:
        pairs = [*pairs, f"beta={given.pop('beta')}"]
    if pairs:
        given["option"] = dict(pair.partition("=")[::2] for pair in pairs)
    if "template_option" in given:
        given["template_option"] = template_options(given["template_option"])
    check_utf8(given)
    return given


def check_utf8(given):
    """Raise ValueError for a text in {name: value} that no tokenizer and no file could take.

    Bytes of a command line that are not UTF-8 become surrogates, which cannot be encoded.
    """
    for name, value in given.items():
        if not is_utf8(value):
            raise ValueError(f"{flag(name)} {value!a}: not valid UTF-8, as texts and paths must be")


def is_utf8(value):
    """Whether all texts in a JSON value can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_command_line():
    """Before torch is imported: print the help or the error of train.py's command line.

    Raises SystemExit for both. Values that depend on the preset or the machine are checked later.
    """
    try:
        given = parse(sys.argv[1:])
        if "resume" not in given:  # else the run's own options come first
            check_values(Options(**given))
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("loading torch and transformers", flush=True)


def template_options(texts):
    """{name: value} of ["name=value", ...]. A value is read as JSON if it is JSON, else as text.

    True, False and None are read as JSON's true, false and null, because a template would treat
    all three texts as true. Raises ValueError for a text that is not name=value.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"--template-option {text}: NAME=VALUE, e.g. enable_thinking=false")
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            options[name] = json.loads(value, parse_constant=str)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def fill(given):
    """The Options with the given {name: value} and the preset's defaults, checked.

    The preset, device and dtype "auto" are replaced by what they mean on this machine, so that
    config.json records it. Raises ValueError, in one line.
    """
    import torch

    from run.algorithm import checked_options
    from run.machine import has_bf16
    from run.ownreward import load_reward

    cuda = torch.cuda.is_available()
    preset = given.get("preset", "auto")
    if preset == "auto":
        # GSM8K needs the prompt and the longer completions of its preset: with those of tiny, an
        # evaluation without a GPU would show a much lower accuracy.
        of_gsm8k = given.get("eval_only") and given.get("data") in ("gsm8k", "openai/gsm8k")
        preset = "gsm8k" if cuda or of_gsm8k else "tiny"
    if preset not in PRESETS:
        raise ValueError(f"--preset is auto, tiny or gsm8k, not {preset!r}")
    o = Options(**{**PRESETS[preset], **given, "preset": preset})
    o.algo = method(o.algo)
    if o.device == "auto":
        o.device = "cuda" if cuda else "cpu"
    check_device(o.device)
    if o.dtype == "auto":
        o.dtype = "bf16" if o.device != "cpu" and has_bf16(o.device) else "fp32"
    check(o)
    o.option = checked_options(o.algo, o.option)
    if o.reward:
        load_reward(o.reward)  # raises ValueError now, not after the model has been loaded
    return o


def check_config(config, path):
    """Raise ValueError, in one line, for an entry of a run's config.json that we never write.

    Only names and types: whether a value is allowed is left to `check`.
    """
    if not is_utf8(config):
        raise ValueError(f"{path}: a text in it is not valid UTF-8; {NOT_OURS}")
    kinds = {about.name: about.type for about in fields(Options)}
    for name, value in config["options"].items():
        if name not in kinds:
            raise ValueError(f"{path}: no option is called {name!r}; {NOT_OURS}")
        check_kind(value, kinds[name], name, path)
    for name, value in config["options"].get("option", {}).items():
        check_kind(value, bool | int | float | str, f"option {name}", path)
    for table in ("code", "versions"):
        check_kind(config.get(table, {}), dict, table, path)
        for name, value in config.get(table, {}).items():
            check_kind(value, str, f"{table} {name}", path)
    rows = config.get("micro_batch", 1)
    check_kind(rows, int, "micro_batch", path)
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{path}: micro_batch is {rows}, not 1 to {MOST_ROWS}; {NOT_OURS}")


NOT_OURS = (
    "another version of this code made the run, or the file was edited: use that version, or undo "
    "the edit"
)
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    str | None: "a text or null",
    bool | int | float | str: "a number, a text, true or false",
    dict: "an object",
}


def check_kind(value, kind, name, path):
    """Raise ValueError unless a value of a run's config.json is of this kind, one of KINDS."""
    types = int | float if kind is float else kind  # 1.0 may have become 1
    good = isinstance(value, types)
    if isinstance(value, bool) and kind in (int, float):  # to Python, True is an int
        good = False
    if not good:
        shown = json.dumps(value)[:60]
        raise ValueError(f"{path}: {name} is {shown}, not {KINDS[kind]}; {NOT_OURS}")


def check(o):
    """Raise ValueError, in one line, for the first option with a value that is not allowed."""
    check_values(o)
    check_rows(o)
    check_machine(o)
    if o.data == "tiny" and (o.columns or o.skip_bad_rows):
        raise ValueError("--columns and --skip-bad-rows have no effect with --data tiny")
    if o.eval_samples and o.k == 0:
        raise ValueError(f"--eval-samples {o.eval_samples} has no effect with --k 0: leave it out")
    if o.eval_samples and o.eval_samples < o.k:
        raise ValueError(f"--eval-samples {o.eval_samples} is below --k {o.k}")
    if o.overlong_cache > o.max_new_tokens:
        raise ValueError("--overlong-cache is over --max-new-tokens")


def check_values(o):
    """`check` of what can be wrong in any preset and on any machine."""
    check_algorithm(o)
    check_bounds(o)
    if o.columns is not None and not re.fullmatch("[^,]+,[^,]+", o.columns):
        raise ValueError(f"--columns {o.columns}: two names, QUESTION,ANSWER")
    check_prompt(o)
    if o.reward and not Path(o.reward).is_file():
        raise ValueError(f"--reward {o.reward}: no such file")
    check_track(o)


def check_algorithm(o):
    check_name(o.algo)


def method(algo):
    """--algo as config.json keeps it: a name, or a path that no current folder changes.

    The path of one of our own files becomes its name.
    """
    if not is_file(algo):
        return algo
    path = Path(algo).expanduser().absolute()
    for name in (*ALGORITHMS, *MORE):
        folder = ROOT / "more" if name in MORE else ROOT
        if path.resolve() == folder / f"{name}.py":
            return name
    return str(path)


def check_file(path):
    """Raise ValueError if --algo names no file, or one whose name cannot be a label."""
    if not Path(path).exists():
        raise ValueError(f"--algo {path}: no such file")
    if not Path(path).is_file():
        raise ValueError(f"--algo {path}: not a file; a method is a Python file")
    if not re.fullmatch(r"[A-Za-z][\w-]*\.py", Path(path).name, re.ASCII):
        raise ValueError(
            f"--algo {path}: its runs and curves are named after the file, so its name is made of "
            f"letters, digits, - and _, such as my_method.py"
        )


def check_name(algo):
    """Raise ValueError if there is no such method."""
    if is_file(algo):
        return check_file(algo)
    names = [*ALGORITHMS, *MORE]
    if algo in names:
        return
    name = algo.lower().replace("-", "_")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if Path(f"{algo}.py").is_file():
        near = [f"{algo}.py"]
    meant = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"no algorithm {algo!r}; {meant}There are {', '.join(names)}")


def algorithm_names(text):
    """ "tepo,my.py" -> ["tepo", "/path/of/my.py"]; "all" stands for all 28.

    For argparse: raises ArgumentTypeError.
    """
    names = []
    for word in text.split(","):
        names += [*ALGORITHMS, *MORE] if word == "all" else [method(word)]
    names = list(dict.fromkeys(names))
    labels = {}
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None
        other = labels.setdefault(label(name), name)
        if other != name:
            raise argparse.ArgumentTypeError(f"{other} and {name} have one name: rename a file")
    return names


def check_bounds(o):
    for about in fields(Options):
        value = getattr(o, about.name)
        if about.type is int:
            check_whole_number(about.name, value, about.metadata["least"], about.metadata["most"])
        if about.type is float:
            check_number(about.name, value, about.metadata["least"], about.default)
    if o.seed >= 2**32:
        raise ValueError(f"--seed {o.seed}: it must be below 2**32")
    if o.lr > 1:
        raise ValueError(
            f"--lr {o.lr}: AdamW moves each weight by about that much per step; the most is 1"
        )


def check_number(name, value, least, default):
    if not (0 < value <= sys.float_info.max or value == default):
        raise ValueError(f"{flag(name)} {value}: it must be above 0 and finite")
    if value < least:
        raise ValueError(f"{flag(name)} {value}: the least is {least}")


def check_whole_number(name, value, least, most):
    if value < least:
        why = ""
        if name == "group_size":
            why = " (one completion has no group to be compared with)"
        raise ValueError(f"{flag(name)} {value}: the least is {least}{why}")
    if value > most:
        raise ValueError(f"{flag(name)} {value}: the most is {most}")


def check_rows(o):
    """Raise ValueError if a step has too many rows, or no equal mini-batches."""
    size = f"--prompts {o.prompts} x --group-size {o.group_size}"
    if o.rows > MOST_ROWS:
        raise ValueError(f"{size}: {o.rows} completions per step, the most is {MOST_ROWS}")
    if o.rows % o.updates:
        raise ValueError(
            f"--updates {o.updates} does not divide the {o.rows} completions of a step ({size}): "
            f"no equal mini-batches"
        )
    for name in ("micro_batch", "sample_batch"):
        value = getattr(o, name)
        if value == "auto":
            continue
        if not is_count(value):
            raise ValueError(f"{flag(name)} {value}: a number of rows, at least 1, or auto")
        if int(value) > MOST_ROWS:
            raise ValueError(f"{flag(name)} {value}: the most is {MOST_ROWS}, or auto")


def is_count(text):
    return text.isdecimal() and int(text) > 0


def check_prompt(o):
    if "{question}" not in o.prompt:
        raise ValueError("--prompt must hold {question}, where the problem goes")
    if o.chat_template not in ("auto", "none"):
        raise ValueError(f"--chat-template {o.chat_template}: auto or none")
    if o.chat_template == "none" and o.system is not None:
        raise ValueError("--system has no effect with --chat-template none: use --prompt")
    if o.chat_template == "none" and o.template_option:
        raise ValueError("--template-option has no effect with --chat-template none")


def check_track(o):
    """Raise ValueError if there is no such tracker, or if it is not installed."""
    if o.track == "none":
        return
    if o.track not in TRACKERS:
        raise ValueError(f"--track {o.track}: {', '.join(TRACKERS)} or none")
    found = importlib.util.find_spec(o.track)
    if found is None or found.origin is None:  # without origin: a mere folder of that name
        raise ValueError(f"--track {o.track}: it is not installed; pip install {o.track}")


def check_device(device):
    import torch

    from run.machine import why_no_gpu

    kind, _, index = device.partition(":")
    indexed = kind == "cuda" and index.isdecimal()
    if device not in ("cpu", "cuda") and not indexed:
        raise ValueError(f"--device {device}: auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        found = f"torch sees {gpus} CUDA GPUs here" if gpus else why_no_gpu()
        raise ValueError(f"--device {device}: {found}")


def check_machine(o):
    if o.dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype {o.dtype}: auto, fp32 or bf16")
    if o.cache not in ("dynamic", "static"):
        raise ValueError(f"--cache {o.cache}: dynamic or static")
    cores = os.cpu_count() or 1
    if o.threads != "auto" and not (is_count(o.threads) and int(o.threads) <= cores):
        raise ValueError(f"--threads {o.threads}: 1 to {cores}, the cores of this machine, or auto")
