"""What a run does between its training steps: evaluate, record, save and stop."""

import os
import signal
import sys
import time

from tqdm import tqdm

from run import checkpoint
from run.commandline import command
from run.evaluation import evaluated
from run.runs import read_log
from run.track import Tracker
from trainer.bf16 import sampling_copy
from trainer.records import group_to_show, sample_lines

BAD_STEPS = 3  # this many skipped updates in a row stop the run
SHOWN = 4  # held-out problems whose greedy completions are kept at each evaluation
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and how Slurm and others end a job
PICTURE_AGE = 60  # seconds until curves.png is drawn again between two evaluations


# When


def evaluates(o, step):
    """Whether the run evaluates after this step; 0 is before the first."""
    return step in (0, o.steps) or (o.eval_every > 0 and step % o.eval_every == 0)


def shows(o, step):
    """Whether samples.jsonl gets a group of this step, whether or not it is the last step."""
    return o.samples_every > 0 and (step == 1 or step % o.samples_every == 0)


def draws(o, out, step):
    """Whether curves.png is drawn after this step: after an evaluation, else when it is old.

    A picture takes a third of a second, as long as a small model's step.
    """
    picture = out / "curves.png"
    if evaluates(o, step) or not picture.exists():
        return True
    return time.time() - picture.stat().st_mtime > PICTURE_AGE


def saves(o, step, interrupted):
    """Whether the run writes a checkpoint after this step."""
    if o.save_every == 0:
        return False
    return bool(interrupted) or step == o.steps or step % o.save_every == 0


def raise_on_signals():
    """Have Ctrl-C and SIGTERM raise KeyboardInterrupt, so that `main` tidies up."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def on_interrupt():
    """Have the first of SIGNALS finish the current step; a second one ends the process.

    Returns a list, which holds the number of the signal from then on.
    """
    interrupted = []

    def interrupt(number, _):
        if interrupted:
            os._exit(128 + number)
        interrupted.append(number)
        # os.write, because print is not reentrant: the signal may have interrupted a print.
        os.write(2, b"\ninterrupted: finishing this step, then saving; once more to stop at once\n")

    for number in SIGNALS:
        signal.signal(number, interrupt)
    return interrupted


# What is written


def write_evaluation(trainer, out, held_out, step):
    """Evaluate, and append the result to metrics.jsonl, and some completions to held_out.jsonl.

    avg@k and pass@k only before and after training: they take as long as several training steps.
    """
    o = trainer.o
    k = o.k if step in (0, o.steps) else 0
    shown = SHOWN if o.samples_every > 0 else 0

    def work(rows):
        model = sampling_copy(trainer.model, o.dtype, keep=o.cache == "static")
        how = trainer.generation, trainer.grader, rows, k, shown
        return evaluated(o, model, trainer.tokenizer, held_out, *how)

    line = {"phase": "eval", "step": step}
    line.update(trainer.updater.sizes.with_smaller("sample_batch", work))
    greedy = [{"step": step, **shown} for shown in line.pop("greedy", [])]
    tqdm.write(evaluation_in_words(line))
    checkpoint.append_lines(out / "held_out.jsonl", greedy)
    write_metrics(trainer, out, line, greedy)
    if o.keep_best:
        checkpoint.save_best(out, trainer.model, trainer.tokenizer, line)


def evaluation_in_words(line):
    """What is printed of an evaluation's line of metrics.jsonl."""
    low, high = line["ci95"]
    words = [f"step {line['step']}: greedy {line['accuracy']:.3f} (95% {low:.3f}-{high:.3f})"]
    if line["k"]:
        words.append(f"pass@{line['k']} {line['pass_at_k']:.3f}")
    words += [f"length {line['length']:.1f}", f"{100 * line['truncated']:.3g}% cut off"]
    return ", ".join(words)


def step_in_words(line):
    """What stands beside the bar of a training step, the least needed last."""
    accuracy, entropy = line["accuracy"], line["entropy"]
    return f"acc {accuracy:.2f}", f"H {entropy:.2f}", f"{line['tokens_per_s']:.0f} tok/s"


def write_metrics(trainer, out, line, greedy=()):
    """Append a line to metrics.jsonl, show it in the tracker, print the warnings due with it.

    greedy: the lines of held_out.jsonl that belong to an evaluation.
    """
    checkpoint.append_lines(out / "metrics.jsonl", [line])
    trainer.tracker.log(line, greedy)
    for warning in trainer.watch.see(line):
        tqdm.write(warning)


