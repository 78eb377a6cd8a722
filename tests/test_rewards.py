"""rewards.py: a table of what is read and one of what is not, its parts, then attacks.

The attacks are long texts of one repeated piece, and random texts that hypothesis makes.
"""

import json
import math
import random
import re
import time
from fractions import Fraction

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    correct,
    equal,
    extract_answer,
    group_overlong_penalty,
    overlong_penalty,
    true_answer,
)

# Each form of the docstring, alone: text → number, two spaces between them.
READ = {
    "sign": r"""
        0 → 0  -0 → 0  +7 → 7  -7 → -7  −7 → -7  –7 → -7  －7 → -7  -\text{5} → -5
        -\mathrm{5} → -5  -{5} → -5  -{ 1,234 } → -1234
    """,
    "currency": r"""
        $18 → 18  $ 18 → 18  \$18 → 18  -$5 → -5  $-5 → -5  -\$5 → -5  −$5 → -5  $-$5 → -5
        €-5 → -5  -\$ .5 → -1/2  $.50 → 1/2  €5 → 5  5€ → 5  5 € → 5  £5 → 5  ¥5 → 5  ₹5 → 5
        ₽5 → 5  ₩5 → 5  ₪5 → 5  ₫5 → 5  ₴5 → 5  ₺5 → 5  -₿5 → -5  ฿5 → 5  5¢ → 5  ＄5 → 5
        €1,234.50 → 2469/2  US$18 → 18  HK$18 → 18  USD18 → 18  EUR 18 → 18  -USD 5 → -5
        18 CHF → 18  18 dollars → 18  Rs.500 → 500  Rs.1,234.50 → 2469/2  -Rs. 5 → -5  x = $+5 → 5
    """,
    "whole number": "72 → 72  007 → 7  1234567 → 1234567  ７２ → 72  ٧٢ → 72  ७२ → 72  1２ → 12",
    "groups of three": r"""
        1,234 → 1234  12,345,678 → 12345678  1{,}234 → 1234  10,\!000 → 10000  32,\! 349 → 32349
        11,\! 111,\! 100 → 11111100  1\,234 → 1234  12\;000 → 12000  12\ 000 → 12000
        ١٬٢٣٤٫٥ → 2469/2
    """,
    "decimal": """
        18.5 → 37/2  18.00 → 18  0.1 → 1/10  .5 → 1/2  -.5 → -1/2  1,234.5 → 2469/2  1e5 → 100000
        1.5E-3 → 3/2000  2e+2 → 200  .5e1 → 5  1,000e2 → 100000  1e-05 → 1/100000
    """,
    "fraction": r"""
        3/4 → 3/4  -3/4 → -3/4  6/8 → 3/4  1,000/10 → 100  0/5 → 0  84/2 → 42  3 / 4 → 3/4
        3⁄4 → 3/4  3∕4 → 3/4  5/05 → 1  \frac{3}{4} → 3/4  \dfrac{3}{4} → 3/4  \tfrac{3}{4} → 3/4
        \cfrac{1}{3} → 1/3  \frac34 → 3/4  \tfrac3{4} → 3/4  \frac{3}4 → 3/4  \frac 34 → 3/4
        \frac { 3 } { 4 } → 3/4  \frac{-12}{4} → -3  -\frac{3}{4} → -3/4  \frac{1,000}{3} → 1000/3
    """,
    "mixed number": r"""
        2 2/3 → 8/3  -2 2/3 → -8/3  1,000 1/2 → 2001/2  2\frac{2}{3} → 8/3  2 \dfrac23 → 8/3
        -2\frac23 → -8/3  ٢ ١/٢ → 5/2  2\,\frac12 → 5/2  2 2 / 3 → 8/3
    """,
    "percent": r"50% → 50  50\% → 50  50 % → 50  3/4% → 3/4  50% off → 50  50 percent → 50",
    "unit": r"""
        18 eggs → 18  5eggs → 5  18kg → 18  18 kg → 18  5 m → 5  5th → 5  762 M&Ms → 762
        5 años → 5  2 AT&T shares → 2  32 (CDs) → 32  9 (apples) → 9  5 t-shirts → 5  5 o'clock → 5
        5 o’clock → 5  $5/hour → 5  60 km/h → 60  70 miles per hour → 70  5 times → 5  5 p.m. → 5
        9 sq. ft. → 9  3/4 cup → 3/4  16 GB → 16  25m² → 25  18cm³ → 18  25 cm² → 25  25 cm^2 → 25
        25m^{2} → 25  45 units^2 → 45  9 inches² → 9  144\mbox{ m}^3 → 144  9 square feet → 9
        90° → 90  20°C → 20  90^\circ → 90  90^{\circ} → 90  5\text{ cm} → 5  5\,\text{kg} → 5
        0.4 \mathrm{~km}^{2} → 2/5  5\quad\text{cm} → 5  5~\text{cm} → 5  $5$ cans → 5
        20 $cm^{2}$ → 20
    """,
    "strip": r"""
        18. → 18  $18. → 18  18, → 18  18; → 18  18: → 18  **18.** → 18  **72** → 72  72** → 72
        **-5** → -5  **5** eggs → 5  **$5**. → 5  '72' → 72  "72" → 72  “72” → 72  *5* → 5  _5_ → 5
        `5` → 5  $5$ → 5  $$5$$ → 5  $-5$ → -5  $\$5$ → 5  \(5\) → 5  \[5\] → 5  (5) → 5  [5] → 5
        {5} → 5  {-5} → -5  ((5)) → 5  {(3/4)} → 3/4  \left(5\right) → 5  \big(5\big) → 5
        \left[ 5 \right] → 5  \left(\frac{1}{3}\right) → 1/3  \text{5} → 5  \mathbf{-5} → -5
        \textbf{\text{5}} → 5  \mbox{5 cm} → 5  \boxed{5} → 5  \fbox{5} → 5  {\bf 5} → 5
        \displaystyle\frac12 → 1/2  x = -5 → -5  x=-5 → -5  $x=\frac{3}{2}$ → 3/2  \mathrm{r}=5 → 5
        = 5 → 5
    """,
}
# The same, but in a longer text the sign is a hyphen, and the slash or bracket the sentence's.
ALONE = r"""
    - 5 → -5  + 5 → 5  - $5 → -5  - \frac { 2 } { 9 } → -2/9  x = - 3 → -3  5 / hour → 5
    (5 eggs) → 5  57 ( science books) → 57  -**5** → -5
"""
ESCAPED = [  # spaces that group digits, dashes, characters without a width, and sizes
    *[("12\u00a0000", 12000), ("12\u2009000", 12000), ("1\u202f234\u202f567", 1234567)],
    *[("-12\u00a0000.5", "-24001/2"), ("2\u00a01/2", "5/2"), ("1\u200b2", 12), ("\u200e-5", -5)],
    *[(f"{dash}5", -5) for dash in "\u2010\u2011\u2012\u02d7\u2796\ufe63"],
    *[("9" * 250, int("9" * 250)), ("1e999", 10**999), ("1e-999", Fraction(1, 10**999))],
]


