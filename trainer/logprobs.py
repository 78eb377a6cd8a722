"""Log-probabilities of completion tokens, without ever storing all logits.

The logits would be the largest tensor of a run: 64 completions of 512 tokens with Qwen2.5's
vocabulary of 151,936 take 18.5 GiB in fp32. They are computed in chunks of a few tokens, and only
the log-probabilities are kept. The G completions of a group share one prompt. With causal attention
its keys and values are the same in every row, so the prompt is run once instead of G times.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from trainer.cache import cache_argument, left_padded, prefill
from trainer.gradients import InPlace, add_product, cast

# Elements of one chunk of logits, by device: 64 MiB in fp32 on a CPU, 256 MiB on a GPU. Each chunk,
# [n, V], launches a dozen kernels and goes over the head's whole gradient, [V, D]. With Qwen2.5's
# vocabulary 2**24 elements are n = 110 rows, fewer than D = 896. On a GPU, where memory traffic
# takes the time, the gradient would then cost more than the logits: arithmetic, not measured.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}


@dataclass(frozen=True)
class Layout:
    """How the rows of a model can be run; probes.probe determines it once per run.

    The defaults are the plainest way, without any shortcut.
    """

    through_head: bool = False  # the logits are a linear head on the last hidden states
    share_prompts: bool = False  # run a prompt once for all of its completions
    equal_lengths: bool = False  # sample only prompts of equal length in one batch
    static_cache: bool = False  # sample with a cache of fixed shape (--cache static)
    packed: bool = False  # sample with weights laid out for this CPU


PLAIN = Layout()


class HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at each row's target token, and the entropy, in chunks.

    hidden [N, D], weight [V, D] and its cast, bias [V] or None, targets [N] -> log-probabilities
    [N], and entropy [N] in nats, without gradient. Forward keeps only the log-sum-exp of each row.
    Backward adds to weight.grad in place, as trainer/gradients.py does. It computes each chunk's
    logits again and turns them in place into the gradient

        d(logp)/d(logits) = (onehot - softmax) / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, head, bias, targets, temperature):
        h = hidden.to(head.dtype)
        chunk = max(1, logits_at_once(h.device.type) // len(head))  # rows
        result_dtype = torch.promote_types(head.dtype, torch.float32)
        logprobs = torch.empty(len(h), dtype=result_dtype, device=h.device)
        logsumexp = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            z = chunk_logits(h[rows], head, bias, temperature)  # [chunk, V]
            lse = logsumexp[rows] = z.logsumexp(1)
            logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - lse
            z -= lse[:, None]  # H = - sum p log p; lse - sum p z would cancel where H is near 0
            entropy[rows] = -z.exp().mul_(z).sum(1)
        ctx.save_for_backward(h, bias, targets, logsumexp)
        ctx.weight, ctx.head, ctx.chunk, ctx.temperature = weight, head, chunk, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, bias, targets, logsumexp = ctx.saved_tensors
        grad_h = torch.empty_like(h)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for start in range(0, len(h), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            z = chunk_logits(h[rows], ctx.head, bias, ctx.temperature)
            scale = grad[rows, None] / ctx.temperature  # [chunk, 1]
            z = z.sub_(logsumexp[rows, None]).exp_().mul_(-scale)  # - softmax grad / temperature
            z = z.scatter_add_(1, targets[rows, None], scale)  # + onehot grad / temperature
            if grad_bias is not None:
                grad_bias += z.sum(0)
            z = z.to(h.dtype)
            grad_h[rows] = z @ ctx.head
            if ctx.needs_input_grad[1]:
                add_product(ctx.weight, z, h[rows])
        return grad_h, None, None, grad_bias, None, None


def logits_at_once(kind):
    """Elements of one chunk of logits on a device of this type, such as "cpu"."""
    return LOGITS_AT_ONCE.get(kind, LOGITS_AT_ONCE["cpu"])


def chunk_logits(hidden, head, bias, temperature):
    """hidden [chunk, D] -> logits / temperature [chunk, V], in fp32 or wider."""
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
    through_head=True,
    share_prompts=False,
    casts=None,
):
    """The log-probability of each completion token, and the entropy of its distribution, in nats.

    prompts: B lists of token ids. completions: [B, T] ids. mask: [B, T] bool, on for the first
    tokens of a row. Returns (logprobs, entropy), both [B, T], 0 where mask is off; entropy has no
    graph. through_head: put only the needed hidden states
    through the output head, in chunks; share_prompts then runs equal prompts once. Without
    through_head it uses the model's own logits, which is right for any architecture. casts: of
    gradients.InPlace, which then runs the model.
    """
    targets = completions[mask]  # [N], row after row
    rows = prompts, completions, mask
    with nullcontext() if casts is None else InPlace(casts):
        if not through_head:
            logits = by_row(model, "logits", *rows)
        elif share_prompts:
            hidden = shared_hidden(model, *rows)
        else:
            hidden = by_row(model.base_model, "last_hidden_state", *rows)
    if through_head:
        head = model.get_output_embeddings()
        weight = cast(head.weight, {} if casts is None else casts)
        bias = getattr(head, "bias", None)
        both = HeadLogprobs.apply(hidden, head.weight, weight, bias, targets, temperature)
    else:
        both = from_logits(logits, targets, temperature)
    logprobs, entropy = both  # [N]
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def from_logits(logits, targets, temperature):
    """The log-probabilities and the entropy of `token_logprobs`, [N] each, of logits [N, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = (logits / temperature).log_softmax(1)  # [N, V]
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    logp = logp.detach()
    return logprobs, -(logp.exp() * logp).sum(1)  # H = - sum p log p


def by_row(run, output, prompts, completions, mask):
    """The model's output of that name, at each token that predicts a completion token. [N, D or V]

    run: the model. Each row is prompt, completion, padding. Causal attention never looks to the
    right, so the padding changes nothing. The output at one token predicts the next token.
    """
    device = mask.device
    rows = []
    for prompt, completion, on in zip(prompts, completions, mask, strict=True):
        rows.append(torch.cat([torch.tensor(prompt, device=device), completion[on]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=0)  # [B, L]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    attention = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, L]
    outputs = run(input_ids=ids, attention_mask=attention.long(), use_cache=False)
    # By name: the first output may be another, such as the auxiliary loss of Mixtral's router.
    states = getattr(outputs, output)  # [B, L, D or V]
    last_of_prompt = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    i, t = mask.nonzero(as_tuple=True)
    return states[i, last_of_prompt[i] + t]


def shared_hidden(model, prompts, completions, mask):
    """The last hidden states of `by_row`, [N, D], but each distinct prompt is run once.

    Each row then runs the prompt's last token, and the completion without its last token: every one
    of these tokens predicts the next.
    """
    device = mask.device
    prompts = [tuple(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: p for p, prompt in enumerate(distinct)}
    which = torch.tensor([number[prompt] for prompt in prompts], device=device)  # [B]
    ids, real = left_padded(distinct, 0, device)  # [P, L]
    cache = prefill(model, ids, real, which)
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]  # [B, T]
    last = real.sum(1)[which, None] - 1  # [B, 1], the position of the prompt's last token
    hidden = model.base_model(
        input_ids=torch.cat([ids[which, -1:], completions[:, : longest - 1]], 1),
        attention_mask=torch.cat([real[which], mask[:, :-1].long()], 1),
        position_ids=last + torch.arange(longest, device=device),
        use_cache=True,
        **{cache_argument(model.base_model): cache},
    ).last_hidden_state
    return hidden[mask]