def write_samples(trainer, out, step, rollout, bad_rows):
    """Append to samples.jsonl: a group if one is due, and rows that caused a skipped update."""
    if shows(trainer.o, step):
        write_group(trainer, out, step, rollout)
    lines = sample_lines(step, rollout, bad_rows, trainer.tokenizer, skipped=True)
    checkpoint.append_lines(out / "samples.jsonl", lines)


def write_last_group(trainer, out, step, rollout):
    """Append a group of the last step to samples.jsonl, if none was due."""
    o = trainer.o
    if step == o.steps and o.samples_every > 0 and not shows(o, step):
        write_group(trainer, out, step, rollout)


def write_group(trainer, out, step, rollout):
    """Append a group of this step to samples.jsonl."""
    rows = group_to_show(rollout, trainer.o.group_size)
    lines = sample_lines(step, rollout, rows, trainer.tokenizer)
    checkpoint.append_lines(out / "samples.jsonl", lines)


def save(trainer, out, step, sizes):
    """Write a checkpoint. sizes: checkpoint.line_sizes before this step's evaluation."""
    counters = {
        "cursor": trainer.cursor,
        "history": trainer.history,
        "bad_steps": trainer.updater.bad_steps,
    }
    optimizer = trainer.updater.optimizer
    checkpoint.save(out, step, trainer.model, trainer.tokenizer, optimizer, sizes, **counters)


# How a run begins and ends


def begin(trainer, out, resume):
    """Clear the run's folder, or take up its run at the latest checkpoint; start the tracker.

    Returns the step after which the run goes on.
    """
    done = 0
    if resume:
        done = restore(trainer, out)
    else:
        checkpoint.clear(out, trainer.o.model)
    trainer.tracker = Tracker(trainer.o, out)
    return done


def restore(trainer, out):
    """Take up the run at its latest checkpoint. Returns the step after which it goes on."""
    path, steps = out / "metrics.jsonl", trainer.o.steps
    # Before the lines of later steps are cut off.
    lines = [line for _, line in read_log(path)] if path.exists() else []
    state = checkpoint.load(out, trainer.model, trainer.updater.optimizer, steps)
    trainer.cursor, trainer.history = state["cursor"], state.get("history", [])
    trainer.updater.bad_steps = state["bad_steps"]
    trainer.watch.catch_up(lines, state["step"])
    print(f"resuming {out} after step {state['step']} of {steps}")
    return state["step"]


def stopped_by_bad_steps(out, step):
    """Print why the run stopped. Returns the exit status."""
    kept = " The last good checkpoint is kept." if checkpoint.steps_saved(out) else ""
    print(
        f"train.py: stopped at step {step}: {BAD_STEPS} updates in a row had a loss or gradient "
        f"that is not finite; the last lines of {out / 'samples.jsonl'} show where.{kept}",
        file=sys.stderr,
    )
    return 1


def stopped_by_user(out, step, saved, number):
    """Print how to continue. number: of the signal. Returns the exit status."""
    hint = f"Go on with: {resume_command(out)}" if saved else "Nothing was saved."
    print(f"stopped after step {step}. {hint}")
    return 128 + number


def resume_command(out):
    return command("train.py", "--resume", out)


def summary(o, out, seconds):
    """Print the accuracy before and after training, where the files are, and what to do next."""
    rows = [row for _, row in read_log(out / "metrics.jsonl")]
    evaluations = [row for row in rows if row["phase"] == "eval"]
    words = []
    for row in (evaluations[0], evaluations[-1]):
        low, high = row["ci95"]
        words.append(f"{row['accuracy']:.3f} (95%: {low:.3f}-{high:.3f})")
    print(
        f"greedy accuracy on {row['n']} held-out problems: {words[0]} -> {words[1]}, "
        f"in {seconds:.0f} s"
    )
    files = "curves.png, metrics.jsonl, samples.jsonl, held_out.jsonl, config.json"
    where = "model/ (merged) and adapter/" if o.lora else "model/"
    print(f"{out}: {files}, and the trained model in {where}")
    best = checkpoint.read_best(out)
    if best:
        print(f"{out / 'best'}: the model after step {best['step']}, greedy {best['accuracy']:.3f}")
    print("next:")
    if o.samples_every > 0:
        print(f"  {command('tools/view.py', out)}   # a page of it")
    print(f"  {command('plot.py', out, '--metrics', 'kl,grad_norm')}   # other curves")
    print(f"  {command('tools/ask.py', out)}   # talk to the model")
