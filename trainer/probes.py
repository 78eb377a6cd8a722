"""What an architecture allows is tried out at the start of a run, never assumed.

The reference is the plainest computation: one row alone, without padding and without a cache, in
eval mode. Whatever differs from it is not used, or the model is refused in one line that says why.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from trainer.logprobs import Layout, token_logprobs
from trainer.policy import generate, sampling_settings

TOLERANCE = 1e-3  # as a share of the range of the values compared; rounding in fp32 is below 1e-5


class Refused(ValueError):
    """No layout is right for this model; the line says why."""


class Rows(NamedTuple):
    """Rows to try a model with."""

    prompts: list  # lists of token ids
    completions: torch.Tensor  # [B, T] token ids
    mask: torch.Tensor  # [B, T] bool

    def pick(self, which, tokens=None):
        """The rows of the list `which`, their completions cut to `tokens`."""
        prompts = [self.prompts[i] for i in which]
        return Rows(prompts, self.completions[which, :tokens], self.mask[which, :tokens])


def probe_rows(prompts, max_new_tokens, device):
    """The longest row of a run and a short one, made of the run's own tokens."""
    longest, shortest = max(prompts, key=len), min(prompts, key=len)
    repeats = max_new_tokens // len(longest) + 1
    tokens = torch.tensor((longest * repeats)[:max_new_tokens], device=device)
    completions = torch.stack([tokens, tokens.flip(0)])
    mask = torch.ones_like(completions, dtype=torch.bool)
    mask[1, 4:] = False
    return Rows([longest, shortest], completions, mask)


@torch.no_grad()
def probe(model, prompts, max_new_tokens, pad_id):
    """The Layout for a run on these prompts (lists of token ids); prints what is given up and why.

    Raises Refused, a ValueError of one line, if no layout is right: the model is not causal, right padding or
    the length of a row changes its log-probabilities, generate samples from another distribution
    than the forward pass computes, or a forward pass changes the weights.
    """
    rows = probe_rows(prompts, max_new_tokens, model.device)
    versions = [weight._version for weight in model.parameters()]
    try:
        through_head = head_is_plain(model, rows.pick([1]))
        check_forward(model, rows, through_head)
        equal_lengths = must_not_be_left_padded(model, rows, pad_id, through_head)
    except Refused:
        raise
    except Exception as error:  # an architecture may fail in any way
        raise Refused(f"cannot run this model: {described(error)}") from None
    if versions != [weight._version for weight in model.parameters()]:
        raise Refused("cannot train this model: its forward pass changes its own weights")
    share_prompts = through_head and prompts_can_be_shared(model, rows, pad_id)
    return Layout(through_head, share_prompts, equal_lengths)


