"""Step 4 of the loop: one optimizer step on a mini-batch, in the memory of one micro-batch.

The gradient of every loss here flows through logprobs [B, T] alone, so it comes in two halves:

    dL/dtheta = sum_{i,t} dL/dlogp_{i,t} dlogp_{i,t}/dtheta.

First half: compute the log-probabilities of the mini-batch, and call `loss` once on all of them.
This gives dL/dlogp [B, T]: how strongly the loss pushes each token.
Second half: run the model again, micro-batch by micro-batch, and backpropagate dL/dlogp through it.

The loss sees the whole mini-batch, however it averages. The size of the micro-batches changes only
the memory. `Updater._update` does this, step by step.
"""

import contextlib
import copy
import math
from types import SimpleNamespace

import torch
from tqdm import tqdm

from grpo import constant
from trainer.batches import split_micro_batches
from trainer.bf16 import bf16_compute
from trainer.logprobs import token_logprobs
from trainer.memory import return_free_memory, rows_that_fit
from trainer.methods import OwnFileError, inputs, parameters
from trainer.probes import train_mode_agrees

KL_COEFFICIENTS = "beta", "kl_coef"  # the options of a loss that switch on a KL term


class Updater:
    """The trained policy, its optimizer, and how many rows fit into memory at once."""

    def __init__(self, model, algo, loss_options, options, longest, layout):
        """algo: the algorithm's module. options: those of train.py. layout: from probes.probe.

        longest: tokens of the longest possible row. Raises ValueError if gradient checkpointing is
        requested and would change the log-probabilities.
        """
        takes = parameters(algo.loss)
        for name in KL_COEFFICIENTS:  # a file of the user may switch a KL term on by its default
            default = takes[name].default if name in takes else 0
            if isinstance(default, float | int) and default > 0:
                loss_options = {name: default, **loss_options}
        self.model, self.algo, self.loss_options, self.o = model, algo, loss_options, options
        # fused: AdamW's default on a GPU (foreach) needs temporary copies of the weights.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.lr, weight_decay=0.0, fused=True
        )
        self.reference = None  # the frozen start policy
        if loss_options.get("beta", 0) > 0:
            self.reference = copy.deepcopy(model)
        # A KL term is switched on by its coefficient, and may push any row of the mini-batch.
        has_kl = any(loss_options.get(name, 0) > 0 for name in KL_COEFFICIENTS)
        self.needs_all_rows = has_kl or getattr(algo, "NEEDS_ALL_ROWS", False)
        self.needs_entropy = "entropy" in takes and (has_kl or "kl_coef" not in takes)
        self.through_head = layout.through_head
        # Checkpointing runs each layer again without the cache that a shared prompt needs.
        self.share_prompts = layout.share_prompts and not options.gradient_checkpointing
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        self.at_once = {"micro_batch": options.micro_batch, "sample_batch": options.sample_batch}
        if options.micro_batch == "auto":
            self.at_once["micro_batch"] = self.choose_micro_batch(longest)
        if options.sample_batch == "auto":
            self.at_once["sample_batch"] = options.rows
        self.at_once = {name: int(size) for name, size in self.at_once.items()}
        self.graphs = {}  # {rows of a micro-batch: its log-probabilities with their graph}
        self.learned = None  # dL/dlogp [B, T] that `measure` has backpropagated already
        self.bad_steps = 0  # optimizer steps skipped in a row (loss or gradient not finite)

    def choose_micro_batch(self, longest):
        """Rows of `longest` tokens that fit, at most a mini-batch. Prints the choice in a line."""
        fit, row, budget = rows_that_fit(
            self.model,
            longest,
            dtype=self.o.dtype,
            through_head=self.through_head,
            checkpointing=self.o.gradient_checkpointing,
        )
        rows = min(fit, self.o.rows // self.o.updates)
        print(
            f"micro-batch: {rows} rows (auto: {row / 2**20:,.1f} MiB per row of {longest} tokens, "
            f"{budget / 2**20:,.0f} MiB for rows); --micro-batch N changes it"
        )
        return rows

    def keep_micro_batch(self, rows):
        """Take the micro-batch that a resumed run began with; None: a new run keeps its own.

        What fits depends on what else is in memory, and another size rounds differently: without
        this, the resumed run would not equal the uninterrupted one. Returns the micro-batch.
        """
        own = self.at_once["micro_batch"]
        if rows not in (None, own):
            print(f"micro-batch: {rows} rows instead of {own}, because the run began with {rows}")
            self.at_once["micro_batch"] = rows
        return self.at_once["micro_batch"]

    def with_smaller_batches(self, name, work):
        """work(size), with size = at_once[name]; retries with half the size when out of GPU memory.

        Raises MemoryError if the user set the size, or if a single row does not fit.
        """
        option = "--" + name.replace("_", "-")
        while True:
            size = self.at_once[name]
            try:
                return work(size)
            except torch.OutOfMemoryError:
                if getattr(self.o, name) != "auto" or size == 1:
                    raise MemoryError(
                        f"out of GPU memory with {option} {size}: try {option} auto, "
                        f"--gradient-checkpointing, or a smaller --max-new-tokens"
                    ) from None
            self.at_once[name] = size // 2
            tqdm.write(f"out of GPU memory: {option} goes from {size} to {size // 2}")
            self.model.eval()
            self.graphs.clear()
            self.learned = None
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def forward(self, rollout, rows, model, with_entropy=True):
        """token_logprobs of these rows; in bf16_compute if --dtype is bf16."""
        prompts = [rollout.prompts[i] for i in rows]
        bf16 = self.o.dtype == "bf16"
        with bf16_compute(model.device.type) if bf16 else contextlib.nullcontext():
            return token_logprobs(
                model,
                prompts,
                rollout.completions[rows],
                rollout.mask[rows],
                temperature=self.o.temperature,
                with_entropy=with_entropy,
                through_head=self.through_head,
                share_prompts=self.share_prompts,
            )

    def micro_batches(self, rollout, rows, size):
        """The indices `rows` in micro-batches; groups that an update may leave out are kept apart.

        An update leaves out groups whose advantages are all 0. For most algorithms these are the
        groups with equal rewards. For GTPO and GRPO-S they are the groups that are all right or all
        wrong, which differs if the reward is shaped. If such groups shared a micro-batch with
        others, leaving them out would change the padding of the remaining rows. In bf16 that
        changes their rounding, and so the ratio.
        """
        rewards_differ = self.differs_in_group(rollout.rewards)  # [B]
        right_differs = self.differs_in_group(rollout.right)  # [B]
        result = []
        for in_rewards, in_right in ((True, True), (True, False), (False, True), (False, False)):
            kind = (rewards_differ == in_rewards) & (right_differs == in_right)
            part = rows[kind[rows]]
            if len(part):
                result += split_micro_batches(rollout, part, size, self.share_prompts)
        return result

    def differs_in_group(self, values):
        """Whether a row's group has unequal values: [B] -> [B] bool, on the CPU."""
        groups = values.view(-1, self.o.group_size)
        return ~constant(groups).expand_as(groups).flatten().cpu()

    def measure(self, rollout, mini_batches, keep_graph=False, advantages=None):
        """Fill in the rollout's old_logprobs, entropy and, if needed, ref_logprobs, all [B, T].

        Runs the micro-batches of the updates, so the first ratio compares equal computations.
        Groups that can give no gradient are not run: what the sampler computed serves for them.
        `measure_rest` runs those that have an advantage all the same.
        keep_graph: where possible, the first update learns from this pass and does not run the
        model again: if its mini-batch fits into one micro-batch, or if `advantages`, a function of
        the rollout, allows guessed_push. Its ratio is then 1 by construction.
        """

        def measured(model, first):
            def work(size):
                guess = None
                if first is not None and len(first) > size and advantages is not None:
                    guess = self.guessed_push(rollout, first, advantages)
                return self.logprobs_by(model, rollout, mini_batches, size, first, guess)

            return self.with_smaller_batches("micro_batch", work)

        rollout.measured = self.may_have_signal(rollout)
        if self.reference is not None:
            rollout.ref_logprobs, _ = measured(self.reference, None)
        first = mini_batches[0] if keep_graph else None
        rollout.old_logprobs, rollout.entropy = measured(self.model, first)
        rollout.logprobs = rollout.old_logprobs.clone()

    def measure_rest(self, rollout, mini_batches):
        """Run the rows that have an advantage although `measure` left them out.

        RAFT, for one, gives an advantage to groups that are all right. Returns whether there were
        any: advantages that depend on the entropy then change a little.
        """
        rest = nonzero_advantages(rollout).any(1).cpu() & ~rollout.measured  # [B]

        def work(size):
            for mini_batch in mini_batches:
                for rows in self.micro_batches(rollout, mini_batch, size):
                    if rest[rows].any():
                        logprobs, entropy = self.run(rollout, rows, self.model, False)
                        rollout.old_logprobs[rows] = rollout.logprobs[rows] = logprobs
                        rollout.entropy[rows] = entropy
                        rollout.measured[rows] = True

        self.with_smaller_batches("micro_batch", work)
        return bool(rest.any())

    def may_have_signal(self, rollout):
        """Which rows `measure` runs, [B] bool, on the CPU: all, if the loss needs all rows."""
        if self.needs_all_rows:
            return torch.ones(len(rollout.prompts), dtype=torch.bool)
        return self.differs_in_group(rollout.rewards) | self.differs_in_group(rollout.right)

    def logprobs_by(self, model, rollout, mini_batches, size, first, guess):
        """(log-probabilities, entropy in nats) under `model`, [B, T] each, without a graph.

        Rows that are not rollout.measured keep the sampler's numbers.
        first: the mini-batch to learn from, or None. If it has at most `size` rows, self.graphs
        gets its graphs. Else, if there is a guess = dL/dlogp, it is backpropagated at once.
        """
        dtype = torch.promote_types(model.dtype, torch.float32)
        logprobs = rollout.sampler_logprobs.to(dtype, copy=True)
        entropy = rollout.sampler_entropy.to(dtype, copy=True)
        for mini_batch in mini_batches:
            keep = mini_batch is first and len(mini_batch) <= size
            push = guess if mini_batch is first and not keep else None
            model.train(mini_batch is first and self.o.gradient_checkpointing)
            for rows in self.micro_batches(rollout, mini_batch, size):
                learn = push is not None and bool(push[rows].any())
                rollout.measured[rows] |= learn
                if not rollout.measured[rows].any():
                    continue
                logprobs[rows], entropy[rows] = self.run(rollout, rows, model, keep or learn)
                if learn:
                    self.backward_through_graph(rows, push)
            self.learned = push if mini_batch is first else self.learned
        model.eval()
        return logprobs, entropy

    def guessed_push(self, rollout, rows, advantages):
        """dL/dlogp [B, T] of the first update before anything is measured; None if not possible.

        On policy each ratio is 1. A loss that takes the log-probabilities only for their ratio then
        has the same gradient at all of them, so also at 0. `has_learned` checks it against the
        gradient at the measured ones. What needs the entropy raises an error here.
        """
        if self.needs_all_rows or self.o.sampler_correction:
            return None  # they need the measured log-probabilities
        if not takes_ratios_only(self.algo, self.loss_options):
            return None
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        zeros = torch.zeros(rollout.mask.shape, dtype=dtype, device=rollout.mask.device)
        rollout.logprobs = rollout.old_logprobs = zeros
        try:
            rollout.advantages = advantages(rollout)
            _, push = self.loss_gradient(rollout, rows, self.loss_inputs(rollout, rows, None))
        except (ValueError, TypeError, AttributeError):
            return None
        return push

    def has_learned(self, push):
        """Whether `measure` has backpropagated just this push; if another one, it is undone."""
        learned, self.learned = self.learned, None
        if learned is None:
            return False
        same = torch.equal(learned, push)
        if not same:
            self.optimizer.zero_grad()
        return same

    def run(self, rollout, rows, model, keep_graph, with_entropy=True):
        """`forward` of a micro-batch, detached. keep_graph: self.graphs gets its graph."""
        return_free_memory(model)
        with torch.set_grad_enabled(keep_graph):
            logprobs, entropy = self.forward(rollout, rows, model, with_entropy)
        if keep_graph:
            self.graphs[tuple(rows.tolist())] = logprobs
        return logprobs.detach(), entropy

    def update(self, rollout, rows, on_policy):
        """One optimizer step on the mini-batch `rows` (indices).

        on_policy: the weights have not changed since the rollout. If the loss or the gradient is
        not finite, the step is skipped and the weights stay as they are. Returns a dict:
        signal: number of tokens with a nonzero advantage;
        clipped: number of those tokens whose policy term has no gradient because of the clip;
        kl: sum of kl_estimate over the signal tokens, in nats, before this step;
        ratio: pi_theta / pi_old of each token that was run if on_policy, else [];
        grad_norm: norm of the gradient before clipping; None if loss or dL/dlogp is not finite;
        bad_rows: rows that caused the step to be skipped;
        moved: whether the weights changed.
        """
        return self.with_smaller_batches(
            "micro_batch", lambda size: self._update(rollout, rows, on_policy, size)
        )

    def _update(self, rollout, rows, on_policy, size):
        """`update` in micro-batches of at most `size` rows."""
        # transformers checkpoints in train mode only; load_policy has switched off dropout.
        self.model.train(self.o.gradient_checkpointing)
        micro_batches = self.with_signal(rollout, rows, size)

        # First half: dL/dlogp.
        entropy = self.current_logprobs(rollout, micro_batches, on_policy, size)
        loss_inputs = self.loss_inputs(rollout, rows, entropy)
        loss, push = self.loss_gradient(rollout, rows, loss_inputs)
        result = self.statistics(rollout, rows, push, loss_inputs)

        # Second half: dlogp/dtheta.
        learned = self.has_learned(push)
        if loss.isfinite() and push.isfinite().all():
            if not learned:
                result["ratio"] = self.backward(rollout, micro_batches, push, on_policy)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.o.max_grad_norm)
            result["grad_norm"] = norm.item()

        self.graphs.clear()
        self.model.eval()
        self.apply_or_skip(rollout, rows, push, result)
        self.optimizer.zero_grad()  # now, not before the next pass: no rollout has to hold them
        return result

    def with_signal(self, rollout, rows, size):
        """The micro-batches of `rows` with a nonzero advantage; all, if the loss needs all rows."""
        micro_batches = self.micro_batches(rollout, rows, size)
        if self.needs_all_rows:
            return micro_batches
        signal = nonzero_advantages(rollout).any(1).cpu()  # [B]
        return [micro_batch for micro_batch in micro_batches if signal[micro_batch].any()]

    def current_logprobs(self, rollout, micro_batches, on_policy, size):
        """Fill in rollout.logprobs. Returns the current entropy, [B, T].

        On policy they equal old_logprobs, and nothing is run. If all the rows fit into one
        micro-batch, their graphs are kept, and the second half does not run the model again.
        """
        entropy = rollout.entropy.clone()
        if on_policy:
            return entropy
        keep = sum(len(rows) for rows in micro_batches) <= size
        for rows in micro_batches:
            logprobs, H = self.run(rollout, rows, self.model, keep, self.needs_entropy)
            rollout.logprobs[rows] = logprobs
            entropy[rows] = H
        return entropy

    def loss_inputs(self, rollout, rows, entropy):
        """The keyword arguments of the algorithm's loss: its inputs and its options."""
        current = entropy[rows] if self.needs_entropy else None
        filled = inputs(self.algo.loss, rollout, rows, current, self.o.max_new_tokens)
        return {**filled, **self.loss_options}

    def loss_gradient(self, rollout, rows, loss_inputs):
        """(the loss of the mini-batch, dL/dlogp [B, T], which is 0 in all other rows)."""
        logprobs = rollout.logprobs[rows].requires_grad_()
        old_logprobs = rollout.old_logprobs[rows]
        advantages, mask = rollout.advantages[rows], rollout.mask[rows]
        loss = self.algo.loss(logprobs, old_logprobs, advantages, mask, **loss_inputs)
        push = torch.zeros_like(rollout.logprobs)
        push[rows] = gradient_of(self.algo.loss, loss, logprobs)
        return loss, push

    def backward(self, rollout, micro_batches, push, on_policy):
        """Backpropagate push = dL/dlogp [B, T] into the weights, through kept or new graphs.

        Returns pi_theta / pi_old of each token that was run again if on_policy, else [].
        """
        ratios = []
        pushed = push.any(1).cpu()  # [B]
        for rows in micro_batches:
            if not pushed[rows].any():
                continue
            if tuple(rows.tolist()) in self.graphs:
                self.backward_through_graph(rows, push)
                continue
            if not on_policy:  # on policy, the ratio is 1 only if the rows of `measure` run again
                rows = rows[pushed[rows]]
            logprobs = self.run(rollout, rows, self.model, True, with_entropy=False)[0]
            if on_policy:
                log_ratio = logprobs - rollout.old_logprobs[rows]
                ratios += log_ratio[rollout.mask[rows]].exp().tolist()
            self.backward_through_graph(rows, push)
        return ratios

    def backward_through_graph(self, rows, push):
        """Backpropagate push = dL/dlogp [B, T] through the graph that `run` kept of these rows."""
        logprobs = self.graphs.pop(tuple(rows.tolist()))
        return_free_memory(self.model)
        logprobs.backward(gradient=push[rows])

    def apply_or_skip(self, rollout, rows, push, result):
        """Take the optimizer step, or skip it if the loss or gradient is not finite.

        Fills in bad_rows and moved of the result.
        """
        grad_norm = result["grad_norm"]
        if grad_norm is None or not math.isfinite(grad_norm):
            self.bad_steps += 1
            result["bad_rows"] = rows_not_finite(rollout, rows, push)
            return
        self.bad_steps = 0
        if push.any():  # with a gradient of 0, AdamW's momentum would still move the weights
            self.optimizer.step()
            result["moved"] = True

    def statistics(self, rollout, rows, push, loss_inputs):
        """The result of `update` before its second half. Nothing here changes the gradient."""
        policy_push = push
        without_kl = {name: 0.0 for name in KL_COEFFICIENTS if loss_inputs.get(name)}
        if without_kl:  # whether the clip acts is a question about the policy term alone
            _, policy_push = self.loss_gradient(rollout, rows, {**loss_inputs, **without_kl})
        signal = nonzero_advantages(rollout)
        clipped = signal & (policy_push == 0)
        kl = kl_estimate(rollout.logprobs, rollout.old_logprobs)
        return {
            "signal": signal[rows].sum().item(),
            "clipped": clipped[rows].sum().item(),
            "kl": kl[rows][signal[rows]].sum().item(),
            "ratio": [],
            "grad_norm": None,
            "bad_rows": [],
            "moved": False,
        }


