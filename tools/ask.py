"""Ask a model a question and watch it answer: `tools/ask.py runs/tepo-tiny-s0 "Sam has ..."`.

Completions are drawn as training draws them, whatever the model's generation_config says. They are
text of unknown content: their lines are indented, so that none can be mistaken for our labels, and
control characters are printed as escapes, so that they cannot change the terminal.
torch is imported where it is used: --help does not wait for it.
"""

import argparse
import re
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from rewards import correct, true_answer
from run.checks import check_config, check_values
from run.commandline import RaisingParser, run_main
from run.options import FIELDS, Options
from run.parser import add_option
from run.runs import read_config

ASKED = ("prompt", "chat_template", "system", "template_option")  # options of a run, with which
ASKED += ("max_new_tokens", "temperature", "dtype")  # its model is asked
MOST_TOKENS = 512  # of a model that is neither tiny nor a run
EXAMPLE = "Sam has 36 cards. He uses 8, wins 1 and loses 8. How many cards now?"
LEARNED = r"\w+ has \d+ \w+\. .+ How many \w+ now\?"  # the form of tiny's problems
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogates, line and paragraph ends
EPILOG = f"""examples:
  python tools/ask.py runs/tepo-tiny-s0 "{EXAMPLE}" --answer 21
  echo "What is 17 * 23?" | python tools/ask.py Qwen/Qwen2.5-0.5B --samples 0

A run's model, or its latest checkpoint while it is not done, is asked as it was trained, unless an
option says otherwise. Another model gets the question alone and writes at most
{MOST_TOKENS} tokens, or half of its context. Without a QUESTION, it asks what is piped in or typed.
"""


def parse(argv):
    """(the command line, {name: value} of train.py's options, whether the model began with tiny).

    Reads a piped question. Raises ValueError.
    """
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG}
    look["description"] = "Ask a model a question: a greedy completion and some sampled ones."
    parser = RaisingParser(prog="ask.py", argument_default=argparse.SUPPRESS, **look)
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of a run or of a model, a Hub name, or tiny")
    add("question", metavar="QUESTION", nargs="?", default=None)
    add("--answer", metavar="TEXT", default=None, help="grade by this: a number or '#### number'")
    add("--samples", metavar="N", default=4, type=int, help="sampled completions (default 4)")
    for name in (*ASKED, "seed", "device", "threads"):
        add_option(parser, name)
    for action in parser._actions[5:]:  # a default of train.py is not that of a run
        action.help = re.sub(r" \((default|preset).*", "", action.help)
    args, unknown = parser.parse_known_intermixed_args(argv)  # a question may follow an option
    if unknown:
        raise ValueError(parser.refusal(unknown[0]))
    if not 0 <= args.samples <= 1000:
        raise ValueError(f"--samples {args.samples}: 0 to 1000")
    given, is_tiny = run_options(args.model)
    given.update({name: value for name, value in vars(args).items() if name in FIELDS})
    given["template_option"] = dict(given.get("template_option", {}))
    check_values(Options(**given))
    if args.question is None and not sys.stdin.isatty():
        args.question = sys.stdin.read().strip("\r\n")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty")
    if args.answer is not None and args.question is None:
        raise ValueError("--answer needs a QUESTION in the command line")
    true_answer(args.answer or "0")  # raises ValueError if it holds no number
    return args, given, is_tiny


def run_options(model):
    """({name: value} with which the run in this folder was trained, whether it began with tiny).

    Raises ValueError for a value of a wrong type.
    """
    path, given = Path(model) / "config.json", {"preset": "tiny"}
    try:
        config = read_config(Path(model))
        options, _ = config["options"], config["status"]
        given.update({name: options[name] for name in ASKED if name in options})
    except (OSError, ValueError, KeyError, TypeError):
        if model == "tiny":
            given["max_new_tokens"] = Options.max_new_tokens
        return given, model == "tiny"
    check_config({"options": given}, path)
    return given, options.get("model") == "tiny"


