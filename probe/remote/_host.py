"""Running on an NDIF server: jobs there, and what can go wrong with them.

A trace becomes a job: the source of its body and the few tensors it uses go up, what it saves comes
home. nnsight's own client waits for ever and stops at the first fault, so this module has its own:
every wait ends, what may pass is tried again with growing pauses, and the rest is one clear line.
Saved values are read as plain tensors, so a server cannot run code here; the key goes into one
header and nowhere else.

    >>> model = load_hosted("probe:tiny-math/sft", Host("http://localhost:8001"))
    >>> probe.attribute(model, sequences)           # runs there

`probe.hosting` says what a server has, checks that it fits, and loads a model that runs there.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from probe.errors import ProbeError
from probe.remote._limits import (
    ANSWER_BYTES,
    RESULT_BYTES,
    Counted,
    TooLargeError,
    body,
    deadline,
)
from probe.remote._patience import insist
from probe.remote._wire import (
    GO_ON,
    IncompleteError,
    PassingError,
    connection_reason,
    failure,
    read_response,
    read_saved,
    refusal,
    too_large,
)
from probe.vocabulary import JOBS, TIMEOUT

if TYPE_CHECKING:
    import torch
    from nnsight.schema.response import ResponseModel
    from websocket import WebSocket


# Seconds for a server to take a connection, and to answer a plain question.
_CONNECT, _ANSWER = 10.0, 60.0
_YEAR = 365 * 24 * 3600.0
# How many letters of a refusal are repeated.
_WORDS = 2_000
# How many a job may take; one tells of each change of its state.
_MESSAGES = 10_000

T = TypeVar("T")


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

    preparing: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Is held while a job is put together, which two threads cannot do at once."""

    def __post_init__(self) -> None:
        """Make as many slots as jobs may be under way."""
        self._slots = threading.BoundedSemaphore(self.jobs)
        self._watchers: list[Callable[[Counter[str]], None]] = []

    @contextmanager
    def watched(self, watcher: Callable[[Counter[str]], None]) -> Iterator[None]:
        """Let a function be called with `states` at each change of them, for a while."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

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

    def ask(self, path: str, patience: float = 0.0, hint: str = "") -> object:
        """What a GET answers, as plain data.

        Args:
            path: The path, `/status`.
            patience: For how many seconds faults are tried again.
            hint: What to say behind the last of them.

        Raises:
            ProbeError: No answer, or a refusal.
        """
        return self.insist(lambda: self._request("GET", path), patience, hint)

    def knock(self, patience: float = 0.0) -> None:
        """Check that it takes the key: send the head of a job, but no job.

        Raises:
            ProbeError: It does not take it, or gives no answer.
        """
        envelope = {"data": json.dumps({"model_key": "none"})}

        def ask() -> None:
            # The key is looked at first, then the missing job is complained of: 422.
            with suppress(IncompleteError):
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
            saved = self.insist(lambda: self._attempt(model_key, env, blob), self.timeout, GO_ON)
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
        return insist(call, self.url, patience, self.say, hint)

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
        """What it answers: plain data, or for a whole address instead of a path the bytes there.

        Only what goes to the server itself carries the key; no redirection is followed.
        """
        import httpx

        own = path.startswith("/")
        patience = min(_ANSWER, self.timeout) if own and files is None else self.timeout
        timeout = httpx.Timeout(min(_ANSWER, self.timeout), connect=_CONNECT)
        sent = {"accept-encoding": "identity"}
        sent |= self._headers() | (headers or {}) if own else {}
        most = ANSWER_BYTES if own else RESULT_BYTES
        with httpx.Client(timeout=timeout) as client, deadline(patience, client.close) as passed:
            try:
                with client.stream(
                    method,
                    self.url + path if own else path,
                    data=data,
                    files=files,
                    headers=sent,
                ) as answer:
                    content = body(answer, most)
            except TooLargeError as error:
                raise too_large(self.url, error) from None
            except httpx.TimeoutException:
                raise PassingError("no answer") from None
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, OSError) as error:
                # A client that the deadline closed raises whatever it was about to use.
                if passed.is_set():
                    raise PassingError("no answer") from None
                if isinstance(error, RuntimeError):
                    raise
                raise PassingError(self.clean(connection_reason(error))) from None
        if answer.is_success and not own:
            return content
        if self.key:  # it may come back in any word, which may be shown
            content = content.replace(self.key.encode(), b"***")
        try:
            found = json.loads(content)
            if answer.is_success:
                return found
            detail = found["detail"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if answer.is_success:
                raise ProbeError(f"{self.url} answers, but not as an NDIF server does") from None
            detail = answer.reason_phrase
        words = self.clean(str(detail))[:_WORDS]
        raise refusal(self.url, self.key, answer.status_code, words)

    def _attempt(
        self, model_key: str, env: dict[str, object], blob: bytes
    ) -> "dict[str, torch.Tensor]":
        """Send a job and wait for what it saved."""
        import websocket
        from nnsight.schema.request import RequestModel

        state = self._move(None, "queued")
        wire = websocket.WebSocket()
        try:
            connect = partial(
                wire.connect,
                "ws" + self.url.removeprefix("http") + "/subscribe",
                timeout=min(_CONNECT, self.timeout),
                header=self._headers(),
                redirect_limit=0,
            )
            _in_time(wire, min(_ANSWER, self.timeout), connect)
            try:
                assert wire.sock
                wire.sock = cast(socket.socket, Counted(wire.sock, RESULT_BYTES))
                opening = _message(wire, min(_ANSWER, self.timeout))
                session = json.loads(opening)["session_id"]
                request = RequestModel(
                    model_key=model_key, session_id=session, compress=True, env=env
                )
                self._post(request, blob)
                for _ in range(_MESSAGES):
                    response = read_response(_message(wire, self.timeout))
                    if response.status == "RUNNING":
                        state = self._move(state, "running")
                    elif response.status == "ERROR":
                        raise failure(self.url, self.clean(response.description or ""))
                    elif response.status == "COMPLETED":
                        saved = self._saved(response)
                        state = self._move(state, "done")
                        return saved
                raise TooLargeError(f"more than {_MESSAGES:,} messages for a job")
            finally:
                wire.close()
        except TooLargeError as error:
            raise too_large(self.url, error) from None
        except websocket.WebSocketTimeoutException:
            raise PassingError(f"no sign of life from a job for {self.timeout:.0f} s") from None
        except websocket.WebSocketConnectionClosedException:
            raise PassingError("it closed the connection") from None
        except websocket.WebSocketBadStatusException as error:
            raise refusal(self.url, self.key, error.status_code, "no websocket") from None
        except (websocket.WebSocketException, OSError) as error:
            raise PassingError(self.clean(connection_reason(error))) from None
        except (ValueError, KeyError, TypeError, RecursionError):
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
        data = response.data
        if isinstance(data, str) and data.startswith(("http://", "https://")):
            data = self._request("GET", data)
        if not isinstance(data, bytes):
            raise ValueError("neither a result nor a link to one")
        with self.lock:
            self.received += len(data)
            self.seconds_there += _seconds((response.meta or {}).get("runtime"))
        return read_saved(self.url, data)

    def _move(self, old: str | None, new: str | None) -> str | None:
        """Count a job in another state, and tell."""
        with self.lock:
            self.states.subtract([old] if old else [])
            self.states.update([new] if new else [])
        for watcher in tuple(self._watchers):
            watcher(self.states)
        return new


def _seconds(told: object) -> float:
    """How long a server says that something took; 0 where it says nothing of use."""
    sound = isinstance(told, int | float) and 0 <= told < _YEAR
    return float(told) if sound else 0.0  # type: ignore[arg-type]  # a number


def _message(wire: "WebSocket", seconds: float) -> str | bytes:
    """The next message, whole, in so many seconds."""
    wire.settimeout(seconds)
    return _in_time(wire, seconds, wire.recv)


def _in_time(wire: "WebSocket", seconds: float, call: Callable[[], T]) -> T:
    """What a call returns that reads from a websocket, if it does so in time."""
    import websocket

    def hang_up() -> None:
        if wire.sock:
            # It may be closed by now.
            with suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)

    with deadline(seconds, hang_up) as passed:
        try:
            return call()
        except (websocket.WebSocketException, OSError):
            if passed.is_set():
                raise websocket.WebSocketTimeoutException("not whole in time") from None
            raise


@dataclass(frozen=True)
class Deployment:
    """A model on a server."""

    host: Host
    """The server."""

    key: str
    """The model's name there."""

    env: dict[str, object]
    """What nnsight wants the server to set on the model before each job."""
