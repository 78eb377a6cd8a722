"""rewards.py: a table of answers, then attacks: ten megabytes of anything, and whatever hypothesis can think of."""

import sys
import time
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import correct, extract_answer, overlong_penalty

# What stands after "#### " and what is read there. Each is tried behind the marker, in a box, and, lenient, bare.
NUMERALS = [
    # plain, signs, currency
    ("72", 72),
    ("0", 0),
    ("-0", 0),
    ("007", 7),
    ("+7", 7),
    ("-7", -7),
    ("\u22127", -7),  # minus sign
    ("\u20137", -7),  # en dash
    ("\uff0d7", -7),  # full-width
    ("$18", 18),
    ("$ 18", 18),
    (r"\$18", 18),
    ("-$5", -5),
    ("$-5", -5),
    ("\u2212$5", -5),
    (r"-\$5", -5),
    ("-\\$ .5", Fraction(-1, 2)),
    ("-$-5", None),  # two signs
    ("€1,234.50", Fraction(2469, 2)),
    ("-£3", -3),
    ("₹500", 500),
    ("-₿2", -2),
    ("US$18", 18),
    ("USD18", 18),
    ("EUR 18", 18),
    ("Rs.500", 500),
    ("Rs.1,234.50", Fraction(2469, 2)),
    ("...3/4", Fraction(3, 4)),
    # commas, decimals, exponents
    ("1,234", 1234),
    ("12,345,678", 12345678),
    ("1234567", 1234567),
    ("1,234.5", Fraction(2469, 2)),
    ("18.00", 18),
    ("18.5", Fraction(37, 2)),
    ("0.1", Fraction(1, 10)),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("$.50", Fraction(1, 2)),
    ("...72", 72),
    ("1e5", 100000),
    ("1.5E-3", Fraction(3, 2000)),
    ("2e+2", 200),
    (".5e1", 5),
    ("1,000e2", 100000),
    ("1e999", Fraction(10**999)),
    ("1e-999", Fraction(1, 10**999)),
    # fractions
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("6/8", Fraction(3, 4)),
    ("1,000/10", 100),
    ("0/5", 0),
    ("5/05", 1),
    # what may follow
    ("18.", 18),
    ("$18.", 18),
    ("18,", 18),
    ("18...", 18),
    ("50%", 50),
    ("18dollars", 18),
    ("18 kg", 18),
    ("5eggs", 5),
    ("$5/hour", 5),
    ("**72**", 72),
    ("'72'", 72),
    ("x = -5", -5),
    ("x=-5", -5),
    ("答案是72。", 72),
    # other scripts, LaTeX
    ("\uff17\uff12", 72),
    ("\uff11\uff0c\uff12\uff13\uff14\uff0e\uff15", Fraction(2469, 2)),
    ("٧٢", 72),
    ("७२", 72),
    ("1\uff12", 12),
    ("1{,}234", 1234),
    (r"1\,234", 1234),
    ("9" * 100, int("9" * 100)),
    ("1" + ",111" * 33, int("1" * 100)),
    ("." + "1" * 100, Fraction(int("1" * 100), 10**100)),
    # no number
    ("", None),
    ("seventy-two", None),
    ("-", None),
    ("$", None),
    ("½", None),
    ("x²", None),
    ("1,23,4", None),
    ("12,34", None),
    ("1234,567", None),
    ("1,2345", None),
    ("1,,234", None),
    ("1.2.3", None),
    (".5.5", None),
    ("1.234,5", None),
    ("1_000", None),
    ("1'000", None),
    ("3/0", None),
    ("3/0,000", None),
    ("3/-4", None),
    ("1.5/2", None),
    ("1/2.5", None),
    ("1/2/3", None),
    (".5/2", None),
    ("1e1234", None),
    ("1e9999999999", None),
    ("1e5e5", None),
    ("9" * 101, None),
    ("11" + ",111" * 33, None),
    ("." + "1" * 101, None),
    ("1" * 60 + "/" + "1" * 60, None),
    ("9" * 5000, None),
    ("12/25/2023", None),
    ("1{,}23", None),
]


@pytest.mark.parametrize("numeral, value", NUMERALS)
def test_numeral(numeral, value):
    assert extract_answer(f"#### {numeral}") == value
    assert extract_answer(f"####{numeral}\n") == value
    assert extract_answer(f"so \\boxed{{{numeral}}}") == value
    assert extract_answer(numeral) is None
    assert extract_answer(f"it is {numeral} ", lenient=True) == value


