"""Gives the entropies of the sampling policy to the estimators of GTPO and GRPO-S.

    VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy

Only these two need this module. verl 0.9 computes the entropies together with the old
log-probabilities and keeps them in its transfer queue, but an advantage estimator gets only
rewards, mask and prompt ids. There is no hook for more, so this module wraps one method.
"""

import transfer_queue
import verl_losses
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

compute_advantage = PPOTrainer._compute_advantage


def compute_advantage_with_entropy(self, batch, metrics):
    data = transfer_queue.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy"]
    )
    padded = data.to_padded_tensor()
    verl_losses.sampling_entropy = padded["entropy"]  # rows and width of response_mask
    return compute_advantage(self, batch, metrics)


PPOTrainer._compute_advantage = compute_advantage_with_entropy
