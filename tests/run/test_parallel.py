"""Work on several devices: the same results, what it says, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import probe
from probe.run import Event, Workers, on_each

OPTIONS = {
    "solutions.questions": 30,
    "selection.samples": 4,
    "selection.alpha": [0.5],
    "report.resamples": 0,
}


def double(number, *, device, on_event):
    on_event(Event(1, f"{number} on {device}"))
    return 2 * number


def fail(error, *, device, on_event):
    raise error


def vanish(*, device, on_event):
    os._exit(3)


def sleep(*, device, on_event):
    time.sleep(600)


@pytest.mark.parametrize("devices", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_results_come_in_order(devices):
    said = []
    work = [partial(double, number) for number in range(3)]
    assert on_each(work, devices, said.append) == [0, 2, 4]
    expected = {f"{number} on {devices[number % len(devices)]}" for number in range(3)}
    assert {event.text for event in said} == expected
    assert sum(event.advance for event in said) == 3


def process(*, device, on_event):
    on_event(Event(1))
    return device, os.getpid()


def test_the_same_processes_do_what_comes_later():
    said = []
    with Workers(["a", "b"]) as workers:
        workers.start()
        first = workers.do([process] * 4, said.append)
        later = workers.do([process] * 2, said.append)
    assert [device for device, _ in first] == ["a", "b", "a", "b"]
    assert first == later * 2
    assert len({pid for _, pid in later} - {os.getpid()}) == 2
    assert len(said) == 6


def test_processes_that_were_never_needed_were_never_started():
    with Workers(["a", "b"]) as workers:
        pass
    assert not any(process.pid for process in workers._processes)


@pytest.mark.parametrize("error", [probe.ProbeError("no such model"), KeyError("a bug")])
def test_what_work_raises_ends_the_others(error):
    start = time.monotonic()
    with pytest.raises(type(error), match=str(error.args[0])):
        on_each([sleep, partial(fail, error)], ["a", "b"], print)
    assert time.monotonic() - start < 120


def test_a_process_that_ends_without_a_word():
    with pytest.raises(RuntimeError, match="ended with code 3"):
        on_each([sleep, vanish], ["a", "b"], print)


@pytest.mark.slow
def test_a_run_on_two_devices_is_the_run_on_one(tmp_path):
    reports = [
        probe.run_recipe(
            "tiny-math", tmp_path / device, overrides=OPTIONS | {"compute.device": device}
        )
        for device in ("cpu", "cpu,cpu")
    ]
    assert reports[0].cells == reports[1].cells
    assert reports[0].accuracy == reports[1].accuracy


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_parallel
from probe.run import on_each
if __name__ == "__main__":
    on_each([test_parallel.sleep, test_parallel.sleep], ["a", "b"], print)
"""


@pytest.mark.slow
def test_processes_end_with_the_first_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    process = subprocess.Popen([sys.executable, script])

    def children():
        found = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
        ).stdout.split()
        return [int(pid) for pid in found]

    deadline = time.monotonic() + 60
    while len(pids := children()) < 3 and time.monotonic() < deadline:  # two, and a tracker
        time.sleep(0.2)
    time.sleep(8)
    process.send_signal(signal.SIGKILL)
    process.wait()

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while any(alive(pid) for pid in pids) and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in pids)
