"""sampling.py, cache.py: the sampler is the policy, the mask ends at EOS, and no row depends on the
rows beside it.
"""

import pytest
import torch
from conftest import tiny_model
from transformers import DynamicCache, GenerationConfig

from trainer import sampling
from trainer.cache import select_rows, with_room
from trainer.logprobs import Layout, token_logprobs
from trainer.sampling import completion_mask, sample

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4, 5], [6]]


def test_mask_runs_through_the_first_of_several_eos_even_where_pad_is_eos():
    ids = torch.tensor([[5, 1, 1, 1], [5, 2, 1, 7], [5, 6, 7, 8], [1, 0, 0, 0]])
    want = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert completion_mask(ids, [1, 2]).int().tolist() == want
    assert completion_mask(ids[:2], [2]).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


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


MANY = PROMPTS + [[a, b] for a in range(3, 7) for b in range(7, 12)]  # 25 prompts
SHARED = Layout(share_prompts=True)
PACKED = Layout(share_prompts=True, packed=True)
STATIC = Layout(share_prompts=True, static_cache=True)
WAYS = [(SHARED, None, 8), (SHARED, 5, 1), (SHARED, 40, 3), (PACKED, 20, 8), (STATIC, 70, 8)]
WAYS += [(Layout(), 1, 8), (Layout(equal_lengths=True), None, 8)]  # (layout, rows_at_once, segment)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(("layout", "rows_at_once", "segment"), WAYS)
def test_a_row_is_drawn_by_its_own_random_numbers_alone(
    monkeypatch, layout, rows_at_once, segment, temperature
):
    """Whatever rows are beside it, in whatever order, ended or not."""
    if layout.packed and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(sampling.generate, "__defaults__", (Layout(), segment, None))
    how = dict(temperature=temperature, max_new_tokens=12, eos_ids=[1, 5, 9], pad_id=0)
    model = tiny_model()
    torch.manual_seed(0)
    want = sample(model, MANY, 2, **how)
    lengths = set(want.mask.sum(1).tolist())
    assert min(lengths) < 4 < max(lengths) and len(lengths) > 3 and 0 < want.truncated.sum() < 50
    torch.manual_seed(0)
    U = torch.rand(25, 2, 12, dtype=torch.float64).flip(0).flatten(0, 1)
    how |= {"layout": layout, "rows_at_once": rows_at_once, "U": U if temperature else None}
    got = sample(model, MANY[::-1], 2, **how)
    back = torch.arange(50).view(25, 2).flip(0).flatten()
    assert got.prompts[::2] == MANY[::-1]
    assert torch.equal(got.mask[back], want.mask)
    assert torch.equal((got.completions * got.mask)[back], want.completions * want.mask)
    for name in ("sampler_logprobs", "sampler_entropy"):
        torch.testing.assert_close(getattr(got, name)[back], getattr(want, name))


def test_greedy_sampling_draws_no_random_number():
    model, before = tiny_model(), torch.get_rng_state()
    sample(model, PROMPTS, 2, temperature=0, max_new_tokens=4, eos_ids=[1], pad_id=0)
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("vocab", [1, 5, 1024, 1025, 5000])
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_draw_takes_the_token_of_the_plain_formula(vocab, scale):
    """That of minimal.py, unless u lies within 1e-6 of the boundary between the two tokens."""
    torch.manual_seed(vocab)
    logits, u = scale * torch.randn(200, vocab), torch.rand(200, 1, dtype=torch.float64)
    u[0], u[1] = 0, 1 - 2.0**-53  # the least and the largest that torch.rand returns
    logits[3:40] -= 1000 * (torch.rand(37, vocab) < 0.5)  # half of the tokens have probability 0
    p = logits.double().softmax(1)
    ends = p.cumsum(1)
    token = sampling.Draw(1.0, 200, 1, "cpu", u)(None, logits.clone()).argmax(1, keepdim=True)
    end, share = ends.gather(1, token), p.gather(1, token)
    assert (u < end + 1e-6).all() and (u > end - share - 1e-6).all() and (share > 0).all()
    plain = torch.searchsorted(ends, u * ends[:, -1:], right=True)
    assert (plain == token)[2:].float().mean() > 0.99


def test_draw_takes_the_first_token_whose_cumulative_probability_is_above_u():
    """Tokens of probability 0 are never drawn, at the ends and in the middle."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    largest = 1 - 2.0**-53  # that torch.rand returns
    us = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, largest], dtype=torch.float64)
    draw = sampling.Draw(2.0, 6, 1, "cpu", us[:, None])
    scores = draw(None, (2 * p.log() + 3).repeat(6, 1))
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
    with_room(roomy)
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


def test_a_static_cache_is_kept_for_the_next_call_of_its_shape():
    """On the CPU generate runs it without compiling."""
    how = dict(temperature=0, max_new_tokens=10, eos_ids=[1, 2], pad_id=0, layout=STATIC)
    model, kept = tiny_model(), []
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:2]):
        sample(model, prompts, 4, **how)
        kept.append(model.kept_cache[1])
    assert kept[0] is kept[1] is not kept[2] and kept[0].is_compileable
    assert kept[0].layers[0].keys.shape[2] == 128  # 5 + 10 tokens, rounded up


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
