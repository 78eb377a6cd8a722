"""Runs train.main in child processes, with a planned fault in them.

A fork server imports torch and transformers once (child_preload.py), and every child is forked from
it: a child starts at once instead of after five seconds. Each child is a real process, so SIGKILL,
SIGINT and limits on files do to it what they do to `python train.py`.

A `fault` is the name of a function below, followed by its arguments. It is called in the child
before train.main.
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
    """Starts `train.py argv` on one thread, its output in the file `log`; returns the process."""
    # The fork server starts with the first child and takes its environment from here.
    of_server = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    before = {name: os.environ.get(name) for name in of_server}
    os.environ.update(of_server)
    try:
        process = CONTEXT.Process(target=_run, args=([str(word) for word in argv], str(log), fault))
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


def run(argv, log, *fault):
    """Runs `train.py argv` to its end: (exit status, or -N if signal N ended it; its output)."""
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
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), line_buffering=True)
    import torch
    from tqdm import tqdm

    import train
    from trainer import grading

    # tqdm's own lock is shared by all forks: a child that is killed while it draws its bar would
    # keep it, and the others would wait forever.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    grading.correct = parity
    train.plot_runs = lambda *_: None  # takes half of the time, and is tested elsewhere
    if fault:
        globals()[fault[0]](*fault[1:])
    sys.exit(train.main(argv))


def parity(text, answer, truncated):
    """A reward that is 1 for about every other completion, and always the same for the same text.

    The tiny model's completions of 8 tokens are hardly ever right. With the real reward nearly all
    groups would be constant, no update would move a weight, and a lost update would not show.
    """
    return float(zlib.crc32(text.encode()) % 2)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_line(n):
    """SIGKILL before the n-th executed line of the files in `count_lines`.

    A process can be killed between any two of its lines. A random n tries such a point, and no
    handler, `finally` or `with` of the program can react to SIGKILL.
    """
    count_lines(lambda count, code: count == n and kill())


def write_line_counts(path):
    """Writes to a file how many such lines run before `loop` begins, and how many in total.

    With these counts a test knows from which n `kill_at_line` hits the start, a step or the end.
    """
    before_loop = []

    def count_and_write(count, code):
        if code.co_name == "loop" and not before_loop:
            before_loop.append(count)
        if code.co_name == "summary":
            Path(path).write_text(f"{before_loop[0]} {count}")

    count_lines(count_and_write)


def count_lines(tell):
    """Calls tell(count, code object) before each line of these files that is executed."""
    names = "train.py run/session.py trainer/update.py run/checkpoint.py".split()
    files = {str(ROOT / name) for name in names}
    count = 0

    def in_ours(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            tell(count, frame.f_code)
        return in_ours

    sys.settrace(lambda frame, *_: in_ours if frame.f_code.co_filename in files else None)


def kill_in_write(what):
    """SIGKILL in the middle of a checkpoint, at one of its four critical points.

    "model", "state": with that file half written, as it is when a write is interrupted;
    "written": with all files written, before the folder is renamed to its final name;
    "renamed": just after that.
    """
    from run import checkpoint

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


def interrupt_in_step(step, times, number=signal.SIGINT):
    """A signal, `times` times, in a step: between its rollout and its first update."""
    import train

    measure = train.Updater.measure

    def interrupted(self, *args, **options):
        measure(self, *args, **options)
        interrupted.calls += 1
        if interrupted.calls == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    interrupted.calls = 0
    train.Updater.measure = interrupted


def file_size_limit(size):
    """A write that would make a file longer than `size` bytes fails, as on a full disk.

    To the program it looks the same: write() raises OSError with part of the data written. SIGXFSZ,
    which would end the process, is ignored.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def true_reward():
    """The real reward instead of `parity`."""
    import rewards
    from trainer import grading

    grading.correct = rewards.correct


def little_memory():
    """--micro-batch auto finds memory for one row only."""
    from trainer import memory

    memory.free_bytes = lambda device: 0
