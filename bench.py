"""Memory and speed, measured on this machine: log-probabilities without the logits, a training step, and TRL beside us.

  python bench.py                       the first two
  python bench.py --peer --model DIR    and the same work by TRL's GRPOTrainer, in turn (pip install trl)

Every measurement runs in a process of its own, so that its peak is its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

QWEN = dict(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768,
)  # fmt: skip
WAYS = {
    "plain": "whole logits, 4 rows at once",
    "head": "without the logits, 4 rows at once",
    "ours": "without the logits, a row at a time (--micro-batch 1)",
}


def peak_bytes(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_logprobs(way, device, rows=4, tokens=512, prompt=64, repeats=2):
    """Forward and backward of a Qwen2.5-0.5B-shaped model over rows x tokens completion tokens.

    Returns {"peak": bytes above the weights and their gradients, "seconds": the best of `repeats`}.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from policy import token_logprobs

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(device).eval()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        p.grad += 1  # touch the pages
    prompts = [torch.randint(QWEN["vocab_size"], (prompt,)).tolist() for _ in range(rows)]
    completions = torch.randint(QWEN["vocab_size"], (rows, tokens), device=device)
    mask = torch.ones_like(completions).bool()
    push = torch.randn(rows, tokens, device=device)
    before, seconds = peak_bytes(device), []
    for _ in range(repeats):
        started = time.perf_counter()
        for piece in torch.arange(rows).split(1 if way == "ours" else rows):
            logprobs, _ = token_logprobs(
                model, [prompts[i] for i in piece], completions[piece], mask[piece], temperature=1.0,
                through_head=way != "plain",
            )  # fmt: skip
            logprobs.backward(gradient=push[piece])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"peak": peak_bytes(device) - before, "seconds": min(seconds)}


def worth(text):
    """A reward that any model earns half the time, so that no group is dull and neither trainer is spared work."""
    return float(len(text) % 2)


def measure_ours(args):
    """Seconds a step and completion tokens/s of train.py's own Trainer, after one step to warm up."""
    import train
    from options import fill, parse

    o = fill(parse(shared_options(args)))
    model, tokenizer, limits, problems, _ = train.set_up(o)
    trainer = train.Trainer(o, model, tokenizer, limits, problems)
    if args.peer:
        trainer.reward = lambda text, *_: (worth(text),) * 2
    lines = []
    for step in range(1 + args.steps):
        line, _, _ = trainer.step(step + 1)
        lines.append(line)
    return summary(
        [line["rollout_s"] + line["update_s"] for line in lines[1:]],
        [line["length"] * args.prompts * args.group_size for line in lines[1:]],
        sum(p.numel() for p in model.parameters()), o["device"].partition(":")[0],
        rollout_s=[line["rollout_s"] for line in lines[1:]],
    )  # fmt: skip


def summary(seconds, tokens, parameters, device, rollout_s=None):
    """What both trainers are asked for. peak_mib is above fp32 weights and AdamW's two moments, 12 bytes a weight."""
    peak = peak_bytes(device) - 12 * parameters
    found = {
        "step_s": sum(seconds) / len(seconds),
        "tokens_per_s": sum(tokens) / sum(seconds),
        "peak_mib": peak / 2**20,
    }
    return found | ({"rollout_s": sum(rollout_s) / len(rollout_s)} if rollout_s else {})


def shared_options(args):
    given = {
        "algo": "grpo",
        "model": args.model,
        "data": args.data,
        "prompts": args.prompts,
        "group_size": args.group_size,
    }
    given |= {"max_new_tokens": args.max_new_tokens, "micro_batch": args.micro_batch, "dtype": args.dtype, "updates": 1}
    if args.model == "tiny":
        given = {"algo": "tepo", "dtype": args.dtype}
    line = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return ["--preset", "tiny" if args.model == "tiny" else "gsm8k", *line]


