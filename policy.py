"""The policy: load it, sample from it, and compute its log-probabilities without ever holding its logits.

Three facts shape this file. Sampling and training must mean the same distribution: softmax(logits / temperature) over
the whole vocabulary, nothing else. The logits are the largest tensor of all: 64 completions of 512 tokens of Qwen2.5's
151,936 words are 18.5 GiB in fp32, so they are made a few tokens at a time and never kept. And a group's G completions
have one prompt: causal attention gives it the same keys and values in every row, so it is run once, not G times.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as hf_logging

hf_logging.disable_progress_bar()  # "Loading weights" and the like, in the middle of our own lines
LOGITS_AT_ONCE = 2**24  # entries of one chunk of logits: 64 MiB in fp32


@dataclass
class Rollout:
    """B completions and what is known of them; a prompt's group_size rows are contiguous."""

    prompts: list  # B lists of token ids, without padding
    completions: torch.Tensor  # [B, T] token ids, right-padded
    mask: torch.Tensor  # [B, T] bool, on through the first EOS
    truncated: torch.Tensor  # [B] bool: no EOS within max_new_tokens
    problems: list = None  # B problems
    texts: list = None  # B completions, decoded
    right: torch.Tensor = None  # [B] 1 where the answer is right
    rewards: torch.Tensor = None  # [B] what is trained on
    old_logprobs: torch.Tensor = None  # [B, T] of the policy that sampled
    entropy: torch.Tensor = None  # [B, T] nats, of the policy that sampled
    ref_logprobs: torch.Tensor = None  # [B, T] of the start policy, only where a loss asks for it
    advantages: torch.Tensor = None  # [B] or [B, T]
    logprobs: torch.Tensor = None  # [B, T] of the policy at its latest update on the row

    @property
    def lengths(self):
        """Tokens of each row, prompt and completion together. [B], on the CPU"""
        return self.mask.sum(1).cpu() + torch.tensor([len(p) for p in self.prompts])

    def rows(self, start, stop):
        """The rows start..stop of what sampling and rewarding filled in."""
        return Rollout(*(getattr(self, name)[start:stop] for name in SAMPLED))

    @staticmethod
    def join(pieces):
        """One Rollout of several, completions padded to the longest."""
        width = max(piece.mask.shape[1] for piece in pieces)
        columns = {name: [getattr(piece, name) for piece in pieces] for name in SAMPLED}
        for name in ("completions", "mask"):
            columns[name] = [pad(x, (0, width - x.shape[1])) for x in columns[name]]
        return Rollout(*(sum(c, []) if isinstance(c[0], list) else torch.cat(c) for c in columns.values()))


SAMPLED = ("prompts", "completions", "mask", "truncated", "problems", "texts", "right", "rewards")


def load_policy(name, device="cpu"):
    """A causal language model with fp32 weights in eval mode, its tokenizer, and the set of its EOS ids.

    name: "tiny" (the embedded one), a local folder or a Hub name. Weights are read from safetensors alone and no code
    of the repository is run. Raises ValueError with one line if there is no such model, no tokenizer or no EOS, or if
    a weight is missing or not finite.
    """
    safe = {"trust_remote_code": False}
    if name == "tiny":  # the embedded one, wherever one stands
        name = str(Path(__file__).resolve().parent / "tiny")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
        if not tokenizer("1", add_special_tokens=False).input_ids:  # transformers makes up an empty one
            raise ValueError("its tokenizer has no vocabulary; is tokenizer.json missing?")
        if missing := found["missing_keys"]:  # transformers makes them up, at random
            raise ValueError(f"its files lack {len(missing)} weights, {min(missing)} among them.")
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("some of its weights are not finite.")
    except Exception as error:  # a dozen types, of transformers, safetensors and the Hub
        why = str(error).strip().split("\n")[0]
        where = "a local folder" if Path(name).is_dir() else "no local folder, nor found in the cache or on the Hub"
        line = f"cannot load the model {name!r} ({where}): {why} Pass --model FOLDER, or --preset tiny"
        raise ValueError(line) from None
    for module in model.modules():  # a policy is one function: the ratio would not be 1 with dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.to(device).eval(), tokenizer, *special_tokens(model, tokenizer)


def special_tokens(model, tokenizer):
    """(sorted EOS ids, pad id): every EOS that the generation config, the config or the tokenizer names."""
    eos = set()
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        eos |= set(named if isinstance(named, list) else [named]) - {None}
    # A tokenizer may name a word that its model has no row for: transformers adds a missing EOS or pad at the end.
    known = range(model.get_input_embeddings().weight.shape[0])
    eos &= set(known)
    if not eos:
        raise ValueError("the model names no EOS token (generation_config.eos_token_id): it could never learn to stop")
    pad = tokenizer.pad_token_id
    return sorted(eos), pad if pad in known else min(eos)  # the mask goes by position, so pad may be an EOS


def completion_mask(completions, eos_ids):
    """On through the first EOS inclusive, by position: the policy must learn to stop. [B, T] ids -> [B, T] bool"""
    is_eos = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).long()
    return is_eos.cumsum(1) - is_eos == 0


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
    return pad_sequence(rows, True, pad_id, padding_side="left"), pad_sequence(real, True, 0, padding_side="left")


