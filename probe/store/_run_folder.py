"""The run folder: everything a run has found out, in files that are whole or not there.

    run.json                                     recipe, models, versions, device, times
    solutions/MODEL.BENCHMARK.jsonl              a solution a line, added batch by batch
    solutions/unused/MODEL.BENCHMARK.jsonl       those of questions that are not asked any more
    solutions/MODEL.server.json                  which server wrote them, and how they begin
    selection/PAIR.BENCHMARK.alpha-A.json        which questions, which lengths
    edges/PAIR.BENCHMARK.alpha-A.SIDE.safetensors   scores and losses
                                                 (SIDE: before, after; with the cross-text control
                                                 also before-on-after, after-on-before)
    faithfulness/MODEL.json, .png                exact effects of some edges, beside their scores
    circuits/MODEL.json, .png                    how faithful its circuits are, by size
    causal/PAIR.BENCHMARK.json                   whether strengthened edges do more than others
    extras/PAIR.BENCHMARK.on-SIDE.json           both models' states on the answers of one
    extras/PAIR.BENCHMARK.alpha-A.SIDE.json      each question's temperature on a control's side
    extras/PAIR.weights.json                     how far each matrix moved
    clusters.json                                which questions belong together
    questions.json                               a digest of each question that was asked
    report.json                                  the cells
    figures/                                     pictures, by `probe plot`
    .lock                                        who writes here, by `locked`

A file is written beside where it will be and moved there: a kill leaves the old one or the new one.
Solutions are appended; a torn last line is the most that a kill costs, and reading drops it.
Nothing is written through a link that somebody has put there.
What is read is checked against what it should hold; what does not fit is computed again.

    >>> folder = RunFolder(Path("runs/tiny-math"))
    >>> folder.read_record()["recipe"]["name"]
    'tiny-math'
"""

import errno
import glob
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from probe.errors import ProbeError, reason
from probe.files import UNFINISHED, append, read_file, write_whole
from probe.solutions import Selection, Solution
from probe.store._digests import Damaged, sealed, unsealed
from probe.store._run_names import temperature_file

if TYPE_CHECKING:
    from probe.attribution import EdgeScores

SCHEMA = 1
FOLDERS = ("solutions", "selection", "edges", "faithfulness", "extras", "circuits", "causal")
PARTS = (*FOLDERS, "figures", "clusters.json", "questions.json", "report.json", "run.json")
"""What `--fresh` takes away, the record last: without it, the rest would be no run's."""

LOCK, QUESTIONS = ".lock", "questions.json"


class Missing(Exception):
    """What is asked for is not in the run folder, or is of no use; the message says why."""