# text, strict, lenient
TEXTS = [
    ("", None, None),
    ("no number", None, None),
    ("The answer is 15", None, 15),
    ("She has 3, then 15.", None, 15),
    ("5 and 1,23,4", None, 5),
    ("5 - 3", None, None),
    ("5-3", None, None),
    ("GPT-4", None, None),
    ("f(2)-4", None, None),
    ("(-4)", None, -4),
    ("2024-01-15", None, None),
    # the last marker, the first numeral of its line
    ("#### 1\n#### 2", 2, 2),
    ("#### 1 #### 2", 2, 2),
    ("#### 72 73 74", 72, 72),
    ("#### 5-3", None, None),
    (r"#### A-\$ .5", None, None),
    ("#### 16 - 3 = 13", None, 13),
    ("#### 2024-01-15", None, None),
    ("#### 72\n99", 72, 72),
    ("#### 72\r99", 72, 72),
    ("#### 72\u202899", 72, 72),
    ("#### \u202899", None, 99),
    ("####\n72", None, 72),
    ("####\r\n72", None, 72),
    ("3 #### x", None, 3),
    ("#### 72\n####", None, 72),
    ("#### 72\n#### none", None, 72),
    ("#### 1,23,4 72", None, 72),
    ("#### 3/0 72", None, 72),
    ("5 #### 1,23,4", None, 5),
    # how many hashes
    ("### 72", None, 72),
    ("# # # # 72", None, 72),
    ("##### 72", 72, 72),
    ("######### 72", 72, 72),
    ("＃＃＃＃ 72", None, 72),
    # boxes
    (r"\boxed{72}", 72, 72),
    (r"\boxed{1} \boxed{2}", 2, 2),
    (r"\boxed{\boxed{5}}", 5, 5),
    (r"\boxed{\text{a {b} } 5} 6", 5, 5),
    (r"\boxed{18\text{ dollars}}", 18, 18),
    ("\\boxed{\n5\n} 6", 5, 5),
    (r"\boxed{72 or 73}", 72, 72),
    (r"\boxed{} 7", None, 7),
    (r"\boxed{5} \boxed{}", None, 5),
    (r"\boxed{5} \boxed{6", None, 6),
    (r"\boxed{{6}", None, 6),
    (r"\boxed 5", None, 5),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4), Fraction(3, 4)),
    (r"#### \dfrac{3}{4}", Fraction(3, 4), Fraction(3, 4)),
    (r"\boxed{5} #### 6", 6, 6),
    (r"#### 6 \boxed{5}", 6, 6),
    (r"\boxed{5} ####", None, 5),
    (r"#### \boxed{5}", 5, 5),
]


@pytest.mark.parametrize("text, strict, lenient", TEXTS)
def test_text(text, strict, lenient):
    assert extract_answer(text) == strict
    assert extract_answer(text, lenient=True) == lenient
    assert isinstance(extract_answer(text), Fraction | None)


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("#### 72", "48/2 = <<48/2=24>>24, 48+24 = 72\n#### 72", 1),
        ("#### 72.00", "72", 1),
        ("#### $1,234.", "1234", 1),
        ("#### 1234", "$1,234", 1),
        ("#### −7", "-7", 1),
        ("#### 0.5", "1/2", 1),
        ("#### 72 apples", "72 apples", 1),
        (r"\boxed{72}", "#### 72", 1),
        ("#### 72", r"so \boxed{72}", 1),
        ("#### 0.30000000000000000001", "0.3", 0),  # equal as floats
        ("#### 15", "5", 0),
        ("#### 5", "15", 0),
        ("#### 234", "1,234", 0),
        ("#### 7", "-7", 0),
        ("72", "72", 0),
        ("The answer is 72.", "#### 72", 0),
        ("#### 72\n#### 73", "72", 0),
        ("#### 71 72", "72", 0),
        ("#### 72\n####", "72", 0),
        ("", "72", 0),
    ],
)
def test_correct(completion, answer, reward):
    got = correct(completion, answer)
    assert got == reward and isinstance(got, float)


@pytest.mark.parametrize(
    "answer",
    ["", "none", "####", "5 ####", "#### 1,23,4", "3 or 4", "1 234", r"\boxed{x} 5", "3/0"],
)
def test_an_answer_without_one_number_is_refused(answer):
    with pytest.raises(ValueError, match="no number") as error:
        correct("no answer either", answer)
    assert repr(answer) in str(error.value)


