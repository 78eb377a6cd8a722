"""scale/trl_trainer.py against TRL, a plain loop, and itself on two processes."""

import gc
import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install -r scale/requirements.txt")

import trl.trainer.grpo_trainer  # noqa: E402
import trl.trainer.rloo_trainer  # noqa: E402
from conftest import ROOT  # noqa: E402
from datasets import Dataset  # noqa: E402
from prompt_folders import chatml_folder, write_problems  # noqa: E402
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

from run.algorithm import load_algorithm  # noqa: E402
from scale import trl_trainer  # noqa: E402
from trainer import data  # noqa: E402
from trainer.methods import ALGORITHMS, MORE, named  # noqa: E402
from trainer.prompts import Chat, Prompts  # noqa: E402

# accelerate collects garbage at the start of every training: do not search what is imported.
gc.freeze()
# One between TRL's and transformers' releases.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GROUP, ROWS = 4, 12  # 3 groups; on two processes of 6 rows the second group lies on both
PROMPTS = ["Mia has 3 eggs.", "Tom has 40 pens. How many?", "Zoe"]
EPOCHS = 2  # the second pass is off-policy
ALL = [*ALGORITHMS, *MORE]
LONGEST = 10  # tokens of a completion
# Every branch: the entropies of both policies, the reference, a clip that binds.
OPTIONS = {
    "tepo": {"kl_coef": 0.5, "eps_low": 1e-3, "eps_high": 1e-3},
    "grpo": {"beta": 0.3},
    "dapo": {"eps_low": 0.02, "eps_high": 0.03},
    "gspo": {"eps_low": 1e-3, "eps_high": 1e-3},
    "clip_cov": {"cov_ratio": 0.1, "cov_low": 0.01, "eps_low": 0.02, "eps_high": 0.03},
    "kl_cov": {"cov_ratio": 0.1},
    "ce_gppo": {"eps_low": 0.02, "eps_high": 0.03},
    "aspo": {"eps_low": 0.02, "eps_high": 0.03, "cap": 1.01},
    "dppo": {"delta_low": 2e-3, "delta_high": 1e-3},
    "reweight": {"eps_low": 0.02, "eps_high": 0.03},
    "raft": {"variant": "reinforce_rej", "eps_high": 0.03, "dual_clip": 1.01},
    "ha_dw": {"eps_low": 0.02, "eps_high": 0.03},
    "ktae": {"eps_low": 0.02, "eps_high": 0.03},
    "dhpo": {"eps_low": 0.02, "eps_high": 0.03},
    "dr_grpo": {"eps_low": 0.02, "eps_high": 0.03},
    "rloo": {"eps_low": 0.1, "eps_high": 0.2},
    "cispo": {"eps_low": 0.02, "eps_high": 0.03},
    "sapo": {"tau_pos": 2.0, "tau_neg": 3.0},
    "gmpo": {"eps_low": 0.02, "eps_high": 0.03},
    "luspo": {"eps_low": 1e-3, "eps_high": 1e-3},
    "vespo": {"k_pos": 3.0, "lambda_neg": 1.5},
    "maxrl": {"eps_low": 0.02, "eps_high": 0.03},
    "opo": {"eps_low": 0.02, "eps_high": 0.03},
    "dro": {"tau": 3.0},
    "topr": {"sequence": True},
}


def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny")


VOCABULARY = len(tokenizer())


def tiny_random_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def completion(row):
    """Token ids of the completion in this row of the batch: 2 to 9, EOS last.

    They depend on the row alone, so they are the same on any number of processes.
    """
    g = torch.Generator().manual_seed(row)
    length = int(torch.randint(1, 9, (), generator=g))
    return [*torch.randint(2, VOCABULARY, (length,), generator=g).tolist(), 1]