def cases(table):
    """The entries of a table: parts with two spaces or a line end between them."""
    return re.split(r"\s{2,}", table.strip())


def pairs(table):
    return [tuple(case.split(" → ")) for case in cases(table)]


READ_IN_TEXT = [pair for table in READ.values() for pair in pairs(table)] + ESCAPED


@pytest.mark.parametrize(("text", "number"), READ_IN_TEXT + pairs(ALONE))
def test_what_is_one_number_is_read_wherever_it_stands(text, number):
    expected = Fraction(number)
    assert extract_answer(f"#### {text}") == extract_answer(f"####{text}\n") == expected
    assert extract_answer(f"so \\boxed{{{text}}}") == expected
    assert true_answer(text) == true_answer(f"3 ducks\n#### {text}") == expected
    assert extract_answer(text.replace(r"\boxed", "")) is None  # nothing is marked
    if (text, number) in READ_IN_TEXT:
        assert extract_answer(f"it is {text} ", lenient=True) == expected


def test_the_docstring_has_a_line_for_each_form():
    for form in READ:
        assert form in rewards.__doc__.lower()


# What has no value, by kind. Any part of it would be a wrong number.
UNREAD = {
    "nothing": "-  $  seventy-two  None  nan  inf  x  ()  5/  /5",
    "powers, indices, bases": r"""
        x^{2}  P_{1}  x^2  x_1  x²  5²  5⁻¹  10⁻5  2^10  2 ^ 10  2^{10}  {5}^2  (5)^2  2**10  101_2
        101_{2}  e^{-1}  a^{6}  25 x²  9 kg^2  25 m^4  25 m⁴  9 cm2  \theta^{10}  1.5x10^3  10^3
        1.5 \times 10^3
    """,
    "pairs, intervals, sets, lists": r"""
        (20,100)  \left(20,100\right)  [20,100]  \{20,100\}  {20,100}  (1,234)  (3, 4)
        (-\infty, 5)  (0,5]  [2,+\infty)  (2,251,252)  \{-2\}  [0, 5)  5, 6  5,6  5;6  5; 6
        72 73 74  5 6  3 or 4  5 and 6  $5$ or $9$  5|6  5→6  1;2;3  5 apples, 3 pears  $3, $4
    """,
    "separators": r"""
        0,500  01,234  000,123  0,245  1,23  12,34  1234,567  1,2345  1,,234  10, 000  1,\ 234
        2 ,500  12 000  1 234 567  1,234 567  1\,23  1\!,\!234  10\!000  1'234  1’234  1_000
        1.234,5  1·234  1.234.567  1.2.3  .5.5  1..5  1{,}23
    """,
    "variables, functions, roots, constants": r"""
        12 - p  6: π  \frac { a } { 10 }  2x  2 x  x2  5e  2xy  3ab  5abc  5 x y  5α  2𝑥  5ℓ  -4 i
        4t  5(x+1)  f(5)  f(x)=5  5 (x)  5\text{x}  \sqrt{51}  \sqrt 51  \sqrt[3]{8}  √51  sqrt(51)
        log 5  \ln 5  |5|  3\pi  3 pi  3pi  3π  π/3  2RC+R+C  5!  5 !  \binom{5}{2}  2.2 \tau
        7.6 Z  5 N  5 p  \overline{5}  \lfloor 5 \rfloor  \color{red}5
    """,
    "relations": r"""
        x != 3  x \neq 3  x≠3  x > 5  x>5  x ≥ 5  > 5  ≥5  <5  ≤ 5  5 < x  1/3<x<7  x \ge 5  5 ≠ 6
        5>  ±5  5 \pm 2  ∓5  ~5  \approx 5  x == 5  xy = 5  5 = x  x = y = 5  x = 5, y = 6  x_1 = 5
        \frac{40}{3}=a
    """,
    "calculations, ratios, ranges, dates": r"""
        16 - 3 = 13  2+3=5  a+1  5 + x  5-3  5 - 3  2*3  2×3  3 x 4  5·2  5(3)  (5)(3)  (5)-(3)
        5\cdot 3  7 % 4  3:4  12:30  2: 15 PM  3-5  3–5  3~5  12/25/2023  2024-01-15  5+  5-
        5 plus  17 000/5 - 1  1/2/3  5//2  1/2 + 1/3  $5-$3
    """,
    "fractions": r"""
        3/0  3/-4  1.5/2  1/2.5  .5/2  1/2x  1 / A  \frac{x}{2}  \frac{2}{x}  \frac{1.5}{2}
        \frac123  \frac{3}{-4}  \frac{1}{0}  \frac{\frac12}{3}  \frac{1}{2}3  \frac{1}{2}x
        \frac{1}{2}^2  x^\frac12  1,\frac{234}{5}  \frac{1}{2}\frac{3}{4}  \frac{}{2}
        2\frac{-2}{3}  2\frac43  2 4/3  2 1/0  2.5 1/2  2 1/2/3  2-1/2  2 100/300  ½  2½  2 ½  -⅓
        -\frac{-1}{2}
    """,
    "digits that go on": r"""
        0.333...  0.333…  0.3\ldots  0.\overline{3}  0.3\overline{4}  0.(3)  0.3̅  1e1234  1e5e5
        18...  1e9999999999  ...72  5…
    """,
    "words that make another number": r"""
        10 million  5-million  5\text{ million}  $5 Million  5 HUNDRED  3 trillions  5k  $5K  5M
        1.5Bn  5 bn  2 dozen  5 lakh  5 grand  3 tenths  2 and a Half  3 And 1/2  5 halves
        5 point six  18 dollars fifty  5 squared  18 dollars and 50 cents  5 万  5万  5만  三5  Ⅷ5
        5️⃣  ①  5 or more
    """,
    "signs": r"""
        --5  +-5  -+5  -$-5  $-$-5  GPT-4  USD-5  -(5)  -(1/3)  -\left(5  -{5+1}  -|5|  |-5|  —5
        ⁻5  ⁒5  negative 5  Minus 5  x -5  -USD-5
    """,
    "other numerals": "0xFF  0x1f  0xFACE  0b101  0o17  1F  H2O  5x3  5eggs3",
    "text around it": r"""
        is 5  The answer is 5  Answer: 5  at least 5  about 5  No. 5  5 eggs!  5?  <b>5</b>  5</s>
        -> 5  5 = 2+3  \text{June 20}  February 3rd  共5个  5个  50%%  %50  50‰  5 ft 11 in  5'
        5-foot  5 {eggs}  5\\
    """,
}
UNREAD_ESCAPED = [
    *["12\u00a00000", "1234\u00a0567", "1\u202f23", "11\u2009 000", "1,234\u2009567", "5\u202e6"],
    *["", "9" * 301, "1" * 200 + "/" + "1" * 200],
]


