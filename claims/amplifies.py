"""Does GRPO with a KL term amplify success as predicted (arXiv 2503.06639)?

    python claims/amplifies.py

One iteration of the paper maximises exactly, for each question, with rewards 0 and 1,

    E_pi[A] - beta KL(pi || pi_ref),    A = (r - p) / sqrt(p (1 - p) + eps),

where p is the probability of success of the policy before. The maximiser is
pi_n(o) ~ pi_ref(o) exp(A(o) / beta). A has one value on right and one on wrong completions, so

    logit p_n = logit p_ref + gap(p_{n-1}) / beta,    gap(p) = 1 / sqrt(p (1 - p) + eps).

We have seen the paper's abstract, not its equations: this is our derivation. The KL is part of the
reward here, as in the objective above: a completion's log(pi / pi_ref), less the mean of the others
of its group, times beta, is taken from its advantage. (grpo.py's k3 has, on samples of pi, the
gradient of KL(pi_ref || pi): another objective.) The loss is dapo.py's, an average over tokens,
because GRPO's 1/|o_i| would weigh completions by length.

Part "bandit": four completions of one question, a free logit each, and the exact gradient.
Part "steps": the embedded model, 16 problems of 2 or 3 steps x 16 completions, one update per
rollout. p is counted from 128 fresh completions per problem and run, before and after.
Three levels of p from the start policy's own counts (768 completions per problem):

    paper   the limit of the recursion
    groups  the same with the gap of groups of 16, whose mean and std come from 16 samples
    lines   the same, but the policy may only choose, before each line of work, between this line
            and the answer at once: right answers per number of lines stay as they are

Intervals are over training seeds; the levels have the error of the counts besides.
"""

import copy
import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from grpo import advantages
from run.style import new_figure, save
from run.table import cell
from tiny.problems import problems

KINDS = {2: range(8), 3: range(8, 16)}  # steps of a problem: the places of these problems
GROUP = 16
BETAS = (1.0, 2.0)
STEPS, LAST = 24, 6  # LAST: steps over which the KL is averaged
BANDIT_START, BANDIT_STEPS, BANDIT_RATE = 0.2, 4000, 0.02
DRAWS = 128  # completions of each problem
EPS = 1e-8  # our std + 1e-4 is nearly the square root of the variance + this
COLUMNS = ("part", "seed", "beta", "step", "problem", "lines", "n", "right", "p", "kl")


def gap(p):
    """The advantage of a right completion less that of a wrong one, in the whole population."""
    return 1 / math.sqrt(p * (1 - p) + EPS)


def gap_of_group(p, group=GROUP):
    """The same as a gradient sees it that averages over groups of this size.

    With k of G right, the push that divides the two is f (1 - f) / std, f = k / G.
    """
    total = 0.0
    for k in range(1, group):
        f = k / group
        chance = math.comb(group, k) * p**k * (1 - p) ** (group - k)
        std = math.sqrt(group / (group - 1) * f * (1 - f))
        total += chance * f * (1 - f) / (std + 1e-4)
    return total / (p * (1 - p))


def after(p, p_ref, beta, gap=gap):
    """The recursion: p of the next iteration."""
    x = math.log(p_ref / (1 - p_ref)) + gap(p) / beta
    return 1 / (1 + math.exp(-x))


def limit(p_ref, beta, gap=gap, iterations=200):
    """Where the recursion goes from p_ref."""
    p = p_ref
    for _ in range(iterations):
        p = after(p, p_ref, beta, gap)
    return p


def limit_lines(stay_ref, right, beta, gap=gap_of_group):
    """The limit of p for a policy that only chooses how many lines it works.

    stay_ref[t]: the probability of line t + 1 after t lines under pi_ref. right[t]: of a right
    answer after just t lines. The maximiser weighs each way to go on by exp(value / beta), where
    its value is what E[A] - beta KL can still be from there.
    """
    p = success(stay_ref, right)[0]
    for _ in range(200):
        g, stay, value = gap(p), [], gap(p) * right[-1]
        for s_ref, stopped in zip(reversed(stay_ref), reversed(right[:-1]), strict=True):
            on, off = s_ref * math.exp(value / beta), (1 - s_ref) * math.exp(g * stopped / beta)
            stay.insert(0, on / (on + off))
            value = beta * math.log(on + off)
        p += 0.5 * (success(stay, right)[0] - p)
    return p


def success(stay, right):
    """[V_0, V_1, ...]: the probability of a right answer once t lines are written."""
    values = [right[-1]]
    for s, stopped in zip(reversed(stay), reversed(right[:-1]), strict=True):
        values.insert(0, s * values[0] + (1 - s) * stopped)
    return values


