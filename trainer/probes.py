"""Find out, at the start of a run, which shortcuts give right results for a model.

The reference is the plainest computation: one row alone, without padding and without a cache, in
eval mode. A shortcut whose results differ from it is not used. If no way of running the model is
right, the model is refused with a one-line reason.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from trainer.logprobs import Layout, token_logprobs
from trainer.packed import packable, packed
from trainer.sampling import generate, sampling_settings

TOLERANCE = 1e-3  # relative to the range of the compared values; fp32 rounding is below 1e-5
MOST_TOKENS = 32  # that generate is tried with: some errors grow with the cache


class Refused(ValueError):
    """No layout is right for this model; the message says why, in one line."""


class Rows(NamedTuple):
    """Rows to probe a model with."""

    prompts: list  # lists of token ids
    completions: torch.Tensor  # [B, T] token ids
    mask: torch.Tensor  # [B, T] bool

    def pick(self, which, tokens=None):
        """The rows with the indices `which`, their completions cut to `tokens` tokens."""
        prompts = [self.prompts[i] for i in which]
        return Rows(prompts, self.completions[which, :tokens], self.mask[which, :tokens])


def probe_rows(prompts, max_new_tokens, device):
    """Two Rows made of the run's own tokens: the longest possible, and a short one."""
    longest = max(prompts, key=len)
    shortest = min(prompts, key=len)
    repeats = max_new_tokens // len(longest) + 1
    tokens = torch.tensor((longest * repeats)[:max_new_tokens], device=device)
    completions = torch.stack([tokens, tokens.flip(0)])
    mask = torch.ones_like(completions, dtype=torch.bool)
    mask[1, 4:] = False
    return Rows([longest, shortest], completions, mask)


@torch.no_grad()
def probe(model, prompts, max_new_tokens, pad_id, cache="dynamic"):
    """The Layout for a run on these prompts (lists of token ids). cache: --cache.

    Prints each shortcut that cannot be used, and why. Raises Refused, a ValueError of one line, if
    no layout is right: the model is not causal, right padding or the length of a row changes its
    log-probabilities, generate samples from another distribution than the forward pass computes, or
    a forward pass changes the weights.
    """
    rows = probe_rows(prompts, max_new_tokens, model.device)
    versions = [weight._version for weight in model.parameters()]
    try:
        through_head = head_is_plain(model, rows.pick([1]))
        check_forward(model, rows, through_head)
        share_prompts = through_head and prompts_can_be_shared(model, rows, pad_id)
        equal_lengths = not share_prompts and must_be_equal(model, rows, pad_id, through_head)
    except Refused:
        raise
    except Exception as error:  # an architecture may fail in any way
        raise Refused(f"cannot run this model: {described(error)}") from None
    if versions != [weight._version for weight in model.parameters()]:
        raise Refused("cannot train this model: its forward pass changes its own weights")
    layout = Layout(through_head, share_prompts, equal_lengths, cache == "static")
    if layout.static_cache:
        check_static_cache(model, rows, pad_id, layout)
    return replace(layout, packed=packable(model) and packed_agrees(model, rows, pad_id))


def head_is_plain(model, rows):
    """Whether the logits are exactly the output head, a linear layer, on the last hidden states.

    Some architectures scale or cap the head's input or output (Gemma 2, Granite, Cohere). A hook
    multiplies the head's output by 1000, so that a cap shows even if the logits are small.
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
        why = "this model post-processes its logits (e.g. soft-capping)"
    except Exception as error:  # an architecture may fail in any way
        why = f"the output head cannot be run separately ({described(error)})"
    print(f"{why}: using the full-logits path, which takes more memory")
    return False


def check_forward(model, rows, through_head):
    """Raise Refused if later tokens or padding change a row's log-probabilities."""
    long = logprobs_of(model, rows.pick([0]), through_head)
    short = logprobs_of(model, rows.pick([1]), through_head)
    length = len(rows.prompts[0]) + rows.completions.shape[1]
    short_cut = logprobs_of(model, rows.pick([1], tokens=1), through_head)
    if not agree(short_cut, short[:1], span=short):
        raise Refused(
            "this is no causal language model: a later token changes the log-probability of an "
            "earlier one"
        )
    long_cut = logprobs_of(model, rows.pick([0], tokens=1), through_head)
    if not agree(long_cut, long[:1], span=long):
        raise Refused(
            f"this model's log-probabilities depend on the length of the row: at {length} tokens a "
            f"later token changes an earlier log-probability; pass a smaller --max-new-tokens"
        )
    if not agree(logprobs_of(model, rows, through_head), torch.cat([long, short])):
        raise Refused(
            f"this model's log-probabilities change when a short row is run in one batch with a "
            f"row of {length} tokens, padded on the right"
        )


