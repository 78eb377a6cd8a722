# %% [markdown]
# # One step by hand
#
# One prompt, eight completions, their rewards, the advantages of the seven methods, the push of
# each method on each token, one update, and what became more likely. Each printed number follows
# from the numbers above it, and a pocket calculator is enough to check it. At the end there is a
# picture of all pushes, walkthrough.png.
#
# The formulas are the project's own: `grpo.advantages`, `tepo.loss` and the others. Wherever a
# number is worked out by hand as well, an `assert` compares the two.
#
# Editors that know `# %%` cells open this file as a notebook. As a script it runs in under a minute
# on a CPU, without a network:
#
#     python examples/walkthrough.py

# %%
import math
import sys
from pathlib import Path
from statistics import fmean, stdev

here = Path(globals().get("__file__", "notebook")).resolve()  # a notebook has no __file__
ROOT = next(folder for folder in here.parents if (folder / "grpo.py").exists())
sys.path.insert(0, str(ROOT))

import torch

import dapo
import grpo
import grpo_s
import gspo
import gtpo
import tepo
import trgrpo
from rewards import correct
from tools.credit import draw_panels
from trainer.decoding import decode, token_texts
from trainer.policy import load_policy
from trainer.prompts import Prompts
from trainer.sampling import sample

METHODS = {"GRPO": grpo, "DAPO": dapo, "GSPO": gspo, "TEPO": tepo}
METHODS.update({"GTPO": gtpo, "GRPO-S": grpo_s, "TR-GRPO": trgrpo})


def section(title, *sentences):
    """Print the title, and what the numbers below it are."""
    print(f"\n{title}\n{'-' * len(title)}")
    print(*sentences, sep="\n")


# %% [markdown]
# ## The prompt
#
# The embedded model has 0.7 million weights. It has learned to write like a student who can work a
# problem out line by line, and mostly guesses. That is the policy $\pi_\theta$.

# %%
QUESTION = "Sam has 36 cards. He wins 8 and loses 5. How many cards now?"
ANSWER = "39"  # 36 + 8 - 5

torch.set_num_threads(1)  # for so small a model a second thread would only wait
model, tokenizer, eos_ids, pad_id = load_policy("tiny")
prompt = Prompts(tokenizer).encode([QUESTION])[0]  # token ids

section("The prompt", "The policy reads one problem of its data set:")
print(f"  {QUESTION}")
print(f"It has {len(prompt)} tokens, and the answer is {ANSWER}.")

# %% [markdown]
# ## Eight completions
#
# The group: G = 8 completions of one prompt, sampled at temperature 1. A token is drawn from
# softmax(logits) until the end-of-sequence token comes. That token belongs to the completion,
# because the policy must learn to stop.
#
# The reward is 1 if the number after `####` is the answer, else 0. Nothing else is rewarded:
# neither the lines of work nor the format. A group that is all right or all wrong has nothing to
# compare, and teaches nothing. This one is mixed.

# %%
G = 8
SEED = 208  # the right completions are of three lengths

torch.manual_seed(SEED)
ends = {"eos_ids": eos_ids, "pad_id": pad_id}
rollout = sample(model, [prompt], G, temperature=1.0, max_new_tokens=64, **ends)
completions = rollout.completions  # [G, T] token ids, padded on the right
mask = rollout.mask  # [G, T] True up to and including the end
lengths = mask.sum(1).tolist()  # |o_i|, in tokens
texts = decode(tokenizer, rollout)

truncated = rollout.truncated.tolist()
rewards = [correct(texts[i], ANSWER, truncated[i]) for i in range(G)]
right = [i for i in range(G) if rewards[i] == 1]
wrong = [i for i in range(G) if rewards[i] == 0]
assert right and wrong, "this seed gives no mixed group here: try another SEED"

section("Eight completions", "The policy answers eight times; the reward is 1 for the answer:")
print("completion  reward  tokens")
for i in range(G):
    print(f"{i:10}  {rewards[i]:6g}  {lengths[i]:6}  {texts[i]!r}")

# %% [markdown]
# ## What the policy thinks of them
#
# One forward pass gives the logits after each token. Those after token t - 1 predict token t, so
# the logits are taken one place to the left of the completion. The log-probability of a completion
# is the sum over its tokens. The entropy H says how undecided the policy was before it drew a
# token: 0 means certain, log(V) that all V tokens are equally likely. Both are in nats.