def is_right(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def pinned(base):
    """The trainer with its sampler replaced by `completion`, so that runs see the same batch."""

    class Pinned(base):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            start = self.accelerator.process_index * len(prompt_ids)
            ids = [completion(start + i) for i in range(len(prompt_ids))]
            return ids if base is RLOOTrainer else (ids, None)

    return Pinned


def train(out, base=trl_trainer.Trainer, **settings):
    """(parameters, trainer) after `steps` steps of SGD on one rollout. settings: those of built."""
    trainer = built(out, base, **settings)
    trainer.train()
    return weights(trainer.model), trainer


def built(out, base, processes=1, accumulated=1, updates=1, steps=EPOCHS, **settings):
    """A trainer. Each pass over a rollout has `updates` mini-batches."""
    folder = out / f"start-{os.environ.get('RANK', 0)}"
    tiny_random_model().save_pretrained(folder)
    # TRL loads the reference from where the model is from.
    model = Qwen2ForCausalLM.from_pretrained(folder)
    names = ("algo", "options", "reward_funcs")
    trainer_settings = {k: settings.pop(k) for k in names if k in settings}
    trainer_settings.setdefault("reward_funcs", is_right)
    kind = RLOOConfig if base is RLOOTrainer else GRPOConfig
    config = kind(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        per_device_train_batch_size=ROWS // (processes * accumulated * updates),
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * updates,
        num_iterations=EPOCHS,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=0.7,
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        **settings,
    )
    return pinned(base)(
        args=config,
        model=model,
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        **trainer_settings,
    )


def first_ones(n):
    """In place of torch.randperm, which only Clip-Cov's loss calls in these tests."""
    return torch.arange(n)


def last_ones(n):
    return torch.arange(n).flip(0)


@pytest.fixture(autouse=True)
def rows_in_order(monkeypatch):
    """No shuffling of a rollout's rows, which would give other mini-batches on each process."""
    for file in trl.trainer.grpo_trainer, trl.trainer.rloo_trainer:
        monkeypatch.setattr(file, "shuffle_sequence_dict", lambda batch: batch)


def padded(rows):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def plain_loop(algo, options):
    """The same training by hand: the whole batch at once, the file's two functions, SGD."""
    module, model = load_algorithm(algo), tiny_random_model()
    split = trl_trainer.split_options(module, options)
    of_advantages, of_loss = split
    tok = tokenizer()
    prompts = [tok(p).input_ids for p in PROMPTS for _ in range(GROUP)]
    said = [completion(i) for i in range(ROWS)]
    mask = torch.zeros(ROWS, max(map(len, said)))

    def forward():
        logprobs, entropy = torch.zeros_like(mask), torch.zeros_like(mask)
        for i, (p, c) in enumerate(zip(prompts, said, strict=True)):
            logits = model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] / 0.7
            logp = logits.log_softmax(-1)
            logprobs[i, : len(c)] = logp[range(len(c)), c]
            entropy[i, : len(c)] = -(logp.exp() * logp).sum(-1).detach()
            mask[i, : len(c)] = 1
        return logprobs, entropy

    with torch.no_grad():
        old, old_entropy = forward()
    rewards = torch.tensor(is_right(said))
    inputs = {"entropy": old_entropy, "mask": mask, "completions": padded(said)}
    inputs = named(module.advantages, inputs)
    A = module.advantages(rewards, GROUP, **inputs, **of_advantages)
    for _ in range(EPOCHS):
        logp, entropy = forward()
        others = {"ref_logprobs": old, "entropy": entropy, "old_entropy": old_entropy}
        others["max_length"] = LONGEST
        if not options.get("beta"):
            del others["ref_logprobs"]
        others = {k: v for k, v in others.items() if k in trl_trainer.parameters(module.loss)}
        model.zero_grad()
        module.loss(logp, old, A, mask, **of_loss, **others).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    return weights(model)


def close(a, b, tolerance=2e-6):
    moved = (b - weights(tiny_random_model())).abs().max()
    assert moved > 0.01, "a test in which nothing is learnt shows nothing"
    assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("algo", ALL)
