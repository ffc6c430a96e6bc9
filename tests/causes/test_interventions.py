"""Interventions against plain torch, and against themselves."""

import copy
import re
from operator import attrgetter

import pytest
import torch
from plain import ANATOMIES, _one_norm, _run, edges
from small_models import MODELS, save_small_model, small_model

import probe
from probe.causes import answers_under, intervene
from probe.causes._plans import partners
from probe.errors import ProbeError

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25, 9], [80, 66, 9, 42]),
    probe.Sequence([31, 2, 2, 64, 18], [7, 1, 30]),
]
UNLIKE = (
    "llama",
    "gpt2",
    "phi",
    "cohere2",
    "olmo2",
    "mixtral",
    "deepseek_v3",
    "lfm2",
    "nemotron_h",
)
LEVELS = ("block", "qkv", "head")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of every architecture, its module, and another of the same architecture."""
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=UNLIKE)
def some(request, tmp_path_factory):
    """The same of architectures that are laid out in different ways."""
    return made(request.param, tmp_path_factory)


def made(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    one = probe.load_model(str(save_small_model(folder / "one", name)))
    other = small_model(name)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other.save_pretrained(folder / "other")
    for file in (folder / "one").glob("tokenizer*"):
        (folder / "other" / file.name).write_bytes(file.read_bytes())
    two = probe.load_model(str(folder / "other"))
    return one, one.network._module, two, two.network._module


def graph_of(model, level):
    """Its graph; not every attention has query, key and value, or is a sum of its heads."""
    try:
        return model.graph(level)
    except ProbeError as error:
        if level == "block":
            raise
        pytest.skip(str(error))


def drawn(graph, count, seed=0):
    """Some edges of a graph."""
    every = graph.mask.nonzero()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return [tuple(every[i].tolist()) for i in order[:count]]


def removals(graph, chosen, strength=1.0):
    """The same as plain torch is told it: {target: {source: strength}}."""
    found = {}
    for source, target in chosen:
        found.setdefault(graph.targets[target], {})[graph.sources[source]] = strength
    return found


def outcome(sequence, logits):
    """Loss, margin and accuracy of a sequence, from logits [token, vocabulary]."""
    answer = torch.tensor(sequence.answer)
    own = logits.gather(1, answer[:, None])[:, 0]
    rest = logits.scatter(1, answer[:, None], float("-inf")).amax(1)
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return torch.stack([loss, (own - rest).mean(), (logits.argmax(1) == answer).double().mean()])


def plain(module, sequence, removed, other=None, written=None):
    with torch.no_grad():
        logits = _run(module, sequence, removed, other, written=written).logits
    return logits[0, len(sequence.prompt) - 1 :].double()


def compare(found, number, place, sequence, module, removed, other=None, written=None):
    truth = plain(module, sequence, removed, other, written)
    got = torch.stack(
        [part[number, place].double() for part in (found.loss, found.margin, found.accuracy)]
    )
    assert (got - outcome(sequence, truth)).abs().max() <= 1e-5 * max(1, float(truth.abs().max()))
    whole = plain(module, sequence, {})
    kl = torch.nn.functional.kl_div(
        truth.log_softmax(1), whole.log_softmax(1), reduction="none", log_target=True
    )
    assert abs(float(found.kl[number, place]) - float(kl.sum(1).mean())) <= 1e-5


@pytest.mark.parametrize("level", LEVELS)
def test_removing_and_scaling_are_what_plain_torch_says(pair, level):
    model, module, _, _ = pair
    graph = graph_of(model, level)
    sets = [drawn(graph, count, seed) for seed, count in enumerate((1, 3, 5))]
    for do, factor, strength in (
        ("remove", None, 1.0),
        ("scale", 0.75, 0.25),
        ("scale", 1.5, -0.5),
    ):
        found = intervene(model, SEQUENCES, sets, do, granularity=level, factor=factor)
        for number, chosen in enumerate(sets):
            for place, sequence in enumerate(SEQUENCES):
                compare(found, number, place, sequence, module, removals(graph, chosen, strength))


@pytest.mark.parametrize("level", LEVELS)
def test_patching_is_what_plain_torch_says(pair, level):
    model, module, other, beside = pair
    graph = graph_of(model, level)
    sets = [drawn(graph, count, seed) for seed, count in enumerate((1, 4))]
    found = intervene(model, SEQUENCES, sets, "patch", granularity=level, other=other)
    for place, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            written = _run(beside, sequence).outputs
        for number, chosen in enumerate(sets):
            compare(found, number, place, sequence, module, removals(graph, chosen), written)


def test_keeping_is_removing_the_others(pair):
    model, module, _, _ = pair
    graph = graph_of(model, "qkv")
    sets = [graph.mask.clone() for _ in range(2)]
    for number, matrix in enumerate(sets):
        for edge in drawn(graph, 4, number):
            matrix[edge] = False
    kept = intervene(model, SEQUENCES, sets, "keep")
    gone = intervene(model, SEQUENCES, [graph.mask & ~matrix for matrix in sets], "remove")
    for name in ("loss", "margin", "kl", "accuracy"):
        assert torch.equal(getattr(kept, name), getattr(gone, name))
    for number, matrix in enumerate(sets):
        chosen = [tuple(edge) for edge in (graph.mask & ~matrix).nonzero().tolist()]
        compare(kept, number, 0, SEQUENCES[0], module, removals(graph, chosen))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_what_changes_nothing_is_the_model_itself_to_the_last_bit(some, level, ablation):
    model, _, other, _ = some
    graph = graph_of(model, level)
    asked = {"granularity": level, "ablation": ablation}
    cases = [
        intervene(model, SEQUENCES, [graph.mask], "keep", **asked),
        intervene(model, SEQUENCES, [[]], "remove", **asked),
        intervene(model, SEQUENCES, [graph.mask], "scale", factor=1.0, **asked),
        intervene(model, SEQUENCES, [[]], "patch", other=other, granularity=level),
        intervene(model, SEQUENCES, [graph.mask], "add", other=other, factor=0, granularity=level),
    ]
    for found in cases:
        for name in ("loss", "margin", "accuracy"):
            assert torch.equal(getattr(found, name), getattr(found.whole, name))
        assert not found.kl.any()
    for place, sequence in enumerate(SEQUENCES):
        fed = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])
        with torch.no_grad():
            own = model.network._module(input_ids=fed, use_cache=False).logits
        scored = own[0, len(sequence.prompt) - 1 :]
        own = -scored.log_softmax(1).gather(1, torch.tensor(sequence.answer)[:, None])
        assert float(own.mean()) == pytest.approx(float(cases[0].loss[0, place]), abs=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_keeping_none_is_removing_all(some, ablation):
    model, _, _, _ = some
    for level in ("block", "qkv"):
        graph = graph_of(model, level)
        asked = {"granularity": level, "ablation": ablation}
        none = intervene(model, SEQUENCES, [[]], "keep", **asked)
        every = intervene(model, SEQUENCES, [graph.mask], "remove", **asked)
        for name in ("loss", "margin", "kl", "accuracy"):
            assert torch.equal(getattr(none, name), getattr(every, name))
        if ablation == "zero":  # nothing is left but what the final norm makes of nothing
            module = model.network._module
            run = plain(
                module,
                SEQUENCES[0],
                {"logits": {s: 1.0 for s in edges(module)["logits"] if "." not in s}},
            )
            assert abs(float(none.loss[0, 0]) - float(outcome(SEQUENCES[0], run)[0])) <= 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_mean_and_resampling_are_what_plain_torch_says(pair, level):
    model, module, _, _ = pair
    graph = graph_of(model, level)
    sets = [drawn(graph, 3)]
    with torch.no_grad():
        runs = [_run(module, sequence).outputs for sequence in SEQUENCES]
    names = graph.sources
    means = {
        name: torch.cat([run[name][0] for run in runs]).mean(0).expand(1, 1, -1) for name in names
    }
    asked = {"granularity": level}
    found = intervene(model, SEQUENCES, sets, ablation="mean", **asked)
    for number, chosen in enumerate(sets):
        compare(found, number, 1, SEQUENCES[1], module, removals(graph, chosen), means)

    found = intervene(model, SEQUENCES, sets, ablation="resample", seed=3, **asked)
    for place, partner in enumerate(partners(3, 3)):
        assert partner != place
        at = torch.arange(SEQUENCES[place].length).clamp_max(SEQUENCES[partner].length - 1)
        beside = {name: runs[partner][name][:, at] for name in names}
        for number, chosen in enumerate(sets):
            compare(found, number, place, SEQUENCES[place], module, removals(graph, chosen), beside)


@pytest.mark.parametrize("level", LEVELS)
def test_adding_a_difference_is_what_plain_torch_says(pair, level):
    """Half of what the one writes more than the other, both left alone, beside what is there."""
    model, module, other, beside = pair
    graph = graph_of(model, level)
    sets = [drawn(graph, count, seed) for seed, count in enumerate((1, 4))]
    asked = {"granularity": level, "other": other, "factor": 0.5}
    found = intervene(model, SEQUENCES[:1], sets, "add", **asked)
    with torch.no_grad():
        theirs, own = (_run(one, SEQUENCES[0]).outputs for one in (beside, module))
    for number, chosen in enumerate(sets):
        half = removals(graph, chosen, 0.5)
        compare(found, number, 0, SEQUENCES[0], module, half, theirs, own)


def crossed(module, beside, source):
    """A model with that block of another which writes a source, and all else its own."""
    anatomy, mixed = ANATOMIES[module.config.model_type], copy.deepcopy(module)
    number = int(re.search(r"\d+", source)[0])
    here, there = (attrgetter(anatomy.layers)(one)[number] for one in (mixed, beside))
    if anatomy.one_block:
        here.load_state_dict(there.state_dict())
        return mixed
    of_attention = (anatomy.attention, anatomy.attention_norm, anatomy.attention_post_norm)
    norm = anatomy.attention_norm if _one_norm(module) else anatomy.ffn_norm
    of_ffn = (anatomy.ffn, norm, anatomy.ffn_post_norm)
    for name in of_attention if source.startswith("a") else of_ffn:
        name = anatomy.mixer if name == anatomy.attention and not hasattr(here, name) else name
        if name and hasattr(here, name):
            getattr(here, name).load_state_dict(getattr(there, name).state_dict())
    return mixed


@pytest.mark.parametrize("level", LEVELS)
def test_swapping_is_what_plain_torch_says(pair, level):
    """The source's own weights are the other's, what it reads is not."""
    model, module, other, beside = pair
    graph = graph_of(model, level)
    blocks = [place for place, name in enumerate(graph.sources) if name != "input"]
    chosen = [(s, t) for s in blocks for t in range(len(graph.targets)) if graph.mask[s, t]]
    sets = [chosen[:1], chosen[1 :: len(chosen) // 3]]
    found = intervene(model, SEQUENCES[:2], sets, "swap", granularity=level, other=other)
    names = {graph.sources[source] for one in sets for source, _ in one}
    for place, sequence in enumerate(SEQUENCES[:2]):
        with torch.no_grad():
            written = {n: _run(crossed(module, beside, n), sequence).outputs[n] for n in names}
        for number, edges_of in enumerate(sets):
            compare(found, number, place, sequence, module, removals(graph, edges_of), written)
    same = intervene(model, SEQUENCES[:2], sets, "swap", granularity=level, other=model)
    assert (same.loss - same.whole.loss).abs().max() <= 1e-5


def test_adding_a_difference_to_one_edge_is_patching_it(some):
    model, _, other, _ = some
    graph = graph_of(model, "qkv")
    first = [[(0, target)] for target in range(len(graph.targets)) if graph.mask[0, target]]
    added = intervene(model, SEQUENCES, first, "add", other=other)
    patched = intervene(model, SEQUENCES, first, "patch", other=other)
    assert (added.loss - patched.loss).abs().max() <= 1e-5
    half = intervene(model, SEQUENCES, first, "add", other=other, factor=0.5)
    assert (half.loss - added.loss).abs().max() > 1e-5


def greedily(module, prompt, limit, removed, ends):
    """Token by token, in plain torch."""
    answer = []
    while len(answer) < limit and not (answer and answer[-1] in ends):
        sequence = probe.Sequence(prompt, [*answer, 0])
        with torch.no_grad():
            answer.append(int(_run(module, sequence, removed).logits[0, -1].argmax()))
    return answer


def test_answers_are_written_token_by_token(some):
    model, module, _, _ = some
    graph = graph_of(model, "qkv")
    sets = [[], drawn(graph, 1), drawn(graph, 4)]
    found = answers_under(model, SEQUENCES[:2], sets, max_new_tokens=7)
    for number, chosen in enumerate(sets):
        for place, sequence in enumerate(SEQUENCES[:2]):
            truth = greedily(module, sequence.prompt, 7, removals(graph, chosen), [2])
            assert found[number][place] == truth
    alone = answers_under(model, SEQUENCES[:1], sets[2:], max_new_tokens=7)
    assert alone[0][0] == found[2][0]


def test_judging_what_is_written(tiny):
    sequence = probe.Sequence.from_text(tiny, "50-7-67-53=?", "50-7=43;")
    seen = []
    found = intervene(
        tiny,
        [sequence],
        [[("m0", "logits")], [("input", "logits")]],
        judge=lambda place, tokens: not seen.append(tokens),
        max_new_tokens=5,
    )
    assert found.greedy.tolist() == [[True], [True]]
    assert found.whole.greedy.tolist() == [[True]]
    assert all(len(tokens) <= 5 for tokens in seen)


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_any_batch_size_gives_the_same(llama, size):
    graph = llama.graph("head")
    sets = [drawn(graph, 3, seed) for seed in range(7)]
    asked = {"granularity": "head", "ablation": "mean"}
    truth = intervene(llama, SEQUENCES, sets, batch_size=50, **asked)
    found = intervene(llama, SEQUENCES, sets, batch_size=size, **asked)
    assert (truth.loss - found.loss).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("sets", "asked", "message"),
    [
        ([], {}, "there is no set"),
        ("a0", {}, "sets are str"),
        ([[("input", "a9.q")]], {}, "the graph has no target 'a9.q'"),
        ([[("m1", "a0.q")]], {}, "m1 -> a0.q is no edge"),
        ([[(0, -1)]], {}, "target -1 is none"),
        ([[(True, 1)]], {}, "source True is none"),
        ([["input"]], {}, "'input' is no pair"),
        ([torch.ones(2, 2, dtype=torch.bool)], {}, "set 0 is a tensor"),
        ([[]], {"do": "cut"}, "do 'cut' is not known"),
        ([[]], {"ablation": "noise"}, "ablation 'noise' is not known"),
        ([[]], {"do": "patch"}, "patch needs the other model"),
        ([[]], {"do": "scale"}, "factor is None"),
        ([[]], {"do": "scale", "factor": True}, "factor is True"),
        ([[]], {"factor": 0.5}, "remove has no use for a factor"),
        ([[]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_is_refused(llama, sets, asked, message):
    with pytest.raises(ProbeError, match=message):
        intervene(llama, SEQUENCES, sets, **asked)


def test_resampling_needs_another_sequence(llama):
    with pytest.raises(ProbeError, match="at least two"):
        intervene(llama, SEQUENCES[:1], [[(0, 0)]], ablation="resample")


def test_another_graph_is_refused(llama, tiny):
    with pytest.raises(ProbeError, match="different graphs"):
        intervene(llama, SEQUENCES, [[(0, 0)]], "patch", other=tiny)
