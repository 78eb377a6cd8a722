"""Measure a policy on held-out problems: accuracy with its interval, avg@k and pass@k."""

import math

import torch

from trainer.decoding import decode, token_texts
from trainer.grading import Grader
from trainer.records import length_of_wrong
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
    progress=None,
    shown=0,
    grader=None,
    **generation,
):
    """Greedy accuracy, strict and lenient; if k > 0, also avg@k and pass@k from random samples.

    problems: with "prompt_ids" and "answer". grader: says what is right; None: rewards.correct.
    samples: completions per problem for these two. progress: hears `update(n)` when n problems are
    completed, first greedily, then by sampling. generation: the remaining keyword arguments of
    sampling.sample. Restores torch's random state, so evaluation never changes training. Returns
    the dict of `accuracy`, updated by that of `at_k`; "greedy": `greedy_lines` of `shown` problems.
    """
    grader = grader or Grader()
    devices = [model.device] if model.device.type == "cuda" else []
    generation.update(rows_at_once=rows_at_once, progress=progress)
    with torch.random.fork_rng(devices):
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
    `at_k` fills them in), k, n, length and length_wrong (means in tokens), truncated (proportion).
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
        "length_wrong": length_of_wrong(greedy.mask, right),
        "truncated": greedy.truncated.float().mean().item(),
    }


def greedy_lines(tokenizer, texts, right, greedy, problems):
    """One dict for each of the problems, the first ones of those that `greedy` answers.

    Its tokens' log-probabilities and entropies are in nats, at temperature 1.
    """
    lines = []
    for i, problem in enumerate(problems):
        n = int(greedy.mask[i].sum())  # tokens
        ids, ended = greedy.completions[i, :n].tolist(), not greedy.truncated[i]
        line = {
            "prompt": problem["question"],
            "completion": texts[i],
            "answer": problem["answer"],
            "right": right[i] > 0.5,
            "tokens": token_texts(tokenizer, ids, ended),
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


def rows_of_evaluation(o, sample_batch):
    """Rows per generate call of an evaluation; sample_batch: of a training step."""
    return sample_batch * LARGER if o.sample_batch == "auto" else sample_batch
