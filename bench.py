"""Memory and speed, measured on this machine, each part against the plain way to do the same.

  logprobs   log-probabilities with and without the logits, of a Qwen2.5-0.5B-shaped model
  weights    bf16 compute: autocast over fp32 weights, against bf16 weights with an fp32 master copy
  rollout    generate as it comes, against each prompt run once; and against reading the weights once a token
  step       training steps of train.py; with --peer the same work by TRL's GRPOTrainer, in turn (pip install trl)

The last two take --model: the embedded one with the tiny preset as it stands, or a folder with what --prompts,
--group-size, --max-new-tokens and --micro-batch say. Every measurement is a process of its own, so that its peak is
its own, and what is compared runs in turn: on a busy machine trust the ratios, not the seconds.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from plot import Parser

QWEN = dict(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768,
)  # fmt: skip
SMOLLM2 = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
PARTS = ("logprobs", "weights", "rollout", "step")


def peak_bytes(device):
    """The most memory so far: CUDA's allocator, or the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(device):
    """Seconds, once the GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def random_batch(vocabulary, rows, tokens, device, prompt=64):
    """(prompts, completions [rows, tokens], mask), all of full length, as token_logprobs takes them."""
    prompts = [torch.randint(vocabulary, (prompt,)).tolist() for _ in range(rows)]
    ids = torch.randint(vocabulary, (rows, tokens), device=device)
    return prompts, ids, torch.ones_like(ids).bool()


# Each measurement: its arguments in, numbers out


def logprobs(args, device, through_head, size, rows=4, tokens=512):
    """Forward and backward over rows x tokens completion tokens, `size` rows at a time, fp32.

    Returns {"peak": MiB above the weights and their gradients, "seconds"}.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(device).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # touches the pages
    batch = random_batch(QWEN["vocab_size"], rows, tokens, device)
    push = torch.randn(rows, tokens, device=device)
    before, started = peak_bytes(device), clock(device)
    backward(model, batch, push, size, through_head=through_head)
    return {"peak": (peak_bytes(device) - before) / 2**20, "seconds": clock(device) - started}


def bf16_update(args, device, kind, rows=8, tokens=96, size=2, repeats=3):
    """An update of a SmolLM2-135M-shaped model in micro-batches of `size`, and what sampling needs made ready after it.

    kind: "autocast" is fp32 weights, of which a bf16 copy is made to sample; "master" is bf16 weights, which sample
    too, and an fp32 copy that AdamW updates. Returns {"peak": MiB, "seconds": the best of `repeats`}.
    """
    trained, batch, push = smollm2(device, rows, tokens)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    bf16, seconds = copy.deepcopy(trained).bfloat16() if kind == "master" else None, []
    pairs = list(zip(trained.parameters(), bf16.parameters(), strict=True)) if bf16 else []
    for _ in range(repeats):
        started = clock(device)
        backward(bf16 or trained, batch, push, size, autocast=kind == "autocast")
        for p, q in pairs:
            p.grad, q.grad = q.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in pairs:
                q.copy_(p)
        if not bf16:
            copy.deepcopy(trained).bfloat16()
        seconds.append(clock(device) - started)
    return {"peak": peak_bytes(device) / 2**20, "seconds": min(seconds)}


def bf16_error(args, device, rows=8, tokens=96, size=2):
    """Of the same gradient: ||g - g_fp32|| / ||g_fp32||, the whole batch at once and in micro-batches, both kinds."""
    trained, batch, push = smollm2(device, rows, tokens)
    backward(trained, batch, push, rows)
    want = [p.grad.clone() for p in trained.parameters()]
    found = {}
    for kind in ("autocast", "master"):
        model = trained if kind == "autocast" else trained.bfloat16()
        for at_once in (rows, size):
            model.zero_grad()
            backward(model, batch, push, at_once, autocast=kind == "autocast")
            off = sum(
                (p.grad.float() - g).square().sum()
                for p, g in zip(model.parameters(), want, strict=True)
            )
            found[f"{kind}/{at_once}"] = (off / sum(g.square().sum() for g in want)).sqrt().item()
    return found


