"""Every option of train.py: its default in each preset, its meaning, and its allowed values.

parser.py reads a command line into them; checks.py fills them in and checks them.
"""

import os
from dataclasses import dataclass, field, fields

from trainer.methods import ALGORITHMS, MORE

TRACKERS = ("tensorboard", "trackio", "wandb")
MOST = 10**9  # a larger number is a typing error
MOST_ROWS = 65_536  # completions of one step: all of them are held in memory
COUNT = int | str  # a text: a whole number, or "auto"


def setting(default, text, *, experiment=True, **limits):
    """A field of Options that defines the experiment: runs that differ in it are not averaged.

    text: for --help. limits: `least` and `most` of a number (0 and MOST if not given), or the
    `choices` of a text.
    """
    about = {"text": text, "least": 0, "most": MOST, "choices": None, "experiment": experiment}
    about.update(limits)
    if default == {}:
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


def detail(default, text, **limits):
    """A field of Options in which two runs of one experiment may differ."""
    return setting(default, text, experiment=False, **limits)


@dataclass
class Options:
    """The options of a run, with the defaults of the preset tiny. --eval-n is eval_n here."""

    preset: str = detail(
        "auto",
        "set of defaults: tiny, gsm8k, or auto (gsm8k on a CUDA GPU, or with --eval-only on GSM8K)",
        choices=("auto", "tiny", "gsm8k"),
    )

    # What is trained
    algo: str = detail(
        "tepo",
        f"the method: {', '.join(ALGORITHMS)}; in more/: {', '.join(MORE)}; or your own FILE.py, "
        "with loss(logprobs, old_logprobs, advantages, mask, *, ...) and, unless GRPO's are meant, "
        "advantages(rewards, group_size, *, ...)",
    )
    model: str = setting("tiny", "tiny (embedded), the folder of a model or a run, or a Hub name")
    data: str = setting(
        "tiny",
        "tiny (generated), gsm8k, a Hub name[:config], a folder with train.* and test.*, or one "
        "file (.jsonl, .json, .csv, .tsv or .parquet), of which a tenth (at most 500 problems, "
        "drawn by a fixed seed) is held out",
    )
    columns: str | None = setting(
        None,
        "QUESTION,ANSWER: the two columns of --data; default: question,answer or a known pair, "
        "such as problem,solution; a.b is the field b of column a",
    )
    skip_bad_rows: bool = setting(False, "drop rows of --data whose answer is not one number")
    lora: int = setting(
        0,
        "LoRA: train two thin matrices of this rank beside each frozen weight, such as 16; 0: "
        "train all weights",
        most=65_536,
    )
    lora_alpha: float = setting(0.0, "LoRA adds alpha / rank B A to a weight; 0: twice the rank")
    lora_targets: str | None = setting(
        None,
        "NAME,...: the linear layers with LoRA, by the last part of their names, such as "
        "q_proj,v_proj; default: all but the head",
    )
    steps: int = detail(100, "training steps; each is one rollout and its updates", least=1)
    seed: int = detail(0, "seed of the data order and of sampling", most=2**32 - 1)

    # Prompt
    prompt: str = setting(
        "{question}", "text around {question} (preset gsm8k asks for steps and a marked answer)"
    )
    chat_template: str = setting(
        "auto", "auto: the tokenizer's, if it has one; none: plain text", choices=("auto", "none")
    )
    system: str | None = setting(None, "system turn of the chat template, before the question")
    template_option: dict = setting(
        {}, "variable of the chat template, such as enable_thinking=false; repeatable"
    )

    # Rollout
    prompts: int = setting(16, "prompts per step", least=1, most=MOST_ROWS)
    group_size: int = setting(
        8, "completions per prompt, which are compared with each other", least=2, most=MOST_ROWS
    )
    temperature: float = setting(1.0, "divides the logits, in sampling and training", least=1e-6)
    max_new_tokens: int = setting(64, "most tokens per completion", least=1, most=2**20)
    dynamic_sampling: int = setting(
        0, "DAPO: rounds of replacing groups that are all right or all wrong; 0: never", most=1000
    )
    overlong_cache: int = setting(
        0,
        "DAPO: over this many last tokens before --max-new-tokens the reward falls by up to 1; "
        "0: no penalty",
    )
    group_overlong: float = setting(
        0.0,
        "GTPO: a right completion that is long for its group loses up to 0.5; from this share of "
        "right ones on, only they are compared (0.75 in a replication); 0: no penalty",
        most=0.99,
    )
    reward: str | None = setting(
        None,
        "FILE.py with reward(completion, problem), which returns a number, or a dict of numbers "
        "that are added up; default: 1 for a right answer, 0 for another",
    )
    sampler_correction: float = setting(
        0.0,
        "multiply a row's advantage by pi_old / sampler of its completion, at most this; 0: never",
    )

    # Update
    updates: int = setting(
        4, "mini-batches per rollout, one optimizer step each; with 1 no clip acts", least=1
    )
    epochs: int = setting(1, "passes over each rollout", least=1, most=1000)
    lr: float = setting(
        1e-4,
        "AdamW's learning rate after the warm-up (no weight decay); with --lora ten times the "
        "default (our choice)",
        least=1e-12,
        most=1,
    )
    warmup: int = setting(5, "steps over which the learning rate rises linearly; 0: none")
    max_grad_norm: float = setting(
        1.0, "a gradient of larger norm is scaled down to this norm", least=1e-9
    )
    option: dict = setting(
        {}, "option of the algorithm's advantages or loss, such as eps_high=0.3; repeatable"
    )

    # Machine
    device: str = detail("auto", "cpu, cuda, cuda:N, or auto (cuda if there is a GPU)")
    dtype: str = setting(
        "auto",
        "dtype of the compute: fp32, bf16, or auto (bf16 if a GPU has it); trained weights are "
        "always fp32, those that --lora freezes are held in it",
        choices=("auto", "fp32", "bf16"),
    )
    threads: COUNT = detail(
        "auto",
        "CPU threads; auto: OMP_NUM_THREADS, else 1 below 10 M weights, else torch's choice",
        least=1,
        most=os.cpu_count() or 1,
    )
    micro_batch: COUNT = detail(
        "auto", "rows per pass of an update; auto: what fits", least=1, most=MOST_ROWS
    )
    sample_batch: COUNT = detail(
        "auto", "rows per generate call; auto: all of a step, if they fit", least=1, most=MOST_ROWS
    )
    cache: str = detail(
        "dynamic",
        "of keys and values in sampling: dynamic, or static (generate compiles it on CUDA)",
        choices=("dynamic", "static"),
    )
    gradient_checkpointing: bool = detail(False, "use less memory; updates take longer")

    # Evaluation and output
    eval_every: int = detail(25, "steps between evaluations; 0: only before and after training")
    eval_n: int = detail(500, "how many held-out problems to evaluate on, at most", least=1)
    k: int = detail(
        4, "the k of avg@k and pass@k, before and after training; 0: neither", most=10_000
    )
    eval_samples: int = detail(0, "completions per problem for avg@k and pass@k; 0: k", most=10_000)
    samples_every: int = detail(
        10, "steps between groups in samples.jsonl, besides the first and last step; 0: none"
    )
    save_every: int = detail(20, "steps between checkpoints; 0: none to resume from")
    keep_best: bool = detail(
        False, "keep the model of the best evaluation (greedy accuracy, first of equals) in best/"
    )
    out: str | None = detail(None, "the run's folder (default runs/<algo>-<preset>-s<seed>)")
    overwrite: bool = detail(
        False, "delete the run that --out holds (with --eval-only: replace its eval.json)"
    )
    track: str = detail(
        "none",
        f"show the metrics there too, beside metrics.jsonl: {', '.join(TRACKERS)} (pip install it)",
        choices=("none", *TRACKERS),
    )
    eval_only: bool = detail(False, "evaluate the model and write eval.json; no training")
    fit: bool = detail(
        False, "print the memory that a step of this model needs on a GPU, what fits, and exit"
    )
    show_prompt: bool = detail(False, "print the first prompt and what ends a completion, and exit")

    @property
    def rows(self):
        """Completions per step."""
        return self.prompts * self.group_size

    @property
    def draws(self):
        """Completions per problem from which avg@k and pass@k are estimated."""
        return self.eval_samples or self.k


GSM8K = {  # the preset gsm8k, where it differs
    "model": "Qwen/Qwen2.5-0.5B",
    "data": "gsm8k",
    "prompt": (
        "{question}\nReason step by step, then end with the answer alone on a line: #### number"
    ),
    "steps": 500,
    "prompts": 8,
    "max_new_tokens": 512,
    "lr": 1e-6,
    "warmup": 10,
    "eval_every": 50,
    "eval_n": 200,
    "save_every": 50,
}
PRESETS = {"tiny": {}, "gsm8k": GSM8K}
DEFAULTS = {preset: vars(Options(**changes)) for preset, changes in PRESETS.items()}
FIELDS = {about.name: about for about in fields(Options)}
CHANGEABLE_ON_RESUME = ("steps", "save_every", "track", "show_prompt", "fit")


def flag(name):
    return "--" + name.replace("_", "-")
