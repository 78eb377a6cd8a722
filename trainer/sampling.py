"""Step 1 of the loop: sample completions with Hugging Face `generate`.

The distribution is softmax(logits / temperature) over the whole vocabulary, without top-k, top-p or
penalties. The completions of a batch end at different times. `generate` would compute tokens for
all rows until the longest one has ended. So it is called for SEGMENT tokens at a time, and between
two calls the rows that have ended leave the batch and the cache of keys and values.

Token t of row i is decided by U[i, t], a random number drawn before the first token. So a
completion depends on its prompt and its row's random numbers alone: the size of the batches and the
rows that have ended change it only where rounding decides.

What it buys, in CPU time of one thread (fp32, a shared Ice Lake Xeon at 2.8 GHz): without segments,
sampling from the embedded model takes 1.8 times as long; with segments of 4 or 16 tokens 1.1 or 1.2
times. At Qwen2.5-0.5B's shape and 24 rows, `first_above` takes Draw from 42 ms per token to 20, and
a token step to 1.1 to 1.3 times its linear layers.
"""

import contextlib
import copy
import itertools

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor

from trainer.cache import cache_argument, left_padded, prefill, static_cache, with_room
from trainer.logprobs import PLAIN
from trainer.packed import packed
from trainer.rollout import Rollout

SEGMENT = 8  # tokens between two looks at which rows have ended
BLOCK = 1024  # tokens of the vocabulary whose probabilities are added up first


@torch.no_grad()
def sample(
    model,
    prompts,
    n,
    *,
    temperature,
    max_new_tokens,
    eos_ids,
    pad_id,
    layout=PLAIN,
    rows_at_once=None,
    progress=None,
    U=None,
):
    """Sample n completions of each prompt; temperature 0 is greedy.

    prompts: P lists of token ids. Returns a Rollout of P * n rows, on the model's device. Prompts
    of similar length are sampled together. layout: what the model allows (see probes.probe).
    rows_at_once: the most rows per generate call; None: all. Both change a completion only where
    rounding decides. U: of random_numbers; None: drawn here, unless temperature is 0.
    """
    if U is None and temperature > 0:
        U = random_numbers(len(prompts) * n, max_new_tokens)
    settings = sampling_settings(max_new_tokens, eos_ids, pad_id)
    size = len(prompts) if rows_at_once is None else max(1, rows_at_once // n)
    pieces = [None] * len(prompts)  # each prompt's n completions, log-probabilities, entropies
    with packed(model) if layout.packed else contextlib.nullcontext():
        for chosen in batches(prompts, size, layout.equal_lengths):
            batch = [prompts[i] for i in chosen]
            own = None if U is None else U.view(len(prompts), n, -1)[chosen].flatten(0, 1)
            columns = generate(model, batch, n, temperature, settings, layout, U=own)
            by_prompt = [column.split(n) for column in columns]
            for i, *piece in zip(chosen, *by_prompt, strict=True):
                pieces[i] = piece
            if progress is not None:
                progress.update(len(chosen))
    repeated = [prompt for prompt in prompts for _ in range(n)]
    columns = [list(itertools.chain(*column)) for column in zip(*pieces, strict=True)]
    return rollout_of(repeated, *columns, eos_ids, pad_id)


def rollout_of(prompts, completions, logprobs, entropy, eos_ids, pad_id):
    """A Rollout of rows of unequal length, whose values after the first EOS are arbitrary."""
    completions = pad_sequence(completions, batch_first=True, padding_value=pad_id)  # [P * n, T]
    logprobs, entropy = (pad_sequence(rows, batch_first=True) for rows in (logprobs, entropy))
    mask = completion_mask(completions, eos_ids)
    ended = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).any(1)
    logprobs, entropy = logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)
    return Rollout(prompts, completions, mask, ~ended, logprobs, entropy)


def random_numbers(rows, tokens):
    """U [rows, tokens]: the random number in [0, 1) that decides each token, in fp64.

    fp32 would have 2**24 values: most tokens of a probability below 6e-8 could never be drawn. From
    torch's CPU generator, so that the draws are the same on every device.
    """
    return torch.rand(rows, tokens, dtype=torch.float64)


