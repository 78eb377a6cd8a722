"""--eval-only: evaluate a model, print the results and keep them in eval.json."""

import json
from dataclasses import asdict

import torch

from run import checkpoint
from run.options import flag
from run.origin import data_checksum, other_inputs, versions, weights_checksum
from run.ownreward import load_reward
from run.progress import Evaluation
from trainer.bf16 import sampling_copy
from trainer.evaluate import evaluate, rows_of_evaluation
from trainer.grading import Grader

# Besides the model and the data, the results of an evaluation depend on these options.
RESULTS_DEPEND_ON = (
    "prompt",
    "reward",
    "temperature",
    "max_new_tokens",
    "dtype",
    "seed",
    "k",
    "eval_samples",
)


def evaluate_only(o, out, model, tokenizer, generation, problems):
    """--eval-only: print the results and write them to out/eval.json.

    Raises ValueError, before evaluating, if that file holds the results of another model, or of
    other data or options, unless --overwrite was given.
    """
    path = out / "eval.json"
    origin = {"checksum": data_checksum(problems), "weights": weights_checksum(model)}
    if path.exists() and not o.overwrite:
        refuse_other_results(path, o, origin)
    model = sampling_copy(model, o.dtype)
    rows = rows_of_evaluation(o, o.rows if o.sample_batch == "auto" else int(o.sample_batch))
    try:
        with Evaluation(problems, o.k) as progress:
            result = evaluate(
                model,
                tokenizer,
                problems,
                k=o.k,
                samples=o.draws,
                temperature=o.temperature,
                seed=o.seed + 10_000,
                rows_at_once=rows,
                progress=progress,
                grader=Grader(o, load_reward(o.reward)),
                **generation,
            )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of GPU memory with {rows} rows at once: pass --sample-batch {max(1, rows // 2)}"
        ) from None
    print_results(o, result)
    checkpoint.write_json(path, {"options": asdict(o), "versions": versions(), **origin, **result})
    print(f"written to {path}")


def print_results(o, result):
    """Two lines: the greedy accuracy, then avg@k and pass@k if k > 0."""
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


def refuse_other_results(path, o, origin):
    """Raise ValueError if the eval.json at `path` is of another evaluation than this one."""
    what_to_do = "name another --out, or pass --overwrite"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        options = held["options"]
        changed = [name for name in RESULTS_DEPEND_ON if options.get(name) != getattr(o, name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read: {what_to_do}") from None
    inputs = other_inputs(held, origin)
    if inputs:
        raise ValueError(
            f"{path} holds the results of {options.get('model')} on {options.get('data')}, "
            f"{inputs}: {what_to_do}"
        )
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path} was made with {flag(name)} {options.get(name)}, not {getattr(o, name)}: "
            f"{what_to_do}"
        )