def head_is_plain(model, rows):
    """Whether logits are just the output head, a linear layer, on the last hidden states.

    Some architectures scale or cap the input or the output of the head (Gemma 2, Granite, Cohere).
    The head's output is multiplied by 1000 on the way: a cap shows however small the logits are.
    """
    seen = {}

    def enlarge(head, inputs, output):
        seen["input"], seen["output"], seen["large"] = inputs[0], output, output * 1000
        return seen["large"]

    try:
        head = model.get_output_embeddings()
        ids = torch.tensor(rows.prompts, device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hook = head.register_forward_hook(enlarge)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        by_hand = linear(hidden, head.weight, getattr(head, "bias", None))
        plain = agree(seen["input"], hidden) and agree(seen["output"], by_hand)
        if plain and agree(logits, seen["large"]):
            return True
        why = "this model's logits are not just a linear head on its last hidden states"
    except Exception as error:  # an architecture may fail in any way
        why = f"the output head could not be run apart ({described(error)})"
    print(f"{why}: using the full-logits path, which takes more memory")
    return False


def check_forward(model, rows, through_head):
    """Raise Refused unless a row's log-probabilities are its own, whatever follows or pads it."""
    long, short = (logprobs_of(model, rows.pick([i]), through_head) for i in (0, 1))
    length = len(rows.prompts[0]) + rows.completions.shape[1]
    if not agree(logprobs_of(model, rows.pick([1], 1), through_head), short[:1], span=short):
        raise Refused(
            "this is no causal language model: a later token changes the log-probability of an "
            "earlier one"
        )
    if not agree(logprobs_of(model, rows.pick([0], 1), through_head), long[:1], span=long):
        raise Refused(
            f"this model's log-probabilities depend on the length of the row: at {length} tokens a "
            f"later token changes an earlier log-probability; pass a smaller --max-new-tokens"
        )
    if not agree(logprobs_of(model, rows, through_head), torch.cat([long, short])):
        raise Refused(
            f"this model's log-probabilities change where a short row is run beside one of {length} "
            f"tokens, padded on the right"
        )


def logprobs_of(model, rows, through_head, share_prompts=False):
    """token_logprobs of the rows in one batch, where mask is on, row after row. [N]"""
    how = {"through_head": through_head, "share_prompts": share_prompts}
    return token_logprobs(model, *rows, with_entropy=False, **how)[0][rows.mask]


def must_not_be_left_padded(model, rows, pad_id, through_head):
    """Whether generate differs from the forward pass for ragged prompts, and only for those.

    Raises Refused if it differs for prompts of equal length too.
    """
    tokens = min(3, rows.completions.shape[1])
    if generate_agrees(model, rows.prompts, tokens, pad_id, through_head):
        return False
    for prompt in rows.prompts:
        if not generate_agrees(model, [prompt], tokens, pad_id, through_head):
            raise Refused(
                "generate samples from another distribution than this model's forward pass "
                "computes (a cache that changes the result?): it cannot be trained on its samples"
            )
    print("left padding changes this model's log-probabilities: it samples prompts of one length "
          "at a time")  # fmt: skip
    return True


def generate_agrees(model, prompts, tokens, pad_id, through_head, share_prompts=False):
    """Whether greedy tokens have the same log-probabilities in generate and row by row."""
    settings = sampling_settings(0, tokens, None, pad_id)
    settings.update(return_dict_in_generate=True, output_logits=True)
    out = generate(model, prompts, 2, settings, share_prompts)
    drawn = out.sequences[:, -tokens:]  # [2 P, tokens]
    logprobs = torch.stack(out.logits, 1).float().log_softmax(-1)  # [2 P, tokens, V]
    got = logprobs.gather(2, drawn[..., None]).flatten()
    mask = torch.ones_like(drawn, dtype=torch.bool)
    rows = Rows([prompt for prompt in prompts for _ in range(2)], drawn, mask)
    want = [logprobs_of(model, rows.pick([i]), through_head) for i in range(len(drawn))]
    return agree(got, torch.cat(want))


def prompts_can_be_shared(model, rows, pad_id):
    """Whether one run of a prompt can serve several rows, in sampling and in the update.

    Not every architecture has a cache of keys and values that can be copied, or takes positions.
    """
    try:
        three = rows.pick([0, 1, 1])
        shared = logprobs_of(model, three, True, share_prompts=True)
        tokens = min(3, rows.completions.shape[1])
        if agree(shared, logprobs_of(model, three, True)) and generate_agrees(
            model, rows.prompts, tokens, pad_id, True, share_prompts=True
        ):
            return True
        why = "with a shared prompt the log-probabilities differ"
    except Exception as error:  # an architecture may fail in any way
        why = f"this model cannot continue from a copied cache ({described(error)})"
    print(f"{why}: running each prompt once per completion, which takes more time")
    return False


@torch.no_grad()
def train_mode_agrees(model):
    """Whether train mode, which gradient checkpointing needs, computes what eval mode computes."""
    tokens = torch.arange(8, device=model.device) % len(model.get_input_embeddings().weight)
    row = Rows([tokens[:2].tolist()], tokens[None, 2:], torch.ones_like(tokens[None, 2:]).bool())
    want = logprobs_of(model, row, False)
    model.train()
    try:
        return agree(logprobs_of(model, row, False), want)
    finally:
        model.eval()


def agree(got, want, span=None):
    """Whether two tensors differ by rounding only, on the scale of `span` (want, if not given)."""
    scale = want if span is None else span
    allowed = TOLERANCE * (scale.max() - scale.min()) + 1e-4
    return bool((got - want).abs().max() <= allowed)  # NaN is no agreement


def described(error):
    """A library's exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
