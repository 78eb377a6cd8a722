"""machine.py: a GPU or why there is none, and bf16 only where it is no emulation. No GPU needed."""

import contextlib
import shutil

import pytest
import torch

from run import machine, start
from run.checks import fill
from run.parser import parse


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A function that makes this machine look like another one."""

    def change(gpus=0, bf16=True, driver=False, smi=False, built="12.8"):
        """gpus: how many torch sees. built: the CUDA version that torch is built for, or None."""
        (tmp_path / "driver").mkdir(exist_ok=True)
        monkeypatch.setattr(machine, "DRIVER", str(tmp_path / ("driver" if driver else "none")))
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if smi else None)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        entered = []

        def supported(including_emulation=True):
            return including_emulation or (bf16[int(entered[-1][5:])] if entered else bf16)

        @contextlib.contextmanager
        def device(name):
            entered.append(name)
            yield
            entered.pop()

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "device", device)

    return change


NONE = "no CUDA GPU was found"
NOT_BUILT = "is built without CUDA: install one with it, pytorch.org/get-started/locally"
NOT_SEEN = "finds no GPU: is CUDA_VISIBLE_DEVICES set, or the driver older than its CUDA?"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"built": None}, NONE),
        ({"built": "12.8"}, NONE),
        ({"built": None, "driver": True}, NOT_BUILT),
        ({"built": None, "smi": True}, NOT_BUILT),
        ({"built": "12.8", "driver": True}, NOT_SEEN),
        ({"built": "12.8", "driver": True, "smi": True}, NOT_SEEN),
    ],
)
def test_a_torch_without_cuda_is_no_machine_without_a_gpu(given, line, pretend, capsys):
    pretend(**given)
    start.chosen({})
    told = capsys.readouterr().out
    assert told.startswith("preset tiny (") and line in told and told.count("\n") == 1
    assert (torch.__version__ in told) == (line != NONE)
    for name in ("cuda", "cuda:3"):
        with pytest.raises(ValueError) as refused:
            fill({"device": name})
        assert str(refused.value).startswith(f"--device {name}: ") and line in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "gpus", "bf16", "dtype", "line"),
    [
        ("", 0, False, "fp32", ""),
        ("", 1, True, "bf16", ""),
        ("", 1, False, "fp32", "--dtype fp32: this GPU only emulates bf16, which is slow\n"),
        ("--dtype bf16", 1, False, "bf16", "--dtype bf16: this GPU only emulates bf16"),
        ("--device cpu", 1, False, "fp32", ""),
        ("--device cuda:1", 2, [False, True], "bf16", ""),
        ("--device cuda:1", 2, [True, False], "fp32", "--dtype fp32: this GPU"),
    ],
)
def test_bf16_is_chosen_on_a_gpu_that_does_not_emulate_it(
    argv, gpus, bf16, dtype, line, pretend, capsys
):
    """T4, RTX 20 and GTX 16 emulate it; each of several GPUs is asked for itself."""
    pretend(gpus, bf16)
    o = fill(parse(argv.split()))
    assert o.dtype == dtype
    machine.warn_of_slow_bf16(o)
    told = capsys.readouterr().out
    assert told.startswith(line) and told.count("\n") == bool(line)


def test_a_gpu_that_is_not_there_is_counted(pretend):
    pretend(gpus=2)
    with pytest.raises(ValueError, match="--device cuda:2: torch sees 2 CUDA GPUs here"):
        fill({"device": "cuda:2"})


@pytest.mark.parametrize(
    ("flags", "slow"),
    [("fpu avx2", True), ("fpu avx512_bf16", False), ("amx_bf16 fpu", False), (None, False)],
)
def test_bf16_without_instructions_for_it_is_said_to_be_slow(flags, slow, tmp_path, capsys):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\nbugs: none\n")
    for dtype in ("bf16", "fp32"):
        o = fill(parse(["--dtype", dtype, "--device", "cpu"]))
        machine.warn_of_slow_bf16(o, tmp_path / "cpuinfo")
        assert ("several times as long" in capsys.readouterr().out) == (slow and dtype == "bf16")
