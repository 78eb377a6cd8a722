"""Log-probabilities of completion tokens, without ever holding the logits.

The logits are the largest tensor of all: 64 completions of 512 tokens over Qwen2.5's 151,936 words
take 18.5 GiB in fp32. They are computed a few tokens at a time and never kept. A group's G
completions share one prompt; causal attention gives it the same keys and values in every row, so
the prompt is run once instead of G times.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

LOGITS_AT_ONCE = 2**24  # entries of one chunk of logits: 64 MiB in fp32


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
            hidden = by_row(model.base_model, prompts, completions, mask)
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        logprobs, entropy = HeadLogprobs.apply(
            hidden, head.weight, bias, targets, temperature, with_entropy
        )
    else:
        logits = by_row(model, prompts, completions, mask)
        logp = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        ).log_softmax(1)  # [N, V]
        logprobs = logp.gather(1, targets[:, None])[:, 0]
        entropy = -(logp.detach().exp() * logp.detach()).sum(1)
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def by_row(run, prompts, completions, mask):
    """What the model puts out where it predicts a completion token, [N, D or V]; a row is prompt, completion, padding.

    Causal attention never looks to the right, so the padding reaches nothing. The output before a token predicts it.
    """
    rows = [torch.tensor(p, device=mask.device) for p in prompts]
    rows = [torch.cat([p, c[on]]) for p, c, on in zip(rows, completions, mask, strict=True)]
    ids = pad_sequence(rows, True, 0)  # [B, L]
    width = torch.tensor([len(row) for row in rows], device=mask.device)
    attention = torch.arange(ids.shape[1], device=mask.device) < width[:, None]
    starts = torch.tensor([len(p) - 1 for p in prompts], device=mask.device)
    row, t = mask.nonzero(as_tuple=True)
    return run(input_ids=ids, attention_mask=attention.long(), use_cache=False)[0][
        row, starts[row] + t
    ]


def shared_hidden(model, prompts, completions, mask):
    """The same hidden states, [N, D], of a model that runs each prompt once, however many rows have it.

    What it runs of a row is its prompt's last token and its completion but for the last, each predicting the next.
    """
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    which = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=mask.device)  # [B]
    ids, real = left_padded(list(unique), 0, mask.device)  # [P, L]
    mask = mask[:, : int(mask.sum(1).max())]  # [B, T], T the longest's
    after = torch.arange(mask.shape[1], device=mask.device)
    hidden = model.base_model(
        input_ids=torch.cat([ids[which, -1:], completions[:, : len(after) - 1]], 1),
        attention_mask=torch.cat([real[which], mask[:, :-1].long()], 1),
        position_ids=real.sum(1)[which, None] - 1 + after,
        past_key_values=prefill(model, ids, real, which), use_cache=True,
    ).last_hidden_state  # fmt: skip
    return hidden[mask]


def prefill(model, ids, real, which):
    """Run each left-padded prompt but for its last token, once, and give a copy of its keys and values to each row.

    ids, real [P, L]: token ids, and 1 where they are the prompt's; which [B]: the prompt of each row. Returns the cache
    of B rows, differentiable, for `past_key_values`.
    """
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        positions = (real.cumsum(1) - 1).clamp(min=0)
        model.base_model(
            input_ids=ids[:, :-1], attention_mask=real[:, :-1], position_ids=positions[:, :-1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache.batch_select_indices(which)
    return cache


def left_padded(prompts, pad_id, device):
    """(token ids, 1 where they are the prompt's), both [P, L]."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    real = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, pad_id, padding_side="left"), pad_sequence(
        real, True, 0, padding_side="left"
    )


@torch.no_grad()
def head_is_plain(model, tolerance=1e-3):
    """Whether logits are just the output head on the last hidden states: held against the model's own on a few tokens.

    Some architectures cap or scale them (Gemma, Granite, Cohere); for those token_logprobs must take the plain way.
    """
    if model.get_output_embeddings() is None:
        return False
    return _same(model, tolerance, {"through_head": True}, {"through_head": False})


@torch.no_grad()
def prompts_can_be_shared(model, tolerance=1e-3):
    """Whether running a prompt once for all its rows gives the same: held against whole rows on a few tokens.

    Not every architecture has a cache of keys and values whose rows can be copied, or is told positions.
    """
    try:
        return head_is_plain(model) and _same(
            model, tolerance, {"share_prompts": True}, {"share_prompts": False}
        )
    except Exception:  # an architecture may refuse in any way
        return False


def _same(model, tolerance, one, other):
    """Whether two ways of token_logprobs agree on two ragged prompts and their completions."""
    ids = (torch.arange(24, device=model.device) % model.config.get_text_config().vocab_size).view(
        3, 8
    )
    mask = torch.ones(3, 6, dtype=torch.bool, device=model.device)
    mask[1, 3:] = False
    prompts = [ids[0, :2].tolist(), ids[0, :2].tolist(), ids[1, :5].tolist()]
    a, b = (token_logprobs(model, prompts, ids[:, 2:], mask, **way)[0] for way in (one, other))
    return bool((a - b).abs().max() < tolerance)
