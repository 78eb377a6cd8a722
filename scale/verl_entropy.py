"""Gives estimators the sampling policy's entropies (GTPO, GRPO-S) and the token ids (KTAE).

    VERL_USE_EXTERNAL_MODULES=verl_losses,verl_entropy

Only these three need this module. verl 0.9 computes the entropies together with the old
log-probabilities and keeps them in its transfer queue, beside the completions, but an advantage
estimator gets only rewards, mask and prompt ids. There is no hook for more, so this module wraps
one method.
"""

import transfer_queue
import verl_losses
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

compute_advantage = PPOTrainer._compute_advantage


def compute_advantage_with_entropy(self, batch, metrics):
    data = transfer_queue.kv_batch_get(
        keys=batch.keys,
        partition_id=batch.partition_id,
        select_fields=["entropy", "responses"],
    )
    padded = data.to_padded_tensor()  # rows and width of response_mask
    verl_losses.sampling_entropy = padded["entropy"]
    verl_losses.sampled_ids = padded["responses"]
    return compute_advantage(self, batch, metrics)


PPOTrainer._compute_advantage = compute_advantage_with_entropy