@pytest.mark.parametrize("text", sum(map(cases, UNREAD.values()), UNREAD_ESCAPED))
def test_what_is_more_than_one_number_has_no_value_and_no_part_of_it_has_one(text):
    assert extract_answer(f"#### {text}") is None
    assert extract_answer(f"so \\boxed{{{text}}}") is None
    for answer in (text, f"#### {text}"):
        with pytest.raises(ValueError, match="no number to compare with") as error:
            correct("", answer)
        assert repr(answer) in str(error.value) or len(answer) > 80


def test_each_listed_unit_is_one():
    lengths = "mm cm dm km m in inch inches ft foot feet yd yards mi mile miles meters metre units"
    short = "g gm kgs mg l L ml mL cl lb oz qt pt sq s ms sec mins h hrs day pm mph kph kHz kWh"
    little = "MB pcs °F st nd rd th of in at on to by is as it"
    for unit in f"{lengths} {short} {little}".split():
        assert extract_answer(f"#### 5 {unit}") == extract_answer(f"#### 5{unit}") == 5
        exponents = [extract_answer(f"#### 5 {unit}{mark}") for mark in ("²", "^3", "^{2}")]
        assert exponents == [5 if unit in lengths.split() else None] * 3
    for code in "USD EUR GBP JPY CNY RMB INR CAD AUD CHF".split():
        assert extract_answer(f"#### {code} 5") == extract_answer(f"#### 5 {code}") == 5


