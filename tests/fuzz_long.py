"""A long run of the doors of `fuzzing.py`: each input in a process of its own, with limits.

    python tests/fuzz_long.py 100000 --jobs 16 --output counts.json

Processes are forked from one that has everything imported, so that an input costs milliseconds.
What ends in a traceback, hangs, takes much memory or reports something wrong is counted, and the
first of each kind is kept in the output with the input that does it.
"""

import argparse
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzzing

fuzzing.environment()

OUTCOMES = ("accepted", "refused", "traceback", "hang", "memory", "wrong")
_PATIENCE = fuzzing.SECONDS + 10
_BATCH = 25


def child(door, values, place, pipe):
    """Try some inputs; write a line for what came of each."""

    def late(number, frame):
        raise TimeoutError("it takes too long")

    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + 8 * 2**30, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, late)
    for value in values:
        folder = Path(tempfile.mkdtemp(dir=place))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        signal.alarm(fuzzing.SECONDS)
        outcome, detail = tried(door, value, folder)
        signal.alarm(0)
        seconds = time.monotonic() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        if grown > fuzzing.GIBIBYTES:
            outcome, detail = "memory", f"{grown:.1f} GiB; {outcome} {detail}"
        shutil.rmtree(folder, ignore_errors=True)
        os.write(pipe, json.dumps([outcome, detail[-3000:], seconds]).encode() + b"\n")
    os._exit(0)


def tried(door, value, folder):
    """What comes of one input, and the traceback of what should not."""
    try:
        return ("accepted" if fuzzing.go_in(door, value, folder) else "refused"), ""
    except BaseException as error:
        outcome = "traceback"
        if isinstance(error, TimeoutError):
            outcome = "hang"
        elif isinstance(error, MemoryError):
            outcome = "memory"
        elif "wrong report" in str(error):
            outcome = "wrong"
        return outcome, traceback.format_exc()


def virtual():
    """How many bytes this process may use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def outcomes(door, values, place):
    """What comes of some inputs, tried in a child; in as many as it takes where they die."""
    found = []
    while len(found) < len(values):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(door, values[len(found) :], place, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            while len(found) < len(values):
                ready, _, _ = select.select([pipe], [], [], _PATIENCE)
                line = pipe.readline() if ready else b""
                if not line:
                    break
                found.append(json.loads(line))
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if len(found) < len(values):
            said = f"the process ends with {status}" if ready else "no sign of life"
            found.append(["traceback" if ready else "hang", said, 0.0])
    return found


def run(name, count, seed):
    """Try a door; counts of what came of it, and the first input of each fault."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    door = fuzzing.DOORS[name]
    counts, faults, longest, waiting = Counter(), {}, 0.0, []

    def flush():
        nonlocal longest
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            tries = outcomes(door, waiting, place)
        for value, (outcome, detail, seconds) in zip(waiting, tries, strict=True):
            longest = max(longest, seconds)
            counts[outcome] += 1
            if outcome in ("accepted", "refused"):
                continue
            last = detail.strip().splitlines()[-1][:100]
            where = [line.strip() for line in detail.splitlines() if "/probe/" in line][-1:]
            fault = faults.setdefault(f"{outcome}: {last} {''.join(where)}", {"count": 0})
            fault["count"] += 1
            fault |= {"detail": detail, "input": pickle.dumps(value).hex()}
        waiting.clear()

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(value=door.inputs())
    def every(value):
        waiting.append(value)
        if len(waiting) == _BATCH:
            flush()

    start = time.monotonic()
    every()
    if waiting:
        flush()
    return {
        "door": name,
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "seconds": round(time.monotonic() - start, 1),
        "longest": round(longest, 1),
        "faults": faults,
    }


def warm():
    """Import what the doors use, so that children need not."""
    import httpx
    import nnsight.schema.response
    import websocket

    import probe
    from probe.models import doctor, load_model
    from probe.report import FORMATS, build_report, render

    del httpx, nnsight, websocket
    probe.load_model("probe:tiny-math/sft")
    load_model(str(fuzzing.LLAMA))
    doctor(str(fuzzing.LLAMA))
    report = build_report(fuzzing.OLD_RUN)
    for style in FORMATS:
        if style != "html":
            render(report, style)
    fuzzing.model_files()
    fuzzing.run_files()
    fuzzing.results()


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("inputs", type=int)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--doors", default=",".join(fuzzing.DOORS))
    options.add_argument("--output", type=Path, default=Path("fuzz.json"))
    given = options.parse_args()
    warm()
    parts = [given.output.with_suffix(f".{job}.part") for job in range(given.jobs)]
    pids = []
    for job, part in enumerate(parts):
        pid = os.fork()
        if pid == 0:
            work(given, job, part)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    total = together(parts)
    given.output.write_text(json.dumps(total, indent=1))
    for name, row in total.items():
        said = ", ".join(f"{count} {outcome}" for outcome, count in row["counts"].items())
        print(f"{name}: {said}; longest {row['longest']} s, all {row['seconds']:.0f} s")
        for key, fault in row["faults"].items():
            print(f"    {fault['count']} {key}")
    sys.exit(any(row["faults"] for row in total.values()))


def work(given, job, part):
    """One process's share of all doors, a line for each when it is done."""
    names = given.doors.split(",")
    whole = sum(fuzzing.DOORS[name].share for name in names)
    first = job % len(names)
    with part.open("w") as file:
        for name in names[first:] + names[:first]:
            count = round(given.inputs * fuzzing.DOORS[name].share / whole / given.jobs)
            file.write(json.dumps(run(name, max(1, count), 1000 * given.seed + job)) + "\n")
            file.flush()


def together(parts):
    """What all processes found, by door."""
    total = {}
    for part in parts:
        for found in map(json.loads, part.read_text().splitlines()):
            row = total.setdefault(
                found["door"], {"counts": Counter(), "longest": 0.0, "seconds": 0.0, "faults": {}}
            )
            row["counts"].update(found["counts"])
            row["longest"] = max(row["longest"], found["longest"])
            row["seconds"] += found["seconds"]
            for key, fault in found["faults"].items():
                known = row["faults"].setdefault(key, fault | {"count": 0})
                known["count"] += fault["count"]
        part.unlink()
    return total


if __name__ == "__main__":
    main()
