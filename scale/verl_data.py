"""Our problems as verl's parquet files, and our reward as its compute_score.

python scale/verl_data.py --data gsm8k --out ~/data/gsm8k
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from rewards import correct  # noqa: E402


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """1.0 or 0.0: train.py's reward in verl's signature (reward.custom_reward_function).

    verl passes the text alone, so a truncated completion is graded as if it had ended there.
    """
    return correct(solution_str, ground_truth)


def rows(name, split, problems, prompt, system=None):
    """Problems as verl's rows; verl applies the chat template."""
    found = []
    for index, problem in enumerate(problems):
        turns = [] if system is None else [{"role": "system", "content": system}]
        question = prompt.replace("{question}", problem["question"])
        turns.append({"role": "user", "content": question})
        row = {
            "data_source": name,
            "prompt": turns,
            "reward_model": {"style": "rule", "ground_truth": problem["answer"]},
            "extra_info": {"split": split, "index": index},
        }
        found.append(row)
    return found


def parse_args(argv):
    """Raises ValueError on a wrong command line."""
    from run.commandline import RaisingParser
    from run.options import DEFAULTS

    parser = RaisingParser("verl_data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="gsm8k", help="as in train.py (default gsm8k)")
    prompt = DEFAULTS["gsm8k"]["prompt"]
    text = "as in train.py (default: that of its preset gsm8k)"
    parser.add_argument("--prompt", default=prompt, help=text)
    parser.add_argument("--system", help="as in train.py")
    text = "folder for train.parquet and test.parquet; made if it is missing"
    parser.add_argument("--out", type=Path, required=True, help=text)
    args = parser.parse_args(argv)
    if "{question}" not in args.prompt:
        raise ValueError("--prompt must hold {question}, where the problem goes")
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    from datasets import Dataset  # here: verl's reward workers need only compute_score

    from trainer.data import load_problems, split_overlap

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
        print("verl_data.py: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