def test_no_listed_word_is_a_unit_and_none_is_dropped_from_beside_a_number():
    after = """hundred thousands million billions trillion milliard lakhs crore dozens squared cubed
        third fourth fifths sixth seventh eighths ninth tenths half halves mil mille bn mn tn grand
        one two three four five six seven eight nine ten eleven twelve thirteen nineteen twenty
        thirty forty fifty sixty seventy eighty ninety point pi mod"""
    before = "minus negative sqrt root log ln sin cos tan pi"
    for text in [f"5 {word}" for word in after.split()] + [f"{word} 5" for word in before.split()]:
        assert extract_answer(f"#### {text}") is None
        assert extract_answer(f"it is {text} then", lenient=True) is None
    for word in ("and", "or", "plus"):
        assert extract_answer(f"#### 5 {word} so it was") is None
    for word in ("and", "plus", "times", "over"):
        assert extract_answer(f"she took 5 {word} 3", lenient=True) is None
        assert extract_answer(f"she took 5 {word} gave a 3", lenient=True) == 3


# --- the place ------------------------------------------------------------------------------------

# text, strict, lenient
TEXTS = [
    *[("", None, None), ("The answer is 15", None, 15)],
    # the last marker, all of its line
    *[("#### 1\n#### 2", 2, 2), ("#### 1 #### 2", 2, 2), ("#### 72 73", None, None)],
    *[("#### 16 - 3 = 13", None, 13), ("#### 72\n99", 72, 72), ("#### 72\r99", 72, 72)],
    *[("#### 72\u202899", 72, 72), ("#### \u202899", None, 99), ("####\r\n72", None, 72)],
    *[("3 #### x", None, 3), ("#### 72\n#### none", None, 72), ("**#### 72**", 72, 72)],
    # how many hashes
    *[("### 72", None, 72), ("# # # # 72", None, 72), ("######### 72", 72, 72)],
    ("＃＃＃＃ 72", None, 72),
    # boxes
    *[(r"\boxed{1} \boxed{2}", 2, 2), (r"\boxed{\boxed{5}}", 5, 5), (r"\boxed {5}", 5, 5)],
    *[(r"so $x = \boxed{18\text{ dollars}}$ per day.", 18, 18), ("\\boxed{\n5\n} 6", 5, 5)],
    *[(r"\boxed{72 or 73}", None, 73), (r"\boxed{} 7", None, 7), (r"\boxed{5} \boxed{}", None, 5)],
    (r"6 eggs, \boxed{5", None, 6),
    # both: the marker decides, with all of its line
    *[(r"\boxed{5} #### 6", 6, 6), (r"#### \boxed{5}", 5, 5), (r"#### 6 \boxed{5}", None, None)],
    (r"\boxed{5} ####", None, 5),
    # too long a line, too long a box
    *[("#### 5" + " " * 299, None, None), ("#### 5" + " " * 298, 5, 5)],
    *[("\\boxed{5" + " " * 300 + "}", None, None), ("#### " + r"1\,234" * 60, None, None)],
    # lenient: cut at words and at =, each piece as a whole
    *[("She has 3, then 15.", None, 15), ("3 eggs and 5 ducks", None, 5)],
    *[("2 and 1/2", None, None), ("48/2 = <<48/2=24>>24 clips", None, 24)],
    *[("<answer> 5 </answer>", None, 5), ("**Total:** $18", None, 18)],
    *[("She has 5, and gives 3 million away", None, 5), ("7 eggs - 5", None, 7)],
    *[("it costs 1 - USD 5", None, None), ("the total A-\\$ .5", None, None), ("(-4)", None, -4)],
    *[("the pair (20,100)", None, None), ("it is x != 3", None, None)],
    *[("she has 10, 000", None, None), ("she has 5 bn", None, None)],
    *[(r"Thus \(x = \frac{3}{4}\).", None, Fraction(3, 4)), ("3.14 " + "3" * 301, None, None)],
]


