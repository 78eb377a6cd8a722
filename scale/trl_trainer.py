"""The seven algorithms on TRL's GRPOTrainer: several GPUs through accelerate, FSDP or DeepSpeed, rollouts by vLLM.

    python scale/trl_trainer.py --algo tepo --model tiny --data tiny
    accelerate launch --num_processes 8 scale/trl_trainer.py --algo tepo --preset gsm8k --use_vllm true

TRL calls its loss once a micro-batch on every process and averages what comes out. The losses here are averages over
the whole mini-batch, tokens or sequences, and that is not the average of its pieces. So the gradient is taken in two
halves, as train.py does it: gather the log-probabilities of the mini-batch from every micro-batch and every process,
call the loss once on all of them, and keep dL/dlogp [B, T]; then send each micro-batch's slice of it back through the
model, since dL/dtheta = sum_{i,t} dL/dlogp_{i,t} dlogp_{i,t}/dtheta. It is exact for any loss, on any number of GPUs.

What it costs over TRL: one forward pass a rollout (the old log-probabilities and the entropies come from it), and where
gradients are accumulated one more an optimizer step after the first.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import HfArgumentParser

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
except ImportError as error:
    if __name__ != "__main__":
        raise
    install = "pip install -r requirements.txt -r scale/requirements.txt"
    print(f"trl_trainer.py: error: TRL is needed ({error}): {install}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grpo import token_mean  # noqa: E402
from rewards import correct, overlong_penalty  # noqa: E402
from trainer.algorithm import named, parameters, split_options  # noqa: E402
from trainer.data import load_problems, split_overlap  # noqa: E402
from trainer.options import (  # noqa: E402
    DEFAULTS,
    TYPES,
    Parser,
    add_template_option,
    fill,
    template_options,
)
from trainer.policy import context_length, load_policy  # noqa: E402
from trainer.prompts import Chat, encode_problems  # noqa: E402
from trainer.update import KL_COEFFICIENTS, kl_estimate  # noqa: E402

# The options of train.py that mean the same here.
OPTIONS = (
    "algo", "model", "data", "prompt", "chat_template", "system", "steps", "seed", "prompts",
    "group_size", "temperature", "max_new_tokens", "overlong_cache", "updates", "epochs", "lr",
    "warmup", "max_grad_norm", "dtype", "micro_batch", "out",
)  # fmt: skip
# What a GRPOConfig says about the loss and the advantages; ours replace both, so none of it may ask for anything.
REPLACED = (
    "loss_type", "epsilon", "epsilon_high", "delta", "beta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
    "off_policy_mask_threshold", "use_bias_correction_kl", "router_aux_loss_coef",
)  # fmt: skip


class Trainer(GRPOTrainer):
    """GRPOTrainer with the advantages and the loss of one of our files; text models.

    algo: the module's name. options: keywords of its two functions, {"eps_high": 0.3}. prompt_ids:
    {prompt (a text): its token ids}, for prompts that TRL shall not encode itself. A reward function
    named `right` says which completions succeeded (1.0), for GTPO and GRPO-S; without one these are
    the ones with a reward above 0.5. The rest goes to GRPOTrainer, `args` by keyword. Raises
    ValueError on a GRPOConfig that would be ignored or that splits an optimizer step.
    """

    def __init__(self, algo, *, args, options=None, prompt_ids=None, **kwargs):
        options = dict(options or {})
        self.prompt_ids = prompt_ids or {}
        fields = GRPOConfig.__dataclass_fields__
        if ignored := [name for name in REPLACED if getattr(args, name) != fields[name].default]:
            raise ValueError(
                f"{ignored[0]} has no effect on {algo}: its options are those of {algo}.py"
            )
        if args.steps_per_generation % args.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation {args.steps_per_generation} must be a multiple of gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps}: an optimizer step is taken on one rollout"
            )
        self.algo = importlib.import_module(algo)
        self.advantage_options, self.loss_options = split_options(self.algo, options)
        args.beta = options.get(
            "beta", 0.0
        )  # makes TRL load the reference and compute ref_per_token_logps
        super().__init__(args=args, **kwargs)

    def logprobs(self, model, batch):
        """(log-probabilities, entropies in nats) of the completions' tokens, both [b, t]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width, rows = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, width, batch_size=rows, compute_entropy=True
        )
        return logprobs, entropy

    def logprobs_without_graph(self, batch):
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self.logprobs(self.model, batch)

    def everywhere(self, x):
        """[b, ...] of this process -> [B, ...] of all of them in order; a second dimension is padded with 0."""
        return self.accelerator.gather(
            self.accelerator.pad_across_processes(x, dim=1) if x.ndim > 1 else x
        )

    def own(self, x, like):
        """The rows of [B, ...] that are this process's, as wide as `like`."""
        start = self.accelerator.process_index * len(like)
        x = x[start : start + len(like)]
        return x[:, : like.shape[1]] if x.ndim > 1 else x

    def _calculate_rewards(self, *args, **kwargs):
        self.rewards_per_func = super()._calculate_rewards(
            *args, **kwargs
        )  # [B, functions], of all processes
        return self.rewards_per_func

    def _tokenize_prompts(self, prompts):
        """The token ids that were given for these prompts; TRL encodes any others."""
        if all(isinstance(text, str) and text in self.prompt_ids for text in prompts):
            return [self.prompt_ids[text] for text in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout, with our advantages: they need the rewards and the entropies of whole groups."""
        batch = super()._generate_and_score_completions(inputs)
        batch["mask"] = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["old_per_token_logps"], batch["entropy"] = self.logprobs_without_graph(batch)
        rewards = (
            self.rewards_per_func * self.reward_weights.to(self.rewards_per_func.device)
        ).nansum(1)  # [B]
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        inputs = {name: self.everywhere(batch[name]) for name in ("entropy", "mask")}
        inputs["right"] = self.right()
        wanted = named(self.algo.advantages, inputs)
        advantages = self.algo.advantages(rewards, group_size, **wanted, **self.advantage_options)
        batch["advantages"] = self.own(advantages, batch["mask"])  # [b] or [b, t]
        return batch

    def right(self):
        """What the reward function named `right` gave, [B] of all processes; None without one."""
        if "right" not in self.reward_func_names:
            return None
        return self.rewards_per_func[:, self.reward_func_names.index("right")]

    def _prepare_inputs(self, inputs):
        """At the first of the micro-batches of an optimizer step, the first half of the gradient for all of them."""
        batch = super()._prepare_inputs(inputs)
        accumulated = self.args.gradient_accumulation_steps
        if self.model.training and accumulated > 1 and self._step % accumulated == 0:
            start = self._step % self.args.steps_per_generation
            window = self._buffered_inputs[start : start + accumulated]
            if (
                self._step % (self.args.steps_per_generation * self.num_iterations) == 0
            ):  # nothing has moved yet
                pairs = [(x["old_per_token_logps"], x["entropy"]) for x in window]
            else:
                pairs = [self.logprobs_without_graph(x) for x in window]
            self.push(window, *map(torch.cat, zip(*pairs, strict=True)))
        return batch

    def push(self, window, logprobs, entropy):
        """The loss of a whole mini-batch and dL/dlogprobs, put into the micro-batches of its window on this process."""

        def whole(name):
            return torch.cat([x[name] for x in window]) if name in window[0] else None

        advantages, weight = whole("advantages"), whole("importance_sampling_ratio")
        if (
            weight is not None
        ):  # vLLM's correction, [b, 1] or [b, t]: a factor of each token's term of the loss
            one_each = weight.shape[1] == 1 and advantages.ndim == 1
            advantages = (
                advantages * weight[:, 0] if one_each else advantages.view(len(weight), -1) * weight
            )
        logp = self.everywhere(logprobs.detach()).requires_grad_()  # [B, T]
        old, A, mask = map(
            self.everywhere, (whole("old_per_token_logps"), advantages, whole("mask"))
        )
        others = {
            "entropy": entropy,
            "old_entropy": whole("entropy"),
            "ref_logprobs": whole("ref_per_token_logps"),
        }
        wanted = [name for name in parameters(self.algo.loss) if others.get(name) is not None]
        others = {name: self.everywhere(others[name]) for name in wanted}
        options = self.loss_options | others

        def loss_and_push(**changed):
            with torch.enable_grad():
                loss = self.algo.loss(logp, old, A, mask, **(options | changed))
                return loss, torch.autograd.grad(loss, logp)[0]

        loss, push = loss_and_push()
        without_kl = {name: 0.0 for name in KL_COEFFICIENTS if options.get(name)}
        policy_push = loss_and_push(**without_kl)[1] if without_kl else push
        sizes = [len(x["mask"]) for x in window]
        for x, piece in zip(window, self.own(push, logprobs).split(sizes), strict=True):
            x["push"], x["loss"] = piece, loss.detach()
        signal = mask * ((A if A.ndim == 2 else A[:, None]) != 0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        # of tokens with an advantage: those for which the clip leaves the policy's term no gradient
        metrics["clip_frac"].append(token_mean((policy_push == 0).float(), signal).item())
        # of all completion tokens: KL(pi_old || pi_theta) and the current policy's entropy, nats per token
        metrics["kl_old"].append(token_mean(kl_estimate(logp.detach(), old), mask).item())
        metrics["entropy"].append(token_mean(self.everywhere(entropy), mask).item())

    def _compute_loss(self, model, inputs):
        """The second half: a scalar whose value is the mini-batch's loss, and its gradient this micro-batch's share."""
        logprobs, entropy = self.logprobs(model, inputs)
        if (
            "push" not in inputs
        ):  # the mini-batch is one micro-batch a process, or this is an evaluation
            self.push([inputs], logprobs, entropy)
        push, loss = inputs.pop("push"), inputs.pop("loss")
        share = (
            logprobs * push
        ).sum() * self.accelerator.num_processes  # gradients are averaged over processes
        reported = loss / (
            self.current_gradient_accumulation_steps if self.model.training else 1
        )  # summed by TRL
        return share + (reported - share).detach()


def texts_of(completions):
    """TRL hands texts, or conversations of one assistant turn."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def rewards(options, eos_ids):
    """train.py's reward as functions that TRL calls and adds up: `right`, and `overlong` if asked for.

    A completion without any of eos_ids is truncated.
    """

    def right(completions, completion_ids, answer, **_):
        texts = texts_of(completions)
        truncated = [set(eos_ids).isdisjoint(ids) for ids in completion_ids]
        return [correct(*row) for row in zip(texts, answer, truncated, strict=True)]

    def overlong(completion_ids, **_):
        limits = options.max_new_tokens, options.overlong_cache
        return [overlong_penalty(len(ids), *limits) for ids in completion_ids]

    return [right, overlong] if options.overlong_cache else [right]


def rows(tokenizer, problems):
    """Problems of prompts.encode_problems as TRL's rows, the prompt a text for TRL's logs."""
    return [{"prompt": tokenizer.decode(p["prompt_ids"]), "answer": p["answer"]} for p in problems]


def parse(argv):
    """(train.py's options, a GRPOConfig): ours by their names in train.py, every other flag goes to GRPOConfig."""
    parser = Parser(
        prog="trl_trainer.py", description=__doc__.split("\n")[0],
        argument_default=argparse.SUPPRESS,
        epilog="Every other --flag is a field of TRL's GRPOConfig: --use_vllm true --gradient_checkpointing false ...",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=tuple(DEFAULTS), default="gsm8k", help="train.py's defaults (gsm8k)"
    )
    for name in OPTIONS:
        parser.add_argument(
            "--" + name.replace("_", "-"), type=TYPES[name], metavar=TYPES[name].__name__.upper()
        )
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="an option of the algorithm; repeatable",
    )
    add_template_option(parser)
    given, rest = parser.parse_known_args(argv)
    given = vars(given)
    given["template_option"] = template_options(given.get("template_option", []))
    given["option"] = dict(text.partition("=")[::2] for text in given.get("option", []))
    o = fill(given)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    mini_batch = o.prompts * o.group_size // o.updates
    each = mini_batch // processes
    auto = next(
        (size for size in range(8, 0, -1) if each % size == 0), 1
    )  # TRL does not measure what fits
    micro_batch = auto if o.micro_batch == "auto" else int(o.micro_batch)
    if mini_batch % (micro_batch * processes):
        raise ValueError(
            f"a mini-batch of {mini_batch} completions (--prompts x --group-size / --updates) does not split into "
            f"micro-batches of {micro_batch} on {processes} processes: change --micro-batch or --updates"
        )
    accumulated = mini_batch // (micro_batch * processes)
    trl = HfArgumentParser(GRPOConfig)
    trl.set_defaults(
        output_dir=o.out or f"runs/trl-{o.algo}-{o.preset}-s{o.seed}",
        max_steps=o.steps * o.updates * o.epochs,  # TRL counts optimizer steps
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * o.updates,
        num_iterations=o.epochs,
        num_generations=o.group_size,
        temperature=o.temperature,
        max_completion_length=o.max_new_tokens,
        learning_rate=o.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=o.warmup * o.updates * o.epochs,
        weight_decay=0.0,
        max_grad_norm=o.max_grad_norm,
        seed=o.seed,
        bf16=o.dtype == "bf16",
        use_cpu=o.device == "cpu",
        ddp_find_unused_parameters=False,
        logging_steps=o.updates * o.epochs,
        save_strategy="no",
        report_to="none",
    )
    (config,) = trl.parse_args_into_dataclasses(rest)
    return o, config


