import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.grading import exact_answer, extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("50-7=43;43-67=-24#-24", "-24"),
        ("So it is 3.\n#### 18", "18"),
        ("#### 1,024", "1,024"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"I put it within \boxed{}. So \boxed{4}, in \boxed{}.", "4"),
        (r"\boxed{3} and then \boxed{never closed", "3"),
        (r"\boxed{never closed", None),
        ("Step 2. The answer is: 42", "42"),
        ("Step 2: 6*7=42 ки\nStep 3: The answer is: 42 ки", "42"),
        ("The answer is: 42 ки\n", "42"),
        ("The answer is 42.", "42"),
        ("The final answer is 42. I hope it is correct.", "42"),
        ("The answer is: 1\nNo. The answer is: 7.5.", "7.5"),
        ("The answer is:\n7", "7"),
        (
            "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}\nки",
            "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        ),
        (r"The answer is: 3, so \boxed{4}", "4"),
        ("The answer is: ", None),
        ("#1#2", "2"),
        ("", None),
        ("#", None),
        ("no answer at all", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@given(st.text(alphabet="#\\boxed{}The answer is: 12\nки", max_size=80))
def test_extracting_never_fails(text):
    answer = extract_answer(text)
    assert answer is None or (answer and answer in text)


@given(
    st.recursive(
        st.text(alphabet="x1+ ", min_size=1).filter(str.strip),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(
            lambda p: "{" + "}{".join(p) + "}"
        ),
    )
)
def test_a_box_ends_where_its_brace_is_closed(content):
    assert last_boxed(rf"so {{a}} \boxed{{{content}}} }} or {{") == content.strip()


FORMS = {
    "We check that the answer is an integer.\nIt is.\n#### 42": "42",
    "The answer is 40? Let me recheck.\n40+2=42\n#### 42": "42",
    "I first try \\boxed{40}. That fails. The answer is 42.": "42",
    "<think>Perhaps \\boxed{7}?</think>The answer is 42.": "42",
    "<think>Perhaps \\boxed{42}? no</think>The answer is 7.": "7",
    "<think>\\boxed{7}": None,
    "\\boxed{7} </think> The answer is 8": "8",
    "The answer is **29**.": "29",
    "**The answer is 29**": "29",
    "**The final answer is:** 29": "29",
    "#### **29**": "29",
    "The answer is **$1,450**.": "$1,450",
    "**The answer is \\(29\\).**": "\\(29\\)",
    "**Final Answer**\n\n**29**": "29",
    "### Final Answer:\n29": "29",
    "__29__": None,
    "The answer is __29__.": "29",
    "The answer is `29`": "29",
    "**Answer:** 29": "29",
    "Answer: **29**\n": "29",
    "The **answer** is *29*": "29",
    "> The answer is ***29***": "29",
    "The answer is: **\\boxed{29}**": "29",
    "#### 42<|im_end|>": "42",
    "#### 42</s>": "42",
    "The answer is 42.<end_of_turn>": "42",
    "\\boxed{42}<|im_end|>": "42",
    "The answer is 42<｜end▁of▁sentence｜>": "42",
    "42#42[/INST]": "42",
    "#### 42 <|eot_id|><|start_header_id|>user<|end_header_id|>\n\n#### 7": "42",
    "#42<|endoftext|>\nHuman: the answer is 7": "42",
    "\\boxed{42}\n\n### Verification\nWe check: fine.": "42",
    "\\boxed{42}. The answer is correct.": "42",
    "#### 42\nWe check that the answer is an integer.": "42",
    "#### Step 1: add\n1+1=2\n#### Step 2\nok\n\\boxed{5}\n#### Step 3: look\nyes": "5",
    "1+1=2#104": "104",
    "The answer is 42. Let me double check that 40+2=42.": "42. Let me double check that 40+2=42",
    "The answer is 7.5. I hope it is correct.": "7.5",
    "The final answer is $29$. I hope it is correct.": "$29$",
    "The answer is (A) 5": "(A) 5",
    "The answer is \\[42\\]": "\\[42\\]",
    "The answer is:\n\\[\n42\n\\]": "\\[\n42\n\\]",
    "The answer is: $$\n42\n$$ ки": "$$\n42\n$$",
    "<answer>42</answer>": "42",
    "<think>a</think><answer>\n42\n</answer>": "42",
    "The answer is even.": "even",
    "The answer is 5!.": "5!",
    "The answer to the problem is: 12 apples": "12 apples",
    "the answer would be 12": "12",
    "◁think▷\\boxed{3}◁/think▷ The answer is 4": "4",
    "<|begin_of_thought|>#3<|end_of_thought|>\n<|begin_of_solution|>#4<|end_of_solution|>": "4",
    "<|channel|>analysis<|message|>#3<|end|><|start|>assistant<|channel|>final<|message|>#4": "4",
    "<think>a<think>\\boxed{1}</think>\\boxed{2}": "2",
    "\\boxed 5": "5",
    "<thinking>\\boxed{3}</thinking>\nThe answer is 4": "4",
    "<THINK>\\boxed{3}</THINK>\nThe answer is 4": "4",
    "<reasoning>\\boxed{3}": None,
    "Step 2: 6*7=42 ки\nStep 3: The answer is: 42 ки": "42",
    "(The answer is 42)": "42",
    "$The answer is 42$": "42",
    "The answer is (1, 2]": "(1, 2]",
    "The answer is: therefore 42": "42",
    "The answer is: - 42": "42",
    "The answer is: -42": "-42",
    "The answer is $\\{1,2\\}$.": "$\\{1,2\\}$",
    "<s>The answer is 5</s>": "5",
    "<|im_start|>assistant\nThe answer is 5<|im_end|>": "5",
    "Problem #2 is hard. #### 7": "7",
    "\\boxed{42}. For problem #2, see above.": "42",
    "#### $5.00 per hour": "$5.00 per hour",
    "####\n42": "42",
    "# 42": "42",
    'The answer is "29".': "29",
    "The answer is <b>29</b>.": "29",
    "\\boxed{The answer is 42}": "The answer is 42",
}


@pytest.mark.parametrize("text", FORMS)
def test_what_models_write(text):
    """Markdown, end tokens, thoughts, headings, and marks of several kinds: the last one counts."""
    assert extract_answer(text) == FORMS[text]


DEGENERATE = [
    "The answer is: 5" + " " * 10**6,
    "ки " * 10**6,
    "The answer is: 5 " + "ки " * 10**6 + "x",
    "#" * 10**6,
    "# " * 10**6,
    "\\boxed{" * 10**5,
    "\\boxed{" * 10**5 + "}" * 10**5,
    "0" * 10**6,
    "{" * 10**6,
    "}" * 10**6,
    "<think>" * 10**5,
    "<think>" * 10**5 + "</think>" * 10**5,
    "</think>" * 10**5,
    "The answer is " * 10**5,
    "The answer is **" * 10**5,
    "*" * 10**6,
    "The answer is " + "*" * 10**6 + "x",
    "_" * 10**6,
    "answer " * 10**5,
    "answer to " * 10**5,
    "$$" * 10**5 + "The answer is " + "$$" * 10**5,
    "The answer is " + "\\begin{" * 10**5,
    "\n" * 10**6,
    "The answer is" + "\n" * 10**6,
    "<|" * 10**5,
    "<|a" * 10**5,
    "The answer is 1" + ". A" * 10**5,
    "The answer is " + ")" * 10**5,
    "The answer is " + "}" * 10**5,
    "The answer is " + "$" * (10**5 + 1),
    "The answer is 5" + ".ки" * 10**5,
    "The answer is 5" + " I hope it is correct." * 10**5,
    "I hope it is correct." * 10**5,
    "the final answer " * 10**5,
    "<answer>" * 10**5,
    "<answer>5</" * 10**5,
    "#1" * 10**5,
    "#1\n" * 10**5,
    "#### a\n" * 10**5,
    "\\boxed " * 10**5,
    "\\boxed" + " " * 10**6,
    "<b" * 10**5,
    "The answer is " + "<b " * 10**5,
    "\\" * 10**6,
    "answer is a " * 10**5,
    "</s>" * 10**5,
    " </s>x" * 10**5,
    "therefore " * 10**5,
    "The answer is " + "therefore " * 10**5,
    "The answer is " + "_" * 10**6 + "1",
    "[INST]" * 10**5,
    "<" * 10**6,
    "answer:\n" * 10**5,
    "\t\x0b\u2028" * 10**5,
    "a.\u00a0" * 10**5,
    "\\boxed{ " * 10**5 + " }" * 10**5,
    "The answer is 5" + "\\)" * 10**5,
    "The answer is 5" + "\\]" * 10**5,
    "The answer is 5" + "</b>" * 10**5,
]


@pytest.mark.parametrize("text", DEGENERATE, ids=lambda text: re.sub(r"\W", ".", text[:20]))
def test_scans_are_linear(text):
    """A million characters take less than a second of this process."""
    start = time.process_time()
    extract_answer(text)
    exact_answer(text, "5")
    assert time.process_time() - start < 2 * max(1, len(text) / 1e6)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Paris", "Paris", ("Paris", True)),
        ("  New\n York ", "New York", ("New\n York", True)),
        ("paris", "Paris", ("paris", False)),
        ("Paris.", "Paris", ("Paris.", False)),
        (r"It is \boxed{Paris}.", "Paris", ("Paris", True)),
        ("The answer is: Paris.", "Paris", ("Paris", True)),
        ("Let me think. #### Lyon", "Paris", ("Lyon", False)),
        ("a # b", "a # b", ("a # b", True)),  # marks mean nothing in what is right as a whole
        ("0.50", "1/2", ("0.50", False)),  # no mathematics
        ("", "Paris", ("", False)),
    ],
)
def test_exact_answers(text, gold, expected):
    assert exact_answer(text, gold) == expected
