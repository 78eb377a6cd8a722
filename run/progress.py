"""How far a loop is: a bar on a terminal; elsewhere, in a log file, a plain line now and then."""

import sys
import time

from tqdm import tqdm

SECONDS = 5  # between two lines of a log
BAR = "{desc} |{bar}| {elapsed}<{remaining}{postfix}"
BESIDE = len(" |======| 0:00:00<0:00:00, ")  # what a bar takes beside its name and its words


class Progress:
    """A bar of `total` parts, of which `done` are done; a context manager that ends it.

    On a terminal of any width it is one line: words for which there is no room are left out, the
    last ones first. Where stderr is no terminal, a line is printed every SECONDS if something has
    been done, and at the start and the end of what is to `leave` a trace.
    """

    def __init__(self, name, total, done=0, leave=True):
        self.total, self.done, self.first, self.leave = total, done, done, leave
        self.started = time.monotonic()
        self.told = float("-inf") if leave else self.started  # of the last line, and
        self.said = None  # the parts that it said to be done
        how = {"leave": leave, "dynamic_ncols": True, "bar_format": BAR}
        self.bar = tqdm(desc=name, total=total, initial=done, disable=None, **how)

    def show(self, done, name, words=()):
        """Say that `done` parts are done. words: what to say beside it, the least needed last."""
        self.done = done
        if self.bar.disable:
            self.print_line(name, words)
            return
        room = (self.bar.ncols or 80) - len(name) - BESIDE
        words = list(words)
        while words and len("  ".join(words)) > room:
            words.pop()
        self.bar.n = done
        self.bar.set_description_str(name, refresh=False)
        self.bar.set_postfix_str("  ".join(words))

    def print_line(self, name, words):
        now = time.monotonic()
        is_end = self.leave and self.done == self.total
        if self.done == self.said or (now - self.told < SECONDS and not is_end):
            return
        self.told, self.said = now, self.done
        if self.done > self.first:
            seconds = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            words = [f"{tqdm.format_interval(seconds)} left", *words]
        print("  ".join([name, *words]), file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


class Evaluation(Progress):
    """The bar of an evaluation, for evaluate.evaluate; it leaves nothing behind."""

    def __init__(self, problems, k):
        super().__init__("evaluate", len(problems) * (2 if k else 1), leave=False)

    def update(self, n):
        done = self.done + n
        self.show(done, f"evaluate {done}/{self.total}")
