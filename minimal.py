"""The whole method in one file: `python minimal.py --algo tepo` trains the embedded model on a CPU.

One step of any method of the GRPO family; the G completions o_i of a prompt are a group:

    1 sample      o_i from pi_old, the policy as it is now
    2 reward      r_i = 1 if the answer in o_i is right, else 0
      measure     log pi_old(o_{i,t}), and pi_old's entropy H_old,{i,t} before each token
    3 advantages  A = advantages(r, G): how much better o_i is than its group
    4 update      on each mini-batch, an AdamW step on loss(log pi_theta, log pi_old, A, mask)

grpo.py, tepo.py and the others hold `advantages` and `loss` beside their equations; rewards.py says
what is right. train.py takes the same steps faster and in less memory, and tests compare the two.

By arithmetic, `python minimal.py --model Qwen/Qwen2.5-0.5B --data gsm8k` needs a GPU of 24 GiB.
"""

import argparse
import importlib.machinery
import json
import os
import types
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from rewards import correct
from trainer.data import load_problems, problems_at, split_overlap
from trainer.methods import inputs, load_method, parameters, with_advantages

STEPWISE = "\nReason step by step, then end with the answer alone on a line: #### number"
OPTIONS = (  # name, default for the embedded model, default for another model or GSM8K, meaning
    ("algo", "tepo", "tepo", "the method: grpo, tepo, ..., or your own FILE.py"),
    ("model", "tiny", "Qwen/Qwen2.5-0.5B", "tiny (embedded), a folder or a Hub name"),
    ("data", "tiny", "gsm8k", "tiny (generated), gsm8k, a Hub name, a folder or a .jsonl file"),
    ("prompt", "{question}", "{question}" + STEPWISE, "the words of the user"),
    ("steps", 100, 500, "training steps"),
    ("prompts", 16, 8, "prompts per step"),
    ("group_size", 8, 8, "completions per prompt, G"),
    ("max_new_tokens", 64, 512, "most tokens per completion"),
    ("temperature", 1.0, 1.0, "divides the logits, in sampling and in training"),
    ("updates", 4, 4, "mini-batches per step, with an optimizer step each"),
    ("micro_batch", 32, 2, "rows per pass of an update: changes the memory, not the gradient"),
    ("lr", 1e-4, 1e-6, "learning rate after the warm-up"),
    ("warmup", 5, 10, "steps over which the learning rate rises"),
    ("eval_n", 500, 200, "held-out problems per evaluation"),
    ("seed", 0, 0, "of the order of the problems and of sampling"),
    ("log", os.devnull, os.devnull, "FILE.jsonl, which python plot.py FILE.jsonl draws"),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU the compute is bf16. The weights stay fp32: bf16 would round an update at lr 1e-6 away.
AUTOCAST = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def load_policy(name):
    """(model, tokenizer). The model is and stays in eval mode: with dropout no ratio would be 1."""
    name = Path(__file__).parent / "tiny" if name == "tiny" else name
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)
    eos = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    if tokenizer.chat_template:
        # What closes a turn: in Qwen2.5-0.5B it is <|im_end|>, which is no EOS of its config.
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Because.")[2]
        eos.update(tokenizer(text.lstrip(), add_special_tokens=False).input_ids[:1])
    # Greedy: Draw does the sampling, without Qwen2.5's own top_k, top_p and repetition penalty.
    eos, pad = sorted(eos - {None}), tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    return model, tokenizer


class Draw(LogitsProcessor):
    """Draws from softmax(logits / temperature), with one random number per row and position."""

    def __init__(self, rows, o):
        self.temperature, self.t = o.temperature, 0
        # fp64: with fp32's 24 bits, most tokens of a probability below 6e-8 could not be drawn.
        self.U = torch.rand(rows, o.max_new_tokens, dtype=torch.float64).to(DEVICE)

    def __call__(self, input_ids, logits):
        # The first token whose cumulative probability exceeds U[i, t], whatever other rows draw.
        p = (logits / self.temperature).softmax(1).double()  # [B, V]
        c = p.cumsum(1)
        token = torch.searchsorted(c / c[:, -1:], self.U[:, [self.t]], right=True)  # [B, 1]
        self.t += 1
        return logits.scatter(1, token, torch.inf)  # generate takes the largest