@dataclass(frozen=True)
class RunFolder:
    """Paths, reading and writing of one run."""

    path: Path
    """The folder."""

    lock: tuple[int, int] | None = None
    """Device and inode of the lock that this process holds there; None where it holds none."""

    def check(self) -> None:
        """Check that this is a run's folder, or may become one.

        Raises:
            ProbeError: It is a file, or holds files that are not a run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ProbeError(f"{self.path} is a file; give a folder with --output")
        begun = self.record.exists() or not self.path.is_dir()
        if not begun and not all(map(_is_ours, self.path.iterdir())):
            raise ProbeError(
                f"{self.path} holds files but no run.json, so it is not a run folder; "
                "give an empty or new one with --output"
            )

    def open(self, fresh: bool = False) -> None:
        """Make the folder, or check that it can be gone on with; what a kill left is taken away.

        Args:
            fresh: Throw away what an earlier run left there.

        Raises:
            ProbeError: It cannot be written to, or holds files that are not a run's.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for part in PARTS if fresh else ():
                old = self.path / part
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            for part in FOLDERS:
                self.place(self.path / part / "any")
            for part in ("", *FOLDERS, "solutions/unused"):
                inside = self.path / part
                for left in () if inside.is_symlink() else inside.glob(f".*{UNFINISHED}"):
                    left.unlink()
        except OSError as error:
            raise ProbeError(
                f"cannot write to the run folder {self.path}: {error.strerror}; "
                "give another one with --output"
            ) from error

    def place(self, path: Path) -> None:
        """Make the folder that a file of the run goes to, and check that it is in the run.

        Raises:
            ProbeError: It is a link, which may lead anywhere, or the run's folder has been moved
                while the run goes on.
            OSError: It cannot be made.
        """
        if self.lock is not None:
            try:
                found = (self.path / LOCK).stat()
            except FileNotFoundError:
                found = None
            if found is None or (found.st_dev, found.st_ino) != self.lock:
                raise ProbeError(
                    f"the run folder {self.path} was moved or taken away while the run went on; "
                    "put it back, and the same command goes on from there"
                )
        for parent in [*path.relative_to(self.path).parents][-2::-1]:
            folder = self.path / parent
            if folder.is_symlink():
                raise ProbeError(
                    f"{folder} is a link, and a run writes to its own folder only; put a folder in "
                    "its place"
                )
            folder.mkdir(exist_ok=True)

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let `write` make a file of the run, whole or not at all.

        Raises:
            ProbeError: It cannot be written; what there is stays, and the run can go on from it.
        """
        try:
            self.place(path)
            write_whole(path, write)
        except OSError as error:
            raise self.unwritable(path, error) from error

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of text whole or not at all."""
        self.write(path, lambda place: place.write_text(text, encoding="utf-8"))

    def remove(self, path: Path) -> None:
        """Take a file away, if it is there."""
        try:
            self.place(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(path, error) from error

    def figures(self) -> Path:
        """The folder for pictures; it is there when this returns."""
        folder = self.path / "figures"
        try:
            self.place(folder / "any")
        except OSError as error:
            raise self.unwritable(folder, error) from error
        return folder

    def unwritable(self, path: Path, error: OSError) -> ProbeError:
        """Say that something cannot be written, and what to do."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        link = error.errno == errno.ELOOP
        todo = "make room" if full else "take it away" if link else "mend that"
        why = "it is a link to another file" if link else error.strerror or reason(error)
        return ProbeError(
            f"cannot write {path}: {why}; {todo}, and the same command goes on from here"
        )

    @property
    def record(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    def read_record(self) -> dict[str, object]:
        """What run.json says.

        Raises:
            ProbeError: There is none, or it is damaged.
        """
        try:
            record = json.loads(read_file(self.record))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ProbeError(f"{self.path} is not a run folder: it has no run.json") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ProbeError(
                f"{self.record} is damaged, so nobody can tell what this run was; "
                "start over with --fresh"
            ) from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ProbeError(f"{self.record}: not of schema {SCHEMA}; start over with --fresh")
        try:
            return unsealed(record, self.record.name, needed=bool(record.get("digests")))
        except Damaged as error:
            raise ProbeError(
                f"{self.record}: {error}; put the file back that the run wrote, or start over with "
                "--fresh"
            ) from error

    @property
    def digested(self) -> bool:
        """Whether everything in this run has a digest, by its record; in old ones nothing has."""
        return self.record.exists() and bool(self.read_record().get("digests"))

    def write_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON file whole or not at all, with its digest."""
        table = sealed(value, Path(name).name)
        self.write_text(self.path / name, _json(table, indent=1) + "\n")

    def read_json(self, name: str) -> dict[str, object] | None:
        """What a JSON file holds; None where there is no such file.

        Raises:
            Damaged: It is no JSON object, or not as it was written.
        """
        try:
            table = json.loads(read_file(self.path / name))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise Damaged(f"damaged ({reason(error)})") from error
        if not isinstance(table, dict):
            raise Damaged("damaged (not a JSON object)")
        return unsealed(table, Path(name).name, self.digested)

    def solutions_file(self, model: str, benchmark: str) -> Path:
        """Where a model's solutions are."""
        return self.path / "solutions" / f"{model}.{benchmark}.jsonl"

    def unused_file(self, model: str, benchmark: str) -> Path:
        """Where those wait that a run with a larger `solutions.questions` has left."""
        return self.path / "solutions" / "unused" / f"{model}.{benchmark}.jsonl"

    def read_solutions(self, path: Path) -> tuple[list[Solution], int]:
        """The solutions in a file, and how many of its lines are damaged."""
        if not path.exists():
            return [], 0
        solutions, damaged, needed = {}, 0, self.digested
        try:
            lines = read_file(path).splitlines()
        except OSError as error:
            raise ProbeError(f"cannot read {path}: {error.strerror}; mend that") from error
        for line in lines:
            try:
                fields: dict[str, Any] = unsealed(dict(json.loads(line)), path.name, needed)
                solution = Solution(**fields)
                sound = _is_sound(solution)
            except (ValueError, TypeError, RecursionError, Damaged):
                sound = False
            if sound and solution.id not in solutions:
                solutions[solution.id] = solution
            else:
                damaged += 1
        return list(solutions.values()), damaged

    def read_whole(self, model: str, benchmark: str) -> list[Solution]:
        """A model's solutions, as far as it has got; none damaged, none lost since it was through.

        Raises:
            Missing: Some are.
        """
        path = self.solutions_file(model, benchmark)
        solutions, damaged = self.read_solutions(path)
        solved = self.read_record().get("solved", {})
        count = solved.get(path.name) if isinstance(solved, dict) else None
        lost = count is not None and len(solutions) != count
        if damaged or lost:
            left = f"{len(solutions)} of {count} solutions are left"
            what = left if lost else f"{damaged} damaged lines"
            raise Missing(f"{path}: {what}; run the recipe again")
        return solutions

    def append_solutions(self, path: Path, solutions: Iterable[Solution]) -> None:
        """Add solutions to a file; they are on the disk when this returns."""
        try:
            self.place(path)
            append(path, "".join(_line(solution, path) for solution in solutions))
        except OSError as error:
            raise self.unwritable(path, error) from error

    def write_solutions(self, path: Path, solutions: Iterable[Solution]) -> None:
        """Write a file of solutions anew."""
        self.write_text(path, "".join(_line(solution, path) for solution in solutions))

    def write_selection(self, cell: str, selection: Selection) -> None:
        """Write a cell's selection; a run that goes on selects anew."""
        self.write_json(f"selection/{cell}.json", asdict(selection))

    def read_selection(self, cell: str) -> Selection | None:
        """A cell's selection; None where there is none yet, or a torn one."""
        try:
            return TypeAdapter(Selection).validate_python(self.read_json(f"selection/{cell}.json"))
        except (Damaged, ValidationError):
            return None

    def leave_out(self, cell: str, reason: str) -> None:
        """Write down why a cell cannot be computed."""
        self.write_json(f"selection/{cell}.json", {"left_out": reason})

    def left_out(self, cell: str) -> str | None:
        """Why a cell cannot be computed; None where it can, as far as is known."""
        try:
            reason = (self.read_json(f"selection/{cell}.json") or {}).get("left_out")
        except Damaged:
            return None
        return None if reason is None else str(reason)

    def write_clusters(self, clusters: Mapping[str, Mapping[str, str]]) -> None:
        """Write the cluster of each question that has one, by benchmark."""
        self.write_json("clusters.json", clusters)

    def read_clusters(self, benchmark: str) -> dict[str, str]:
        """The cluster of each question of a benchmark that has one.

        Raises:
            ProbeError: The file is damaged or lost: without it, questions would pass for
                independent.
        """
        try:
            table = self.read_json("clusters.json")
            if table is None and self.digested:
                raise Damaged("lost")
            return TypeAdapter(dict[str, str]).validate_python((table or {}).get(benchmark, {}))
        except (Damaged, ValidationError) as error:
            why = error if isinstance(error, Damaged) else "damaged"
            raise ProbeError(
                f"{self.path / 'clusters.json'}: {why}; run the recipe again"
            ) from error

    def edges_file(self, cell: str, side: str) -> Path:
        """Where the edges of one side of a cell are."""
        return self.path / "edges" / f"{cell}.{side}.safetensors"

    def write_part(self, path: Path, edges: "EdgeScores", indices: Sequence[int], key: str) -> None:
        """Write one batch of what will be a file of edges, beside where that will be."""
        part = path.with_suffix(f".part-{indices[0]}.safetensors")
        self.write_edges(part, edges, [str(index) for index in indices], key)

    def parts(self, path: Path) -> list[Path]:
        """The batches that wait for the rest of their file."""
        found = path.parent.glob(f"{glob.escape(path.stem)}.part-*.safetensors")
        return sorted(part for part in found if part.suffixes[-2][len(".part-") :].isdigit())

    def write_edges(self, path: Path, edges: "EdgeScores", ids: Sequence[str], key: str) -> None:
        """Write scores, losses and entropies.

        Args:
            path: The file.
            edges: What to write.
            ids: The question of each sequence.
            key: What the edges were computed from, by `edges_key`.
        """
        from probe.attribution import write_edges  # which needs torch, as few other files do

        floats = replace(
            edges,
            scores=edges.scores.float(),
            losses=edges.losses.float(),
            entropies=edges.entropies.float(),
            values=edges.values.float(),
            gaps=None if edges.gaps is None else edges.gaps.float(),
            ids=tuple(ids),
        )
        self.write(path, lambda beside: write_edges(floats, beside, key, path.name))

    def read_edges(self, path: Path, key: str | None = None) -> "EdgeScores | None":
        """Read scores, losses and entropies; None where there is no such file.

        Args:
            path: The file.
            key: What they should have been computed from; None to take any.

        Raises:
            Damaged: The file is torn, not as it was written, or computed from something else.
        """
        from probe.attribution import read_edges  # which needs torch, as few other files do

        if not path.exists():
            return None
        try:
            edges, metadata = read_edges(path)
        except ValueError as error:
            raise Damaged(f"damaged ({error})") from error
        if "digest" not in metadata and self.digested:
            raise Damaged("damaged (it has no digest)")
        if metadata.get("place", path.name) != path.name:
            raise Damaged(f"damaged (it is {metadata['place']})")
        if key is not None and metadata.get("key") != key:
            raise Damaged("computed from other solutions or settings")
        return edges

    def read_sides(self, comparison: str, *sides: str) -> "list[EdgeScores]":
        """Edges of the same questions.

        Args:
            comparison: The name of a comparison.
            sides: Names of sides, as in file names.

        Raises:
            Missing: A side is not there, damaged, or of other questions.
        """
        found = []
        for file in (self.edges_file(comparison, side) for side in sides):
            try:
                found.append(self.read_edges(file))
            except Damaged as error:
                raise Missing(f"{file}: {error}; run the recipe again") from error
        edges = [side for side in found if side is not None]
        if len(edges) < len(found):
            raise Missing(self.left_out(comparison) or "not computed yet")
        if any(side.ids != edges[0].ids for side in edges):
            raise Missing(f"{', '.join(sides[:-1])} and {sides[-1]} are of different questions")
        return edges

    def write_temperatures(
        self, comparison: str, side: str, ids: Sequence[str], found: Sequence[float | None]
    ) -> None:
        """Write the temperature of each question on a control's side; None where it has none."""
        table = {"ids": list(ids), "temperatures": list(found)}
        self.write_json(temperature_file(comparison, side), table)

    def read_temperatures(self, comparison: str, side: str) -> dict[str, float | None] | None:
        """The temperature of each question on a control's side; None: it does not count there.

        Of a file that is not there, damaged, or of an older version, which had one temperature for
        all questions, None.
        """
        try:
            table = self.read_json(temperature_file(comparison, side)) or {}
            ids = TypeAdapter(list[str]).validate_python(table.get("ids"))
            found = TypeAdapter(list[float | None]).validate_python(table.get("temperatures"))
            return dict(zip(ids, found, strict=True))
        except (Damaged, ValidationError, ValueError):
            return None

    def read_measured(self, file: str) -> dict[str, object]:
        """What an extra pass has left.

        Raises:
            Missing: Nothing, or something damaged.
        """
        try:
            table = self.read_json(file)
        except Damaged as error:
            raise Missing(f"{self.path / file}: {error}; run the recipe again") from error
        if table is None:
            raise Missing("not measured yet; run the recipe again")
        return table


def run_path(inside: str | Path) -> Path:
    """The run folder that a path means: itself, or the one that this file or folder lies in."""
    path = Path(inside)
    if path.exists():
        for folder in (path, *path.absolute().parents[:2]):
            if (folder / "run.json").is_file():
                return folder
    return path


def _is_sound(solution: Solution) -> bool:
    """Whether all fields of a solution are what they should be."""
    texts = (solution.id, solution.text, solution.gold, solution.extracted or "")
    return (
        isinstance(solution.correct, bool)
        and all(isinstance(text, str) for text in texts)
        and all(
            isinstance(tokens, list) and all(type(token) is int for token in tokens)
            for tokens in (solution.prompt, solution.answer)
        )
    )


def _is_ours(path: Path) -> bool:
    """Whether something may be in a folder where no run has begun: what a first moment leaves."""
    if path.name in FOLDERS:
        return path.is_dir() and not any(path.iterdir())
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(UNFINISHED))


def _line(solution: Solution, path: Path) -> str:
    return _json(sealed(asdict(solution), path.name)) + "\n"


def _json(table: Mapping[str, object], indent: int | None = None) -> str:
    """A table as JSON that people can read, but for halves of characters, as some paths have."""
    text = json.dumps(table, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(table, indent=indent, allow_nan=False)
    return text