@pytest.mark.parametrize(("text", "strict", "lenient"), TEXTS)
def test_text(text, strict, lenient):
    assert extract_answer(text) == strict
    assert extract_answer(text, lenient=True) == lenient
    assert isinstance(extract_answer(text), Fraction | None)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("#### 1", None, None),  # perhaps #### 18
        ("#### 18 ", None, None),  # perhaps #### 18 000
        *[("#### 18 dollars and", None, 18), ("#### 18\n", 18, 18), ("#### 18\r", 18, 18)],
        ("#### 18\u2028then", 18, 18),
        ("#### 5\nno, #### 1", None, 5),  # the last marker decides
        *[(r"\boxed{18} so", 18, 18), (r"\boxed{1", None, None)],
        *[("\\boxed{5}\n\\boxed{1", None, 5), (r"\boxed{5} #### 1", None, 5)],
        *[("3 eggs and 1", None, 3), ("3 eggs and 1\n", None, 1), ("so 3", None, None)],
        ("so 3.", None, None),  # perhaps 3.5
        ("so 3 mill", None, None),
        ("so 3 and ", None, None),  # perhaps 3 and 1/2
        *[("7 eggs\nso 3 mill", None, 7), (r"7 eggs, so \frac{3}{4}", None, 7)],
    ],
)
def test_a_truncated_completion_has_an_answer_only_where_it_is_complete(text, strict, lenient):
    assert extract_answer(text, truncated=True) == strict
    assert extract_answer(text, lenient=True, truncated=True) == lenient


@pytest.mark.parametrize("whole", ["#### 18", r"\boxed{18}", "so 180 eggs\n#### -1,234.5 kg"])
def test_no_cut_of_a_completion_pays_for_a_part_of_its_answer(whole):
    for end in range(len(whole)):
        cut = whole[:end]
        assert extract_answer(cut, truncated=True) is None
        assert extract_answer(cut, lenient=True, truncated=True) in (None, 180)
    assert correct(whole[:-1], "#### 1", truncated=True) == 0.0
    assert extract_answer(whole + "\n", truncated=True) == extract_answer(whole) is not None


# --- truths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *[("48/2 = <<48/2=24>>24, 48+24 = 72\n#### 72", 72), ("#### 72\n\nThat is it.", 72)],
        (r"so $\boxed{\frac{2}{5}}$ of it", "2/5"),
        (r"\boxed{5} so #### 5", 5),  # twice the same is one answer
        (r"\boxed{0.5}, that is \boxed{\frac12}", "1/2"),
        *[(r"\boxed{3} or \boxed{\frac{2}{5}}", None), ("#### 3\n#### 4", None)],
        *[("#### 3 #### 3", None), (r"\boxed{3} #### 4", None), (r"\boxed{x} \boxed{5}", None)],
        *[(r"\boxed{x} 5", None), (r"\boxed{5", None), ("5 ####", None), ("3 or 4", None)],
        ("x" * 400, None),
    ],
)
def test_a_truth_is_exactly_one_answer_or_it_is_refused(answer, number):
    if number is not None:
        assert true_answer(answer) == Fraction(number)
        return
    with pytest.raises(ValueError, match="no number to compare with"):
        true_answer(answer)


def test_a_refused_answer_is_shortened():
    with pytest.raises(ValueError, match="no number") as error:
        correct("#### 1", "x" * 10_000 + "\n" + "y" * 10_000)
    message = str(error.value)
    assert "xxx ... yyy" in message and len(message) < 250 and "\n" not in message


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        *[("#### 72.00", "72", 1), ("#### 1234", "$1,234", 1), ("#### −7", "-7", 1)],
        *[("#### 0.5", "1/2", 1), (r"\boxed{72}", "#### 72", 1)],
        ("#### 0.30000000000000000001", "0.3", 0),  # equal as floats
        *[("#### 15", "5", 0), ("#### 234", "1,234", 0), ("#### 7", "-7", 0), ("72", "72", 0)],
        *[("#### 71 72", "72", 0), ("#### 72\n####", "72", 0)],
        # more than six decimals: a rounded truth
        *[("#### 1/3", "0.33333333", 1), ("#### 11/6", "1.8333333333333335", 1)],
        *[("#### 0.333333", "0.33333333", 1), ("#### 0.333334", "0.33333333", 0)],
        ("#### -1/3", "0.33333333", 0),
        ("#### 1/3", "0.333333", 0),  # six decimals are exact
        ("#### 0.33333333", "1/3", 0),  # and so is a fraction
        *[("#### 1.0000001", "1.0000000", 0), ("#### 2e-7", "1e-7", 0), ("#### 0", "1e-7", 0)],
    ],
)
def test_correct(answer, truth, right):
    got = correct(answer, truth)
    assert got == right and isinstance(got, float)
    assert equal(extract_answer(answer), true_answer(truth)) == right


