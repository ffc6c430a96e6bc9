"""Traces as a server gets them: packed, unpacked without this package, run on another model.

`test_ndif` does this with a real server; here every architecture and method passes through.
"""

import io
import json
import linecache
import threading
from dataclasses import make_dataclass
from importlib.metadata import version
from weakref import WeakValueDictionary

import cloudpickle.cloudpickle
import pytest
import torch
import zstandard
from nnsight.intervention.serialization import CustomCloudPickler, CustomCloudUnpickler
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import _saves, dec, inc
from small_models import STRUCTURES, WITHOUT_RULES, finest, save_small_model

import probe
from probe.attribution import METHODS, mean_losses
from probe.hosting import load_hosted
from probe.remote import Host
from probe.solutions import generate
from probe.tracing import TARGETS, Target

SEQUENCES = [
    probe.Sequence([3, 14, 15, 92, 6, 5], [35, 8, 9]),
    probe.Sequence([27, 18, 28], [1, 82, 84, 5, 90]),
]


class WithoutProbe(CustomCloudUnpickler):
    """What a server unpacks with, where this package is not installed."""

    def find_class(self, module, name):
        assert module.split(".")[0] not in ("probe", "tests"), f"{module}.{name} was sent"
        return super().find_class(module, name)


@pytest.fixture(autouse=True)
def nothing_goes_as_bytecode(monkeypatch):
    """What has no source goes as bytecode, which another Python than this one cannot read."""

    def refuse(self, function):
        raise AssertionError(f"{function.__module__}.{function.__qualname__} has no source")

    monkeypatch.setattr(cloudpickle.CloudPickler, "_dynamic_function_reduce", refuse)


class InProcess(Host):
    """A server that is this process, with one model."""

    def __init__(self, model):
        """Take the model, with its weights."""
        super().__init__("http://here", jobs=1)
        self.model = model

    def ask(self, path, patience=0.0, hint=""):
        """Say that nothing is up yet."""
        packages = {name: version(name) for name in ("nnsight", "torch", "transformers")}
        return {"python_version": "3.11", "packages": packages, "deployments": {}}

    def run(self, model_key, env, blob):
        """Run a job as an actor does, under autocast."""
        assert json.loads(model_key.split(":", 1)[1])["revision"] is None
        network = self.model.network
        lines = dict(linecache.cache)  # a job registers its source there
        known = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID
        # Another process does not know the classes that come, and makes them from their source.
        cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID = WeakValueDictionary()
        try:
            objects = network._remoteable_persistent_objects()
            tracer = RequestModel.deserialize(blob, objects, True, WithoutProbe)
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                inc()
                try:
                    tracer.execute(tracer.info.code)
                    found = tracer.info.frame.f_locals
                    saved = {name: found[name] for name in found if id(found[name]) in _saves()}
                finally:
                    dec()
        finally:
            cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID = known
            linecache.cache.clear()
            linecache.cache.update(lines)
        with io.BytesIO() as file:
            torch.save(saved, file)
            data = zstandard.ZstdCompressor().compress(file.getvalue())
        self.received += len(data)
        file = io.BytesIO(zstandard.ZstdDecompressor().decompress(data))
        return torch.load(file, weights_only=True)


def test_bytecode_is_noticed():
    """A dataclass has methods that its author did not write: they have no source."""
    made = make_dataclass("Made", ["x"])
    with io.BytesIO() as file, pytest.raises(AssertionError, match="has no source"):
        CustomCloudPickler(file).dump(made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_small_model(tmp_path_factory.mktemp(name), name) for name in STRUCTURES}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_architecture_there_and_here(folders, name):
    here = probe.load_model(str(folders[name]))
    there = load_hosted(str(folders[name]), InProcess(here))
    assert next(there.network._module.parameters()).device.type == "meta"
    for method in METHODS:
        if method == "relp" and name in WITHOUT_RULES:
            continue
        one, other = (
            probe.attribute(model, SEQUENCES, method, "block", 2, ablation="mean")
            for model in (here, there)
        )
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0)
        torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0)
    one, other = (
        probe.attribute(model, SEQUENCES, granularity=finest(name)) for model in (here, there)
    )
    assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("method", METHODS)