def gradient_of(function, loss, logprobs):
    """dL/dlogp [B, T] of what a method's function `loss` returned.

    Raises OwnFileError for a function of a file of the user that has no gradient, or fails in it.
    """
    try:
        (gradient,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or not hasattr(function, "explain"):
            raise
        raise function.explain("the gradient of loss", error) from error
    if gradient is None:
        what = "loss must depend on logprobs, or it has no gradient"
        raise OwnFileError(f"{function.place}: {what}")
    return gradient


def toy():
    """A batch of two groups of two completions, of 3, 1, 2 and 3 tokens. [4, 3]"""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    right = torch.tensor([1.0, 0.0, 0.0, 1.0])
    batch = SimpleNamespace(mask=mask, completions=mask.long(), right=right, history=[0.5])
    batch.entropy = mask.float()
    batch.ref_logprobs = -mask.float()
    return batch


def toy_inputs(function):
    batch = toy()
    return inputs(function, batch, slice(None), batch.entropy, batch.mask.shape[1])


def takes_ratios_only(algo, loss_options):
    """Whether the loss takes log-probabilities only for their ratios, tried out on a toy batch.

    Then its gradient on policy does not depend on them. loss_options: without a KL term.
    """
    advantages, mask = torch.tensor([1.0, -1.0, -1.0, 1.0]), toy().mask
    filled = {**toy_inputs(algo.loss), **loss_options}
    gradients = []
    for logprobs in (torch.zeros(4, 3), -torch.arange(12.0).view(4, 3)):
        old_logprobs = logprobs.clone()
        logprobs.requires_grad_()
        loss = algo.loss(logprobs, old_logprobs, advantages, mask, **filled)
        gradients.append(gradient_of(algo.loss, loss, logprobs))
    return torch.equal(*gradients)


def nonzero_advantages(rollout):
    """Which tokens have an advantage other than 0. [B, T] bool"""
    advantages = rollout.advantages.view(len(rollout.prompts), -1)  # [B, 1] or [B, T]
    return rollout.mask & (advantages != 0)


def kl_estimate(logprobs, old_logprobs):
    """(w - 1) - log w with w = pi_theta / pi_old, in nats, at tokens sampled from pi_old. [B, T]

    Its mean over samples of pi_old is an unbiased estimate of KL(pi_old || pi_theta), because
    E[w] = 1, and no term is negative.
    """
    log_ratio = logprobs - old_logprobs
    # clamp: w must not overflow (the losses clamp at 20 too).
    # expm1: for w near 1, w - 1 would lose its digits to rounding.
    return log_ratio.clamp(max=20).expm1() - log_ratio


def rows_not_finite(rollout, rows, push):
    """Those of `rows` that contain a number that is not finite; all of `rows` if none does."""
    finite = push.isfinite() & rollout.logprobs.isfinite() & rollout.old_logprobs.isfinite()
    bad = ~finite.all(1).cpu()  # [B]
    return rows[bad[rows]].tolist() or rows.tolist()


def enable_checkpointing(model):
    """Have the backward pass recompute each layer's activations, which needs train mode.

    Raises ValueError if the model's log-probabilities differ in train mode.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable()
    if not train_mode_agrees(model):
        raise ValueError(
            "--gradient-checkpointing needs train mode, in which this model computes other "
            "log-probabilities than in eval mode (randomness or a clamp): leave it out"
        )
