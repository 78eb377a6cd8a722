r"""Rewards for problems whose answer is one number: GSM8K and everything written in its format.

Answers are compared as exact `Fraction`s: 18.00 equals 18, and 15 is not 5. Training teaches the
policy to exploit the reward, so nothing in a completion is evaluated, raises, or costs more than
linear time.

Where the answer stands (strict):
- after the last `####`, up to the end of that line; more than four hashes are one marker.
- without any `####`: in the last `\boxed{...}`, braces balanced; it may span lines.
The first numeral there decides. If it cannot be read, there is no answer: nothing is tried next.
Lenient: the strict answer, else the last readable number of the text's last 100,000 characters.
In a truncated completion (no EOS) the marker's line needs its line end and the box its closing
brace; a lenient number needs a line end or a whole word after it.

A numeral is read whole or not at all.
- Read: 1,234.5  .5  1e-3; 12 000 with a no-break, thin or LaTeX space; 1{,}234  1,\!234; digits of
  any script, the Arabic separators; -5 with any Unicode minus or hyphen, -{5}, $5, -$5, $-5;
  USD18, 18kg, 18 eggs, $5/hour, 50% (50), 90° (90).
- Read: fractions of two whole numbers, 3/4 \frac{3}{4} \dfrac34 \frac{-3}{4}, and mixed numbers,
  2 2/3  2\frac{2}{3}. So 84/2 earns what 42 earns. That is our choice: the value is exact, it is
  how fractions are written, and no longer calculation is read.
- Not read, because more belongs to the number: \sqrt{51}, 3\pi, 2x, x15, x^2, 5!, 101_2, 5², 2½,
  0.333..., a bar over digits, 5 million, 5k, 5万; the parts of a calculation, a power, a date, a
  ratio 3:4, a range 3-5, 1.5 \times 10^3, ±5, x ≥ 5.
- Not read, because it is ambiguous: 12 000 with a plain space, 12,34  1.234,5  1_000  1'000,
  - 5, --5, GPT-4, -(5), negative 5, a mixed number whose fraction is not below 1.
- Not read: a zero denominator, an exponent over three digits, more than 100 digits.
- `=` ends a numeral: 16 - 3 = 13 holds an unreadable numeral, then 13. Words do not matter: "at
  least 5" is 5. Nor does < or > without spaces, since <b>5</b> and ->5 have them.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import islice

MARKER = "####"
BOX = r"\boxed{"
LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
LENIENT_WINDOW = 100_000  # characters
CONTEXT = 40  # characters on either side of a numeral that decide whether it is whole

# 1. Plain characters: those that mean an ASCII character become it, unbreakable spaces THIN.
THIN = "\u2009"
TABLE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms
TABLE.update(dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\u02d7\u2796\ufe63"), "-"))
TABLE.update(dict.fromkeys(map(ord, "\u00a0\u2005\u2006\u2007\u2008\u200a\u202f"), THIN))
TABLE.update(dict.fromkeys(map(ord, "\u2000\u2001\u2002\u2003\u2004\u205f\u3000"), " "))
TABLE.update(dict.fromkeys(map(ord, "\xad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")))
TABLE.update(str.maketrans("٫٬⁄∕’∶", ".,//':"))

# 2. The number by itself. \d and Fraction know every script's digits. Groups are at most 33, so
# that a failed attempt costs little.
SPACES = f" \t{THIN}"  # within a line
H = rf"[{SPACES}]*+"
S = rf"[{SPACES}]++"
GROUPS = rf"(?:(?:,\d{{3}}){{1,33}}+|(?:{THIN}\d{{3}}){{1,33}}+)"
WHOLE = rf"(?:\d{{1,3}}{GROUPS}(?!\d)|\d++)"
DECIMAL = rf"(?:{WHOLE}(?:\.\d++)?|(?<![\w.])\.\d++)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
OTHER = "²³¹¼-¾⁰-₉⅐-↋①-⒛"  # numbers that have no digits: never read
NUMERAL = re.compile(
    rf"(?P<top>{WHOLE})/(?P<bottom>{WHOLE})"
    rf"|(?P<mixed>{WHOLE}){S}(?P<part>\d{{1,2}})/(?P<of>\d{{1,3}})(?!\d)"
    rf"|(?P<decimal>{DECIMAL})"
    rf"|[{OTHER}]"
)
FIRST = re.compile(rf"[\d{OTHER}]")  # a plain class of characters, for which re searches fast
TOP, BOTTOM = (rf"(?:\{{{H}({sign}{WHOLE}){H}\}}|(\d))" for sign in ("-?", ""))
LATEX_FRACTION = re.compile(rf"(?<![.,'/])\\[dt]?frac{H}{TOP}{H}{BOTTOM}(?!{H}\.?\d)")

# 3. What stands beside a numeral and belongs to it.
FORMAT = r"(?:text\w*|math[a-z]+|mbox|boxed|q?quad|degree|end|approx|implies|Rightarrow)"
COMMAND = rf"\\(?!{FORMAT}(?![a-zA-Z]))[a-zA-Z]+"  # one that does more than format
VARIABLE = r"[eijnxyzEIJNXYZ](?![^\W_])"
OPERAND = rf"(?:[({{√]|\\\(|{COMMAND}|{VARIABLE})"
NOT_MATHS = "+<=>|~≈→⇒⟹∴∵"  # mathematical by category, but harmless or handled below
BEFORE = re.compile(
    rf"""(?:
      [/^·]{H} | [^\W_]_+ | [^\W_]\*{H} | \S{S}\*{S}    # x/5  x_5  x*5  x * 5
    | [-+]{S} | -[^\w\s>]{{1,3}} | -{H}\\\w+{H}[{{(]?{H}  # - 5  -(5)  -\text{{5}}
    | (?<!\w)-[^\W\d_]{{1,4}}\.?{H}                     # -USD 5
    | {COMMAND}{H}[{{(\[]?{H} | [\]}}]{H}\{{ | \w[(\[]  # \sqrt{{5}}  \frac{{x}}{{5}}  f(5)
    | \S{S}[<>]=?{S}                                    # x > 5
    | (?<!\w)(?:minus|negative|sqrt|log|ln)\W{{0,3}}
    | (?<![^\W_])(?:pi|π){H} | (?<![^\W_]){VARIABLE}    # pi 5  x5
    )\Z""",
    re.VERBOSE | re.IGNORECASE,
)
BEFORE_SIGN = re.compile(rf"(?:[\w)\]}}|+-]|(?<!\w)[b-zB-HJ-Z]{S})\Z")  # GPT-4  a+1  --5  x -5
SCALE = r"(?:(?:hundred|thousand|million|billion|trillion)s?|[kK]|bn|mn|M)(?![^\W_])"
AFTER = re.compile(
    rf"""(?:
      {H}\^(?!\{{?\\circ) | {H}! | _(?:[^\W_]|\{{)              # 5^2  5!  5_2  5_{{10}}
    | {H}\+ | -(?![\w>]) | {H}[-*/·]{H}{OPERAND}              # 5+  5-  5/x
    | \*[^\W_] | \({OPERAND} | \.\(                           # 5*x  5(x)  0.(3)
    | [.,]?{H}{COMMAND}                                       # 3\pi  0.\overline{{3}}
    | (?:[{SPACES}-]|\\(?:text|math)\w*\{{)*+{SCALE} | {S}and{S}a{S}half
    | {H}(?:π|pi(?![^\W_])) | {VARIABLE} | {S}[nxyz](?![^\W_])
    | {S}[<>]=?[ ]
    )""",
    re.VERBOSE,
)
TIGHT = re.compile(r"[^\w\s=<>]{0,4}|\.?[A-Za-z_]+[-+]?")  # 12/25/2023  5,6  3x4  1_000
SPACED = re.compile(rf"{H}(?:[-+*/^·]|\*\*){H}-?|{S}[:xX%]{S}|{S}")  # 5 - 3  3 : 4  12 000
A_WORD = re.compile(rf"{S}(?!and\b)[^\W\d]+\s")


def extract_answer(text: str, lenient: bool = False, truncated: bool = False) -> Fraction | None:
    """The answer that `text` gives, by the rules above, or None. Raises nothing; linear time.

    truncated: the completion was cut at the length limit, before its EOS.
    """
    place = answer_place(text, truncated)
    answer = None if place is None else first_number(place)
    if answer is None and lenient:
        answer = last_number(text, truncated)
    return answer


def correct(completion: str, answer: str, truncated: bool = False) -> float:
    """1.0 if the completion's strict answer equals `answer`, else 0.0: the default reward.

    Raises ValueError if `answer` is not one number: wrong data, not a wrong completion.
    """
    truth = true_answer(answer)
    return float(extract_answer(completion, truncated=truncated) == truth)


def true_answer(answer: str) -> Fraction:
    """The number in a problem's answer: GSM8K's field (it ends in `#### 72`), or 72, $1,234, 7 cm.

    Raises ValueError unless the place of the answer holds exactly one numeral, which can be read.
    """
    marked = MARKER in answer or BOX in answer
    place = answer_place(answer) if marked else answer
    found = [] if place is None else list(islice(numerals(plain(place)), 2))
    truth = read(found[0]) if len(found) == 1 else None
    if truth is None or re.search("[<>]", place):
        shown = answer if len(answer) <= 80 else answer[:40] + " ... " + answer[-40:]
        raise ValueError(f"no number to compare with in the answer {shown!r}: "
                         "expected one number, '#### 72' at its end or '72'")  # fmt: skip
    return truth


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, added to the reward; lengths in tokens.

    0 while |o| <= L_max - L_cache; (L_max - L_cache - |o|) / L_cache up to L_max; -1 beyond. A
    cache of 0 is a plain cut at L_max. Raises ValueError unless 0 <= cache <= max_length.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(
            f"overlong_penalty: cache must lie in 0..max_length, got {cache} and {max_length}"
        )
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return (max_length - cache - length) / cache
    return -1.0


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
    found = [*islice(numerals(plain(place)), 2), None, None]
    return found[0] and read(found[0], right=found[1])


def last_number(text, truncated=False):
    """The last readable numeral of the text, or None; if truncated, one that cannot be cut."""
    window = plain(text[-LENIENT_WINDOW:])
    found = [None, *numerals(window), None]
    if len(text) > LENIENT_WINDOW:  # its first numeral may be the end of a longer one
        found[:2] = [None]
    whole_lines = max((match.end() for match in LINE_END.finditer(window)), default=0)
    for i in range(len(found) - 2, 0, -1):
        end = found[i].end()
        if truncated and end >= whole_lines and not A_WORD.match(window, end):
            continue
        number = read(found[i], found[i - 1], found[i + 1])
        if number is not None:
            return number
    return None


def plain(text):
    """Characters and LaTeX that mean a sign, a separator or a fraction become ASCII or THIN."""
    text = text.replace("{,}", ",").replace(r",\!", ",")
    text = re.sub(r"\\(?:[,;: ]|thinspace(?![a-zA-Z]))", THIN, text)
    text = text if text.isascii() else text.translate(TABLE)
    text = re.sub(rf"([-+])\{{{H}([\d.,]++){H}\}}", r"\1\2", text)  # -{5}
    return LATEX_FRACTION.sub(slashed, text)


def slashed(fraction):
    r"""\frac{3}{4} as 3/4, and after a digit with THIN before it: 2\frac{3}{4} is 2 3/4."""
    top, bottom = fraction[1] or fraction[2], fraction[3] or fraction[4]
    after_digit = fraction.start() and fraction.string[fraction.start() - 1].isdecimal()
    return f"{THIN if after_digit else ''}{top}/{bottom}"


def numerals(text):
    """Matches of everything that may be a number, in order. `text` is plain."""
    end = 0
    while first := FIRST.search(text, end):
        start = first.start()
        with_point = NUMERAL.match(text, start - 1) if start > end else None  # .5
        match = with_point or NUMERAL.match(text, start)
        end = match.end()
        yield match


def joined(left, right):
    """Whether two neighbouring numerals are parts of one thing: 5-3, 1.2.3, 12 000, 3x4."""
    gap = left.string[left.end() : right.start()]
    if TIGHT.fullmatch(gap):
        return True
    if gap.strip() == "and":
        return "/" in right[0]  # 2 and 1/2
    if not SPACED.fullmatch(gap):
        return False
    if gap.strip() or THIN in gap or "/" in right[0] or not right[0][-1].isdecimal():
        return True
    return len(left[0]) <= 3 and re.match(r"\d{3}(?!\d)", right[0]) is not None  # 12 000


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


def symbol(char):
    """Whether it is a mathematical symbol, or a number that has no digits (², 万)."""
    if not char or char.isdecimal():
        return False
    return char.isnumeric() or (unicodedata.category(char) == "Sm" and char not in NOT_MATHS)


def continued(before, numeral, after):
    """Whether what stands before or after a numeral belongs to it, so that it is not whole."""
    if symbol(before.rstrip(SPACES)[-1:]) or BEFORE.search(before):
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
    return symbol(after.lstrip(SPACES)[:1]) or AFTER.match(after) is not None


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


def value(match):
    """The Fraction of a match of NUMERAL by itself, or None. At most 100 digits: cheap."""
    if len(match[0]) > 250 or sum(map(str.isdecimal, match[0])) > 100:
        return None
    parts = {name: ungrouped(part) for name, part in match.groupdict().items() if part}
    if "decimal" in parts:
        return Fraction(parts["decimal"])
    if "mixed" in parts:
        size = ratio(parts["part"], parts["of"])
        return None if size is None or size >= 1 else int(parts["mixed"]) + size
    return ratio(parts["top"], parts["bottom"]) if "top" in parts else None


def ratio(top, bottom):
    return Fraction(int(top), int(bottom)) if int(bottom) else None


def ungrouped(digits):
    return digits.replace(",", "").replace(THIN, "")
