"""The embedded checkpoint and its problems: true, disjoint, lossless in tokens, and as weak at the
start as is said.
"""

import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import correct
from tiny.problems import draw, problems, split_of, worked

TINY = Path(__file__).resolve().parent.parent / "tiny"
MORE, LESS = {"buys", "finds", "wins", "gets"}, {"sells", "loses", "uses", "drops"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def pretrain():
    """tiny/pretrain.py, which finds problems.py beside itself, as it does when run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TINY)
        import pretrain
    return pretrain


def count_by_reading(question):
    """The count before and after each event of the story, from the question's words alone."""
    counts = [int(re.match(r"\w+ has (\d+) ", question)[1])]
    for verb, number in re.findall(r"(\w+) (\d+)", question.split(". ", 1)[1]):
        assert (verb in MORE) != (verb in LESS) and int(number) > 0, question
        counts.append(counts[-1] + (int(number) if verb in MORE else -int(number)))
    return counts


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_right(split):
    for problem in problems(2000, 1, split):
        counts = count_by_reading(problem["question"])
        *lines, last = problem["answer"].split("\n")
        assert 2 <= len(lines) <= 5 and min(counts) >= 0 and max(counts) <= 99
        assert last == f"#### {counts[-1]}"
        for line, before, after in zip(lines, counts, counts[1:], strict=False):
            a, op, b, c = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()
            assert (int(a), int(c)) == (before, after)
            assert int(c) == {"+": int(a) + int(b), "-": int(a) - int(b)}[op]
        assert len(counts) == len(lines) + 1


def test_splits_are_disjoint_and_drawn_alike_each_time():
    train = [p["question"] for seed in range(3) for p in problems(3000, seed, "train")]
    test = [p["question"] for seed in range(3) for p in problems(3000, seed, "test")]
    assert {split_of(q) for q in train} == {"train"} and {split_of(q) for q in test} == {"test"}
    assert not set(train) & set(test)
    assert len(set(train[:3000])) == 3000  # no duplicates within a call
    assert problems(50, 7, "test") == problems(50, 7, "test") != problems(50, 8, "test")
    assert problems(50, 7, "test") == problems(80, 7, "test")[:50]
    with pytest.raises(ValueError, match="split"):
        problems(1, 0, "dev")


def test_tokens_are_lossless_and_few(tokenizer, pretrain):
    # AutoTokenizer makes a Qwen2Tokenizer of it, whatever the folder says: it must be the one that
    # was trained with
    made = pretrain.build_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    for problem in problems(500, 2, "train"):
        asked, said = problem["question"] + "\n", problem["answer"]
        for text in (asked, said):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text and ids == made(text).input_ids
        assert len(tokenizer(asked).input_ids) <= 40 and len(tokenizer(said).input_ids) < 50
    for text in (
        "Ünïcode → 1,234.50\n\n  ##  <<6*7=42>>\t#### -3 ",
        "Natalia sold clips to 48 of her friends.",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("190").input_ids] == ["1", "9", "0"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and tokenizer.chat_template is None


def test_checkpoint_is_small_and_hides_nothing(tokenizer):
    size = sum(path.stat().st_size for path in TINY.iterdir() if path.is_file())
    assert size <= 4 * 2**20
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert model.config.model_type == "qwen2" and model.num_parameters() <= 900_000
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings
    settings = model.generation_config
    assert (
        settings.eos_token_id == tokenizer.eos_token_id
        and settings.pad_token_id == tokenizer.pad_token_id
    )
    assert not any(
        (settings.top_k, settings.top_p, settings.temperature, settings.repetition_penalty)
    )


def test_it_starts_weak_but_not_hopeless(tokenizer):
    model, held_out = AutoModelForCausalLM.from_pretrained(TINY), problems(200, 0, "test")
    batch = tokenizer(
        [p["question"] + "\n" for p in held_out],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    out = model.generate(**batch, max_new_tokens=64, do_sample=False)[:, batch.input_ids.shape[1] :]
    assert (out == tokenizer.eos_token_id).any(1).float().mean() > 0.95  # it knows how to stop
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    accuracy = sum(
        correct(text, p["answer"]) for text, p in zip(texts, held_out, strict=True)
    ) / len(held_out)
    assert 0.10 <= accuracy <= 0.40


def test_pretraining_data_holds_no_test_problem_and_no_prompt_in_the_loss(tokenizer, pretrain):
    for ids, labels in pretrain.batches(
        tokenizer, random.Random(0), batch=16, steps=40, patient=0.6
    ):
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            question, _, answer = tokenizer.decode(row, skip_special_tokens=True).partition("\n")
            assert split_of(question) == "train"
            target = [i for i in label if i != -100]
            assert target[-1] == tokenizer.eos_token_id and tokenizer.decode(target[:-1]) == answer


def test_the_student_mostly_blurts_and_is_mostly_wrong(pretrain):
    rng, full, blurted = random.Random(0), [], []
    for _ in range(5000):
        _, start, steps = draw(rng)
        right, said = worked(start, steps), pretrain.attempt(rng, start, steps)
        full.append(said.count("\n") == len(steps))
        if "\n" not in said:
            blurted.append(said == right.split("\n")[-1])
    assert 0.02 < sum(full) / len(full) < 0.35 and 0.5 < len(blurted) / 5000
    assert 0 < sum(blurted) / len(blurted) < 0.5


def test_pretraining_is_deterministic_and_makes_a_checkpoint(pretrain, tmp_path, monkeypatch):
    line = "pretrain.py --steps 3 --more 2 --batch 8 --seed 5 --out".split()
    try:
        for name in "ab":
            monkeypatch.setattr(sys, "argv", [*line, str(tmp_path / name)])
            pretrain.main()
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    made, shipped = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "a", TINY))
    assert made.get_vocab() == shipped.get_vocab()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in TINY.iterdir()} - {
        "__pycache__", "README.md", "pretrain.py", "problems.py"
    }  # fmt: skip
