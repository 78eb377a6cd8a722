"""The algorithms on TRL's GRPOTrainer, on one GPU or many.

    python scale/trl_trainer.py --algo tepo --model tiny --data tiny
    accelerate launch --num_processes 8 scale/trl_trainer.py --algo tepo --preset gsm8k \\
        --use_vllm true

accelerate, FSDP or DeepSpeed spread the training over GPUs; Hugging Face or vLLM samples.

TRL calls its loss once per micro-batch on every process and averages the results. Our losses are
averages over the whole mini-batch (its tokens or its sequences), which is not the average of its
pieces. So the gradient is taken in two halves, as in train.py:

1. Gather the log-probabilities of the mini-batch from every micro-batch and every process. Call the
   loss once on all of them and keep gradient = dL/dlogprobs, [B, T].
2. Send each micro-batch's part of it back through the model:
   dL/dtheta = sum_{i,t} dL/dlogp_{i,t} * dlogp_{i,t}/dtheta.

This is exact for any loss and any number of GPUs. It costs one more forward pass per rollout than
TRL, for the old log-probabilities and the entropies. With gradient accumulation it costs one more
per optimizer step, except the first of a rollout.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run.checks import fill
from run.commandline import RaisingParser
from run.options import DEFAULTS
from run.parser import add_option
from trainer.methods import label

# The options of train.py that mean the same here.
OPTIONS = [
    *["algo", "model", "data", "prompt", "chat_template", "system", "steps", "seed"],
    *["prompts", "group_size", "temperature", "max_new_tokens", "overlong_cache"],
    *["updates", "epochs", "lr", "warmup", "max_grad_norm", "dtype"],
]


def build_parser():
    parser = RaisingParser(
        prog="trl_trainer.py",
        description=__doc__.split("\n")[0],
        epilog="Every other --flag is a field of TRL's GRPOConfig, such as --use_vllm true.",
        argument_default=argparse.SUPPRESS,
    )
    text = "the defaults, as in train.py (default gsm8k)"
    parser.add_argument("--preset", choices=tuple(DEFAULTS), default="gsm8k", help=text)
    for name in (*OPTIONS, "option", "template_option"):
        add_option(parser, name)
    text = "rows per forward pass of a process, or auto: up to 8 (default auto)"
    parser.add_argument("--micro-batch", metavar="STR", help=text)
    text = "folder of the trained model (default runs/trl-<algo>-<preset>-s<seed>)"
    parser.add_argument("--out", metavar="STR", help=text)
    return parser


if __name__ == "__main__":  # --help does not wait for torch and TRL to be imported
    if {"-h", "--help"} & set(sys.argv[1:]):
        build_parser().print_help()
        sys.exit(0)

import torch
from datasets import Dataset
from transformers import HfArgumentParser

try:
    from accelerate.utils import broadcast
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
except ImportError as error:
    if __name__ != "__main__":
        raise
    install = "pip install -r requirements.txt -r scale/requirements.txt"
    print(f"trl_trainer.py: error: TRL is needed ({error}): {install}", file=sys.stderr)
    sys.exit(2)

from grpo import token_mean
from rewards import correct, overlong_penalty
from run.algorithm import load_algorithm
from run.checkpoint import find_model
from trainer.data import load_problems, split_overlap
from trainer.methods import named, parameters, split_options
from trainer.policy import context_length, load_policy
from trainer.prompts import Chat, encode_problems
from trainer.records import kl_estimate
from trainer.update import KL_COEFFICIENTS

# Fields of GRPOConfig for TRL's own loss and advantages. Ours replace both, so these must keep
# their defaults.
REPLACED = [
    *["loss_type", "epsilon", "epsilon_high", "delta", "beta", "importance_sampling_level"],
    *["scale_rewards", "multi_objective_aggregation", "top_entropy_quantile", "entropy_coef"],
    *["use_adaptive_entropy", "off_policy_mask_threshold", "use_bias_correction_kl"],
    *["router_aux_loss_coef", "sapo_temperature_pos", "sapo_temperature_neg"],
    *["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"],
]
# Weights multiply the advantages. Why these take none:
NO_WEIGHTS = {
    **dict.fromkeys(["clip_cov", "kl_cov"], "which would change the choice of tokens"),
    "dro": "which would not reach its penalty",
}


class Trainer(GRPOTrainer):
    """GRPOTrainer with the advantages and the loss of one of our files; text models only.

    algo: the name of the module. options: keywords of its two functions, such as {"eps_high": 0.3}.
    prompt_ids: {text of a prompt: its token ids}, for prompts that TRL must not encode itself. args
    and the rest: as in GRPOTrainer, by keyword. A reward function named `right` says which
    completions succeeded (1.0), for GTPO and GRPO-S; without one, a reward above 0.5 is a success.
    Raises ValueError on a GRPOConfig that would be ignored or that does not fit the algorithm.
    """

    def __init__(self, algo, *, args, options=None, prompt_ids=None, **kwargs):
        options = dict(options or {})
        self.prompt_ids = prompt_ids or {}
        check_config(algo, args)
        self.algo = load_algorithm(algo)
        self.history = []  # the mean reward of each rollout so far, for HA-DW
        self.advantage_options, self.loss_options = split_options(self.algo, options)
        # If it is not 0, TRL loads the reference model and computes ref_per_token_logps.
        args.beta = options.get("beta", 0.0)
        super().__init__(args=args, **kwargs)

    def logprobs(self, model, batch):
        """(log-probabilities, entropies in nats) of the completions' tokens, both [b, t]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, width, batch_size=size, compute_entropy=True
        )
        return logprobs, entropy

    def logprobs_without_graph(self, batch):
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
            return self.logprobs(self.model, batch)

    def everywhere(self, x):
        """[b, ...] of this process -> [B, ...] of all processes in order.

        A second dimension is padded with 0 to the longest.
        """
        if x.ndim > 1:
            x = self.accelerator.pad_across_processes(x, dim=1)
        return self.accelerator.gather(x)

    def own(self, x, like):
        """The rows of [B, ...] that belong to this process, cut to the width of `like`."""
        start = self.accelerator.process_index * len(like)
        x = x[start : start + len(like)]
        return x[:, : like.shape[1]] if x.ndim > 1 else x

    def _calculate_rewards(self, *args, **kwargs):
        """Keeps the rewards of all processes, [B, functions]."""
        self.rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self.rewards_per_func

    def _tokenize_prompts(self, prompts):
        """The given token ids of these prompts; TRL encodes any others."""
        if all(isinstance(text, str) and text in self.prompt_ids for text in prompts):
            return [self.prompt_ids[text] for text in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout with our advantages, from the rewards and entropies of whole groups."""
        batch = super()._generate_and_score_completions(inputs)
        batch["mask"] = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["old_per_token_logps"], batch["entropy"] = self.logprobs_without_graph(batch)
        weights = self.reward_weights.to(self.rewards_per_func.device)
        rewards = (self.rewards_per_func * weights).nansum(1)  # [B]
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        inputs = {name: self.everywhere(batch[name]) for name in ("entropy", "mask")}
        inputs["completions"] = self.everywhere(batch["completion_ids"])
        inputs["right"], inputs["history"] = self.right(), self.history
        wanted = named(self.algo.advantages, inputs)
        advantages = self.algo.advantages(rewards, group_size, **wanted, **self.advantage_options)
        if self.model.training:
            self.history = [*self.history, rewards.mean().item()]
        batch["advantages"] = self.own(advantages, batch["mask"])  # [b] or [b, t]
        return batch

    def right(self):
        """What the reward function named `right` returned, [B] of all processes; else None."""
        if "right" not in self.reward_func_names:
            return None
        return self.rewards_per_func[:, self.reward_func_names.index("right")]

    def _prepare_inputs(self, inputs):
        """Before the first micro-batch of an optimizer step: the first half, for all of them."""
        batch = super()._prepare_inputs(inputs)
        accumulated = self.args.gradient_accumulation_steps
        if not self.model.training or accumulated == 1 or self._step % accumulated:
            return batch
        start = self._step % self.args.steps_per_generation
        window = self._buffered_inputs[start : start + accumulated]
        first_of_rollout = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if first_of_rollout:  # the weights are still those of the rollout
            pairs = [(x["old_per_token_logps"], x["entropy"]) for x in window]
        else:
            pairs = [self.logprobs_without_graph(x) for x in window]
        logprobs, entropy = zip(*pairs, strict=True)
        self.first_half(window, torch.cat(logprobs), torch.cat(entropy))
        return batch

    def first_half(self, window, logprobs, entropy):
        """The first half: put "loss" and "gradient" into each micro-batch of a mini-batch.

        window: the micro-batches of this process. logprobs, entropy: of all their rows, [b, t].
        """
        logp = self.everywhere(logprobs.detach()).requires_grad_()  # [B, T]
        old = self.everywhere(whole(window, "old_per_token_logps"))
        A = self.everywhere(weighted_advantages(window))
        mask = self.everywhere(whole(window, "mask"))
        options = {**self.loss_inputs(window, entropy), **self.loss_options}

        def loss_and_gradient(**changed):
            with torch.enable_grad():
                loss = self.algo.loss(logp, old, A, mask, **{**options, **changed})
                gradient = torch.autograd.grad(loss, logp)[0]
            # Clip-Cov draws tokens at random: every process takes the first one's draw.
            return broadcast(loss.detach()), broadcast(gradient)

        loss, gradient = loss_and_gradient()
        sizes = [len(x["mask"]) for x in window]
        pieces = self.own(gradient, logprobs).split(sizes)
        for x, piece in zip(window, pieces, strict=True):
            x["gradient"], x["loss"] = piece, loss

        without_kl = {name: 0.0 for name in KL_COEFFICIENTS if options.get(name)}
        if without_kl:
            _, gradient = loss_and_gradient(**without_kl)
        self.log_mini_batch(logp, old, A, mask, self.everywhere(entropy), gradient)

    def loss_inputs(self, window, entropy):
        """What the algorithm's loss takes by keyword: tensors [B, T], where TRL has them, and L."""
        found = {
            "entropy": entropy,
            "old_entropy": whole(window, "entropy"),
            "ref_logprobs": whole(window, "ref_per_token_logps"),
        }
        wanted = {}
        for name in parameters(self.algo.loss):
            if found.get(name) is not None:
                wanted[name] = self.everywhere(found[name])
        lengths = {"max_length": self.max_completion_length}  # Dr. GRPO's L
        return {**wanted, **named(self.algo.loss, lengths)}

    def log_mini_batch(self, logp, old, A, mask, entropy, policy_gradient):
        """policy_gradient: dL/dlogprobs without the loss's KL terms."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        signal = mask * ((A if A.ndim == 2 else A[:, None]) != 0)
        clipped = (policy_gradient == 0).float()
        # Of the tokens with an advantage: the share to which the policy's term gives no gradient.
        metrics["clip_frac"].append(token_mean(clipped, signal).item())
        # Of all completion tokens, in nats per token: KL(pi_old || pi_theta), and the entropy of
        # the current policy.
        kl = kl_estimate(logp.detach(), old)
        metrics["kl_old"].append(token_mean(kl, mask).item())
        metrics["entropy"].append(token_mean(entropy, mask).item())

    def _compute_loss(self, model, inputs):
        """The second half: a scalar with this micro-batch's share of the gradient.

        Its value is the mini-batch's loss, divided by what TRL multiplies it with.
        """
        logprobs, entropy = self.logprobs(model, inputs)
        if "gradient" not in inputs:  # one micro-batch per mini-batch and process, or an evaluation
            self.first_half([inputs], logprobs, entropy)
        gradient, loss = inputs.pop("gradient"), inputs.pop("loss")
        # Gradients are averaged over processes, hence the factor.
        share = (logprobs * gradient).sum() * self.accelerator.num_processes
        if self.model.training:
            loss = loss / self.current_gradient_accumulation_steps  # TRL adds the values up
        return share + (loss - share).detach()


def check_config(algo, args):
    """Raise ValueError on a GRPOConfig that would be ignored or that does not fit the algorithm."""
    for name in REPLACED:
        if getattr(args, name) != GRPOConfig.__dataclass_fields__[name].default:
            raise ValueError(f"{name} has no effect on {algo}: its options are those of {algo}.py")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation {args.steps_per_generation} must be a multiple of "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps}: "
            f"an optimizer step is taken on one rollout"
        )
    if algo == "dr_grpo" and args.max_completion_length is None:
        raise ValueError("dr_grpo divides by a constant: set max_completion_length")
    weighted = args.use_vllm and args.vllm_importance_sampling_correction
    if algo in NO_WEIGHTS and weighted:
        raise ValueError(
            f"{algo} cannot take vLLM's weights, {NO_WEIGHTS[algo]}: "
            f"set --vllm_importance_sampling_correction false"
        )


def whole(window, name):
    """One tensor of all micro-batches' `name`, or None where TRL did not make it."""
    return torch.cat([x[name] for x in window]) if name in window[0] else None


def weighted_advantages(window):
    """The advantages, times vLLM's importance-sampling weights where there are any.

    A weight is [b, 1] or [b, t] and not negative, so it multiplies the token's term of the loss.
    """
    advantages = whole(window, "advantages")
    weight = whole(window, "importance_sampling_ratio")
    if weight is None:
        return advantages
    if weight.shape[1] == 1 and advantages.ndim == 1:
        return advantages * weight[:, 0]
    return advantages.view(len(weight), -1) * weight


def texts_of(completions):
    """TRL passes texts, or conversations of one assistant turn."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def rewards(options, eos_ids):
    """train.py's reward as functions that TRL adds up: `right`, and `overlong` if asked for.

    A completion without any of eos_ids is truncated.
    """

    def right(completions, completion_ids, answer, **_):
        texts = texts_of(completions)
        truncated = [set(eos_ids).isdisjoint(ids) for ids in completion_ids]
        return [correct(*row) for row in zip(texts, answer, truncated, strict=True)]

    def overlong(completion_ids, **_):
        longest, cache = options.max_new_tokens, options.overlong_cache
        return [overlong_penalty(len(ids), longest, cache) for ids in completion_ids]

    return [right, overlong] if options.overlong_cache else [right]


def rows(tokenizer, problems):
    """Encoded problems (prompts.encode_problems) as TRL's rows; the text is for TRL's logs."""
    return [{"prompt": tokenizer.decode(p["prompt_ids"]), "answer": p["answer"]} for p in problems]


class ConfigParser(HfArgumentParser):
    """The flags of GRPOConfig. A wrong one is a ValueError."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """(train.py's Options, a GRPOConfig). Flags that are none of ours go to GRPOConfig.

    Raises ValueError on a wrong command line.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args(argv)
    given = vars(given)
    for name in ("option", "template_option"):
        given[name] = dict(given.get(name, []))
    o = fill(given)
    config_parser = ConfigParser(GRPOConfig, allow_abbrev=False)
    config_parser.set_defaults(**config_defaults(o))
    _, unknown = config_parser.parse_known_args(rest)
    if unknown:
        parser.error(parser.refusal(unknown[0]))
    (config,) = config_parser.parse_args_into_dataclasses(rest)
    return o, config


def config_defaults(o):
    """Fields of GRPOConfig for the options `o`. TRL counts optimizer steps."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    micro_batch = micro_batch_size(o, processes)
    accumulated = o.rows // o.updates // (micro_batch * processes)
    steps_per_rollout = o.updates * o.epochs
    return dict(
        output_dir=o.out or f"runs/trl-{label(o.algo)}-{o.preset}-s{o.seed}",
        max_steps=o.steps * steps_per_rollout,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * o.updates,
        num_iterations=o.epochs,
        num_generations=o.group_size,
        temperature=o.temperature,
        max_completion_length=o.max_new_tokens,
        learning_rate=o.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=o.warmup * steps_per_rollout,
        weight_decay=0.0,
        max_grad_norm=o.max_grad_norm,
        seed=o.seed,
        bf16=o.dtype == "bf16",
        use_cpu=o.device == "cpu",
        ddp_find_unused_parameters=False,
        logging_steps=steps_per_rollout,
        save_strategy="no",
        report_to="none",
    )


def micro_batch_size(o, processes):
    """Rows per forward pass of a process: --micro-batch, or the largest divisor up to 8 for auto.

    Raises ValueError if a mini-batch does not split into such micro-batches.
    """
    mini_batch = o.rows // o.updates
    if o.micro_batch == "auto":  # TRL does not measure what fits
        each = mini_batch // processes
        size = max(size for size in range(1, 9) if each % size == 0)
    else:
        size = int(o.micro_batch)
    if mini_batch % (size * processes):
        raise ValueError(
            f"a mini-batch of {mini_batch} completions (--prompts x --group-size / --updates) "
            f"does not split into micro-batches of {size} on {processes} processes: "
            f"change --micro-batch or --updates"
        )
    return size


def main(argv=None):
    o, config = parse(argv)
    held_out = load_problems(o.data, "test")
    problems, overlap = split_overlap(load_problems(o.data, "train"), held_out)
    if overlap:
        print(f"dropped {overlap} training problems that are held out too")
    chat = Chat(o.chat_template, o.system, o.template_option)
    # fp32 weights and dropout off; accelerate moves them. TRL stops at the EOS ids of the model's
    # generation config, which load_policy has set; vLLM gets them by keyword.
    model, tokenizer, eos_ids, _ = load_policy(find_model(o.model), chat=chat)
    if config.use_vllm:
        config.generation_kwargs = {"stop_token_ids": eos_ids, **(config.generation_kwargs or {})}
    longest = context_length(model) - o.max_new_tokens
    vocabulary = len(model.get_input_embeddings().weight)
    how = o.prompt, longest, vocabulary, chat, eos_ids, o.max_new_tokens
    problems, dropped = encode_problems(tokenizer, problems, *how)
    if dropped:
        print(f"dropped {dropped} problems with a prompt of over {longest} tokens")
    dataset = rows(tokenizer, problems)
    prompt_ids = {}
    for row, problem in zip(dataset, problems, strict=True):
        prompt_ids[row["prompt"]] = problem["prompt_ids"]
    trainer = Trainer(
        o.algo,
        options=o.option,
        args=config,
        prompt_ids=prompt_ids,
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
        print("trl_trainer.py: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
