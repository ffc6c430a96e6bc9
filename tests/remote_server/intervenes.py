"""Run every intervention there and here; print the largest difference of an outcome of each."""

import sys

import probe
from probe.hosting import load_hosted, open_host

url, before, after = sys.argv[1:4]
host = open_host(url)
there = [load_hosted(reference, host) for reference in (before, after)]
here = [probe.load_model(reference) for reference in (before, after)]
SETS = [[("m3", "logits")], [("input", "a0.q.h1"), ("a0.h2", "a1.k.h0"), ("m1", "m2")], []]
WAYS = (
    *({"do": "remove", "ablation": ablation} for ablation in ("zero", "mean", "resample")),
    {"do": "keep", "ablation": "mean"},
    {"do": "scale", "factor": 0.75},
    *({"do": do} for do in ("patch", "swap", "add")),
)


def outcomes(models, way):
    """Loss, margin, KL and accuracy: [set, sequence] of each."""
    tokens = here[0].tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    sequences = [probe.Sequence(tokens[:12], tokens[12:]), probe.Sequence(tokens[:9], tokens[9:15])]
    other = {"other": models[0]} if way["do"] in ("patch", "swap", "add") else {}
    found = probe.intervene(models[1], sequences, SETS, granularity="head", **way, **other)
    return found.loss, found.margin, found.kl, found.accuracy


for way in WAYS:
    pairs = zip(outcomes(there, way), outcomes(here, way), strict=True)
    print(way["do"], max(float((one - two).abs().max()) for one, two in pairs))