def test_a_refused_answer_is_shortened():
    with pytest.raises(ValueError, match="no number") as error:
        correct("#### 1", "x" * 10_000 + "\n" + "y" * 10_000)
    assert (
        "xxx ... yyy" in str(error.value)
        and len(str(error.value)) < 250
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "length, max_length, cache, penalty",
    [
        (0, 100, 20, 0.0),
        (80, 100, 20, 0.0),
        (81, 100, 20, -0.05),
        (90, 100, 20, -0.5),
        (100, 100, 20, -1.0),
        (101, 100, 20, -1.0),
        (10**6, 100, 20, -1.0),
        (100, 100, 0, 0.0),
        (101, 100, 0, -1.0),
        (50, 100, 100, -0.5),
        (18432, 20480, 4096, -0.5),  # DAPO's own setting
    ],
)
def test_overlong_penalty(length, max_length, cache, penalty):
    assert overlong_penalty(length, max_length, cache) == penalty


@pytest.mark.parametrize("max_length, cache", [(100, 101), (100, -1), (-1, 0)])
def test_overlong_penalty_refuses(max_length, cache):
    with pytest.raises(ValueError, match="cache"):
        overlong_penalty(5, max_length, cache)


def test_every_decimal_digit_and_currency_of_unicode_counts():
    for char in map(chr, range(sys.maxunicode + 1)):
        if char.isdecimal():
            assert extract_answer(f"####{char}{char}") == 11 * unicodedata.decimal(char)
        elif unicodedata.category(char) == "Sc":
            assert extract_answer(f"#### -{char}5") == -5


# --- attacks ---------------------------------------------------------------------------------------------------------

# Units that one or another part of the code would be quadratic on, were it written with less care; the first line at
# ten megabytes, all of them at one.
LARGE = [
    "9",
    "\uff17",
    "#",
    "#### ",
    ",",
    " ",
    "\n",
    "{",
    "\\boxed{",
    "1 ",
    "3/0 ",
    "1,111,",
    "-$.1e/",
]
SMALL = [
    *[
        "#### 1\n",
        "1,",
        "\u2028",
        "}",
        "{}",
        "\\boxed{1}",
        "-",
        "$",
        ".",
        "/",
        "e",
        "\\",
        ".1 ",
        "1e",
        "1e999 ",
        "1.",
    ],
    *[
        "1/",
        "1/1+",
        "-1-",
        "-$1 ",
        "1{,}",
        "frac{1}{",
        "1" * 100 + " ",
        "1" * 101 + " ",
        "1,23,4 ",
        "-$ .",
        "字",
        "é",
    ],
    *["\U0001f600", "1字", "\x00", "_1'"],
]


