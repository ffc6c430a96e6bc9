"""Running on an NDIF server: jobs there, and what can go wrong with them.

A trace becomes a job: the source of its body and the few tensors it uses go up, what it saves comes
home. nnsight's own client waits for ever and stops at the first fault, so this module has its own:
every wait ends, what may pass is tried again with growing pauses, and the rest is one clear line.
Saved values are read as plain tensors, so a server cannot run code here; the key goes into one
header and nowhere else.

    >>> model = load_model("probe:tiny-math/sft", host=open_host("http://localhost:8001"))
    >>> probe.attribute(model, sequences)           # runs there

`probe.hosting` says what a server has and checks that it fits.
"""

import io
import itertools
import json
import os
import pickle
import threading
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from probe.errors import ProbeError, reason
from probe.vocabulary import JOBS, TIMEOUT

if TYPE_CHECKING:
    import torch
    from nnsight.schema.response import ResponseModel

HOSTED = "ndif"
KEY_VARIABLE = "NDIF_API_KEY"

# Seconds for a server to take a connection, and to answer a plain question.
_CONNECT, _ANSWER = 10.0, 60.0
_LONGEST_PAUSE = 30.0
_GO_ON = "; nothing is lost, the same command goes on from here"

T = TypeVar("T")


class _IncompleteError(Exception):
    """A request that lacks something."""


class PassingError(Exception):
    """A fault of the server or of the way to it that may be gone in a while."""


