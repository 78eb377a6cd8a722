"""policy.py: the sampler is the policy, the mask ends at EOS, log-probabilities without logits are
the same numbers.
"""

import math

import pytest
import torch
from conftest import tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trainer import logprobs, policy, sampling
from trainer.batches import split_micro_batches
from trainer.logprobs import Layout, select_rows, token_logprobs
from trainer.policy import special_tokens
from trainer.sampling import Rollout, completion_mask, sample

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4, 5], [6]]
COMPLETIONS = torch.tensor([[5, 6, 1, 0], [9, 8, 7, 6], [4, 0, 0, 0], [2, 1, 0, 0], [1, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def by_hand(model, temperature):
    """Each row alone, unpadded, through the model's own logits: the plainest way there is. [B, T]
    twice
    """
    logprobs, entropy = (
        torch.zeros(MASK.shape, dtype=torch.float64),
        torch.zeros(MASK.shape, dtype=torch.float64),
    )
    for i, prompt in enumerate(PROMPTS):
        row = COMPLETIONS[i][MASK[i]]
        logits = (
            model(torch.tensor([prompt + row.tolist()])).logits[0, len(prompt) - 1 : -1]
            / temperature
        )
        logp = logits.log_softmax(-1)
        logprobs[i, : len(row)] = logp[range(len(row)), row]
        entropy[i, : len(row)] = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "bias", "gpt2"])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_logprobs_without_logits_are_the_plain_ones(
    monkeypatch, chunk, temperature, kind, share_prompts
):
    model = (tiny_gpt2() if kind == "gpt2" else tiny_model()).double()
    if kind == "bias":  # an output head with a bias, and not tied to the embedding
        model.lm_head = torch.nn.Linear(16, 24).double()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": chunk * 24})
    push = (
        torch.randn(MASK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * MASK
    )
    want, want_entropy = by_hand(model, temperature)
    want.backward(push)
    want_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    how = {"temperature": temperature, "share_prompts": share_prompts}
    got, entropy = token_logprobs(model, PROMPTS, COMPLETIONS, MASK, **how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-10)
    assert not entropy.requires_grad
    got.backward(push)
    for p, grad in zip(model.parameters(), want_grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_prompts_backward_pass_is_that_of_one_graph(bf16, monkeypatch):
    """With a cache that holds more than keys and values, the graph is not cut."""
    plain, grads = logprobs.PLAIN_LAYERS, []
    for kinds in (plain, set()):
        monkeypatch.setattr(logprobs, "PLAIN_LAYERS", kinds)
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            got, _ = token_logprobs(model, PROMPTS, COMPLETIONS, MASK, share_prompts=True)
        got.backward(torch.ones_like(got))
        nodes, waiting = set(), [got.grad_fn]
        while waiting:
            node = waiting.pop()
            nodes.add(node.name())
            waiting += [following for following, _ in node.next_functions if following]
        assert ("PromptsLastBackward" in nodes) == (kinds is plain)
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02 if bf16 else 1e-5, atol=0.05 if bf16 else 1e-5)


def test_a_chunk_of_logits_is_larger_on_a_gpu_and_a_cpus_on_other_devices():
    cpu, cuda, other = map(logprobs.logits_at_once, ("cpu", "cuda", "mps"))
    assert cuda > cpu == other


def test_under_bf16_the_gradient_of_the_head_adds_up_in_fp32(monkeypatch):
    """1000 equal rows, one per chunk: in bf16 the sum would stand still at 256 of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).requires_grad_()
    hidden = torch.randn(1, 16, generator=generator).expand(1000, 16)
    grads = []
    for rows_per_chunk in (1, 1000):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": rows_per_chunk * 24})
        with torch.autocast("cpu", torch.bfloat16):
            targets = torch.full((1000,), 5)
            got, _ = logprobs.HeadLogprobs.apply(hidden, weight, None, targets, 1.0, False)
        grads += torch.autograd.grad(got.sum(), weight)
    torch.testing.assert_close(*grads, rtol=0.02, atol=1.0)  # of entries up to 1000


@pytest.mark.parametrize("rows", [[0], [1], [1, 4], [2, 4]])
def test_shared_prompts_alone_of_one_token_and_with_one_token_completions(rows):
    model = tiny_model().double()
    want, _ = by_hand(model, 1.0)
    prompts = [PROMPTS[i] for i in rows]
    got, _ = token_logprobs(model, prompts, COMPLETIONS[rows], MASK[rows], share_prompts=True)
    torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-10)


def test_a_shared_prompt_is_run_once():
    model, widths = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda m, a: widths.append(a[0].shape))
    token_logprobs(model, PROMPTS, COMPLETIONS, MASK, share_prompts=True)
    # Three prompts but for their last token; then, a row each, that and the completion but for its
    # own last.
    assert widths == [(3, 4), (5, 4)]
    widths.clear()
    generation = dict(temperature=1.0, max_new_tokens=2, eos_ids=[99], pad_id=0)
    sample(model, PROMPTS[:3], 4, layout=Layout(share_prompts=True), **generation)
    assert widths == [(3, 4), (12, 1), (12, 1)]


def test_the_gradient_of_copied_prompts_is_the_same_in_every_run():
    """With two threads too: both may add to one prompt's gradient, and rounding has an order."""
    torch.manual_seed(0)
    which = torch.arange(4).repeat(8)
    prompts, push = torch.randn(4, 4, 40, 32), torch.randn(32, 4, 40, 32)
    want = push.view(8, 4, 4, 40, 32).double().sum(0).float()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(20):
            keys, cache = prompts.clone().requires_grad_(), DynamicCache()
            cache.update(keys, prompts, 0)
            select_rows(cache, which)
            assert torch.equal(cache.layers[0].values, prompts[which])
            cache.layers[0].keys.backward(push)
            found.append(keys.grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], want)
    assert all(torch.equal(grad, found[0]) for grad in found)


SHARED = Layout(share_prompts=True)
STATIC = Layout(share_prompts=True, static_cache=True)
WAYS = [  # (layout, rows_at_once, segment, prompts in the order of)
    (SHARED, None, 8, [0, 1, 2, 3, 4]),
    (SHARED, 5, 1, [0, 1, 2, 3, 4]),
    (SHARED, 10, 3, [3, 1, 4, 0, 2]),
    (STATIC, 15, 8, [0, 1, 2, 3, 4]),
    (Layout(), 1, 8, [4, 3, 2, 1, 0]),
    (Layout(equal_lengths=True), None, 8, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("layout", "rows_at_once", "segment", "order"), WAYS)
def test_a_row_is_drawn_by_its_own_random_numbers_alone(
    monkeypatch, layout, rows_at_once, segment, order
):
    """Whatever rows are beside it, ended or not: they share no random number."""
    monkeypatch.setattr(sampling.generate, "__defaults__", (Layout(), segment, None))
    generation = dict(temperature=1.0, max_new_tokens=12, eos_ids=[1, 5], pad_id=0)
    model = tiny_model()
    torch.manual_seed(0)
    want = sample(model, PROMPTS, 5, **generation)
    lengths = want.mask.sum(1)
    assert lengths.min() < 4 and want.truncated.any() and len(want.completions.unique(dim=0)) > 20
    torch.manual_seed(0)
    U = torch.rand(5, 5, 12, dtype=torch.float64)[order].flatten(0, 1)
    prompts = [PROMPTS[i] for i in order]
    how = {"layout": layout, "rows_at_once": rows_at_once, "U": U}
    got = sample(model, prompts, 5, **how, **generation)
    back = torch.arange(25).view(5, 5)[torch.tensor(order).argsort()].flatten()
    assert torch.equal(got.mask[back], want.mask)
    assert torch.equal((got.completions * got.mask)[back], want.completions * want.mask)
    for name in ("sampler_logprobs", "sampler_entropy"):
        torch.testing.assert_close(getattr(got, name)[back], getattr(want, name))


def test_greedy_sampling_draws_no_random_number():
    model, before = tiny_model(), torch.get_rng_state()
    sample(model, PROMPTS, 2, temperature=0, max_new_tokens=4, eos_ids=[1], pad_id=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_way_is_the_same():
    model = tiny_model().double()
    want, want_entropy = by_hand(model, 1.3)
    got, entropy = token_logprobs(
        model, PROMPTS, COMPLETIONS, MASK, temperature=1.3, through_head=False
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-10)
    assert got.requires_grad and not entropy.requires_grad


def test_entropy_is_of_the_whole_vocabulary():
    model = tiny_model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    logprobs, entropy = token_logprobs(model, PROMPTS, COMPLETIONS, MASK)
    assert entropy[0, 0].item() == pytest.approx(math.log(24))
    assert logprobs[0, 0].item() == pytest.approx(-math.log(24))
    assert (entropy[~MASK] == 0).all()


def test_what_stands_where_mask_is_off_is_not_read():
    model, other = tiny_model(), COMPLETIONS.clone()
    other[~MASK] = 23
    a, _ = token_logprobs(model, PROMPTS, COMPLETIONS, MASK)
    b, _ = token_logprobs(model, PROMPTS, other, MASK)
    assert torch.equal(a, b)


def test_mask_runs_through_the_first_of_several_eos_even_where_pad_is_eos():
    ids = torch.tensor([[5, 1, 1, 1], [5, 2, 1, 7], [5, 6, 7, 8], [1, 0, 0, 0]])
    want = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert completion_mask(ids, [1, 2]).int().tolist() == want
    assert completion_mask(ids[:2], [2]).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_every_eos_that_anything_names_stops():
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[1, 2])
    model.config.eos_token_id = 4

    class Tokenizer:
        eos_token_id, pad_token_id = 3, None

    assert special_tokens(model, Tokenizer) == ([1, 2, 3, 4], 1)
    model.generation_config, model.config.eos_token_id, Tokenizer.eos_token_id = (
        GenerationConfig(),
        None,
        None,
    )
    with pytest.raises(ValueError, match="no EOS"):
        special_tokens(model, Tokenizer)


def hidden_defaults(model):
    """What Qwen2.5 ships, and worse: each of these would make the sampler another distribution than
    the policy.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.1, repetition_penalty=5.0,
        no_repeat_ngram_size=1, min_new_tokens=5, suppress_tokens=[5], eos_token_id=1,
    )  # fmt: skip
    return model


def test_the_sampler_is_the_policy():
    """Over 80 tokens: a hidden top_k of 50, the default of transformers, would show."""
    model = hidden_defaults(tiny_model(vocab=80))
    torch.manual_seed(0)
    n, temperature = 20_000, 4.0
    generation = dict(max_new_tokens=1, eos_ids=[1], pad_id=0)
    rollout = sample(model, [[3, 4, 5]], n, temperature=temperature, **generation)
    logits = model(torch.tensor([[3, 4, 5]])).logits[0, -1] / temperature
    want = logits.softmax(-1).double() * n
    got = torch.bincount(rollout.completions[:, 0], minlength=80).double()
    chi2 = ((got - want) ** 2 / want).sum().item()
    # the 99.9% point of chi-square with 79 degrees of freedom: nothing is cut, nothing sharpened
    assert chi2 < 123.6
    assert model.generation_config.top_k == 2  # and the model's own is put back


def test_greedy_is_the_argmax_without_penalties():
    model = hidden_defaults(tiny_model())
    rollout = sample(model, [[3, 4, 5]], 1, temperature=0, max_new_tokens=6, eos_ids=[1], pad_id=0)
    ids = [3, 4, 5]
    for token in rollout.completions[0][rollout.mask[0]].tolist():
        assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


def test_left_padding_changes_no_row_and_order_is_kept():
    model = tiny_model()
    together = sample(model, PROMPTS, 1, temperature=0, max_new_tokens=5, eos_ids=[1], pad_id=0)
    assert together.prompts == PROMPTS
    for at_once in (1, 2):
        split = sample(
            model,
            PROMPTS,
            1,
            temperature=0,
            max_new_tokens=5,
            eos_ids=[1],
            pad_id=0,
            rows_at_once=at_once,
        )
        assert torch.equal(split.mask, together.mask)
        assert torch.equal(split.completions * split.mask, together.completions * together.mask)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], 1, temperature=0, max_new_tokens=5, eos_ids=[1], pad_id=0)
        n = int(alone.mask.sum())
        assert together.completions[i, :n].tolist() == alone.completions[0, :n].tolist()


def test_generate_stops_at_each_of_several_eos():
    torch.manual_seed(0)
    generation = {"temperature": 1.0, "max_new_tokens": 8, "pad_id": 23}
    rollout = sample(tiny_model(), [[3, 4]], 64, eos_ids=[1, 2, 5], **generation)
    last = rollout.completions[range(64), rollout.mask.sum(1) - 1]
    assert {1, 2, 5} <= set(last.tolist())  # each of them ended a row
    assert (rollout.completions[~rollout.mask] == 23).all()  # and nothing was drawn after it


def test_truncated_is_told_from_ended():
    model = tiny_model()
    torch.manual_seed(0)
    rollout = sample(
        model, [[3, 4]] * 4, 8, temperature=1.0, max_new_tokens=8, eos_ids=[1, 2, 5], pad_id=1
    )
    for ids, mask, cut in zip(rollout.completions, rollout.mask, rollout.truncated, strict=True):
        own = ids[mask].tolist()
        assert cut == (not {1, 2, 5} & set(own)) and (not cut or len(own) == 8)
        assert not {1, 2, 5} & set(own[:-1])
    assert 0 < rollout.truncated.sum() < 32


def test_our_logprobs_are_those_of_what_generate_sampled_from():
    """Left-padded with a prompt's neighbours, or right-padded as in an update: the same numbers."""
    model = tiny_model()
    torch.manual_seed(0)
    rollout = sample(
        model, PROMPTS[:3], 4, temperature=0.9, max_new_tokens=6, eos_ids=[1], pad_id=0
    )
    ours, _ = token_logprobs(
        model, rollout.prompts, rollout.completions, rollout.mask, temperature=0.9
    )
    ids = torch.tensor([[0, 0, 3, 4, 5], [0, 0, 0, 0, 6], PROMPTS[2]]).repeat_interleave(4, 0)
    ids = torch.cat([ids, rollout.completions], 1)
    attention = torch.cat([ids[:, :5] != 0, torch.ones_like(rollout.completions) > 0], 1).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=attention, position_ids=positions).logits[:, 4:-1] / 0.9
    theirs = logits.log_softmax(-1).gather(2, rollout.completions[..., None])[..., 0]
    torch.testing.assert_close(ours[rollout.mask], theirs[rollout.mask], rtol=0, atol=1e-5)


def without_segments(model, prompts, n, **generation):
    """`sample` with one generate call for all rows, which runs until the last has ended."""
    return sample(model, prompts, n, layout=Layout(share_prompts=False), **generation)


@pytest.mark.parametrize("segment", [1, 3, 8])
def test_greedy_in_segments_draws_the_same_tokens(monkeypatch, segment):
    monkeypatch.setattr(sampling.generate, "__defaults__", (Layout(), segment, None))
    prompts = [[a, b] for a in range(3, 9) for b in range(3, 9)] + PROMPTS
    generation = dict(temperature=0, max_new_tokens=10, eos_ids=[2, 5, 9], pad_id=0)
    want = without_segments(tiny_model(), prompts, 1, **generation)
    got = sample(tiny_model(), prompts, 1, layout=Layout(share_prompts=True), **generation)
    assert 0 < want.truncated.sum() < len(prompts) and len(set(want.mask.sum(1).tolist())) > 2
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.completions, want.completions)  # both pad what follows an EOS
    torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs)
    torch.testing.assert_close(got.sampler_entropy, want.sampler_entropy)


