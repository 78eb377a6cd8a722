r"""Rewards for problems whose answer is one number: GSM8K, and data in its format.

Answers are compared as exact `Fraction`s: 18.00 equals 18, and 15 is not 5. Training teaches the
policy to exploit the reward. So nothing in a completion is evaluated or raises an exception, and
the time is linear in its length.

Where the answer is looked for (strict):
- after the last `####`, up to the end of that line; more than four hashes are one marker;
- if there is no `####`: in the last `\boxed{...}` with balanced braces, which may span lines.
The first numeral there decides. If it cannot be read, the answer is None: nothing else is tried.
Lenient: the strict answer, else the last readable numeral of the text's last 100,000 characters.
Truncated (no EOS): the marker's line needs its line end, the box its closing brace, and a lenient
numeral needs a line end or a whole word after it. What is cut might have gone on.

A numeral is read whole or not at all. Read are:
- decimals             72  .5  1,234.5  1e-3
- groups of thousands  1,234  1{,}234  1,\!234; 12 000 with a no-break, thin or LaTeX space
- fractions            3/4  \frac{3}{4}  \dfrac34  \frac{-3}{4}, of two whole numbers
- mixed numbers        2 2/3  2\frac{2}{3}
- signs                +5  -5  -{5}, with any Unicode minus or hyphen
- currencies           $5  -$5  $-5  USD18
- units                18kg  18 eggs  $5/hour  50% (is 50)  90° (is 90)
- digits               of any script; the Arabic separators
So 84/2 earns what 42 earns. That is our choice: its value is exact, fractions are written so, and
no longer calculation is read.

None, because more belongs to the number:
- mathematics          \sqrt{51}  3\pi  2x  x15  x^2  5!  101_2  5²  2½
- repeating digits     0.333...  0.\overline{3}
- words that scale     5 million  5k  5万
- part of a whole      a calculation, a power, a date, a ratio 3:4, a range 3-5, 1.5 \times 10^3
- not one value        ±5  x ≥ 5

None, because it is ambiguous or too large:
- separators           12 000 with a plain space, 12,34  1.234,5  1_000  1'000
- signs                - 5  --5  GPT-4  -(5)  negative 5
- fractions            a mixed number whose fraction is not below 1, a zero denominator
- size                 an exponent of over three digits, more than 100 digits

`=` ends a numeral: 16 - 3 = 13 holds an unreadable numeral, then 13. Words do not matter: "at
least 5" is 5. Nor does < or > without spaces, because <b>5</b> and ->5 have them.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import islice

MARKER = "####"
BOX = r"\boxed{"
LENIENT_WINDOW = 100_000  # characters

# ---- the rewards --------------------------------------------------------------------------------


def correct(completion: str, answer: str, truncated: bool = False) -> float:
    """1.0 if the completion's strict answer equals `answer`, else 0.0: the default reward.

    Raises ValueError if `answer` is not one number: wrong data, not a wrong completion.
    """
    truth = true_answer(answer)
    return float(extract_answer(completion, truncated=truncated) == truth)


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, added to the reward; lengths in tokens.

    0 while |o| <= L_max - L_cache; (L_max - L_cache - |o|) / L_cache up to L_max; -1 beyond. A
    cache of 0 is a plain cut at L_max. Raises ValueError unless 0 <= cache <= max_length.
    """
    if not 0 <= cache <= max_length:
        got = f"got {cache} and {max_length}"
        raise ValueError(f"overlong_penalty: cache must lie in 0..max_length, {got}")
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return (max_length - cache - length) / cache
    return -1.0


def extract_answer(text: str, lenient: bool = False, truncated: bool = False) -> Fraction | None:
    """The answer that `text` gives, by the rules above, or None. Raises nothing; linear time.

    truncated: the completion was cut at the length limit, before its EOS.
    """
    place = answer_place(text, truncated)
    answer = None if place is None else first_number(place)
    if answer is None and lenient:
        answer = last_number(text, truncated)
    return answer


