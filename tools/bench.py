"""Measure memory and speed on this machine, each against the plain way to do the same work.

  logprobs   log-probabilities with and without the full logits, of a Qwen2.5-0.5B-shaped model
  rollout    generate as it comes, with --cache static, and as train.py runs it by default;
             and the time per token beside the time to read every weight once
  step       training steps of train.py; with --peer also of TRL's GRPOTrainer

rollout and step take --model: tiny, with the defaults of the preset tiny, or a folder, with
--data, --prompts, --group-size, --max-new-tokens and --micro-batch. Each measurement runs in a
process of its own, one after the other, so that its peak memory is its own. On a busy machine
trust the ratios, not the seconds.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from run.commandline import Parser

PARTS = ("logprobs", "rollout", "step")


def build_parser():
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("bench.py", None, __doc__, formatter_class=kind)
    add = parser.add_argument
    text = f"parts to run, of {', '.join(PARTS)} (default: all)"
    add("--only", metavar="PART,...", default=",".join(PARTS), help=text)
    text = "also run the steps with TRL's GRPOTrainer; needs --model FOLDER"
    add("--peer", action="store_true", help=text)
    text = "for rollout and step: tiny, or a folder (default tiny)"
    add("--model", default="tiny", help=text)
    text = "with --model FOLDER: as --data of train.py (default gsm8k)"
    add("--data", default="gsm8k", help=text)
    for name, default in (
        ("--prompts", 2),
        ("--group-size", 8),
        ("--max-new-tokens", 96),
        ("--micro-batch", 8),
    ):
        text = f"with --model FOLDER: as in train.py (default {default})"
        add(name, type=int, default=default, metavar="N", help=text)
    text = "timed training steps, after one warm-up step (default 3)"
    add("--steps", type=int, default=3, metavar="N", help=text)
    text = "compute type of rollout and step (default fp32)"
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help=text)
    text = "write the figures to this file; each ratio is ours / the other's"
    add("--json", metavar="FILE", help=text)
    add("--measure", help=argparse.SUPPRESS)  # run one of MEASUREMENTS in this process
    return parser


def parse_args(argv):
    """The options, with `parts` a list. A wrong one prints one line and exits with status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.parts = args.only.split(",")
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    for name in ("prompts", "group_size", "max_new_tokens", "micro_batch", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: the least is 1")
    if args.model != "tiny" and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: no such folder; --model takes a model folder, or tiny")
    if args.peer and ("step" not in args.parts or args.model == "tiny"):
        parser.error("--peer goes with the part step and with --model FOLDER")
    completions = args.prompts * args.group_size
    if args.peer and completions % args.micro_batch:
        parser.error(
            f"--peer: TRL needs equal micro-batches, and --micro-batch {args.micro_batch} "
            f"does not divide the {completions} completions of a step"
        )
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        parser.error(f"--json {args.json}: it is a folder, or its folder does not exist")
    if args.peer and importlib.util.find_spec("trl") is None:
        parser.error("--peer needs TRL: pip install -r scale/requirements.txt")
    return args


if __name__ == "__main__":  # --help and a wrong option do not wait for torch to be imported
    parse_args(sys.argv[1:])

import dataclasses
import functools

import torch

QWEN = dict(  # Qwen2.5-0.5B
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=32_768,
)


def peak_bytes(device):
    """The most memory used so far: by CUDA's allocator, or by the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    from trainer.records import peak_mib

    peak = peak_mib(torch.device("cpu"))
    if peak is None:
        raise ValueError("this system does not tell the peak memory of a process")
    return int(peak * 2**20)


def clock(device):
    """Seconds, read after the GPU has finished its queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(work, device, repeats):
    """(seconds of the fastest of `repeats` calls of work(), what the last one returned)."""
    seconds = []
    for _ in range(repeats):
        started = clock(device)
        result = work()
        seconds.append(clock(device) - started)
    return min(seconds), result


# The measurements: each takes the options and the device and returns numbers


def logprobs(args, device, through_head, size, rows=4, tokens=512):
    """Forward and backward over rows x tokens completion tokens, `size` rows at a time, in fp32.

    Returns {"peak": MiB above the weights and their gradients, "seconds"}.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(device).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # not zeros: the memory must really be in use
    batch = random_batch(QWEN["vocab_size"], rows, tokens, device)
    gradient = torch.randn(rows, tokens, device=device)
    before, started = peak_bytes(device), clock(device)
    backward(model, batch, gradient, size, through_head=through_head)
    seconds = clock(device) - started
    return {"peak": (peak_bytes(device) - before) / 2**20, "seconds": seconds}


def random_batch(vocabulary, rows, tokens, device, prompt=64):
    """(prompts, completions [rows, tokens], mask), all of full length, for token_logprobs."""
    prompts = [torch.randint(vocabulary, (prompt,)).tolist() for _ in range(rows)]
    ids = torch.randint(vocabulary, (rows, tokens), device=device)
    return prompts, ids, torch.ones_like(ids).bool()


def backward(model, batch, gradient, size, through_head=True):
    """Forward and backward of the batch, `size` rows at a time; gradient: dL/dlogprobs [B, T]."""
    from trainer.logprobs import token_logprobs

    prompts, ids, mask = batch
    casts = {}
    for rows in torch.arange(len(prompts)).split(size):
        piece = [prompts[i] for i in rows]
        out, _ = token_logprobs(
            model, piece, ids[rows], mask[rows], through_head=through_head, casts=casts
        )
        out.backward(gradient=gradient[rows])


def shared_options(args):
    """train.py's Options for the work that --model and the other options describe."""
    from run.checks import fill
    from run.options import flag
    from run.parser import parse

    if args.model == "tiny":
        return fill(parse(["--preset", "tiny", "--dtype", args.dtype, "--algo", "grpo"]))
    line = ["--preset", "gsm8k", "--algo", "grpo", "--updates", "1"]
    names = ("model", "data", "prompts", "group_size", "max_new_tokens", "micro_batch", "dtype")
    for name in names:
        line += [flag(name), str(getattr(args, name))]
    return fill(parse(line))


def rollout(args, device, repeats=2):
    """Sample the completions of one step in three ways, from the same seed.

    Returns {"plain": tokens/s of generate alone; "static": of --cache static; "ours": of
    train.py's default; "prompt": share of our time before the first token; "token": ms per token
    after it; "weights": ms to read every weight once; "rows": completions}
    """
    from run import start
    from trainer.bf16 import sampling_copy
    from trainer.sampling import sample

    o = shared_options(args)
    model, _, generation, problems, _ = start.set_up(o)
    model = sampling_copy(model, o.dtype)
    prompts = [p["prompt_ids"] for p in problems[: o.prompts]]

    def draw(max_new_tokens=o.max_new_tokens, **layout):
        torch.manual_seed(0)
        settings = {**generation, "max_new_tokens": max_new_tokens}
        settings["layout"] = dataclasses.replace(generation["layout"], **layout)
        return sample(model, prompts, o.group_size, temperature=1.0, **settings).mask

    plain = functools.partial(generated_mask, model, prompts, o.group_size, generation)
    static = functools.partial(draw, static_cache=True)
    rates = {}
    for name, way in (("plain", plain), ("static", static), ("ours", draw)):
        seconds, mask = fastest(way, device, repeats)
        rates[name] = mask.sum().item() / seconds
    first, _ = fastest(lambda: draw(max_new_tokens=1), device, repeats)
    longest = mask.sum(1).max().item()
    return {
        **rates,
        "prompt": first / seconds,
        "token": 1000 * (seconds - first) / max(1, longest - 1),
        "weights": 1000 * weight_read_seconds(model, device),
        "rows": len(mask),
    }


def generated_mask(model, prompts, n, generation):
    """The mask of n completions of each prompt, which `generate` draws on its own."""
    from trainer.cache import left_padded
    from trainer.sampling import completion_mask, generation_config, sampling_settings

    torch.manual_seed(0)
    eos_ids, pad_id = generation["eos_ids"], generation["pad_id"]
    settings = sampling_settings(generation["max_new_tokens"], eos_ids, pad_id)
    settings.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    ids, real = left_padded(repeated, pad_id, model.device)
    with generation_config(model, settings):
        out = model.generate(ids, attention_mask=real, generation_config=settings)
    return completion_mask(out[:, ids.shape[1] :], eos_ids)


def weight_read_seconds(model, device):
    """Seconds to read every weight matrix once, in a product with a vector; the best of 10."""
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    vectors = [torch.randn(p.shape[1], dtype=p.dtype, device=device) for p in matrices]

    def read():
        for matrix, vector in zip(matrices, vectors, strict=True):
            matrix @ vector

    return fastest(read, device, repeats=10)[0]


def worth(text):
    """The reward of `step --peer` and of tricks.py: any model earns it about half the time.

    So hardly any group is constant, and neither trainer is spared work.
    """
    return float(len(text) % 2)


def ours(args, device):
    """Training steps of train.py's Trainer, after one to warm up.

    Returns the summary and {"rollout_s": seconds of a step, "prompts": text of each row's prompt,
    with --peer only}.
    """
    import train
    from run import start

    prompts = []

    def reward(text, problem, length, truncated):
        prompts.append(tokenizer.decode(problem["prompt_ids"]))
        return worth(text), worth(text), {}

    o = shared_options(args)
    model, tokenizer, generation, problems, _ = start.set_up(o)
    trainer = train.Trainer(o, model, tokenizer, generation, problems)
    if args.peer:
        trainer.grader.reward = reward
    trainer.step(1)
    lines = [trainer.step(step)[0] for step in range(2, 2 + args.steps)]
    rollouts = [line["rollout_s"] for line in lines]
    seconds = [line["rollout_s"] + line["update_s"] for line in lines]
    tokens = [line["length"] * o.rows for line in lines]
    found = summary(seconds, tokens, model)
    found["rollout_s"] = sum(rollouts) / len(rollouts)
    found["prompts"] = prompts
    return found


def trl(args, device):
    """The same steps by TRL's GRPOTrainer: the same model, problems in the same order, options."""
    from run import start
    from scale.trl_bench import train_steps
    from trainer.data import problems_at

    o = shared_options(args)
    model, tokenizer, _, problems, _ = start.set_up(o)
    steps = 1 + args.steps  # one to warm up
    problems = problems_at(problems, o.seed, 0, o.prompts * steps)
    asked = [tokenizer.decode(p["prompt_ids"]) for p in problems]
    seconds, tokens, prompts = train_steps(
        o, model, tokenizer, asked, steps, reward=worth, clock=lambda: clock(device)
    )
    found = summary(seconds[1:], tokens[1:], model)
    found["prompts"] = prompts
    return found


def summary(seconds, tokens, model):
    """The figures of both trainers, from the seconds and the completion tokens of each step.

    peak_mib is above fp32 weights and AdamW's two moments, which are 12 bytes per weight.
    """
    weights = sum(p.numel() for p in model.parameters())
    peak = peak_bytes(model.device.type) - 12 * weights
    return {
        "step_s": sum(seconds) / len(seconds),
        "tokens_per_s": sum(tokens) / sum(seconds),
        "peak_mib": peak / 2**20,
    }


MEASUREMENTS = {
    "plain": functools.partial(logprobs, through_head=False, size=4),
    "head": functools.partial(logprobs, through_head=True, size=4),
    "row": functools.partial(logprobs, through_head=True, size=1),
    "rollout": rollout,
    "ours": ours,
    "trl": trl,
}


def measure(name, argv):
    """The result of one of MEASUREMENTS, run in a new process of this file."""
    environment = dict(os.environ)
    if name != "rollout":  # its peak is not measured
        # glibc keeps freed blocks that it did not map one by one. Map those of 4 MiB and more, so
        # that the peak is what was in use and not what was kept.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**22)
    line = [sys.executable, __file__, *argv, "--measure", name]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        last_line = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"bench.py: {name} failed: {last_line}", file=sys.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


# The parts: each prints its measurements and returns {key: figures} for --json


def print_logprobs(args, argv):
    print("logprobs: Qwen2.5-0.5B-shaped, random weights, 4 x 512 completion tokens,")
    print("  forward and backward, fp32; in brackets the ratio to the first line")
    texts = {
        "plain": "full logits, 4 rows at once",
        "head": "without the logits, 4 rows at once",
        "row": "without the logits, one row at a time",
    }
    found = {name: measure(name, argv) for name in texts}
    plain = found["plain"]
    for name, got in found.items():
        memory, seconds = got["peak"] / plain["peak"], got["seconds"] / plain["seconds"]
        mib = f"{got['peak']:6.0f} MiB ({memory:.2f})"
        print(f"  {texts[name]:38} {mib} {got['seconds']:7.1f} s ({seconds:.2f})")
    return {"logprobs": {"memory_ratio": memory, "time_ratio": seconds}}  # of "row"


def print_rollout(args, argv):
    got = measure("rollout", argv)
    ratio = got["ours"] / got["plain"]
    print(f"rollout: {args.model}, {args.dtype}, {got['rows']} rows")
    print(f"  generate as it comes    {got['plain']:6.0f} tokens/s")
    print(f"  --cache static          {got['static']:6.0f} tokens/s")
    print(f"  train.py's default      {got['ours']:6.0f} tokens/s ({ratio:.2f}x the first line)")
    print(f"    before the first token {got['prompt']:.0%} of the time")
    print(f"    after it {got['token']:.1f} ms per token of all rows")
    print(f"    to read every weight once takes {got['weights']:.1f} ms")
    return {"rollout": {"tokens_per_s": got["ours"], "tokens_per_s_ratio": ratio}}


def print_step(args, argv):
    print(f"step: {args.model}, {args.dtype}, mean of {args.steps}")
    step = measure("ours", argv)
    prompts = step.pop("prompts")
    if not args.peer:
        print_speed("train.py", step)
        return {"step": step}
    peer = measure("trl", argv)
    if peer.pop("prompts") != prompts:
        sys.exit("bench.py: the two trainers were not given the same prompts: no comparison")
    print_speed("train.py", step)
    print_speed(f"TRL {importlib.metadata.version('trl')}", peer)
    speed = step["tokens_per_s"] / peer["tokens_per_s"]
    memory = step["peak_mib"] / peer["peak_mib"]
    print(
        f"  train.py / TRL: {speed:.2f}x the tokens/s, "
        f"{memory:.2f}x the memory above weights and AdamW's state"
    )
    peer["tokens_per_s_ratio"], peer["memory_ratio"] = speed, memory
    return {"step": step, "peer": peer}


def print_speed(name, got):
    memory = f"{got['peak_mib']:6.0f} MiB above weights and AdamW's state"
    line = (
        f"  {name:10} {got['tokens_per_s']:7.1f} tokens/s, {memory}, {got['step_s']:.2f} s per step"
    )
    if "rollout_s" in got:
        line += f", of which rollout {got['rollout_s']:.2f} s"
    print(line)


PRINT = {
    "logprobs": print_logprobs,
    "rollout": print_rollout,
    "step": print_step,
}


def measure_here(name, args, device):
    """Print the result of one of MEASUREMENTS as JSON; a wrong model or data gives status 2."""
    try:
        print(json.dumps(MEASUREMENTS[name](args, device)))
    except (ValueError, OSError) as error:  # the user's; a traceback is for our bugs
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    """Run the command line. Raises SystemExit on a wrong one, or if a measurement fails."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure:
        measure_here(args.measure, args, device)
        return
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = (
        f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    )
    print(f"{name}, {torch.get_num_threads()} threads, {versions}", flush=True)
    found = {}
    for part in args.parts:
        found.update(PRINT[part](args, argv))
        if args.json:  # after each part: they take minutes
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
