"""From a question to the token ids of its prompt, and the token that ends an answer.

If the tokenizer has a chat template, the question is a user's turn. The model then ends its own
turn with a token of that template, which may not be an EOS of its config: Qwen2.5-0.5B lists only
<|endoftext|>, and its template closes a turn with <|im_end|>. That token is made an EOS too.
"""

import re
import unicodedata
from dataclasses import dataclass, field

import jinja2
import jinja2.meta

# Placeholders for a question and an answer, to look at the template around them.
QUESTION, ANSWER = "f3a1question", "f3a1answer"


@dataclass(frozen=True)
class Chat:
    """The options of the chat template."""

    template: str = "auto"  # --chat-template; "none": plain text
    system: str | None = None  # --system: a system turn before the question
    variables: dict = field(default_factory=dict)  # --template-option: passed to the template


AUTO = Chat()


class Prompts:
    """Turns questions into prompts, for one tokenizer and one set of options."""

    def __init__(self, tokenizer, prompt="{question}", chat=AUTO):
        """prompt: the user's words, in which {question} is filled in.

        Raises ValueError, in one line, if an option of `chat` has no effect, because there is no
        template or the template does not read the variable.
        """
        self.tokenizer, self.prompt, self.chat = tokenizer, prompt, chat
        self.template = None
        if tokenizer.chat_template and chat.template != "none":
            self.template = tokenizer.get_chat_template()
        self._check_options()

    def _check_options(self):
        chat = self.chat
        if self.template is None and chat.system is not None:
            raise ValueError("--system needs a chat template, and this tokenizer has none")
        if self.template is None and chat.variables:
            raise ValueError("--template-option needs a chat template, and this tokenizer has none")
        if not chat.variables:
            return
        known = template_variables(self.template)
        for name in chat.variables:
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise ValueError(
                    f"--template-option {name}: the chat template never reads it; its variables: "
                    f"{listed}"
                )

    def text(self, question):
        """The prompt as text, before encoding. Raises ValueError if the template fails."""
        words = self.prompt.replace("{question}", question)
        if self.template is None:
            return words + "\n"
        return self._render([("user", words)], generation_prompt=True)

    def _render(self, turns, generation_prompt):
        """The template's text for the turns [(role, words), ...], after --system if given.

        Some templates read `content` as text, others as a list of parts: both are tried. Raises
        ValueError if the template fails, or if its text lacks the words of a turn.
        """
        if self.chat.system is not None:
            turns = [("system", self.chat.system), *turns]
        reasons = []
        for as_parts in (False, True):
            try:
                text = self.tokenizer.apply_chat_template(
                    [message(role, words, as_parts) for role, words in turns],
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.chat.variables,
                )
            except Exception as error:  # a template can raise any type
                reasons.append(f"fails: {error}")
                continue
            lost = [role for role, words in turns if not contains(text, words)]
            if not lost:
                return text
            reasons.append(f"leaves out what the {lost[0]} says")
        raise ValueError(
            f"the tokenizer's chat template {reasons[0]}. --chat-template none asks in plain text"
        )

    def encode(self, questions):
        """The token ids of each question's prompt, a list of lists.

        A question is text only: "<|im_end|>" in it does not become a control token. BOS is added as
        the template does, or in plain text as the tokenizer does. What the tokenizer appends, such
        as EOS, is left out, because the answer comes next.
        """
        start = added_before(self.tokenizer) if self.template is None else []
        control = control_texts(self.tokenizer)
        found, texts = {}, {}  # by question
        for question in questions:
            if any(text in question for text in control):
                found[question] = start + self._ids_around(question, control)
            else:
                texts[question] = self.text(question)
        # All texts in one call: the tokenizer then works on every core.
        ids = ids_of(self.tokenizer, list(texts.values())) if texts else []
        for question, own in zip(texts, ids, strict=True):
            found[question] = start + own
        return [found[question] for question in questions]

    def _ids_around(self, question, control):
        """The ids of a prompt whose question contains a text of `control`, without BOS."""
        at_control = re.compile("(" + "|".join(map(re.escape, control)) + ")")
        ids = []
        for i, piece in enumerate(at_control.split(self.text(QUESTION))):
            if i % 2:  # a control token of the template or of --prompt
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                piece = piece.replace(QUESTION, question)
                ids += ids_of(self.tokenizer, piece, split_special_tokens=True)
        return ids

    def end_of_turn(self):
        """The id of the token that closes an assistant's turn in the chat template, or None.

        Found by rendering a turn: it is the first token after the turn's words, white space
        ignored, if that is an added token of the tokenizer. If the same token stands right before
        the words, it is part of a header and closes nothing.
        """
        if self.template is None:
            return None
        try:
            turns = [("user", QUESTION), ("assistant", ANSWER)]
            before, _, after = self._render(turns, generation_prompt=False).rpartition(ANSWER)
        except ValueError as error:
            print(f"cannot find the token that ends an assistant's turn: {error}")
            return None
        first = ids_of(self.tokenizer, after.lstrip())[:1]
        opens = ids_of(self.tokenizer, before.rstrip())[-1:]
        if not first or first == opens or first[0] not in self.tokenizer.added_tokens_decoder:
            return None
        return first[0]


