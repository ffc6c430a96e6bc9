"""Score sequences of a model; print how many bytes came home for each, and for how many edges."""

import sys

import probe
from probe.remote import open_host

url, reference = sys.argv[1:3]
host = open_host(url)
model = probe.load_model(reference, host=host)
sequences = [probe.Sequence([3, 4, 5, 6], [7 + n, 8, 9]) for n in range(16)]
before = host.received
edges = probe.attribute(model, sequences, batch_size=8)
print((host.received - before) / len(sequences), *edges.scores.shape[1:])
