import pytest
from small_models import save_small_model

from probe.plan import make_plan
from probe.recipe import read_recipe


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral", "gemma2"])
def test_a_plan_of_any_architecture(tmp_path, name):
    folder = str(save_small_model(tmp_path / "m", name))
    sides = {f"pairs.{number}.{side}": folder for number in (0, 1) for side in ("before", "after")}
    plan = make_plan(read_recipe("tiny-math", sides))
    (model,) = plan.models
    assert model.here
    assert model.parameters > 1000
    assert model.activation_bytes > 1000
    assert plan.downloads == []
