"""Train the checkpoint beside this file from random weights: `python tiny/pretrain.py`.

A Qwen2 model of 0.7 M weights reads the problems of problems.py, each with one attempt by a
simulated student. The student can work a problem out line by line, but usually does not: before
every line it may give up and write `#### n`, doing the remaining steps in its head, where most of
them go wrong. The longer the problem, the sooner it gives up. So the model knows how to reason and
rarely does it. Reinforcement learning has to find that behaviour and make it frequent.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "steps with rising haste (default 4000)"
    parser.add_argument("--steps", type=int, default=4000, help=text)
    text = "steps after them, with full haste and a third of --lr (default 1200)"
    parser.add_argument("--more", type=int, default=1200, help=text)
    parser.add_argument("--batch", type=int, default=32, help="rows per step (default 32)")
    text = "highest learning rate (default 0.003)"
    parser.add_argument("--lr", type=float, default=3e-3, help=text)
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    text = "folder of the checkpoint (default: this one)"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help=text)
    return parser.parse_args()


if __name__ == "__main__":  # --help and a wrong option do not wait for torch to be imported
    parse_args()

import torch
from problems import draw, line, problems, split_of
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# Probability of giving up before the first line, by the number of steps, and before a later line.
GIVE_UP_FIRST = {2: 0.2, 3: 0.5, 4: 0.8, 5: 0.9}
GIVE_UP_LATER = 0.3
# Probability that a step goes wrong, on paper and in the head, and by how much.
SLIP_PAPER, SLIP_HEAD = 0.03, 0.5
SLIPS = (-10, -2, -1, 1, 2, 10)
# Share of the training steps over which the student's haste rises from 0 to 1. At first it learns
# to add.
PATIENT = 0.6
POOL = 32  # batches that are drawn, sorted by length and shuffled together


def attempt(rng, start, steps, haste=1.0):
    """The student's answer to a problem: some lines of work, then `#### n`.

    haste multiplies the probability of giving up.
    """

    def add(count, change, slip):
        wrong = rng.random() < slip
        return count + change + (rng.choice(SLIPS) if wrong else 0)

    lines, count = [], start
    for i, change in enumerate(steps):
        give_up = GIVE_UP_LATER if i else GIVE_UP_FIRST[len(steps)]
        if rng.random() < haste * give_up:
            for later in steps[i:]:
                count = add(count, later, SLIP_HEAD)
            break
        before = count
        count = add(before, change, SLIP_PAPER)
        lines.append(line(before, change, count))
    return "\n".join([*lines, f"#### {count}"])


def build_tokenizer():
    """Qwen2's kind of tokenizer (byte-level BPE, single digits), with merges learned from the
    problems.
    """
    texts = (f"{p['question']}\n{p['answer']}" for p in problems(5000, 0, "train"))
    blank = Qwen2Tokenizer(pad_token="<|pad|>", padding_side="left")
    return blank.train_new_from_iterator(texts, vocab_size=600, show_progress=False)


def build_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Short, because nothing here is a hundred tokens away.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # About 1/sqrt(128). With the usual 0.02 it learns half as fast.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def batches(tokenizer, rng, batch, steps, patient):
    """Yield `steps` batches of training problems and attempts: (ids, labels), both [batch, T].

    Rows of similar length go together. patient: share of the steps over which the student's haste
    rises from 0 to 1; with 0 it is 1 from the start.
    """
    done = 0
    while done < steps:
        haste = min(1.0, done / (steps * patient)) if patient else 1.0
        rows = attempts(tokenizer, rng, POOL * batch, haste)
        rows.sort(key=lambda row: len(row[0] + row[1]))
        chunks = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(chunks)
        for chunk in chunks[: steps - done]:
            yield padded(chunk, tokenizer)
            done += 1


def attempts(tokenizer, rng, count, haste):
    """`count` training problems with an attempt each: [(question ids, answer ids)], without EOS."""
    questions, answers = [], []
    while len(questions) < count:
        question, start, steps = draw(rng)
        if split_of(question) == "train":
            questions.append(question + "\n")
            answers.append(attempt(rng, start, steps, haste))
    asked = tokenizer(questions).input_ids
    said = tokenizer(answers).input_ids
    return list(zip(asked, said, strict=True))


def padded(rows, tokenizer):
    """(ids, labels), right-padded to [B, T]; the loss is on the answer and its EOS."""
    rows = [(asked, said + [tokenizer.eos_token_id]) for asked, said in rows]
    width = max(len(asked + said) for asked, said in rows)
    ids, labels = [], []
    for asked, said in rows:
        rest = width - len(asked + said)
        ids.append(asked + said + [tokenizer.pad_token_id] * rest)
        labels.append([-100] * len(asked) + said + [-100] * rest)
    return torch.tensor(ids), torch.tensor(labels)


def fit(model, data, steps, lr):
    """Train with AdamW on the batches of data; the learning rate rises, then falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    began, mean = time.time(), 0.0
    for step, (ids, labels) in enumerate(data, 1):
        warm, left = min(1, step / 100), (steps - step) / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.5 - 0.5 * math.cos(math.pi * left))
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += (loss.item() - mean) / min(step, 100)
        if step % 100 == 0 or step == steps:
            print(f"step {step}  loss {mean:.3f}  {time.time() - began:.0f} s", flush=True)


def main():
    args = parse_args()
    torch.use_deterministic_algorithms(True)
    # Sums over several threads round differently, and a model this small gains little from them.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    began = time.time()
    hasty = batches(tokenizer, random.Random(args.seed), args.batch, args.steps, PATIENT)
    fit(model, hasty, args.steps, args.lr)
    more = batches(tokenizer, random.Random(args.seed + 1), args.batch, args.more, patient=0)
    fit(model, more, args.more, args.lr / 3)
    # Sampling is what was trained: no top_k, top_p or repetition penalty.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"weights": model.num_parameters(), "seconds": round(time.time() - began)}))


if __name__ == "__main__":
    main()