def smollm2(device, rows, tokens):
    """(model with random weights, a random batch for token_logprobs, a random push)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(device).eval()
    return (
        model,
        random_batch(SMOLLM2["vocab_size"], rows, tokens, device),
        torch.randn(rows, tokens, device=device),
    )


def backward(model, batch, push, size, autocast=False, through_head=True):
    """Forward and backward of the batch, `size` rows at a time."""
    from trainer.logprobs import token_logprobs

    prompts, ids, mask = batch
    for piece in torch.arange(len(prompts)).split(size):
        with (
            torch.autocast(ids.device.type, torch.bfloat16)
            if autocast
            else contextlib.nullcontext()
        ):
            of_piece = [prompts[i] for i in piece], ids[piece], mask[piece]
            out, _ = token_logprobs(model, *of_piece, through_head=through_head)
        out.backward(gradient=push[piece])


def worth(text):
    """A reward that any model earns half the time, so that no group is dull and neither trainer is spared work."""
    return float(len(text) % 2)


def shared_options(args):
    """train.py's options of the work that --model and the rest describe."""
    from trainer.options import fill, parse

    if args.model == "tiny":
        return fill(parse(["--preset", "tiny", "--dtype", args.dtype, "--algo", "grpo"]))
    names = ("model", "data", "prompts", "group_size", "max_new_tokens", "micro_batch", "dtype")
    line = [
        part for name in names for part in ("--" + name.replace("_", "-"), str(getattr(args, name)))
    ]
    return fill(parse(["--preset", "gsm8k", "--algo", "grpo", "--updates", "1", *line]))