@dataclass
class Host:
    """A server, and what went to it and came from it."""

    url: str
    """`http://host:port` or `https://...`, without a slash at its end."""

    key: str = field(default="", repr=False)
    """The key that it asks for, if it does."""

    jobs: int = JOBS
    """How many jobs may be under way at once."""

    deploys: bool = True
    """Whether it may bring up a model that is not up: one's own server does on request."""

    timeout: float = TIMEOUT
    """Seconds without a sign of life after which a job is sent once more, and for which other
    faults are tried again."""

    say: Callable[[str], None] = field(default=lambda line: None, repr=False)
    """Is told of faults that are tried again."""

    watch: Callable[[], None] = field(default=lambda: None, repr=False)
    """Is called at each change of `states`."""

    states: Counter[str] = field(default_factory=Counter)
    """How many jobs are `queued`, `running` and `done`."""

    sent: int = 0
    """Bytes that jobs were."""

    received: int = 0
    """Bytes that came home."""

    seconds: float = 0.0
    """From sending each job to having what it saved, summed."""

    seconds_there: float = 0.0
    """The part of it that the server says it took."""

    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Guards these counts."""

    def __post_init__(self) -> None:
        """Make as many slots as jobs may be under way."""
        self._slots = threading.BoundedSemaphore(self.jobs)

    @property
    def table(self) -> dict[str, object]:
        """What happened, as plain data."""
        return {
            "host": self.url,
            "jobs": self.states["done"],
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "seconds": round(self.seconds, 3),
            "seconds_there": round(self.seconds_there, 3),
        }

    def ask(self, path: str, patience: float = 0.0) -> object:
        """What a GET answers, as plain data.

        Args:
            path: The path, `/status`.
            patience: For how many seconds faults are tried again.

        Raises:
            ProbeError: No answer, or a refusal.
        """
        return self.insist(lambda: self._request("GET", path), patience)

    def knock(self, patience: float = 0.0) -> None:
        """Check that it takes the key: send the head of a job, but no job.

        Raises:
            ProbeError: It does not take it, or gives no answer.
        """
        envelope = {"data": json.dumps({"model_key": "none"})}

        def ask() -> None:
            # The key is looked at first, then the missing job is complained of: 422.
            with suppress(_IncompleteError):
                self._request("POST", "/request", envelope)

        self.insist(ask, patience)

    def run(self, model_key: str, env: dict[str, object], blob: bytes) -> "dict[str, torch.Tensor]":
        """Run a job; what it saved.

        Args:
            model_key: The model's name on the server.
            env: What nnsight wants the server to set on the model first.
            blob: The job.

        Raises:
            ProbeError: It cannot run there, or faults did not pass.
            RuntimeError: The job itself is broken; the message is the server's.
        """
        with self._slots:
            start = time.monotonic()
            saved = self.insist(lambda: self._attempt(model_key, env, blob), self.timeout, _GO_ON)
            with self.lock:
                self.sent += len(blob)
                self.seconds += time.monotonic() - start
        return saved

    def insist(self, call: Callable[[], T], patience: float, hint: str = "") -> T:
        """Call until no passing fault is in the way, or they have not passed for too long.

        Args:
            call: What to call.
            patience: For how many seconds faults are tried again.
            hint: What to say behind the last of them.

        Raises:
            ProbeError: The last of them.
        """
        first: float | None = None
        for pause in itertools.chain((1.0, 2.0, 4.0, 8.0, 16.0), itertools.repeat(_LONGEST_PAUSE)):
            try:
                return call()
            except PassingError as fault:
                first = first or time.monotonic()
                if time.monotonic() + pause - first > patience:
                    after = f" for {patience:.0f} s" if patience else ""
                    raise ProbeError(f"{self.url}: {fault}{after}{hint}") from None
                self.say(f"{self.url}: {fault}; trying again in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError

    def clean(self, text: str) -> str:
        """A server's words without the key: some refusals repeat it."""
        return text.replace(self.key, "***") if self.key else text

    def _headers(self) -> dict[str, str]:
        return {"ndif-api-key": self.key} if self.key else {}

    def _request(
        self,
        method: str,
        path: str,
        data: dict[str, str] | None = None,
        files: dict[str, tuple[str, bytes, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> object:
        import httpx

        try:
            answer = httpx.request(
                method,
                path if path.startswith("http") else self.url + path,
                data=data,
                files=files,
                headers=self._headers() | (headers or {}) if path.startswith("/") else None,
                timeout=httpx.Timeout(min(_ANSWER, self.timeout), connect=_CONNECT),
            )
        except httpx.TimeoutException:
            raise PassingError("no answer") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PassingError(self.clean(_reason(error))) from None
        if answer.is_success:
            return answer.json() if path.startswith("/") else answer.content
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = answer.reason_phrase
        raise self._refusal(answer.status_code, self.clean(str(detail)))

    def _refusal(self, status: int, detail: str) -> Exception:
        """What a status that is no success means."""
        if status in (401, 403) or (status == 400 and "API key" in detail):
            if not self.key:
                return ProbeError(f"{self.url} asks for a key; set {KEY_VARIABLE}")
            return ProbeError(f"{self.url} does not take the key in {KEY_VARIABLE}")
        if status == 422:
            return _IncompleteError(detail)
        if status >= 500 or status in (408, 429):
            return PassingError(f"it answers {status} ({detail})")
        if status == 404:
            return ProbeError(f"{self.url} answers, but it is no NDIF server (404)")
        return ProbeError(f"{self.url} refuses ({status}): {detail}")

    def _attempt(
        self, model_key: str, env: dict[str, object], blob: bytes
    ) -> "dict[str, torch.Tensor]":
        """Send a job and wait for what it saved."""
        import websocket
        from nnsight.schema.request import RequestModel

        state = self._move(None, "queued")
        try:
            socket = websocket.create_connection(
                "ws" + self.url.removeprefix("http") + "/subscribe",
                timeout=_CONNECT,
                header=self._headers(),
            )
            try:
                socket.settimeout(min(_ANSWER, self.timeout))
                session = json.loads(socket.recv())["session_id"]
                request = RequestModel(
                    model_key=model_key, session_id=session, compress=True, env=env
                )
                self._post(request, blob)
                socket.settimeout(self.timeout)
                while True:
                    response = _read_response(socket.recv())
                    if response.status == "RUNNING":
                        state = self._move(state, "running")
                    elif response.status == "ERROR":
                        raise self._failure(self.clean(response.description))
                    elif response.status == "COMPLETED":
                        saved = self._saved(response)
                        state = self._move(state, "done")
                        return saved
            finally:
                socket.close()
        except websocket.WebSocketTimeoutException:
            raise PassingError(f"no sign of life from a job for {self.timeout:.0f} s") from None
        except websocket.WebSocketConnectionClosedException:
            raise PassingError("it closed the connection") from None
        except websocket.WebSocketBadStatusException as error:
            raise self._refusal(error.status_code, "no websocket") from None
        except (websocket.WebSocketException, OSError) as error:
            raise PassingError(self.clean(_reason(error))) from None
        except (ValueError, KeyError, TypeError):
            raise ProbeError(f"{self.url} answers, but not as an NDIF server does") from None
        finally:
            if state != "done":
                self._move(state, None)

    def _post(self, request: object, blob: bytes) -> None:
        import platform
        from importlib.metadata import version

        from nnsight.schema.request import RequestModel

        assert isinstance(request, RequestModel)
        self._request(
            "POST",
            "/request",
            {"data": request.metadata()},
            {"blob": ("request", blob, "application/octet-stream")},
            {
                "ndif-timestamp": repr(time.time()),
                "nnsight-version": version("nnsight"),
                "python-version": platform.python_version(),
            },
        )

    def _saved(self, response: "ResponseModel") -> "dict[str, torch.Tensor]":
        """What a finished job saved: on the response itself, or behind a link."""
        import torch
        import zstandard

        data = response.data
        if isinstance(data, str):
            data = self._request("GET", data)
        assert isinstance(data, bytes)
        with self.lock:
            self.received += len(data)
            self.seconds_there += (response.meta or {}).get("runtime") or 0
        plain = zstandard.ZstdDecompressor().decompress(data)
        try:
            saved: dict[str, torch.Tensor] = torch.load(
                io.BytesIO(plain), map_location="cpu", weights_only=True
            )
        except pickle.UnpicklingError:
            raise ProbeError(f"{self.url} sends more than plain tensors; it is not read") from None
        return saved

    def _failure(self, text: str) -> Exception:
        """What the server's word on a failed job means."""
        lines = text.strip().splitlines() or ["it does not say why"]
        last = lines[-1]
        smaller = "take smaller batches (solutions.batch_size, attribution.batch_size)"
        if text.startswith("Could not deploy"):  # its reason may be a whole traceback
            return ProbeError(f"{self.url}: {lines[0]}")
        if "try again later" in text and "cancelled" not in text:
            return PassingError(last.partition(" Please try again later")[0])
        if "exceeded the execution timeout" in text:
            return ProbeError(f"{self.url}: {last} {smaller}{_GO_ON}")
        if "OutOfMemoryError" in text or "out of memory" in text:
            import torch

            return torch.OutOfMemoryError(f"{self.url}: a job ran out of memory there; {smaller}")
        if "EndpointConnectionError" in text or "object store" in text.lower():
            return ProbeError(
                f"{self.url}: what a job saved is more than the server can send without an object "
                f"store; {smaller}{_GO_ON}"
            )
        if "Traceback" in text:
            return RuntimeError(f"{self.url}: a job failed there:\n{text}")
        return ProbeError(f"{self.url}: {last}")

    def _move(self, old: str | None, new: str | None) -> str | None:
        """Count a job in another state, and tell."""
        with self.lock:
            self.states.subtract([old] if old else [])
            self.states.update([new] if new else [])
        self.watch()
        return new


@dataclass(frozen=True)
class Deployment:
    """A model on a server."""

    host: Host
    """The server."""

    key: str
    """The model's name there."""

    env: dict[str, object]
    """What nnsight wants the server to set on the model before each job."""


def open_host(
    remote: str,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] | None = None,
) -> Host:
    """A server by its address; nothing is sent yet.

    Args:
        remote: `ndif` for the hosted NDIF, or `http://host:port` for a server of one's own.
        jobs: How many jobs may be under way at once.
        timeout: See `Host.timeout`.
        say: See `Host.say`.

    Raises:
        ProbeError: No such address, or a key that is missing or damaged.
    """
    from nnsight.schema.config import CONFIG

    # From the variable alone, for one's own server; nnsight's stored key is for the hosted one.
    key = os.environ.get(KEY_VARIABLE, "").strip()
    url = remote
    if remote == HOSTED:
        url, key = CONFIG.API.HOST, key or (CONFIG.API.APIKEY or "").strip()
        if not key:
            raise ProbeError(
                f"the hosted NDIF asks for a key: set {KEY_VARIABLE}; see docs/remote.md"
            )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ProbeError(f"remote is {remote!r}; give {HOSTED} or an address, http://host:8001")
    if parts.username or parts.password:
        raise ProbeError(
            f"leave name and password out of the address; a key goes into {KEY_VARIABLE}"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ProbeError(f"{KEY_VARIABLE} holds characters that no key has")
    say = say or (lambda line: None)
    return Host(url.rstrip("/"), key, jobs, remote != HOSTED, timeout, say)


def in_flight(calls: Iterable[Callable[[], T]], jobs: int) -> Iterator[T]:
    """What calls return, in their order, with some of them under way at once.

    After an error nothing new is begun, but what is under way is waited for and given out, so that
    whoever keeps results loses none.

    Args:
        calls: What to call.
        jobs: How many may be under way; with one, nothing is called before it is asked for.
    """
    if jobs == 1:
        yield from (call() for call in calls)
        return
    waiting: deque[Future[T]] = deque()
    error: Exception | None = None
    left = iter(calls)
    pool = ThreadPoolExecutor(jobs)
    try:
        while True:
            begun = list(itertools.islice(left, jobs - len(waiting))) if error is None else []
            waiting.extend(pool.submit(call) for call in begun)
            if not waiting:
                break
            try:
                result = waiting.popleft().result()
            except Exception as failure:
                error = error or failure
            else:
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if error is not None:
        raise error


class _PlainUnpickler(pickle.Unpickler):
    """Takes plain values and the status of a response, and nothing that could run."""

    def find_class(self, module: str, name: str) -> object:
        from nnsight.schema.response import Status

        if (module, name) == (Status.__module__, Status.__name__):
            return Status
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_response(message: str | bytes) -> "ResponseModel":
    """A status as it comes over the websocket: text, or torch's archive with the result in it."""
    from nnsight.schema.response import ResponseModel

    if isinstance(message, str):
        return ResponseModel.model_validate_json(message)
    try:
        with zipfile.ZipFile(io.BytesIO(message)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            table = _PlainUnpickler(io.BytesIO(archive.read(name))).load()
        return ResponseModel(**table)
    except (zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError) as error:
        raise ValueError("not a response") from error


def _reason(error: BaseException) -> str:
    """The inmost cause of a failed connection, in words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return reason(error)