# --- real answers ---------------------------------------------------------------------------------


def test_the_recorded_completions_are_graded_as_they_were():
    graded = []
    for name in ("credit.jsonl", "credit-qwen.jsonl"):
        for line in (ROOT / "docs" / name).read_text("utf-8").splitlines():
            row = json.loads(line)
            assert correct(row["completion"], row["answer"]) == row["right"]
            graded.append(row["right"])
    assert True in graded and False in graded


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        *[("−5 ‑5 －５", "-5 -5 -5"), ("12\u00a0000 12\u202f000", "12\u2009000 12\u2009000")],
        *[(r"1{,}234 1,\!234 1\,234", "1,234 1,234 1\u2009234"), ("-{5} {5}", "-5 {5}")],
        *[("٣٫٥ 3⁄4 5’ a\u200bb €5", "3.5 3/4 5' ab $5"), (r"2\dfrac{2}{3}", "2 2/3 ")],
        *[(r"-\frac34x", " -3/4 x"), (r"\frac{x}{2}", r"\frac{x}{2}")],
        (r"\left(\textbf{a \text{b}}\right)", "(a b)"),
        (r"$5$ and \(6\), $7 to $8", " 5  and  6 , $7 to $8"),
    ],
)
def test_plain(text, plain):
    assert rewards.plain(text) == plain


@pytest.mark.parametrize(
    ("text", "bare"),
    [("**$5**", "5"), ("{ (5) }", "5"), ("(20,100)", "(20,100)"), ("'", ""), ("(5)(3)", "5)(3")],
)
def test_bare(text, bare):
    assert rewards.bare(text) == bare


@pytest.mark.parametrize(
    ("text", "unit"),
    [("", True), (" ", True), (" eggs", True), ("eggs", True), (" (eggs)", True), ("/day", True)]
    + [("cm", True), ("egg", False), (" egg", True), (" xyz", False), (" ab", False), ("/", False)]
    + [(" eggs and ham", False), (" third", False), (" canteen", False), (" e", False)],
)
def test_a_unit(text, unit):
    assert rewards.is_unit(text) == unit


@pytest.mark.parametrize(
    ("text", "lines", "boxes"),
    [
        *[("a #### b\nc", [" b"], []), ("####a####b", ["a####b", "b"], [])],
        *[(r"\boxed{a{b}c} \boxed{d", [], ["a{b}c", ""]), (r"\boxed{a}} ##### b", [" b"], ["a"])],
    ],
)
def test_the_marked_places(text, lines, boxes):
    assert rewards.places(text) == (lines, boxes)
    cut = [*lines[:-1], ""] if lines and "\n" not in text else lines
    assert rewards.places(text, truncated=True)[0][-1:] == cut[-1:]


@pytest.mark.parametrize(
    "length, max_length, cache, penalty",
    [
        *[(0, 100, 20, 0.0), (80, 100, 20, 0.0), (81, 100, 20, -0.05), (90, 100, 20, -0.5)],
        *[(100, 100, 20, -1.0), (101, 100, 20, -1.0), (10**6, 100, 20, -1.0), (100, 100, 0, 0.0)],
        *[(101, 100, 0, -1.0), (50, 100, 100, -0.5)],
        (18432, 20480, 4096, -0.5),  # DAPO's own setting
    ],
)
def test_overlong_penalty(length, max_length, cache, penalty):
    assert overlong_penalty(length, max_length, cache) == penalty


@pytest.mark.parametrize("max_length, cache", [(100, 101), (100, -1), (-1, 0)])
def test_overlong_penalty_refuses(max_length, cache):
    with pytest.raises(ValueError, match="cache"):
        overlong_penalty(5, max_length, cache)


@pytest.mark.parametrize(
    "lengths, right, penalties",
    [
        # 3 of 4 right: L = max((10 + 50) / 2, 80 / 3) = 30; 20 / 30 / 2 = 1/3
        ([10, 20, 50, 90], "1110", [0, 0, -1 / 3, 0]),
        # all right, the mean decides: L = max(50, 310 / 4) = 77.5
        ([0, 90, 100, 120], "1111", [0, *(-(n - 77.5) / 155 for n in (90, 100, 120))]),
        # 3 of 5: of all, L = max((4 + 100) / 2, 32) = 52; a wrong one is never punished
        ([4, 60, 20, 76, 100], "01110", [0, -8 / 104, 0, -24 / 104, 0]),
        ([1, 1, 1, 1, 6], "11111", [0, 0, 0, 0, -2.5 / 7]),  # L = 3.5
        ([2, 2, 2, 2, 2, 2, 2, 20], "11111101", [0] * 7 + [-9 / 22]),  # L = 11
        ([1, 1, 1, 1, 1, 1, 9, 3], "11111110", [0] * 6 + [-4 / 10, 0]),  # L = 5
        ([1, 9], "10", [0, 0]),  # half is not more than half
        ([1, 2, 3, 90], "0001", [0, 0, 0, 0]),
        ([5, 5, 5], "000", [0, 0, 0]),
        ([0, 0], "11", [0, 0]),
        ([7], "1", [0]),
    ],
)
def test_group_overlong_penalty(lengths, right, penalties):
    right = [float(c) for c in right]
    assert group_overlong_penalty(lengths, right) == pytest.approx(penalties, abs=1e-12)


