"""scale/trl_trainer.py against TRL, a plain loop, and itself on two processes."""

import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install -r scale/requirements.txt")

import trl.trainer.grpo_trainer  # noqa: E402
from conftest import ROOT  # noqa: E402
from datasets import Dataset  # noqa: E402
from prompt_folders import chatml_folder, write_problems  # noqa: E402
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from scale import trl_trainer  # noqa: E402
from trainer.options import ALGORITHMS  # noqa: E402
from trainer.prompts import Chat, Prompts  # noqa: E402

# One between TRL's and transformers' releases.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GROUP, ROWS = 4, 12  # 3 groups; on two processes of 6 rows the second group lies on both
PROMPTS = ["Mia has 3 eggs.", "Tom has 40 pens. How many?", "Zoe"]
EPOCHS = 2  # the second pass is off-policy
# Every branch: the entropies of both policies, the reference, a clip that binds.
OPTIONS = {
    "tepo": {"kl_coef": 0.5, "eps_low": 1e-3, "eps_high": 1e-3},
    "grpo": {"beta": 0.3},
    "dapo": {"eps_low": 0.02, "eps_high": 0.03},
    "gspo": {"eps_low": 1e-3, "eps_high": 1e-3},
}


def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny")


def tiny_random_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer()),
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
    return [*torch.randint(2, len(tokenizer()), (length,), generator=g).tolist(), 1]


def is_right(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def pinned(base):
    """The trainer with its sampler replaced by `completion`, so that runs see the same batch."""

    class Pinned(base):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            start = self.accelerator.process_index * len(prompt_ids)
            return [completion(start + i) for i in range(len(prompt_ids))], None

    return Pinned


def train(
    out, base=trl_trainer.Trainer, processes=1, accumulated=1, updates=1, steps=EPOCHS, **settings
):
    """(parameters, trainer) after `steps` steps of SGD on one rollout.

    Each pass over the rollout has `updates` mini-batches.
    """
    folder = out / f"start-{os.environ.get('RANK', 0)}"
    tiny_random_model().save_pretrained(folder)
    # TRL loads the reference from where the model is from.
    model = Qwen2ForCausalLM.from_pretrained(folder)
    trainer_settings = {k: settings.pop(k) for k in ("algo", "options") if k in settings}
    reward_funcs = settings.pop("reward_funcs", is_right)
    config = GRPOConfig(
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
        max_completion_length=10,
        temperature=0.7,
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        **settings,
    )
    trainer = pinned(base)(
        args=config,
        model=model,
        processing_class=tokenizer(),
        reward_funcs=reward_funcs,
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        **trainer_settings,
    )
    trainer.train()
    return weights(trainer.model), trainer


@pytest.fixture(autouse=True)
def rows_in_order(monkeypatch):
    """No shuffling of a rollout's rows, which would give other mini-batches on each process."""
    monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)


def plain_loop(algo, options):
    """The same training by hand: the whole batch at once, the file's two functions, SGD."""
    module, model = __import__(algo), tiny_random_model()
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
    A = module.advantages(rewards, GROUP, entropy=old_entropy, mask=mask, **of_advantages)
    for _ in range(EPOCHS):
        logp, entropy = forward()
        others = {"ref_logprobs": old, "entropy": entropy, "old_entropy": old_entropy}
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


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_gradient_accumulation_does_not_change_the_averages(algo, tmp_path):
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
    trainer.push([batch], logp, old * 0)
    metrics = trainer._metrics["train"]
    assert (batch["push"] != 0)[mask == 1].all()
    assert metrics["clip_frac"][-1] == pytest.approx(2 / 5)
    assert metrics["kl_old"][-1] == pytest.approx(torch.e - 1 - 1, rel=1e-5)


def worker(rank, port, out):
    """One of two processes: every algorithm, three micro-batches of two rows each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    after = {}
    for algo in ALGORITHMS:
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
    monkeypatch.delenv("PYTHONWARNINGS")  # as the pytestmark above, in the processes started here
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for algo in ALGORITHMS:
        assert torch.equal(first[algo], second[algo])
        close(first[algo], plain_loop(algo, OPTIONS.get(algo, {})))


SAME = {  # our algorithm -> the settings under which TRL's loss is the same
    "grpo": dict(loss_type="grpo", epsilon=0.2),
    "dapo": dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28),
    "gspo": dict(
        loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
    ),
}


@pytest.mark.parametrize("algo", SAME)
def test_steps_equal_those_of_trl(algo, tmp_path):
    # Two mini-batches per pass, but one for DAPO: TRL would divide each mini-batch's loss by the
    # rollout's mean number of tokens per mini-batch.
    updates = 1 if algo == "dapo" else 2
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


@pytest.mark.parametrize("algo", SAME)
def test_loss_and_gradient_equal_those_of_trl(algo, tmp_path, monkeypatch):
    _, trainer = train(tmp_path, trl_trainer.Trainer, steps=1, algo=algo)
    _, reference = train(tmp_path, GRPOTrainer, steps=1, **SAME[algo])
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(7) < torch.tensor([7, 1, 4, 5])[:, None]).long()
    old = -3 * torch.rand(4, 7, generator=g)
    A = torch.tensor([0.9, -0.4, 0.0, -1.3])
    for spread in (0.0, 1e-3, 0.5):  # on-policy; where GSPO's clip binds; far off
        logp = (old + spread * torch.randn(4, 7, generator=g)).requires_grad_()
        value, gradient = their_loss(reference, monkeypatch, logp, old, A, mask)
        ours = trainer.algo.loss(logp, old, A, mask)
        assert gradient.any()
        torch.testing.assert_close(ours, value, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], gradient, atol=1e-6, rtol=0)
    # vLLM's importance weights, per sequence and per token (not in GSPO, which has one ratio).
    monkeypatch.setattr(reference, "use_vllm", True)
    corrections = [torch.tensor([[1.0], [0.5], [0.0], [1.3]]), 2 * torch.rand(4, 7, generator=g)]
    for weight in corrections[: 1 if algo == "gspo" else 2]:
        value, gradient = their_loss(
            reference, monkeypatch, logp, old, A, mask, importance_sampling_ratio=weight
        )
        batch = {"old_per_token_logps": old, "entropy": old, "mask": mask, "advantages": A}
        batch |= {"importance_sampling_ratio": weight}
        trainer.push([batch], logp, old)
        torch.testing.assert_close(batch["loss"], value.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(batch["push"], gradient, atol=1e-6, rtol=0)


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
    asked = [f"{n}<|im_end|>+1?" for n in range(3)]
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


def test_script_trains_and_saves(tmp_path, capfd):
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
