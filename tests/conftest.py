"""Tests run offline, on one seed, and import the flat files of the project root."""

import copy
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is imported. The models are tiny: a second thread would only wait, and on a busy
# machine a test would take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest.ini's filters, for the processes that tests start
os.environ["PYTHONWARNINGS"] = "error::FutureWarning,error::DeprecationWarning"
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # of the models: tools/gpu.sh sets it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def tiny_model(vocab=24, seed=0):
    """A Llama of two small layers. Random weights, large enough that its entropies vary.

    Its norms are replaced by torch's RMSNorm. transformers' norms compute in fp32 even in an fp64
    model; then two gradients that are equal in exact arithmetic, of a prompt shared by its rows and
    of a prompt repeated per row, would agree to 1e-6 only.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    norm = torch.nn.RMSNorm(16, eps=config.rms_norm_eps)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, copy.deepcopy(norm))
    return model.to(DEVICE)


@pytest.fixture(autouse=True, scope="session")
def few_problems():
    """500 embedded problems: to make and encode all 20,000 takes longer than a small run.

    Returns how many a run has.
    """
    from trainer import data

    every, data.TINY_TRAIN = data.TINY_TRAIN, 500
    return every


@pytest.fixture(scope="module")
def all_problems(few_problems):
    """As many problems as a run has: for a module in which it matters which are drawn."""
    from trainer import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_TRAIN", few_problems)
        yield


@pytest.fixture
def quiet_run(monkeypatch):
    """train.main without pictures; afterwards the signals' handlers are those of pytest again."""
    import train

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal that train.py leaves alone is seen
        handlers[number] = signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr(train, "plot_runs", lambda *_: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def file(tmp_path):
    """Twelve problems of the embedded generator."""
    from small import write

    from tiny.problems import problems

    return write(tmp_path / "problems.jsonl", problems(12, 0, "train"))