def bandit(p_ref, beta):
    """p after each exact gradient step on E_pi[A] - beta KL(pi || pi_ref), four completions.

    Two of them are right, and a step computes A from the policy of the step before.
    """
    ref = torch.tensor([p_ref / 3, 2 * p_ref / 3, (1 - p_ref) / 4, 3 * (1 - p_ref) / 4]).double()
    right = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    z, found = ref.log(), []
    for _ in range(BANDIT_STEPS):
        pi = z.softmax(0)
        p = (pi * right).sum().item()
        rewards = (right - p) * gap(p) - beta * (pi / ref).log()
        z = z + BANDIT_RATE * pi * (rewards - (pi * rewards).sum())
        found.append(p)
    return found


def choose(each=8):
    """The first training problems of two steps, and of three, `each` of both."""
    rows, chosen = problems(400, 0, "train"), []
    for steps in KINDS:
        chosen += [row for row in rows if row["answer"].count("=") == steps][:each]
    return chosen


def count(trainer, draws, **about):
    """Rows of the .csv: per problem and lines of work, fresh completions, and right ones."""
    found = {}
    for _ in range(draws // GROUP):
        batch = trainer.sample([p["prompt_ids"] for p in trainer.problems], GROUP)
        trainer.grade(batch, trainer.problems)
        for i, (text, right) in enumerate(zip(batch.texts, batch.right.tolist(), strict=True)):
            tally = found.setdefault((i // GROUP, text.count("=")), [0, 0])
            tally[0] += 1
            tally[1] += int(right)
    for (problem, lines), (n, right) in sorted(found.items()):
        yield row(**about, problem=problem, lines=lines, n=n, right=right)


def row(**values):
    return {name: values.get(name) for name in COLUMNS}


def run(task):
    """Rows of one seed and beta."""
    seed, beta = task
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in (("train", choose()), ("test", problems(1, 0, "test"))):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{split}.jsonl").write_text(text)
        return many_rollouts(folder, seed, beta)


def kl_of(rollout):
    """log(pi / pi_ref) of each completion, less the mean of the others of its group. [B]"""
    log_ratio = ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    groups = log_ratio.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) * GROUP / (GROUP - 1)).flatten()


def many_rollouts(folder, seed, beta):
    """Rows of "steps", one per step, and the counts before and after training."""
    about = {"seed": seed, "beta": beta}
    options = ["--data", folder, "--prompts", "16", "--group-size", str(GROUP)]
    options += ["--updates", "1", "--warmup", "0", "--lr", "1e-3"]
    with kit.trainer("dapo", *options, seed=seed) as (trainer, _):
        trainer.updater.reference = copy.deepcopy(trainer.model)
        trainer.updater.needs_all_rows = True  # the KL pushes constant groups too
        trainer.advantages = lambda r: advantages(r.rewards, GROUP) - beta * kl_of(r)
        rows = list(count(trainer, DRAWS, part="before", **about))
        for step in range(1, STEPS + 1):
            line, rollout, _ = trainer.step(step)
            log_ratio = (rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask
            kl = log_ratio.sum(1).mean().item()  # of whole completions, in nats
            rows.append(row(part="steps", step=step - 1, p=line["accuracy"], kl=kl, **about))
        return rows + list(count(trainer, DRAWS, part="after", **about))


def measure(args):
    tasks = [(seed, beta) for seed in args.seeds for beta in BETAS]
    rows = kit.each(run, tasks, args.jobs)
    for beta in BETAS:
        for step, p in enumerate(bandit(BANDIT_START, beta)):
            if step % 20 == 0:
                rows.append(row(part="bandit", beta=beta, step=step, p=p))
    return rows


def tally(rows, part, **wanted):
    """{problem: {lines, at most the problem's steps: (completions, right ones)}}, all seeds."""
    found = {}
    for r in rows:
        if r["part"] == part and all(r[name] == value for name, value in wanted.items()):
            lines = min(r["lines"], steps_of(r["problem"]))
            n, right = found.setdefault(r["problem"], {}).get(lines, (0, 0))
            found[r["problem"]][lines] = n + r["n"], right + r["right"]
    return found


def steps_of(problem):
    return next(steps for steps, places in KINDS.items() if problem in places)


def rate(counts, least=0):
    """(completions of at least so many lines, share of right ones) of {lines: (n, right)}."""
    kept = [pair for lines, pair in counts.items() if lines >= least]
    n = sum(pair[0] for pair in kept)
    return n, sum(pair[1] for pair in kept) / max(n, 1)


def p_of(found, steps=None):
    """Mean p over the problems, or over those of so many steps."""
    return fmean(rate(counts)[1] for q, counts in found.items() if steps in (None, steps_of(q)))


def predicted(before, beta, steps):
    """{name: mean p} of the three levels, for the problems of so many steps."""
    chosen = [counts for q, counts in before.items() if steps_of(q) == steps]
    p_ref = [rate(counts)[1] for counts in chosen]
    pooled = {}
    for t in range(steps + 1):
        pairs = [counts.get(t, (0, 0)) for counts in chosen]
        pooled[t] = sum(n for n, _ in pairs), sum(right for _, right in pairs)
    stay = [rate(pooled, t + 1)[0] / rate(pooled, t)[0] for t in range(steps)]
    right = [pooled[t][1] / max(pooled[t][0], 1) for t in range(steps + 1)]
    return {
        "paper": fmean(limit(p, beta) for p in p_ref),
        "groups": fmean(limit(p, beta, gap_of_group) for p in p_ref),
        "lines": limit_lines(stay, right, beta),
    }


def table(rows):
    """[{beta, steps, p_ref, reached (a list, per seed), and the levels}] per beta and kind."""
    before = tally(rows, "before")
    seeds = sorted({r["seed"] for r in rows if r["part"] == "before"})
    lines = []
    for beta in BETAS:
        ends = [tally(rows, "after", beta=beta, seed=seed) for seed in seeds]
        for steps in KINDS:
            line = {"beta": beta, "steps": steps, "p_ref": p_of(before, steps)}
            line["reached"] = [p_of(end, steps) for end in ends]
            lines.append({**line, **predicted(before, beta, steps)})
    return lines


def say(rows):
    text = []
    for line in table(rows):
        text.append(
            f"beta {line['beta']:g}, {line['steps']} steps: p from {line['p_ref']:.3f} to "
            f"{cell(line['reached'], 3)}; paper {line['paper']:.3f}, groups {line['groups']:.3f}, "
            f"lines {line['lines']:.3f}"
        )
    for beta in BETAS:
        runs = kit.runs_of(rows, part="steps", beta=beta)
        kl = [fmean(r["kl"] for r in run[-LAST:]) for run in runs]
        text.append(f"beta {beta:g}: KL {cell(kl, 3)} nats per completion")
    for beta in BETAS:
        (run,) = kit.runs_of(rows, part="bandit", beta=beta)
        level = limit(BANDIT_START, beta)
        text.append(f"bandit, beta {beta:g}: p ends at {run[-1]['p']:.4f}, recursion {level:.4f}")
    return text


COLOURS = {1.0: "#C44E52", 2.0: "#4C72B0"}


def draw(rows, out):
    figure = new_figure(12, 4.2)
    exact, steps, each = figure.subplots(1, 3)
    draw_bandit(exact, rows)
    draw_steps(steps, rows)
    draw_problems(each, rows)
    for ax in (exact, steps, each):
        ax.set_ylim(0, 1.04)  # a level can be 1
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="best", ncols=2 if ax is steps else 1)
    save(figure, out)


def draw_bandit(ax, rows):
    for beta in BETAS:
        (run,) = kit.runs_of(rows, part="bandit", beta=beta)
        x, y = [r["step"] for r in run], [r["p"] for r in run]
        ax.plot(x, y, color=COLOURS[beta], lw=2, label=f"exact gradient, β = {beta:g}")
        label = f"recursion, β = {beta:g}"
        ax.axhline(limit(BANDIT_START, beta), color=COLOURS[beta], ls="--", lw=1.3, label=label)
    ax.set(title="Four completions, a free logit each", xlabel="gradient step", ylabel="p")


def draw_runs(ax, runs, **look):
    """Each run, thin, and their mean."""
    x = [r["step"] for r in runs[0]]
    for run in runs:
        ax.plot(x, [r["p"] for r in run], color=look["color"], lw=0.8, alpha=0.35)
    mean = [fmean(r["p"] for r in same) for same in zip(*runs, strict=True)]
    ax.plot(x, mean, lw=2, **look)


def draw_steps(ax, rows):
    before = tally(rows, "before")
    for beta in BETAS:
        look = {"color": COLOURS[beta], "label": f"measured, β = {beta:g}"}
        draw_runs(ax, kit.runs_of(rows, part="steps", beta=beta), **look)
        for name, dashes, text in (("paper", "--", "recursion"), ("lines", ":", "per line")):
            level = fmean(predicted(before, beta, steps)[name] for steps in KINDS)
            label = f"{text}, β = {beta:g}"
            ax.axhline(level, color=COLOURS[beta], ls=dashes, lw=1.3, label=label)
    ax.axhline(p_of(before), color="0.6", lw=1, label="start policy")
    ax.set(title="Embedded model", xlabel="update", ylabel="p, mean over 16 problems")


def draw_problems(ax, rows):
    before = tally(rows, "before")
    for beta in BETAS:
        end = tally(rows, "after", beta=beta)
        for steps, marker in ((2, "o"), (3, "v")):
            chosen = [q for q in before if steps_of(q) == steps]
            x = [limit(rate(before[q])[1], beta) for q in chosen]
            y = [rate(end[q])[1] for q in chosen]
            label = f"β = {beta:g}, {steps} steps"
            ax.plot(x, y, marker, color=COLOURS[beta], ms=5, label=label)
    ax.plot([0, 1], [0, 1], color="0.6", lw=1)
    ax.set_title("Each problem")
    ax.set_xlabel("p in the limit of the recursion")
    ax.set_ylabel("p measured after training")


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