def test_heads_there_and_here(folders, method):
    here = probe.load_model(str(folders["llama"]))
    there = load_hosted(str(folders["llama"]), InProcess(here))
    one, other = (probe.attribute(model, SEQUENCES, method, "head", 2) for model in (here, there))
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.entropies, other.entropies)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "exact"])
def test_positions_there_and_here(folders, method):
    here = probe.load_model(str(folders["llama"]))
    there = load_hosted(str(folders["llama"]), InProcess(here))
    found = (probe.attribute_positions(model, SEQUENCES, method) for model in (here, there))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.scores, other.scores)


def squared(logits, labels):
    """A target of one's own, in a module that the server does not have."""
    return logits.gather(1, labels[:, None])[:, 0] ** 2


@pytest.mark.parametrize(
    "target",
    [*TARGETS, Target("loss", 1.7), Target("loss", [0.7, 1.7]), squared],
    ids=lambda target: getattr(target, "__name__", None) or str(target),
)
def test_targets_there_and_here(folders, target):
    here = probe.load_model(str(folders["gemma2"]))
    there = load_hosted(str(folders["gemma2"]), InProcess(here))
    for options in (
        {"method": "exact", "granularity": "block"},
        {"method": "eap-ig", "corrupted": [([3, 14, 15, 91, 6, 5], []), ([27, 19, 28], [])]},
        {"method": "eap"},
        {"method": "relp"},
    ):
        if target == "kl" and options["method"] in ("eap", "relp"):
            continue
        if "corrupted" in options:
            options["corrupted"] = [probe.TokenSequence(*text) for text in options["corrupted"]]
        one, other = (
            probe.attribute(model, SEQUENCES, target=target, **options) for model in (here, there)
        )
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.values, other.values)
    seen = [mean_losses(model, SEQUENCES, [0.5, 1.0, 2.0], batch_size=2) for model in (here, there)]
    assert torch.equal(*seen)


@pytest.mark.parametrize("stop", [(), ("9",)])
def test_generation_there_and_here(stop):
    here = probe.load_model("probe:tiny-math/sft")
    there = load_hosted("probe:tiny-math/sft", InProcess(here))
    prompts = [here.tokenizer(f"{n}-7-53=?")["input_ids"] for n in (3, 41, 12)]
    one, other = (
        list(generate(model, prompts, [30, 20, 10], stop=stop, batch_size=2))
        for model in (here, there)
    )
    assert one == other
    assert sum(map(len, one)) == 3


def test_what_comes_home_is_small(tmp_path):
    """At 32 layers, 64 KiB a sequence at most."""
    folder = save_small_model(tmp_path / "deep", "llama", num_hidden_layers=32)
    host = InProcess(probe.load_model(str(folder)))
    model = load_hosted(str(folder), host)
    before = host.received
    edges = probe.attribute(model, SEQUENCES * 4, batch_size=8)
    assert edges.scores.shape[1:] == (65, 129)
    assert (host.received - before) / 8 <= 64 * 1024


def test_jobs_are_put_together_in_turn_and_wait_at_once(folders, monkeypatch):
    """Python before 3.13 cannot parse sources, which nnsight does, in two threads at once."""
    folder = str(folders["llama"])
    here = probe.load_model(folder)
    model = load_hosted(folder, host := InProcess(here))
    host.jobs = 2
    together, serialize, computing = threading.Barrier(2), RequestModel.serialize, threading.Lock()

    def one_at_a_time(tracer, **options):
        assert host.preparing.locked()
        return serialize(tracer, **options)

    def run(self, *job):
        assert threading.current_thread() is not threading.main_thread()
        together.wait(30)  # both are here, though neither has come home
        with computing:
            return InProcess.run(self, *job)

    monkeypatch.setattr(RequestModel, "serialize", one_at_a_time)
    host.run = run.__get__(host)
    edges = probe.attribute(model, SEQUENCES, batch_size=1)
    assert torch.equal(edges.scores, probe.attribute(here, SEQUENCES, batch_size=1).scores)
    assert not host.preparing.locked()


def test_a_job_that_cannot_be_put_together_is_in_nobodys_way(folders, monkeypatch):
    folder = str(folders["llama"])
    model = load_hosted(folder, host := InProcess(probe.load_model(folder)))

    def fail(*arguments, **options):
        raise RuntimeError("no source")

    with monkeypatch.context() as patch:
        patch.setattr(RequestModel, "serialize", fail)
        with pytest.raises(RuntimeError, match="no source"):
            probe.attribute(model, SEQUENCES)
    assert not host.preparing.locked()
    probe.attribute(model, SEQUENCES)
