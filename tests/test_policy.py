"""policy.py: the sampler is the policy, the mask ends at EOS, log-probabilities without logits are
the same numbers.
"""

import math

import pytest
import torch
from conftest import DEVICE, tiny_model
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trainer import logprobs, policy
from trainer.batches import split_micro_batches
from trainer.logprobs import Layout, token_logprobs
from trainer.policy import special_tokens
from trainer.rollout import Rollout
from trainer.sampling import sample

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4, 5], [6]]
COMPLETIONS = torch.tensor([[5, 6, 1, 0], [9, 8, 7, 6], [4, 0, 0, 0], [2, 1, 0, 0], [1, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
COMPLETIONS, MASK = COMPLETIONS.to(DEVICE), MASK.to(DEVICE)


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
    return GPT2LMHeadModel(config).eval().to(DEVICE)


def by_hand(model, temperature):
    """Each row alone, unpadded, through the model's own logits: the plainest way there is. [B, T]
    twice
    """
    logprobs, entropy = (
        torch.zeros(MASK.shape, dtype=torch.float64, device=DEVICE),
        torch.zeros(MASK.shape, dtype=torch.float64, device=DEVICE),
    )
    for i, prompt in enumerate(PROMPTS):
        row = COMPLETIONS[i][MASK[i]]
        logits = (
            model(torch.tensor([prompt + row.tolist()], device=DEVICE)).logits[
                0, len(prompt) - 1 : -1
            ]
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
        model.lm_head = torch.nn.Linear(16, 24).double().to(DEVICE)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": chunk * 24})
    push = (
        torch.randn(MASK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
            DEVICE
        )
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
        targets, cast = torch.full((1000,), 5), weight.detach().bfloat16()
        got, _ = logprobs.HeadLogprobs.apply(hidden, weight, cast, None, targets, 1.0)
        got.sum().backward()
        grads.append(weight.grad)
        weight.grad = None
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


def test_the_entropy_of_a_nearly_certain_token_keeps_its_digits():
    """One logit is 15 to 40 above the others. GTPO divides by such an entropy."""
    hidden, weight = torch.diag(torch.tensor([15.0, 20, 25, 30, 40])), torch.eye(24)[:, :5]
    _, got = logprobs.HeadLogprobs.apply(hidden, weight, weight, None, torch.arange(5), 1.0)
    want = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T).entropy()
    torch.testing.assert_close(got.double(), want, rtol=0.1, atol=0)


def test_what_stands_where_mask_is_off_is_not_read():
    model, other = tiny_model(), COMPLETIONS.clone()
    other[~MASK] = 23
    a, _ = token_logprobs(model, PROMPTS, COMPLETIONS, MASK)
    b, _ = token_logprobs(model, PROMPTS, other, MASK)
    assert torch.equal(a, b)


def test_every_eos_that_anything_names_stops():
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[1, 2])
    model.config.eos_token_id = 4

    class Tokenizer:
        eos_token_id, pad_token_id, eos_token = 3, None, None

    assert special_tokens(model, Tokenizer) == ([1, 2, 3, 4], 1)
    model.generation_config, model.config.eos_token_id, Tokenizer.eos_token_id = (
        GenerationConfig(),
        None,
        None,
    )
    with pytest.raises(ValueError, match="no EOS"):
        special_tokens(model, Tokenizer)


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


def test_a_model_in_which_nothing_takes_a_gradient_is_refused(monkeypatch):
    real = policy.AutoModelForCausalLM.from_pretrained

    def frozen(*args, **kwargs):
        model, found = real(*args, **kwargs)
        return model.requires_grad_(False), found

    monkeypatch.setattr(policy.AutoModelForCausalLM, "from_pretrained", frozen)
    with pytest.raises(ValueError, match="none of its weights takes a gradient"):
        policy.load_policy("tiny")


@pytest.mark.parametrize("name", ["./nope", "../a/b", "/nope/model", "~/model", "a/b/c"])
def test_a_model_path_that_is_not_there_is_called_a_path(name):
    """Not a name of the Hub, whose rules for names would be quoted."""
    with pytest.raises(ValueError, match="no such folder") as refused:
        policy.load_policy(name)
    assert "Hub" not in str(refused.value) and "\n" not in str(refused.value)