def logprobs_of(model, rows, through_head, share_prompts=False):
    """token_logprobs of the rows in one batch, where mask is on, row after row. [N]"""
    logprobs, _ = token_logprobs(
        model,
        *rows,
        through_head=through_head,
        share_prompts=share_prompts,
    )
    return logprobs[rows.mask]


def must_be_equal(model, rows, pad_id, through_head):
    """Whether the prompts of a batch must be equally long: left padding changes what is sampled.

    Raises Refused if generate differs from the forward pass for a single prompt too.
    """
    plain = Layout(through_head)
    if generate_agrees(model, rows, pad_id, plain):
        return False
    for i in (0, 1):
        if not generate_agrees(model, rows.pick([i]), pad_id, plain):
            raise Refused(
                "generate samples from another distribution than this model's forward pass "
                "computes (does its cache change the result?): it cannot be trained on its samples"
            )
    print(
        "left padding changes this model's log-probabilities: only prompts of equal length are "
        "sampled in one batch"
    )
    return True


def generate_agrees(model, rows, pad_id, layout):
    """Whether greedy tokens have the same log-probabilities in generate and run row by row."""
    settings = sampling_settings(min(MOST_TOKENS, rows.completions.shape[1]), None, pad_id)
    drawn, got, _ = generate(model, rows.prompts, 2, 0, settings, layout, segment=1)  # [2 P, T]
    repeated = [prompt for prompt in rows.prompts for _ in range(2)]
    drawn_rows = Rows(repeated, drawn, torch.ones_like(drawn, dtype=torch.bool))
    one_by_one = [drawn_rows.pick([i]) for i in range(len(drawn))]
    want = [logprobs_of(model, row, layout.through_head) for row in one_by_one]
    return agree(got.flatten(), torch.cat(want))


def prompts_can_be_shared(model, rows, pad_id):
    """Whether one run of a prompt can serve several rows, in sampling and in the update.

    Not every architecture has a cache of keys and values that can be copied, or accepts positions.
    """
    try:
        three = rows.pick([0, 1, 1])
        shared = logprobs_of(model, three, True, share_prompts=True)
        same = agree(shared, logprobs_of(model, three, True))
        layout = Layout(through_head=True, share_prompts=True)
        if same and generate_agrees(model, rows, pad_id, layout):
            return True
        why = "sharing prompts changes this model's log-probabilities"
    except Exception as error:  # an architecture may fail in any way
        why = f"this model cannot continue from a copied cache ({described(error)})"
    print(f"{why}: running each prompt once per completion, which takes more time")
    return False


def check_static_cache(model, rows, pad_id, layout):
    """Raise Refused if generate with a cache of fixed shape samples from another distribution."""
    why = "the log-probabilities differ" if layout.share_prompts else "prompts cannot be shared"
    try:
        if layout.share_prompts and generate_agrees(model, rows, pad_id, layout):
            return
    except Exception as error:  # an architecture may fail in any way
        why = described(error)
    raise Refused(f"--cache static does not work with this model ({why}): leave it out")


def packed_agrees(model, rows, pad_id):
    """Whether generate draws from the same distribution with packed weights as with plain ones."""
    settings = sampling_settings(min(3, rows.completions.shape[1]), None, pad_id)
    prompt = rows.prompts[:1]
    _, want, _ = generate(model, prompt, 1, 0, settings)  # log-probabilities of greedy tokens
    try:
        with packed(model):
            _, got, _ = generate(model, prompt, 1, 0, settings)
        if agree(got, want):
            return True
        why = "packed weights change this model's log-probabilities"
    except Exception as error:  # an architecture may fail in any way
        why = f"this model's weights cannot be packed ({described(error)})"
    print(f"{why}: sampling with the plain ones, which takes more time")
    return False


def any_row(model):
    """One short row, as Rows."""
    vocabulary = len(model.get_input_embeddings().weight)
    tokens = torch.arange(8, device=model.device) % vocabulary
    prompt, completion = tokens[:2].tolist(), tokens[None, 2:]
    return Rows([prompt], completion, torch.ones_like(completion, dtype=torch.bool))


@torch.no_grad()
def check_adapters(model):
    """Raise Refused if the model cannot be run with the adapters of trainer/lora.py."""
    try:
        logprobs_of(model, any_row(model), False)
    except Exception as error:  # an architecture may fail in any way
        raise Refused(f"--lora does not work with this model: {described(error)}") from None


@torch.no_grad()
def train_mode_agrees(model):
    """Whether train mode computes the same log-probabilities as eval mode."""
    row = any_row(model)
    want = logprobs_of(model, row, False)
    model.train()
    try:
        return agree(logprobs_of(model, row, False), want)
    finally:
        model.eval()


def agree(got, want, span=None):
    """Whether two tensors differ by rounding only, relative to the range of span (or of want)."""
    scale = want if span is None else span
    allowed = TOLERANCE * (scale.max() - scale.min()) + 1e-4
    return bool((got - want).abs().max() <= allowed)  # False for NaN


def described(error):
    """A library's exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
