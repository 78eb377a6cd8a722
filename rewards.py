r"""Rewards for problems whose answer is one number: GSM8K, and data in its format.

`correct` is the reward of a training step; the penalties and the lenient reading are options.

1. Find the place of the answer: the rest of the line after the last `####`; if there is none, the
   inside of the last `\boxed{...}`. A truncated completion must have ended that line or box.
2. Strip what means nothing: $...$  \(...\)  **...**  quotes or brackets around the whole,
   \left( \right), \text{...} and its sisters, `x =`, and one closing . , ; or :
3. All that is left must be one number: sign, currency, size, percent and unit, of which only the
   size is needed. Nothing searches for a number inside: x^{2}, 3 or 4, and 10, 000 are None.

   sign             5  +5  -5  - 5, with any Unicode minus or hyphen
   currency         $5  -$5  $-5  USD 5  5 €
   whole number     72  007, in the digits of any script
   groups of three  1,234  1{,}234  1,\!234, or with no-break, thin or LaTeX spaces: 1\,234
   decimal          18.5  .5  1,234.5  1e-3; the exponent has at most three digits
   fraction         3/4  \frac{3}{4}  \dfrac34  \cfrac{-3}{4}, of two whole numbers: 84/2 is 42
   mixed number     2 2/3  2\frac{2}{3}; the fraction is below 1
   percent, unit    50% is 50  18 eggs  $5/hour  9 (apples)  762 M&Ms  25 cm^2  18m³  90°: words,
                    but none that makes another number: 5 million, 3 pi, 2 and a half
   None, e.g.       12 000 with a plain space, 0,500  12,34  1'000  (1,2)  5!  2x  3-5  x > 5  ½

Lenient: if there is no such answer, the last number that stands free in the text. The text is cut
at its words and at `=`; a piece counts if all of it is a number by the same rules.

Training teaches the policy to exploit the reward. So nothing in a completion is evaluated or raises
an exception, and the time is linear in its length: what is longer than 300 characters is no number.
Answers are compared as exact fractions: 18.00 equals 18, and 15 is not 5. Our choice: a truth of
more than six decimals counts as rounded, and a relative error of 1e-6 is right.
"""

import re
from fractions import Fraction
from statistics import fmean

LONGEST = 300  # characters of an answer


def correct(completion: str, answer: str, truncated: bool = False) -> float:
    """1.0 if the completion's strict answer equals `answer`, else 0.0: the default reward.

    Raises ValueError if `answer` is not one number: wrong data, not a wrong completion.
    """
    truth = true_answer(answer)
    return float(equal(extract_answer(completion, truncated=truncated), truth))


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, added to the reward; lengths in tokens.

    0 while |o| <= L_max - L_cache; (L_max - L_cache - |o|) / L_cache up to L_max; -1 beyond. A
    cache of 0 is a plain cut at L_max. Raises ValueError unless 0 <= cache <= max_length.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"overlong_penalty: cache must lie in 0..{max_length}; got {cache}")
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return (max_length - cache - length) / cache
    return -1.0


