"""Ask a model a question and watch it answer: `tools/ask.py runs/tepo-tiny-s0 "Sam has ..."`.

One greedy completion, then sampled ones, drawn as training draws them: softmax(logits /
temperature) over the whole vocabulary, whatever the model's generation_config says. Each token is
printed when it is drawn. With --answer each completion is graded. --help has examples.

A completion is text of unknown content. Its lines are indented, so that they cannot be mistaken for
our labels, and its control characters are printed as escapes, so that they cannot change the
terminal. torch is imported where it is used: --help and a wrong command line do not wait for it.
"""

import argparse
import json
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from rewards import correct, true_answer
from run.checks import check_config, check_values
from run.commandline import RaisingParser, run_main
from run.options import Options
from run.parser import add_option

# The options of train.py that decide how a model is asked.
ASKED = (
    "prompt",
    "chat_template",
    "system",
    "template_option",
    "max_new_tokens",
    "temperature",
    "dtype",
)
MOST_SAMPLES = 1000
MOST_TOKENS = 512  # of a model that is no run
EXAMPLE = "Sam has 36 cards. He uses 8, wins 1 and loses 8. How many cards now?"
LEARNED = r"\w+ has \d+ \w+\. .+ How many \w+ now\?"  # the form of tiny's problems
EPILOG = f"""examples:
  python tools/ask.py tiny "{EXAMPLE}"
      the embedded model before training
  python tools/ask.py runs/tepo-tiny-s0 --answer 21 \\
          "{EXAMPLE}"
      the same question after training, and whether each completion is right
  python tools/ask.py Qwen/Qwen2.5-0.5B "What is 17 * 23?" --samples 0
      a model of the Hub, greedy only
  echo "What is 17 * 23?" | python tools/ask.py runs/tepo-gsm8k-s0 --temperature 0.7
      the question from a pipe; without a pipe and a question, ask.py asks for questions

A run's folder stands for its trained model, or for its latest checkpoint while it is not done. Its
model is asked as it was trained: with the run's prompt, chat template, length, temperature and
dtype, unless an option here says otherwise. Any other model gets the question alone.
"""