def test_gradient_accumulation_does_not_change_the_averages(algo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randperm", first_ones)
    options = OPTIONS.get(algo)
    expected = plain_loop(algo, options or {})
    logged = []
    for accumulated in (1, 4):
        got, trainer = train(tmp_path, algo=algo, options=options, accumulated=accumulated)
        close(got, expected)
        logged.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert (
        logged[0] == pytest.approx(logged[1], abs=1e-5)
        and len(logged[0]) == EPOCHS
        and any(logged[0])
    )


@pytest.mark.parametrize("algo", ["gtpo", "grpo_s"])
def test_success_is_what_the_function_right_says_whatever_else_is_rewarded(algo, tmp_path):
    """Each right row is punished by 0.6: by their sums, no row of any group would be right."""

    def right(completion_ids, **_):
        return is_right(completion_ids)

    def overlong(completion_ids, **_):
        return [-0.6] * len(completion_ids)

    _, trainer = train(tmp_path, algo=algo, steps=1, reward_funcs=[right, overlong])
    assert trainer.reward_func_names == ["right", "overlong"]
    said = torch.tensor(is_right([completion(i) for i in range(ROWS)]))
    torch.testing.assert_close(trainer.right().float(), said)
    batch = trainer._buffered_inputs[0]
    A = batch["advantages"].view(ROWS, -1)
    inputs = {"entropy": batch["entropy"], "mask": batch["mask"], "right": said}
    want = trainer.algo.advantages(said - 0.6, GROUP, **inputs)
    torch.testing.assert_close(A, want.view(ROWS, -1))
    assert A.any()


def test_kl_old_and_clip_frac_by_hand(tmp_path):
    """Row 0: w = e, clipped. Row 1: w = e and A < 0, not clipped. beta's KL pushes every token."""
    _, trainer = train(tmp_path, algo="grpo", options={"beta": 0.3}, steps=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logp = torch.full((2, 3), -1.0)
    old, A = logp - torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, -1.0])
    batch = {"old_per_token_logps": old, "entropy": old * 0, "mask": mask, "advantages": A}
    batch["ref_per_token_logps"] = logp - 0.5
    trainer.first_half([batch], logp, old * 0)
    metrics = trainer._metrics["train"]
    assert (batch["gradient"] != 0)[mask == 1].all()
    assert metrics["clip_frac"][-1] == pytest.approx(2 / 5)
    assert metrics["kl_old"][-1] == pytest.approx(torch.e - 1 - 1, rel=1e-5)


def worker(rank, port, out):
    """One of two processes: every algorithm, three micro-batches of two rows each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    # Two processes that draw different tokens: the first one's draw must hold for both.
    torch.randperm = (first_ones, last_ones)[rank]
    after = {}
    for algo in ALL:
        after[algo], trainer = train(
            out, processes=2, accumulated=3, algo=algo, options=OPTIONS.get(algo)
        )
    assert trainer.accelerator.num_processes == 2
    torch.save(after, out / f"{rank}.pt")
    torch.distributed.barrier()  # neither process leaves while the other needs it
    # End here. While torch 2.13 frees a gloo process group, its thread can wait for the GIL and the
    # main thread, which holds the GIL, for that thread's lock: the process would stand still.
    os._exit(0)


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randperm", first_ones)
    monkeypatch.delenv("PYTHONWARNINGS")  # as the pytestmark above, in the processes started here
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for algo in ALL:
        assert torch.equal(first[algo], second[algo])
        close(first[algo], plain_loop(algo, OPTIONS.get(algo, {})))


SAME = {  # our algorithm -> the settings under which TRL's loss is the same
    "grpo": dict(loss_type="grpo", epsilon=0.2),
    "dapo": dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28),
    "gspo": dict(
        loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
    ),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),  # TRL's is the bound itself
    "sapo": dict(loss_type="sapo"),
    "dr_grpo": dict(loss_type="dr_grpo", epsilon=0.2, scale_rewards="none"),
    "luspo": dict(
        loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3
    ),
    "vespo": dict(loss_type="vespo"),
}


@pytest.mark.parametrize("algo", SAME)
def test_steps_equal_those_of_trl(algo, tmp_path):
    # Two mini-batches per pass, but one for the averages over tokens: TRL would divide each
    # mini-batch's loss by the rollout's mean number of tokens per mini-batch.
    updates = 1 if algo in ("dapo", "cispo", "vespo") else 2
    ours, trainer = train(tmp_path, algo=algo, updates=updates, steps=2 * updates)
    theirs, reference = train(
        tmp_path, base=GRPOTrainer, updates=updates, steps=2 * updates, **SAME[algo]
    )
    close(ours, theirs)
    for a, b in zip(trainer.state.log_history, reference.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "entropy", "reward"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


def their_loss(trainer, monkeypatch, logp, old, A, mask, **more):
    """TRL's own loss code on given log-probabilities, which replace its one call of the model."""
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logp, logp.detach(), None)
    )
    ids = torch.zeros_like(mask)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": A,
    }
    batch |= {"old_per_token_logps": old, "num_items_in_batch": mask.sum()} | more
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(None, batch)
    return loss, torch.autograd.grad(loss, logp)[0]