def _seconds(unit, size):
    """The longest CPU time of one lenient call (which holds the strict one) over `size` bytes of `unit`."""
    body, seconds = unit * (size // len(unit.encode())), 0.0
    for text in (body, "#### " + body, "\\boxed{" + body + "}"):
        start = time.process_time()
        extract_answer(text, lenient=True)
        seconds = max(seconds, time.process_time() - start)
    return seconds


@pytest.mark.parametrize("unit", LARGE, ids=ascii)
def test_ten_megabytes_in_linear_time(unit):
    small = _seconds(unit, 10**6)
    assert small < 0.5, (
        f"{unit!r}: {small:.2f} s for a megabyte"
    )  # so that a quadratic one fails before it hangs
    large = _seconds(unit, 10**7)
    assert large < 5 and large < 30 * small + 0.5, (
        f"{unit!r}: {small:.2f} s, then {large:.2f} s for ten times as much"
    )


@pytest.mark.parametrize("unit", SMALL, ids=lambda unit: ascii(unit[:10]))
def test_a_megabyte_in_linear_time(unit):
    small = _seconds(unit, 10**5)
    assert small < 0.2, f"{unit[:10]!r}: {small:.2f} s for 100 kB"
    large = _seconds(unit, 10**6)
    assert large < 1 and large < 30 * small + 0.1, (
        f"{unit[:10]!r}: {small:.3f} s, then {large:.2f} s for ten times as much"
    )


@pytest.mark.parametrize("unit", ["9", "#### 1\n", " ", "{"])
def test_correct_takes_ten_megabytes(unit):
    start = time.process_time()
    completion = "#### 72\n" + unit * (10**7 // len(unit))
    assert correct(completion, "72") == (unit != "#### 1\n")
    assert time.process_time() - start < 5


fuzz = settings(derandomize=True, deadline=None, max_examples=300, database=None)
# Text out of the pieces that mean something to the parser, mixed with any characters at all.
PIECES = st.sampled_from(
    [
        *LARGE,
        *SMALL[:-6],
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
    ]
)
TEXT = st.lists(
    PIECES | st.text(max_size=3) | st.characters(categories=["Nd", "Sc", "Zs", "Pd"]), max_size=25
).map("".join)
LINE = TEXT.map(
    lambda text: " ".join(text.replace("#", "").splitlines())
)  # holds no marker and no line end
NUMBER = st.integers(-(10**40), 10**40)


@fuzz
@given(TEXT, TEXT)
def test_nothing_raises_and_the_parts_agree(text, answer):
    strict, lenient = extract_answer(text), extract_answer(text, lenient=True)
    assert strict is None or (type(strict) is Fraction and lenient == strict)
    assert lenient is None or (type(lenient) is Fraction and any(char.isdecimal() for char in text))
    try:
        reward = correct(text, answer)
    except ValueError as error:
        assert "no number" in str(error) and extract_answer(answer) is None
    else:
        assert reward in (0.0, 1.0) and (reward == 0.0 or strict is not None)


@fuzz
@given(NUMBER, st.sampled_from(["", "$", "€", "£ ", "\\$"]), st.booleans(), st.data())
def test_one_number_however_written(number, currency, sign_first, data):
    sign = (
        data.draw(st.sampled_from("-−－")) if number < 0 else data.draw(st.sampled_from(["", "+"]))
    )
    digits = data.draw(st.sampled_from([str(abs(number)), f"{abs(number):,}", f"00{abs(number)}"]))
    digits += data.draw(st.sampled_from(["", ".0", ".000", "e0", "E+00", ".0e-0", "/1"]))
    if data.draw(st.booleans()):
        digits = digits.translate({ord("0") + i: chr(0xFF10 + i) for i in range(10)})
    before = sign + currency if sign_first else currency.rstrip() + sign
    after = data.draw(
        st.sampled_from(["", ".", ",", "%", " kg", "dollars", ".\n", " and 5", "\n5", " = 5"])
    )
    text = before + digits + after
    assert extract_answer(f"5 #### 6\n#### {text}") == number
    assert extract_answer(f"\\boxed{{6}} \\boxed{{{text}}} 5") == number
    assert correct(f"#### {text}", f"#### {number}") == 1.0
    assert correct(f"#### {text}", str(number + 1)) == 0.0
    assert correct(f"#### {number}", f"6\n#### {before + digits}") == 1.0


@fuzz
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(0, 10**9), st.integers(-999, 999))
def test_fractions_and_decimals_are_exact(top, bottom, part, power):
    assert extract_answer(f"#### {top}/{bottom}") == Fraction(top, bottom)
    sign = -1 if top < 0 else 1
    decimal = Fraction(abs(top)) + Fraction(part, 10 ** len(str(part)))
    expected = sign * decimal * Fraction(10) ** power
    assert extract_answer(f"#### {'-' if top < 0 else ''}{abs(top)}.{part}e{power}") == expected


@fuzz
@given(TEXT, LINE)
def test_only_the_last_marker_counts(before, line):
    # Whatever stands before the last marker, a prompt with its answers among it, neither helps nor harms.
    assert extract_answer(f"{before}\n####{line}") == extract_answer(f"####{line}")


@fuzz
@given(TEXT, NUMBER, LINE, TEXT.map(lambda text: text.replace("#", "")))
def test_only_the_first_number_of_its_line_counts(before, number, rest, after):
    assert extract_answer(f"{before}\n#### {number} ; {rest}\n{after}") == number


@fuzz
@given(
    st.lists(st.integers(0, 999), min_size=2, max_size=50, unique=True),
    st.sampled_from(["\n#### ", " ", " #### ", "\n"]),
)
def test_many_answers_pay_at_most_one(numbers, separator):
    spam = "#### " + separator.join(map(str, numbers))
    paid = [number for number in numbers if correct(spam, str(number))]
    ambiguous = separator == " " and 100 <= numbers[1]  # 1 234: one number or two
    first_or_last = numbers[-1 if "####" in separator else 0]
    assert paid == ([] if ambiguous else [first_or_last])
    boxes = "".join(f"\\boxed{{{number}}}" for number in numbers)
    assert [correct(boxes, str(number)) for number in numbers] == [0.0] * (len(numbers) - 1) + [1.0]


@fuzz
@given(TEXT.map(lambda text: text.replace("#", "").replace("\\", "")), NUMBER)
def test_no_marker_no_pay(text, number):
    text = f"{text} {number} "
    assert extract_answer(text) is None and correct(text, str(number)) == 0.0


@fuzz
@given(st.integers(0, 10**9), st.integers(0, 9))
def test_a_part_of_a_number_is_not_the_number(number, digit):
    for longer in (
        f"{number}{digit}",
        f"{digit + 1}{number}",
        f"{digit},{number % 1000:03}",
        f"{number}.{digit + 1}",
    ):
        assert correct(f"#### {longer}", str(number)) == float(
            Fraction(longer.replace(",", "")) == number
        )
