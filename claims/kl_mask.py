"""What TEPO's masked KL penalty does to the entropy (arXiv 2604.12736), and how hard it pushes.

    loss = policy term + kl_coef 1/N sum M k3,  M = 1 where A > 0 and H < H_old - 1e-4, else 0

H and H_old are a token's entropy now and when it was sampled. k3 is taken against the frozen start
policy, from which the divergence adds up over the steps. Two controls: no penalty, and the same
penalty on equally many tokens with A > 0, drawn at random. So what the paper's mask does is the
difference from the random one, and what a KL penalty does is the difference from none.

Before the first update of a rollout both entropies are equal, so M is 0: everything here is counted
at the updates after it. The .csv has a row per training step, with sums over those updates:

    positive, masked      tokens with A > 0, and those of them with M = 1
    negative, falling     tokens with A < 0, and those of them whose entropy falls in the same way
    force                 sum |push of the penalty| / sum |push of the policy term|, where A > 0
"""

import copy
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import tepo
from claims import kit
from claims.clip_higher import entropy_at
from grpo import advantages, k3, token_mean
from run.style import new_figure, save
from run.table import cell

RUNS = ((0, "none"), (10, "paper"), (10, "random"), (100, "paper"), (100, "random"))
STEPS = 20
UPDATES = 8  # per rollout, as the paper trains
FLAGS = ("--lr", "2e-4", "--warmup", "2", "--updates", str(UPDATES))
LEVEL = 0.3  # accuracy at which the entropies are compared
LAST = 5  # steps that the ends are means over
LOOKS = (("#999999", "-"), ("#0072B2", "-"), ("#0072B2", ":"), ("#D55E00", "-"), ("#D55E00", ":"))


def mask_of(A, entropy, old_entropy):
    """M of tepo.py, as a bool."""
    return (A > 0) & (entropy < old_entropy - 1e-4)


def random_mask(A, entropy, old_entropy, mask, generator):
    """As many tokens with A > 0 as `mask_of` takes, drawn at random. All [B, T]"""
    on = mask.bool()
    count = (mask_of(A, entropy, old_entropy) & on).sum()
    order = torch.rand(A.shape, generator=generator).masked_fill(~((A > 0) & on), 2)
    return order <= order.flatten().sort().values[count - 1] if count else order < 0


def random_method(seed):
    """TEPO as a method of the trainer, with the penalty on `random_mask`."""
    generator = torch.Generator().manual_seed(seed)

    def loss(
        logprobs, old_logprobs, advantages, mask, *, kl_coef, entropy, old_entropy, ref_logprobs
    ):
        policy = tepo.loss(logprobs, old_logprobs, advantages, mask)
        if not kl_coef:
            return policy
        A = advantages[:, None].expand_as(logprobs)
        M = random_mask(A, entropy, old_entropy, mask, generator)
        return policy + kl_coef * token_mean(M * k3(ref_logprobs, logprobs), mask)

    return SimpleNamespace(advantages=advantages, loss=loss)


def look(trainer, rollout, rows, gradient, loss_inputs):
    """What an update's mask takes, as {name: number}."""
    on = rollout.mask[rows]
    A = rollout.advantages[rows][:, None].expand(on.shape)[on]
    H, H_old = (loss_inputs[name][on] for name in ("entropy", "old_entropy"))
    M = mask_of(A, H, H_old)
    without = {**loss_inputs, "kl_coef": 0.0}
    _, policy = trainer.updater.loss_gradient(rollout, rows, without)
    return {
        "positive": (A > 0).sum().item(),
        "masked": M.sum().item(),
        "negative": (A < 0).sum().item(),
        "falling": mask_of(-A, H, H_old).sum().item(),
        "penalty": (gradient - policy)[rows][on][A > 0].abs().sum().item(),
        "policy": policy[rows][on][A > 0].abs().sum().item(),
    }


def step_row(line, updates):
    """The row of a step. line: its metrics. updates: what `look` said of each of its updates."""
    total = {name: sum(update[name] for update in updates[1:]) for name in updates[0]}
    penalty, policy = total.pop("penalty"), total.pop("policy")
    row = {name: line[name] for name in ("step", "accuracy", "entropy")}
    row.update(total)
    row["force"] = penalty / policy if policy else None
    return row


