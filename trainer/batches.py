"""How many rows run at once, and which of them together."""

import torch
from tqdm import tqdm


class BatchSizes:
    """The most rows that run at once: --micro-batch in an update, --sample-batch in generate."""

    def __init__(self, options, micro_batch):
        """micro_batch: what --micro-batch auto chose, or its number."""
        sample_batch = options.rows if options.sample_batch == "auto" else options.sample_batch
        self.o = options
        self.rows = {"micro_batch": int(micro_batch), "sample_batch": int(sample_batch)}

    def keep_micro_batch(self, rows):
        """Take the micro-batch that a resumed run began with; None: a new run keeps its own.

        What fits depends on what else is in memory, and another size rounds differently: without
        this, the resumed run would not equal the uninterrupted one. Returns the micro-batch.
        """
        own = self.rows["micro_batch"]
        if rows not in (None, own):
            print(f"micro-batch: {rows} rows instead of {own}, because the run began with {rows}")
            self.rows["micro_batch"] = rows
        return self.rows["micro_batch"]

    def with_smaller(self, name, work):
        """work(size), with size = rows[name]; retries with half the size when out of GPU memory.

        Raises MemoryError if the user set the size, or if a single row does not fit.
        """
        option = "--" + name.replace("_", "-")
        while True:
            size = self.rows[name]
            try:
                return work(size)
            except torch.OutOfMemoryError:
                if getattr(self.o, name) != "auto" or size == 1:
                    raise MemoryError(
                        f"out of GPU memory with {option} {size}: try {option} auto, "
                        f"--gradient-checkpointing, or a smaller --max-new-tokens"
                    ) from None
            self.rows[name] = size // 2
            tqdm.write(f"out of GPU memory: {option} goes from {size} to {size // 2}")
            torch.cuda.empty_cache()


def split_micro_batches(rollout, rows, size, share_prompts=False):
    """Split the indices `rows` into micro-batches of at most `size`, with little padding.

    Rows of similar length go together. If prompts are shared, rows with the same prompt go together
    instead where that runs fewer tokens.
    """
    if not len(rows):
        return []
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