def load(given):
    """A namespace: the options o, the policy, its tokenizer, ... Raises ValueError."""
    print("loading torch and transformers", flush=True)
    from run.checks import fill
    from run.start import load_model
    from trainer.bf16 import sampling_copy
    from trainer.policy import context_length
    from trainer.sources import offline_without_network

    o = fill(given)
    offline_without_network(o.model)
    m = SimpleNamespace(o=o)
    m.chat, (policy, m.tokenizer, m.eos_ids, m.pad_id) = load_model(o)
    m.context = context_length(policy)
    if "max_new_tokens" not in given:
        o.max_new_tokens = min(MOST_TOKENS, m.context // 2)
    m.policy = sampling_copy(policy, o.dtype)
    return m


def complete(m, prompt_ids, temperature):
    """Draw and print one completion; temperature 0 is greedy. Returns its Stream."""
    import torch

    from trainer.sampling import Draw, generation_config, random_numbers, sampling_settings

    most, device, stream = m.o.max_new_tokens, m.policy.device, Stream(m.tokenizer, m.eos_ids)
    U = random_numbers(1, most) if temperature > 0 else None
    ids = torch.tensor([prompt_ids], device=device)  # [1, L]
    settings = sampling_settings(most, m.eos_ids, m.pad_id)
    how = {"attention_mask": torch.ones_like(ids), "generation_config": settings}
    how["logits_processor"] = [Draw(temperature, 1, most, device, U)]
    with generation_config(m.policy, settings):
        m.policy.generate(ids, streamer=stream, **how)
    return stream


class Stream:
    """Prints a completion while generate draws it, and calls `put` and `end`.

    transformers.TextStreamer decodes each line alone: of a SentencePiece tokenizer it would lose
    the space with which a line begins, and it prints an EOS that is no special token.
    """

    def __init__(self, tokenizer, eos_ids):
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.ids, self.text, self.ended = None, "", False  # text: what is printed so far

    def put(self, ids):
        """ids: at first the prompt, then one token at a time, of which the EOS is the last."""
        self.ids = [] if self.ids is None else [*self.ids, *ids.tolist()]
        self.ended = bool(self.ids) and self.ids[-1] in self.eos_ids
        self.show()

    def show(self, after=""):
        """Print what is new; the last character waits until its bytes are whole, or for the end."""
        from trainer.decoding import text_of

        text = text_of(self.tokenizer, self.ids[: len(self.ids) - self.ended])
        if after or not text.endswith("\ufffd"):
            print(harmless(text[len(self.text) :]), end=after, flush=True)
            self.text = text

    def end(self):
        self.show(after="\n")


def harmless(text):
    r"""The text with indented lines, and an escape such as \x1b for what could steer a terminal.

    Marks of a text's direction are escaped too, joiners are not: words and emoji need them.
    """
    shown = ""
    for char in text:
        is_safe = char in "\n\t\u200c\u200d" or unicodedata.category(char) not in UNSAFE
        shown += char if is_safe else char.encode("unicode_escape").decode()
    return shown.replace("\n", "\n  ")


def verdict(text, answer, truncated):
    """Whether the completion's answer is right, in words."""
    from trainer.grading import Grader

    if correct(text, answer, truncated):
        return "right"
    if Grader().lenient(text, {"answer": answer}, truncated):
        return "wrong: only the lenient rule, which takes the last number, accepts it"
    return "wrong"


def ask(m, question, samples, answer):
    """Print one greedy completion and `samples` sampled ones, each with its length and verdict.

    Raises ValueError for a question that is too long or cannot be encoded.
    """
    import torch

    from trainer.prompts import encode_problems

    most, temperature = m.o.max_new_tokens, m.o.temperature
    vocabulary = len(m.policy.get_input_embeddings().weight)
    how = m.o.prompt, m.context - most, vocabulary, m.chat, m.eos_ids, most
    (problem,), _ = encode_problems(m.tokenizer, [{"question": question}], *how)
    torch.manual_seed(m.o.seed)  # a question gets the same answers again
    for i in range(1 + samples):
        name = f"sample {i} of {samples}, temperature {temperature:g}" if i else "greedy"
        print(f"\n{name}:\n  ", end="")
        stream = complete(m, problem["prompt_ids"], temperature if i else 0)
        length = len(stream.ids)  # with the EOS, as in metrics.jsonl
        words = [f"{length} token{'s' * (length != 1)}", "ended" if stream.ended else "cut off"]
        if answer is not None:
            words.append(verdict(stream.text, answer, not stream.ended))
        print(f"[{', '.join(words)}]", flush=True)


def main(argv=None):
    """Run the command line and return the exit status."""
    try:
        args, given, is_tiny = parse(sys.argv[1:] if argv is None else argv)
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode
        m, typed = load(given), iter(lambda: input("\nquestion (empty: stop): ").strip(), "")
        for question in typed if args.question is None else [args.question]:
            if is_tiny and not re.fullmatch(LEARNED, question.strip(), re.DOTALL):
                print(f"note: tiny has only learned problems such as: {EXAMPLE}")
            ask(m, question, args.samples, args.answer)
    except EOFError:  # no more questions
        pass
    except (ValueError, OSError) as error:
        line = " ".join(str(error).replace("Pass --model FOLDER, or --preset tiny", "").split())
        print("ask.py: error:", line, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    run_main(main)
