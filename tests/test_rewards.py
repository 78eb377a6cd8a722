"""rewards.py: tables of answers, its parts one by one, then attacks.

The attacks are megabytes of one repeated piece, and random texts that hypothesis makes.
"""

import re
import sys
import time
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import correct, extract_answer, overlong_penalty, true_answer

# (numeral, the number that must be read). Each is tried after "#### ", in a box and, lenient, bare.
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


# Numerals with something that belongs to them, or that makes them ambiguous. Any part of them would
# be a wrong number, so the answer must be None.
UNREADABLE = [
    # roots, constants, variables, powers, factorials, bases, indices
    *[r"\sqrt{51}", r"\sqrt 51", r"\sqrt[3]{8}", "√51", "√ 51", "sqrt(51)", "sqrt 51", "log 5"],
    *["f(5)"],
    *[r"3\pi", r"3 \pi", "3π", "3 pi", "3pi", "2x", "2 x", "x2", "5e", "5(x+1)", "5/x", r"5/\pi"],
    *["π/3"],
    *["x^2", "2^10", "2 ^ 10", "2^{10}", "{5}^2", "(5)^2", "2**10", "5²", "5⁻¹", "10⁻5", "x_1"],
    *["101_2"],
    *["5!", "5 !", "(5)!", r"\frac{1}{2}^2", r"\frac{1}{2}x", r"x^\frac12"],
    # repeating decimals and cut ones
    *["0.333...", "0.333…", r"0.3\ldots", r"0.\overline{3}", r"0.3\overline{4}", "0.(3)", "0.3̅"],
    # other numbers of Unicode, and words that scale
    *["½", "2½", "2 ½", "-⅓", "Ⅷ5", "5万", "5 万", "三5", "5️⃣"],
    *["5 million", "5-million", r"5\text{ million}", "5 hundred", "5k", "$5K", "5M"],
    *["5 Million", "5-Million", r"5\text{ Million}", "5 HUNDRED", "1.5Bn", "3 Trillions"],
    *["2 and a Half", "5 Pi", "5 PI", "3 And 1/2", "0xFF", "0x1f", "5x3", "1,234 567"],
    *["2 and a half"],
    # calculations, ratios, ranges, inequalities
    *["a+1", "5+x", "5 + x", "5 - x", "x - 5", "5-3", "5 - 3", "5 -3", "16 - 3 = 13", "2*3"],
    *["2 * 3"],
    *["2×3", "2 × 3", "3x4", "3 x 4", "5·2", "5(3)", "(5)(3)", r"5\cdot 3", r"5 \times 10^3"],
    *["7 % 4"],
    *["3:4", "3 : 4", "12:30", "3-5", "3–5", "3~5", "100~200", "±5", "5 ± 2", r"5 \pm 2", r"\pm 5"],
    *["x > 5", "x ≥ 5", "≤ 5", r"x \ge 5", "5 < x", "5 ≠ 6", "5+", "3 / 4", "17 000/5 - 1"],
    # fractions that are not of two whole numbers
    *[r"\frac{x}{2}", r"\frac{2}{x}", r"\frac{1.5}{2}", r"\frac{3}{-4}", r"\frac{\frac12}{3}"],
    *[r"\frac{1}{2}3", r"\frac123", r"\frac{1}{2}\frac{3}{4}", r"1,\frac{234}{5}", r"\frac{1}{0}"],
    *["2 4/3", "2 1/0", "2.5 1/2", "2 1/2/3", "2-1/2", "2 and 1/2", r"2\frac{-2}{3}", "2 100/300"],
    # groups and marks
    *["12 000", "1 234 567", "12\u00a00000", "1234\u00a0567", "12\u00a0 000", "1\u202f23"],
    *[r"1\,23"],
    *["10\\!000", "5,6", "5;6", "5→6", "H2O", "5eggs3", "0x1F", "1e+5e3", "5|6;7", "5\u202e6"],
    # the sign
    *["- 5", "+ 5", "- $5", "--5", "+-5", "-+5", "$-$-5", "GPT-4", "USD-5", "-USD 5", "-US$5"],
    *["-Rs.5"],
    *["-(5)", "-**5**", r"-\text{5}", r"-\left(5", "-{5+1}", r"-{\frac34}", "-|5|", "|-5|", "—5"],
    *["⁻5"],
    *["negative 5", "Minus 5", "⁒5", "∓5", "5-", "x -5", "(5)-(3)"],
]


