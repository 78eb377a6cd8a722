"""HA-DW: History-Aware adaptive Difficulty Weighting. arXiv 2601.08521.

GRPO, but its advantages are weighted by how hard the prompt is compared with recent steps: right
answers to hard prompts and wrong answers to easy ones count more, the others less.

    anchor = mean of the last `window` of [mean rewards of earlier steps, mean r]            scalar
    d_i = mean_group r - anchor,  below 0 for a hard prompt                                  [B]
    A_i = GRPO's A_i * scale * exp(-sign(A_i) sign(d_i) |d_i|)                               [B]
    loss: GRPO's                                                                             scalar

Source: the authors' code (yangfengkai/HA-DW, gspo_hadw.sh). Our choice: GRPO's loss; the code runs
the advantages under several. According to a reader's notes, the paper has scale 1.3, and its anchor
is a running average whose rate follows the std of recent anchors.

Worked example: two prompts, four completions each. The anchor is 0.5, so d = -0.25 and 0.25. The
right answer to the hard prompt counts 1.5 e^0.25 = 1.9260, its wrong ones 1.5 e^-0.25 = 1.1682.

    >>> import torch
    >>> A = advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), group_size=4)
    >>> A.view(2, 4)  # GRPO's are 1.4997 and -0.4999, and the other way round
    tensor([[ 2.8885, -0.5840, -0.5840, -0.5840],
            [ 0.5840,  0.5840,  0.5840, -2.8885]])
    >>> round(1.9260 * 1.4997, 4), round(1.1682 * 0.4999, 4)
    (2.8884, 0.584)
    >>> A = advantages(torch.tensor([1.0, 0, 0, 0]), 4, history=[0.0, 0.5])  # anchor 0.25: d = 0
    >>> A[0] / 1.5
    tensor(1.4997)
"""

import grpo
from grpo import exp_ratio, split_groups


def advantages(
    rewards,
    group_size,
    *,
    history=None,  # list: the mean rewards of earlier steps, oldest first; None: there are none
    scale=1.5,
    window=10,
):
    """GRPO's advantages, weighted by difficulty: [B] -> [B], or a ValueError."""
    if window < 1:
        raise ValueError(f"window must be at least 1, the step itself; got {window}")
    A = grpo.advantages(rewards, group_size)  # [B]
    r = split_groups(rewards, group_size)  # [B/G, G]
    # anchor = mean of the last `window` of [history, mean r]
    past = [] if history is None else list(history)
    recent = [*past, r.mean()][-window:]
    anchor = sum(recent) / len(recent)
    # d = mean_group r - anchor, the same for all rows of a group
    d = (r.mean(1, keepdim=True) - anchor).expand_as(r).flatten()  # [B]
    # A_i = GRPO's A_i * scale * exp(-sign(A) sign(d) |d|)
    return A * scale * exp_ratio(-A.sign() * d)


loss = grpo.loss