def rollout(args, device, repeats=2):
    """Sampling one step's completions: plain generate, with a static cache, and ours, each prompt run once.

    The same completions are drawn. Returns {"plain", "static", "ours": tokens/s, "prompt": share of our time that goes
    before the first token, "token": ms a token after that, "weights": ms to read every weight once, as a product with a
    vector, "ops": the share of time of the four costliest operations, "rows": of completions}.
    """
    from trainer import policy, start
    from trainer.policy import sample

    o = shared_options(args)
    model, _, limits, problems, _ = start.set_up(o)
    if args.dtype == "bf16":
        model = model.bfloat16()
    prompts = [p["prompt_ids"] for p in problems[: o.prompts]]

    def timed(**changed):
        seconds = []
        for _ in range(repeats):
            torch.manual_seed(0)
            started = clock(device)
            drawn = sample(model, prompts, o.group_size, temperature=1.0, **limits | changed)
            seconds.append(clock(device) - started)
        return min(seconds), drawn.mask

    whole = dataclasses.replace(limits["layout"], share_prompts=False)
    plain, mask = timed(layout=whole)
    ours, _ = timed()
    first, _ = timed(max_new_tokens=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        sample(model, prompts, o.group_size, temperature=1.0, **limits)
    ops = {
        op.key.removeprefix("aten::").strip("_"): op.self_cpu_time_total
        for op in profiled.key_averages()
    }
    ops = dict(
        sorted(((op, spent / sum(ops.values())) for op, spent in ops.items()), key=lambda x: -x[1])[
            :4
        ]
    )
    policy.GenerationConfig = functools.partial(
        policy.GenerationConfig, cache_implementation="static"
    )
    static, _ = timed(layout=whole)
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    vectors = [torch.randn(p.shape[1], dtype=p.dtype, device=device) for p in matrices]
    reads = []
    for _ in range(10):
        started = clock(device)
        for matrix, vector in zip(matrices, vectors, strict=True):
            matrix @ vector
        reads.append(clock(device) - started)
    count, longest = mask.sum().item(), mask.sum(1).max().item()
    found = {
        "plain": count / plain,
        "static": count / static,
        "ours": count / ours,
        "prompt": first / ours,
    }
    found |= {"weights": 1000 * min(reads), "ops": ops}
    return found | {"token": 1000 * (ours - first) / max(1, longest - 1), "rows": len(mask)}


def ours(args, device):
    """Training steps of train.py's own Trainer, after one to warm up."""
    import train
    from trainer import start

    o = shared_options(args)
    model, tokenizer, limits, problems, _ = start.set_up(o)
    trainer, prompts = train.Trainer(o, model, tokenizer, limits, problems), []

    def reward(text, problem, length, truncated):
        prompts.append(tokenizer.decode(problem["prompt_ids"]))
        return worth(text), worth(text)

    if args.peer:
        trainer.reward = reward
    lines = [trainer.step(step)[0] for step in range(1, 2 + args.steps)][1:]
    rows, rollouts = o.prompts * o.group_size, [line["rollout_s"] for line in lines]
    found = summary(
        [line["rollout_s"] + line["update_s"] for line in lines],
        [line["length"] * rows for line in lines],
        model,
    )
    return found | {"rollout_s": sum(rollouts) / len(rollouts), "prompts": prompts}


def trl(args, device):
    """The same by TRL's GRPOTrainer: same model, prompts in order, G, new tokens, micro-batch, dtype and steps."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trainer import start
    from trainer.data import problems_at

    o = shared_options(args)
    model, tokenizer, _, problems, _ = start.set_up(o)
    # those that our trainer comes to
    problems = problems_at(problems, o.seed, 0, args.prompts * (1 + args.steps))
    prompts = [tokenizer.decode(p["prompt_ids"]) for p in problems]
    batch, times, tokens, seen = args.prompts * args.group_size, [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(clock(device))

        def on_step_end(self, *_, **__):
            times[-1] = clock(device) - times[-1]

    def reward(prompts, completions, completion_ids, **_):
        seen.extend(prompts)
        tokens.append(sum(map(len, completion_ids)))
        return [worth(text) for text in completions]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, max_steps=1 + args.steps, per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=batch // args.micro_batch, num_generations=args.group_size,
            shuffle_dataset=False, max_completion_length=args.max_new_tokens, learning_rate=o.lr, beta=0.0,
            loss_type="grpo", temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, bf16=args.dtype == "bf16",
            use_cpu=device == "cpu", gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip
        trainer.train()
    return summary(times[1:], tokens[1 : 1 + len(times[1:])], model) | {"prompts": seen}


def summary(seconds, tokens, model):
    """What both trainers are asked for. peak_mib is above fp32 weights and AdamW's two moments, 12 bytes a weight."""
    peak = peak_bytes(model.device.type) - 12 * sum(p.numel() for p in model.parameters())
    return {
        "step_s": sum(seconds) / len(seconds), "tokens_per_s": sum(tokens) / sum(seconds), "peak_mib": peak / 2**20,
    }  # fmt: skip


MEASUREMENTS = {
    "plain": lambda *where: logprobs(*where, through_head=False, size=4),
    "head": lambda *where: logprobs(*where, through_head=True, size=4),
    "row": lambda *where: logprobs(*where, through_head=True, size=1),
    "autocast": lambda *where: bf16_update(*where, kind="autocast"),
    "master": lambda *where: bf16_update(*where, kind="master"),
    "error": bf16_error,
    "rollout": rollout,
    "ours": ours,
    "trl": trl,
}


def measure(name, argv):
    """What the measurement returns, run in a fresh process of this file."""
    line = [sys.executable, __file__, *argv, "--measure", name]
    # glibc keeps freed blocks that it did not map by themselves: map those of 4 MiB and more, so that the peak is what
    # was in use and not what was kept. The rollout's peak is not asked for.
    environment = os.environ | ({} if name == "rollout" else {"MALLOC_MMAP_THRESHOLD_": str(2**22)})
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        last_line = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"bench.py: {name} failed: {last_line}", file=sys.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


# Each part: its measurements, printed, and what of them goes into --json


def print_logprobs(args, argv):
    print(
        "logprobs: Qwen2.5-0.5B-shaped, random weights, 4 x 512 completion tokens, forward and backward, fp32"
    )
    found = {name: measure(name, argv) for name in ("plain", "head", "row")}
    texts = (
        "logits whole, 4 rows at once",
        "without the logits, 4 rows at once",
        "without the logits, a row at a time",
    )
    for got, text in zip(found.values(), texts, strict=True):
        memory, seconds = (got[key] / found["plain"][key] for key in ("peak", "seconds"))
        print(
            f"  {text:36} {got['peak']:6.0f} MiB ({memory:.2f}) {got['seconds']:7.1f} s ({seconds:.2f})"
        )
    return {"memory_ratio": memory, "time_ratio": seconds}


def print_weights(args, argv):
    print(
        "weights: SmolLM2-135M-shaped, random weights, an update of 8 x 96 tokens in micro-batches of 2, bf16 compute"
    )
    found, error = (
        {name: measure(name, argv) for name in ("autocast", "master")},
        measure("error", argv),
    )
    texts = ("autocast, a bf16 copy samples", "bf16 weights, an fp32 master copy")
    for (name, got), text in zip(found.items(), texts, strict=True):
        off = f"gradient off by {error[name + '/8']:.4f}, in micro-batches {error[name + '/2']:.4f}"
        print(f"  {text:36} {got['peak']:6.0f} MiB {got['seconds']:7.2f} s   {off}")
    return {
        f"{key}_ratio": found["autocast"][key] / found["master"][key] for key in ("peak", "seconds")
    }


def print_rollout(args, argv):
    got = measure("rollout", argv)
    print(f"rollout: {args.model}, {args.dtype}, {got['rows']} rows")
    print(
        f"  generate as it comes {got['plain']:.0f} tokens/s, with a static cache {got['static']:.0f}"
    )
    print(f"  each prompt run once {got['ours']:.0f} tokens/s ({got['ours'] / got['plain']:.2f}x)")
    print(f"  of that before the first token {got['prompt']:.0%}; a token of every row {got['token']:.1f} ms, "
          f"reading the weights once {got['weights']:.1f} ms")  # fmt: skip
    print("  mostly in", ", ".join(f"{op} {share:.0%}" for op, share in got["ops"].items()))
    return {"tokens_per_s": got["ours"], "tokens_per_s_ratio": got["ours"] / got["plain"]}


def print_step(args, argv):
    print(f"step: {args.model}, {args.dtype}, mean of {args.steps}")
    found = {name: measure(name, argv) for name in ("ours", *["trl"] * args.peer)}
    prompts = [got.pop("prompts") for got in found.values()]
    if prompts[0] != prompts[-1]:
        sys.exit(
            "bench.py: the two trainers were not given the same prompts: nothing here compares them"
        )
    for name, got in found.items():
        name = "train.py" if name == "ours" else f"TRL {importlib.metadata.version('trl')}"
        speed = f"{got['tokens_per_s']:7.1f} tokens/s {got['peak_mib']:6.0f} MiB, {got['step_s']:.2f} s a step"
        print(
            f"  {name:10} {speed}"
            + (f", {got['rollout_s']:.2f} of them rollout" if "rollout_s" in got else "")
        )
    if args.peer:
        speed, memory = (
            found["ours"][key] / found["trl"][key] for key in ("tokens_per_s", "peak_mib")
        )
        print(
            f"  train.py / TRL: {speed:.2f}x the tokens/s, {memory:.2f}x the memory above weights and AdamW's state"
        )
        found["trl"] |= {"tokens_per_s_ratio": speed, "memory_ratio": memory}
    return found


def main(argv=None):
    """Run the command line. Raises SystemExit on a wrong one, or where a measurement failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("bench.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        metavar="PART,...",
        default=",".join(PARTS),
        help=f"of {', '.join(PARTS)}; default: all",
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="let TRL's GRPOTrainer do the same steps; needs --model FOLDER",
    )
    parser.add_argument(
        "--model", default="tiny", help="of rollout and step: tiny, or a folder (default tiny)"
    )
    parser.add_argument(
        "--data",
        default="gsm8k",
        help="with --model FOLDER: what train.py's --data takes (default gsm8k)",
    )
    parser.add_argument("--prompts", type=int, default=2, help="with --model FOLDER (default 2)")
    parser.add_argument("--group-size", type=int, default=8, help="the same (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="the same (default 96)")
    parser.add_argument("--micro-batch", type=int, default=8, help="the same (default 8)")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="timed training steps, after one to warm up (default 3)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of rollout and step (default fp32)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there; a ratio is ours over the other's"
    )
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure:
        try:
            print(json.dumps(MEASUREMENTS[args.measure](args, device)))
        except (
            ValueError,
            OSError,
        ) as error:  # the user's model or data; a traceback is for our bugs
            print(" ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)
        return
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.model != "tiny" and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: no such folder; --model takes a model folder, or tiny")
    if args.peer and ("step" not in parts or args.model == "tiny"):
        parser.error(
            "--peer goes with the part step, and with --model FOLDER, a model of some size"
        )
    if args.peer and importlib.util.find_spec("trl") is None:
        parser.error("--peer needs TRL: pip install trl")
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{importlib.metadata.version('transformers')}", flush=True)  # fmt: skip
    found = {}
    for part in parts:
        got = globals()[f"print_{part}"](args, argv)
        found |= (
            {part: got}
            if part != "step"
            else {"step": got["ours"]} | ({"peer": got["trl"]} if args.peer else {})
        )
        if args.json:  # after each part: they take minutes
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
