"""train.main in processes of their own, forked from one that has imported everything: a start costs no five seconds.

What goes wrong in them is planned: a `fault` is the name of a function below, and its arguments.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["child", "child_preload"])


def start(argv, log, *fault):
    """A process that runs `train.py argv` on one thread, its stdout and stderr in the file `log`."""
    here = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # for the server, which starts once
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    try:
        process = CONTEXT.Process(target=_run, args=([str(word) for word in argv], str(log), fault))
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


def run(argv, log, *fault):
    """(exit status, negative for a signal; what it printed)."""
    process = start(argv, log, *fault)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"train.py {argv} did not end: {Path(log).read_text()}")
    return process.exitcode, Path(log).read_text()


def _run(argv, log, fault):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(fd, "w"), line_buffering=True) for fd in (1, 2)
    )
    import torch
    from tqdm import tqdm

    import train

    tqdm.set_lock(
        threading.RLock()
    )  # its own is shared with the other forks: one killed while it draws would keep it
    torch.set_num_threads(1)
    train.correct = parity
    train.plot_runs = lambda *_: None  # half of the time, and tested elsewhere
    if fault:
        globals()[fault[0]](*fault[1:])
    sys.exit(train.main(argv))


def parity(text, answer, truncated):
    """A reward that is 1 about every other time: of 8 tokens, few completions are right."""
    return float(zlib.crc32(text.encode()) % 2)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_line(n):
    """SIGKILL before the n-th line of train.py, update.py and checkpoint.py that runs."""
    count_lines(lambda count, code: count == n and kill())


def write_line_counts(path):
    """Into a file: how many such lines run before `loop` begins, and how many in all so far."""
    before_loop = []

    def tell(count, code):
        if code.co_name == "loop" and not before_loop:
            before_loop.append(count)
        if code.co_name == "summary":
            Path(path).write_text(f"{before_loop[0]} {count}")

    count_lines(tell)


def count_lines(tell):
    files, count = (
        {
            str(ROOT / name)
            for name in (
                "train.py",
                "trainer/session.py",
                "trainer/update.py",
                "trainer/checkpoint.py",
            )
        },
        0,
    )

    def in_ours(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            tell(count, frame.f_code)
        return in_ours

    sys.settrace(lambda frame, *_: in_ours if frame.f_code.co_filename in files else None)


def kill_in_write(what):
    """SIGKILL with a checkpoint's model or state half written, or just before or after it gets its name."""
    from trainer import checkpoint

    def half(path):
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        kill()

    def after(function, then):
        return lambda *args: (function(*args), then(*args))

    if what == "model":
        checkpoint.write_model = after(
            checkpoint.write_model, lambda folder, *_: half(folder / "model.safetensors")
        )
    elif what == "state":
        checkpoint.torch.save = after(
            checkpoint.torch.save, lambda state, file: file.flush() or half(file.name)
        )
    else:
        rename = os.replace

        def replace(old, new):
            if "step-" in str(new):
                if what == "renamed":
                    rename(old, new)
                kill()
            rename(old, new)

        checkpoint.os.replace = replace


def interrupt_in_step(step, times):
    """SIGINT, so many times, in the middle of a step."""
    import train

    measure = train.Updater.measure

    def interrupted(self, *args):
        measure(self, *args)
        interrupted.calls += 1
        if interrupted.calls == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    interrupted.calls = 0
    train.Updater.measure = interrupted


def file_size_limit(size):
    """A write that would make a file longer than `size` bytes fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def true_reward():
    """Undo `parity`."""
    import rewards
    import train

    train.correct = rewards.correct
