"""Train a language model by a method of the GRPO family: `python train.py --algo tepo`.

`Trainer.step` is the loop's body, in four numbered steps. The algorithms are the flat files beside
this one. In trainer/, policy.py loads the model, sampling.py samples, logprobs.py computes
log-probabilities, update.py takes the gradient, and start.py begins or resumes a run. --help lists
the options.
"""

import contextlib
import sys
import time

from run.parser import check_command_line, parse

if __name__ == "__main__":  # before torch is imported, so that --help does not wait for it
    check_command_line()
    sys.stdout.reconfigure(line_buffering=True)  # a log file has each line when it is printed

import torch

from grpo import constant
from run import checkpoint, fit, session, start
from run.algorithm import check_advantages, load_algorithm
from run.curves import plot_runs
from run.evaluation import evaluate_only
from run.lock import locked
from run.ownreward import load_reward
from run.progress import Progress
from run.session import BAD_STEPS
from run.symptoms import Watch
from trainer.bf16 import sampling_copy
from trainer.data import problems_at
from trainer.decoding import decode
from trainer.grading import BadReward, Grader
from trainer.logprobs import PLAIN
from trainer.methods import OwnFileError, inputs, label, split_options
from trainer.records import metrics_line, peak_mib
from trainer.rollout import Rollout, corrected
from trainer.sampling import random_numbers, sample
from trainer.update import Updater