def run(task, steps=STEPS):
    """The rows of one run; task: (kl_coef, the kind of mask, seed)."""
    kl_coef, kind, seed = task
    flags = (*FLAGS, "--option", f"kl_coef={kl_coef}")
    rows = []
    with kit.trainer("tepo", *flags, seed=seed) as (trainer, _):
        updater = trainer.updater
        # In every run, so that all compute the same but for the penalty.
        updater.needs_entropy = updater.needs_all_rows = True
        updater.reference = copy.deepcopy(trainer.model)
        if kind == "random":
            updater.algo = random_method(seed)
        seen = kit.watch(trainer, lambda *update: look(trainer, *update))
        for step in range(1, steps + 1):
            line, _, _ = trainer.step(step)
            about = {"kl_coef": kl_coef, "mask": kind, "seed": seed}
            rows.append({**about, **step_row(line, seen)})
            seen.clear()
    return rows


def measure(args):
    return kit.each(run, [(*about, seed) for seed in args.seeds for about in RUNS], args.jobs)


def ratio(run, above, below):
    """The ratio of two sums over a run's steps."""
    return sum(row[above] for row in run) / sum(row[below] for row in run)


def mean(run, name, last=0):
    """The mean of a column over a run, or over its last steps, without gaps."""
    return fmean(row[name] for row in run[-last:] if row[name] is not None)


def endpoints(rows, kl_coef, kind):
    """{endpoint: its value of each seed}; None where a run never reaches LEVEL."""
    runs = kit.runs_of(rows, kl_coef=kl_coef, mask=kind)
    return {
        f"accuracy, last {LAST} steps": [mean(run, "accuracy", LAST) for run in runs],
        f"entropy, last {LAST} steps": [mean(run, "entropy", LAST) for run in runs],
        f"entropy at accuracy {LEVEL}": [entropy_at(run, LEVEL) for run in runs],
    }


def less(one, other):
    """The differences of those pairs that have both values."""
    pairs = zip(one, other, strict=True)
    return [a - b for a, b in pairs if a is not None and b is not None]


def say(rows):
    lines = []
    for kl_coef, kind in RUNS:
        runs = kit.runs_of(rows, kl_coef=kl_coef, mask=kind)
        share = cell([ratio(run, "masked", "positive") for run in runs], 3)
        other = cell([ratio(run, "falling", "negative") for run in runs], 3)
        force = cell([100 * mean(run, "force") for run in runs], 3)
        lines.append(
            f"kl_coef {kl_coef}, mask {kind}: entropy falls at {share} of the tokens with A > 0, "
            f"at {other} of those with A < 0; the penalty's push is {force}% of the policy term's"
        )
        for name, values in endpoints(rows, kl_coef, kind).items():
            lines.append(f"    {name}: {cell(values, 4)}")
    for kl_coef in dict.fromkeys(kl_coef for kl_coef, _ in RUNS if kl_coef):
        paper = endpoints(rows, kl_coef, "paper")
        for kind, coefficient in (("random", kl_coef), ("none", 0)):
            control = endpoints(rows, coefficient, kind)
            for name in paper:
                text = cell(less(paper[name], control[name]), 4, "+")
                lines.append(f"kl_coef {kl_coef}, paper's mask less {kind}, {name}: {text}")
    return lines


def draw(rows, out):
    figure = new_figure(11, 3.8)
    panels = figure.subplots(1, 3)
    for (kl_coef, kind), (colour, dashes) in zip(RUNS, LOOKS, strict=True):
        runs = kit.runs_of(rows, kl_coef=kl_coef, mask=kind)
        label = f"kl_coef {kl_coef}, {kind} mask" if kl_coef else "no penalty"
        for ax, name in zip(panels, ("entropy", "accuracy", "force"), strict=True):
            if name == "force" and not kl_coef:
                continue  # 0, on a log scale
            columns = [[run[i][name] for run in runs] for i in range(len(runs[0]))]
            curve = [fmean(x for x in column if x is not None) for column in columns]
            ax.plot(range(1, len(curve) + 1), curve, dashes, color=colour, lw=1.6, label=label)
    panels[0].set(title="Entropy of the rollouts", ylabel="nats per token")
    panels[1].set(title="Accuracy of the rollouts", ylim=(0, None))
    panels[2].axhline(1, color="0.6", lw=0.8)
    panels[2].set(title="Push of the penalty", yscale="log", ylim=(5e-3, 1.5))
    panels[2].set_ylabel("times the policy term's push")
    for ax in panels:
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(RUNS), frameon=False)
    save(figure, out)


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
