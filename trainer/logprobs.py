"""Log-probabilities of completion tokens, without ever holding the logits.

The logits are the largest tensor of all: 64 completions of 512 tokens over Qwen2.5's 151,936 words
take 18.5 GiB in fp32. They are computed a few tokens at a time and never kept. A group's G
completions share one prompt; causal attention gives it the same keys and values in every row, so
the prompt is run once instead of G times.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

LOGITS_AT_ONCE = 2**24  # entries of one chunk of logits: 64 MiB in fp32


@dataclass(frozen=True)
class Layout:
    """How the rows of one model can be run; probes.probe finds it once. As it stands: the plain way."""

    through_head: bool = False  # logits are just the output head on the last hidden states
    share_prompts: bool = False  # one run of a prompt serves all of its completions
    equal_lengths: bool = False  # only prompts of one length can be sampled in one batch


PLAIN = Layout()


class HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at one word a row, and the entropy, a chunk of rows at a time.

    Forward keeps only the log-sum-exp of each row. Backward makes a chunk's logits again, once, and turns them in
    place into d(logp)/d(logits) = (onehot - softmax) / temperature. Entropy carries no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropy):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        h, head = hidden.to(dtype), weight.to(dtype)
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        logprobs = torch.empty(
            len(h), dtype=torch.promote_types(dtype, torch.float32), device=h.device
        )
        logsumexp, entropy = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            z = chunk_logits(h[rows], head, bias, temperature)  # [chunk, V]
            lse = logsumexp[rows] = z.logsumexp(1)
            logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - lse
            if with_entropy:  # H = - sum p log p = lse - sum p z
                entropy[rows] = lse - (z - lse[:, None]).exp_().mul_(z).sum(1)
        ctx.save_for_backward(h, head, bias, targets, logsumexp)
        ctx.chunk, ctx.temperature, ctx.dtypes = chunk, temperature, (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, push, _):
        h, head, bias, targets, logsumexp = ctx.saved_tensors
        grad_h = torch.empty_like(h, dtype=ctx.dtypes[0])
        grad_weight = (
            torch.zeros_like(head, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        )
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(h), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            z = chunk_logits(h[rows], head, bias, ctx.temperature)
            scale = push[rows, None] / ctx.temperature  # [chunk, 1]
            z = z.sub_(logsumexp[rows, None]).exp_().mul_(-scale)  # - softmax push / temperature
            z = z.scatter_add_(1, targets[rows, None], scale)  # + onehot push / temperature
            if grad_bias is not None:
                grad_bias += z.sum(0)
            z = z.to(head.dtype)
            grad_h[rows] = z @ head
            if grad_weight is not None and grad_weight.dtype == z.dtype:
                grad_weight.addmm_(z.T, h[rows])  # in place: z^T h is as large as the head
            elif grad_weight is not None:
                grad_weight += z.T @ h[rows]
        return grad_h, grad_weight, grad_bias, None, None, None


def chunk_logits(hidden, head, bias, temperature):
    """[chunk, D] -> [chunk, V] logits / temperature, at least fp32."""
    z = hidden @ head.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if bias is not None:
        z += bias
    return z.div_(temperature) if temperature != 1 else z


def token_logprobs(
    model,
    prompts,
    completions,
    mask,
    *,
    temperature=1.0,
    with_entropy=True,
    through_head=True,
    share_prompts=False,
):
    """Log-probability of each completion token, and the entropy of the distribution it was drawn from.

    prompts: B lists of token ids; completions [B, T] ids; mask [B, T] bool, on for a row's first tokens. Returns
    logprobs and entropy (nats; zeros without with_entropy), both [B, T], 0 where mask is off; entropy has no graph.

    Only the hidden states that predict a completion token go through the output head, in chunks. share_prompts runs
    equal prompts once. through_head=False takes the model's own logits: the plain way, and right for any architecture.
    """
    targets = completions[mask]  # [N] the completion tokens, row after row
    if through_head:
        if share_prompts:
            hidden = shared_hidden(model, prompts, completions, mask)
        else:
            hidden = by_row(model.base_model, "last_hidden_state", prompts, completions, mask)
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        logprobs, entropy = HeadLogprobs.apply(
            hidden, head.weight, bias, targets, temperature, with_entropy
        )
    else:
        logits = by_row(model, "logits", prompts, completions, mask)
        logp = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        ).log_softmax(1)  # [N, V]
        logprobs = logp.gather(1, targets[:, None])[:, 0]
        entropy = -(logp.detach().exp() * logp.detach()).sum(1)
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def by_row(run, output, prompts, completions, mask):
    """The output called `output` of the model `run` where it predicts a completion token, [N, D or V].

    A row is prompt, completion, padding. Causal attention never looks to the right, so the padding
    changes nothing. The output at one token predicts the next.
    """
    rows = [torch.tensor(p, device=mask.device) for p in prompts]
    rows = [torch.cat([p, c[on]]) for p, c, on in zip(rows, completions, mask, strict=True)]
    ids = pad_sequence(rows, True, 0)  # [B, L]
    width = torch.tensor([len(row) for row in rows], device=mask.device)
    attention = torch.arange(ids.shape[1], device=mask.device) < width[:, None]
    starts = torch.tensor([len(p) - 1 for p in prompts], device=mask.device)
    row, t = mask.nonzero(as_tuple=True)
    # By name: the first output may be another one, such as the auxiliary loss of Mixtral's router.
    out = getattr(run(input_ids=ids, attention_mask=attention.long(), use_cache=False), output)
    return out[row, starts[row] + t]


def shared_hidden(model, prompts, completions, mask):
    """The same hidden states, [N, D], from a model that runs each distinct prompt once.

    Per row it then runs the prompt's last token and the completion without its last token; each of
    these predicts the next token.
    """
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    which = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=mask.device)  # [B]
    ids, real = left_padded(list(unique), 0, mask.device)  # [P, L]
    mask = mask[:, : int(mask.sum(1).max())]  # [B, T], T the longest's
    after = torch.arange(mask.shape[1], device=mask.device)
    cache = prefill(model, ids, real, which)
    hidden = model.base_model(
        input_ids=torch.cat([ids[which, -1:], completions[:, : len(after) - 1]], 1),
        attention_mask=torch.cat([real[which], mask[:, :-1].long()], 1),
        position_ids=real.sum(1)[which, None] - 1 + after,
        use_cache=True,
        **{cache_argument(model.base_model): cache},
    ).last_hidden_state
    return hidden[mask]


def prefill(model, ids, real, which):
    """Run each left-padded prompt without its last token, and copy its keys and values to each row.

    ids, real [P, L]: token ids, and 1 where they belong to the prompt; which [B]: the prompt of each
    row. Returns the cache of B rows, differentiable, to be passed as `cache_argument(model)`.
    """
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        positions = (real.cumsum(1) - 1).clamp(min=0)
        model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=real[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            **{cache_argument(model.base_model): cache},
        )
        cache.batch_select_indices(which)
    return cache


def cache_argument(model):
    """The name of the argument in which `model` takes a cache of keys and values.

    transformers 5.24 renamed `past_key_values` to `cache`, and 5.40 will no longer know the former.
    """
    return _cache_argument(type(model))


@functools.cache
def _cache_argument(kind):
    known = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def left_padded(prompts, pad_id, device):
    """(token ids, 1 where they belong to the prompt), both [P, L]."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    real = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, True, pad_id, padding_side="left")
    return ids, pad_sequence(real, True, 0, padding_side="left")
