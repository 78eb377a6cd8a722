"""--fit: the memory that a step needs, part by part, and what fits on cards of four sizes.

Arithmetic, by the formula of trainer/memory.py: the config is enough, no weights are loaded. What
autograd keeps is counted in models of one and of two layers with random weights; each further layer
is taken to keep as much as the second.
"""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from run.checkpoint import find_model
from run.names import ROOT
from run.start import adapt
from trainer.lora import adapted
from trainer.memory import SHARE, kept_per_token, parts_to_come, with_backward
from trainer.packed import FEWEST
from trainer.policy import name_outputs
from trainer.probes import any_row, head_is_plain

GIB = 2**30
CARDS = (8, 12, 16, 24)  # GiB
# Our assumption of what CUDA takes of a card, or Python, libraries, tokenizer and data of a CPU.
BESIDES = GIB // 2
PROMPT = 200  # tokens of the longest prompt: our assumption
VOCABULARY = 1024  # of the small models; only logits depend on it


def show(o):
    """Print what a step of a run with these options needs, in GiB, and what fits on the cards.

    Raises ValueError if the model has no config.
    """
    name = str(ROOT / "tiny") if o.model == "tiny" else find_model(o.model)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        mend = "pass --model FOLDER, one with a config.json"
        raise ValueError(f"--fit: no config of {name!r}: {why}; {mend}") from None
    groups, token, cached = needs(o, config)
    row = PROMPT + o.max_new_tokens  # tokens
    at_once = 1 if o.micro_batch == "auto" else int(o.micro_batch)
    sampled = o.rows if o.sample_batch == "auto" else min(o.rows, int(o.sample_batch))
    without = {title: sum(group.values()) for title, group in groups.items()}
    groups["update"][f"{at_once} x {row} tokens"] = at_once * row * token
    groups["rollout"][f"{sampled} x {row} tokens"] = sampled * cached

    how = f"LoRA of rank {o.lora}" if o.lora else "all weights trained"
    how += ", gradient checkpointing" if o.gradient_checkpointing else ""
    gpu = o.device != "cpu"
    where = "GPU" if gpu else "CPU"
    print(f"{o.model}, {how}, {o.dtype}: GiB on a {where}, by arithmetic")
    for title, group in groups.items():
        held = 0 if title in ("start", "always") else without["always"]
        for part, size in {**group, "in all": held + sum(group.values())}.items():
            print(f"  {title:9}{part:42}{size / GIB:6.2f}")
            title = ""
    if gpu:
        most = getattr(config.get_text_config(), "max_position_embeddings", 2**31)
        print_cards(o, without, row, token, cached, most)


def needs(o, config):
    """({title: {part: bytes}}, bytes of a token in an update, bytes of a row in a rollout).

    The parts at the start, always, and besides these in an update and in a rollout, without what
    depends on the rows.
    """
    gpu = o.device != "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    if o.lora:
        adapt(o, model)
    held = sum(p.nbytes for p in model.parameters())
    size = 2 if o.dtype == "bf16" else 4  # bytes of a number in the copy that samples

    update = parts_to_come(model, o.dtype, "cuda" if gpu else "cpu")
    always = {"weights": held, "AdamW's two moments": update.pop("AdamW's two moments")}
    if o.option.get("beta", 0) > 0 and not o.lora:
        always["the start policy, for the KL"] = held
    always["CUDA itself (assumed)" if gpu else "Python, tokenizer, data (assumed)"] = BESIDES
    copied = sum(layer.base.weight.nbytes for layer in adapted(model).values())
    if o.dtype == "bf16" and not o.lora:
        copied = size * weights
    rollout = {"the copy that samples": copied}
    if not gpu and weights >= FEWEST:
        rollout["weights packed for this CPU"] = size * linear
    groups = {"always": always, "update": update, "rollout": rollout}
    if gpu and o.dtype == "bf16" and o.lora:
        start = {
            "fp32 weights, until they are frozen": 4 * weights,
            "CUDA itself (assumed)": BESIDES,
        }
        groups = {"start": start, **groups}
    return groups, bytes_of_token(o, config), bytes_of_row(o, config.get_text_config(), size)


def bytes_of_token(o, config):
    """`memory.bytes_per_token` of the model of this config."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    first = small_model(config, 1)
    through_head = head_is_plain(first, any_row(first))

    def kept(model):
        if o.lora:
            adapt(o, model)
        return kept_per_token(model, o.dtype, through_head)

    one, two = kept(first), kept(small_model(config, 2))
    total = one + (layers - 1) * (two - one)
    if not through_head:  # then the logits are kept too
        more = kept(small_model(config, 1, 2 * VOCABULARY)) - one
        total += (text.vocab_size - VOCABULARY) * more // VOCABULARY
    return with_backward(total, layers, text.hidden_size, o.gradient_checkpointing)


def small_model(config, layers, vocabulary=VOCABULARY):
    """A model of this config with random weights, but for its numbers of layers and of words."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, vocabulary, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    name_outputs(model)
    return model


def bytes_of_row(o, text, size):
    """Bytes of a row in a rollout: keys and values in a cache with room for twice as many tokens,
    and its logits in three forms.
    """
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * 2 * text.num_hidden_layers * heads * width * size
    return token * (PROMPT + o.max_new_tokens) + 12 * text.vocab_size


def print_cards(o, without, row, token, cached, most):
    """The largest settings per card. without: bytes of each group without rows. most: tokens."""
    mini_batch = o.rows // o.updates
    print(f"largest --micro-batch (of {mini_batch}) and --sample-batch (of {o.rows}) for them,")
    print(f"and the longest row with --micro-batch 1 and --sample-batch {o.group_size}:")
    for card in CARDS:
        free = card * GIB - without["always"]
        for_update = SHARE["cuda"] * (free - without["update"])
        for_rollout = SHARE["cuda"] * (free - without["rollout"])
        micro_batch = min(mini_batch, int(for_update // (token * row)))
        groups = int(for_rollout // (cached * o.group_size))
        sample_batch = min(o.rows, groups * o.group_size)
        longest = min(for_update // token, for_rollout // (o.group_size * cached / row), most)
        starts = without.get("start", 0) <= SHARE["cuda"] * card * GIB
        line = "  does not fit"
        if starts and micro_batch > 0 and sample_batch > 0:
            line = f"{micro_batch:6} {sample_batch:6} {int(longest):8,} tokens"
        elif starts and longest > PROMPT:
            line = f"     -      - {int(longest):8,} tokens"
        print(f"  {card:2} GiB{line}")
