"""Does the entropy fall by the covariance of log-probability and advantage (arXiv 2505.22617)?

The paper's chain, for one state with logits z(a), a tabular softmax policy and a step size lr:

    Lemma 1    dH = - Cov(log pi(a), dz(a))              a drawn from pi; to first order in dz
    Theorem 1  dH = - lr Cov(log pi(a), pi(a) A(a))      policy gradient, dz = lr pi A
    Theorem 2  dH = - lr Cov(log pi(a), A(a))            natural policy gradient, dz = lr A

Each training step is measured on its own rollout. The states are the prefixes of its completions;
they stay the same before and after the step's updates. In nats per token, means over the states:

    change   the measured change of the entropy
    lemma    Lemma 1, with the measured change of every logit of each state
    weights  100 times the change after a hundredth of the step: first order in the weights
    own      Theorem 1 from the one action sampled in each state, as if its push moved it alone
    batch    - Cov(log pi, A) over the tokens of the rollout, as Clip-Cov and KL-Cov take it

`own` and `batch` are per unit of the step size, which is not known (AdamW): only their sign and
their correlation with `change` over the steps of full learning rate can be tested.
"""

import sys
from itertools import accumulate
from pathlib import Path
from statistics import correlation, fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from claims import kit
from run.style import new_figure, save, style
from run.table import cell
from trainer.logprobs import shared_hidden

METHODS = ("grpo", "dapo", "gspo", "tepo", "gtpo", "grpo_s", "trgrpo")
STEPS = 20
WARMUP = 2  # steps; the correlations leave out those before it
FLAGS = ("--lr", "2e-4", "--warmup", str(WARMUP))  # twice the default: the fall in half the steps
PART = 0.01  # of the step, for `weights`
ENDS = 3  # steps at each end of a run, whose mean is its start or end
PREDICTIONS = {
    "weights": "a hundredth of\nthe step, times 100",
    "lemma": "Lemma 1,\nlogits' change",
    "own": "Theorem 1,\nown push",
    "batch": "Cov(log π, A)\nover the batch",
}


def entropy_of(z):
    """The entropy of each state in nats, from its logits. [N, V] -> [N]"""
    logp = z.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def lemma(z, dz):
    """Lemma 1: - Cov(log pi(a), dz(a)) under pi = softmax(z). [N, V] -> [N]"""
    logp = z.log_softmax(1)
    p = logp.exp()
    centred = logp - (p * logp).sum(1, keepdim=True)
    return -(p * centred * dz).sum(1)


def own_change(z, action, push):
    """Theorem 1 from one action per state: Lemma 1 with dz = push dlog pi(action)/dz.

    z [N, V], action [N], push [N] = - dL/dlogp -> [N]. With push = A its mean over actions drawn
    from pi is - Cov(log pi, pi A), if the mean of A is 0.
    """
    onehot = torch.nn.functional.one_hot(action, z.shape[1])
    return lemma(z, push[:, None] * (onehot - z.softmax(1)))


def covariance(x, y):
    """Cov(x, y) over the tokens of a batch, both [N]."""
    return ((x - x.mean()) * (y - y.mean())).mean()


@torch.no_grad()
def logits(model, rollout, weights):
    """The logits at each completion token after loading these weights, in fp64. [N, V]"""
    for parameter, values in zip(model.parameters(), weights, strict=True):
        parameter.copy_(values)
    hidden = shared_hidden(model, rollout.prompts, rollout.completions, rollout.mask)
    return model.get_output_embeddings()(hidden).double()