def true_answer(answer: str) -> Fraction:
    """The number in a problem's answer: GSM8K's field (it ends in `#### 72`), or 72, $1,234, 7 cm.

    Raises ValueError unless the place of the answer holds exactly one numeral, which can be read.
    """
    marked = MARKER in answer or BOX in answer
    place = answer_place(answer) if marked else answer
    truth = None if place is None else only_number(place)
    if truth is None:
        shown = answer if len(answer) <= 80 else answer[:40] + " ... " + answer[-40:]
        expected = "expected one number, '#### 72' at its end or '72'"
        raise ValueError(f"no number to compare with in the answer {shown!r}: {expected}")
    return truth


# ---- where the answer is ------------------------------------------------------------------------

LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def answer_place(text, truncated=False):
    """The rest of the last marker's line, or what the last box holds; None if missing or cut."""
    marker = text.rfind(MARKER)
    if marker >= 0:
        start = marker + len(MARKER)
        end = LINE_END.search(text, start)
        if end is None:
            return None if truncated else text[start:]
        return text[start : end.start()]
    box = text.rfind(BOX)
    depth = 0
    for brace in re.finditer("[{}]", text[box:] if box >= 0 else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[box + len(BOX) : box + brace.start()]
    return None


def first_number(place):
    """The first numeral of the place, or None if there is none or it cannot be read."""
    found = list(islice(numerals(plain(place)), 2))
    if not found:
        return None
    right = found[1] if len(found) == 2 else None
    return read(found[0], right=right)


def only_number(place):
    """The numeral of the place, or None if it has none or more, or if it may be an inequality."""
    found = list(islice(numerals(plain(place)), 2))
    if len(found) != 1 or "<" in place or ">" in place:
        return None
    return read(found[0])


def last_number(text, truncated=False):
    """The last readable numeral of the text, or None; if truncated, one that cannot be cut."""
    window = plain(text[-LENIENT_WINDOW:])
    found = list(numerals(window))
    if len(text) > LENIENT_WINDOW:
        found = found[1:]  # the first may be the end of a longer numeral
    whole_lines = max((match.end() for match in LINE_END.finditer(window)), default=0)
    lefts, rights = [None, *found], [*found[1:], None]
    for match, left, right in reversed(list(zip(found, lefts, rights, strict=False))):
        end = match.end()
        if truncated and end >= whole_lines and not A_WORD.match(window, end):
            continue
        number = read(match, left, right)
        if number is not None:
            return number
    return None


# ---- the grammar of one numeral -----------------------------------------------------------------
# \d, int and Fraction know the digits of every script. A quantifier with + after it (*+, ++, {}+)
# never gives characters back: that keeps the time linear.

THIN = "\u2009"  # a space that may group digits; `plain` turns no-break and thin spaces into it
SPACES = f" \t{THIN}"  # within a line
GAP = rf"[{SPACES}]*+"  # spaces or nothing
SPACE = rf"[{SPACES}]++"  # at least one


def any_of(*patterns):
    """A pattern that matches any of `patterns`; the first that fits decides."""
    return "(?:" + "|".join(patterns) + ")"


COMMAS = r"(?:,\d{3}){1,33}+"  # ,234,567; at most 33 groups, so that a failed match costs little
THINS = rf"(?:{THIN}\d{{3}}){{1,33}}+"  # the same with thin spaces
GROUPED = rf"\d{{1,3}}{any_of(COMMAS, THINS)}(?!\d)"  # 1,234
WHOLE = any_of(GROUPED, r"\d++")  # 1,234  1234
EXPONENT = r"[eE][-+]?\d{1,3}(?!\d)"  # e-3
DIGIT_FIRST = rf"{WHOLE}(?:\.\d++)?"  # 1,234  1,234.5
POINT_FIRST = r"(?<![\w.])\.\d++"  # .5, but not the end of x.5 or 1..5
DECIMAL = rf"{any_of(DIGIT_FIRST, POINT_FIRST)}(?:{EXPONENT})?"  # 1,234.5e-3
FRACTION = rf"(?P<top>{WHOLE})/(?P<bottom>{WHOLE})"  # 3/4
PROPER = r"(?P<part>\d{1,2})/(?P<of>\d{1,3})(?!\d)"  # 2/3
MIXED = rf"(?P<mixed>{WHOLE}){SPACE}{PROPER}"  # 2 2/3
# Found like numerals, but never read: they have no digits.
UNREAD = "²³¹¼-¾⁰-₉⅐-↋①-⒛"
NUMERAL = re.compile(any_of(FRACTION, MIXED, rf"(?P<decimal>{DECIMAL})", f"[{UNREAD}]"))
FIRST = re.compile(rf"[\d{UNREAD}]")  # one class of characters: `search` is fast


def numerals(text):
    """Matches of everything that may be a number, in order. `text` is plain."""
    end = 0
    while first := FIRST.search(text, end):
        start = first.start()
        with_point = NUMERAL.match(text, start - 1) if start > end else None  # .5
        match = with_point or NUMERAL.match(text, start)
        end = match.end()
        yield match


def value(match):
    """The Fraction of a match of NUMERAL by itself, or None. At most 100 digits: cheap."""
    if len(match[0]) > 250 or sum(map(str.isdecimal, match[0])) > 100:
        return None
    parts = {name: ungrouped(part) for name, part in match.groupdict().items() if part}
    if "decimal" in parts:
        return Fraction(parts["decimal"])
    if "top" in parts:
        return ratio(parts["top"], parts["bottom"])
    if "mixed" in parts:
        size = ratio(parts["part"], parts["of"])
        return None if size is None or size >= 1 else int(parts["mixed"]) + size
    return None


def ratio(top, bottom):
    return Fraction(int(top), int(bottom)) if int(bottom) else None


def ungrouped(digits):
    return digits.replace(",", "").replace(THIN, "")


# ---- plain text: one character for each meaning -------------------------------------------------

MEANINGS = {
    "-": "\u2010\u2011\u2012\u2013\u2212\u02d7\u2796\ufe63",  # hyphens, en dash, minus signs
    THIN: "\u00a0\u2005\u2006\u2007\u2008\u200a\u202f",  # no-break and thin spaces
    " ": "\u2000\u2001\u2002\u2003\u2004\u205f\u3000",  # wide spaces
    "": "\xad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\ufeff",  # invisible characters
    ".": "٫",
    ",": "٬",
    "/": "⁄∕",
    "'": "’",
    ":": "∶",
}
TABLE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
for meaning, characters in MEANINGS.items():
    TABLE.update(dict.fromkeys(map(ord, characters), meaning))

LATEX_SPACE = re.compile(r"\\(?:[,;: ]|thinspace(?![a-zA-Z]))")  # \,  \thinspace
BRACED_NUMBER = re.compile(rf"([-+])\{{{GAP}([\d.,]++){GAP}\}}")  # -{5}
TOP = rf"(?:\{{{GAP}(-?{WHOLE}){GAP}\}}|(\d))"  # {-12}  3
BOTTOM = rf"(?:\{{{GAP}({WHOLE}){GAP}\}}|(\d))"  # {4}  4
NO_MORE_DIGITS = rf"(?!{GAP}\.?\d)"
LATEX_FRACTION = re.compile(  # \frac{3}{4}  \dfrac34
    rf"(?<![.,'/])\\[dt]?frac{GAP}{TOP}{GAP}{BOTTOM}{NO_MORE_DIGITS}"
)


def plain(text):
    """Characters and LaTeX that mean a sign, a separator or a fraction become ASCII or THIN."""
    text = text.replace("{,}", ",").replace(r",\!", ",")
    text = LATEX_SPACE.sub(THIN, text)
    if not text.isascii():
        text = text.translate(TABLE)
    text = BRACED_NUMBER.sub(r"\1\2", text)
    return LATEX_FRACTION.sub(slashed, text)


def slashed(fraction):
    r"""\frac{3}{4} as 3/4, and after a digit with THIN before it: 2\frac{3}{4} is 2 3/4."""
    top = fraction[1] or fraction[2]
    bottom = fraction[3] or fraction[4]
    start = fraction.start()
    after_digit = start > 0 and fraction.string[start - 1].isdecimal()
    return f"{THIN if after_digit else ''}{top}/{bottom}"


# ---- a numeral among its neighbours -------------------------------------------------------------

CONTEXT = 40  # characters on either side that decide whether a numeral is whole


def read(match, left=None, right=None):
    """The Fraction a numeral stands for, None unless all of it is read; left, right: neighbours."""
    if (left and joined(left, match)) or (right and joined(match, right)):
        return None
    start = max(match.start() - CONTEXT, left.end() if left else 0)
    sign, before = signed(match.string[start : match.start()])
    after = match.string[match.end() : match.end() + CONTEXT]
    if sign == 0 or continued(before, match[0], after):
        return None
    size = value(match)
    return None if size is None else sign * size


TIGHT = re.compile(r"[^\w\s=<>]{0,4}|\.?[A-Za-z_]+[-+]?")  # 12/25/2023  5,6  3x4  1_000
SPACED = re.compile(
    any_of(
        rf"{GAP}(?:[-+*/^·]|\*\*){GAP}-?",  # 5 - 3  2 ** 10
        rf"{SPACE}[:xX%]{SPACE}",  # 3 : 4  3 x 4
        SPACE,  # 12 000
    )
)


def joined(left, right):
    """Whether two neighbouring numerals are parts of one thing: 5-3, 1.2.3, 12 000, 3x4."""
    gap = left.string[left.end() : right.start()]
    if TIGHT.fullmatch(gap):
        return True
    if gap.strip().lower() == "and":
        return "/" in right[0]  # 2 and 1/2
    if not SPACED.fullmatch(gap):
        return False
    if gap.strip() or THIN in gap or "/" in right[0] or not right[0][-1].isdecimal():
        return True
    last_group = left[0].rpartition(",")[2]
    return len(last_group) <= 3 and re.match(r"\d{3}(?!\d)", right[0]) is not None  # 12 000


# What makes a sign an operator or a hyphen: GPT-4  a+1  --5, and after a variable x -5
BEFORE_SIGN = re.compile(rf"(?:[\w)\]}}|+-]|(?<!\w)[b-zB-HJ-Z]{SPACE})\Z")


def signed(before):
    """(1, -1, or 0 for a sign that may not be the numeral's; what is before sign and currency)."""
    bare = before.rstrip(SPACES)
    if bare and unicodedata.category(bare[-1]) == "Sc":
        before = bare[:-1].removesuffix("\\")
    if before[-1:] not in ("-", "+"):
        return 1, before
    sign = -1 if before[-1] == "-" else 1
    before = before[:-1]
    return (0 if BEFORE_SIGN.search(before) else sign), before


# ---- what stands beside a numeral and belongs to it ---------------------------------------------

WORD_END = r"(?![^\W_])"  # no letter and no digit follows
WORD_START = r"(?<![^\W_])"
FORMAT = r"(?:text\w*|math[a-z]+|mbox|boxed|q?quad|degree|end|approx|implies|Rightarrow)"
COMMAND = rf"\\(?!{FORMAT}(?![a-zA-Z]))[a-zA-Z]+"  # LaTeX that does more than format: \sqrt
VARIABLE = rf"[eijnxyzEIJNXYZ]{WORD_END}"
OPERAND = any_of(r"[({√]", r"\\\(", COMMAND, VARIABLE)  # what may follow an operator
SCALE = rf"(?:(?i:(?:hundred|thousand|million|billion|trillion)s?|bn|mn)|[kKM]){WORD_END}"
# Symbols that do not belong to a numeral, or are handled below.
HARMLESS = "+<=>|~≈→⇒⟹∴∵"

BEFORE = any_of(
    rf"[/^·]{GAP}",  # x/5  x^5
    r"[^\W_]_+",  # x_5
    rf"[^\W_]\*{GAP}",  # x*5
    rf"\S{SPACE}\*{SPACE}",  # x * 5
    rf"[-+]{SPACE}",  # - 5
    r"-[^\w\s>]{1,3}",  # -(5)
    rf"-{GAP}\\\w+{GAP}[{{(]?{GAP}",  # -\text{5}
    rf"(?<!\w)-[^\W\d_]{{1,4}}\.?{GAP}",  # -USD 5
    rf"{COMMAND}{GAP}[{{(\[]?{GAP}",  # \sqrt{5}
    rf"[\]}}]{GAP}\{{",  # \frac{x}{5}
    r"\w[(\[]",  # f(5)
    rf"\S{SPACE}[<>]=?{SPACE}",  # x > 5
    r"(?<!\w)(?:minus|negative|sqrt|log|ln)\W{0,3}",  # negative 5
    rf"{WORD_START}(?:pi|π){GAP}",  # pi 5
    rf"{WORD_START}{VARIABLE}",  # x5
)
AFTER = any_of(
    rf"{GAP}\^(?!\{{?\\circ)",  # 5^2, but not 90^\circ
    rf"{GAP}!",  # 5!
    r"_(?:[^\W_]|\{)",  # 5_2  5_{10}
    rf"{GAP}\+",  # 5+
    r"-(?![\w>])",  # 5-, but not 5-foot or 5->
    rf"{GAP}[-*/·]{GAP}{OPERAND}",  # 5/x
    r"\*[^\W_]",  # 5*x
    rf"\({OPERAND}",  # 5(x)
    r"\.\(",  # 0.(3)
    rf"[.,]?{GAP}{COMMAND}",  # 3\pi  0.\overline{3}
    rf"(?:[{SPACES}-]|\\(?:text|math)\w*\{{)*+{SCALE}",  # 5 million  5k
    rf"{SPACE}(?i:and{SPACE}a{SPACE}half)",  # 2 and a half
    rf"{GAP}(?:π|(?i:pi){WORD_END})",  # 3π
    r"[xX][0-9A-Fa-f]",  # 0xFF
    VARIABLE,  # 2x
    rf"{SPACE}[nxyz]{WORD_END}",  # 2 x
    rf"{SPACE}[<>]=?[ ]",  # 5 < x
)
BELONGS_BEFORE = re.compile(rf"{BEFORE}\Z", re.IGNORECASE)
BELONGS_AFTER = re.compile(AFTER)
A_WORD = re.compile(rf"{SPACE}(?!and\b)[^\W\d]+\s")  # after a numeral, shows that it is complete


def continued(before, numeral, after):
    """Whether what stands before or after a numeral belongs to it, so that it is not whole."""
    if symbol(before.rstrip(SPACES)[-1:]) or BELONGS_BEFORE.search(before):
        return True
    if before and unicodedata.category(before[-1]) == "Pd":  # an em dash is no minus
        return True
    letters = before[-1:] + after[:1]  # H2O
    if len(letters) == 2 and letters.isascii() and letters.isalpha():
        return True
    if "." in numeral and after.startswith(("..", "…")):  # 0.333...
        return True
    if after and unicodedata.category(after[0])[0] == "M":  # a bar over the last digit
        return True
    after = after.lstrip(")]}")
    return symbol(after.lstrip(SPACES)[:1]) or BELONGS_AFTER.match(after) is not None


def symbol(char):
    """Whether it is a mathematical symbol, or a number that has no digits (², 万)."""
    if not char or char.isdecimal():
        return False
    if char.isnumeric():
        return True
    return unicodedata.category(char) == "Sm" and char not in HARMLESS