@pytest.mark.parametrize("segment", [1, 2])
def test_in_segments_each_completion_has_the_probability_of_the_policy(monkeypatch, segment):
    """All completions of up to three tokens over a vocabulary of 4, of which 1 ends a row."""
    monkeypatch.setattr(sampling.generate, "__defaults__", (Layout(), segment, None))
    model, n, temperature = tiny_model(vocab=4), 20_000, 2.0
    generation = dict(temperature=temperature, max_new_tokens=3, eos_ids=[1], pad_id=0)
    torch.manual_seed(0)
    rollout = sample(model, [[3, 2]], n, layout=Layout(share_prompts=True), **generation)
    drawn = [tuple(ids[on].tolist()) for ids, on in zip(*rows_of(rollout), strict=True)]
    want = {}
    waiting = [((), 1.0)]
    while waiting:
        ids, p = waiting.pop()
        if len(ids) == 3 or ids[-1:] == (1,):
            want[ids] = p
            continue
        logits = model(torch.tensor([[3, 2, *ids]])).logits[0, -1].double() / temperature
        waiting += [((*ids, v), p * q) for v, q in enumerate(logits.softmax(0).tolist())]
    assert len(want) == 1 + 3 + 9 * 4 and set(drawn) <= set(want)
    chi2 = sum((drawn.count(ids) - n * p) ** 2 / (n * p) for ids, p in want.items())
    assert chi2 < 72.1  # the 99.9% point of chi-square with 39 degrees of freedom