def sampling_settings(max_new_tokens, eos_ids, pad_id):
    """The complete settings of generate: it takes the largest score, and `Draw` makes them."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        use_cache=True,
        repetition_penalty=1.0,
        do_sample=False,
    )


def completion_mask(completions, eos_ids):
    """Token ids [B, T] -> [B, T] bool, on up to and including the first EOS.

    EOS is included because the policy must learn to stop.
    """
    is_eos = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).long()
    return is_eos.cumsum(1) - is_eos == 0  # no EOS before this token


def batches(prompts, size, equal_lengths):
    """Indices of prompts, sorted by length, in batches of at most `size`.

    equal_lengths: each batch has prompts of one length only.
    """

    def length(i):
        return len(prompts[i])

    order = sorted(range(len(prompts)), key=length)
    parts = [order]
    if equal_lengths:
        parts = [list(part) for _, part in itertools.groupby(order, key=length)]
    result = []
    for part in parts:
        result += [part[start : start + size] for start in range(0, len(part), size)]
    return result


def generate(model, prompts, n, temperature, settings, layout=PLAIN, segment=SEGMENT, U=None):
    """n completions of each prompt, its rows contiguous; without U [P * n, T] it is greedy.

    Returns (ids, logprobs, entropy), all [P * n, T]: in nats, of the distribution that each token
    was drawn from. What follows a row's first EOS is arbitrary. Rows that have ended are dropped
    every `segment` tokens, if layout.share_prompts, and with a cache that is not static.
    """
    ids, real = left_padded(prompts, settings.pad_token_id, model.device)  # [P, L]
    which = torch.arange(len(prompts), device=model.device).repeat_interleave(n)  # [P * n]
    draw = Draw(temperature, len(which), settings.max_new_tokens, model.device, U)
    with generation_config(model, settings):
        if layout.share_prompts:
            cache = prefill(model, ids, real, which)
        ids, real = ids[which], real[which]
        if not layout.share_prompts:
            drawn = extend(model, ids, real, draw, settings)
        elif layout.static_cache:
            cache = static_cache(model, cache, len(ids), ids.shape[1] + settings.max_new_tokens)
            drawn = extend(model, ids, real, draw, settings, cache)
        else:
            drawn = in_segments(model, ids, real, draw, settings, with_room(cache), segment)
    # On a GPU generate may run a token further before it sees that all rows have ended.
    stop = drawn.shape[1]
    return drawn, draw.logprobs[:, :stop], draw.entropy[:, :stop]


def in_segments(model, ids, real, draw, settings, cache, segment):
    """`extend` for rows ids [B, L] whose keys and values are in `cache`, without ended rows."""
    most, settings = settings.max_new_tokens, copy.copy(settings)
    completions = ids.new_full((len(ids), most), settings.pad_token_id)
    eos = torch.tensor(settings.eos_token_id or [], device=ids.device)
    for start in range(0, most, segment):
        settings.max_new_tokens = min(segment, most - start)
        drawn = extend(model, ids, real, draw, settings, cache)  # [rows, <= segment]
        stop = start + drawn.shape[1]
        completions[draw.rows, start:stop] = drawn
        going = ~torch.isin(drawn, eos).any(1)
        if not going.any():
            break
        ids, real = torch.cat([ids, drawn], 1), torch.cat([real, torch.ones_like(drawn)], 1)
        if not going.all():
            draw.rows, ids, real = draw.rows[going], ids[going], real[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
    return completions[:, :stop]


def extend(model, ids, real, draw, settings, cache=None):
    """One call of model.generate: the new ids, [B, T]."""
    given = {} if cache is None else {cache_argument(model): cache}
    out = model.generate(
        ids,
        attention_mask=real,
        generation_config=settings,
        logits_processor=[draw],
        **given,
    )
    return out[:, ids.shape[1] :]


class Draw(LogitsProcessor):
    """Draws each token from softmax(logits / temperature), and records what it was drawn from.

    generate calls it with the logits of each token, and takes the token with the largest result.
    """

    def __init__(self, temperature, rows, tokens, device, U=None):
        """U: [rows, tokens] in [0, 1), fp64; None: the most probable token instead."""
        self.temperature = temperature or 1.0
        self.U = None if U is None else U.to(device)
        self.logprobs = torch.zeros(rows, tokens, device=device)  # in nats
        self.entropy = torch.zeros_like(self.logprobs)  # in nats
        self.rows = torch.arange(rows, device=device)  # those that generate runs
        self.t = 0  # tokens drawn so far

    def __call__(self, input_ids, logits):
        """logits [B, V]: a copy that generate has made for this; it is overwritten."""
        if self.temperature != 1:
            logits /= self.temperature
        logits -= logits.amax(1, keepdim=True)  # log p plus a constant per row
        B, V = logits.shape
        blocks = logits.new_zeros(B, -(-V // BLOCK), BLOCK)
        p = blocks.view(B, -1)[:, :V]  # a view; probabilities but for the factor `total`
        torch.exp(logits, out=p)
        sums = blocks.sum(2)  # [B, n]
        total = sums.sum(1)  # [B]
        if self.U is None:
            token = logits.argmax(1, keepdim=True)  # [B, 1]
        else:
            token = first_above(self.U[self.rows, self.t, None], blocks, sums)
        # -sum p log p. Neither term is below 0, so nothing cancels where the entropy is near 0.
        self.logprobs[self.rows, self.t] = logits.gather(1, token)[:, 0] - total.log()
        self.entropy[self.rows, self.t] = total.log() - logits.mul_(p).sum(1) / total
        self.t += 1
        return torch.zeros_like(logits, dtype=torch.int8).scatter_(1, token, 1)


def first_above(u, blocks, sums):
    """The first token whose cumulative probability exceeds u, both [B, 1]: its block, then it.

    blocks [B, n, BLOCK]: probabilities, up to a factor per row. sums [B, n]: those of the blocks.
    """
    ends = pad(sums.double().cumsum(1), (1, 0))  # [B, n + 1], the first one is 0
    target = u * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True) - 1
    before, end = ends.gather(1, block), ends.gather(1, block + 1)
    share = ((target - before) / (end - before)).clamp(max=1 - 2**-53)  # rounding may give 1
    inside = blocks[torch.arange(len(u)), block[:, 0]].double().cumsum(1)  # [B, BLOCK]
    return block * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)


@contextlib.contextmanager
def generation_config(model, config):
    """Replace the model's generation config during the with block.

    generate takes settings that its argument leaves unset from the model's own generation config.
    """
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