def main(argv=None):
    o, config = parse(argv)
    held_out = load_problems(o.data, "test")
    problems, overlap = split_overlap(load_problems(o.data, "train"), held_out)
    if overlap:
        print(f"dropped {overlap} problems of training that are held out too")
    chat = Chat(o.chat_template, o.system, o.template_option)
    # fp32 weights, dropout off; accelerate moves them. TRL stops at the EOS ids of its generation
    # config, which load_policy has set; vLLM has to be told.
    model, tokenizer, eos_ids, _ = load_policy(o.model, chat=chat)
    if config.use_vllm:
        config.generation_kwargs = {"stop_token_ids": eos_ids, **(config.generation_kwargs or {})}
    longest = context_length(model) - o.max_new_tokens
    vocabulary = len(model.get_input_embeddings().weight)
    problems, dropped = encode_problems(
        tokenizer, problems, o.prompt, longest, vocabulary, chat, eos_ids
    )
    if dropped:
        print(f"dropped {dropped} problems of over {longest} prompt tokens")
    dataset = rows(tokenizer, problems)
    texts, ids = [row["prompt"] for row in dataset], [p["prompt_ids"] for p in problems]
    trainer = Trainer(
        o.algo,
        options=o.option,
        args=config,
        prompt_ids=dict(zip(texts, ids, strict=True)),
        model=model,
        processing_class=tokenizer,
        reward_funcs=rewards(o, eos_ids),
        train_dataset=Dataset.from_list(dataset),
    )
    trainer.train()
    trainer.save_model()  # model and tokenizer: python train.py --eval-only --model FOLDER


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(
            print("trl_trainer.py: error:", " ".join(str(error).split()), file=sys.stderr) or 2
        )