def build_parser():
    parser = RaisingParser(
        prog="ask.py",
        description="Ask a model a question: a greedy completion and some sampled ones.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = "the folder of a run or of a model, a Hub name, or tiny (embedded)"
    add("model", metavar="MODEL", help=text)
    text = "default: what is piped in, else questions are typed in one after the other"
    add("question", metavar="QUESTION", nargs="?", help=text)
    text = "the right answer, a number or a text that ends in '#### number': grade by it"
    add("--answer", metavar="TEXT", help=text)
    text = "sampled completions after the greedy one (default 4)"
    add("--samples", type=int, default=4, metavar="N", help=text)
    text = "divides the logits (default: the run's, else 1)"
    add("--temperature", type=float, metavar="FLOAT", help=text)
    text = "most tokens per completion (default: the run's, 64 for tiny, else 512 or half the "
    text += "model's context)"
    add("--max-new-tokens", type=int, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default 0)")
    text = "text around the question, such as '{question} Think.' (default: the run's)"
    add("--prompt", metavar="TEXT", help=text)
    text = "auto: the tokenizer's, if it has one; none: plain text (default: the run's)"
    add("--chat-template", metavar="NAME", help=text)
    add("--system", metavar="TEXT", help="system turn of the chat template (default: the run's)")
    add_option(parser, "template_option")
    text = "fp32, bf16, or auto (bf16 if a GPU has it) (default: the run's)"
    add("--dtype", metavar="NAME", help=text)
    text = "cpu, cuda, cuda:N, or auto (cuda if there is a GPU)"
    add("--device", default="auto", metavar="NAME", help=text)
    text = "CPU threads; auto: as in train.py"
    add("--threads", default="auto", metavar="N", help=text)
    return parser


def parse(argv):
    """(the parsed command line, {name: value} of train.py's options). Raises ValueError.

    Reads a piped question.
    """
    parser = build_parser()
    # intermixed: the question may follow an option.
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise ValueError(f"{unknown[0]!r} stands alone: put the question in quotes")
    if unknown:
        raise ValueError(parser.refusal(unknown[0]))
    if args.template_option is not None:
        args.template_option = dict(args.template_option)
    if not 0 <= args.samples <= MOST_SAMPLES:
        raise ValueError(f"--samples {args.samples}: 0 to {MOST_SAMPLES}")
    if args.answer is not None:
        check_answer(args.answer)
    given = options_of(args)
    check_values(Options(**given))
    if args.question is None and not sys.stdin.isatty():
        args.question = sys.stdin.read().strip("\r\n")
    if args.question is not None:
        check_question(args.question)
    elif args.answer is not None:
        raise ValueError("--answer needs a QUESTION in the command line")
    return args, given


def check_answer(answer):
    try:
        true_answer(answer)
    except ValueError as error:
        raise ValueError(f"--answer: {error}; without --answer nothing is graded") from None


def check_question(question):
    if not question.strip():
        raise ValueError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError("the question is not valid UTF-8") from None


def options_of(args):
    """{name: value} of train.py's options: the run's, then those of the command line."""
    given = {"preset": "tiny", "model": args.model, "seed": args.seed}
    given.update(device=args.device, threads=args.threads)
    if args.model == "tiny":
        given["max_new_tokens"] = Options.max_new_tokens
    given.update(run_options(args.model))
    for name in ASKED:
        value = getattr(args, name)
        if value is not None:
            given[name] = value
    return given


def run_options(folder):
    """Those of ASKED with which the run in this folder was trained; {} if it holds no run.

    Raises ValueError for a value of a wrong type.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        options, _ = config["options"], config["status"]
        asked = {name: options[name] for name in ASKED if name in options}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    check_config({"options": asked}, path)
    return asked


def of_tiny(name):
    """Whether a model is the embedded one, or that of a run that began with it."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        return config["options"]["model"] == "tiny"
    except (OSError, ValueError, KeyError, TypeError):
        return name == "tiny"


class Model:
    """A model, and how it is asked."""

    def __init__(self, given):
        """given: of options_of. Raises ValueError if there is no such model."""
        print("loading torch and transformers", flush=True)
        from run.checkpoint import find_model
        from run.checks import fill
        from run.machine import warn_of_slow_bf16
        from trainer.bf16 import sampling_copy
        from trainer.policy import context_length, load_policy, use_threads
        from trainer.prompts import Chat
        from trainer.sources import offline_without_network

        self.o = o = fill(given)
        offline_without_network(o.model)
        self.chat = Chat(o.chat_template, o.system, o.template_option)
        policy, self.tokenizer, self.eos_ids, self.pad_id = load_policy(
            find_model(o.model), o.device, self.chat
        )
        use_threads(o.threads, policy)
        warn_of_slow_bf16(o)
        context = context_length(policy)
        if "max_new_tokens" not in given:
            o.max_new_tokens = min(MOST_TOKENS, context // 2)
        self.longest = context - o.max_new_tokens
        self.policy = sampling_copy(policy, o.dtype)

    def encode(self, question):
        """The prompt's token ids. Raises ValueError if it is too long or cannot be encoded."""
        from trainer.prompts import Prompts, check_ids, without_lost

        prompts = Prompts(self.tokenizer, self.o.prompt, self.chat)
        ids = prompts.encode([question])[0]
        if not 0 < len(ids) <= self.longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and the model's context less --max-new-tokens "
                f"has room for {max(0, self.longest)}"
            )
        problem = {"question": question, "prompt_ids": ids}
        vocabulary = len(self.policy.get_input_embeddings().weight)
        check_ids(self.tokenizer, problem, vocabulary, self.eos_ids)
        without_lost(self.tokenizer, [problem])
        return ids

    def complete(self, prompt_ids, temperature):
        """Draw and print one completion; temperature 0 is greedy. Returns its Stream."""
        import torch

        from trainer.sampling import Draw, generation_config, random_numbers, sampling_settings

        most = self.o.max_new_tokens
        U = random_numbers(1, most) if temperature > 0 else None
        settings = sampling_settings(most, self.eos_ids, self.pad_id)
        ids = torch.tensor([prompt_ids], device=self.policy.device)  # [1, L]
        stream = Stream(self.tokenizer, self.eos_ids)
        with generation_config(self.policy, settings):
            self.policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=[Draw(temperature, 1, most, ids.device, U)],
                streamer=stream,
            )
        return stream

    def restart(self):
        """Seed the sampling, so that a question gets the same answers again."""
        import torch

        torch.manual_seed(self.o.seed)


