"""Training steps of TRL's own GRPOTrainer, for `tools/bench.py --peer` to compare with train.py.

Our advantages and losses on this trainer are in trl_trainer.py; nothing of them is used here.
"""

import tempfile

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Seconds of each optimizer step, by `clock()`; TRL's rollout is part of the step."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, []

    def on_step_begin(self, *_, **__):
        self.started = self.clock()

    def on_step_end(self, *_, **__):
        self.seconds.append(self.clock() - self.started)


def grpo_config(o, steps, folder):
    """The GRPOConfig of the same work: o is train.py's Options, with one update per rollout."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=int(o.micro_batch),
        gradient_accumulation_steps=o.rows // int(o.micro_batch),
        num_generations=o.group_size,
        shuffle_dataset=False,
        max_completion_length=o.max_new_tokens,
        learning_rate=o.lr,
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        bf16=o.dtype == "bf16",
        use_cpu=o.device == "cpu",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def train_steps(o, model, tokenizer, prompts, steps, reward, clock):
    """Train for `steps` steps on the prompts in their order.

    o: train.py's Options. prompts: texts. reward: a function of a completion's text. clock: returns
    seconds. Returns (seconds of each step, completion tokens of each step, the prompt of each
    completion as TRL passed it to the reward).
    """
    tokens, seen = [], []

    def reward_of_rows(prompts, completions, completion_ids, **_):
        seen.extend(prompts)
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [reward(text) for text in completions]

    timer = Clock(clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward_of_rows,
            args=grpo_config(o, steps, folder),
            processing_class=tokenizer,
            callbacks=[timer],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )
        trainer.train()
    return timer.seconds, tokens[: len(timer.seconds)], seen