# %%
def measure():
    """(log-probability, entropy) of each token of the completions under the model, both [G, T]."""
    prompts = torch.tensor([prompt] * G)  # [G, P]
    rows = torch.cat([prompts, completions], 1)  # [G, P + T]
    logits = model(rows).logits[:, len(prompt) - 1 : -1]  # [G, T, V]
    logp = logits.log_softmax(2)
    entropy = -(logp.exp() * logp).sum(2)
    return logp.gather(2, completions[..., None])[..., 0], entropy


with torch.no_grad():
    old_logprobs, entropy = measure()  # of the policy that sampled: pi_old

# The sampler noted the log-probability of each token when it drew it: they are the same.
assert torch.allclose(old_logprobs[mask], rollout.sampler_logprobs[mask], atol=1e-4)

# Two to look at: a right completion of medium length, and the longest wrong one.
several = sorted({lengths[i] for i in right})
one_right = next(i for i in right if lengths[i] == several[len(several) // 2])
one_wrong = max(wrong, key=lengths.__getitem__)

first = old_logprobs[one_right, 0].item()
total = old_logprobs[one_right][mask[one_right]].sum().item()

section("What the policy thinks of them", f"Completion {one_right} is right. For the policy,")
print(f"its first token has the probability exp({first:.4f}) = {math.exp(first):.4f},")
print(f"and all of its tokens together exp({total:.4f}) = {math.exp(total):.3g}.")

# %% [markdown]
# ## The advantages
#
# The advantage says how much better a completion is than its group. GRPO standardises the rewards
# within the group. The standard deviation is that of a sample (divided by G - 1), and 0.0001 keeps
# the division safe. DAPO, GSPO, TEPO and TR-GRPO take the same advantages.


# %%
def standardised(value, values):
    """(value - mean) / (std + 1e-4), printed as a sum to follow."""
    mean, std = fmean(values), stdev(values)
    result = (value - mean) / (std + 1e-4)
    print(f"  A = ({value:.6f} - {mean:.6f}) / ({std:.6f} + 0.0001) = {result:.4f}")
    return result


advantages = dict.fromkeys(METHODS, grpo.advantages(torch.tensor(rewards), G))
for name in ("GTPO", "GRPO-S"):
    rule = METHODS[name].advantages
    advantages[name] = rule(torch.tensor(rewards), G, entropy=entropy, mask=mask)

section("GRPO's advantages", f"The mean of the rewards is {len(right)} / {G}. A right completion:")
by_hand = standardised(1.0, rewards)
assert math.isclose(by_hand, advantages["GRPO"][one_right], rel_tol=1e-3)
print("A wrong completion:")
standardised(0.0, rewards)

# %% [markdown]
# GRPO-S first shapes the rewards by the mean entropy of each completion. A right completion gets
# 1 + 0.1 H / (mean H of the right ones): undecided right ones gain most. A wrong one gets
# -1 - 0.1 (1/H) / (mean 1/H of the wrong ones): certain wrong ones lose most. Then it standardises
# twice, once with a 0 for each wrong completion and once with a 0 for each right one.

# %%
mean_entropy = [entropy[i][mask[i]].mean().item() for i in range(G)]
of_right = fmean(mean_entropy[i] for i in right)
of_wrong = fmean(1 / mean_entropy[i] for i in wrong)
plus, minus = [0.0] * G, [0.0] * G
for i in right:
    plus[i] = 1 + 0.1 * mean_entropy[i] / of_right
for i in wrong:
    minus[i] = -1 - 0.1 / mean_entropy[i] / of_wrong

H, r = mean_entropy[one_right], plus[one_right]

section("GRPO-S's advantages", "A right completion of high entropy earns more than 1.")
print(f"Completion {one_right} has H = {H:.6f}, and the right ones a mean H of {of_right:.6f}:")
print(f"  1 + 0.1 x {H:.6f} / {of_right:.6f} = {r:.6f}")
print("among the other shaped rewards, 0 for a wrong completion:")
by_hand = standardised(r, plus)
assert math.isclose(by_hand, advantages["GRPO-S"][one_right], rel_tol=1e-3)
by_hand = (minus[one_wrong] - fmean(minus)) / (stdev(minus) + 1e-4)
assert math.isclose(by_hand, advantages["GRPO-S"][one_wrong], rel_tol=1e-3)

# %% [markdown]
# GTPO does the same for each token instead of each completion. A token is compared with the tokens
# at its own position t, in the right completions that are still running there. The mean and the std
# go over all tokens of the group, again with a 0 for each token of a wrong completion. (The wrong
# ones get the same treatment as in GRPO-S: 1/H in the place of H, and -1 in the place of 1.)

# %%
shaped = {}  # (completion, position): a number
for i in right:
    for t in range(lengths[i]):
        peers = [entropy[k, t].item() for k in right if t < lengths[k]]
        shaped[i, t] = 1 + 0.1 * entropy[i, t].item() / fmean(peers)

N = sum(lengths)  # tokens of the group
zeros = [0.0] * (N - len(shaped))

last = lengths[one_right] - 1
peers = [entropy[k, last].item() for k in right if last < lengths[k]]
H, r = entropy[one_right, last].item(), shaped[one_right, last]

section("GTPO's advantages", f"The last token of completion {one_right} is token {last + 1}.")
print(f"Where right completions have a token {last + 1}, its mean H is {fmean(peers):.8f}:")
print(f"  1 + 0.1 x {H:.8f} / {fmean(peers):.8f} = {r:.6f}")
print(f"and among {len(shaped)} tokens of right completions and {len(zeros)} zeros of wrong ones:")
by_hand = standardised(r, [*shaped.values(), *zeros])
assert math.isclose(by_hand, advantages["GTPO"][one_right, last], rel_tol=1e-3)

section("The seven advantages", "How much better than its group is a completion, or a token of it?")
print("                   GRPO, DAPO, GSPO,                 GTPO,         GTPO,")
print("completion  reward    TEPO, TR-GRPO       GRPO-S   first token    last token")
for i in range(G):
    same = advantages["GRPO"][i].item()
    shaped_row = advantages["GRPO-S"][i].item()
    tokens = advantages["GTPO"][i, : lengths[i]].tolist()
    print(f"{i:10}  {rewards[i]:6g}  {same:15.4f}  {shaped_row:11.4f}", end="")
    print(f"  {tokens[0]:12.4f}  {tokens[-1]:12.4f}")

# %% [markdown]
# ## The pushes
#
# A loss takes the log-probabilities of all tokens and gives one number. The gradient of that number
# with respect to one token's log-probability, with the sign turned, is the push on this token:
#
#     push = - dL / d log p
#
# Where it is positive, the update makes the token more likely. The model's weights are not in it
# yet. Before the first update the ratio pi_theta / pi_old is 1, no clip acts, and the pushes are
# simple. With B completions, N tokens in all and |o| in this completion:
#
# | method | push on a token | because |
# |---|---|---|
# | GRPO | A / (B \|o\|) | each completion weighs 1/B, its tokens share that |
# | DAPO | A / N | each token weighs the same |
# | GSPO | A / (B \|o\|) | the ratio is a geometric mean: each token has 1/\|o\| of it |
# | TEPO | A / N | GSPO's ratio, but each completion counts \|o\| times |
# | GTPO | A_t / N | DAPO, with an advantage per token |
# | GRPO-S | A / (B \|o\|) | the ratio is an arithmetic mean, with the same 1/\|o\| |
# | TR-GRPO | v A / (B \|o\|) | GRPO, times v = clip(2 sigmoid(9 (p - 0.25)), 1, 1.4) |
#
# The losses themselves say little: GRPO's is minus the mean of the advantages, which is 0, but its
# gradient is not.
#
# What to look for in the table and in the picture at the end:
#
# - GRPO and GSPO push every completion of equal reward by the same sum, however long it is. DAPO
#   and TEPO push every token equally, so a long completion is pushed more in total.
# - GTPO pushes a token of a right completion harder where the policy was less certain than in the
#   other right ones at this position. In a wrong completion it is the other way round.
# - TR-GRPO gives tokens with p below 0.25 the weight 1, and likely ones up to 1.4.

# %%
pushes = {}
for name, method in METHODS.items():
    logprobs = old_logprobs.clone().requires_grad_()
    loss = method.loss(logprobs, old_logprobs, advantages[name], mask)
    pushes[name] = -torch.autograd.grad(loss, logprobs)[0]  # [G, T]

section("The pushes", "Summed over the tokens of a completion, times 1000:")
print("completion  tokens", *(f"{name:>8}" for name in METHODS))
for i in range(G):
    sums = [1000 * pushes[name][i].sum().item() for name in METHODS]
    print(f"{i:10}  {lengths[i]:6}", *(f"{value:8.2f}" for value in sums))

n = lengths[one_right]
section("The pushes by hand", f"On the first token of completion {one_right}, of {n}:")
A = advantages["GRPO"][one_right].item()
A_s = advantages["GRPO-S"][one_right].item()
A_t = advantages["GTPO"][one_right, 0].item()
p = math.exp(old_logprobs[one_right, 0].item())
v = min(max(2 / (1 + math.exp(-9 * (p - 0.25))), 1), 1.4)
by_hand = {
    "GRPO": (A / (G * n), f"{A:.6f} / ({G} x {n})"),
    "DAPO": (A / N, f"{A:.6f} / {N}"),
    "GSPO": (A / (G * n), f"{A:.6f} / ({G} x {n})"),
    "TEPO": (A / N, f"{A:.6f} / {N}"),
    "GTPO": (A_t / N, f"{A_t:.6f} / {N}"),
    "GRPO-S": (A_s / (G * n), f"{A_s:.6f} / ({G} x {n})"),
    "TR-GRPO": (v * A / (G * n), f"{v:.6f} x {A:.6f} / ({G} x {n})"),
}
for name, (push, how) in by_hand.items():
    assert math.isclose(push, pushes[name][one_right, 0], rel_tol=1e-3)
    print(f"{name:8} {push:.6f} = {how}")

# %% [markdown]
# ## One update
#
# Forward, loss, backward, step: TEPO's loss and plain gradient descent, theta <- theta - lr g.
# (`train.py` takes AdamW, and gets the gradient in two halves: the pushes above, then the model
# micro-batch by micro-batch. The sum is the same.)

# %%
LR = 0.02

logprobs, _ = measure()
loss = tepo.loss(logprobs, old_logprobs, advantages["TEPO"], mask)
loss.backward()
squared = 0.0  # |g|^2
with torch.no_grad():
    for weight in model.parameters():
        squared += weight.grad.square().sum().item()
        weight -= LR * weight.grad
    new_logprobs, _ = measure()
    new_loss = tepo.loss(new_logprobs, old_logprobs, advantages["TEPO"], mask)

section("One update", f"TEPO's loss, one step of size {LR} down its gradient g.")
print(f"To first order the loss changes by - {LR} |g|^2, with |g|^2 = {squared:.4f}:")
print(f"  - {LR} x {squared:.4f} = {-LR * squared:.5f}")
old, new = round(loss.item(), 5), round(new_loss.item(), 5)
print(f"It changes by {new:.5f} - {old:.5f} = {new - old:.5f}.")

# %% [markdown]
# ## What became more likely
#
# The change of a completion's log-probability, and the factor exp(change) on its probability. The
# completions share weights and many tokens, so a push on one moves the others too.

# %%
# Rounded as they are printed, so that the printed differences are right to the last digit.
before = [round(x, 5) for x in (old_logprobs * mask).sum(1).tolist()]
after = [round(x, 5) for x in (new_logprobs * mask).sum(1).tolist()]
change = [after[i] - before[i] for i in range(G)]

section("What became more likely", "Right completions have become likelier, wrong ones less so:")
print("completion  reward   log p before      after     change   factor")
for i in range(G):
    print(f"{i:10}  {rewards[i]:6g}  {before[i]:13.5f}  {after[i]:9.5f}  {change[i]:9.5f}", end="")
    print(f"  {math.exp(change[i]):7.3f}")

# The picture: a panel for each method, its pushes on a right and on a wrong completion
rows, panels = [], []
for i in (one_right, one_wrong):
    tokens = token_texts(tokenizer, completions[i, : lengths[i]].tolist(), not truncated[i])
    rows.append({"tokens": tokens, "completion": texts[i], "right": i in right})
both = [one_right, one_wrong]
panels.append(("Entropy of the policy that sampled, in nats", entropy[both], mask[both] & False))
for name in METHODS:
    values = pushes[name][both]
    panels.append((name, values, mask[both] & (values == 0)))
caption = f"Pushes before the first update, a right and a wrong completion of: {QUESTION}"
draw_panels(rows, panels, caption, "walkthrough.png")
section("The picture", "The pushes on two completions, method by method: walkthrough.png")

# %% [markdown]
# ## And then
#
# `Trainer.step` in train.py is this step for 16 prompts at once, with four updates per rollout.
# After the first of them the ratio is no longer 1, and there the methods begin to differ in what
# they clip. `python train.py --algo tepo --preset tiny` takes a hundred such steps.
