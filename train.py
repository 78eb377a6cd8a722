"""Train a language model by a method of the GRPO family. `python train.py --algo tepo`; --help explains the rest.

The loop is `Trainer.step`, in four numbered steps. The algorithms are the flat files beside this one; options.py has
the options, policy.py the sampling and the log-probabilities, update.py the gradient, records.py what is written down.
"""

import contextlib
import copy
import importlib
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from pathlib import Path

from trainer.options import ALLOWED_ON_RESUME, check_command_line, fill, named, parse, split_options

if __name__ == "__main__":  # --help and a misspelt option do not wait for torch to be imported
    check_command_line()

import torch
from tqdm import tqdm

from plot import plot_runs
from rewards import correct, overlong_penalty
from trainer import checkpoint, origin
from trainer.data import (
    checksum,
    load_problems,
    offline_without_network,
    split_overlap,
)
from trainer.evaluate import decode, evaluate, evaluate_only
from trainer.lock import locked
from trainer.logprobs import PLAIN
from trainer.policy import Rollout, context_length, load_policy, sample, use_threads
from trainer.probes import probe
from trainer.prompts import Chat, encode_problems, show, start_line
from trainer.records import group_to_show, metrics_line, peak_mib, sample_lines
from trainer.update import Updater

BAD_STEPS = (
    3  # so many optimizer steps in a row with a loss or gradient that is not finite end the run
)
# The largest |pi_theta / pi_old - 1| before a rollout's first update that rounding explains.
RATIO_LIMITS = {"fp32": 1e-3, "bf16": 2e-2}


class BadReward(Exception):
    """A reward function returned what is no reward; the line names the completion."""


