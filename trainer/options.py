"""Every option of train.py, its default in each preset, and the refusal of nonsense before any model is loaded.

torch is imported only where it is needed: --help and a wrong command line are answered without it.
"""

import argparse
import difflib
import importlib
import inspect
import json
import math
import os
import sys

ALGORITHMS = ("tepo", "grpo", "dapo", "gspo", "gtpo", "grpo_s", "trgrpo")

# Group of --help -> option, type, default in the presets tiny and gsm8k, meaning. The command line's - is a _ here.
OPTIONS = {
    "what is trained": [
        ("algo", str, "tepo", "tepo", f"one of {', '.join(ALGORITHMS)}"),
        ("model", str, "tiny", "Qwen/Qwen2.5-0.5B", "the folder of a model or of a run, or a Hub name"),
        ("data", str, "tiny", "gsm8k", "tiny, gsm8k, a Hub name[:config], a folder with train/test.jsonl, or "
         "a .jsonl, whose last tenth (at most 500) is held out"),
        ("steps", int, 100, 500, "training steps, each one rollout and its updates"),
        ("seed", int, 0, 0, "of the data order and of sampling"),
    ],
    "prompt": [
        (
            "prompt", str, "{question}",
            "{question}\nReason step by step, then end with the answer alone on a line: #### number",
            "what the model is asked; {question} is filled in",
        ),
        (
            "chat_template", str, "auto", "auto",
            "auto: the tokenizer's, if it has one; none: plain text",
        ),
        ("system", str, None, None, "text of the chat template's system turn, before the question"),
    ],
    "rollout": [
        ("prompts", int, 16, 8, "prompts a step"),
        ("group_size", int, 8, 8, "G, completions a prompt"),
        ("temperature", float, 1.0, 1.0, "divides the logits, in sampling and in training alike"),
        ("max_new_tokens", int, 64, 512, "longest completion; a truncated one has an answer only in a whole line"),
        ("dynamic_sampling", int, 0, 0, "DAPO: replace groups all right or all wrong, in at most so many tries"),
        ("overlong_cache", int, 0, 0, "DAPO: punish the last so many tokens before --max-new-tokens; 0 is off"),
    ],
    "update": [
        ("updates", int, 4, 4, "optimizer steps a rollout, a mini-batch each; with 1 the methods hardly differ"),
        ("epochs", int, 1, 1, "passes over the rollout"),
        ("lr", float, 1e-4, 1e-6, "AdamW's learning rate after the warm-up, without weight decay"),
        ("warmup", int, 5, 10, "steps over which the learning rate rises"),
        ("max_grad_norm", float, 1.0, 1.0, "gradient clipping"),
        ("beta", float, None, None, "short for --option beta=...: the KL to the start policy, if the algorithm has it"),
    ],
    "machine": [
        ("device", str, "auto", "auto", "auto, cpu, cuda or cuda:N"),
        ("dtype", str, "auto", "auto", "of the compute: fp32, bf16, or auto (bf16 on CUDA); weights are fp32 always"),
        ("micro_batch", str, "auto", "auto", "rows of one forward pass, or auto; it does not change the gradient"),
        ("sample_batch", str, "auto", "auto", "rows of one generate call: a number, or auto"),
        ("threads", str, "auto", "auto", "CPU threads, or auto: 1 for a model of under 10 M weights, else all cores"),
        ("gradient_checkpointing", bool, False, False, "less memory for a slower update"),
    ],
    "evaluation and output": [
        ("eval_every", int, 25, 50, "steps between evaluations on held-out problems; 0: only before and after"),
        ("eval_n", int, 500, 200, "how many held-out problems"),
        ("k", int, 4, 4, "of avg@k and pass@k, before and after training; 0 leaves both out"),
        ("eval_samples", int, 0, 0, "completions a problem that avg@k and pass@k are estimated from; 0: k"),
        (
            "samples_every", int, 10, 10,
            "steps between groups in samples.jsonl, beside the first and last; 0: none",
        ),
        ("save_every", int, 20, 50, "steps between checkpoints; 0: none, and no --resume"),
        ("out", str, None, None, "the run's folder (default runs/<algo>-<preset>-s<seed>)"),
    ],
}  # fmt: skip
DEFAULTS = {
    preset: {name: row[column] for rows in OPTIONS.values() for name, *row in rows}
    for preset, column in (("tiny", 1), ("gsm8k", 2))
}
TYPES = {name: kind for rows in OPTIONS.values() for name, kind, *_ in rows}

