"""Measure a policy on held-out problems: accuracy with its interval, avg@k and pass@k."""

import json
import math
from dataclasses import asdict

import torch
from tqdm import tqdm

from run import checkpoint
from run.options import Options, flag
from run.origin import other_inputs, versions, weights_checksum
from trainer.data import checksum
from trainer.grading import Grader
from trainer.policy import sampling_copy
from trainer.sampling import sample

# Rows that an evaluation samples at once, of those of a training step: larger batches are faster,
# and gradients and activations take no memory then.
LARGER = 4


def wilson(successes, n, z=1.959964):
    """Wilson's score interval of a proportion: (low, high), 95% with the default z.

    At n = 200 it spans about +-7 percentage points.
    """
    p = successes / n
    zz = z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k): the probability that k completions, drawn without replacement from n
    of which c are right, include a right one.

    The unbiased estimator of Chen et al., arXiv 2107.03374, Eq. 1; 1 - (1 - c/n)^k is biased
    downwards. Needs k <= n.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def decode(tokenizer, rollout):
    """The text of each completion, without special tokens, up to its EOS.

    EOS itself is cut here: a tokenizer may not list the template's end of turn as special.
    """
    lengths = rollout.mask.sum(1) - (~rollout.truncated).long()  # without EOS
    rows = zip(rollout.completions.tolist(), lengths.tolist(), strict=True)
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
    shown=0,
    grader=None,
    **generation,
):
    """Greedy accuracy, strict and lenient; if k > 0, also avg@k and pass@k from random samples.

    problems: with "prompt_ids" and "answer". grader: says what is right; None: rewards.correct.
    samples: completions per problem for these two. generation: the remaining keyword arguments of
    sampling.sample. Restores torch's random state, so evaluation never changes training. Returns
    the dict of `accuracy`, updated by that of `at_k`; "greedy": `greedy_lines` of `shown` problems.
    """
    grader = grader or Grader(Options())
    devices = [model.device] if model.device.type == "cuda" else []
    total = len(problems) * (2 if k else 1)
    bar = tqdm(total=total, desc="evaluate", unit="problem", leave=False, disable=quiet)
    generation.update(rows_at_once=rows_at_once, progress=bar)
    with torch.random.fork_rng(devices), bar:
        torch.manual_seed(seed)
        greedy, drawn = completions(model, problems, samples if k else 0, temperature, generation)
    texts = decode(tokenizer, greedy)
    right = grade(grader.right, texts, problems, greedy)
    result = accuracy(right, grade(grader.lenient, texts, problems, greedy), greedy, k)
    if k:
        repeated = [problem for problem in problems for _ in range(samples)]
        drawn_right = grade(grader.right, decode(tokenizer, drawn), repeated, drawn)
        result.update(at_k(drawn_right, k, samples))
    if shown:
        result["greedy"] = greedy_lines(tokenizer, texts, right, greedy, problems[:shown])
    return result


def completions(model, problems, samples, temperature, generation):
    """(the greedy completions of the problems, `samples` random ones of each, None for 0)."""
    prompts = [problem["prompt_ids"] for problem in problems]
    greedy = sample(model, prompts, 1, temperature=0, **generation)
    if not samples:
        return greedy, None
    return greedy, sample(model, prompts, samples, temperature=temperature, **generation)


def accuracy(right, lenient, greedy, k):
    """What `evaluate` says of n greedy completions, from their grades, each 0 or 1.

    A dict: accuracy, accuracy_lenient, ci95 (of accuracy), avg_at_k and pass_at_k (None until
    `at_k` fills them in), k, n, length (mean, in tokens), truncated (proportion).
    """
    n, strict = len(right), sum(right)
    return {
        "accuracy": strict / n,
        "accuracy_lenient": sum(lenient) / n,
        "ci95": list(wilson(strict, n)),
        "avg_at_k": None,
        "pass_at_k": None,
        "k": k,
        "n": n,
        "length": greedy.mask.sum(1).float().mean().item(),
        "truncated": greedy.truncated.float().mean().item(),
    }


def greedy_lines(tokenizer, texts, right, greedy, problems):
    """One dict for each of the problems, the first ones of those that `greedy` answers.

    Its tokens' log-probabilities and entropies are in nats, at temperature 1.
    """
    lines = []
    for i, problem in enumerate(problems):
        n = int(greedy.mask[i].sum())  # tokens
        line = {
            "prompt": problem["question"],
            "completion": texts[i],
            "answer": problem["answer"],
            "right": right[i] > 0.5,
            "tokens": [tokenizer.decode([token]) for token in greedy.completions[i, :n].tolist()],
        }
        columns = {"logprobs": greedy.sampler_logprobs, "entropy": greedy.sampler_entropy}
        for name, values in columns.items():
            line[name] = [round(value, 6) for value in values[i, :n].tolist()]
        lines.append(line)
    return lines


def at_k(right, k, samples):
    """avg@k and pass@k from the grades of `samples` completions of each problem, as a dict."""
    starts = range(0, len(right), samples)
    counts = [int(sum(right[start : start + samples])) for start in starts]  # right per problem
    return {
        "avg_at_k": sum(counts) / len(right),
        "pass_at_k": sum(pass_at_k(samples, c, k) for c in counts) / len(counts),
    }


def grade(measure, texts, problems, rollout):
    """measure(text, problem, truncated) for each completion of the rollout, as a list.

    measure: a Grader's `right` or `lenient`. texts: the decoded completions.
    """
    rows = zip(texts, problems, rollout.truncated.tolist(), strict=True)
    return [measure(*row) for row in rows]


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


def rows_of_evaluation(o, sample_batch):
    """Rows per generate call of an evaluation; sample_batch: of a training step."""
    return sample_batch * LARGER if o.sample_batch == "auto" else sample_batch


def evaluate_only(o, out, model, tokenizer, generation, problems):
    """--eval-only: print the results and write them to out/eval.json.

    Raises ValueError, before evaluating, if that file holds the results of another model, or of
    other data or options, unless --overwrite was given.
    """
    path = out / "eval.json"
    origin = {"checksum": checksum(problems), "weights": weights_checksum(model)}
    if path.exists() and not o.overwrite:
        refuse_other_results(path, o, origin)
    model = sampling_copy(model, o.dtype)
    rows = rows_of_evaluation(o, o.rows if o.sample_batch == "auto" else int(o.sample_batch))
    try:
        result = evaluate(
            model,
            tokenizer,
            problems,
            k=o.k,
            samples=o.draws,
            temperature=o.temperature,
            seed=o.seed + 10_000,
            rows_at_once=rows,
            quiet=False,
            grader=Grader(o),
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
