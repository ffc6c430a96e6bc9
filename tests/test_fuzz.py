"""Every door, with input that nobody would write on purpose."""

import pytest
from fuzzing import DOORS, examples, go_in, limits
from hypothesis import given

SHARE = {"comparisons of answers": 15, "model folders": 50, "run folders": 12}
"""How many inputs each door has here; the others have a hundred. `fuzz_long.py` has no end."""


@pytest.mark.parametrize("name", DOORS)
def test_a_door(name, tmp_path_factory):
    door = DOORS[name]

    @examples(SHARE.get(name, 100))
    @given(value=door.inputs())
    def every(value):
        with limits():
            go_in(door, value, tmp_path_factory.mktemp("door"))

    every()
