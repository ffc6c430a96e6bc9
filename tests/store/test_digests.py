"""Whatever happens to a file of a run: a report has the same numbers, or names the file."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.report import build_report, open_run
from probe.store import Damaged, RunFolder

OLD = Path(__file__).parents[1] / "data" / "old-run"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The old run as it would be written now, without statistics, which take time."""
    path = tmp_path_factory.mktemp("runs") / "sealed"
    old, new = RunFolder(OLD), RunFolder(path)
    new.open()
    record = old.read_record()
    record["recipe"]["report"]["resamples"] = 0
    solutions = {file.name: old.read_solutions(file)[0] for file in OLD.glob("solutions/*")}
    counts = {name: len(part) for name, part in solutions.items()}
    new.write_json("run.json", record | {"digests": True, "solved": counts})
    for name, part in solutions.items():
        new.write_solutions(path / "solutions" / name, part)
    for file in OLD.glob("edges/*"):
        edges = old.read_edges(file)
        with safe_open(file, "pt") as opened:
            key = opened.metadata()["key"]
        new.write_edges(path / "edges" / file.name, edges, edges.ids, key)
    for file in [*OLD.glob("*/*.json"), OLD / "report.json"]:
        name = file.relative_to(OLD).as_posix()
        new.write_json(name, old.read_json(name))
    ids = [solution.id for solution in solutions["tiny-math--sft.tiny-math.jsonl"]]
    new.write_clusters({"tiny-math": {name: str(int(name) // 40) for name in ids}})
    return path


@pytest.fixture
def run(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(sealed):
    table = build_report(sealed).table
    assert table["missing"] == []
    return table


READ = [
    "run.json",
    "clusters.json",
    "solutions/tiny-math--grpo.tiny-math.jsonl",
    "edges/sft-grpo.tiny-math.alpha-0.3.before.safetensors",
    "extras/sft-grpo.tiny-math.on-before.json",
    "extras/sft-grpo.weights.json",
    "faithfulness/tiny-math--grpo.json",
]
"""One of each kind that a report reads."""


def noticed(run, whole):
    """Whether a report names what is wrong; if not, it must be the same."""
    try:
        found = build_report(run).table
    except ProbeError as error:
        assert str(run) in str(error)
        assert len(str(error).splitlines()) == 1
        return True
    if found["missing"]:
        return True
    assert found == whole
    return False


@pytest.mark.parametrize("name", READ)
def test_bytes_that_change_are_noticed(run, whole, name):
    chance, file = random.Random(name), run / name
    good = file.read_bytes()
    for _ in range(12):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(data))
            match chance.choice(["flip", "flip", "cut", "double"]):
                case "flip":
                    data[start] ^= 1 << chance.randrange(8)
                case "cut":
                    del data[start : start + chance.randint(1, 50)]
                case "double":
                    data[start:start] = data[start : start + chance.randint(1, 50)]
        file.write_bytes(data)
        noticed(run, whole)


def numbers_changed(text):
    """Each copy of a JSON text with one number in it another one, a few of them."""
    # First digits: the last ones of a long fraction may change nothing.
    places = [found.start() for found in re.finditer(r"(?<![\d.eE+])[1-9]", text)]
    for place in random.Random(1).sample(places, 6):
        other = "1" if text[place] != "1" else "2"
        yield text[:place] + other + text[place + 1 :]


@pytest.mark.parametrize("name", [name for name in READ if not name.startswith("edges")])
def test_a_number_that_somebody_mends_is_noticed(run, whole, name):
    file = run / name
    good = file.read_text(encoding="utf-8")
    for text in numbers_changed(good):
        file.write_text(text, encoding="utf-8")
        assert noticed(run, whole)
    file.write_text(good, encoding="utf-8")
    assert not noticed(run, whole)


def test_layout_does_not_count(run, whole):
    file = run / "faithfulness/tiny-math--grpo.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert not noticed(run, whole)


@pytest.mark.parametrize("name", READ)
def test_a_digest_cannot_be_left_out(run, whole, name):
    file = run / name
    if name.startswith("edges"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata.pop("digest")
        save_file(tensors, file, metadata)
    else:
        lines = file.read_text().splitlines() if name.endswith("l") else [file.read_text()]
        tables = [json.loads(line) for line in lines]
        for table in tables:
            table.pop("_digest")
        file.write_text("\n".join(map(json.dumps, tables)))
    assert noticed(run, whole)


@pytest.mark.parametrize("name", READ[1:])
def test_a_lost_file_is_noticed(run, whole, name):
    (run / name).unlink()
    if name.startswith("solutions"):  # none at all: not solved yet, but for the record
        assert build_report(run).missing
        return
    assert noticed(run, whole)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (READ[2], "solutions/tiny-math--sft.tiny-math.jsonl"),
        (READ[3], "edges/sft-grpo.tiny-math.alpha-0.3.after.safetensors"),
        (READ[3], "edges/sft-dpo.tiny-math.alpha-0.3.before.safetensors"),
        (READ[4], "extras/sft-grpo.tiny-math.on-after.json"),
        (READ[5], "extras/sft-dpo.weights.json"),
        (READ[6], "faithfulness/tiny-math--sft.json"),
    ],
)
def test_files_that_change_places_are_noticed(run, whole, one, other):
    first, second = (run / one).read_bytes(), (run / other).read_bytes()
    (run / one).write_bytes(second)
    (run / other).write_bytes(first)
    assert noticed(run, whole)


@pytest.mark.parametrize("cut", ["first", "last", "both files"])
def test_lost_lines_are_noticed(run, whole, cut):
    files = [run / READ[2], run / "solutions/tiny-math--sft.tiny-math.jsonl"]
    for file in files if cut == "both files" else files[:1]:
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[1:] if cut == "first" else lines[:-1]))
    assert noticed(run, whole)
    with pytest.raises(ProbeError, match="15 of 16 solutions are left; run the recipe again"):
        open_run(run).problems  # noqa: B018


def test_changed_edges_and_selections_are_not_read(run):
    folder = RunFolder(run)
    path = run / READ[3]
    edges = folder.read_edges(path)
    edges.scores[0, 0, 0] += 1
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: getattr(edges, name) for name in ("scores", "losses", "entropies")}
    save_file(tensors, path, metadata)
    with pytest.raises(Damaged, match="not as it was written, by its digest"):
        folder.read_edges(path)
    with pytest.raises(ProbeError, match="not as it was written, by its digest"):
        EdgeScores.load(path)
    selection = next(run.glob("selection/*"))
    assert folder.read_selection(selection.stem)
    selection.write_text(selection.read_text().replace('"cut_length": ', '"cut_length": 1'))
    assert folder.read_selection(selection.stem) is None


