r"""Rewards for problems whose answer is one number: GSM8K and everything written in its format.

Every comparison is between exact `Fraction`s, so 18.00 = 18 and 15 is not 5. A completion is written by the policy
under optimisation, hence by an adversary: nothing in it is evaluated, raises, or costs more than linear time.

Where the answer stands (strict):
- after the last `####`, up to the end of that line (any line end that `str.splitlines` knows). Four hashes or more are
  a marker. The first numeral there is the answer: if it is malformed, or there is none, the answer is None. Neither an
  earlier marker nor a later number is a second try, so writing many answers pays no more than writing one.
- without any `####`: in the last `\boxed{...}`, braces balanced, which may span lines. Again its first numeral decides,
  and a box that is never closed is None.
Lenient: what strict finds, else the last number in the text, malformed ones passed over.

What a number is:
- an optional sign and currency in either order (-$5, $-5, \$5, € 5), then digits, plain or with commas in threes;
  then decimals, an exponent of one to three digits, or /digits (a plain fraction of two whole numbers). Also .5
- the sign touches the digits or the currency, and follows no letter, digit or `)`, after which it is a hyphen: the last
  number of 5-3 is 3. Of 12/-4 nothing is read.
- decimal digits of any script, full-width punctuation, U+2212 and its like, every currency symbol (Unicode Sc), and
  LaTeX's thousands 1{,}234 and 1\,234 count as the ASCII they stand for.
- letters and units before or after do not matter: USD18, x15, 18kg, 5eggs, 50% (50), 18. (18). A point after a letter
  or another point is a full stop: Rs.500 is 500.
- a numeral is read whole or not at all. Malformed are 1,23,4 and 1.2.3 and 1_000 and 5'10 and 12/25/2023 and 1.5/2,
  a zero denominator, an exponent of four digits, more than 100 digits in all, and the arguments of \frac.
"""

import re
import unicodedata
from fractions import Fraction

MARKER = "####"
BOX = r"\boxed{"

# Indexed by code point, a table for str.translate: the ASCII character that each digit, currency, sign, comma, point or
# stroke counts as, or the character itself. No digit or currency symbol lies above U+20000.
_ASCII = dict(zip("‒–−﹣－＋，．／’", "-----+,./'", strict=True))
_ASCII = "".join(
    _ASCII.get(char)
    or (
        str(unicodedata.decimal(char))
        if char.isdecimal()
        else "$"
        if unicodedata.category(char) == "Sc"
        else char
    )
    for char in map(chr, range(0x20000))
)
_LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")

_GLUE = r"(?:[.,_']|/[-+]?|[eE][-+]?)"  # between two digits it makes them one numeral, well formed or not
_RUN = r"[0-9.,_'/eE+-]"
_TAIL = r"(?:[0-9]{0,2}(?:,[0-9]{3})++|[0-9]*+)"  # a whole number after its first digit
_EXPONENT = r"(?:[eE][-+]?[0-9]{1,3})?"
# A numeral, all of it but sign and currency. It starts with a plain digit class, so that re skips fast to the next one;
# a well-formed one is at most 100 digits to backtrack over; a malformed one is consumed whole: the time is linear.
_NUMERAL = re.compile(
    rf"""
    [0-9]
    (?:
        (?<! frac\{{[0-9] ) (?<! \}}\{{[0-9] )
        (?! (?={_RUN}{{100}}) (?:{_GLUE}?[0-9]){{100}} )    # the first look is only for speed
        (?: (?: (?<! \.[0-9] ) | (?<= [A-Za-z.]\.[0-9] ) )
            {_TAIL} (?: / (?=[0,]*[1-9]) [0-9]{_TAIL} | (?:\.[0-9]++)? {_EXPONENT} )    # 3/4  5  1,234.5  1e5
          | [0-9]*+ {_EXPONENT}                                                         # all that .5 may be
        )
        (?! {_GLUE}?[0-9] )
      | (?P<malformed> {_RUN}*+ )
    )
    """,
    re.VERBOSE,
)
_MINUS = re.compile(
    r"(?<![0-9A-Za-z)])-(?:\\?\$ ?)?\.?\Z"
)  # what stands before the first digit of a negative number
_POINT = re.compile(r"(?<![A-Za-z.])\.\Z")  # ... and of .5


def extract_answer(text: str, lenient: bool = False) -> Fraction | None:
    """The answer that `text` gives, by the rules above, or None. Raises nothing; time linear in len(text)."""
    answer, _ = _strict(text)
    if answer is None and lenient:
        last = None
        for match in _NUMERAL.finditer(_plain(text)):
            if match.lastgroup is None:  # not "malformed"
                last = match
        answer = _value(last)
    return answer


def correct(completion: str, answer: str) -> float:
    """1.0 where the completion's strict answer equals `answer`, else 0.0: the default training reward.

    `answer` is GSM8K's answer field (worked text that ends in `#### 72`), or holds one number alone (72, $1,234, 7 cm).
    Raises ValueError where it has none, or several and no marker to tell which: wrong data, not a wrong completion.
    """
    truth, _ = _strict(answer)
    if truth is None and MARKER not in answer and BOX not in answer:
        numerals = list(_NUMERAL.finditer(_plain(answer)))
        truth = _value(numerals[0]) if len(numerals) == 1 else None
    if truth is None:
        shown = answer if len(answer) <= 80 else answer[:40] + " ... " + answer[-40:]
        raise ValueError(
            f"no number to compare with in the answer {shown!r}: expected '#### 72' at its end, or '72'"
        )
    return float(extract_answer(completion) == truth)


def format_reward(completion: str) -> float:
    """1.0 where the strict answer exists, right or wrong, and only white space follows its line, else 0.0."""
    answer, end = _strict(completion)
    return float(answer is not None and not completion[end:].strip())


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, to be added to the reward; lengths in tokens.

    0 while |o| <= L_max - L_cache; (L_max - L_cache - |o|) / L_cache up to L_max; -1 beyond. A cache of 0 is a plain
    cut at L_max. Raises ValueError unless 0 <= cache <= max_length.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(
            f"overlong_penalty: cache must lie in 0..max_length, got cache {cache}, max_length {max_length}"
        )
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return (max_length - cache - length) / cache
    return -1.0


def _strict(text):
    """(the strict answer or None, where the line it ends on ends)."""
    marker, box = text.rfind(MARKER), text.rfind(BOX)
    if marker >= 0:
        start = marker + len(MARKER)
        stop = end = _line_end(text, start)
    elif box >= 0:
        start, depth, stop = box + len(BOX), 1, None
        for brace in re.finditer("[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                stop = start + brace.start()
                break
        if stop is None:
            return None, len(text)
        end = _line_end(text, stop)
    else:
        return None, len(text)
    return _value(_NUMERAL.search(_plain(text[start:stop]))), end


def _line_end(text, start):
    match = _LINE_END.search(text, start)
    return match.start() if match else len(text)


def _plain(text):
    text = text.replace("{,}", ",").replace("\\,", ",")
    return text if text.isascii() else text.translate(_ASCII)


def _value(match):
    """The Fraction a match of _NUMERAL stands for; None for no match or a malformed one. At most 100 digits: cheap."""
    if match is None or match.lastgroup == "malformed":
        return None
    before = match.string[
        max(0, match.start() - 6) : match.start()
    ]  # 6: the longest _MINUS and the character before it
    number = Fraction(("." if _POINT.search(before) else "") + match[0].replace(",", ""))
    return -number if _MINUS.search(before) else number
