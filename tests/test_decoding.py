"""decoding.py: what is graded, and what is shown of each token, for tokenizers of every kind."""

import random

import pytest
import torch
from prompt_folders import (
    byte_fallback,
    sentencepiece_like,
    tokenizer_with,
    wordlevel,
    wordpiece,
)

from trainer.decoding import decode, text_of, token_texts
from trainer.rollout import Rollout

TOKENIZERS = {
    "byte-level": tokenizer_with(None),
    "special words": tokenizer_with(None, "####", "<think>", "</think>"),
    "Metaspace": sentencepiece_like(),
    "byte fallback": byte_fallback(),
    "WordPiece": wordpiece(),
    "WordLevel": wordlevel("#", "1", "8", "18"),
}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def decoded(tokenizer, ids, eos=None):
    """`decode` of one completion, which ends with `eos`, or was cut off."""
    row = torch.tensor([ids if eos is None else [*ids, eos, *ids]])
    mask = torch.arange(row.shape[1])[None] < (len(ids) + (eos is not None))
    return decode(tokenizer, Rollout([], row, mask, torch.tensor([eos is None])))[0]


def test_a_completion_is_cut_at_its_eos_by_position():
    """Whether or not the tokenizer calls that token special; what was cut off is there in full."""
    for tokenizer in TOKENIZERS.values():
        ids = ids_of(tokenizer, "18 , 18")
        assert decoded(tokenizer, ids, tokenizer.eos_token_id) == decoded(tokenizer, ids)
        ordinary = ids_of(tokenizer, "8")[-1]
        assert decoded(tokenizer, ids[:1], ordinary) == tokenizer.decode(ids[:1])


def test_only_bos_and_padding_are_hidden():
    tokenizer = TOKENIZERS["special words"]
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>"})
    text = "<think>9+9</think>\n#### 18"
    ids = ids_of(tokenizer, f"<bos>{text}<pad><pad>")
    assert decoded(tokenizer, ids) == decoded(tokenizer, ids, tokenizer.eos_token_id) == text
    sentencepiece = sentencepiece_like()
    ids = [1, *ids_of(sentencepiece, "#### 18"), 1]
    assert decoded(sentencepiece, ids, 2) == "#### 18"


def prefixes(tokenizer, ids):
    """What `token_texts` is, as a slow loop: each prefix decoded whole."""
    text, told, found = text_of(tokenizer, ids), 0, []
    for n in range(1, len(ids) + 1):
        prefix = text_of(tokenizer, ids[:n])
        same = len(prefix)
        while not text.startswith(prefix[:same]):
            same -= 1
        found.append(text[told:same])
        told = max(told, same)
    return found


BY_HAND = [
    ("byte-level", "a \u00bd b", ["a", " ", "", "\u00bd", " b"]),
    ("byte-level", "\U0001f600!", ["", "", "", "\U0001f600", "!"]),
    ("special words", "<think>1</think>####", ["<think>", "1", "</think>", "####"]),
    ("Metaspace", "is 1 8", ["", "i", "s", " ", "1", " ", "8"]),
    ("WordPiece", "they're eating, 18.", ["they", " '", " re", " eat", "ing", ",", " 18", "."]),
    ("WordLevel", "18 what # 1", ["18", " <unk>", " #", " 1"]),
]


@pytest.mark.parametrize(("name", "text", "want"), BY_HAND)
def test_the_text_of_each_token_by_hand(name, text, want):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    assert token_texts(tokenizer, ids, ended=False) == want == prefixes(tokenizer, ids)
    end = tokenizer.eos_token_id
    assert token_texts(tokenizer, [*ids, end], ended=True) == [*want, tokenizer.eos_token]


TEXTS = "\u00bd|\U0001f600|a|is |\u00e9|#### 18|\n|\u65e5\u672c|it's| , ".split("|")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_texts_of_the_tokens_are_the_completion_if_joined(name):
    """Of real text they are the differences of decoded prefixes, of any ids as many texts."""
    tokenizer, draw = TOKENIZERS[name], random.Random(0)
    for _ in range(60):
        ids = ids_of(tokenizer, "".join(draw.choices(TEXTS, k=draw.randrange(12))))
        assert token_texts(tokenizer, ids, False) == prefixes(tokenizer, ids)
        ids = draw.choices(range(len(tokenizer)), k=draw.randrange(60))
        ids = draw.choice([ids, ids[:3] * 20, [tokenizer.eos_token_id] * 30 + ids])
        texts = token_texts(tokenizer, ids, False)
        assert len(texts) == len(ids) and "".join(texts) == text_of(tokenizer, ids)


@pytest.mark.parametrize("ids", [[258], [197, 192], [258] * 9 + [197, 192], [2, 258], [261, 265]])
def test_the_time_grows_with_the_length(ids, monkeypatch):
    """Counted in tokens that are decoded: bytes that are no text, characters, EOS, words."""
    tokenizer, counts = TOKENIZERS["byte fallback"], []
    real = tokenizer.decode

    def decode(ids, **how):
        counts[-1] += len(ids)
        return real(ids, **how)

    monkeypatch.setattr(tokenizer, "decode", decode)
    for length in (500, 2000):
        counts.append(0)
        token_texts(tokenizer, (ids * length)[:length], False)
    assert counts[1] < 5 * counts[0]
