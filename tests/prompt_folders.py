"""Tokenizers with chat templates as well-known models have, built offline, and model folders."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TINY = Path(__file__).resolve().parent.parent / "tiny"

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{{- m.content | upper if shout and m.role == 'system' else m.content }}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
PHI3 = """
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + '\n<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
CLOSES_NOTHING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
PLAIN_WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PARTS = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{{- '<|im_end|>\nGO' }}{% endfor %}"""


def tokenizer_with(template, *special, plain=()):
    """The tiny byte-level tokenizer with more tokens, the `plain` ones not marked special."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(template=None, append_eos=False):
    """A tokenizer as Llama 2's: <s> before a text, </s> after it if so wished. What is not ASCII
    becomes <unk>.
    """
    letters = ["<unk>", "<s>", "</s>", "\u2581", *(chr(i) for i in range(33, 127)), "\n"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    single = "<s> $A </s>" if append_eos else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def fast(backend, decoder, **special):
    """A tokenizer of transformers around a backend of `tokenizers`."""
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_fallback():
    """As Llama 2's: words with a space before them, and bytes for what it has no word for."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581", "\u2581is", "\u2581a", "#", "1", "8", "ing"]
    vocab = {word: i for i, word in enumerate(words)}
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return fast(Tokenizer(model), decoder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """As BERT's: parts of words, and a decoder that takes the spaces before "," and "'re" away."""
    words = ["[UNK]", "[PAD]", "[SEP]", "they", "'", "re", "eat", "##ing", ",", ".", "#", "18"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    return fast(backend, decoders.WordPiece(cleanup=True), **special)


def wordlevel(*words):
    """Whole words, "<unk>" for others; without a decoder, so a space stands between any two."""
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def chatml_folder(path, template=CHATML):
    """A model folder as Qwen2.5-0.5B's: ChatML, and an EOS in its config that closes no turn."""
    tokenizer = tokenizer_with(template, "<|im_start|>", "<|im_end|>")
    return save(tokenizer, path)


def save(tokenizer, path):
    """A folder of the tiny model with room for the tokenizer's tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_problems(path, questions):
    rows = [{"question": question, "answer": "3"} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
