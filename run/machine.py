"""What this machine has: a CUDA GPU, or why torch finds none; instructions for bf16."""

import contextlib
import platform
import shutil
from pathlib import Path

import torch

DRIVER = "/proc/driver/nvidia"  # Linux; elsewhere the driver brings nvidia-smi


def machine_name(device):
    """The GPU, or the CPU with its number of threads, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    words = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{platform.processor() or platform.machine()} CPU, {words}"


def why_no_gpu():
    """Why torch finds no CUDA GPU, and what to install if that is the reason."""
    if not (Path(DRIVER).exists() or shutil.which("nvidia-smi")):
        return "no CUDA GPU was found"
    here = f"there is an NVIDIA driver, but this torch ({torch.__version__})"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{here} is built without CUDA: install one with it, pytorch.org/get-started/locally"
    return f"{here} finds no GPU: is CUDA_VISIBLE_DEVICES set, or the driver older than its CUDA?"


def has_bf16(device):
    """Whether a CUDA GPU computes in bf16. GPUs before Ampere emulate it, which is slow."""
    chosen = torch.cuda.device(device) if ":" in device else contextlib.nullcontext()
    with chosen:
        return torch.cuda.is_bf16_supported(including_emulation=False)


def warn_of_slow_bf16(o, cpuinfo="/proc/cpuinfo"):
    """Print a line if the compute is bf16 without instructions for it, or fp32 for lack of them."""
    if o.device != "cpu":
        if not has_bf16(o.device):
            print(f"--dtype {o.dtype}: this GPU only emulates bf16, which is slow")
        return
    if o.dtype == "bf16" and not has_cpu_bf16(cpuinfo):
        print(
            "--dtype bf16: this CPU has no instructions for it (avx512_bf16 or amx_bf16), so bf16 "
            "takes several times as long as fp32"
        )


def has_cpu_bf16(cpuinfo):
    """False for an x86 CPU without instructions for bf16; True also if that is unknown."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux
        return True
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    return not flags or bool({"avx512_bf16", "amx_bf16"} & set(flags))
