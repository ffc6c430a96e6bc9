import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.recipe import Recipe, read_recipe, recipe_files, recipe_from, recipe_table

MINIMAL = """
name = "mine"
[[pairs]]
name = "p"
before = "a/b"
after = "a/c"
[[benchmarks]]
name = "gsm8k"
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_reads(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe_from(json.loads(json.dumps(recipe_table(recipe))), "x") == recipe


def test_defaults_are_the_published_runs(tmp_path):
    recipe = read_recipe(write(tmp_path, MINIMAL))
    options = recipe.selection
    assert (options.beta, options.gamma, options.delta) == (0.5, 1.5, 0.5)
    assert (options.samples, options.seed, options.convention) == (100, 42, "code")
    assert options.alpha == (0.03, 0.1, 0.3, 0.5)


def test_every_field_has_a_docstring():
    import inspect

    import probe.recipe as module

    source = inspect.getsource(module)
    for kind in vars(module).values():
        if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
            for field in dataclasses.fields(kind):
                assert re.search(rf'\n    {field.name}: [^\n]*\n    """', source), field.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection.sample": "5"}, "unknown key 'selection.sample'; did you mean 'samples'?"),
        ({"selektion.alpha": "[1]"}, "unknown key 'selektion'; did you mean 'selection'?"),
        ({"pairs.0.bfore": "x"}, "unknown key 'pairs.0.bfore'; did you mean 'before'?"),
        ({"benchmarks.0.file": "x"}, "known keys: name, path"),
        ({"selection.samples": "true"}, "selection.samples is True: a whole number"),
        ({"selection.samples": "2.5"}, "selection.samples is 2.5: a whole number"),
        ({"selection.samples": "0"}, "greater than or equal to 1"),
        ({"selection.alpha": "[0.1, -1]"}, "greater than 0"),
        ({"selection.gamma": "inf"}, "finite"),
        ({"solutions.questions": "some"}, "solutions.questions is 'some': a whole number .*'all'"),
        ({"attribution.granularity": "heads"}, "should be 'qkv', 'block' or 'head'"),
        ({"compute.dtype": "int8"}, "'float32', 'bfloat16'"),
        ({"pairs.0.prompt": "Q: {quest}"}, r"pairs.0.prompt: a prompt needs \{question\}"),
        ({"pairs.7.before": "x"}, "'7' is not one of its 1 entries"),
        ({"name.x": "x"}, "name has no keys"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_a_bad_value_names_file_key_and_what_was_expected(tmp_path, overrides, message):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ProbeError, match=message) as caught:
        read_recipe(path, overrides)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ProbeError, match=r"no recipe 'tiny-mat'; did you mean tiny-math\?"):
        read_recipe("tiny-mat")
    with pytest.raises(ProbeError, match="there are: .*tiny-math"):
        read_recipe("zzz")
    with pytest.raises(ProbeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(ProbeError, match="not TOML: Invalid value"):
        read_recipe(write(tmp_path, "name = "))
    with pytest.raises(ProbeError, match="'pairs' is missing"):
        read_recipe(write(tmp_path, 'name = "x"\nbenchmarks = [{name = "gsm8k"}]'))
    twice = MINIMAL + '[[pairs]]\nname = "p"\nbefore = "a/b"\nafter = "a/c"\n'
    with pytest.raises(ProbeError, match="the name 'p' stands twice"):
        read_recipe(write(tmp_path, twice))


def test_overrides_are_toml_where_they_can_be(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = read_recipe(
        path,
        {
            "selection.samples": "50",
            "selection.alpha": "[0.1]",
            "pairs.0.before": "some/folder",
            "compute.device": "cuda:0,cuda:1",
            "solutions.questions": 7,
        },
    )
    assert recipe.selection.samples == 50
    assert recipe.selection.alpha == (0.1,)
    assert recipe.pairs[0].before == "some/folder"
    assert recipe.compute.device == "cuda:0,cuda:1"
    assert recipe.solutions.questions == 7


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(f.name for f in dataclasses.fields(Recipe))), VALUES)
def test_any_value_anywhere_is_taken_or_refused_in_one_line(key, value):
    table = {
        "name": "x",
        "pairs": [{"name": "p", "before": "a/b", "after": "a/c"}],
        "benchmarks": [{"name": "gsm8k"}],
    }
    try:
        recipe_from(table | {key: value}, "here")
    except ProbeError as error:
        assert str(error).startswith("here: ")
        assert "\n" not in str(error)