def appendix_d(lengths, right, gamma):
    """The paper's three cases and its three stretches, one completion at a time."""
    total, n, found = len(lengths), sum(right), []
    of = [lengths[i] for i in range(total) if right[i]] if n / total >= gamma else lengths
    for i in range(total):
        found.append(0.0)
        if not right[i] or (n / total < gamma and (n / total <= 1 - gamma or n <= total / 2)):
            continue
        longest = max((min(of) + max(of)) / 2, sum(of) / len(of))
        if longest <= lengths[i] < 2 * longest:
            found[i] = -(lengths[i] - longest) / longest / 2
        elif lengths[i] >= 2 * longest > 0:
            found[i] = -0.5
    return found


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.5, 0.55, 0.75, 0.9])
def test_group_overlong_penalty_is_the_paper_s_by_cases(gamma):
    draw = random.Random(2)
    least = 0
    for _ in range(200):
        total = draw.randint(1, 20)
        lengths = [draw.choice([0, 1, 2, 3, 5, 60]) for _ in range(total)]
        right = [draw.random() < 0.7 for _ in range(total)]
        got = group_overlong_penalty(lengths, right, gamma)
        assert got == pytest.approx(appendix_d(lengths, right, gamma), abs=1e-12)
        least = min(least, *got, 0)
    assert least == -0.5


@pytest.mark.parametrize("gamma", [0, 1, -0.1, math.nan])
def test_group_overlong_penalty_refuses(gamma):
    with pytest.raises(ValueError, match="gamma must lie between 0 and 1"):
        group_overlong_penalty([1], [1.0], gamma)


# --- attacks --------------------------------------------------------------------------------------

# Repeated, each of these pieces would take quadratic time in some part of a less careful reader.
PIECES = [
    *["9", "\uff17", "#", "#### ", ",", " ", "\n", "\u2028", "{", "}", "\\boxed{", "\\boxed{1}"],
    *["1 ", "3/0 ", "1,111,", "-$.1e/", "-", "$", "e", "\\", "1e999 ", "1/1+", "-1-", "字", "é"],
    *["1{,}", "frac{1}{", "\\frac{1}", "\\text{", "\\text ", "**", "*a", "$a", "hundred ", "teen"],
    *[
        "and ",
        "5 and ",
        "('",
        "<<",
        "<a",
        "</",
        "= ",
        "ab-",
        "ab&",
        "a=",
        "\\, ",
        ",\\! ",
        "~",
        "^",
    ],
    *["#### 1\n", "1" * 100 + " ", "1 km ", "((1))", "1 2/3 ", "_1'", "\x00"],
]


