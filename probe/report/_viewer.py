"""Viewer: a local page that lists runs, follows those that go on, and opens any of them.

It answers on the loopback address only, to who knows the token in its address, and to no request
that names another host: a page elsewhere in the browser can neither read nor guess it. It only
reads, and shows a run as `--format html` writes it.

    >>> with Viewer(Path("runs")) as viewer:
    ...     print(viewer.address)
    ...     viewer.serve_forever()
"""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import quote, unquote

from probe.errors import ProbeError
from probe.escaping import html as escape
from probe.recipe import recipe_from
from probe.report._rendering import render
from probe.report._stored import read_report
from probe.stats import control_sides
from probe.store import Damaged, RunFolder, check_free, model_names

DEPTH = 2
"""How far below a folder of runs one is looked for."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class RunState:
    """How far a run is."""

    name: str
    """Its folder, from the folder that is shown."""

    recipe: str
    """Its recipe's name, or why it cannot be read."""

    state: str
    """`finished`, `running` or `stopped`; `damaged` where it cannot be read."""

    started: str
    """When, in UTC."""

    solved: int
    """Answers that are there."""

    to_solve: int
    """Answers that it takes."""

    scored: int
    """Files of edges that are there."""

    to_score: int
    """Files of edges that it takes, where every comparison can be made."""

    stamp: str
    """Another one where its report may say something else."""


def run_folders(root: Path) -> dict[str, Path]:
    """The runs in a folder by their names: itself, or what lies in it; none through a link."""
    if (root / "run.json").is_file():
        return {root.resolve().name: root}
    found = {}
    for depth in range(1, DEPTH + 1):
        for record in sorted(root.glob("/".join(["*"] * depth) + "/run.json")):
            inside = record.parent.resolve().is_relative_to(root.resolve())
            if inside and record.is_file():
                found[record.parent.relative_to(root).as_posix()] = record.parent
    return found


def run_state(name: str, path: Path) -> RunState:
    """How far a run is, by what its folder holds now."""
    folder = RunFolder(path)
    files = sorted(
        one
        for one in [*path.glob("edges/*"), *path.glob("faithfulness/*.json"), path / "report.json"]
        if one.is_file() and ".part-" not in one.name and not one.name.startswith(".")
    )
    marks = [(one.name, one.stat().st_mtime_ns, one.stat().st_size) for one in files]
    try:
        record = folder.read_record()
        recipe = recipe_from(record["recipe"], str(folder.record))
        asked = folder.read_json("questions.json") or {}
        names = model_names(recipe)
    except (ProbeError, Damaged) as error:
        return RunState(name, str(error), "damaged", "", 0, 0, 0, 0, str(marks))
    state = "finished" if record.get("finished") else "stopped"
    try:
        check_free(folder)
    except ProbeError:
        state = "running"
    questions = sum(len(part) for part in asked.values() if isinstance(part, dict))
    sides = 2 + len(control_sides(recipe.attribution.control))
    found = (str(record.get("finished")), str(record.get("solved")), marks)
    return RunState(
        name,
        recipe.name,
        state,
        str(record.get("started") or ""),
        sum(_lines(one) for one in path.glob("solutions/*.jsonl")),
        questions * len(names),
        sum(one.parent.name == "edges" for one in files),
        sides * len(recipe.comparisons()),
        hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16],
    )


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


class Viewer(ThreadingHTTPServer):
    """A server on the loopback address, at a port of its own."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        """Begin to listen.

        Args:
            root: A run folder, or a folder that holds some.

        Raises:
            ProbeError: There is no such folder.
        """
        if not root.is_dir():
            raise ProbeError(
                f"there is no folder {root}; give a run folder, or one that holds some"
            )
        self.root = root
        self.token = secrets.token_urlsafe(24)
        self._pages: dict[str, tuple[str, bytes]] = {}
        self._drawing = Lock()
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def hosts(self) -> set[str]:
        """What a request may call this server."""
        return {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def address(self) -> str:
        """Where it is; who has this may read the runs."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    @cached_property
    def front(self) -> bytes:
        """The page that lists runs."""
        return Path(__file__).with_name("viewer.html").read_bytes()

    def states(self) -> bytes:
        """How far each run is, as JSON, the latest first."""
        found = [run_state(name, path) for name, path in run_folders(self.root).items()]
        found.sort(key=lambda one: one.started, reverse=True)
        rows = [asdict(one) | {"link": f"run/{quote(one.name, safe='')}"} for one in found]
        return json.dumps(rows).encode()

    def page(self, name: str) -> bytes | None:
        """A run's page, drawn again where the run has got on; None where there is no such run."""
        path = run_folders(self.root).get(name)
        if path is None:
            return None
        with self._drawing:  # matplotlib draws one at a time
            stamp = run_state(name, path).stamp
            if self._pages.get(name, ("", b""))[0] != stamp:
                self._pages[name] = stamp, render(read_report(path), "html").encode()
            return self._pages[name][1]


class _Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Viewer
    server_version = "probe"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer, or refuse what is not for this server or has no token."""
        _, token, *rest = [*self.path.split("?")[0].split("/"), ""]  # one slash at least
        host = self.headers.get_all("Host") or []
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if len(host) != 1 or host[0].lower() not in self.server.hosts or not known:
            self._send(403, b"forbidden: open the address that probe view printed\n", "text/plain")
            return
        match [part for part in rest if part]:
            case []:
                self._send(200, self.server.front, "text/html", _POLICY)
            case ["runs.json"]:
                self._send(200, self.server.states(), "application/json")
            case ["run", name] if (page := self._drawn(unquote(name))) is not None:
                self._send(200, page, "text/html")
            case _:
                self._send(404, b"there is no such page\n", "text/plain")

    def _drawn(self, name: str) -> bytes | None:
        try:
            return self.server.page(name)
        except ProbeError as error:
            return f"<!doctype html><meta charset=utf-8><pre>{escape(str(error))}</pre>".encode()

    def _send(self, code: int, body: bytes, kind: str, policy: str = "") -> None:
        self.send_response(code)
        headers = _HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}
        headers |= {"Content-Security-Policy": policy} if policy else {}
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: a line would hold the token."""
