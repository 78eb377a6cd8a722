"""Runs once in the fork server of child.py: a short training.

After it, every module that torch and transformers import late is in memory, and each child that is
forked has it at once. The server must have no second thread: a fork does not copy threads, but it
copies the locks they hold, which then nobody releases.
"""

import contextlib
import io
import signal
import tempfile

import torch
import tqdm

import train
from trainer import data

torch.set_num_threads(1)
data.TINY_TRAIN = 500  # as in conftest.py
tqdm.tqdm.monitor_interval = 0  # no thread that watches the bars
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    words = "--preset tiny --algo grpo --steps 1 --prompts 1 --max-new-tokens 4 --eval-n 1 --k 1"
    with contextlib.redirect_stderr(io.StringIO()):
        assert train.main([*words.split(), "--out", folder]) == 0
# Ctrl-C raises KeyboardInterrupt in a child, whatever the training above or the shell has set.
signal.signal(signal.SIGINT, signal.default_int_handler)