def pushes(trainer, rollout):
    """- dL/dlogp [B, T] of all mini-batches, as if each were the first update of the rollout."""
    updater, o = trainer.updater, trainer.o
    rollout.logprobs = rollout.old_logprobs.clone()
    total = torch.zeros_like(rollout.logprobs)
    for rows in torch.arange(o.rows).split(o.rows // o.updates):
        filled = updater.loss_inputs(rollout, rows, rollout.entropy)
        total -= updater.loss_gradient(rollout, rows, filled)[1]
    return total


def step_row(trainer, step):
    """Train one step -> its row of the .csv."""
    model = trainer.model
    old = [p.detach().clone() for p in model.parameters()]
    line, rollout, _ = trainer.step(step)
    new = [p.detach().clone() for p in model.parameters()]
    part = [a + PART * (b - a) for a, b in zip(old, new, strict=True)]
    z, z_part, z_new = (logits(model, rollout, weights) for weights in (old, part, new))
    mask, H = rollout.mask, entropy_of(z)
    action = rollout.completions[mask]
    logp = z.log_softmax(1).gather(1, action[:, None])[:, 0]
    push = pushes(trainer, rollout)[mask].double()
    A = rollout.advantages.view(len(mask), -1).expand(mask.shape)[mask].double()
    return {
        "step": step,
        "accuracy": line["accuracy"],
        "entropy": H.mean().item(),
        "change": (entropy_of(z_new) - H).mean().item(),
        "weights": (entropy_of(z_part) - H).mean().item() / PART,
        "lemma": lemma(z, z_new - z).mean().item(),
        "own": own_change(z, action, push).mean().item(),
        "batch": -covariance(logp, A).item(),
    }


def run(task, steps=STEPS):
    """The rows of one run; task: (method, seed)."""
    algo, seed = task
    with kit.trainer(algo, *FLAGS, seed=seed) as (trainer, _):
        rows = [step_row(trainer, step) for step in range(1, steps + 1)]
    return [{"method": algo, "seed": seed, **row} for row in rows]


def measure(args):
    tasks = [(algo, seed) for seed in args.seeds for algo in METHODS]
    return kit.each(run, tasks, args.jobs)


def agreement(run, key):
    """Correlation of a prediction with the measured change, over the steps of full lr."""
    late = [row for row in run if row["step"] >= WARMUP]
    return correlation([row[key] for row in late], [row["change"] for row in late])


def on_the_same_states(run):
    """The run's entropy, had only the changes on the same states been made: one per step."""
    changes = accumulate([run[0]["entropy"], *(row["change"] for row in run[:-1])])
    return list(changes)


def fall(values):
    """The mean of the last ENDS values less that of the first."""
    return fmean(values[-ENDS:]) - fmean(values[:ENDS])


def falls(run):
    """(change of the rollouts' entropy over the run, the part made on the same states), in nats."""
    return fall([row["entropy"] for row in run]), fall(on_the_same_states(run))


def agreements(rows, key):
    """{method: the correlation in each of its runs}; under "all" the methods' mean, per seed.

    Means and intervals of correlations are Fisher's, of atanh r.
    """
    found = {}
    for algo in METHODS:
        found[algo] = [agreement(run, key) for run in kit.runs_of(rows, method=algo)]
    found["all"] = [kit.fisher(values)[0] for values in zip(*found.values(), strict=True)]
    return found


def say(rows):
    lines = ["correlation with the measured change over the steps of a run:"]
    found = {key: agreements(rows, key) for key in PREDICTIONS}
    for algo in (*METHODS, "all"):
        texts = [f"{key} {kit.fisher_cell(found[key][algo])}" for key in PREDICTIONS]
        name = "all" if algo == "all" else style(algo)[0]
        lines.append(f"    {name}: {', '.join(texts)}")
    lines.append("entropy of the rollouts, end less start; of it on the same states:")
    for algo in METHODS:
        both = [falls(run) for run in kit.runs_of(rows, method=algo)]
        columns = [a for a, _ in both], [b for _, b in both]
        share = cell([b / a for a, b in both], 2)
        total, same = (cell(column, 3) for column in columns)
        lines.append(f"    {style(algo)[0]}: {total}, {same}, share {share}")
    late = [row for row in rows if row["step"] >= WARMUP]
    down = sum(row["change"] < 0 for row in late)
    lines.append(f"{down} of {len(late)} steps lower the entropy of their states")
    for key in PREDICTIONS:
        falling = sum(row[key] < 0 for row in late)
        right = sum(row[key] * row["change"] > 0 for row in late)
        lines.append(f"    {key}: predicts a fall in {falling}, has the right sign in {right}")
    for key in ("weights", "lemma"):
        part = sum(row[key] for row in late) / sum(row["change"] for row in late)
        off = median(abs(row[key] - row["change"]) for row in late)
        lines.append(f"    {key}: its sum is {part:.2f} of the measured; off by {off:.5f} (median)")
    return lines


def draw(rows, out):
    figure = new_figure(11, 8)
    (a, b), (c, d) = figure.subplots(2, 2)
    scatter(a, rows, "lemma", 1000)
    a.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
    a.set_xlabel("− Cov(log π, Δz), mean over states [thousandths of a nat]")
    a.set_title("Lemma 1, with the measured change of the logits")
    a.legend(frameon=False, fontsize=9, loc="upper left")
    scatter(b, rows, "batch", 1)
    b.set_xlabel("− Cov(log π, A) over the rollout's tokens [nats]")
    b.locator_params(axis="x", nbins=6)
    b.set_title("Theorem 2, from the tokens of the batch")
    draw_agreement(c, rows)
    draw_curves(d, rows)
    save(figure, out)


def scatter(ax, rows, key, unit):
    """Measured change against a prediction, a point per step of full learning rate."""
    for algo in METHODS:
        name, colour, _, marker = style(algo)
        late = [row for row in rows if row["step"] >= WARMUP and row["method"] == algo]
        x, y = [unit * row[key] for row in late], [1000 * row["change"] for row in late]
        ax.plot(x, y, marker, color=colour, ms=4, alpha=0.7, label=name)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_ylabel("measured change of the entropy\n[thousandths of a nat]")


def draw_agreement(ax, rows):
    """The correlations of each prediction and method: mean and interval over the seeds."""
    for place, key in enumerate(PREDICTIONS):
        found = agreements(rows, key)
        for i, algo in enumerate(METHODS):
            _, colour, _, marker = style(algo)
            centre, low, high = kit.fisher(found[algo])
            bars = [[centre - low], [high - centre]]
            x = place + (i - 3) / 10
            ax.errorbar(x, centre, bars, fmt=marker, color=colour, ms=4, capsize=2, lw=1)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xticks(range(len(PREDICTIONS)), PREDICTIONS.values(), fontsize=9)
    ax.set_ylabel("correlation with the measured change")
    ax.set_title("Over the steps of a run: mean and 95% over seeds")


def draw_curves(ax, rows):
    """The entropy of the rollouts, and what the changes on the same states alone make of it."""
    for algo in METHODS:
        runs = kit.runs_of(rows, method=algo)
        steps = [row["step"] for row in runs[0]]
        curves = ([row["entropy"] for row in run] for run in runs)
        same = (on_the_same_states(run) for run in runs)
        for lines, dashes in ((curves, "-"), (same, "--")):
            mean = [fmean(values) for values in zip(*lines, strict=True)]
            ax.plot(steps, mean, dashes, color=style(algo)[1], lw=1.3)
    ax.text(steps[-1], 0.515, "only the changes on the same states", ha="right", fontsize=9)
    ax.text(steps[1], 0.2, "measured on\neach rollout", fontsize=9)
    ax.set_ylim(0, None)
    ax.set_xticks(range(0, steps[-1] + 1, 5))
    ax.set_xlabel("step")
    ax.set_ylabel("entropy [nats per token]")
    ax.set_title("Most of the fall is in which states are visited")


def main(argv=None):
    return kit.command(__doc__, __file__, measure, draw, say, argv)


if __name__ == "__main__":
    sys.exit(main())