EPILOG = """examples:
  python train.py --algo tepo
      on a GPU: Qwen2.5-0.5B on GSM8K; without one: the embedded tiny model, in minutes
  python train.py --algo gspo --preset tiny --updates 16 --option eps_high=0.01
      an option of the algorithm itself; an unknown one is answered with the list of those that exist
  python train.py --preset gsm8k --model HuggingFaceTB/SmolLM2-360M-Instruct --gradient-checkpointing --micro-batch 2
      for a card of 8 GiB, where Qwen2.5-0.5B's weights and AdamW's state alone do not fit
  python train.py --model Qwen/Qwen3-0.6B --template-option enable_thinking=false --show-prompt
      what the model would be asked, and the tokens that end its completion
  python train.py --model ./my-model --data problems.jsonl --max-new-tokens 256 --micro-batch 4
      your own model folder and problems, {"question": ..., "answer": ...} a line
"""


# The largest values that make sense. Most are only there so that a slip of the finger is told;
# those of a rollout and of an evaluation bound what is held in memory.
AT_MOST = {
    "prompts": 65_536,
    "group_size": 65_536,
    "max_new_tokens": 2**20,
    "dynamic_sampling": 1_000,
    "epochs": 1_000,
    "k": 10_000,
    "eval_samples": 10_000,
}
AT_MOST_OTHERWISE = 10**9  # any other whole number
COMPLETIONS = 65_536  # prompts x group_size, of one step

ALLOWED_ON_RESUME = ("steps", "save_every", "show_prompt")  # what a resumed run may change


class Parser(argparse.ArgumentParser):
    """Answers a misspelt option with the nearest one. A wrong command line is a ValueError."""

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
        """What to say of a word that is no option, with the option that it may have meant."""
        name = word.split("=")[0]
        options = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name.replace("_", "-"), options, n=1)
        if not name.startswith("-"):
            return f"{word!r} belongs to no option; --help lists the options"
        if near:
            return f"no option {name}; did you mean {near[0]}?"
        return f"no option {name}; --help lists the options"


def build_parser():
    parser = Parser(
        prog="train.py", description="Train a language model by a method of the GRPO family, on one GPU or on none.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--preset",
        help="auto, tiny or gsm8k: the defaults below (auto: gsm8k with CUDA, else tiny)",
    )
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, tiny, gsm8k, text in rows:
            flag = "--" + name.replace("_", "-")
            if kind is bool:
                group.add_argument(flag, action="store_true", help=text)
                continue
            if tiny is not None and name != "prompt":
                text += f" (default {tiny})" if tiny == gsm8k else f" (tiny {tiny}, gsm8k {gsm8k})"
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
        if title == "update":
            text = "an option of the algorithm's advantages or loss, e.g. eps_high=0.3; repeatable"
            group.add_argument("--option", action="append", metavar="NAME=VALUE", help=text)
        if title == "prompt":
            add_template_option(group)
            text = "print the first prompt as the model gets it, and what ends a completion"
            group.add_argument("--show-prompt", action="store_true", help=text)
    text = "delete the run that --out holds (with --eval-only: replace its eval.json)"
    group.add_argument("--overwrite", action="store_true", help=text)
    group.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder; needs no other option"
    )
    group.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the model and write eval.json; no training",
    )
    return parser


def add_template_option(parser):
    text = "a variable of the chat template, e.g. enable_thinking=false; repeatable"
    parser.add_argument("--template-option", action="append", metavar="NAME=VALUE", help=text)


def parse(argv):
    """(options given on the command line, by name). Raises ValueError on what argparse refuses."""
    given = vars(build_parser().parse_args(argv))
    pairs = [text.partition("=") for text in given.pop("option", [])]
    if "beta" in given:
        pairs.append(("beta", "=", str(given.pop("beta"))))
    if pairs:
        given["option"] = {name: value for name, _, value in pairs}
    if "template_option" in given:
        given["template_option"] = template_options(given["template_option"])
    return given


