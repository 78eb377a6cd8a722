"""Evaluate a model with the options of a run; --eval-only prints the results and keeps them."""

from dataclasses import asdict

import torch

from run import checkpoint
from run.origin import data_checksum, versions, weights_checksum
from run.ownreward import load_reward
from run.progress import Evaluation
from trainer.bf16 import sampling_copy
from trainer.evaluate import evaluate, rows_of_evaluation
from trainer.grading import Grader


def evaluated(o, model, tokenizer, problems, generation, grader, rows, k, shown=0):
    """The results of trainer/evaluate.py. rows: of a training step's generate call."""
    with Evaluation(problems, k) as progress:
        return evaluate(
            model,
            tokenizer,
            problems,
            k=k,
            samples=o.draws,
            temperature=o.temperature,
            seed=o.seed + 10_000,
            rows_at_once=rows_of_evaluation(o, rows),
            progress=progress,
            grader=grader,
            shown=shown,
            **generation,
        )


def evaluate_only(o, out, model, tokenizer, generation, problems):
    """--eval-only: print the results and write them to out/eval.json. Raises ValueError."""
    origin = {"checksum": data_checksum(problems), "weights": weights_checksum(model)}
    rows = o.rows if o.sample_batch == "auto" else int(o.sample_batch)
    grader = Grader(o, load_reward(o.reward))
    model = sampling_copy(model, o.dtype)
    try:
        result = evaluated(o, model, tokenizer, problems, generation, grader, rows, o.k)
    except torch.OutOfMemoryError:
        rows = rows_of_evaluation(o, rows)
        raise ValueError(
            f"out of GPU memory with {rows} rows at once: pass --sample-batch {max(1, rows // 2)}"
        ) from None
    low, high = result["ci95"]
    print(
        f"greedy accuracy on {result['n']} problems: {result['accuracy']:.3f} "
        f"(95%: {low:.3f}-{high:.3f}), lenient {result['accuracy_lenient']:.3f}; "
        f"truncated {result['truncated']:.3f}"
    )
    if o.k:
        print(
            f"avg@{o.k} {result['avg_at_k']:.3f}, pass@{o.k} {result['pass_at_k']:.3f}, "
            f"{o.draws} samples per problem at temperature {o.temperature}"
        )
    path = out / "eval.json"
    checkpoint.write_json(path, {"options": asdict(o), "versions": versions(), **origin, **result})
    print(f"written to {path}")