@torch.no_grad()
def sample(model, tokenizer, problems, o, greedy=False):
    """One completion of each of B problems, and which of them are right."""
    words = [o.prompt.replace("{question}", problem["question"]) for problem in problems]
    texts = [text + "\n" for text in words]  # plain text, for a model without a chat template
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in words]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    bos = not tokenizer.chat_template  # a template writes its own
    prompt = tokenizer(texts, add_special_tokens=bos, padding=True, return_tensors="pt").to(DEVICE)
    draw = [] if greedy else [Draw(len(problems), o)]
    with AUTOCAST:
        ids = model.generate(**prompt, max_new_tokens=o.max_new_tokens, logits_processor=draw)
    completions = ids[:, prompt.input_ids.shape[1] :]  # [B, T], after the prompts [B, L]
    # The first EOS is in the mask, as the policy must learn to stop. Padding may be an EOS too.
    is_eos = torch.isin(completions, torch.tensor(model.generation_config.eos_token_id).to(DEVICE))
    rollout = types.SimpleNamespace(ids=ids, completions=completions, ref_logprobs=None)
    rollout.mask = is_eos.cumsum(1) - is_eos.long() == 0  # [B, T] no EOS before this token
    rollout.attention = torch.cat([prompt.attention_mask, rollout.mask], 1)  # [B, L + T]
    rollout.truncated = ~is_eos.any(1)  # [B]
    # Without EOS, but with the other special tokens: a model may have learned #### as one.
    kept = zip(completions, rollout.mask & ~is_eos, strict=True)
    rollout.texts = tokenizer.batch_decode([row[on] for row, on in kept])
    graded = zip(rollout.texts, problems, rollout.truncated.tolist(), strict=True)
    right = [correct(text, problem["answer"], cut) for text, problem, cut in graded]
    rollout.right = torch.tensor(right, device=DEVICE)  # [B]
    return rollout


def logprobs_of(model, rollout, rows, o):
    """log pi_theta(o_{i,t}) and the entropy in nats, both [B, T], of these rows of the rollout."""
    attention, mask = rollout.attention[rows], rollout.mask[rows]
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # of the tokens without the padding
    how = {"attention_mask": attention, "position_ids": positions, "use_cache": False}
    with AUTOCAST:
        logits = model(rollout.ids[rows], logits_to_keep=mask.shape[1] + 1, **how).logits
    # The logits at a token predict the next one, so the last are of no use. The temperature is
    # that of Draw: these are the log-probabilities with which the tokens were drawn.
    logp = (logits[:, :-1].float() / o.temperature).log_softmax(2)  # [B, T, V]
    entropy = -(logp.exp() * logp).sum(2).detach()
    logprobs = logp.gather(2, rollout.completions[rows][..., None])[..., 0]
    return logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)