def message(role, words, as_parts):
    """A turn for a chat template; its content is a text, or a list of one part."""
    content = [{"type": "text", "text": words}] if as_parts else words
    return {"role": role, "content": content}


def template_variables(source):
    """The names of the variables that a chat template reads, apart from the turns."""
    # The tag {% generation %} is transformers' own: plain jinja2 would fail on it.
    source = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        raise ValueError(f"the tokenizer's chat template fails: {error}") from None
    return names - {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


def control_texts(tokenizer):
    """The texts of the tokenizer's control tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def added_before(tokenizer):
    """The ids that the tokenizer puts before every text: BOS, or nothing."""
    with_added = tokenizer("1").input_ids
    return with_added[: with_added.index(ids_of(tokenizer, "1")[0])]


def ids_of(tokenizer, text, **how):
    """The token ids of the text alone, without BOS or EOS. Of a list of texts: a list of them."""
    how.update(add_special_tokens=False, return_attention_mask=False)
    return tokenizer(text, **how).input_ids


def contains(text, words):
    """Whether the text contains the words; ignores white space, case and Unicode's normal forms."""
    return _bare(words) in _bare(text)


def _bare(text):
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def encode_problems(
    tokenizer, problems, prompt, longest, vocabulary=2**31, chat=AUTO, eos_ids=(), most=0
):
    """(problems, each with its "prompt_ids", how many were dropped for their length).

    Prompts over `longest` tokens are dropped, not cut: a cut question is another question. Problems
    that the tokenizer cannot represent are dropped too, with a printed line. vocabulary: number of
    tokens that the model knows. most: --max-new-tokens, for an error. Raises ValueError if no
    problem is left, if a prompt ends in an
    EOS, or if it contains a token that the model does not know.
    """
    if not problems:
        raise ValueError("no problem is left to train on: all of them are held out too")
    ids = Prompts(tokenizer, prompt, chat).encode([p["question"] for p in problems])
    encoded = [{**p, "prompt_ids": own} for p, own in zip(problems, ids, strict=True)]
    kept = [p for p in encoded if 0 < len(p["prompt_ids"]) <= longest]
    if not kept:
        context, lengths = longest + most, [len(p["prompt_ids"]) for p in encoded]
        if context <= min(lengths):
            raise ValueError(f"every prompt fills the model's context of {context} tokens")
        raise ValueError(
            f"--max-new-tokens {most} leaves no room for a prompt in the model's context of "
            f"{context} tokens: the most for the shortest prompt is {context - min(lengths)}, for "
            f"the longest {context - max(lengths)}"
        )
    for p in kept:
        check_ids(tokenizer, p, vocabulary, eos_ids)
    return without_lost(tokenizer, kept), len(encoded) - len(kept)


def check_ids(tokenizer, problem, vocabulary, eos_ids):
    """Raise ValueError if the prompt contains an unknown token, or ends in an EOS."""
    ids = problem["prompt_ids"]
    question = problem["question"][:80]
    if max(ids) >= vocabulary:
        raise ValueError(
            f"the tokenizer makes token {max(ids)} of {question!r}, and the model knows "
            f"{vocabulary}: do the two belong together?"
        )
    if ids[-1] in eos_ids:
        raise ValueError(
            f"the prompt of {question!r} ends in {tokenizer.decode(ids[-1:])}, which ends an "
            "answer, so none would begin: --chat-template none asks in plain text"
        )


def without_lost(tokenizer, problems):
    """The problems whose question can be decoded from their prompt; prints how many cannot."""
    texts = tokenizer.batch_decode([p["prompt_ids"] for p in problems])
    kept, lost = [], []
    for problem, text in zip(problems, texts, strict=True):
        whole = contains(text, problem["question"])
        (kept if whole else lost).append(problem)
    if not lost:
        return kept
    example = f"{lost[0]['question'][:80]!r}"
    if not kept:
        raise ValueError(f"the tokenizer loses a part of every question, such as {example}")
    print(f"dropped problems: {len(lost)} of which the tokenizer loses a part, such as {example}")
    return kept


def start_line(tokenizer, chat, eos_ids):
    """One line: the kind of prompt of a run, and the tokens that end a completion."""
    kind = "plain text" if Prompts(tokenizer, chat=chat).template is None else "chat template"
    ends = ", ".join(token_name(tokenizer, i) for i in eos_ids)
    return f"prompt: {kind}; a completion ends at {ends} (--show-prompt prints the first prompt)"


def show(tokenizer, problem, eos_ids):
    """The prompt of a problem as the model gets it, with control tokens, as readable text."""
    ids = problem["prompt_ids"]
    ends = ", ".join(f"{token_name(tokenizer, i)} (id {i})" for i in eos_ids)
    return (
        f"{tokenizer.decode(ids)}[the completion begins here]\n"
        f"{len(ids)} tokens; a completion ends at {ends}"
    )


def token_name(tokenizer, token):
    """The text of a token; "token N" if the config names one that the tokenizer does not know."""
    return tokenizer.convert_ids_to_tokens(token) or f"token {token}"
