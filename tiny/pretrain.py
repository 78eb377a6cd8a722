"""Makes the checkpoint beside this file, from nothing: `python tiny/pretrain.py`.

A Qwen2 model of 0.7 M weights reads problems from problems.py, each with one attempt of a made-up student. The student
can work a problem out line by line but mostly does not: before every line it may give up and blurt `#### n`, doing what
is left in its head, where most steps go wrong. The longer the problem, the sooner it gives up. So the model knows how
to reason and rarely does: what reinforcement has to find is there, and costs it one line at a time.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from problems import draw, line, problems, split_of
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# The chance to give up before a line, by how many steps are still to do: at first, and in the middle of the work.
GIVE_UP_FIRST = {2: 0.2, 3: 0.5, 4: 0.8, 5: 0.9}
GIVE_UP_LATER = 0.3
SLIP_PAPER, SLIP_HEAD = 0.03, 0.5  # the chance that a step goes wrong, on paper and in the head
PATIENT = 0.6  # the share of the steps over which the student's haste grows from none: first it learns to add


def attempt(rng, start, steps, haste=1.0):
    """The student's answer to a problem: some lines of work, then `#### n`. haste scales the chance to give up."""

    def do(count, change, slip):
        return count + change + (rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < slip else 0)

    lines, count = [], start
    for i, change in enumerate(steps):
        if rng.random() < haste * (GIVE_UP_LATER if i else GIVE_UP_FIRST[len(steps)]):
            for later in steps[i:]:
                count = do(count, later, SLIP_HEAD)
            break
        before, count = count, do(count, change, SLIP_PAPER)
        lines.append(line(before, change, count))
    return "\n".join([*lines, f"#### {count}"])


def build_tokenizer():
    """Qwen2's own kind of tokenizer, byte-level BPE with single digits, its merges learned on the problems' words."""
    texts = (f"{p['question']}\n{p['answer']}" for p in problems(5000, 0, "train"))
    blank = Qwen2Tokenizer(pad_token="<|pad|>", padding_side="left")
    return blank.train_new_from_iterator(texts, vocab_size=600, show_progress=False)


def build_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # nothing here is a hundred tokens away
        initializer_range=0.08,  # about 1/sqrt(128); with the usual 0.02 it learns half as fast
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def batches(tokenizer, rng, batch, steps, patient, pool=32):
    """`steps` batches (ids, labels), [batch, T], of training problems and attempts; rows of like length together.

    patient: the share of the steps over which the student's haste grows from none to all of it; 0: all from the start.
    """
    done, pad = 0, tokenizer.pad_token_id
    while done < steps:
        rows, haste = [], min(1.0, done / (steps * patient)) if patient else 1.0
        while len(rows) < pool * batch:
            question, start, todo = draw(rng)
            if split_of(question) == "train":
                rows.append((question + "\n", attempt(rng, start, todo, haste)))
        asked, said = (tokenizer([row[side] for row in rows]).input_ids for side in (0, 1))
        rows = sorted(zip(asked, said, strict=True), key=lambda row: len(row[0] + row[1]))
        chunks = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(chunks)
        for chunk in chunks[: steps - done]:
            chunk = [(q, a + [tokenizer.eos_token_id]) for q, a in chunk]
            width = max(len(q + a) for q, a in chunk)
            ids = torch.tensor([q + a + [pad] * (width - len(q + a)) for q, a in chunk])
            labels = torch.tensor(
                [[-100] * len(q) + a + [-100] * (width - len(q + a)) for q, a in chunk]
            )
            yield ids, labels
            done += 1


def fit(model, data, steps, lr):
    """AdamW over the batches of data, the learning rate warmed up and then a cosine to 0."""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000, help="with growing haste")
    parser.add_argument(
        "--more",
        type=int,
        default=1200,
        help="steps after them, with all of it and a third of the lr",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(
        1
    )  # sums over threads round differently; and so small a model gains little by a second
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    began = time.time()
    fit(
        model,
        batches(tokenizer, random.Random(args.seed), args.batch, args.steps, PATIENT),
        args.steps,
        args.lr,
    )
    fit(
        model,
        batches(tokenizer, random.Random(args.seed + 1), args.batch, args.more, 0),
        args.more,
        args.lr / 3,
    )
    # exactly what was trained: no top_k, top_p or repetition penalty hides in here
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"weights": model.num_parameters(), "seconds": round(time.time() - began)}))


if __name__ == "__main__":
    main()
