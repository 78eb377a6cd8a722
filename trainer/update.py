"""Step 4 of the loop: one optimizer step on a mini-batch, in the memory of one micro-batch.

The gradient of every loss here flows through logprobs [B, T] alone, so it comes in two halves:

    dL/dtheta = sum_{i,t} dL/dlogp_{i,t} dlogp_{i,t}/dtheta.

First half: compute the log-probabilities of the mini-batch, and call `loss` once on all of them.
This gives dL/dlogp [B, T], whatever the loss averages over.
Second half: run the model again, micro-batch by micro-batch, and backpropagate dL/dlogp through it.

Three passes are saved where they would change no number. `has_signal`: rows that push nothing are
not run. `run`: a mini-batch that is one micro-batch keeps its graph for the second half.
`learns_at_once`: the first update of a rollout may measure its own rows.
"""

import copy
import math

import torch

from grpo import constant
from trainer.batches import BatchSizes, split_micro_batches
from trainer.gradients import FEWEST
from trainer.logprobs import token_logprobs
from trainer.lora import adapted, adapters_off
from trainer.memory import choose_micro_batch, enable_checkpointing, return_free_memory
from trainer.methods import OwnFileError, inputs, is_file, parameters
from trainer.records import kl_estimate, nonzero_advantages

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
        how = {"lr": options.lr, "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), **how)
        self.reference = None  # the frozen start policy; of LoRA the model without its adapters
        if loss_options.get("beta", 0) > 0:
            self.reference = model if adapted(model) else copy.deepcopy(model)
        # A KL term is switched on by its coefficient, and may push any row of the mini-batch.
        has_kl = any(loss_options.get(name, 0) > 0 for name in KL_COEFFICIENTS)
        self.needs_all_rows = has_kl or getattr(algo, "NEEDS_ALL_ROWS", is_file(options.algo))
        self.needs_entropy = "entropy" in takes and (has_kl or "kl_coef" not in takes)
        self.through_head = layout.through_head
        # Checkpointing runs each layer again without the cache that a shared prompt needs.
        self.share_prompts = layout.share_prompts and not options.gradient_checkpointing
        # In place pays for large models alone: the embedded one updates a tenth slower with it.
        large = sum(p.numel() for p in model.parameters()) >= FEWEST
        self.in_place = large and not options.gradient_checkpointing
        self.casts = {}  # of gradients.InPlace
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        micro_batch = options.micro_batch
        if micro_batch == "auto":
            micro_batch = choose_micro_batch(model, longest, options, layout.through_head)
        self.sizes = BatchSizes(options, micro_batch)
        self.graph = None  # (rows of the only micro-batch, its log-probabilities with their graph)
        self.bad_steps = 0  # optimizer steps skipped in a row (loss or gradient not finite)

    def has_signal(self, rollout):
        """Which rows are run, [B] bool, on the CPU: those that the loss may push.

        They are the rows of groups with unequal rewards or with right and wrong answers (GTPO and
        GRPO-S look at these); all rows if the loss needs all.
        """
        if self.needs_all_rows:
            return torch.ones(len(rollout.prompts), dtype=torch.bool)
        rewards, right = (x.view(-1, self.o.group_size) for x in (rollout.rewards, rollout.right))
        differs = ~(constant(rewards) & constant(right))  # [P, 1]
        return differs.expand_as(rewards).flatten().cpu()

    def micro_batches(self, rollout, rows):
        """Those of `rows` that are run, in micro-batches: the same in each pass of a rollout.

        In bf16 other rows beside a row change its padding, hence its rounding and its ratio.
        """
        rows = rows[self.has_signal(rollout)[rows]]
        size = self.sizes.rows["micro_batch"]
        return split_micro_batches(rollout, rows, size, self.share_prompts)

    def forward(self, rollout, rows, model):
        """token_logprobs of these rows; under autocast to bf16 if --dtype is bf16."""
        return_free_memory(model)
        bf16, kind = self.o.dtype == "bf16", model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return token_logprobs(
                model,
                [rollout.prompts[i] for i in rows],
                rollout.completions[rows],
                rollout.mask[rows],
                temperature=self.o.temperature,
                through_head=self.through_head,
                share_prompts=self.share_prompts,
                casts=self.casts if self.in_place else None,
            )

    def run(self, model, rollout, rows, logprobs, entropy, keep_graph=False):
        """Write the log-probabilities and entropies of `rows` into logprobs and entropy, [B, T].

        keep_graph: keep the graph, in self.graph, if the rows are a single micro-batch.
        """
        micro_batches = self.micro_batches(rollout, rows)
        keep_graph = keep_graph and len(micro_batches) == 1
        for part in micro_batches:
            with torch.set_grad_enabled(keep_graph):
                found = self.forward(rollout, part, model)
            logprobs[part], entropy[part] = found[0].detach(), found[1]
            if keep_graph:
                self.graph = part, found[0]

    def measure(self, rollout, mini_batches, learn_at_once=False):
        """Fill in the rollout's old_logprobs, entropy and, if needed, ref_logprobs, all [B, T].

        Rows without a signal keep what the sampler computed; rollout.measured [B] has the others.
        learn_at_once: leave the first mini-batch to its update if `learns_at_once`.
        """

        def work(_):
            self._measure(rollout, mini_batches, learn_at_once)

        self.sizes.with_smaller("micro_batch", work)

    def _measure(self, rollout, mini_batches, learn_at_once):
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        rollout.old_logprobs = rollout.sampler_logprobs.to(dtype, copy=True)
        rollout.entropy = rollout.sampler_entropy.to(dtype, copy=True)
        rollout.measured = torch.zeros(len(rollout.prompts), dtype=torch.bool)
        if learn_at_once and self.learns_at_once(rollout, mini_batches[0]):
            mini_batches = mini_batches[1:]
        if self.reference is not None:
            rollout.ref_logprobs = torch.zeros_like(rollout.old_logprobs)
            with adapters_off(self.reference):
                for rows in mini_batches:
                    self.run(self.reference, rollout, rows, rollout.ref_logprobs, rollout.entropy)
            self.casts.clear()
        for rows in mini_batches:
            self.run(self.model, rollout, rows, rollout.old_logprobs, rollout.entropy)
            rollout.measured[rows] = self.has_signal(rollout)[rows]
        rollout.logprobs = rollout.old_logprobs.clone()

    def learns_at_once(self, rollout, rows):
        """Whether dL/dlogp of the first update is the same at any log-probabilities.

        On policy every ratio is 1, so it is where the loss takes nothing but ratios. It is tried
        out with stand-in advantages, because the real ones may need the entropy.
        """
        measured_first = self.needs_all_rows or self.needs_entropy or self.o.sampler_correction
        if measured_first or "entropy" in parameters(self.algo.advantages):
            return False
        old_logprobs = rollout.old_logprobs
        rollout.advantages = 2.0 * (torch.arange(len(old_logprobs)) % 2) - 1
        gradients = []
        for logprobs in (old_logprobs, torch.zeros_like(old_logprobs)):
            rollout.logprobs = rollout.old_logprobs = logprobs
            loss_inputs = self.loss_inputs(rollout, rows, None)
            gradients.append(self.loss_gradient(rollout, rows, loss_inputs)[1])
        rollout.old_logprobs = old_logprobs
        return torch.equal(*gradients)

    def update(self, rollout, rows, on_policy):
        """One optimizer step on the mini-batch `rows` (indices).

        on_policy: the weights have not changed since the rollout. If the loss or the gradient is
        not finite, the step is skipped and the weights stay as they are. Returns a dict:
        signal: number of tokens with a nonzero advantage;
        clipped: number of those tokens whose policy term has no gradient because of the clip;
        kl: sum of kl_estimate over the signal tokens, in nats, before this step;
        ratio: pi_theta / pi_old of each token that was run again if on_policy, else [];
        grad_norm: norm of the gradient before clipping; None if loss or dL/dlogp is not finite;
        bad_rows: rows that caused the step to be skipped;
        moved: whether the weights changed.
        """

        def work(_):
            self.graph = None  # of an attempt with more rows, as are its gradients
            self.optimizer.zero_grad()
            return self._update(rollout, rows, on_policy)

        return self.sizes.with_smaller("micro_batch", work)

    def _update(self, rollout, rows, on_policy):
        # transformers checkpoints in train mode only; load_policy has switched off dropout.
        self.model.train(self.o.gradient_checkpointing)

        # First half: dL/dlogp. On policy, logprobs are old_logprobs, and nothing is run.
        entropy = rollout.entropy.clone()
        if not on_policy:
            self.run(self.model, rollout, rows, rollout.logprobs, entropy, keep_graph=True)
        loss_inputs = self.loss_inputs(rollout, rows, entropy)
        loss, gradient = self.loss_gradient(rollout, rows, loss_inputs)
        result = self.statistics(rollout, rows, gradient, loss_inputs)

        # Second half: dlogp/dtheta.
        if loss.isfinite() and gradient.isfinite().all():
            result["ratio"] = self.backward(rollout, rows, gradient, on_policy)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.o.max_grad_norm)
            result["grad_norm"] = norm.item()

        self.model.eval()
        self.apply_or_skip(rollout, rows, gradient, result)
        self.graph = None
        self.casts.clear()
        self.optimizer.zero_grad()  # now, not before the next pass: no rollout has to hold them
        return result

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
        gradient = torch.zeros_like(rollout.logprobs)
        gradient[rows] = gradient_of(self.algo.loss, loss, logprobs)
        return loss, gradient

    def backward(self, rollout, rows, gradient, on_policy):
        """Backpropagate gradient = dL/dlogp [B, T] of the rows into the weights.

        Returns pi_theta / pi_old of each token that was measured before if on_policy, else [].
        """
        if self.graph is not None:
            part, logprobs = self.graph
            logprobs.backward(gradient=gradient[part])
            return []
        ratios = []
        pushed = gradient.any(1).cpu()  # [B]
        for part in self.micro_batches(rollout, rows):
            measured = rollout.measured[part].all()
            if not on_policy:  # on policy, the ratio needs the rows of `measure`
                part = part[pushed[part]]
            if measured and not pushed[part].any():
                continue
            logprobs, entropy = self.forward(rollout, part, self.model)
            return_free_memory(self.model)
            logprobs.backward(gradient=gradient[part])
            if on_policy and measured:
                log_ratio = logprobs.detach() - rollout.old_logprobs[part]
                ratios += log_ratio[rollout.mask[part]].exp().tolist()
            elif on_policy:
                rollout.old_logprobs[part] = rollout.logprobs[part] = logprobs.detach()
                rollout.entropy[part], rollout.measured[part] = entropy, True
        return ratios

    def apply_or_skip(self, rollout, rows, gradient, result):
        """Take the optimizer step, or skip it if the loss or gradient is not finite.

        Fills in bad_rows and moved of the result.
        """
        grad_norm = result["grad_norm"]
        if grad_norm is None or not math.isfinite(grad_norm):
            self.bad_steps += 1
            result["bad_rows"] = rows_not_finite(rollout, rows, gradient)
            return
        self.bad_steps = 0
        if gradient.any():  # with a gradient of 0, AdamW's momentum would still move the weights
            self.optimizer.step()
            result["moved"] = True

    def statistics(self, rollout, rows, gradient, loss_inputs):
        """The result of `update` before its second half. Nothing here changes the gradient."""
        policy_gradient = gradient
        without_kl = {name: 0.0 for name in KL_COEFFICIENTS if loss_inputs.get(name)}
        if without_kl:  # whether the clip acts is a question about the policy term alone
            _, policy_gradient = self.loss_gradient(rollout, rows, {**loss_inputs, **without_kl})
        signal = nonzero_advantages(rollout)
        clipped = signal & (policy_gradient == 0)
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


def rows_not_finite(rollout, rows, gradient):
    """Those of `rows` that contain a number that is not finite; all of `rows` if none does."""
    finite = gradient.isfinite() & rollout.logprobs.isfinite() & rollout.old_logprobs.isfinite()
    bad = ~finite.all(1).cpu()  # [B]
    return rows[bad[rows]].tolist() or rows.tolist()