def measure_trl(args):
    """The same by TRL's GRPOTrainer: same model, prompts, G, new tokens, micro-batch, dtype and steps."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import train
    from data import encode_prompt
    from options import fill, parse

    o = fill(parse(shared_options(args)))
    model, tokenizer, _, problems, _ = train.set_up(o)
    prompts = [tokenizer.decode(encode_prompt(tokenizer, p["question"], o["prompt"])) for p in problems[:256]]
    batch, times, tokens = args.prompts * args.group_size, [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times[-1] = time.perf_counter() - times[-1]

    def reward(completions, completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [worth(text) for text in completions]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, max_steps=1 + args.steps, per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=batch // args.micro_batch, num_generations=args.group_size,
            max_completion_length=args.max_new_tokens, learning_rate=o["lr"], beta=0.0, loss_type="grpo",
            temperature=1.0, bf16=args.dtype == "bf16", use_cpu=o["device"] == "cpu", report_to=[],
            save_strategy="no", logging_steps=1,
            gradient_checkpointing=False, disable_tqdm=True, top_k=0, top_p=1.0, repetition_penalty=1.0,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"prompt": prompts})
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    count = sum(p.numel() for p in model.parameters())
    return summary(times[1:], tokens[1 : 1 + len(times[1:])], count, o["device"].partition(":")[0])


def in_process(kind, argv):
    """The measurement's JSON, from a fresh process of this file."""
    line = [sys.executable, __file__, "--measure", kind, *argv]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        sys.exit(f"bench.py: {kind} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="also run TRL's GRPOTrainer on the same work")
    parser.add_argument("--only", choices=("logprobs", "step"), help="this part alone")
    parser.add_argument("--model", default="tiny", help="of the step: tiny (its preset), or a folder (default tiny)")
    parser.add_argument("--data", default="tiny", help="of the step (default tiny)")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one to warm up (default 3)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", metavar="FILE", help="write what was printed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure:
        if args.measure in WAYS:
            found = measure_logprobs(args.measure, device)
        else:
            found = {"step": measure_ours, "trl": measure_trl}[args.measure](args)
        print(json.dumps(found))
        return
    if args.peer and args.model == "tiny":
        parser.error("--peer needs --model FOLDER, a model of some size")
    argv, found = sys.argv[1:], {}
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.only != "step":
        print("Qwen2.5-0.5B-shaped, random weights, 4 x 512 completion tokens, forward and backward, fp32")
        got = {way: in_process(way, []) for way in WAYS}
        for way, text in WAYS.items():
            memory, seconds = (got[way][key] / got["plain"][key] for key in ("peak", "seconds"))
            mib = got[way]["peak"] / 2**20
            print(f"  {text:55} {mib:7.0f} MiB ({memory:.2f})  {got[way]['seconds']:6.1f} s ({seconds:.2f})")
            found["logprobs"] = {"memory_ratio": memory, "time_ratio": seconds}
    if args.only != "logprobs":
        ours = found["step"] = in_process("step", argv)
        rest = f"rollout {ours['rollout_s']:.2f} s of {ours['step_s']:.2f} s a step"
        speed = f"{ours['tokens_per_s']:.1f} tokens/s, {ours['peak_mib']:.0f} MiB"
        print(f"train.py, {args.model}, {args.dtype}: {speed}; {rest}")
        if args.peer:
            trl = in_process("trl", argv)
            found["peer"] = {"tokens_per_s": trl["tokens_per_s"], "peak_mib": trl["peak_mib"]}
            found["peer"]["tokens_per_s_ratio"] = ours["tokens_per_s"] / trl["tokens_per_s"]
            found["peer"]["memory_ratio"] = ours["peak_mib"] / trl["peak_mib"]
            speed = f"{trl['tokens_per_s']:.1f} tokens/s, {trl['peak_mib']:.0f} MiB"
            print(f"TRL,      {args.model}, {args.dtype}: {speed}; {trl['step_s']:.2f} s a step")
            ratios = [found["peer"][key] for key in ("tokens_per_s_ratio", "memory_ratio")]
            print(
                "ours / TRL: {:.2f}x the tokens/s, {:.2f}x the memory above weights and AdamW's state".format(*ratios)
            )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
