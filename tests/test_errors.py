import pytest

from probe.errors import LONGEST, ProbeError, UnknownNameError
from probe.metrics import METRICS


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a  b: c", "a  b: c"),
        ("one\ntwo\r\nthree\u2028four\x85", "one two three four"),
        ("half \ud800 of a letter", "half \ufffd of a letter"),
    ],
)
def test_a_complaint_is_one_line(text, shown):
    assert str(ProbeError(text)) == shown


def test_a_complaint_is_not_longer_than_one_reads():
    text = str(ProbeError("unknown key '" + "9" * 10**6 + "'; known: a"))
    assert len(text) < LONGEST + 10
    assert text.startswith("unknown key '999")
    assert text.endswith("999'; known: a")


def test_a_name_that_a_table_lacks_is_a_users_mistake_and_a_key_error():
    with pytest.raises(UnknownNameError, match="'x' is not known; one of: ") as caught:
        METRICS["x"]
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, KeyError)
    assert METRICS.get("x") is None