def check_command_line():
    """Answer --help, or refuse a wrong command line of train.py. Raises SystemExit."""
    try:
        parse(sys.argv[1:])
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def template_options(texts):
    """{name: value} of ["name=value", ...]. A value is JSON where it can be, else text.

    True, False and None are read as JSON's true, false and null: as texts, a template would take
    all three for true. Raises ValueError for what is no name=value.
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
    """All options: the preset's defaults, and over them what was given. Raises ValueError on nonsense."""
    import torch

    options = dict(given)
    cuda = torch.cuda.is_available()
    if options.get("preset", "auto") == "auto":
        # An evaluation goes by its data: GSM8K without its prompt and its room for an answer would look far worse.
        of_gsm8k = options.get("eval_only") and options.get("data") in ("gsm8k", "openai/gsm8k")
        options["preset"] = "gsm8k" if cuda or of_gsm8k else "tiny"
    if options["preset"] not in DEFAULTS:
        raise ValueError(f"--preset is auto, tiny or gsm8k, not {options['preset']!r}")
    options = (
        {
            "option": {},
            "template_option": {},
            "overwrite": False,
            "eval_only": False,
            "show_prompt": False,
        }
        | DEFAULTS[options["preset"]]
        | options
    )
    options.pop("beta", None)  # it became option["beta"]
    if options["device"] == "auto":
        options["device"] = "cuda" if cuda else "cpu"
    if options["dtype"] == "auto":
        options["dtype"] = "bf16" if options["device"].startswith("cuda") else "fp32"
    options["eval_samples"] = options["eval_samples"] or options["k"]
    validate(options)
    options["option"] = algorithm_options(options["algo"], options["option"])
    return options


def refuse_huge(o):
    """Raises ValueError for a whole number that no run can want."""
    for name, kind in TYPES.items():
        most = AT_MOST.get(name, AT_MOST_OTHERWISE)
        if kind is int and name != "seed" and o[name] > most:
            raise ValueError(f"--{name.replace('_', '-')} {o[name]}: the most is {most}")
    for name in ("micro_batch", "sample_batch"):
        if _is_size(o[name]) and int(o[name]) > COMPLETIONS:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {o[name]}: the most is {COMPLETIONS}, or auto")
    completions = o["prompts"] * o["group_size"]
    if completions > COMPLETIONS:
        raise ValueError(
            f"--prompts {o['prompts']} x --group-size {o['group_size']}: {completions} completions "
            f"a step, the most is {COMPLETIONS}"
        )


def refuse_unused_chat_options(o):
    """Raises ValueError for --chat-template, or for what needs the template that it turns off."""
    if o["chat_template"] not in ("auto", "none"):
        raise ValueError(f"--chat-template {o['chat_template']}: auto or none")
    if o["chat_template"] == "none" and o["system"] is not None:
        raise ValueError("--system has no effect with --chat-template none: use --prompt")
    if o["chat_template"] == "none" and o["template_option"]:
        raise ValueError("--template-option has no effect with --chat-template none")


