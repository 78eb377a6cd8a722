"""How good is a policy on held-out problems, and how sure can one be of it."""

import json
import math
from dataclasses import asdict

import torch
from tqdm import tqdm

from rewards import correct, extract_answer, true_answer
from trainer import checkpoint
from trainer.data import checksum
from trainer.origin import other_inputs, versions, weights_checksum
from trainer.policy import sample, sampling_copy


def wilson(successes, n, z=1.959964):
    """The 95% interval of a share, Wilson's score interval: (low, high). At n = 200 it is about +-7 points wide."""
    p, zz = successes / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n, c, k):
    """The chance that one or more of k completions, drawn from n of which c are right, is right: 1 - C(n-c, k)/C(n, k).

    The unbiased estimator of Chen et al., arXiv 2107.03374, Eq. 1; 1 - (1 - c/n)^k would be biased down. Needs k <= n.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def decode(tokenizer, rollout):
    """The text of each completion, without special tokens, up to its EOS.

    EOS itself is cut too: a tokenizer need not count a template's end of turn as special.
    """
    words = rollout.mask.sum(1) - (~rollout.truncated).long()
    rows = zip(rollout.completions.tolist(), words.tolist(), strict=True)
    return tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


def evaluate(
    model,
    tokenizer,
    problems,
    *,
    k,
    samples,
    temperature,
    seed,
    rows_at_once=128,
    quiet=True,
    **limits,
):
    """Greedy accuracy, strict and lenient, and `samples` draws a problem for avg@k and pass@k.

    problems: with "prompt_ids" and "answer". limits: what policy.sample takes besides. Leaves torch's
    random state as it was, so that how often one evaluates changes nothing of the training. Returns a dict:
    accuracy, accuracy_lenient, ci95 (of accuracy), avg_at_k, pass_at_k, k, n (problems), length (tokens), truncated.
    """
    prompts, answers = [p["prompt_ids"] for p in problems], [p["answer"] for p in problems]
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(
        total=len(problems) * (2 if k else 1),
        desc="evaluate",
        unit="problem",
        leave=False,
        disable=quiet,
    )
    with torch.random.fork_rng(devices), bar:
        torch.manual_seed(seed)
        common = dict(rows_at_once=rows_at_once, progress=bar, **limits)
        greedy = sample(model, prompts, 1, temperature=0, **common)
        drawn = sample(model, prompts, samples, temperature=temperature, **common) if k else None
    strict = sum(grade(correct, tokenizer, greedy, answers))
    lenient = sum(grade(matches, tokenizer, greedy, answers))
    n = len(problems)
    low, high = wilson(strict, n)
    result = {
        "accuracy": strict / n,
        "accuracy_lenient": lenient / n,
        "ci95": [low, high],
        "avg_at_k": None,
    }
    result |= {
        "pass_at_k": None,
        "k": k,
        "n": n,
        "length": greedy.mask.sum(1).float().mean().item(),
    }
    result["truncated"] = greedy.truncated.float().mean().item()
    if k:
        repeated = [answer for answer in answers for _ in range(samples)]
        right = grade(correct, tokenizer, drawn, repeated)
        counts = [int(sum(right[i : i + samples])) for i in range(0, len(right), samples)]
        result["avg_at_k"] = sum(counts) / len(right)
        result["pass_at_k"] = sum(pass_at_k(samples, c, k) for c in counts) / n
    return result


def grade(measure, tokenizer, rollout, answers):
    """measure(text, answer, truncated) of each completion: `correct` or `matches`. Returns a list."""
    texts, truncated = decode(tokenizer, rollout), rollout.truncated.tolist()
    return [measure(*row) for row in zip(texts, answers, truncated, strict=True)]


def matches(text, answer, truncated=False):
    """Whether the lenient answer, the last number if there is no marker, is the right one."""
    return extract_answer(text, lenient=True, truncated=truncated) == true_answer(answer)


# The options, besides the model and the data, that an evaluation's figures depend on.
FIGURES_OF = ("prompt", "temperature", "max_new_tokens", "dtype", "seed", "k", "eval_samples")


def evaluate_only(o, out, model, tokenizer, generation, problems):
    """--eval-only: print the figures and write them to out/eval.json.

    Raises ValueError, before the work, if that file holds the figures of another model, or of other
    data or options, unless --overwrite was given.
    """
    path = out / "eval.json"
    origin = {"checksum": checksum(problems), "weights": weights_checksum(model)}
    if path.exists() and not o.overwrite:
        refuse_other_figures(path, o, origin)
    model = sampling_copy(model, o.dtype)
    rows = o.rows if o.sample_batch == "auto" else int(o.sample_batch)
    try:
        result = evaluate(
            model, tokenizer, problems, k=o.k, samples=o.draws, temperature=o.temperature,
            seed=o.seed + 10_000, rows_at_once=rows, quiet=False, **generation,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of GPU memory with {rows} rows at once: pass --sample-batch {max(1, rows // 2)}"
        ) from None
    low, high = result["ci95"]
    print(f"greedy accuracy on {result['n']} problems: {result['accuracy']:.3f} (95%: {low:.3f}-{high:.3f}), lenient "
          f"{result['accuracy_lenient']:.3f}; truncated {result['truncated']:.3f}")  # fmt: skip
    if o.k:
        print(f"avg@{o.k} {result['avg_at_k']:.3f}, pass@{o.k} {result['pass_at_k']:.3f}, {o.draws} "
              f"samples a problem at temperature {o.temperature}")  # fmt: skip
    checkpoint.write_json(path, {"options": asdict(o), "versions": versions(), **origin, **result})
    print(f"written to {path}")


def refuse_other_figures(path, o, origin):
    """ValueError if the eval.json at path holds the figures of another evaluation than this one."""
    what_to_do = "name another --out, or pass --overwrite"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        options = held["options"]
        changed = [name for name in FIGURES_OF if options.get(name) != getattr(o, name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read: {what_to_do}") from None
    inputs = other_inputs(held, origin)
    if inputs:
        raise ValueError(
            f"{path} holds the figures of {options.get('model')} on {options.get('data')}, "
            f"{inputs}: {what_to_do}"
        )
    if changed:
        name = changed[0]
        flag = "--" + name.replace("_", "-")
        raise ValueError(
            f"{path} was made with {flag} {options.get(name)}, not {getattr(o, name)}: {what_to_do}"
        )
