"""Trajectories as pairs."""

import pytest

from probe.errors import ProbeError
from probe.recipe import read_recipe, recipe_from, recipe_table

ALONG = {
    "name": "along",
    "trajectories": [
        {"name": "rl", "base": "a/base", "checkpoints": ["a/rl@step_100", "a/rl@step_20"]}
    ],
    "benchmarks": [{"name": "gsm8k"}],
}


def along(**changes):
    (trajectory,) = ALONG["trajectories"]
    return recipe_from(ALONG | {"trajectories": [trajectory | changes]}, "here")


def test_each_checkpoint_is_a_pair_with_the_base():
    recipe = along(prompt="chat", max_new_tokens=7, method="GRPO", stop=["##"])
    assert [(pair.name, pair.before, pair.after) for pair in recipe.pairs] == [
        ("rl-step-100", "a/base", "a/rl@step_100"),
        ("rl-step-20", "a/base", "a/rl@step_20"),
    ]
    for pair in recipe.pairs:
        assert (pair.prompt, pair.max_new_tokens) == ("chat", 7)
        assert (pair.method, pair.stop) == ("GRPO", ("##",))
    assert len({pair.asked()[0] for pair in recipe.pairs}) == 1  # the base answers once


def test_what_was_read_holds_pairs_only_and_is_read_again_as_it_is():
    recipe = along()
    assert recipe.trajectories == ()
    assert recipe_from(recipe_table(recipe), "here") == recipe


def test_a_pattern_stands_for_the_checkpoints_of_a_folder_by_their_numbers(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "logs"):
        (tmp_path / name).mkdir()
    recipe = along(checkpoints=f"{tmp_path}#checkpoint-*")
    assert [pair.name for pair in recipe.pairs] == ["rl-step-3", "rl-step-20", "rl-step-100"]
    assert recipe.pairs[0].after == f"{tmp_path}#checkpoint-3"


def test_a_folder_below_a_step_is_of_that_step(tmp_path):
    inside = tmp_path / "global_step_40" / "actor" / "huggingface"
    inside.mkdir(parents=True)
    recipe = along(checkpoints=f"{tmp_path}#global_step_*/actor/huggingface")
    assert [pair.name for pair in recipe.pairs] == ["rl-step-40"]
    assert recipe.pairs[0].after == f"{tmp_path}#global_step_40/actor/huggingface"


def test_steps_that_are_given_count():
    names = [pair.name for pair in along(steps=[1, 0]).pairs]
    assert names == ["rl-step-1", "rl-step-0"]


def test_pairs_come_before_and_an_included_trajectory_comes_too(tmp_path):
    (tmp_path / "inner.toml").write_text(
        "name = 'inner'\nbenchmarks = [{name = 'gsm8k'}]\n[[trajectories]]\nname = 'rl'\n"
        "base = 'a/b'\ncheckpoints = ['a/b@step_7']\n"
    )
    path = tmp_path / "outer.toml"
    path.write_text(
        "name = 'outer'\ninclude = ['inner.toml']\n"
        "pairs = [{name = 'p', before = 'a/b', after = 'a/c'}]\n"
    )
    assert [pair.name for pair in read_recipe(path).pairs] == ["p", "rl-step-7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": ["a/Model-7B"]}, "'a/Model-7B' says no step, as step_100 does"),
        ({"checkpoints": []}, "trajectory 'rl' has no checkpoints"),
        ({"steps": [1]}, "has 2 checkpoints and 1 steps"),
        ({"steps": [5, 5]}, "the name 'rl-step-5' stands twice"),
        ({"steps": [-1, 2]}, "greater than or equal to 0"),
        ({"checkpoints": "nowhere#checkpoint-*"}, "folder 'nowhere' does not exist"),
        ({"bse": "x"}, "unknown key 'trajectories.0.bse'; did you mean 'base'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changes, message):
    with pytest.raises(ProbeError, match=message) as caught:
        along(**changes)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


def test_neither_pairs_nor_trajectories():
    with pytest.raises(ProbeError, match="at least one pair or trajectory was expected"):
        recipe_from(ALONG | {"trajectories": []}, "here")
