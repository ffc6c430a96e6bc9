import pytest

from probe.attribution import METHODS
from probe.errors import LONGEST, ProbeError, UnknownNameError, not_known
from probe.metrics import METRICS
from probe.recipe import read_recipe
from probe.run._checks import check_methods


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


@pytest.mark.parametrize(
    ("given", "meant"),
    [("eapp", "eap"), ("EAP", "eap"), ("exakt", "exact"), ("eap_ig", "eap-ig"), ("zzz", None)],
)
def test_a_mistyped_name_is_answered_with_the_nearest(given, meant):
    said = not_known("method", given, METHODS)
    assert said.startswith(f"method {given!r} is not known; one of: eap, eap-ig, relp, exact")
    assert said.endswith(f"did you mean {meant!r}?") == bool(meant)
    assert ("did you mean" in said) == bool(meant)


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("attribution.method", "eapig", "eap-ig"),
        ("attribution.control", "margins", "margin"),
        ("attribution.target", "margn", "margin"),
        ("compute.dtype", "bfloat61", "bfloat16"),
    ],
)
def test_a_mistyped_value_of_a_recipe_is_answered_so_too(key, given, meant):
    with pytest.raises(ProbeError, match=f"^[^;]*{key} is '{given}'.*; did you mean '{meant}'"):
        check_methods(read_recipe("tiny-math", {key: given}))