def seconds(unit, size):
    """The longest CPU time of a call on `size` characters of `unit`: of other processes, none."""
    body = unit * (size // len(unit))
    longest = 0.0
    for text in (body, "\\boxed{" + body + "}"):
        for call in (lambda t: extract_answer(t, True, True), lambda t: equal(None, 1) or read(t)):
            start = time.process_time()
            call(text)
            longest = max(longest, time.process_time() - start)
    return longest


def read(answer):
    """true_answer, or None."""
    try:
        return true_answer(answer)
    except ValueError:
        return None


@pytest.mark.parametrize("unit", PIECES, ids=lambda unit: ascii(unit[:10]))
def test_a_long_text_takes_linear_time(unit):
    """Ten times the text may take 30 times as long: a quadratic reader would take 100 times."""
    small = seconds(unit, 10_000)
    assert small < 1, f"{small:.2f} s for 10,000 characters"
    large = seconds(unit, 100_000)
    if large > 20 * small:  # a pause of the machine may count as CPU time: once more
        large = min(large, seconds(unit, 100_000))
    assert large < 30 * small + 0.1, f"{small:.3f} s, then {large:.2f} s for ten times as much"


fuzz = settings(derandomize=True, deadline=None, max_examples=300, database=None)
# Random texts: pieces that mean something to the reader, mixed with any other characters.
MEANINGFUL = [
    "####",
    "\\boxed{",
    "}",
    "18",
    "1,234",
    "0.5",
    "3/4",
    "1e9",
    "€",
    "−",
    "\\frac{",
    "x=",
]
TEXT = st.lists(
    st.sampled_from([*(unit for unit in PIECES if len(unit) < 12), *MEANINGFUL])
    | st.text(max_size=3)
    | st.characters(categories=["Nd", "Sc", "Zs", "Pd"]),
    max_size=25,
).map("".join)
# A text without a marker and without a line end.
LINE = TEXT.map(lambda text: " ".join(text.replace("#", "").splitlines()))
NUMBER = st.integers(-(10**40), 10**40)


@fuzz
@given(TEXT, TEXT)
def test_nothing_raises_and_the_readings_agree(text, answer):
    strict, lenient = extract_answer(text), extract_answer(text, lenient=True)
    assert strict is None or (type(strict) is Fraction and lenient == strict)
    assert lenient is None or (type(lenient) is Fraction and any(char.isdecimal() for char in text))
    assert extract_answer(text, truncated=True) in (None, strict)
    truth = read(answer)
    if truth is None:
        return
    assert correct(text, answer) == float(equal(strict, truth))
    assert extract_answer(answer if "####" in answer else f"#### {answer}") in (truth, None)


@fuzz
@given(NUMBER, st.sampled_from(["", "$", "€", "£ ", "\\$", "USD "]), st.booleans(), st.data())
def test_one_number_however_written(number, currency, sign_first, data):
    sign = data.draw(st.sampled_from("-−－" if number < 0 else ["", "+"]))
    digits = [str(abs(number)), f"{abs(number):,}", f"{abs(number):,}".replace(",", "\u2009")]
    digits = data.draw(st.sampled_from([*digits, f"00{abs(number)}"]))
    digits += data.draw(st.sampled_from(["", ".0", ".000", "e0", "E+00", ".0e-0", "/1"]))
    if data.draw(st.booleans()):
        digits = digits.translate({ord("0") + i: chr(0xFF10 + i) for i in range(10)})
    before = sign + currency if sign_first or currency == "USD " else currency.rstrip() + sign
    after = data.draw(st.sampled_from(["", ".", ",", "%", " kg", "dollars", "/hour", "**", " m²"]))
    text = before + digits + after
    wrappings = [
        "{}",
        "${}$",
        r"\({}\)",
        "x = {}",
        "**{}**",
        "  {} ",
        "({})" if "," not in text else "{}",
    ]
    wrapped = data.draw(st.sampled_from(wrappings)).format(text)
    assert extract_answer(f"5 #### 6\n#### {wrapped}\n5") == number
    assert extract_answer(f"\\boxed{{6}} \\boxed{{{wrapped}}} 5") == number
    assert correct(f"#### {text}", f"#### {number}") == correct(f"#### {number}", text) == 1.0
    assert correct(f"#### {text}", str(number + 1)) == 0.0
    for more in (" and 5", ", 5", " 5", " = 5", " - x", "^2", " million", "5/x"):
        assert extract_answer(f"#### {before + digits}{more}") is None


@fuzz
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(0, 10**9), st.integers(-999, 999))
def test_fractions_and_decimals_are_exact(top, bottom, part, power):
    assert extract_answer(f"#### {top}/{bottom}") == Fraction(top, bottom)
    assert extract_answer(rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}") == Fraction(top, bottom)
    sign = -1 if top < 0 else 1
    decimal = Fraction(abs(top)) + Fraction(part, 10 ** len(str(part)))
    expected = sign * decimal * Fraction(10) ** power
    assert extract_answer(f"#### {'-' if top < 0 else ''}{abs(top)}.{part}e{power}") == expected


@fuzz
@given(TEXT, LINE)
def test_only_the_last_marker_counts(before, line):
    # What stands before the last marker neither helps nor harms, not even a prompt with answers.
    assert extract_answer(f"{before}\n####{line}") == extract_answer(f"####{line}")


@fuzz
@given(
    st.lists(st.integers(0, 999), min_size=2, max_size=50, unique=True),
    st.sampled_from(["\n#### ", " ", " #### ", "\n", ", ", " or "]),
)
def test_many_answers_pay_at_most_one(numbers, separator):
    spam = "#### " + separator.join(map(str, numbers))
    paid = [number for number in numbers if correct(spam, str(number))]
    if "####" in separator:
        assert paid == [numbers[-1]]
    else:
        assert paid == ([numbers[0]] if separator == "\n" else [])
    boxes = "".join(f"\\boxed{{{number}}}" for number in numbers)
    assert [correct(boxes, str(number)) for number in numbers] == [0.0] * (len(numbers) - 1) + [1.0]


@fuzz
@given(st.integers(0, 10**9), st.integers(0, 9))
def test_a_part_of_a_number_is_not_the_number(number, digit):
    after, before = f"{number}{digit}", f"{digit + 1}{number}"
    for longer in (after, before, f"{digit + 1},{number % 1000:03}", f"{number}.{digit + 1}"):
        value = Fraction(longer.replace(",", ""))
        assert extract_answer(f"#### {longer}") == value
        assert correct(f"#### {longer}", str(number)) == float(value == number)
