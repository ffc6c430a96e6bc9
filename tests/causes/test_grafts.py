"""Grafts against plain torch."""

import copy
from operator import attrgetter

import pytest
import torch
from plain import ANATOMIES
from small_models import MODELS, save_small_model, small_model

import probe
from probe.causes import graft
from probe.errors import ProbeError

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25, 9], [80, 66, 9, 42]),
]


def pair_of(folder, name, noise=0.05):
    """Two small models of one architecture, loaded."""
    one = probe.load_model(str(save_small_model(folder / "one", name)))
    other = small_model(name)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    other.save_pretrained(folder / "other")
    for file in (folder / "one").glob("tokenizer*"):
        (folder / "other" / file.name).write_bytes(file.read_bytes())
    return one, probe.load_model(str(folder / "other"))


def losses(module):
    """Loss of each sequence, in plain torch."""
    found = []
    for sequence in SEQUENCES:
        fed = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])
        with torch.no_grad():
            logits = module(input_ids=fed, use_cache=False).logits[0, len(sequence.prompt) - 1 :]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sequence.answer)))
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_graft_is_a_model_with_these_weights(tmp_path, name):
    model, other = pair_of(tmp_path, name)
    anatomy = ANATOMIES[model.config.model_type]
    before = {key: value.clone() for key, value in model.network._module.state_dict().items()}
    layers = [f"l{number}" for number in range(model.n_layers)]
    asked, truths = [["l0"], [*layers, "rest"]], []
    if model.blocks[0].attention == anatomy.attention and not anatomy.one_block:
        asked.append(["a0"])
    for parts in asked:
        mixed = copy.deepcopy(model.network._module)
        theirs = other.network._module
        if len(parts) > 1:
            mixed.load_state_dict(theirs.state_dict())
        else:
            mine, given = (attrgetter(anatomy.layers)(module)[0] for module in (mixed, theirs))
            if parts == ["a0"]:
                mine, given = (getattr(one, anatomy.attention) for one in (mine, given))
            mine.load_state_dict(given.state_dict())
        truths.append(losses(mixed))
    found = graft(model, other, SEQUENCES, asked)
    assert (found.loss - torch.stack(truths)).abs().max() <= 1e-5
    assert (found.whole.loss[0] - losses(model.network._module)).abs().max() <= 1e-5
    assert (found.kl > 0).all()
    assert not found.whole.kl.any()
    after = model.network._module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_grafts_of_nothing_and_of_itself_change_nothing(tiny):
    found = graft(tiny, tiny, SEQUENCES_OF_TINY, [[], ["l0", "rest"]])
    for name in ("loss", "margin", "accuracy"):
        assert torch.equal(getattr(found, name), getattr(found.whole, name).expand(2, -1))


SEQUENCES_OF_TINY = [("50-7-67-53=?", "50-7=43;"), ("12+30=?", "12+30=42;")]


@pytest.mark.parametrize("instead", ["random", "shuffled"])
def test_nulls_are_as_far_away(tmp_path, instead):
    from probe.causes._grafts import _null

    torch.manual_seed(0)
    own, put = torch.randn(30, 20), torch.randn(30, 20)
    null = _null(own, put, instead, torch.Generator().manual_seed(1))
    distance = float((put - own).norm())
    assert float((null - own).norm()) == pytest.approx(distance, rel=1e-5)
    assert float((null - put).norm()) > 0.5 * distance
    if instead == "shuffled":
        assert torch.allclose((null - own).flatten().sort()[0], (put - own).flatten().sort()[0])
    model, other = pair_of(tmp_path, "llama")
    real = graft(model, other, SEQUENCES, [["m0"]])
    other_way = graft(model, other, SEQUENCES, [["m0"]], instead=instead, seed=3)
    again = graft(model, other, SEQUENCES, [["m0"]], instead=instead, seed=3)
    assert torch.equal(other_way.loss, again.loss)
    assert not torch.equal(other_way.loss, real.loss)


def test_what_a_grafted_model_writes_is_judged():
    pairs = "probe:tiny-math/sft", "probe:tiny-math/grpo"
    wrote = []
    graft(
        *pairs,
        SEQUENCES_OF_TINY,
        [["l0", "l1", "l2", "l3", "rest"]],
        judge=lambda place, tokens: not wrote.append((place, tuple(tokens))),
        max_new_tokens=20,
    )
    truth = []
    graft(
        pairs[1],
        pairs[1],
        SEQUENCES_OF_TINY,
        [[]],
        judge=lambda place, tokens: not truth.append((place, tuple(tokens))),
        max_new_tokens=20,
    )
    assert sorted(wrote[2:]) == sorted(truth[:2]) == sorted(truth[2:])


@pytest.mark.parametrize(
    ("grafts", "asked", "message"),
    [
        ([["m9"]], {}, "no part 'm9'"),
        ([["a"]], {}, "no part 'a'"),
        ([["model.layers.0"]], {}, "no part 'model.layers.0'"),
        (["m0"], {}, "lists of parts"),
        ([["m0"]], {"instead": "zero"}, "instead 'zero' is not known"),
        ([["m0"]], {"max_new_tokens": True}, "max_new_tokens"),
    ],
)
def test_what_is_refused(tiny, grafts, asked, message):
    with pytest.raises(ProbeError, match=message):
        graft(tiny, tiny, SEQUENCES_OF_TINY, grafts, **asked)


def test_models_of_other_shapes_are_refused(tiny, llama):
    with pytest.raises(ProbeError, match="of the shape"):
        graft(tiny, llama, SEQUENCES_OF_TINY, [["m0"]])
