"""Our problems as verl's parquet files, and our reward as its compute_score.

python scale/verl_data.py --data gsm8k --out ~/data/gsm8k
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from rewards import correct  # noqa: E402


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """1.0 or 0.0: train.py's reward, in verl's signature (reward.custom_reward_function).

    verl hands over the text alone, so a truncated completion is graded as if it had ended there.
    """
    return correct(solution_str, ground_truth)


def rows(name, split, problems, prompt, system=None):
    """Problems as verl's rows; verl applies the chat template."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        {
            "data_source": name,
            "prompt": [
                *first,
                {"role": "user", "content": prompt.replace("{question}", p["question"])},
            ],
            "reward_model": {"style": "rule", "ground_truth": p["answer"]},
            "extra_info": {"split": split, "index": i},
        }
        for i, p in enumerate(problems)
    ]


def main(argv=None):
    from datasets import Dataset  # here: a reward worker needs none of these

    from trainer.data import load_problems, split_overlap
    from trainer.options import DEFAULTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="gsm8k", help="as in train.py")
    parser.add_argument("--prompt", default=DEFAULTS["gsm8k"]["prompt"], help="as in train.py")
    parser.add_argument("--system", help="as in train.py")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder for train.parquet and test.parquet"
    )
    args = parser.parse_args(argv)
    test = load_problems(args.data, "test")
    train, overlap = split_overlap(load_problems(args.data, "train"), test)
    if overlap:
        print(f"dropped {overlap} problems of training that are held out too")
    for split, problems in (("train", train), ("test", test)):
        dataset = Dataset.from_list(rows(args.data, split, problems, args.prompt, args.system))
        dataset.to_parquet(args.out / f"{split}.parquet")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print("verl_data.py: error:", " ".join(str(error).split()), file=sys.stderr) or 2)
