"""Options filled in and checked: what is wrong is a ValueError in one line.

torch is imported where it is needed: an error in a command line does not wait for it.
"""

import importlib.util
import json
import re
from pathlib import Path

from run.names import check_name, method
from run.options import COUNT, FIELDS, MOST_ROWS, PRESETS, Options, flag


def fill(given):
    """The Options with the given {name: value} and the preset's defaults, checked.

    The preset, device and dtype "auto" are replaced by what they mean on this machine, so that
    config.json records it. Raises ValueError.
    """
    import torch

    from run.algorithm import checked_options
    from run.machine import has_bf16
    from run.ownreward import load_reward

    # --fit asks about a GPU, which need not be here.
    asked = bool(given.get("fit")) and given.get("device", "auto") != "cpu"
    cuda = asked or torch.cuda.is_available()
    preset = given.get("preset", "auto")
    if preset == "auto":
        # GSM8K needs the prompt and the longer completions of its preset: with those of tiny, an
        # evaluation without a GPU would show a much lower accuracy.
        of_gsm8k = given.get("eval_only") and given.get("data") in ("gsm8k", "openai/gsm8k")
        preset = "gsm8k" if cuda or of_gsm8k else "tiny"
    o = Options(**{**PRESETS[preset], **given, "preset": preset})
    o.algo = method(o.algo)
    if o.lora and "lr" not in given:
        o.lr *= 10
    if o.device == "auto":
        o.device = "cuda" if cuda else "cpu"
    check_values(o)
    check_together(o)
    if not asked:
        check_device(o.device)
    if o.dtype == "auto":
        o.dtype = "bf16" if asked or (o.device != "cpu" and has_bf16(o.device)) else "fp32"
    o.option = checked_options(o.algo, o.option)
    if o.reward:
        load_reward(o.reward)  # raises ValueError now, not after the model has been loaded
    return o


def check_config(config, path):
    """Raise ValueError unless the options in a run's config.json have names and types of ours."""
    for name, value in config["options"].items():
        about = FIELDS.get(name)
        if about is None or not has_type(value, about.type):
            raise ValueError(
                f"{path}: {name} = {json.dumps(value)[:60]} is no option of this version; use the "
                f"version that made the run, or undo an edit of the file"
            )


def has_type(value, kind):
    if isinstance(value, bool):  # to Python, True is an int
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)  # 1.0 may have become 1


def check_values(o):
    """Raise ValueError for the first value that is wrong in any preset and on any machine."""
    check_name(o.algo)
    for name, about in FIELDS.items():
        if about.type in (int, float, COUNT):
            check_number(name, getattr(o, name))
    if o.columns is not None and not re.fullmatch("[^,]+,[^,]+", o.columns):
        raise ValueError(f"--columns {o.columns}: two names, QUESTION,ANSWER")
    if "{question}" not in o.prompt:
        raise ValueError("--prompt must hold {question}, where the problem goes")
    if o.chat_template == "none" and o.system is not None:
        raise ValueError("--system has no effect with --chat-template none: use --prompt")
    if o.chat_template == "none" and o.template_option:
        raise ValueError("--template-option has no effect with --chat-template none")
    if not o.lora and (o.lora_alpha or o.lora_targets):
        raise ValueError("--lora-alpha and --lora-targets have no effect without --lora RANK")
    if o.reward and not Path(o.reward).is_file():
        raise ValueError(f"--reward {o.reward}: no such file")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", o.device):
        raise ValueError(f"--device {o.device}: auto, cpu, cuda or cuda:N")
    if o.track != "none" and not is_installed(o.track):
        raise ValueError(f"--track {o.track}: it is not installed; pip install {o.track}")


def is_installed(package):
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # without origin: a mere folder


def check_number(name, value):
    """Raise ValueError if a number is out of its bounds, or a COUNT neither a number nor auto."""
    limits = FIELDS[name].metadata
    least, most, wanted = limits["least"], limits["most"], ""
    if FIELDS[name].type == COUNT:
        if value == "auto":
            return
        wanted = ", or auto"
        value = int(value) if re.fullmatch(r"\d{1,30}", value) else value
    if isinstance(value, str) or not least <= value <= most:  # NaN fails this test
        raise ValueError(f"{flag(name)} {value}: it must be from {least} to {most}{wanted}")


def check_together(o):
    """Raise ValueError for options that do not fit each other."""
    size = f"--prompts {o.prompts} x --group-size {o.group_size}"
    if o.rows > MOST_ROWS:
        raise ValueError(f"{size}: {o.rows} completions per step, the most is {MOST_ROWS}")
    if o.rows % o.updates:
        raise ValueError(
            f"--updates {o.updates} does not divide the {o.rows} completions of a step ({size}): "
            f"no equal mini-batches"
        )
    if o.data == "tiny" and (o.columns or o.skip_bad_rows):
        raise ValueError("--columns and --skip-bad-rows have no effect with --data tiny")
    if o.eval_samples and not 0 < o.k <= o.eval_samples:
        given = f"--eval-samples {o.eval_samples} with --k {o.k}"
        raise ValueError(f"{given}: avg@k and pass@k need k above 0 and at least k samples")
    if o.overlong_cache > o.max_new_tokens:
        raise ValueError("--overlong-cache is over --max-new-tokens")


def check_device(device):
    """Raise ValueError if this machine has no such GPU."""
    import torch

    from run.machine import why_no_gpu

    kind, _, index = device.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        found = f"torch sees {gpus} CUDA GPUs here" if gpus else why_no_gpu()
        raise ValueError(f"--device {device}: {found}")
