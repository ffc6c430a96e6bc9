"""Score sequences of a model; print bytes received per sequence, overhead per job, how many edges.

The overhead of a job is the time beyond what the server says it computed, one job at a time.
"""

import sys

import probe
from probe.hosting import load_hosted, open_host

url, reference = sys.argv[1:3]
host = open_host(url, jobs=1)
model = load_hosted(reference, host)
sequences = [probe.Sequence([3, 4, 5, 6], [7 + n % 16, 8, 9]) for n in range(64)]


def overhead():
    return host.seconds - host.seconds_there


received, waited, jobs = host.received, overhead(), host.states["done"]
edges = probe.attribute(model, sequences, batch_size=8)
received, waited, jobs = host.received - received, overhead() - waited, host.states["done"] - jobs
print(received / len(sequences), waited / jobs, *edges.scores.shape[1:])