def test_edges_of_a_run_may_be_copied_and_renamed(run, tmp_path):
    copied = shutil.copy(run / READ[3], tmp_path / "mine.safetensors")
    assert torch.equal(
        EdgeScores.load(copied).scores, RunFolder(run).read_edges(run / READ[3]).scores
    )


def test_an_old_run_needs_no_digests_but_those_that_are_there_count(tmp_path, run, whole):
    record = RunFolder(run).read_record()
    RunFolder(run).write_json("run.json", record | {"digests": False})
    assert not noticed(run, whole)
    file = run / READ[2]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0].pop("_digest")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not noticed(run, whole)
    lines[1]["correct"] = not lines[1]["correct"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert noticed(run, whole)


@pytest.mark.parametrize("value", [[1], None, 3, {"a": 1}])
@pytest.mark.parametrize("field", ["id", "text", "gold", "extracted", "correct", "answer"])
def test_a_solution_of_other_types_is_a_damaged_line(tmp_path, field, value):
    if field == "extracted" and value is None:
        return
    if field == "answer" and value == [1]:
        return
    folder = RunFolder(Path(shutil.copytree(OLD, tmp_path / "run")))
    file = next(folder.path.glob("solutions/*.jsonl"))
    lines = file.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {field: value})
    file.write_text("\n".join(lines))
    solutions, damaged = folder.read_solutions(file)
    assert (len(solutions), damaged) == (15, 1)
