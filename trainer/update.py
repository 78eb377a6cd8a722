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

from trainer.logprobs import token_logprobs
from trainer.probes import train_mode_agrees

KL_COEFFICIENTS = "beta", "kl_coef"  # the options of a loss that switch on a KL term


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
            model.parameters(), lr=options.lr, weight_decay=0.0, fused=True
        )
        self.reference = (
            copy.deepcopy(model) if loss_options.get("beta", 0) > 0 else None
        )  # the frozen start policy
        self.needs_entropy = loss_options.get("kl_coef", 0) > 0
        self.through_head = layout.through_head
        # Checkpointing runs a layer again, without its cache: there each row runs its own prompt.
        self.share_prompts = layout.share_prompts and not options.gradient_checkpointing
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        fits = rows_that_fit(model, longest, checkpointing=options.gradient_checkpointing)
        batch = options.rows
        auto = {"micro_batch": min(fits, batch // options.updates), "sample_batch": batch}
        self.at_once = {
            name: rows if getattr(options, name) == "auto" else int(getattr(options, name))
            for name, rows in auto.items()
        }
        self.bad_steps = (
            0  # optimizer steps skipped in a row, for a loss or gradient that is not finite
        )

    def with_smaller_batches(self, name, work):
        """work(rows at once), again with half of them for as long as GPU memory runs out: nothing is lost by it."""
        while True:
            rows = self.at_once[name]
            try:
                return work(rows)
            except torch.OutOfMemoryError:
                flag = "--" + name.replace("_", "-")
                if getattr(self.o, name) != "auto" or rows == 1:
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
            if self.o.dtype == "bf16"
            else contextlib.nullcontext()
        ):
            return token_logprobs(
                model, [rollout.prompts[i] for i in rows], rollout.completions[rows], rollout.mask[rows],
                temperature=self.o.temperature, with_entropy=with_entropy, through_head=self.through_head,
                share_prompts=self.share_prompts,
            )  # fmt: skip

    def pieces(self, rollout, rows, size):
        """The indices `rows` in micro-batches; groups that an update may leave out stand apart.

        An update leaves out the groups whose advantages are all 0. With most algorithms these are
        the groups of equal rewards, with GTPO and GRPO-S those that are all right or all wrong; the
        two differ where the reward is shaped. In one micro-batch with others, their absence would
        change the padding of the rows that remain, in bf16 also their rounding, and so the ratio.
        """
        differ = self.groups_differ(rollout.rewards) + 2 * self.groups_differ(rollout.right)  # [B]
        pieces = []
        for kind in (3, 1, 2, 0):  # rewards and correctness differ, one of the two, neither
            part = rows[differ[rows] == kind]
            if len(part):
                pieces += micro_batches(rollout, part, size, self.share_prompts)
        return pieces

    def groups_differ(self, values):
        """[B] -> [B] int on the CPU: 1 for the rows of groups whose values are not all equal."""
        groups = values.view(-1, self.o.group_size)
        differ = (groups != groups[:, :1]).any(1)
        return differ.repeat_interleave(groups.shape[1]).int().cpu()

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

        rollout.old_logprobs, rollout.entropy = self.with_smaller_batches("micro_batch", work)
        rollout.logprobs = rollout.old_logprobs.clone()
        if self.reference is not None:
            rollout.ref_logprobs, _ = self.with_smaller_batches(
                "micro_batch", lambda size: work(size, self.reference)
            )

    def update(self, rollout, rows, on_policy):
        """One optimizer step on the mini-batch `rows` (indices); on_policy: nothing has moved since the rollout.

        A loss or gradient that is not finite leaves the weights alone. Returns a dict:
        signal: tokens whose advantage is not 0;
        clipped: those of them for which the clip leaves the policy's term no gradient;
        kl: the sum over them of kl_estimate, nats, before this step;
        ratio: if on_policy, pi_theta / pi_old of each token of the rows that were run;
        grad_norm: of the whole gradient before clipping, None if the step was skipped;
        bad_rows: rows that caused a skip; moved: whether the weights moved.
        """
        return self.with_smaller_batches(
            "micro_batch", lambda size: self._update(rollout, rows, on_policy, size)
        )

    def _update(self, r, rows, on_policy, size):
        signal = r.mask & (r.advantages.view(len(r.prompts), -1) != 0)  # [B, T]
        # A row whose advantages are all 0 has no push, unless the KL to the reference pushes it.
        live = signal.any(1).cpu() | (self.reference is not None)
        pieces = [piece for piece in self.pieces(r, rows, size) if live[piece].any()]
        self.optimizer.zero_grad()
        # transformers checkpoints only in train mode; dropout is off
        self.model.train(self.o.gradient_checkpointing)
        graph, entropy = self.current_logprobs(r, pieces, on_policy)
        loss, push, policy_push = self.first_half(r, rows, entropy)

        clipped = signal & (policy_push == 0)
        kl = kl_estimate(r.logprobs, r.old_logprobs)
        said = {
            "signal": signal[rows].sum().item(),
            "clipped": clipped[rows].sum().item(),
            "kl": kl[rows][signal[rows]].sum().item(),
            "ratio": [],
            "grad_norm": None,
            "bad_rows": [],
            "moved": False,
        }
        if loss.isfinite() and push.isfinite().all():
            said["ratio"] = self.second_half(r, pieces, push, graph, on_policy)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.o.max_grad_norm)
            said["grad_norm"] = norm.item()
        self.model.eval()
        if said["grad_norm"] is None or not norm.isfinite():
            self.bad_steps += 1
            said["bad_rows"] = rows_to_blame(r, rows, push)
            return said
        self.bad_steps = 0
        said["moved"] = bool(push.any())
        if said["moved"]:  # without any push, AdamW would move on its momentum alone
            self.optimizer.step()
        return said

    def current_logprobs(self, r, pieces, on_policy):
        """Fills in r.logprobs. Returns (the graph behind them or None, the entropy now [B, T]).

        Before the first update they are the old ones, and nothing is run. If the mini-batch fits in
        one micro-batch, this pass keeps its graph, and the second half needs no other.
        """
        graph, entropy = None, r.entropy.clone()
        if on_policy:
            return graph, entropy
        with torch.set_grad_enabled(len(pieces) == 1):
            for piece in pieces:
                logprobs, H = self.forward(r, piece, self.model, self.needs_entropy)
                r.logprobs[piece], entropy[piece] = logprobs.detach(), H
        if len(pieces) == 1:
            graph = logprobs
        return graph, entropy

    def first_half(self, r, rows, entropy):
        """(loss, dL/dlogp [B, T], the same [B, T] of the loss without its KL terms)."""
        options = dict(self.loss_options)
        if self.needs_entropy:
            options["entropy"], options["old_entropy"] = entropy[rows], r.entropy[rows]
        if self.reference is not None:
            options["ref_logprobs"] = r.ref_logprobs[rows]
        loss, push = self.loss_and_push(r, rows, options)
        without_kl = {name: 0.0 for name in KL_COEFFICIENTS if options.get(name)}
        if not without_kl:
            return loss, push, push
        _, policy_push = self.loss_and_push(r, rows, options | without_kl)
        return loss, push, policy_push

    def loss_and_push(self, r, rows, options):
        """(loss of the mini-batch, dL/dlogp [B, T], 0 in other rows)."""
        logp = r.logprobs[rows].requires_grad_()
        old, A, mask = r.old_logprobs[rows], r.advantages[rows], r.mask[rows]
        loss = self.algo.loss(logp, old, A, mask, **options)
        push = torch.zeros_like(r.logprobs)
        push[rows] = torch.autograd.grad(loss, logp)[0]
        return loss, push

    def second_half(self, r, pieces, push, graph, on_policy):
        """Carries the push back to the weights. Returns the ratios if on_policy, else []."""
        ratios = []
        pushed = push.any(1).cpu()  # [B]
        for piece in pieces:
            if graph is None and not pushed[piece].any():
                continue
            logprobs = graph
            if graph is None:
                if (
                    not on_policy
                ):  # the first time, the same rows as in measure: the ratio is logged
                    piece = piece[pushed[piece]]
                logprobs, _ = self.forward(r, piece, self.model, False)
            if on_policy:
                log_ratio = (logprobs.detach() - r.old_logprobs[piece])[r.mask[piece]]
                ratios += log_ratio.exp().tolist()
            logprobs.backward(gradient=push[piece])
        return ratios


def kl_estimate(logprobs, old_logprobs):
    """(w - 1) - log w, w = pi_theta / pi_old, in nats, at the tokens that pi_old drew. [B, T]

    Its mean over samples of pi_old estimates KL(pi_old || pi_theta) without bias, since E[w] = 1,
    and no term is below 0. log w is clamped to at most 20 in w, as in the losses.
    """
    log_ratio = logprobs - old_logprobs
    return log_ratio.clamp(max=20).expm1() - log_ratio


def rows_to_blame(r, rows, push):
    """Those of `rows` in which a number is not finite; all of them if there is none."""
    finite = push.isfinite() & r.logprobs.isfinite() & r.old_logprobs.isfinite()  # [B, T]
    bad = ~finite.all(1).cpu()
    return [i for i in rows.tolist() if bad[i]] or rows.tolist()


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