def validate(o):
    """Raises ValueError, one line, for the first option that makes no sense."""
    import torch

    refuse_huge(o)
    refuse_unused_chat_options(o)
    near = difflib.get_close_matches(o["algo"].lower().replace("-", "_"), ALGORITHMS, 1, 0.4)
    batch = o["prompts"] * o["group_size"]
    at_least = {
        "steps": 1,
        "prompts": 1,
        "updates": 1,
        "epochs": 1,
        "max_new_tokens": 1,
        "eval_n": 1,
        "group_size": 2,
    }
    at_least |= dict.fromkeys(
        ("dynamic_sampling", "overlong_cache", "warmup", "eval_every", "k", "eval_samples"), 0
    )
    at_least |= dict.fromkeys(("samples_every", "save_every", "seed"), 0)
    low = [name for name, least in at_least.items() if o[name] < least]
    positive = [
        name for name in ("temperature", "lr", "max_grad_norm") if not 0 < o[name] < math.inf
    ]
    sizes = [
        name
        for name in ("micro_batch", "sample_batch")
        if o[name] != "auto" and not _is_size(o[name])
    ]
    device, _, index = o["device"].partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for wrong, line in (
        (o["algo"] not in ALGORITHMS, f"no algorithm {o['algo']!r}; "
         + (f"did you mean {near[0]}? " if near else "") + f"There are {', '.join(ALGORITHMS)}"),
        (low, low and f"--{low[0]} {o[low[0]]}: the least is {at_least[low[0]]}"
         + (" (one completion has no group to be compared with)" if low[0] == "group_size" else "")),
        (positive, positive and f"--{positive[0]} {o[positive[0]]}: it must be above 0 and finite"),
        (o["seed"] >= 2**32, f"--seed {o['seed']}: it must be below 2**32"),
        (o["lr"] > 1, f"--lr {o['lr']}: AdamW moves each weight by about as much a step; it must not be above 1"),
        (batch % max(1, o["updates"]), f"--updates {o['updates']} does not divide the {batch} completions of a step "
         f"(--prompts {o['prompts']} x --group-size {o['group_size']}): no equal mini-batches"),
        (sizes, sizes and f"--{sizes[0]} {o[sizes[0]]}: a number of rows, at least 1, or auto"),
        (o["threads"] != "auto" and not (_is_size(o["threads"]) and int(o["threads"]) <= (os.cpu_count() or 1)),
         f"--threads {o['threads']}: 1 to {os.cpu_count()}, the cores of this machine, or auto"),
        (o["eval_samples"] < o["k"], f"--eval-samples {o['eval_samples']} is below --k {o['k']}"),
        (o["overlong_cache"] > o["max_new_tokens"], "--overlong-cache is over --max-new-tokens"),
        ("{question}" not in o["prompt"], "--prompt must hold {question}, where the problem goes"),
        (device not in ("cpu", "cuda") or (index and (device == "cpu" or not index.isdecimal())),
         f"--device {o['device']}: auto, cpu, cuda or cuda:N"),
        (device == "cuda" and int(index or 0) >= gpus, f"--device {o['device']}: torch sees {gpus} CUDA GPUs here"),
        (o["dtype"] not in ("fp32", "bf16"), f"--dtype {o['dtype']}: auto, fp32 or bf16"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(line.replace("_", "-") if line.startswith("--") else line)


def _is_size(text):
    return text.isdecimal() and int(text) > 0


def algorithm_options(algo, given):
    """{option: value} of the algorithm's two functions, from texts; each is tried once on a toy batch.

    What may be set is every keyword whose default is a number, a bool or a text. Raises ValueError otherwise.
    """
    import torch

    module = importlib.import_module(algo)
    defaults = {}
    for function in (module.advantages, module.loss):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None:
                defaults[name] = parameter.default
    values = {}
    for name, text in given.items():
        if name not in defaults:
            known = ", ".join(f"{known}={default}" for known, default in defaults.items())
            raise ValueError(f"{algo} has no option {name!r}; it has {known}")
        kind = type(defaults[name])
        try:
            values[name] = (
                {"true": True, "false": False}[str(text).lower()] if kind is bool else kind(text)
            )
            if kind is float and not (
                math.isfinite(values[name]) and (values[name] >= 0 or name in ("tau", "mu"))
            ):
                raise ValueError
        except (ValueError, KeyError):
            want = {bool: "true or false", float: "a finite number, not negative"}.get(
                kind, kind.__name__
            )
            raise ValueError(f"--option {name}={text}: {want} is wanted") from None
    ones = torch.ones(2, 1)
    of_advantages, of_loss = split_options(module, values)
    advantages = module.advantages(
        torch.tensor([1.0, 0.0]), 2, entropy=ones, mask=ones, **of_advantages
    )
    extras = {
        name: ones
        for name in ("ref_logprobs", "entropy", "old_entropy")
        if name in parameters(module.loss)
    }
    module.loss(-ones, -ones, advantages, ones, **of_loss, **extras)
    return values


def parameters(function):
    return inspect.signature(function).parameters


def named(function, values):
    """Those of values, {name: value}, that are parameters of the function."""
    return {name: values[name] for name in values if name in parameters(function)}


def split_options(module, values):
    """The options of module.advantages and those of module.loss."""
    return named(module.advantages, values), named(module.loss, values)