def toy_batch(spread, dtype=torch.float32):
    """(logprobs, old_logprobs, mask) of one group, all [4, 7]."""
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(7) < torch.tensor([7, 1, 4, 5])[:, None]).long()
    old = (-3 * torch.rand(4, 7, generator=g)).to(dtype)
    logp = old + spread * torch.randn(4, 7, generator=g).to(dtype)
    return logp.requires_grad_(), old, mask


def equal(ours, logp, value, gradient):
    assert gradient.any()
    torch.testing.assert_close(ours, value, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], gradient, atol=1e-6, rtol=0)


# On-policy; where GSPO's clip binds; far off; where CISPO's bound of 5 binds, whose larger ratios
# fp32 rounds by more than the tolerance.
SPREADS = (0.0, torch.float32), (1e-3, torch.float32), (0.5, torch.float32), (2.0, torch.float64)


@pytest.mark.parametrize("algo", SAME)
def test_loss_and_gradient_equal_those_of_trl(algo, tmp_path, monkeypatch):
    trainer = built(tmp_path, trl_trainer.Trainer, algo=algo)
    reference = built(tmp_path, GRPOTrainer, **SAME[algo])
    A = torch.tensor([0.9, -0.4, 0.0, -1.3])
    for spread, dtype in SPREADS:
        logp, old, mask = toy_batch(spread, dtype)
        value, gradient = their_loss(reference, monkeypatch, logp, old, A.to(dtype), mask)
        lengths = named(trainer.algo.loss, {"max_length": LONGEST})
        equal(trainer.algo.loss(logp, old, A.to(dtype), mask, **lengths), logp, value, gradient)
    # vLLM's importance weights, per sequence and per token (not where there is one ratio per row).
    # TRL puts them into VESPO's W, so there is nothing to compare.
    monkeypatch.setattr(reference, "use_vllm", True)
    logp, old, mask = toy_batch(0.5)
    g = torch.Generator().manual_seed(4)
    corrections = [torch.tensor([[1.0], [0.5], [0.0], [1.3]]), 2 * torch.rand(4, 7, generator=g)]
    for weight in corrections[: {"gspo": 1, "luspo": 1, "vespo": 0}.get(algo, 2)]:
        value, gradient = their_loss(
            reference, monkeypatch, logp, old, A, mask, importance_sampling_ratio=weight
        )
        batch = {"old_per_token_logps": old, "entropy": old, "mask": mask, "advantages": A}
        batch |= {"importance_sampling_ratio": weight}
        trainer.first_half([batch], logp, old)
        torch.testing.assert_close(batch["loss"], value.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(batch["gradient"], gradient, atol=1e-6, rtol=0)


def test_tepo_is_trls_luspo_times_a_factor(tmp_path, monkeypatch):
    """TEPO, divided by the N tokens, times N/B is LUSPO at the same clip range."""
    tepo = load_algorithm("tepo").loss
    A = torch.tensor([0.9, -0.4, 0.0, -1.3])
    for range_ in (0.2, 0.28), (2e-3, 2.5e-3):
        settings = SAME["luspo"] | dict(zip(("epsilon", "epsilon_high"), range_, strict=True))
        reference = built(tmp_path, GRPOTrainer, **settings)
        for spread in (0.0, 1e-3, 0.5):
            logp, old, mask = toy_batch(spread)
            value, gradient = their_loss(reference, monkeypatch, logp, old, A, mask)
            ours = tepo(logp, old, A, mask, eps_low=range_[0], eps_high=range_[1])
            equal(ours * mask.sum() / len(mask), logp, value, gradient)


def fed(algo, old, mask):
    """(TRL's settings, the advantages for TRL, those for us): TRL has the loss, not the method."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    module = load_algorithm(algo)
    if algo == "reweight":
        A = module.advantages(rewards, GROUP)
        scaled = (0.2 * old.exp() + 0.8) * A[:, None]
        return dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.24), scaled, A
    if algo == "ktae":
        ids = torch.randint(0, 5, mask.shape, generator=torch.Generator().manual_seed(0))
        A = module.advantages(rewards, GROUP, completions=ids, mask=mask)
        return dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28), A, A
    A = module.advantages(rewards, GROUP, history=[0.1, 0.9, 0.7])
    return dict(loss_type="grpo", epsilon=0.2), A, A


@pytest.mark.parametrize("algo", ["reweight", "ktae", "ha_dw"])
def test_loss_and_gradient_equal_those_of_trl_fed_with_our_advantages(algo, tmp_path, monkeypatch):
    _, old, mask = toy_batch(0.0)
    settings, theirs, ours = fed(algo, old, mask)
    reference = built(tmp_path, GRPOTrainer, **settings)
    for spread, dtype in SPREADS[:3]:
        logp, old, mask = toy_batch(spread, dtype)
        value, gradient = their_loss(reference, monkeypatch, logp, old, theirs, mask)
        equal(load_algorithm(algo).loss(logp, old, ours, mask), logp, value, gradient)


def test_rloo_equals_trls_trainer(tmp_path, monkeypatch):
    """Its loss on given log-probabilities, in float64; and its steps, advantages included.

    fp32 is not enough for 1e-6: the ratio is a product over the row, so it gets large.
    """
    reference = built(tmp_path, RLOOTrainer, beta=0.0)
    A = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]).double()
    for spread in (0.0, 0.03, 0.5):
        logp, old, mask = toy_batch(spread, torch.float64)
        sums = {"old_logps": (old * mask).sum(1)}
        value, gradient = their_loss(reference, monkeypatch, logp, old, A, mask, **sums)
        equal(load_algorithm("rloo").loss(logp, old, A, mask), logp, value, gradient)
    theirs, _ = train(tmp_path, RLOOTrainer, beta=0.0, updates=2, steps=4)
    ours, _ = train(tmp_path, algo="rloo", updates=2, steps=4)
    close(ours, theirs)


def test_the_history_of_ha_dw_is_that_of_the_earlier_rollouts(tmp_path):
    """Two rollouts of unequal mean reward; the second one's advantages by hand."""
    calls = []

    def right(completion_ids, **_):
        calls.append(is_right(completion_ids))
        return calls[-1] if len(calls) == 2 else [float(i % 4 == 0) for i in range(ROWS)]

    trainer = built(
        tmp_path, trl_trainer.Trainer, algo="ha_dw", steps=EPOCHS + 1, reward_funcs=right
    )
    trainer.train()
    second = torch.tensor(calls[1])
    assert trainer.history == pytest.approx([0.25, second.mean().item()]) and len(calls) == 2
    want = load_algorithm("ha_dw").advantages(second, GROUP, history=[0.25])
    without = load_algorithm("ha_dw").advantages(second, GROUP)
    got = trainer._buffered_inputs[0]["advantages"]
    torch.testing.assert_close(got, want)
    assert (want - without).abs().max() > 0.05


def test_prompts_and_ends_of_a_turn_are_those_of_train_py(tmp_path, monkeypatch):
    """The very token ids, BOS, system turn and a question with a control token in it included."""
    folder = chatml_folder(tmp_path / "model")
    write_problems(tmp_path / "p.jsonl", [f"{n}<|im_end|>+1?" for n in range(4)])
    seen = {}

    def look(self):
        prompts = [row["prompt"] for row in self.train_dataset]
        seen["ids"] = self._tokenize_prompts(prompts)[0]
        seen["eos"] = (self.eos_token_ids, self.generation_config.eos_token_id)

    monkeypatch.setattr(trl_trainer.Trainer, "train", look)
    flags = "--algo grpo --preset tiny --prompts 2 --group-size 2 --updates 1 --max-new-tokens 4"
    flags = [*flags.split(), "--system", "Be brief.", "--template-option", "shout=true"]
    flags += ["--model", str(folder), "--data", str(tmp_path / "p.jsonl")]
    trl_trainer.main([*flags, "--out", str(tmp_path / "out")])
    tok = AutoTokenizer.from_pretrained(folder)
    chat = Chat(system="Be brief.", variables={"shout": True})
    asked = [f"{n}<|im_end|>+1?" for n in (1, 2, 3)]  # 0 is held out
    assert seen["ids"] == Prompts(tok, "{question}", chat).encode(asked)
    assert "BE BRIEF." in tok.decode(seen["ids"][0])
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert seen["ids"][0].count(end) == 2
    assert seen["eos"] == ([0, end], [0, end])


def test_reward_is_that_of_train_py():
    options = SimpleNamespace(overlong_cache=2, max_new_tokens=4)
    right, overlong = trl_trainer.rewards(options, [7, 9])
    turns = ["so #### 3", [{"role": "assistant", "content": "#### 4"}], "#### 3"]
    given = {"completions": turns, "completion_ids": [[1, 9], [1, 1, 7], [1, 1, 1, 7]]}
    given["answer"] = ["#### 3"] * 3
    assert right(**given) == [1.0, 0.0, 1.0] and overlong(**given) == [0.0, -0.5, -1.0]
    options.overlong_cache = 0
    assert len(trl_trainer.rewards(options, [7])) == 1


def test_a_truncated_completion_earns_nothing_where_its_line_is_cut():
    options = SimpleNamespace(overlong_cache=0, max_new_tokens=2)
    (right,) = trl_trainer.rewards(options, eos_ids=[7])
    texts, ids = ["#### 3", "#### 3\n", "#### 3"], [[1, 1], [1, 1], [1, 7]]
    assert right(texts, ids, ["#### 3"] * 3) == [0.0, 1.0, 1.0]


class Stub:
    def train(self):
        pass

    def save_model(self):
        pass


def test_no_question_of_the_test_split_is_trained_on(tmp_path, monkeypatch):
    """main gives TRL only the problems that train.py would train on; a stub records them."""
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"question": " 0+1? ", "answer": "1"}, {"question": "2+1?", "answer": "3"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    given = {}
    monkeypatch.setattr(trl_trainer, "Trainer", lambda *_, **kwargs: given.update(kwargs) or Stub())
    trl_trainer.main(["--preset", "tiny", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert given["train_dataset"]["prompt"] == ["1+1?\n", "3+1?\n"]


def test_script_trains_and_saves(tmp_path, capfd, monkeypatch, few_problems):
    monkeypatch.setattr(data, "TINY_TRAIN", few_problems)  # of 500, none drawn is answered
    flags = (
        "--algo gtpo --preset tiny --steps 2 --prompts 4 --group-size 4 --updates 2 --epochs 2 "
        "--micro-batch 4 --max-new-tokens 8 --disable_tqdm true"
    )
    trl_trainer.main([*flags.split(), "--out", str(tmp_path)])
    saved = Qwen2ForCausalLM.from_pretrained(tmp_path)
    start = Qwen2ForCausalLM.from_pretrained(ROOT / "tiny")
    assert any((a != b).any() for a, b in zip(saved.parameters(), start.parameters(), strict=True))
    assert capfd.readouterr().out.count("'loss'") == 2


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--algo tepo --epsilon 0.3", "epsilon has no effect on tepo"),
        (
            "--algo tepo --steps_per_generation 3",
            "must be a multiple of gradient_accumulation_steps",
        ),
        ("--algo tepo --option eps=1", "has no option 'eps'"),
        ("--algo tepo --micro-batch 3", "does not split into micro-batches of 3"),
        ("--algo tepo --no-such-flag 1", "no-such-flag"),
        ("--algo tepo --max-grad-nrm 1", "no option --max-grad-nrm; did you mean --max-grad-norm"),
        ("--algo tepo --temp 1", "no option --temp"),  # not short for GRPOConfig's temperature
        ("--algo tepo --learning_rate x", "invalid float value: 'x'"),
    ],
)
def test_refusals(flags, line, tmp_path):
    with pytest.raises(ValueError, match=line):
        flags = f"--preset tiny --prompts 4 --group-size 4 --updates 1 {flags}"
        trl_trainer.main([*flags.split(), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "algo, settings, line",
    [
        ("sapo", {"sapo_temperature_pos": 2.0}, "sapo_temperature_pos has no effect on sapo"),
        ("clip_cov", {"use_vllm": True}, "clip_cov cannot take vLLM's weights"),
        ("kl_cov", {"use_vllm": True}, "--vllm_importance_sampling_correction false"),
        ("dro", {"use_vllm": True}, "dro cannot take vLLM's weights"),
        ("dr_grpo", {"max_completion_length": None}, "set max_completion_length"),
    ],
)
def test_configs_that_do_not_fit_the_algorithm(algo, settings, line):
    defaults = {"steps_per_generation": 1, "gradient_accumulation_steps": 1, "use_cpu": True}
    config = GRPOConfig(bf16=False, num_generations=2, per_device_train_batch_size=2, **defaults)
    trl_trainer.check_config(algo, config)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=line):
        trl_trainer.check_config(algo, config)