class Trainer:
    """The state of one run, and what a step does with it."""

    def __init__(self, options, model, tokenizer, limits, problems):
        """limits: what policy.sample takes besides. problems: to train on, with "prompt_ids"."""
        self.o, self.model, self.tokenizer, self.limits, self.problems = (
            options,
            model,
            tokenizer,
            limits,
            problems,
        )
        self.algo = importlib.import_module(options["algo"])
        self.advantage_options, loss_options = split_options(self.algo, options["option"])
        longest = max(len(p["prompt_ids"]) for p in problems) + options["max_new_tokens"]
        self.updater = Updater(
            model, self.algo, loss_options, options, longest, limits.get("layout", PLAIN)
        )
        self.cursor = 0  # prompts drawn so far
        self.warned = False  # of ratios that are not 1 before the first update

    def step(self, step):
        """One rollout and its updates.

        Returns (its line for metrics.jsonl, the rollout, the rows that caused a skipped update).
        """
        o, updater, started = self.o, self.updater, time.perf_counter()
        lr = o["lr"] * min(1.0, step / max(1, o["warmup"]))
        updater.optimizer.param_groups[0]["lr"] = lr

        # 1 Sample G completions of each prompt, and 2 reward them. (--dynamic-sampling repeats both.)
        rollout, sampled = self.sample_and_reward()
        rollout_s = time.perf_counter() - started

        # 3 Advantages. Old log-probabilities and entropies come from our own forward pass, not from
        # generate: the ratio is 1 before the first update only if both of its sides come from the
        # same code, rows and padding.
        batch = o["prompts"] * o["group_size"]
        mini_batches = torch.arange(batch).split(batch // o["updates"])
        updater.measure(rollout, mini_batches)
        rollout.advantages = self.advantages(rollout)

        # 4 Update: one optimizer step on each mini-batch.
        updates = []
        for rows in mini_batches * o["epochs"]:
            first = not any(update["moved"] for update in updates)
            updates.append(updater.update(rollout, rows, first))
            if updater.bad_steps == BAD_STEPS:
                break

        seconds = time.perf_counter() - started
        tokens = sum(batch.mask.sum().item() for batch in sampled)
        line = {"phase": "train", "step": step}
        line.update(metrics_line(rollout, sampled, updates, o["group_size"]))
        line["lr"] = lr
        line["rollout_s"] = rollout_s
        line["update_s"] = seconds - rollout_s
        line["tokens_per_s"] = tokens / seconds
        line["peak_mib"] = peak_mib(self.model.device)
        self.warn_of_ratios(step, line["ratio_first_max"])
        bad_rows = sorted({row for update in updates for row in update["bad_rows"]})
        return line, rollout, bad_rows

    def advantages(self, rollout):
        """The algorithm's advantages of the rollout, [B] or [B, T]."""
        # Everything that an algorithm's `advantages` may ask for, by the name of its parameter.
        inputs = {"entropy": rollout.entropy, "mask": rollout.mask, "right": rollout.right}
        wanted = named(self.algo.advantages, inputs)
        group_size = self.o["group_size"]
        return self.algo.advantages(rollout.rewards, group_size, **wanted, **self.advantage_options)

    def warn_of_ratios(self, step, largest):
        """One line, once, if a ratio is not 1 where nothing has been trained yet."""
        limit = RATIO_LIMITS[self.o["dtype"]]
        if self.warned or largest is None or largest <= limit:
            return
        self.warned = True
        tqdm.write(
            f"warning: step {step}: before its first update pi_theta / pi_old is off 1 by up to "
            f"{largest:.2g} (rounding in {self.o['dtype']} explains {limit:g}): two passes of the "
            f"same weights differ, so every ratio is off by as much. Is something random, such as "
            f"dropout, left in the model? Said once; see ratio_first_max in metrics.jsonl"
        )

    def sample_and_reward(self):
        """(the step's Rollout, with rewards; the list of all that was sampled for it).

        With --dynamic-sampling, groups that are all right or all wrong make way for further prompts
        (DAPO, Eq. 11: by correctness, whatever else shapes the reward); after the last try they stay.
        """
        o, G, kept, dull, sampled = self.o, self.o["group_size"], [], [], []
        for _ in range(1 + o["dynamic_sampling"]):
            problems = self.next_problems(o["prompts"] - len(kept))
            batch = self.sample([p["prompt_ids"] for p in problems], G)
            batch.problems = [p for p in problems for _ in range(G)]
            batch.texts = decode(self.tokenizer, batch)
            lengths, truncated = batch.mask.sum(1).tolist(), batch.truncated.tolist()
            graded = zip(batch.texts, batch.problems, lengths, truncated, strict=True)
            right, rewards = zip(*(self.reward(*row) for row in graded), strict=True)
            batch.right, batch.rewards = (
                torch.tensor(x, device=self.model.device) for x in (right, rewards)
            )
            sampled.append(batch)
            for i in range(0, len(rewards), G):
                one_sided = min(right[i : i + G]) == max(right[i : i + G])
                (dull if one_sided and o["dynamic_sampling"] else kept).append(batch.rows(i, i + G))
            if len(kept) == o["prompts"]:
                break
        return Rollout.join((kept + dull)[: o["prompts"]]), sampled

    def next_problems(self, count):
        """The next problems of an endless walk over the training set, each pass in a new order, from the seed alone."""
        chosen, n = [], len(self.problems)
        for at in range(self.cursor, self.cursor + count):
            if not chosen or at % n == 0:
                seed = self.o["seed"] * 1_000_003 + at // n
                order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
            chosen.append(self.problems[order[at % n]])
        self.cursor += count
        return chosen

    def sample(self, prompts, n):
        """n completions of each prompt by the policy as it is now."""
        return self.updater.halving("sample_batch", lambda rows_at_once: sample(
            self.sampling_model(), prompts, n, temperature=self.o["temperature"], rows_at_once=rows_at_once,
            **self.limits,
        ))  # fmt: skip

    def sampling_model(self):
        """What generate runs: the policy itself, or a bf16 copy, made anew so that no update has to hold it."""
        # generate reads every weight once a token, and bf16 has half the bytes. What is trained stays fp32: at lr 1e-6
        # an update is below half a bf16 ulp.
        return copy.deepcopy(self.model).bfloat16() if self.o["dtype"] == "bf16" else self.model

    def reward(self, text, problem, length, truncated):
        """(is it right, what is trained on): `correct`, and DAPO's overlong punishment where it is asked for."""
        right = reward = correct(text, problem["answer"], truncated)
        if self.o["overlong_cache"]:
            reward += overlong_penalty(length, self.o["max_new_tokens"], self.o["overlong_cache"])
        if not -1 <= reward <= 1:
            raise BadReward(
                f"the reward {reward} is not a number in [-1, 1]; it was given to {text!r}"
            )
        return right, reward


def loop(trainer, out, held_out, start):
    """Evaluate, train, write, save, from the step after `start` to the last. Returns the exit status."""
    o, metrics, samples = trainer.o, out / "metrics.jsonl", out / "samples.jsonl"
    interrupted, step = [], start

    def interrupt(*_):
        if interrupted:
            os._exit(130)
        interrupted.append(True)
        # Not print, which may be what was interrupted, and cannot be entered twice.
        os.write(2, b"\ninterrupted: finishing this step, then saving; once more to stop at once\n")

    def evaluation(step):
        k = (
            o["k"] if step in (0, o["steps"]) else 0
        )  # that many draws take as long as many a training step
        result = trainer.updater.halving("sample_batch", lambda rows: evaluate(
            trainer.sampling_model(), trainer.tokenizer, held_out, k=k, samples=o["eval_samples"], rows_at_once=rows,
            temperature=o["temperature"], seed=o["seed"] + 10_000, quiet=False, **trainer.limits,
        ))  # fmt: skip
        checkpoint.append_lines(metrics, [{"phase": "eval", "step": step} | result])
        draw()

    def draw():
        try:
            plot_runs([out], out / "curves.png")
        except OSError as error:
            raise OSError(f"cannot write {out / 'curves.png'}: {error}") from None

    def save(step, sizes):
        counters = {"cursor": trainer.cursor, "bad_steps": trainer.updater.bad_steps}
        optimizer = trainer.updater.optimizer
        checkpoint.save(out, step, trainer.model, trainer.tokenizer, optimizer, sizes, **counters)

    def evaluates(step):
        return step in (0, o["steps"]) or _due(step, o["eval_every"])

    signal.signal(signal.SIGINT, interrupt)
    # A checkpoint leaves out the evaluation of its own step: whether there is one, and with how
    # many draws, depends on --steps, which a resumed run may raise.
    if evaluates(start):
        evaluation(start)
    bar = tqdm(
        range(start + 1, o["steps"] + 1),
        initial=start,
        total=o["steps"],
        desc=o["algo"],
        unit="step",
    )
    with bar:  # closed, whatever happens, before anything else is printed
        for step in bar:
            line, rollout, bad_rows = trainer.step(step)
            checkpoint.append_lines(metrics, [line])
            speed = f"{line['tokens_per_s']:.0f} tokens/s"
            bar.set_postfix_str(
                f"accuracy {line['accuracy']:.2f}, entropy {line['entropy']:.2f}, {speed}"
            )
            at_an_end = o["samples_every"] and step in (1, o["steps"])
            due = at_an_end or _due(step, o["samples_every"])
            shown = group_to_show(rollout, o["group_size"]) if due else []
            lines = sample_lines(step, rollout, shown, trainer.tokenizer)
            lines += sample_lines(step, rollout, bad_rows, trainer.tokenizer, skipped=True)
            checkpoint.append_lines(samples, lines)
            if trainer.updater.bad_steps == BAD_STEPS:
                break
            sizes = checkpoint.line_sizes(out)
            if evaluates(step):
                evaluation(step)
            elif shown:
                draw()
            last = step == o["steps"]
            if _due(step, o["save_every"]) or ((interrupted or last) and o["save_every"]):
                save(step, sizes)
            if interrupted:
                break
    if trainer.updater.bad_steps == BAD_STEPS:
        print(f"train.py: stopped at step {step}: {BAD_STEPS} updates in a row had a loss or gradient that is not "
              f"finite; the last lines of {samples} show where. The last good checkpoint is kept.",
              file=sys.stderr)  # fmt: skip
        return 1
    if interrupted and step < o["steps"]:
        go_on = f"Go on with: {resume_command(out)}" if o["save_every"] else "Nothing was saved."
        print(f"stopped after step {step}. {go_on}")
        return 130
    return 0


def _due(step, every):
    return every > 0 and step % every == 0


def summary(out, seconds):
    """Before -> after, with the intervals, and where the files lie."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["phase"] == "eval"]
    told = [
        f"{e['accuracy']:.3f} (95%: {e['ci95'][0]:.3f}-{e['ci95'][1]:.3f})"
        for e in (evals[0], evals[-1])
    ]
    print(
        f"greedy accuracy on {evals[-1]['n']} held-out problems: {told[0]} -> {told[1]}, in {seconds:.0f} s"
    )
    print(
        f"{out}: curves.png, metrics.jsonl, samples.jsonl, config.json, and the trained model in model/"
    )


def main(argv=None):
    """Run the command line; returns the exit status. What the user can mend is one line on stderr, and status 2."""
    argv, started = sys.argv[1:] if argv is None else argv, time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            given = parse(argv)
            if given.get("show_prompt"):
                return show_prompt(given)
            out = run_folder(given)
            stack.enter_context(locked(out))
            prepared = prepare(given, out, argv)
        except (ValueError, OSError) as error:
            return refuse(error)
        except KeyboardInterrupt:
            return 130
        if prepared is None:  # it was an evaluation
            return 0
        return train_and_save(out, *prepared, started)


def show_prompt(given):
    """Print the first prompt as the model gets it. Returns the exit status."""
    if "resume" in given:
        o, _ = resumed(given, Path(given["resume"]))
    else:
        o = fill(given)
    _, tokenizer, limits, train, held_out = set_up(o)
    print(show(tokenizer, (train or held_out)[0], limits["eos_ids"]))
    return 0


def run_folder(given):
    """The folder of --resume or --out, or one named after the options. Raises ValueError."""
    if "resume" in given:
        out = Path(given["resume"])
        if not (out / "config.json").is_file():
            raise ValueError(f"{out} holds no run to resume (no readable config.json)")
        return out
    o = fill(given)
    name = f"{o['algo']}-{o['preset']}"
    if o["eval_only"]:
        name = f"eval-{path_name(o['model'])}-{path_name(o['data'])}"
    out = Path(o["out"] or f"runs/{name}-s{o['seed']}")
    checkpoint.check_folder(out)
    return out


def path_name(path):
    """A path as part of a folder's name: A/model and B/model stay apart."""
    name = re.sub(r"[^\w.]+", "-", path.removesuffix(".jsonl"))
    return name.strip("-.")[-100:]


def prepare(given, out, argv):
    """(trainer, held-out problems, config, last step that is done); None after --eval-only."""
    resume = "resume" in given
    o, config = resumed(given, out) if resume else begun(given, out, argv)
    model, tokenizer, limits, train, held_out = set_up(o)
    if o["eval_only"]:
        evaluate_only(o, out, model, tokenizer, limits, held_out)
        return None
    now = {"weights": origin.weights_checksum(model), "code": origin.code_checksums(o["algo"])}
    now["versions"] = origin.versions()
    now["checksum"] = checksum(train + held_out, config.get("checksum"))
    if resume:
        now = goes_on(config, now)
    trainer, start = Trainer(o, model, tokenizer, limits, train), 0
    if resume:
        state = checkpoint.load(out, model, trainer.updater.optimizer, say=print)
        start, trainer.cursor, trainer.updater.bad_steps = (
            state["step"],
            state["cursor"],
            state["bad_steps"],
        )
        print(f"resuming {out} after step {start} of {o['steps']}")
    else:
        checkpoint.clear(out, o["model"])
    config = {**config, **now}
    checkpoint.write_json(out / "config.json", config)
    return trainer, held_out, config, start


def goes_on(config, now):
    """What config.json says of a resumed run's origin; notes other code and versions in a line.

    Raises ValueError for other start weights: the reference of the KL would be another.
    """
    if config.get("weights") not in (None, now["weights"]):
        raise ValueError(
            f"the start model {config['options']['model']} is not what it was when the run began; "
            f"it cannot be resumed with other start weights"
        )
    changed = origin.other_code(config, now)
    if changed:
        print(f"note: changed since the run began: {changed}")
    return {**now, **origin.both(config, now)}


def train_and_save(out, trainer, held_out, config, start, started):
    """The loop, and after its last step the model and the summary. Returns the exit status."""
    try:
        status = loop(trainer, out, held_out, start)
        if status == 0:
            checkpoint.save_pretrained(out / "model", trainer.model, trainer.tokenizer)
            checkpoint.write_json(out / "config.json", config | {"status": "done"})
            summary(out, time.perf_counter() - started)
        return status
    except (
        OSError,
        MemoryError,
        BadReward,
    ) as error:  # any other exception is a bug of ours: let it be seen
        return refuse(f"{error}; when that is mended: {resume_command(out)}")


def resume_command(out):
    return f"python train.py --resume {shlex.quote(str(out))}"


def refuse(error):
    print("train.py: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def begun(given, out, argv):
    """(options, config) of a new run; says which preset it is, why, and how to get the other."""
    o = fill(given)
    cuda, auto = torch.cuda.is_available(), given.get("preset", "auto") == "auto"
    why = f"{'a' if cuda else 'no'} CUDA GPU was found" if auto else "as asked"
    other = {"tiny": "--preset gsm8k trains Qwen2.5-0.5B on GSM8K, which wants a GPU",
             "gsm8k": "--preset tiny trains the embedded model in minutes, GPU or not"}[o["preset"]]  # fmt: skip
    print(f"preset {o['preset']} ({why}): {o['model']} on {o['data']}; {other}")
    if not o["overwrite"] and not o["eval_only"] and checkpoint.holds_run(out):
        raise ValueError(f"{out} holds a run already: --resume {out} goes on with it, --overwrite deletes it, --out "
                         f"FOLDER leaves it alone")  # fmt: skip
    machine = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.processor() or platform.machine()} CPU"
    )
    config = {
        "options": o,
        "machine": f"{machine}, {torch.get_num_threads()} threads",
        "command": shlex.join(["python", "train.py", *argv]),
        "status": "running",
    }
    return o, config


