"""Models that stay in memory: loaded once, while they are small, and never sent along."""

import pickle

import pytest

import probe
from probe.run import _kept_models
from probe.run._kept_models import KeptModels

REFERENCES = ["probe:tiny-math/sft", "probe:tiny-math/grpo", "probe:tiny-math/dpo"]


def loader(loaded):
    def load(reference):
        loaded.append(reference)
        return probe.load_model(reference, device="cpu")

    return load


def test_a_small_model_is_loaded_once():
    loaded, kept = [], KeptModels()
    load = loader(loaded)
    first = [kept.get(name, "cpu", "eager", lambda n=name: load(n)) for name in REFERENCES[:2]]
    again = [kept.get(name, "cpu", "eager", lambda n=name: load(n)) for name in REFERENCES[:2]]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert loaded == REFERENCES[:2]
    other = kept.get(REFERENCES[0], "cpu", "liger", lambda: load(REFERENCES[0]))
    assert other is not first[0]


@pytest.mark.parametrize(
    ("each", "all_of_them", "count"), [(2.0, 2.5, 4), (0.5, 9.0, 6), (2, 9, 3)]
)
def test_what_is_large_beside_the_memory_is_not_kept(monkeypatch, each, all_of_them, count):
    size = _kept_models._bytes(probe.load_model(REFERENCES[0]))
    monkeypatch.setattr(_kept_models, "_memory", lambda device: size)
    monkeypatch.setattr(_kept_models, "EACH", each)
    monkeypatch.setattr(_kept_models, "ALL", all_of_them)
    loaded, kept = [], KeptModels()
    load = loader(loaded)
    for _ in range(2):
        for name in REFERENCES:
            kept.get(name, "cpu", "eager", lambda n=name: load(n))
    assert len(loaded) == count


def test_a_model_over_several_devices_is_not_kept():
    loaded, kept = [], KeptModels()
    load = loader(loaded)
    for _ in range(2):
        kept.get(REFERENCES[0], "cpu,cpu", "eager", lambda: load(REFERENCES[0]))
    assert len(loaded) == 2


def test_models_do_not_travel():
    kept = KeptModels()
    kept.get(REFERENCES[0], "cpu", "eager", lambda: probe.load_model(REFERENCES[0]))
    assert len(kept._models) == 1
    assert pickle.loads(pickle.dumps(kept))._models == {}


def test_a_run_loads_each_model_once(tmp_path, monkeypatch):
    loaded = []

    def load_model(reference, *rest):
        loaded.append(reference)
        return probe.load_model(reference, *rest)

    monkeypatch.setattr("probe.run._session.load_model", load_model)
    options = {"solutions.questions": 20, "selection.samples": 3, "selection.alpha": [0.5]}
    options |= {"report.resamples": 0, "attribution.control": "loss-matched"}
    probe.run_recipe("tiny-math", tmp_path / "run", overrides=options)
    assert sorted(loaded) == sorted(set(loaded))