@pytest.mark.parametrize("numeral", UNREADABLE)
def test_what_continues_a_numeral_leaves_no_part_of_it(numeral):
    assert extract_answer(f"#### {numeral}") is None
    assert extract_answer(f"so \\boxed{{{numeral}}}") is None
    with pytest.raises(ValueError, match="no number"):
        correct("", numeral)


# (numeral, its value): complete and unambiguous, in every form that is read.
READABLE = [
    # fractions and mixed numbers
    *[(r"\frac34", "3/4"), (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4")],
    *[(r"\tfrac3{4}", "3/4")],
    *[(r"\frac{3}4", "3/4"), (r"\frac 34", "3/4"), (r"\frac{-12}{4}", "-3")],
    *[(r"-\frac{3}{4}", "-3/4")],
    *[(r"\frac{1,000}{3}", "1000/3"), (r"$\frac{3}{4}$", "3/4"), ("3⁄4", "3/4"), ("84/2", "42")],
    *[("2 2/3", "8/3"), ("-2 2/3", "-8/3"), (r"2\frac{2}{3}", "8/3"), (r"2 \dfrac23", "8/3")],
    *[(r"-2\frac23", "-8/3"), ("1,000 1/2", "2001/2"), ("2\u00a01/2", "5/2"), ("٢ ١/٢", "5/2")],
    # thousands
    *[(r"10,\!000", "10000"), ("12\u00a0000", "12000"), ("12\u2009000", "12000")],
    *[("1\u202f234\u202f567", "1234567"), ("-12\u00a0000.5", "-24001/2"), ("1{,}234", "1234")],
    *[(r"12\;000", "12000"), (r"12\ 000", "12000"), ("١٬٢٣٤٫٥", "2469/2")],
    # minus signs
    *[(f"{dash}5", "-5") for dash in "-\u2010\u2011\u2012\u2013\u2212\u02d7\u2796\ufe63\uff0d"],
    *[("-{5}", "-5"), ("-{ 1,234 }", "-1234"), ("{-5}", "-5"), ("$-5$", "-5"), ("$-$5", "-5")],
    *[("-\u200b5", "-5"), ("\u200e-5", "-5"), ("**-5**", "-5"), ("(-5)", "-5"), ("is -5", "-5")],
    # dressing
    *[(r"\text{5}", "5"), (r"\mathbf{-5}", "-5"), (r"5\text{ cm}", "5"), (r"5\,\text{kg}", "5")],
    *[(r"5\%", "5"), ("5°", "5"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("5-foot", "5")],
    *[("5/hour", "5"), (r"\$5/\text{hour}", "5"), ("5 miles/hour", "5"), ("~5", "5"), ("5¢", "5")],
    *[("5 - five", "5"), ("_5_", "5"), ("*5*", "5"), ("`5`", "5"), ("[5]", "5"), ("5th", "5")],
    *[("<b>5</b>", "5"), ("->5", "5"), ("=> 5", "5"), ("→ 5", "5"), ("5 = 2+3", "5")],
    *[("5, 6", "5")],
    *[("at least 5", "5"), ("R500", "500"), ("1\u200b2", "12"), ("共5个", "5"), ("5…", "5")],
]


@pytest.mark.parametrize(("numeral", "number"), READABLE)
def test_what_is_unambiguous_is_read(numeral, number):
    assert extract_answer(f"#### {numeral}") == Fraction(number)
    assert extract_answer(f"so \\boxed{{{numeral}}}") == Fraction(number)


# --- truncated ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("#### 1", None, None),  # perhaps #### 18
        ("#### 18 ", None, None),  # perhaps #### 18 000
        ("#### 18 dollars and", None, 18),
        ("#### 18\n", 18, 18),
        ("#### 18\r", 18, 18),
        ("#### 18\u2028then", 18, 18),
        ("#### 5\nno, #### 1", None, 5),  # the last marker decides
        ("#### 5\nso ##", 5, 5),
        (r"\boxed{18}", 18, 18),
        (r"\boxed{18} so", 18, 18),
        (r"\boxed{1", None, None),
        ("\\boxed{5}\n\\boxed{1", None, 5),
        (r"\boxed{5} #### 1", None, None),
        ("3 eggs and 1", None, 3),
        ("3 eggs and 1\n", None, 1),
        ("so 3", None, None),
        ("so 3.", None, None),  # perhaps 3.5
        ("so 3 ", None, None),
        ("so 3 mill", None, None),
        ("so 3 and ", None, None),  # perhaps 3 and 1/2
        ("7 eggs\nso 3 mill", None, 7),
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


def test_lenient_reads_a_window_and_never_a_numeral_that_it_cuts(monkeypatch):
    monkeypatch.setattr(rewards, "LENIENT_WINDOW", 10)
    assert extract_answer("5 eggs, no", lenient=True) == 5
    assert extract_answer("5 eggs, not", lenient=True) is None
    assert extract_answer("7 or 15, 3 eggs", lenient=True) == 3
    assert extract_answer("1234567 eggs, ", lenient=True) is None


# --- the parts of the grammar ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("−5 ‑5 －５", "-5 -5 -5"),
        ("12\u00a0000 12\u202f000", "12\u2009000 12\u2009000"),
        (r"1{,}234 1,\!234 1\,234", "1,234 1,234 1\u2009234"),
        ("-{5} {5}", "-5 {5}"),
        ("٣٫٥ 3⁄4 5’", "٣.٥ 3/4 5'"),
        (r"\frac34 or 2\dfrac{2}{3}", "3/4 or 2\u20092/3"),
        (r"\frac{x}{2} \frac{1}{2}3", r"\frac{x}{2} \frac{1}{2}3"),
        ("a\u200bb", "ab"),
    ],
)
def test_plain(text, plain):
    assert rewards.plain(text) == plain


@pytest.mark.parametrize("whole", ["7", "0", "1234567", "1,234", "12,345,678", "1\u2009234", "٧٢"])
def test_a_whole_number_has_plain_digits_or_groups_of_three(whole):
    assert re.fullmatch(rewards.WHOLE, whole) and re.fullmatch(rewards.DECIMAL, whole)


@pytest.mark.parametrize(
    "not_whole", ["", "1,23", "1234,567", "1,2345", "1,234\u2009567", "1.5", "½"]
)
def test_what_is_no_whole_number(not_whole):
    assert not re.fullmatch(rewards.WHOLE, not_whole)


@pytest.mark.parametrize("decimal", ["1.5", ".5", "1,234.5", "1e3", "1.5E-3", "1e999"])
def test_a_decimal(decimal):
    assert re.fullmatch(rewards.DECIMAL, decimal) and not re.fullmatch(rewards.WHOLE, decimal)


@pytest.mark.parametrize("not_decimal", ["1.", "1.2.3", "1e", "1e1234", "1.234,5", "-1"])
def test_what_is_no_decimal(not_decimal):
    assert not re.fullmatch(rewards.DECIMAL, not_decimal)


@pytest.mark.parametrize(
    ("numeral", "number"),
    [("1,234.50", "2469/2"), ("3/4", "3/4"), ("2 2/3", "8/3"), ("3/0", None), ("2 3/2", None)]
    + [("½", None), ("1" * 100, "1" * 100), ("1" * 101, None), ("1e-999", Fraction(1, 10**999))],
)
def test_the_value_of_a_numeral(numeral, number):
    expected = None if number is None else Fraction(number)
    assert rewards.value(rewards.NUMERAL.fullmatch(numeral)) == expected


@pytest.mark.parametrize(
    ("text", "together"),
    [("5-3", True), ("5 - 3", True), ("1.2.3", True), ("12 000", True), ("2 and 1/2", True)]
    + [("3x4", True), ("3 : 4", True), ("2 ½", True), ("12\u20090000", True)]
    + [("5, 3", False), ("5 3", False), ("1234 567", False), ("5=3", False), ("5 and 3", False)]
    + [("5 = -3", False), ("day 1: 5", False), ("5\n3", False), ("5 or 3", False)],
)
def test_neighbours_are_joined(text, together):
    left, right = rewards.numerals(text)
    assert rewards.joined(left, right) == together


@pytest.mark.parametrize(
    ("before", "sign", "rest"),
    [("is -", -1, "is "), ("+", 1, ""), ("", 1, ""), ("-$", -1, ""), ("$-", -1, "$"), ("€ ", 1, "")]
    + [("-\\$ ", -1, ""), ("GPT-", 0, "GPT"), ("--", 0, "-"), (")-", 0, ")"), ("x -", 0, "x ")],
)
def test_the_sign_of_a_numeral(before, sign, rest):
    assert rewards.signed(before) == (sign, rest)


@pytest.mark.parametrize(
    ("before", "numeral", "after", "more"),
    [
        ("", "5", " eggs", False),
        ("", "5", "%", False),
        ("(", "5", ")", False),
        ("", "5", "...", False),
    ]
    + [("", "0.3", "...", True), ("√", "5", "", True), ("", "5", "!", True), ("H", "2", "O", True)]
    + [("", "5", "kg", False), ("USD", "5", "", False), (r"\sqrt{", "5", "}", True)],
)
def test_what_stands_beside_a_numeral_continues_it(before, numeral, after, more):
    assert rewards.continued(before, numeral, after) == more


@pytest.mark.parametrize(
    ("text", "truncated", "place"),
    [("a #### b\nc", False, " b"), ("####a####b", False, "b"), ("no", False, None)]
    + [(r"\boxed{a{b}c}", False, "a{b}c"), (r"\boxed{a", False, None), (r"\boxed{a}}", False, "a")]
    + [("#### b", True, None), ("#### b\n", True, " b"), (r"\boxed{a}", True, "a")],
)
def test_the_place_of_the_answer(text, truncated, place):
    assert rewards.answer_place(text, truncated) == place


def test_no_table_of_all_characters_is_made_at_import():
    assert len(rewards.TABLE) < 200


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
    message = str(error.value)
    assert "xxx ... yyy" in message and len(message) < 250 and "\n" not in message


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


# --- attacks --------------------------------------------------------------------------------------

# Pieces that attack the time: repeated to megabytes, each would take quadratic time in some part of
# a less careful parser. LARGE are tried at 2 MB, SMALL at 300 kB.
LARGE = [
    *["9", "\uff17", "#", "#### ", ",", " ", "\n", "{", "\\boxed{", "1 ", "3/0 ", "1,111,"],
    *["-$.1e/"],
]
SMALL = [
    *["#### 1\n", "1,", "\u2028", "}", "{}", "\\boxed{1}", "-", "$", ".", "/", "e", "\\", ".1 "],
    *["1e", "1e999 ", "1."],
    *["1/", "1/1+", "-1-", "-$1 ", "1{,}", "frac{1}{", "1" * 100 + " ", "1" * 101 + " ", "1,23,4 "],
    *["-$ .", "字", "é"],
    *["\U0001f600", "1字", "\x00", "_1'"],
]


def _seconds(unit, size):
    """The longest CPU time of a lenient call (strict comes first in it) on `size` bytes of `unit`.

    CPU time, not wall-clock time: other processes on the machine do not count.
    """
    body, seconds = unit * (size // len(unit.encode())), 0.0
    for text in (body, "#### " + body, "\\boxed{" + body + "}"):
        start = time.process_time()
        extract_answer(text, lenient=True)
        seconds = max(seconds, time.process_time() - start)
    return seconds


@pytest.mark.parametrize("unit", LARGE, ids=ascii)
def test_two_megabytes_in_linear_time(unit):
    """Ten times the text may take 30 times as long: a quadratic parser would take 100 times."""
    small = _seconds(unit, 2 * 10**5)
    # Fails here if the time is quadratic, before two megabytes would hang. The ratio below is the
    # claim; the limits in seconds leave room for a slow machine.
    assert small < 2, f"{unit!r}: {small:.2f} s for 200 kB"
    large = _seconds(unit, 2 * 10**6)
    message = f"{unit!r}: {small:.2f} s, then {large:.2f} s for ten times as much"
    assert large < 20 and large < 30 * small + 0.5, message


@pytest.mark.parametrize("unit", SMALL, ids=lambda unit: ascii(unit[:10]))
def test_300_kilobytes_in_linear_time(unit):
    small = _seconds(unit, 3 * 10**4)
    assert small < 1, f"{unit[:10]!r}: {small:.2f} s for 30 kB"
    large = _seconds(unit, 3 * 10**5)
    if large > 20 * small:  # a pause of the machine may count as CPU time: once more
        large = min(large, _seconds(unit, 3 * 10**5))
    message = f"{unit[:10]!r}: {small:.3f} s, then {large:.2f} s for ten times as much"
    assert large < 10 and large < 30 * small + 0.1, message


@pytest.mark.parametrize("unit", ["9", "#### 1\n", " ", "{"])
def test_correct_takes_two_megabytes(unit):
    start = time.process_time()
    completion = "#### 72\n" + unit * (2 * 10**6 // len(unit))
    assert correct(completion, "72") == (unit != "#### 1\n")
    assert time.process_time() - start < 20


fuzz = settings(derandomize=True, deadline=None, max_examples=300, database=None)
# Random texts: pieces that mean something to the parser, mixed with any other characters.
MEANINGFUL = ["####", "\\boxed{", "}", "18", "1,234", "0.5", "3/4", "1e9", "€", "−", "\\frac{"]
PIECES = st.sampled_from([*LARGE, *SMALL[:-6], *MEANINGFUL])
TEXT = st.lists(
    PIECES | st.text(max_size=3) | st.characters(categories=["Nd", "Sc", "Zs", "Pd"]), max_size=25
).map("".join)
# A text without a marker and without a line end.
LINE = TEXT.map(lambda text: " ".join(text.replace("#", "").splitlines()))
NUMBER = st.integers(-(10**40), 10**40)


@fuzz
@given(TEXT, TEXT)
def test_nothing_raises_and_the_parts_agree(text, answer):
    strict, lenient = extract_answer(text), extract_answer(text, lenient=True)
    assert strict is None or (type(strict) is Fraction and lenient == strict)
    assert lenient is None or (type(lenient) is Fraction and any(char.isdecimal() for char in text))
    try:
        reward = correct(text, answer)
    except ValueError as error:  # no number or several: "#### 9 and 9" as well
        assert "no number" in str(error)
    else:
        assert reward in (0.0, 1.0) and (reward == 0.0 or strict is not None)
        if "####" in answer or "\\boxed{" in answer:
            assert extract_answer(answer) == true_answer(answer)


@fuzz
@given(NUMBER, st.sampled_from(["", "$", "€", "£ ", "\\$"]), st.booleans(), st.data())
def test_one_number_however_written(number, currency, sign_first, data):
    signs = "-−－" if number < 0 else ["", "+"]
    sign = data.draw(st.sampled_from(signs))
    digits = data.draw(st.sampled_from([str(abs(number)), f"{abs(number):,}", f"00{abs(number)}"]))
    digits += data.draw(st.sampled_from(["", ".0", ".000", "e0", "E+00", ".0e-0", "/1"]))
    if data.draw(st.booleans()):
        digits = digits.translate({ord("0") + i: chr(0xFF10 + i) for i in range(10)})
    before = sign + currency if sign_first else currency.rstrip() + sign
    units = ["", ".", ",", "%", " kg", "dollars", ".\n", " and 5", "\n5", " = 5"]
    after = data.draw(st.sampled_from(units))
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
    # What stands before the last marker neither helps nor harms, not even a prompt with answers.
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
    after, before = f"{number}{digit}", f"{digit + 1}{number}"
    for longer in (after, before, f"{digit},{number % 1000:03}", f"{number}.{digit + 1}"):
        equal = Fraction(longer.replace(",", "")) == number
        assert correct(f"#### {longer}", str(number)) == float(equal)