def group_overlong_penalty(lengths: list, right: list, gamma: float = 0.75) -> list[float]:
    """GTPO's length punishment, arXiv 2508.04349 Appendix D, added to the rewards of one group.

    lengths [G] in tokens, right [G] 1 or 0 -> [G]: -1/2 (|o| - L) / L for a right one longer than
    L, else 0. With n right ones, L = max((min + max) / 2, mean) of their lengths if n / G >= gamma;
    else of all lengths if n > G / 2; else there is no penalty. The paper's -1/2 from 2 L on has no
    case: max <= 2 L. Our choice: gamma 0.75, a replication's. ValueError unless 0 < gamma < 1.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"group_overlong_penalty: gamma must lie between 0 and 1; got {gamma}")
    pairs = list(zip(lengths, right, strict=True))
    share = fmean(right)
    if share < gamma and share <= 0.5:
        return [0.0] * len(right)
    compared = [length for length, is_right in pairs if is_right or share < gamma]
    L = max((min(compared) + max(compared)) / 2, fmean(compared))
    return [(1 - length / L) / 2 if is_right and length > L else 0.0 for length, is_right in pairs]


def extract_answer(text: str, lenient: bool = False, truncated: bool = False) -> Fraction | None:
    """The answer of `text` or None; truncated: it was cut at the length limit, before its EOS."""
    lines, boxes = places(text, truncated)
    answer = number(plain((lines or boxes or [""])[-1]))
    return last_number(text, truncated) if answer is None and lenient else answer


def true_answer(answer: str) -> Fraction:
    """The number in a problem's answer: GSM8K's field (it ends in `#### 72`), or 72, $1,234, 7 cm.

    Raises ValueError unless it is one number, the same after every `####` and in every box.
    """
    lines, boxes = places(answer)
    numbers = {number(plain(place)) for place in set(lines + boxes) or {answer}}
    if len(numbers) > 1 or None in numbers:
        shown = answer if len(answer) <= 80 else answer[:40] + " ... " + answer[-40:]
        expected = "expected one number, '#### 72' at its end or '72'"
        raise ValueError(f"no number to compare with in the answer {shown!r}: {expected}")
    return numbers.pop()


def equal(answer: Fraction | None, truth: Fraction) -> bool:
    """Whether an answer is right: exact, but 1e-6 of a truth that has more than six decimals."""
    if answer is None:
        return False
    decimal = pow(10, 2000, truth.denominator) == 0  # it has finitely many decimals: not 1/3
    rounded = decimal and pow(10, 6, truth.denominator) != 0
    return abs(answer - truth) <= (abs(truth) / 10**6 if rounded else 0)


# ---- 1. the place -------------------------------------------------------------------------------

# A quantifier with + after it (*+, ++) never gives characters back: that keeps the time linear.
LINE_END = "[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"


def places(text, truncated=False):
    """(what stands after each ####, what stands in each box): texts, "" where too long or cut."""
    lines, boxes = [], []
    for marker in re.finditer("#{4,}", text):
        rest = text[marker.end() : marker.end() + LONGEST + 1]
        line, *more = re.split(LINE_END, rest, maxsplit=1)
        lines.append("" if len(line) > LONGEST or (truncated and not more) else line)
    for box in re.finditer(r"\\boxed\s*+\{", text):
        boxes.append(inside(text[box.end() : box.end() + LONGEST + 1]))
    return lines, boxes


def inside(text):
    """The text up to the brace that closes the box; the box's own opening brace is before it."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return ""


# ---- 2. what means nothing ----------------------------------------------------------------------

THIN = "\u2009"  # a space that may group digits
GAP = rf"[ \t{THIN}]*+"
ARGUMENT = rf"(?:\{{{GAP}([-,\d{THIN}]++){GAP}\}}|(\d))"  # of \frac: {-12}  {1,234}  3
STYLE = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|[fhm]box|boxed|boldsymbol|bm|emph)"
STYLED = (rf"{STYLE}\s*+\{{([^{{}}]*+)\}}", r"\1")
MEANINGS = [  # (pattern, what it means), one after the other
    (r"[^\D0-9]", lambda digit: str(int(digit[0]))),  # digits of other scripts
    ("[！-～]", lambda char: chr(ord(char[0]) - 0xFEE0)),  # full-width ASCII
    ("[\u2010-\u2013\u2212\u02d7\u2796\ufe63]", "-"),
    ("[\u00a0\u2005-\u2008\u200a\u202f]", THIN),  # no-break and thin spaces
    ("[\xad\u061c\u200b-\u200f\u2060\ufeff]", ""),  # invisible characters
    ("[\xa2-\xa5\u058f\u060b\u09f2\u09f3\u0e3f\u17db\u20a0-\u20cf\ufdfc\uffe0-\uffe6]", "$"),
    ("[٫。]", "."),
    ("٬", ","),
    ("[⁄∕]", "/"),
    ("’", "'"),
    ("[“”]", '"'),
    (r"\{,\}|,\\!\s*+", ","),  # 1{,}234  1,\!234
    (r"\\(?:[,;: ]|thinspace(?![a-zA-Z]))|~(?=[\\a-zA-Z])", THIN),  # 1\,234  5~\text{cm}
    (r"\\(?:q?quad|displaystyle|bf)(?![a-zA-Z])|\\[()\[\]]", " "),  # \(...\)
    (r"\\(?:left|right|[bB]igg?[lr]?)(?=[()\[\]])", ""),
    (r"\\([$%&])", r"\1"),
    (r"\$([^$]*+)\$(?!\d)", r" \1 "),  # $...$, not the money of $5 and $6
    (r"\*\*([^*]*+)\*\*", r" \1 "),
    STYLED,
    STYLED,  # one in another
    (r"([-+])\{\s*+([^{}]*+)\}", r"\1\2"),  # -{5}
    (r"\^\s?(?:\\circ|\{\\circ\})", "°"),
    (rf"([-+]?)\\[cdt]?frac{GAP}{ARGUMENT}{GAP}{ARGUMENT}", r" \1\2\3/\4\5 "),
]


def plain(text):
    r"""LaTeX and Unicode as plain text: \text{−5} is -5, 2\frac{2}{3} is 2 2/3."""
    for pattern, meaning in MEANINGS:
        text = re.sub(pattern, meaning, text)
    return text


def bare(text):
    """Plain text without what means nothing around the whole. (20,100) is a pair: it stays."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("$").removeprefix("**").removesuffix("**")
        ends = text[:1] + text[-1:]
        brackets = ends in ("()", "[]", "{}") and "," not in text
        if brackets or ends in ("''", '""', "``", "**", "__"):
            text = text[1:-1]
    return text


# ---- 3. the number ------------------------------------------------------------------------------

CODE = r"(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|CHF|[A-Z]{1,2}(?=\$)|Rs\.?)"
WHOLE = rf"(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})++|(?:{THIN}\d{{3}})++)|\d++)"
DECIMAL = rf"(?P<decimal>(?:{WHOLE}(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d{{1,3}}(?!\d))?)"
MIXED = rf"(?P<mixed>{WHOLE})[ \t{THIN}]++(?=\d{{1,2}}{GAP}/{GAP}\d{{1,3}}(?!\d))"  # not 2 100/3
FRACTION = rf"(?:{MIXED})?+(?P<top>{WHOLE}){GAP}/{GAP}(?P<bottom>{WHOLE})"
FORM = re.compile(  # x = -$1,234.5% eggs, but not 0xFF
    rf"(?:[a-zA-Z]?{GAP}={GAP})?\$?(?P<sign>[-+]?){GAP}(?:{CODE}{GAP})?\$?{GAP}"
    rf"(?!0[xXbBoO])(?:{FRACTION}|{DECIMAL})(?:{GAP}%)?(?P<unit>.*)",
    re.DOTALL,
)


def number(text):
    """The Fraction that all of a plain text stands for, or None."""
    if len(text) > LONGEST:
        return None
    text = bare(re.sub("[.,;:]$", "", bare(text)))
    form = FORM.fullmatch(text)
    if form is None or not is_unit(form["unit"]):
        return None
    part = {name: re.sub(f"[,{THIN}]", "", group) for name, group in form.groupdict("0").items()}
    size = Fraction(part["decimal"])
    if form["top"]:
        whole, top, bottom = int(part["mixed"]), int(part["top"]), int(part["bottom"])
        if bottom == 0 or (form["mixed"] and top >= bottom):
            return None
        size = whole + Fraction(top, bottom)
    return -size if form["sign"] == "-" else size


# Units of one or two letters or without a vowel, and little words; others are read as they come.
LENGTH = "mm|cm|dm|km|m|in|inch|inches|ft|foot|feet|yd|yards?|mi|miles?|[a-z]*met(?:er|re)s?|units?"
SHORT = (
    "g|gm|kgs?|mg|l|L|ml|mL|cl|lbs?|oz|qt|pt|sq|s|ms|secs?|mins?|h|hrs?|days?|[ap]m|[ap]\\.m|mph|kph"
    "|k?Hz|kWh?|[KMGT]B|pcs|°|°C|°F|st|nd|rd|th|[A-Z]+s|of|in|at|on|to|by|is|as|it"
)
LISTED = re.compile(rf"(?:{LENGTH})(?:[²³]|\^[23]|\^\{{[23]\}})?|(?:{SHORT})\.?|{CODE}")
LETTER = "[a-zà-öø-ɏ]"  # only Latin ones: of other languages no words that scale are known here
NUMBER_WORD = (  # makes another number of the one beside it
    "(?:(?:hundred|thousand|million|billion|trillion|milliard|lakh|crore|dozen|squared|cubed)[a-z]*"
    "|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s?|half|halves|mil|mille|[bmt]n|grand"
    "|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|twenty|thirty|forty"
    "|fifty|sixty|seventy|eighty|ninety|minus|negative|point|pi|sqrt|root|log|ln|sin|cos|tan|mod)"
)
WORD = re.compile(  # has three letters in a row and a vowel, or an &
    rf"(?!(?:{NUMBER_WORD}|and|or|plus)\Z)(?=.*{LETTER}{{3}}|.*&)(?=.*[aeiouà-ɏ&])"
    rf"{LETTER}+(?:[-&']{LETTER}+)*'?",
    re.IGNORECASE,
)


def is_unit(text):
    """Whether the text after a number is nothing, or words that leave its value as it is."""
    words = re.split(r"\s*/\s*|\s+", re.sub(r"\(\s*(.+)\)", r"\1", text).strip())
    if words[0] == "":  # nothing, or /hour
        words = words[1:]
    elif text[0].isalpha() and len(words[0]) < 4 and not LISTED.fullmatch(words[0]):  # 2abc
        return False
    return all(LISTED.fullmatch(word) or WORD.fullmatch(word) for word in words)


# ---- lenient ------------------------------------------------------------------------------------

JOINED = r"(?<=\d\s)(?:and|plus|times|over)\s++(?![b-z])"  # 2 and 1/2
CUT = re.compile(
    rf"{LINE_END}|#++|<<[^<>]*+>>|</?\w++>|(?<![!<>=:])=(?![=>])"
    rf"|(?<!\S)[(\"'*_]*+(?!(?:{NUMBER_WORD}|{CODE})\b|{JOINED})"  # a word
    rf"(?:{LETTER}{{2,}}+(?:[-']{LETTER}++)*+|a)[)\"'*_.,:;!?]*+(?!\S)",
    re.IGNORECASE,
)


def last_number(text, truncated):
    """The last number that stands free in the text, or None."""
    text = plain(text)
    if truncated:  # the last word may have been cut, and a number before it may go on
        text = text.removesuffix(re.split(r"\s", text)[-1])
    pieces = CUT.split(text)
    for piece in reversed(pieces[:-1] if truncated else pieces):
        is_rest = re.match(r"\s*[-+]\s|\D*\Z", piece)  # eggs - 5, or no digit at all
        if not is_rest and (found := number(piece)) is not None:
            return found
    return None
