import contextlib
import inspect
import random
import threading

import pytest
import torch
from small_models import MODELS, runs_continuously, save_small_model

import probe
import probe.solutions._generation
from probe.errors import ProbeError
from probe.problems import load_problems
from probe.solutions import _continuous as continuous
from probe.solutions import _packed, generate
from probe.solutions import _slots as slots

ENGINES = ("static", "continuous")


@pytest.fixture(scope="module")
def prompts(tiny):
    problems = load_problems("tiny-math", questions=23)
    return [tiny.tokenizer(problem.question)["input_ids"] for problem in problems]


def answers(model, prompts, limits=None, **options):
    """The answer to each prompt, by its place."""
    batches = generate(model, prompts, limits or [64] * len(prompts), **options)
    found = [answer for batch in batches for answer in batch]
    assert len({answer.place for answer in found}) == len(found)
    return {answer.place: answer.tokens for answer in found}


def plain_greedy(model, prompt, limit):
    """One prompt, one token at a time, without a cache."""
    tokens = []
    while len(tokens) < limit and model.tokenizer.eos_token_id not in tokens:
        with torch.no_grad():
            logits = model.network._module(torch.tensor([[*prompt, *tokens]])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_plain_greedy_decoding(tiny, prompts, engine):
    limits = [random.Random(place).randrange(3, 64) for place in range(len(prompts))]
    found = answers(tiny, prompts, limits, engine=engine, batch_size=8)
    for place, prompt in enumerate(prompts):
        assert found[place] == plain_greedy(tiny, prompt, limits[place])
    assert any(len(found[place]) == limits[place] for place in found)
    assert any(tiny.tokenizer.eos_token_id in tokens for tokens in found.values())


def test_rows_that_have_ended_leave_a_static_batch(tiny, prompts, monkeypatch):
    stop = ("50",)
    whole = answers(tiny, prompts, engine="static", stop=stop)
    network, rows = tiny.network._module, []
    forward = network.forward

    def counted(*given, **named):
        rows.append(len(named["input_ids"]))
        return forward(*given, **named)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(network, "forward", counted)
    for piece in (64, 5, 1):
        monkeypatch.setattr(probe.solutions._generation, "PIECE", piece)
        rows.clear()
        assert answers(tiny, prompts, engine="static", stop=stop) == whole
        lengths = [len(tokens) for tokens in whole.values()]
        # A row stays to the end of the piece in which it ends; the batch, to its last row.
        pieces = [min(-(-length // piece) * piece, max(lengths)) for length in lengths]
        assert len(rows) == max(lengths)
        assert sum(rows) == (len(lengths) * max(lengths) if piece == 64 else sum(pieces))


def test_packed_weights_write_the_same(tiny, prompts, monkeypatch):
    plain = answers(tiny, prompts, engine="static", batch_size=8)
    monkeypatch.setattr(_packed, "PACKED_FROM", 0)
    layers = [part for part in tiny.network._module.modules() if isinstance(part, torch.nn.Linear)]
    before, products = [vars(layer).get("forward") for layer in layers], []

    def counted(*given):
        products.append(given)
        return product(*given)

    product = _packed._product
    monkeypatch.setattr(_packed, "_product", counted)
    assert answers(tiny, prompts, engine="static", batch_size=8) == plain
    assert not _packed._can() or len(products) >= len(layers)
    assert [vars(layer).get("forward") for layer in layers] == before
    products.clear()
    monkeypatch.setattr(_packed, "PACKED_BYTES", 0)
    assert answers(tiny, prompts, engine="static", batch_size=8) == plain
    assert not products


def test_only_a_cache_of_keys_alone_lets_rows_go(tmp_path):
    """What a linear attention or a convolution keeps is no row of keys."""
    kinds = {}
    for name in ("llama", "gemma2", "lfm2"):
        model = probe.load_model(str(save_small_model(tmp_path / name, name)))
        kinds[name] = probe.solutions._generation._cache_of(model) is not None
    assert kinds == {"llama": True, "gemma2": True, "lfm2": False}


@pytest.mark.parametrize("name", MODELS)
def test_engines_agree_on_every_architecture(tmp_path, monkeypatch, name):
    """Static batches, slots, and where these do not fit the batching of transformers."""
    model = probe.load_model(str(save_small_model(tmp_path, name)))
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randrange(3, 30))] for _ in range(8)]
    limits = [draw.randrange(5, 40) for _ in prompts]
    said = []
    static = answers(model, prompts, limits, engine="static", batch_size=3)
    fails = "none for the attention of|did not pass a trial"
    if not runs_continuously(name):
        assert static == answers(model, prompts, limits, engine="static", batch_size=1)
        with contextlib.suppress(RuntimeError):  # some run in slots, and no other way
            assert answers(model, prompts, limits, engine="continuous") == static
        monkeypatch.setattr(slots, "slots_for", lambda *given: 0)
        with pytest.raises(RuntimeError, match=fails):
            answers(model, prompts, limits, engine="continuous")
        return
    assert answers(model, prompts, limits, engine="continuous", say=said.append) == static
    monkeypatch.setattr(slots, "slots_for", lambda *given: 0)
    assert answers(model, prompts, limits, engine="continuous", say=said.append) == static
    assert said == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stop", [(";",), ("50", "=2"), ("no such text",), ("</s>",)])
def test_stop_strings(tiny, prompts, engine, stop):
    """An answer ends with the first token that completes one, and keeps it."""
    whole = answers(tiny, prompts, engine="static")
    found = answers(tiny, prompts, engine=engine, stop=stop, batch_size=8)
    cut = 0
    for place, tokens in whole.items():
        expected = next(
            (
                tokens[:length]
                for length in range(1, len(tokens) + 1)
                if any(text in tiny.tokenizer.decode(tokens[:length]) for text in stop)
            ),
            tokens,
        )
        assert found[place] == expected
        cut += expected != tokens
    assert (cut > 0) == (stop in [(";",), ("50", "=2")])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_special_token_may_be_a_stop_string(tiny, prompts, monkeypatch, engine):
    """Other models end a turn with a token that no file of theirs names."""
    end = tiny.tokenizer.eos_token_id
    expected = answers(tiny, prompts, engine="static")
    filling = tiny.tokenizer.pad_token_id
    monkeypatch.setattr("probe.solutions._generation.end_tokens", lambda *_: (filling,))
    endless = answers(tiny, prompts, engine=engine)
    assert all(len(endless[place]) > len(expected[place]) for place in expected)
    stop = [tiny.tokenizer.convert_ids_to_tokens(end)]
    assert answers(tiny, prompts, engine=engine, stop=stop) == expected


def test_more_prompts_than_run_at_once(tiny, prompts, monkeypatch):
    monkeypatch.setattr(continuous, "REQUESTS", 3)
    monkeypatch.setattr(continuous, "BATCH_TOKENS", 16)
    batches = list(generate(tiny, prompts, [64] * len(prompts), engine="continuous"))
    assert len(batches) > 1  # those that have ended do not wait for the others
    found = {answer.place: answer.tokens for batch in batches for answer in batch}
    assert found == answers(tiny, prompts, engine="static")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_skipped_moves_nothing(tiny, prompts, engine):
    everything = answers(tiny, prompts, engine=engine, batch_size=8)
    skip = set(range(0, len(prompts), 2))
    rest = answers(tiny, prompts, engine=engine, batch_size=8, skip=skip)
    assert rest == {place: everything[place] for place in everything.keys() - skip}
    assert answers(tiny, prompts, engine=engine, skip=everything.keys()) == {}


def test_nothing_is_left_behind(tiny, prompts, no_slots):
    module = tiny.network._module
    before = module.config._attn_implementation, threading.active_count()
    steps = generate(tiny, prompts, [64] * len(prompts), engine="continuous")
    next(steps)
    assert threading.active_count() > before[1]
    steps.close()
    assert (module.config._attn_implementation, threading.active_count()) == before
    with torch.no_grad():
        module(torch.tensor([prompts[0]]))


def test_auto_goes_on_with_static_batches_where_continuous_fails(tiny, prompts, monkeypatch):
    """What was answered before the failure is not answered again."""
    expected = answers(tiny, prompts, engine="static")
    usual = probe.solutions._generation._continuous

    def fails(*given):
        yield next(usual(*given))
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(probe.solutions._generation, "_continuous", fails)
    monkeypatch.setattr(probe.solutions._generation, "CONTINUOUS_ON", ("cpu",))
    said = []
    assert answers(tiny, prompts, engine="auto", say=said.append) == expected
    assert said == [
        "continuous batching failed (CUDA out of memory.); going on with static batches"
    ]
    with pytest.raises(RuntimeError, match="out of memory"):
        answers(tiny, prompts, engine="continuous")


def test_a_failure_inside_the_engine_is_raised(tiny, prompts, monkeypatch):
    module = tiny.network._module
    attention = module.config._attn_implementation
    monkeypatch.setattr(module, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match="division by zero"):
        answers(tiny, prompts, engine="continuous")
    assert module.config._attn_implementation == attention


def test_the_context_bounds_a_static_batch(tiny):
    prompt = tiny.tokenizer("12+3=?")["input_ids"]
    long = prompt * ((tiny.context - 10) // len(prompt))
    (tokens,) = answers(tiny, [long], [100], engine="static").values()
    assert len(long) + len(tokens) <= tiny.context


def test_an_unknown_engine(tiny, prompts):
    with pytest.raises(ProbeError, match="engine 'vllm' is not known; one of: auto, continuous"):
        answers(tiny, prompts, engine="vllm")