def resumed(given, out):
    """(options, config) of the run in --resume; what else is given must not change its past."""
    given = {name: value for name, value in given.items() if name != "resume"}
    try:
        config = json.loads((out / "config.json").read_text())
        saved, steps = config["options"], config["options"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} holds no run to resume (no readable config.json)") from None
    for name, value in given.items():
        if name not in ALLOWED_ON_RESUME and value != saved.get(name):
            raise ValueError(f"--resume {out}: its --{name.replace('_', '-')} is {saved.get(name)}, not {value}; only "
                             f"--steps may be raised")  # fmt: skip
    if given.get("steps", steps) < steps:
        raise ValueError(f"--resume {out}: it has {steps} steps, and --steps may only be raised")
    config["options"] = fill(
        saved | {name: given[name] for name in ALLOWED_ON_RESUME if name in given}
    )
    return config["options"], config | {"status": "running"}


def set_up(o):
    """(model, tokenizer, limits of policy.sample, training problems, held-out problems) for the options."""
    torch.manual_seed(o["seed"])
    offline_without_network(o["model"], o["data"])
    test = load_problems(o["data"], "test")  # all of it is held out, not only the first --eval-n
    train, overlap = (
        ([], 0) if o["eval_only"] else split_overlap(load_problems(o["data"], "train"), test)
    )
    test = test[: o["eval_n"]]
    chat = Chat(o["chat_template"], o["system"], o["template_option"])
    model, tokenizer, eos_ids, pad_id = load_policy(o["model"], o["device"], chat)
    use_threads(o["threads"], model)
    longest = context_length(model) - o["max_new_tokens"]
    vocabulary = len(model.get_input_embeddings().weight)
    how = o["prompt"], longest, vocabulary, chat, eos_ids
    train, long_train = ([], 0) if o["eval_only"] else encode_problems(tokenizer, train, *how)
    test, long_test = encode_problems(tokenizer, test, *how)
    if overlap or long_train or long_test:
        print(f"dropped problems: {overlap} of training that are held out too; prompts over {longest} tokens: "
              f"{long_train} of training, {long_test} held out")  # fmt: skip
    print(start_line(tokenizer, chat, eos_ids))
    limits = {"max_new_tokens": o["max_new_tokens"], "eos_ids": eos_ids, "pad_id": pad_id}
    prompts = [problem["prompt_ids"] for problem in train + test]
    limits["layout"] = probe(model, prompts, o["max_new_tokens"], pad_id)
    return model, tokenizer, limits, train, test


if __name__ == "__main__":
    sys.exit(main())
