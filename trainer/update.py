"""Step 4 of the loop: an optimizer step on a mini-batch of any size in the memory of one micro-batch.

The gradient comes in two halves. A loss here is a function of logprobs [B, T] alone, so

    dL/dtheta = sum_{i,t} dL/dlogp_{i,t} dlogp_{i,t}/dtheta.

First half: the mini-batch's log-probabilities, and one call of `loss` on all of them, which gives dL/dlogp [B, T], how
hard each token is pushed. Second half: the model runs again, micro-batch by micro-batch, and each slice of the push
goes back through it. The loss sees the whole mini-batch, whatever its averages; micro-batches change only the memory.
"""

import contextlib
import copy

import torch
from tqdm import tqdm

from grpo import k3
from trainer.logprobs import token_logprobs
from trainer.probes import train_mode_agrees


class Updater:
    """The policy that is trained, its optimizer, and how many rows of it fit at once."""

    def __init__(self, model, algo, loss_options, options, longest, layout):
        """algo: the algorithm's module; options: train.py's; layout: what probes.probe found.

        longest: tokens of the longest row there can be. Raises ValueError if gradient checkpointing
        is asked for and would change the log-probabilities.
        """
        self.model, self.algo, self.loss_options, self.o = model, algo, loss_options, options
        # fused: its foreach form would need another copy of the weights for a moment
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options["lr"], weight_decay=0.0, fused=True
        )
        self.reference = (
            copy.deepcopy(model) if loss_options.get("beta", 0) > 0 else None
        )  # the frozen start policy
        self.needs_entropy = loss_options.get("kl_coef", 0) > 0
        self.through_head = layout.through_head
        # Checkpointing runs a layer again, without its cache: there each row runs its own prompt.
        self.share_prompts = layout.share_prompts and not options["gradient_checkpointing"]
        if options["gradient_checkpointing"]:
            enable_checkpointing(model)
        fits = rows_that_fit(model, longest, checkpointing=options["gradient_checkpointing"])
        batch = options["prompts"] * options["group_size"]
        auto = {"micro_batch": min(fits, batch // options["updates"]), "sample_batch": batch}
        self.at_once = {
            name: rows if options[name] == "auto" else int(options[name])
            for name, rows in auto.items()
        }
        self.bad_steps = (
            0  # optimizer steps skipped in a row, for a loss or gradient that is not finite
        )

    def halving(self, name, work):
        """work(rows at once), again with half of them for as long as GPU memory runs out: nothing is lost by it."""
        while True:
            rows = self.at_once[name]
            try:
                return work(rows)
            except torch.OutOfMemoryError:
                flag = "--" + name.replace("_", "-")
                if self.o[name] != "auto" or rows == 1:
                    raise MemoryError(
                        f"out of GPU memory with {flag} {rows}: try {flag} auto, "
                        f"--gradient-checkpointing, or a smaller --max-new-tokens"
                    ) from None
            self.at_once[name] = rows // 2
            tqdm.write(f"out of GPU memory: {flag} goes from {rows} to {rows // 2}")
            self.model.eval()
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def forward(self, rollout, rows, model, with_entropy=True):
        """token_logprobs of these rows, under autocast where the compute is bf16."""
        device = model.device.type
        with (
            torch.autocast(device, torch.bfloat16)
            if self.o["dtype"] == "bf16"
            else contextlib.nullcontext()
        ):
            return token_logprobs(
                model, [rollout.prompts[i] for i in rows], rollout.completions[rows], rollout.mask[rows],
                temperature=self.o["temperature"], with_entropy=with_entropy, through_head=self.through_head,
                share_prompts=self.share_prompts,
            )  # fmt: skip

    def pieces(self, rollout, rows, size):
        """The indices `rows` in micro-batches, groups of equal rewards apart from the others.

        An update leaves those groups out. Were they in the micro-batches that were measured, the rows beside them would
        now be padded otherwise, in bf16 be rounded otherwise, and have ratios off 1 by that alone.
        """
        groups = rollout.rewards.view(-1, self.o["group_size"])
        dull = (groups == groups[:, :1]).all(1).repeat_interleave(groups.shape[1]).cpu()[rows]
        parts = [part for part in (rows[~dull], rows[dull]) if len(part)]
        return [
            piece
            for part in parts
            for piece in micro_batches(rollout, part, size, self.share_prompts)
        ]

    def measure(self, rollout, mini_batches):
        """Fill in old_logprobs, entropy and, if wanted, ref_logprobs, [B, T], in the micro-batches of the updates."""

        @torch.no_grad()
        def work(size, model=None):
            dtype = torch.promote_types(self.model.dtype, torch.float32)
            logprobs, entropy = torch.zeros(
                2, *rollout.mask.shape, dtype=dtype, device=rollout.mask.device
            )
            for rows in mini_batches:
                for piece in self.pieces(rollout, rows, size):
                    logprobs[piece], entropy[piece] = self.forward(
                        rollout, piece, model or self.model
                    )
            return logprobs, entropy

        rollout.old_logprobs, rollout.entropy = self.halving("micro_batch", work)
        rollout.logprobs = rollout.old_logprobs.clone()
        if self.reference is not None:
            rollout.ref_logprobs, _ = self.halving(
                "micro_batch", lambda size: work(size, self.reference)
            )

    def update(self, rollout, rows, first):
        """One optimizer step on the mini-batch `rows` (indices); first: nothing has moved since the rollout.

        A loss or gradient that is not finite leaves the weights alone. Returns counts of tokens with an advantage
        (signal) and, of those, with a push of exactly 0 (clipped); the summed kl; the ratios if first; the gradient's
        norm before clipping (None: skipped); the rows to blame for a skip; whether the weights moved.
        """
        return self.halving("micro_batch", lambda size: self._update(rollout, rows, first, size))

    def _update(self, r, rows, first, size):
        options = dict(self.loss_options)
        signal = r.mask & (r.advantages.view(len(r.prompts), -1) != 0)  # [B, T]
        # A row without any advantage has no push, whatever its log-probabilities, unless a KL pushes it.
        live = signal.any(1).cpu() | (self.reference is not None)
        pieces = [piece for piece in self.pieces(r, rows, size) if live[piece].any()]
        entropy, in_one = r.entropy.clone(), len(pieces) == 1 and not first
        self.optimizer.zero_grad()
        self.model.train(
            self.o["gradient_checkpointing"]
        )  # transformers checkpoints only in train mode; no dropout
        if not first:  # before the first update the old log-probabilities are the current ones
            with torch.set_grad_enabled(
                in_one
            ):  # a mini-batch that is one micro-batch needs no second pass
                for piece in pieces:
                    graph, H = self.forward(r, piece, self.model, self.needs_entropy)
                    r.logprobs[piece], entropy[piece] = graph.detach(), H
        if self.needs_entropy:
            options |= {"entropy": entropy[rows], "old_entropy": r.entropy[rows]}
        if self.reference is not None:
            options |= {"ref_logprobs": r.ref_logprobs[rows]}
        logp = r.logprobs[rows].requires_grad_()
        loss = self.algo.loss(
            logp, r.old_logprobs[rows], r.advantages[rows], r.mask[rows], **options
        )
        push = torch.zeros_like(r.logprobs)
        push[rows] = torch.autograd.grad(loss, logp)[0]  # dL/dlogp  [B, T]
        stats = {
            "signal": signal[rows].sum().item(), "clipped": (signal & (push == 0))[rows].sum().item(),
            "kl": (k3(r.old_logprobs, r.logprobs) * signal)[rows].sum().item(), "ratio": [],
            "grad_norm": None, "bad_rows": [], "moved": False,
        }  # fmt: skip
        pushed = push.any(1).cpu()  # a row of NaN counts
        if loss.isfinite() and push.isfinite().all():
            for piece in pieces:
                if not in_one:
                    if not pushed[piece].any():
                        continue
                    if not first:  # then the ratio is taken from this very pass
                        piece = piece[pushed[piece]]
                    graph, _ = self.forward(r, piece, self.model, False)
                if first:
                    stats["ratio"] += (
                        (graph.detach() - r.old_logprobs[piece]).exp()[r.mask[piece]].tolist()
                    )
                graph.backward(gradient=push[piece])
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.o["max_grad_norm"])
            stats["grad_norm"] = norm.item()
        self.model.eval()
        if stats["grad_norm"] is None or not norm.isfinite():
            bad = (
                ~(push.isfinite() & r.logprobs.isfinite() & r.old_logprobs.isfinite()).all(1).cpu()
            )
            stats["bad_rows"] = [i for i in rows.tolist() if bad[i]] or rows.tolist()
            self.bad_steps += 1
            return stats
        self.bad_steps = 0
        stats["moved"] = bool(pushed[rows].any())
        if stats[
            "moved"
        ]:  # else there is nothing to learn from, and AdamW would move on its momentum alone
            self.optimizer.step()
        return stats


def enable_checkpointing(model):
    """Have a backward pass compute each layer's activations again, in train mode.

    Raises ValueError if the architecture cannot do that, or computes something else in train mode.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable()
    if not train_mode_agrees(model):
        raise ValueError(
            "--gradient-checkpointing needs train mode, and there this model computes other "
            "log-probabilities than in eval mode (randomness or a clamp of its own): leave it out"
        )


def rows_that_fit(model, tokens, budget=7 * 2**28, checkpointing=False):
    """How many rows of so many tokens fit into one forward and backward pass.

    budget: bytes of activations. A guess from the shapes, on the safe side, for any architecture; on
    CUDA an out-of-memory error corrects it by halving.
    """
    config = model.config.get_text_config()
    hidden = stated_size(config, "hidden_size", model.get_input_embeddings().weight.shape[-1])
    inner = stated_size(config, "intermediate_size", 4 * hidden)
    layers = stated_size(config, "num_hidden_layers", 32)
    layer = 4 * (16 * hidden + 6 * inner)  # bytes per token: norms, q, k, v, attention, MLP in fp32
    per_token = layer + layers * (4 * hidden if checkpointing else layer)
    return max(1, int(budget // (per_token * max(1, tokens))))


def stated_size(config, name, otherwise):
    """config.name, the largest if it is a list with one entry per layer; `otherwise` if not stated."""
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)):
        value = max(value, default=None)
    return value if isinstance(value, int) and value > 0 else otherwise


def micro_batches(rollout, rows, size, share_prompts=False):
    """The indices `rows` in pieces of at most `size`, so that as few tokens as can be are run, padding included.

    Rows of like length go together, or else, where prompts are shared, the rows of one group: whichever runs fewer.
    """
    by_length = rows[rollout.lengths[rows].argsort(stable=True)].split(size)
    if not share_prompts:
        return list(by_length)
    prompts, completion = (
        [tuple(prompt) for prompt in rollout.prompts],
        rollout.mask.sum(1).tolist(),
    )
    longest = {}  # completion of each prompt
    for i in rows.tolist():
        longest[prompts[i]] = max(longest.get(prompts[i], 0), completion[i])
    grouped = sorted(rows.tolist(), key=lambda i: (longest[prompts[i]], prompts[i], completion[i]))

    def tokens(pieces):
        """What running them costs: each distinct prompt once, and each completion, all padded to the longest."""
        cost = 0
        for piece in map(torch.Tensor.tolist, pieces):
            distinct = {prompts[i] for i in piece}
            cost += len(distinct) * max(map(len, distinct)) + len(piece) * max(
                completion[i] for i in piece
            )
        return cost

    return list(min(by_length, torch.tensor(grouped).split(size), key=tokens))