@torch.no_grad()
def sample(
    model, prompts, n, *, temperature, max_new_tokens, eos_ids, pad_id, share_prompts=False, rows_at_once=None,
    progress=None,
):  # fmt: skip
    """n completions of each prompt by Hugging Face generate; temperature 0 is greedy.

    prompts: P lists of token ids. Returns a Rollout of P * n rows, on the model's device. Prompts of like length go
    together; rows_at_once bounds the rows of one generate call, None puts all in one. share_prompts runs each prompt
    once instead of n times (see prompts_can_be_shared); the completions are the same.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_call = len(prompts) if rows_at_once is None else max(1, rows_at_once // n)
    pieces = [None] * len(prompts)
    for start in range(0, len(prompts), per_call):
        chosen = order[start : start + per_call]
        ids, real = left_padded([prompts[i] for i in chosen], pad_id, model.device)
        which = torch.arange(len(chosen), device=model.device).repeat_interleave(n)
        shared = {"past_key_values": prefill(model, ids, real, which)} if share_prompts and n > 1 else {}
        # A whole config of our own: a model's generation_config may hide a top_k, top_p or repetition_penalty, and
        # then the sampler is not the policy whose gradient we take.
        drawn = (
            dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {"do_sample": False}
        )
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad_id, use_cache=True,
            repetition_penalty=1.0, **drawn,
        )  # fmt: skip
        with generation_config(model, config):
            out = model.generate(ids[which], attention_mask=real[which], generation_config=config, **shared)
        for i, rows in zip(chosen, out[:, ids.shape[1] :].split(n), strict=True):
            pieces[i] = rows
        if progress is not None:
            progress.update(len(chosen))
    completions = pad_sequence([row for rows in pieces for row in rows], True, pad_id)  # [P * n, T]
    ended = torch.isin(completions, torch.tensor(eos_ids, device=completions.device)).any(1)
    return Rollout([p for p in prompts for _ in range(n)], completions, completion_mask(completions, eos_ids), ~ended)


@contextlib.contextmanager
def generation_config(model, config):
    """generate fills what a config leaves unset from the model's own: for the time of a call, that is ours too."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


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
        logprobs = torch.empty(len(h), dtype=torch.promote_types(dtype, torch.float32), device=h.device)
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
        grad_weight = torch.zeros_like(head, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
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
    model, prompts, completions, mask, *, temperature=1.0, with_entropy=True, through_head=True, share_prompts=False
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
        logprobs, entropy = HeadLogprobs.apply(hidden, head.weight, bias, targets, temperature, with_entropy)
    else:
        logits = by_row(model, prompts, completions, mask)
        logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(1)  # [N, V]
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
    return run(input_ids=ids, attention_mask=attention.long(), use_cache=False)[0][row, starts[row] + t]


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
        return head_is_plain(model) and _same(model, tolerance, {"share_prompts": True}, {"share_prompts": False})
    except Exception:  # an architecture may refuse in any way
        return False


def _same(model, tolerance, one, other):
    """Whether two ways of token_logprobs agree on two ragged prompts and their completions."""
    ids = (torch.arange(24, device=model.device) % model.config.get_text_config().vocab_size).view(3, 8)
    mask = torch.ones(3, 6, dtype=torch.bool, device=model.device)
    mask[1, 3:] = False
    prompts = [ids[0, :2].tolist(), ids[0, :2].tolist(), ids[1, :5].tolist()]
    a, b = (token_logprobs(model, prompts, ids[:, 2:], mask, **way)[0] for way in (one, other))
    return bool((a - b).abs().max() < tolerance)


def rows_that_fit(model, tokens, budget=7 * 2**28, checkpointing=False):
    """How many rows of so many tokens go into one forward and backward pass with `budget` bytes of activations.

    A guess from the shapes, on the safe side; on CUDA an out-of-memory error corrects it by halving.
    """
    c = model.config.get_text_config()
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = 4 * (16 * c.hidden_size + 6 * inner)  # bytes a token: norms, q, k, v, attention, MLP, in fp32
    per_token = layer + c.num_hidden_layers * (4 * c.hidden_size if checkpointing else layer)
    return max(1, int(budget // (per_token * max(1, tokens))))


def micro_batches(rollout, rows, size, share_prompts=False):
    """The indices `rows` in pieces of at most `size`, so that as few tokens as can be are run, padding included.

    Rows of like length go together, or else, where prompts are shared, the rows of one group: whichever runs fewer.
    """
    by_length = rows[rollout.lengths[rows].argsort(stable=True)].split(size)
    if not share_prompts:
        return list(by_length)
    prompts, completion = [tuple(prompt) for prompt in rollout.prompts], rollout.mask.sum(1).tolist()
    longest = {}  # completion of each prompt
    for i in rows.tolist():
        longest[prompts[i]] = max(longest.get(prompts[i], 0), completion[i])
    grouped = sorted(rows.tolist(), key=lambda i: (longest[prompts[i]], prompts[i], completion[i]))

    def tokens(pieces):
        """What running them costs: each distinct prompt once, and each completion, all padded to the longest."""
        cost = 0
        for piece in map(torch.Tensor.tolist, pieces):
            distinct = {prompts[i] for i in piece}
            cost += len(distinct) * max(map(len, distinct)) + len(piece) * max(completion[i] for i in piece)
        return cost

    return list(min(by_length, torch.tensor(grouped).split(size), key=tokens))


def context_length(model):
    """The most tokens, prompt and completion together, that the model was built for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
