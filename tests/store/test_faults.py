"""What a run folder does where it cannot be written, or where somebody has put links."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.files import append, read_file, write_whole
from probe.models import Graph
from probe.solutions import Solution
from probe.store import RunFolder, check_free, locked

GRAPH = Graph.build(2, "qkv")
EDGES = EdgeScores(torch.ones(50, *GRAPH.mask.shape), torch.ones(50), torch.ones(50), GRAPH)
SOLUTIONS = [Solution(str(i), [1] * 9, [2] * 9, True, "é" * 9, "1", "1") for i in range(50)]
IDS = [str(number) for number in range(50)]

WRITERS = {
    "run.json": lambda folder: folder.write_json("run.json", {"schema": 1, "a": "b" * 5000}),
    "edges/c.before.safetensors": lambda folder: folder.write_edges(
        folder.edges_file("c", "before"), EDGES, IDS, "key"
    ),
    "solutions/m.b.jsonl": lambda folder: folder.write_solutions(
        folder.solutions_file("m", "b"), SOLUTIONS
    ),
    "solutions/unused/m.b.jsonl": lambda folder: folder.write_solutions(
        folder.unused_file("m", "b"), SOLUTIONS
    ),
    "faithfulness/m.png": lambda folder: folder.write(
        folder.path / "faithfulness" / "m.png", lambda place: place.write_bytes(b"x" * 5000)
    ),
}
"""One of each kind of file that is written whole."""


def appended(folder):
    folder.append_solutions(folder.solutions_file("m", "b"), SOLUTIONS)


EVERY = WRITERS | {"solutions/m.b.jsonl (appended)": appended}


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.open()
    made.write_json("run.json", {"schema": 1})
    return made


def files(path):
    """What is in a folder, byte by byte."""
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def largest_file(size):
    """Let no file of this process get larger: what a full disk does, but for the number."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def nobody():
    """Be a user whom permissions hold, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [0, 1, 700])
def test_a_full_disk_leaves_what_was_there(folder, name, size):
    EVERY[name](folder)
    before = files(folder.path)
    with largest_file(size), pytest.raises(ProbeError) as told:
        EVERY[name](folder)
    path = folder.path / name.removesuffix(" (appended)")
    line = f"cannot write {path}: File too large; make room, and the same command goes on from here"
    assert str(told.value) == line
    assert files(folder.path) == before
    EVERY[name](folder)


def test_a_file_that_the_limit_cuts_is_not_added_in_part(folder):
    path = folder.solutions_file("m", "b")
    folder.append_solutions(path, SOLUTIONS[:1])
    whole = path.read_bytes()
    with largest_file(len(whole) + 10), pytest.raises(ProbeError, match="make room"):
        folder.append_solutions(path, SOLUTIONS[1:])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", EVERY)
def test_a_read_only_folder_is_one_line(name, request):
    top = Path(tempfile.mkdtemp())  # pytest's own folder is closed to other users
    request.addfinalizer(lambda: shutil.rmtree(top))
    folder = RunFolder(top / "run")
    folder.open()
    folder.write_json("run.json", {"schema": 1})
    EVERY[name](folder)
    before = files(top)
    for path in [top, *top.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with nobody(), pytest.raises(ProbeError, match=r"^cannot write .*: Permission denied; mend"):
        EVERY[name](folder)
    with nobody(), pytest.raises(ProbeError, match=r"cannot write .*Permission denied; "):
        folder.open(fresh=True)
    for path in [top, *top.rglob("*")]:
        path.chmod(0o755)
    assert files(top) == before


@pytest.mark.parametrize("name", EVERY)
def test_a_folder_that_is_moved_in_mid_run_is_not_made_again(tmp_path, name):
    said = []
    with locked(RunFolder(tmp_path / "run"), said.append) as folder:
        folder.open()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(ProbeError, match="was moved or taken away while the run went on"):
            EVERY[name](folder)
        assert not (tmp_path / "run").exists()
        # Nor is one that has taken its place touched.
        with locked(RunFolder(tmp_path / "run"), said.append) as other:
            other.open()
            with pytest.raises(ProbeError, match="was moved or taken away"):
                EVERY[name](folder)
            assert files(tmp_path / "run").keys() == {(tmp_path / ".lock").relative_to(tmp_path)}
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "moved").rename(tmp_path / "run")
        EVERY[name](folder)
    assert said == []


def test_a_folder_that_is_gone_is_one_line(folder):
    shutil.rmtree(folder.path)
    for write in EVERY.values():
        with pytest.raises(ProbeError, match=r"^cannot write .*: No such file or directory; mend"):
            write(folder)
    assert not folder.path.exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_file_is_written_through_a_link(folder, tmp_path, name, link):
    target = tmp_path / "target"
    target.write_text("mine")
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    link(target, path)
    (path.with_name(f".{path.name}.new")).symlink_to(target)  # the fixed name of old versions
    WRITERS[name](folder)
    assert target.read_text() == "mine"
    assert path.is_file()
    assert not path.is_symlink()
    folder.open()
    assert target.read_text() == "mine"
    assert not list(folder.path.rglob(".*"))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_added_through_a_link(folder, tmp_path, link):
    target = tmp_path / "target"
    target.write_text("mine")
    link(target, folder.solutions_file("m", "b"))
    with pytest.raises(ProbeError, match="it is a link to another file; take it away"):
        appended(folder)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", EVERY)
def test_no_folder_of_the_run_may_be_a_link(folder, tmp_path, name):
    name = name.removesuffix(" (appended)")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (outside / ".mine.new").write_text("mine")
    inside = folder.path / os.path.dirname(name)
    if inside == folder.path:
        return
    shutil.rmtree(inside, ignore_errors=True)
    inside.symlink_to(outside)
    refusals = [lambda: WRITERS[name](folder)]
    refusals += [] if "unused" in name else [folder.open]
    for call in refusals:
        with pytest.raises(ProbeError, match="is a link, and a run writes to its own folder only"):
            call()
    folder.open(fresh=True)
    WRITERS[name](folder)
    assert files(outside).keys() == {Path("kept"), Path(".mine.new")}


def test_pictures_go_to_no_link(folder, tmp_path):
    assert folder.figures().is_dir()
    folder.figures().rmdir()
    (folder.path / "figures").symlink_to(tmp_path)
    with pytest.raises(ProbeError, match="is a link"):
        folder.figures()


def test_the_run_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")
    with locked(RunFolder(tmp_path / "run"), print) as folder:
        folder.open()
        for write in EVERY.values():
            write(folder)
    assert (tmp_path / "large-disk" / "run.json").is_file()


def test_a_pipe_or_a_device_is_no_file_of_a_run(folder):
    path = folder.solutions_file("m", "b")
    os.mkfifo(path)
    for call in (lambda: folder.read_solutions(path), lambda: appended(folder)):
        with pytest.raises(ProbeError, match=f"cannot (read|write) {path}"):
            call()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ProbeError, match="it is no file"):
        folder.read_solutions(path)
    with pytest.raises(OSError, match="it is no file"):
        read_file(path)


def test_what_is_broken_off_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def broken(place):
        place.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert files(tmp_path) == {path.relative_to(tmp_path): b"old"}


def test_files_may_be_read_by_whom_the_user_lets(tmp_path):
    old = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", lambda place: place.write_text("x"))
        append(tmp_path / "b", "x")
    finally:
        os.umask(old)
    for name in "ab":
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_what_a_kill_left_in_the_first_moment_is_no_foreign_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with locked(folder, print) as held:
        held.open()
    (folder.path / ".0123456789abcdef.new").write_text("half")
    folder.open()
    assert files(folder.path).keys() == {(tmp_path / ".lock").relative_to(tmp_path)}
    (folder.path / "figures").mkdir()
    with pytest.raises(ProbeError, match="holds files but no run.json"):
        folder.open(fresh=True)
    (folder.path / "figures").rmdir()
    (folder.path / "edges" / "mine").write_text("mine")
    with pytest.raises(ProbeError, match="holds files but no run.json"):
        folder.open(fresh=True)


HOLD = """
import sys
from pathlib import Path
from probe.store import RunFolder, locked
with locked(RunFolder(Path(sys.argv[1])), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_is_there_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        refused = f"{folder.path} is in use by process {first.pid} on "
        with pytest.raises(ProbeError, match=refused), locked(folder, print):
            pass
        with pytest.raises(ProbeError, match=refused):
            check_free(folder)
        first.kill()
    check_free(folder)
    with locked(folder, print) as held:
        assert f"process {os.getpid()} on" in (folder.path / ".lock").read_text()
        with pytest.raises(ProbeError, match=f"process {os.getpid()}"), locked(folder, print):
            pass
        held.write_json("run.json", {"schema": 1})
        held.open(fresh=True)
        held.write_json("run.json", {"schema": 1})  # --fresh leaves the lock where it is
    check_free(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_lock_is_no_link(tmp_path, link):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    link(target, tmp_path / "run" / ".lock")
    with pytest.raises(ProbeError, match="link"), locked(RunFolder(tmp_path / "run"), print):
        pass
    assert target.read_text() == "mine"


def test_a_file_system_without_locks_is_told_and_worked_on(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    said = []
    with locked(RunFolder(tmp_path / "run"), said.append) as folder:
        folder.open()
        folder.write_json("run.json", {"schema": 1})
    assert len(said) == 1
    assert "a file system without locks" in said[0]
    check_free(folder)
    assert json.loads(folder.record.read_text())["schema"] == 1