class Trainer:
    """The state of one run, and what one step does with it."""

    def __init__(self, options, model, tokenizer, generation, problems):
        """generation: the remaining keyword arguments of sampling.sample. problems: the training
        problems, each with its "prompt_ids".
        """
        self.o, self.model, self.tokenizer = options, model, tokenizer
        self.generation, self.problems = generation, problems
        self.algo = load_algorithm(options.algo)
        self.advantage_options, loss_options = split_options(self.algo, options.option)
        longest = max(len(p["prompt_ids"]) for p in problems) + options.max_new_tokens
        self.updater = Updater(
            model, self.algo, loss_options, options, longest, generation.get("layout", PLAIN)
        )
        self.grader = Grader(options, load_reward(options.reward))
        self.cursor = 0  # prompts drawn so far
        self.history = []  # the mean reward of each step so far
        self.watch = Watch(options.dtype)

    def step(self, step):
        """One rollout and its updates.

        Returns (its line for metrics.jsonl, the rollout, the rows that caused a skipped update).
        """
        o, updater, started = self.o, self.updater, time.perf_counter()
        lr = o.lr * min(1.0, step / max(1, o.warmup))
        updater.optimizer.param_groups[0]["lr"] = lr

        # 1 Sample G completions of each prompt, and 2 reward them.
        rollout, every = self.sample_and_reward()
        rollout_s = time.perf_counter() - started

        # Measure old log-probabilities and entropies in a pass of our own, not in generate: the
        # ratio is 1 before the first update only if both of its sides come from the same code, rows
        # and padding. At step 1 the first mini-batch is measured too, so that this can be seen.
        mini_batches = torch.arange(o.rows).split(o.rows // o.updates)
        updater.measure(rollout, mini_batches, learn_at_once=step > 1)

        # 3 Compute the advantages.
        rollout.advantages = self.advantages(rollout)
        self.history = [*self.history, rollout.rewards.mean().item()]

        # 4 Update the policy: one optimizer step on each mini-batch.
        updates = []
        for rows in mini_batches * o.epochs:
            on_policy = not any(update["moved"] for update in updates)
            updates.append(updater.update(rollout, rows, on_policy))
            if updater.bad_steps == BAD_STEPS:
                break

        seconds = time.perf_counter() - started
        line = {"phase": "train", "step": step}
        line.update(metrics_line(rollout, every, updates, o.group_size))
        line.update(lr=lr, rollout_s=rollout_s, update_s=seconds - rollout_s)
        line["tokens_per_s"] = every.mask.sum().item() / seconds
        line["peak_mib"] = peak_mib(self.model.device)
        bad_rows = sorted({row for update in updates for row in update["bad_rows"]})
        return line, rollout, bad_rows

    def sample_and_reward(self):
        """(the rollout to train on, with its rewards; the rollout of everything sampled for it).

        With --dynamic-sampling, groups that are all right or all wrong are replaced by groups of
        further prompts (DAPO, Eq. 11: by correctness, even if the reward is shaped). Those left
        after the last try are kept.
        """
        o, batches = self.o, []
        kept, left_out = [], []  # groups, by their numbers in the order of sampling
        for _ in range(1 + o.dynamic_sampling):
            problems = self.next_problems(o.prompts - len(kept))
            batch = self.sample([p["prompt_ids"] for p in problems], o.group_size)
            self.grade(batch, problems)
            batches.append(batch)
            one_sided = constant(batch.right.view(-1, o.group_size)).flatten()  # [P]
            for group, replace in enumerate(one_sided, len(kept) + len(left_out)):
                (left_out if o.dynamic_sampling and replace else kept).append(group)
            if len(kept) == o.prompts:
                break
        every = Rollout.join(batches)
        groups = (kept + left_out)[: o.prompts]
        rollout = every.pick([g * o.group_size + i for g in groups for i in range(o.group_size)])
        rollout.history = self.history
        return rollout, every

    def next_problems(self, count):
        """The next problems in the run's order."""
        problems = problems_at(self.problems, self.o.seed, self.cursor, count)
        self.cursor += count
        return problems

    def sample(self, prompts, n):
        """n completions of each prompt, sampled from the current policy."""
        # Drawn once: a retry with smaller batches samples the same completions.
        U = random_numbers(len(prompts) * n, self.o.max_new_tokens)

        def work(rows_at_once):
            return sample(
                sampling_copy(self.model, self.o.dtype, keep=self.o.cache == "static"),
                prompts,
                n,
                temperature=self.o.temperature,
                rows_at_once=rows_at_once,
                U=U,
                **self.generation,
            )

        return self.updater.sizes.with_smaller("sample_batch", work)

    def grade(self, batch, problems):
        """Fill in problems, texts, right and rewards of a batch, which has G rows per problem."""
        batch.problems = [problem for problem in problems for _ in range(self.o.group_size)]
        batch.texts = decode(self.tokenizer, batch)
        self.grader.grade(batch)

    def advantages(self, rollout):
        """The algorithm's advantages of the rollout, [B] or [B, T]."""
        function, rows = self.algo.advantages, slice(None)  # all rows
        filled = inputs(function, rollout, rows, rollout.entropy, self.o.max_new_tokens)
        options = {**filled, **self.advantage_options}
        try:
            advantages = function(rollout.rewards, self.o.group_size, **options)
        except OwnFileError:
            raise
        except ValueError as error:  # such as MaxRL's, of a negative mean reward
            raise BadReward(error) from error
        check_advantages(function, advantages, rollout.mask)
        return corrected(advantages, rollout, self.o.sampler_correction)


def loop(trainer, out, held_out, done):
    """Evaluate, train, write and save, from the step after `done` to the last.

    Returns the exit status.
    """
    o = trainer.o
    interrupted = session.on_interrupt()
    if session.evaluates(o, done):
        session.write_evaluation(trainer, out, held_out, done)
        plot_runs([out], out / "curves.png")
    step = done
    name = f"{label(o.algo)} step"
    bar = Progress(f"{name} {done}/{o.steps}", o.steps, done)
    with trainer.tracker, bar:  # closes both before a later message is printed
        for step in range(done + 1, o.steps + 1):
            line, rollout, bad_rows = trainer.step(step)
            session.write_metrics(trainer, out, line)
            bar.show(step, f"{name} {step}/{o.steps}", session.step_in_words(line))
            session.write_samples(trainer, out, step, rollout, bad_rows)
            if trainer.updater.bad_steps == BAD_STEPS:
                break
            # A resumed run cuts the files here. It makes the evaluation again, and what was written
            # only because the step was the last may not be due, for --steps may have been raised.
            sizes = checkpoint.line_sizes(out)
            session.write_last_group(trainer, out, step, rollout)
            if session.evaluates(o, step):
                session.write_evaluation(trainer, out, held_out, step)
            if session.draws(o, out, step):
                plot_runs([out], out / "curves.png")
            if session.saves(o, step, interrupted):
                session.save(trainer, out, step, sizes)
            if interrupted:
                break
    if trainer.updater.bad_steps == BAD_STEPS:
        return session.stopped_by_bad_steps(out, step)
    if interrupted and step < o.steps:
        return session.stopped_by_user(out, step, o.save_every, interrupted[0])
    return 0


def main(argv=None):
    """Run the command line and return the exit status.

    Errors that the user can fix print one line to stderr and exit with status 2.
    """
    argv, started = sys.argv[1:] if argv is None else argv, time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            given = parse(argv)
            o, out, config = start.chosen(given, argv)
            if o.show_prompt:
                start.show_prompt(o)
                return 0
            if o.fit:
                fit.show(o)
                return 0
            stack.enter_context(locked(out))
            run = prepare(o, out, config, "resume" in given)
        except (ValueError, OSError) as error:
            return refuse(error)
        except KeyboardInterrupt:
            return 130
        if run is None:  # it was an evaluation
            return 0
        return train_and_save(out, *run, started)


def prepare(o, out, config, resume):
    """(trainer, held-out problems, config, last finished step); None after --eval-only."""
    model, tokenizer, generation, problems, held_out = start.set_up(o, None if resume else out)
    if o.eval_only:
        evaluate_only(o, out, model, tokenizer, generation, held_out)
        return None
    config.update(start.made_from(o, model, problems + held_out, config))
    start.add_lora(o, model)
    trainer = Trainer(o, model, tokenizer, generation, problems)
    config["micro_batch"] = trainer.updater.sizes.keep_micro_batch(config.get("micro_batch"))
    done = session.begin(trainer, out, resume)
    checkpoint.write_json(out / "config.json", config)
    return trainer, held_out, config, done


def train_and_save(out, trainer, held_out, config, done, started):
    """Run the loop, then save the model and print the summary. Returns the exit status."""
    try:
        status = loop(trainer, out, held_out, done)
        if status == 0:
            checkpoint.save_pretrained(out, trainer.model, trainer.tokenizer)
            checkpoint.write_json(out / "config.json", {**config, "status": "done"})
            session.summary(trainer.o, out, time.perf_counter() - started)
        return status
    except (OSError, MemoryError, BadReward, OwnFileError) as error:
        # Others are bugs: show their traceback.
        return refuse(f"{error}; when that is mended: {session.resume_command(out)}")


def refuse(error):
    """Print the error in one line. Returns the exit status."""
    print("train.py: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    session.raise_on_signals()
    sys.exit(main())