def rows_of(rollout):
    return rollout.completions, rollout.mask


def test_ended_rows_are_not_run_again():
    model, rows = tiny_model(), []
    generation = dict(temperature=1.0, max_new_tokens=24, eos_ids=[1, 2, 3], pad_id=0)
    torch.manual_seed(0)
    model.model.embed_tokens.register_forward_pre_hook(lambda m, a: rows.append(a[0].shape))
    rollout = sample(model, PROMPTS[:3], 8, layout=Layout(share_prompts=True), **generation)
    lengths = rollout.mask.sum(1)
    want = []  # rows of each token's pass: those that had not ended when its segment of 8 began
    for t in range(int(lengths.max())):
        want.append((int((lengths > t // 8 * 8).sum()), 1))
    assert rows[1:] == want and want[-1] < want[0]


def test_draw_takes_the_first_token_whose_cumulative_probability_is_above_u():
    """Tokens of probability 0 are never drawn, at the ends and in the middle."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    largest = 1 - 2.0**-53  # that torch.rand returns
    us = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, largest], dtype=torch.float64)
    draw = sampling.Draw(2.0, 6, 1, "cpu", us[:, None])
    scores = draw(None, (2 * p.log() + 3).expand(6, 6))
    assert scores.argmax(1).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw.logprobs.exp().flatten().tolist() == pytest.approx(
        [0.25, 0.25, 0.5, 0.5, 0.25, 0.25]
    )


@pytest.mark.parametrize("layout", [Layout(), Layout(share_prompts=True)])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_samplers_logprobs_and_entropy_are_those_of_the_policy(layout, temperature):
    model = tiny_model()
    torch.manual_seed(0)
    generation = dict(max_new_tokens=20, eos_ids=[1, 2], pad_id=0)
    rollout = sample(model, PROMPTS, 3, temperature=temperature, layout=layout, **generation)
    ours, entropy = token_logprobs(
        model, rollout.prompts, *rows_of(rollout), temperature=temperature or 1.0
    )
    torch.testing.assert_close(rollout.sampler_logprobs, ours.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.sampler_entropy, entropy, rtol=0, atol=1e-5)


def test_a_cache_with_room_holds_what_a_growing_one_holds():
    torch.manual_seed(0)
    plain, roomy = DynamicCache(), DynamicCache()
    for cache in (plain, roomy):
        cache.update(torch.ones(3, 2, 4, 5), torch.zeros(3, 2, 4, 5), 0)
    sampling.with_room(roomy)
    buffers = set()
    for step in range(40):
        new = (
            torch.randn(len(plain.layers[0].keys), 2, 1, 5),
            torch.randn(1).expand(len(plain.layers[0].keys), 2, 1, 5),
        )
        for want, got in zip(plain.update(*new, 0), roomy.update(*new, 0), strict=True):
            assert torch.equal(got, want)
        if step == 20:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor([2, 0]))
        buffers.add(roomy.layers[0].keys.data_ptr())
    assert roomy.get_seq_length() == 44 and len(buffers) < 8  # not a new one per token


def test_a_static_cache_draws_the_same_and_is_kept_for_the_next_call():
    """On the CPU generate runs it without compiling."""
    generation = dict(temperature=0, max_new_tokens=10, eos_ids=[1, 2], pad_id=0)
    dynamic, static = (Layout(share_prompts=True, static_cache=on) for on in (False, True))
    want = sample(tiny_model(), PROMPTS, 4, layout=dynamic, **generation)
    model, caches = tiny_model(), []
    for _ in range(2):
        got = sample(model, PROMPTS, 4, layout=static, **generation)
        caches.append(model.kept_cache[1])
        assert torch.equal(got.completions * got.mask, want.completions * want.mask)
        torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs)
    torch.testing.assert_close(got.sampler_entropy, want.sampler_entropy)
    assert caches[0] is caches[1] and caches[0].is_compileable
    assert caches[0].layers[0].keys.shape[2] == 128  # 5 + 10 tokens, rounded up
    sample(model, PROMPTS[:2], 4, layout=static, **generation)
    assert model.kept_cache[1] is not caches[0]  # other shapes need another cache


def of_lengths(prompts, completions):
    mask = torch.arange(max(completions)) < torch.tensor(completions)[:, None]
    return Rollout(prompts, mask.long(), mask, torch.zeros(len(prompts)).bool())


def test_micro_batches_put_like_lengths_together_and_lose_no_row():
    rollout = of_lengths([[3]] * 6, [8, 1, 6, 2, 7, 0])
    pieces = split_micro_batches(rollout, torch.tensor([1, 2, 3, 4, 5]), 2)
    assert [p.tolist() for p in pieces] == [[5, 1], [3, 2], [4]]


@pytest.mark.parametrize(("prompt", "want"), [(9, [[1, 0], [3, 2]]), (1, [[1, 3], [0, 2]])])
def test_micro_batches_share_prompts_where_that_runs_fewer_tokens(prompt, want):
    """Completions of 6, 2 | 7, 1: by group 2 prompts, 2 x 6 + 2 x 7 tokens; by length 4 prompts, 2
    x 2 + 2 x 7.
    """
    rollout = of_lengths([[3] * prompt] * 2 + [[4] * prompt] * 2, [6, 2, 7, 1])
    pieces = split_micro_batches(rollout, torch.arange(4), 2, share_prompts=True)
    assert sorted(sorted(p.tolist()) for p in pieces) == sorted(sorted(p) for p in want)
    assert [p.tolist() for p in split_micro_batches(rollout, torch.arange(4), 4, True)] == [
        [3, 1, 0, 2]
    ]


def test_a_pickle_is_not_loaded(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        policy.load_policy(str(tmp_path))


def test_a_folder_without_a_model_and_a_model_without_a_tokenizer_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no model: there is no config.json"):
        policy.load_policy(str(tmp_path))
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load the model") as refused:
        policy.load_policy(str(tmp_path))
    assert "tokenizer" in str(refused.value) and ": Pass" not in str(refused.value)


@pytest.mark.parametrize("name", ["./nope", "../a/b", "/nope/model", "~/model", "a/b/c"])
def test_a_model_path_that_is_not_there_is_called_a_path(name):
    """Not a name of the Hub, whose rules for names would be quoted."""
    with pytest.raises(ValueError, match="no such folder") as refused:
        policy.load_policy(name)
    assert "Hub" not in str(refused.value) and "\n" not in str(refused.value)