class Stream:
    """Prints a completion while generate draws it; generate calls `put` and `end`."""

    def __init__(self, tokenizer, eos_ids):
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.ids = None  # of the completion, without its EOS
        self.text = ""  # what is printed so far
        self.ended = False  # with an EOS

    def put(self, ids):
        """ids: at first the prompt, then one token at a time."""
        if self.ids is None:
            self.ids = []
            print("  ", end="")
            return
        for token in ids.tolist():
            self.ended = self.ended or token in self.eos_ids
            if not self.ended:
                self.ids.append(token)
        text = self.decode()
        if not text.endswith("\ufffd"):  # else the last character lacks some of its bytes
            self.show(text)

    def end(self):
        self.show(self.decode())
        print(flush=True)

    def decode(self):
        from trainer.decoding import text_of

        return text_of(self.tokenizer, self.ids)

    def show(self, text):
        """Print what `text` has more than what is printed already."""
        print(harmless(text[len(self.text) :]), end="", flush=True)
        self.text = text

    @property
    def length(self):
        """Tokens, with the EOS, as in metrics.jsonl."""
        return len(self.ids) + self.ended


def harmless(text):
    r"""The text with indented lines, and an escape such as \x1b for what could steer a terminal.

    These are the control characters, and those that format a text invisibly, such as the marks that
    reverse its direction. Joiners stay: words of some scripts, and emoji, need them.
    """
    shown = []
    for char in text:
        if char == "\n":
            char = "\n  "
        elif char not in "\t\u200c\u200d" and unicodedata.category(char) in UNSAFE:
            char = char.encode("unicode_escape").decode()
        shown.append(char)
    return "".join(shown)


UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogates, line and paragraph ends


def verdict(stream, answer):
    """Whether the completion's answer is right, in words; "" without an answer to compare with."""
    from trainer.grading import Grader

    if answer is None:
        return ""
    truncated = not stream.ended
    if correct(stream.text, answer, truncated):
        return ", right"
    if Grader().lenient(stream.text, {"answer": answer}, truncated):
        return ", wrong: only the lenient rule, which takes the last number, accepts it"
    return ", wrong"


def ask(model, question, samples, answer):
    """Print one greedy completion and `samples` sampled ones, each with its length and verdict."""
    prompt_ids = model.encode(question)
    temperature = model.o.temperature
    model.restart()
    for i in range(1 + samples):
        name = f"sample {i} of {samples}, temperature {temperature:g}" if i else "greedy"
        print(f"\n{name}:")
        stream = model.complete(prompt_ids, temperature if i else 0)
        how = "ended" if stream.ended else "cut off"
        tokens = "1 token" if stream.length == 1 else f"{stream.length} tokens"
        print(f"[{tokens}, {how}{verdict(stream, answer)}]", flush=True)


def typed_questions():
    """The questions that are typed in, until an empty one or the end of the input."""
    while True:
        try:
            question = input("\nquestion (empty: stop): ")
        except EOFError:
            return
        if not question.strip():
            return
        yield question


def main(argv=None):
    """Run the command line and return the exit status."""
    try:
        args, given = parse(sys.argv[1:] if argv is None else argv)
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode
        model = Model(given)
        questions = typed_questions() if args.question is None else [args.question]
        for question in questions:
            if of_tiny(args.model) and not re.fullmatch(LEARNED, question.strip(), re.DOTALL):
                print(f"note: tiny has only learned problems such as: {EXAMPLE}")
            ask(model, question, args.samples, args.answer)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


def refuse(error):
    """Print the error in one line. Returns the exit status."""
    line = " ".join(str(error).split())
    line = line.removesuffix("Pass --model FOLDER, or --preset tiny").rstrip()  # train.py's advice
    print("ask.py: error:", line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    run_main(main)
