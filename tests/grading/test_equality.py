"""Pairs of answers in every notation; benchmarks/grading.py has the figures of the whole file."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.grading import same_answer, same_number, tidy, within_slack

SAME = [
    ("2^{64}-1", "18446744073709551615"),
    ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt{2}"),
    ("\\{2^{60}, 1\\}", "\\{1, 1152921504606846976\\}"),
    ("2x=2^{61}", "x=2^{60}"),
    ("x>2^{60}", "2^{60}<x"),
    ("\\sqrt{x^2}", "|x|"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\log_2 8", "3"),
    ("\\frac{\\pi}{4}", "\\arctan 1"),
    ("\\pi", "3.141593"),
    ("\\begin{pmatrix}2\\\\1\\end{pmatrix}", "\\begin{pmatrix}2\\\\ 1\\end{pmatrix}"),
    ("\\sum_{k=1}^{100} k", "5050"),
    ("1/12", "0.083333"),
    ("0.\\overline{3}", "1/3"),
    ("3 1/2", "3.5"),
    ("3\\frac{1}{2}", "7/2"),
    ("3+4i", "4i+3"),
    ("4210_5", "4210_{5}"),
    ("4210_5", "4210_{\\text{five}}"),
    ("4210_5", "4210"),
    ("1011_2", "(1011)_2"),
    ("1A_{16}", "1a_{16}"),
    ("(0, 12.5)", "0 < x < 12.5"),
    ("[\\sqrt{2}, +\\infty)", "m \\geq \\sqrt{2}"),
    ("0 < x < 12.5", "(0, 12.5)"),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1 \\text{ or } x>3"),
    ("x<1 or x>3", "(-\\infty,1)\\cup(3,\\infty)"),
    ("[1,3]", "1 ≤ x ≤ 3"),
    ("(-\\infty,2)", "x<2"),
    ("x>2", "(2,∞)"),
    ("[1,2)", "x \\in [1,2)"),
    ("29", "29 dollars"),
    ("29", "29 km/h"),
    ("29", "€29"),
    ("60^\\circ", "60°"),
    ("10 - 2\\sqrt{5}", "10 - 2√5"),
    ("x^2", "x²"),
    ("29", "29 cm"),
    ("29", "$29"),
    ("50%", "50"),
    ("0.5", "50%"),
    ("50\\%", "0.5"),
    ("4.2%", "4.2"),
    ("29000000", "29 million"),
    ("60", "60 degrees"),
    ("5:30", "5:30 PM"),
    ("17:30", "5:30 p.m."),
    ("5 PM", "5"),
    ("1/2", "½"),
    ("-5", "−5"),
    ("34", "３４"),
    ("1000", "1 000"),
    ("1450", "1,450"),
    ("1450", "$1{,}450"),
    ("\\frac{1}{2}", "1⁄2"),
    ("2", "2."),
    ("29", "**29**"),
    ("6", "2 × 3"),
    ("3", "6 ÷ 2"),
    ("\\pi/2", "π/2"),
    ("\\sqrt{5}", "sqrt(5)"),
    ("x=5", "x = 5"),
    ("\\text{even}", "even"),
    ("(A)", "A"),
    ("29 apples", "29"),
    ("\\frac{x+1}{2}", "(x+1)/2"),
    ("42", "42. Let me check that 40+2=42"),
    ("10^{-3}", "10⁻³"),
    ("1{,}000{,}000", "1 million"),
    ("1, 2", "2, 1"),
    ("y=2x+1", "2x+1"),
    ("29", "\\textbf{29}"),
    ("29", "\\mathbf{29}"),
    ("\\frac{1}{2}", "0.5"),
    ("7.5", "7.50"),
    ("x^3-1", "(x-1)(x^2+x+1)"),
    ("\\tan x", "\\frac{\\sin x}{\\cos x}"),
    ("\\ln x^2", "2\\ln x"),
    ("5!", "120"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("10", "10 \\text{ cm}^2"),
]
DIFFERENT = [
    # The first dollar opens a formula; it is no price.
    (r"$\max$ at $-1$", r"$\max$ at $5$"),
    (r"$\max$ at $-1, \min$ at 1", r"$\max$ at $n \pi$, min at $\pi / 2+n \pi$"),
    (r"$3$ and $x$", r"$4$ and $x$"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("2^{50}-1", "2^{50}"),
    ("20!", "20!-1"),
    ("\\binom{60}{30}", "\\binom{60}{30}-1"),
    ("1-\\frac{1}{2^{50}}", "1"),
    ("e^{-1000}", "0"),
    ("(2^{64}-1, 3)", "(2^{64}, 3)"),
    ("3^{100}-3\\cdot 2^{100}+3", "3^{100}-3\\cdot 2^{100}"),
    ("\\frac{1}{4}+\\frac{3}{4\\cdot 5^{2004}}", "\\frac{1}{4}-\\frac{3}{4\\cdot 5^{2004}}"),
    ("1-2^{-50}", "1"),
    ("\\sqrt{10^{40}+1}", "10^{20}"),
    ("\\ln(e^{50}+1)", "50"),
    ("\\sin(10^{-20})", "0"),
    ("\\cos(10^{-20})", "1"),
    ("\\{2^{60}, 1\\}", "\\{1, 2^{60}+1\\}"),
    ("x=2^{60}", "x=2^{60}-1"),
    ("2x=2^{61}", "x=2^{60}-1"),
    ("x>2^{60}", "x>2^{60}-1"),
    ("2^{60}x", "(2^{60}-1)x"),
    ("x^2+2^{60}", "x^2+2^{60}+1"),
    ("|x|", "x"),
    ("\\pi", "3.14"),
    ("\\pi", "\\frac{355}{113}"),
    ("100!", "100!+1"),
    ("10^{400}", "10^{401}"),
    ("10^{400}", "10^{400}+1"),
    ("e^{1000}", "e^{1000}+1"),
    ("\\begin{pmatrix}2^{60}\\\\1\\end{pmatrix}", "\\begin{pmatrix}2^{60}+1\\\\1\\end{pmatrix}"),
    ("\\sum_{k=1}^{100} k", "5051"),
    ("\\infty", "-\\infty"),
    ("2^{20}", "1048576.5"),
    ("1-e^{-5000}", "1"),
    ("i", "-i"),
    ("3+4i", "3-4i"),
    ("4210_5", "4210_{7}"),
    ("1011_2", "1011_3"),
    ("1011_2", "11"),
    ("(1,3)", "1 \\le x \\le 3"),
    ("(-\\infty,2]", "x<2"),
    ("29 dollars", "29 cents"),
    ("29", "29 and 30"),
    ("0.5", "0.5%"),
    ("29", "29 million"),
    ("12 \\mathrm{~cm}", "12 m"),
    ("5:30 AM", "5:30 PM"),
    ("29", "30"),
    ("29", "29x"),
    ("5x", "5"),
    ("(1,2)", "(2,1)"),
    ("0.1", "0.10000001"),
    ("", "5"),
    ("C", "B"),
    ("2\\sqrt{3}", "\\sqrt{13}"),
    ("5 cm^2", "5 cm"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same(gold, answer):
    assert same_answer(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not same_answer(gold, answer)
    assert not same_answer(answer, gold) or "%" in gold + answer


@given(st.text(alphabet="√²½−$\\{}()[]*_`.,%°0123456789xe+^/ dolarscm", max_size=60))
def test_any_text_is_the_same_as_itself(text):
    """And no text fails to be written in plain LaTeX, which written again is no other."""
    assert same_answer(text, text)
    assert isinstance(tidy(text), str)


@given(st.integers(-(10**25), 10**25), st.integers(-3, 3))
def test_whole_numbers_are_exact(number, apart):
    assert same_number(str(number), f"{number + apart:,}") is (apart == 0)


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999))
def test_a_decimal_of_six_significant_places_stands_for_a_fraction(number):
    if number.denominator == 1 or abs(number) < 0.1:
        return
    written = f"{number.numerator}/{number.denominator}"
    assert same_number(written, f"{float(number):.6f}")
    assert not within_slack(number, number * Fraction(100002, 100000))
