"""Hands the sampling policy's entropies to the estimators of GTPO and GRPO-S: only they need this module.

    VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy

verl 0.9 computes these entropies together with the old log-probabilities and keeps them in its transfer queue, but
gives an advantage estimator no more than rewards, mask and prompt ids. There is no hook for it, so one method is
wrapped.
"""

import transfer_queue
import verl_losses
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

compute_advantage = PPOTrainer._compute_advantage


def compute_advantage_with_entropy(self, batch, metrics):
    data = transfer_queue.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy"]
    )
    verl_losses.sampling_entropy = data.to_padded_tensor()[
        "entropy"
    ]  # rows and width as response_mask's
    return compute_advantage(self, batch, metrics)


PPOTrainer._compute_advantage = compute_advantage_with_entropy