@torch.no_grad()
def measure(model, rollout, rows, o):
    """`logprobs_of` in micro-batches, without a graph."""
    parts = [logprobs_of(model, rollout, part, o) for part in rows.split(o.micro_batch)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def update(model, optimizer, loss, rollout, rows, o):
    """One optimizer step, with dL/dtheta = sum_{i,t} dL/dlogp_{i,t} dlogp_{i,t}/dtheta."""
    # First dL/dlogp, of the whole mini-batch at once: the loss divides by its rows or its tokens.
    # In a step's first update pi_theta is pi_old: every ratio is 1, and the loss is -1 times a mean
    # of the advantages. GRPO's is 0, TEPO's weighs tokens and is not. Neither gradient is.
    logprobs, entropy = measure(model, rollout, rows, o)
    old, A, mask = rollout.old_logprobs[rows], rollout.advantages[rows], rollout.mask[rows]
    # Whatever else the loss has a keyword for, such as entropy, old_entropy and ref_logprobs.
    by_name = inputs(loss, rollout, rows, entropy, o.max_new_tokens)
    value = loss(logprobs.requires_grad_(), old, A, mask, **by_name)
    (gradient,) = torch.autograd.grad(value, logprobs)  # [B, T]
    # Then dlogp/dtheta, in the memory of one micro-batch.
    for part, g in zip(rows.split(o.micro_batch), gradient.split(o.micro_batch), strict=True):
        logprobs_of(model, rollout, part, o)[0].backward(g)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if gradient.any():  # without one, AdamW's momentum would move the weights all the same
        optimizer.step()
    optimizer.zero_grad()
    signal = mask & (A.view(len(A), -1) != 0)  # [B, T] tokens with an advantage
    clipped = gradient[signal] == 0  # (a KL term in the loss would hide some)
    log_ratio = (logprobs - old)[signal].detach()
    kl = log_ratio.expm1() - log_ratio  # k3 before this update; mean: KL(pi_old || pi_theta), nats
    return torch.stack([kl.sum(), clipped.sum(), signal.sum(), norm])


def step(model, reference, tokenizer, optimizer, method, problems, history, o):
    """One step on these problems. Returns its metrics."""
    # 1 Sample G completions of each prompt, side by side, and 2 reward them.
    rollout = sample(model, tokenizer, [p for p in problems for _ in range(o.group_size)], o)
    rewards, rollout.history = rollout.right, history
    # Log-probabilities of our own pass, not of generate: the ratio is 1 at first only if both of
    # its sides come from the same code, and from the same micro-batches.
    mini_batches = torch.arange(len(rewards)).tensor_split(min(o.updates, len(rewards)))
    parts = [measure(model, rollout, rows, o) for rows in mini_batches]
    rollout.old_logprobs, rollout.entropy = map(torch.cat, zip(*parts, strict=True))  # [B, T]
    if reference is not None:
        rollout.ref_logprobs, _ = measure(reference, rollout, torch.arange(len(rewards)), o)
    # 3 Compute the advantages, [B] or [B, T].
    by_name = inputs(method.advantages, rollout, slice(None), rollout.entropy, o.max_new_tokens)
    rollout.advantages = method.advantages(rewards, o.group_size, **by_name)
    # 4 Update the policy.
    updates = [update(model, optimizer, method.loss, rollout, rows, o) for rows in mini_batches]
    kl, clipped, signal, norm = torch.stack(updates).sum(0).tolist()
    return {
        "reward": rewards.mean().item(),
        "accuracy": rollout.right.mean().item(),
        "entropy": rollout.entropy[rollout.mask].mean().item(),
        "kl": kl / max(1, signal),
        "clip_frac": clipped / max(1, signal),
        "grad_norm": norm / len(updates),
        "length": rollout.mask.sum(1).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
        "completions": rollout.texts,
    }


def evaluate(model, tokenizer, problems, o):
    """The greedy accuracy on held-out problems, with Wilson's 95% interval."""
    p = sample(model, tokenizer, problems, o, greedy=True).right.mean().item()
    n, z = len(problems), 1.959964
    centre = p + z**2 / (2 * n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    tqdm.write(f"greedy accuracy on {n} held-out problems: {p:.3f} (95%: {low:.3f}-{high:.3f})")
    return {"accuracy": p, "ci95": [low, high], "n": n}


def main(argv=None):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for name, tiny, _, meaning in OPTIONS:
        parser.add_argument("--" + name.replace("_", "-"), type=type(tiny), help=meaning)
    given = vars(parser.parse_args(argv))
    embedded = given.get("model", "tiny") == "tiny" and given.get("data") != "gsm8k"
    defaults = {name: tiny if embedded else other for name, tiny, other, _ in OPTIONS}
    o = types.SimpleNamespace(**{**defaults, **given})
    torch.manual_seed(o.seed)
    model, tokenizer = load_policy(o.model)
    if o.algo.endswith(".py"):
        method = types.ModuleType("method")
        importlib.machinery.SourceFileLoader("method", o.algo).exec_module(method)
        with_advantages(method)  # GRPO's, if it has none
    else:
        method = load_method(o.algo)
    beta = parameters(method.loss).get("beta")  # the weight of a KL to the start policy
    reference = load_policy(o.model)[0] if beta is not None and beta.default > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    held_out = load_problems(o.data, "test")
    train, _ = split_overlap(load_problems(o.data, "train"), held_out)
    batches = [problems_at(train, o.seed, i * o.prompts, o.prompts) for i in range(o.steps)]
    history = []  # the mean reward of each step: HA-DW's `advantages` asks for it
    about = {"algo": o.algo, "seed": o.seed}
    with open(o.log, "w", buffering=1) as log:  # line by line
        line = evaluate(model, tokenizer, held_out[: o.eval_n], o)
        print(json.dumps({**about, "phase": "eval", "step": 0, **line}), file=log)
        bar = tqdm(batches, unit="step")
        for number, problems in enumerate(bar, 1):
            optimizer.param_groups[0]["lr"] = o.lr * min(1.0, number / max(1, o.warmup))
            line = step(model, reference, tokenizer, optimizer, method, problems, history, o)
            history.append(line["reward"])
            print(json.dumps({**about, "phase": "train", "step": number, **line}), file=log)
            bar.set_postfix(accuracy=line["accuracy"], entropy=line["entropy"])
        line = evaluate(model, tokenizer, held_out[: o.eval_n], o)
        print(json.dumps({**about, "phase": "eval", "step": o.steps, **line}), file=log)
    return model


if __name__ == "__main__":
    main()
