"""Split the rows of a mini-batch into micro-batches with little padding."""

import torch


def split_micro_batches(rollout, rows, size, share_prompts=False):
    """Split the indices `rows` into micro-batches of at most `size`, with little padding.

    Rows of similar length go together. If prompts are shared, rows with the same prompt go together
    instead where that runs fewer tokens.
    """
    by_length = rows[rollout.lengths[rows].argsort(stable=True)].split(size)
    if not share_prompts:
        return list(by_length)
    prompts = [tuple(prompt) for prompt in rollout.prompts]
    lengths = rollout.mask.sum(1).tolist()  # of the completions
    longest = {}  # completion of each prompt
    for i in rows.tolist():
        longest[prompts[i]] = max(longest.get(prompts[i], 0), lengths[i])

    def prompt_first(i):
        return longest[prompts[i]], prompts[i], lengths[i]

    by_prompt = torch.tensor(sorted(rows.tolist(), key=prompt_first)).split(size)

    def tokens(micro_batches):
        return sum(tokens_run(rows.tolist(), prompts, lengths) for rows in micro_batches)

    return list(min(by_length, by_prompt, key=tokens))


def tokens_run(rows, prompts, lengths):
    """Tokens run for one micro-batch with shared prompts, padding included.

    Each distinct prompt runs once. prompts: tuples of token ids. lengths: of the completions.
    """
    distinct = {prompts[i] for i in rows}
    prompt_tokens = len(distinct) * max(len(prompt) for prompt in distinct)
    completion_tokens = len(rows) * max(lengths[i] for i in rows)
    return prompt_tokens + completion_tokens
