"""Improbable tokens in the completions of a real model: |dlogp/dh| by probability.

    python claims/rare_tokens_of.py MODEL --data GSM8K_FOLDER      # some minutes for 0.5 B weights

MODEL: a folder or Hub name. It answers four training problems (preset gsm8k, at most 128 tokens,
six completions each at temperature 1). h is the last hidden state, and the norm
|(onehot - p) W| needs no backward pass; rare_tokens.py shows on the embedded model that it ranks
tokens like the norm over all weights. The tokens are sorted by probability into ten equal parts.
Writes rare_tokens_of.csv.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

import torch

from claims import kit
from claims.rare_tokens import PARTS, by_probability, hidden_norms
from run.commandline import Parser, output_file
from trainer.logprobs import token_logprobs

FLAGS = ["--preset", "gsm8k", "--max-new-tokens", "128", "--dtype", "fp32"]
PROMPTS, GROUP = 4, 6


@torch.no_grad()
def probabilities(model, rollout, row):
    """The probability of each token of a row. [N]"""
    mask = rollout.mask[row : row + 1]
    prompts, ids = [rollout.prompts[row]], rollout.completions[row : row + 1]
    return token_logprobs(model, prompts, ids, mask)[0][mask].exp()


def measure(*flags):
    """A row per tenth of the tokens: mean probability, mean norm, share of the sum of norms."""
    size = ["--prompts", str(PROMPTS), "--group-size", str(GROUP), "--updates", "1"]
    with kit.trainer("grpo", *FLAGS, *size, *flags) as (trainer, _):
        rollout = kit.rollout(trainer, trainer.next_problems(PROMPTS))
        rows = range(len(rollout.mask))
        p = torch.cat([probabilities(trainer.model, rollout, row) for row in rows])
        norm = torch.cat([hidden_norms(trainer.model, rollout, row) for row in rows])
    part = by_probability(p)
    table = []
    for d in range(PARTS):
        chosen = part == d
        means = {"p": p[chosen].mean().item(), "norm": norm[chosen].mean().item()}
        share = (norm[chosen].sum() / norm.sum()).item()
        table.append({"part": d, "tokens": int(chosen.sum()), **means, "share": share})
    return table


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", default="gsm8k", help="as train.py's (default gsm8k, of the Hub)")
    table = Path(__file__).with_suffix(".csv")
    text = f"the .csv (default {table.name})"
    parser.add_argument("--out", type=output_file, default=table, help=text)
    args = parser.parse_args(argv)

    def work():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = measure("--model", args.model, "--data", args.data)
        kit.write_rows(args.out, rows)
        for row in rows:
            print("part {part}: p {p:.4f}, norm {norm:.4f}, share {share:.3f}".format(**row))

    return kit.status_of(work)


if __name__ == "__main__":
    sys.exit(main())
