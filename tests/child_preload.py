"""What the server of child.py runs once: a short training, so that whatever torch and transformers import late is there
in each process that is forked from it. No thread may be left over: a fork does not copy it, but the locks it holds.
"""

import contextlib
import io
import signal
import tempfile

import torch
import tqdm

import train

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread that watches the bars
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    words = (
        "--preset tiny --algo grpo --steps 1 --prompts 1 --max-new-tokens 4 --eval-n 1 --k 1 --out"
    )
    with contextlib.redirect_stderr(io.StringIO()):
        assert train.main([*words.split(), folder]) == 0
signal.signal(signal.SIGINT, signal.default_int_handler)
