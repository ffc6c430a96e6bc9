"""A server that speaks OpenAI's API: which models it has, and completions of prompts.

vLLM, SGLang, llama.cpp and `transformers serve` are such servers. What they answer is read as plain
data, of limited size and in limited time; the key goes into one header, and to its own host only.

    >>> server = open_completions("http://localhost:8000/v1")
    >>> server.complete({"model": "my-model", "prompt": "1+1=", "max_tokens": 4})
    Completion(text='2', tokens=None, ended=True, prompt_tokens=4, written=2)
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import unquote, urldefrag, urlsplit

from probe.errors import ProbeError
from probe.remote._address import check_address, check_key
from probe.remote._limits import ANSWER_BYTES, TooLargeError, body, deadline
from probe.remote._patience import insist
from probe.remote._wire import GO_ON, PassingError, connection_reason
from probe.vocabulary import TIMEOUT

if TYPE_CHECKING:
    import ssl

KEY, KEYS_HOST = "OPENAI_API_KEY", "OPENAI_BASE_URL"
"""The variables with a key and the address that it is for."""

_KEYS_OWN_HOST = "https://api.openai.com/v1"
_CONNECT = 10.0
_WORDS = 500
_TOKEN = "token_id:"
_COMPLAINTS = ("error", "message", "detail", "msg")
_QUIET = 10.0

T = TypeVar("T")


class RefusedError(ProbeError):
    """A server does not take a request as it is."""


class Completion(NamedTuple):
    """What a model wrote behind a prompt."""

    text: str
    """As text."""

    tokens: tuple[int, ...] | None
    """As tokens, where the server gives them."""

    ended: bool
    """Whether it ended by itself or at a stop string, and not at the limit."""

    prompt_tokens: int | None
    """How many tokens the server read, where it says so."""

    written: int | None
    """How many it wrote, likewise."""


@dataclass
class CompletionServer:
    """A server, and how it is talked to."""

    url: str
    """`http://host:port/v1`, without a slash at its end."""

    name: str = ""
    """The model's name there, where the address says it."""

    key: str = field(default="", repr=False)
    """The key that belongs to this host, if there is one."""

    timeout: float = TIMEOUT
    """Seconds without an answer after which a request is sent once more, and for which other faults
    are tried again."""

    say: Callable[[str], object] = field(default=lambda line: None, repr=False)
    """Is told of faults that are tried again."""

    said: float = field(default=-_QUIET, repr=False)
    """When it was told last: one line stands for the faults of many requests."""

    def model_named(self, reference: str, shared: bool = False) -> str:
        """The name that the server has for a model.

        Args:
            reference: The model, as a recipe names it.
            shared: Whether it is asked for other models, too.

        Raises:
            ProbeError: It is not clear which of its models that is; or no answer.
        """
        if self.name:
            return self.name
        entries = self._insist(lambda: self._request("GET", "/models", None)).get("data")
        entries = entries if isinstance(entries, list) else []
        ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        names = [name for name in ids if isinstance(name, str) and name]
        # A server of one model may have any name for it.
        alike = [name for name in names if _last(name) == _last(reference)]
        for fitting in ([name for name in names if name == reference], alike, names):
            if len(fitting) == 1 and not (shared and fitting is names):
                return fitting[0]
        raise ProbeError(
            f"{self.url} has {', '.join(names[:20]) or 'no models'}, and which of them is "
            f"{reference} is not clear; say it behind a #: {self.url}#NAME"
        )

    def complete(self, request: Mapping[str, object], trying: bool = False) -> Completion:
        """What a model writes behind a prompt.

        Args:
            request: The fields of a request for a completion.
            trying: Whether other requests are tried where it fails.

        Raises:
            RefusedError: It does not take these fields.
            ProbeError: It takes none, or faults did not pass.
        """
        return self._insist(
            lambda: _completion(
                self.url, self._request("POST", "/completions", dict(request), trying)
            )
        )

    def _insist(self, call: Callable[[], T]) -> T:
        return insist(call, self.url, self.timeout, self._say, GO_ON)

    def _say(self, line: str) -> None:
        if time.monotonic() - self.said > _QUIET:
            self.said = time.monotonic()
            self.say(line)

    def _request(
        self, method: str, path: str, fields: Mapping[str, object] | None, trying: bool = False
    ) -> Mapping[str, object]:
        """What it answers; no redirection is followed, which could lead the key elsewhere."""
        import httpx

        headers = {"accept-encoding": "identity"}
        headers |= {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(self.timeout, connect=min(_CONNECT, self.timeout))
        with (
            httpx.Client(timeout=timeout, verify=_certificates()) as client,
            deadline(self.timeout, client.close) as passed,
        ):
            try:
                with client.stream(method, self.url + path, json=fields, headers=headers) as answer:
                    content = body(answer, ANSWER_BYTES)
            except TooLargeError as error:
                raise ProbeError(f"{self.url} sends {error}") from None
            except httpx.TimeoutException:
                raise self._late from None
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, OSError) as error:
                # A client that the deadline closed raises whatever it was about to use.
                if passed.is_set():
                    raise self._late from None
                if isinstance(error, RuntimeError):
                    raise
                raise PassingError(self._clean(connection_reason(error))) from None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not answer.is_success:
            words = self._clean(_complaint(found) or answer.reason_phrase)
            raise self._refusal(answer.status_code, words, trying)
        if not isinstance(found, dict):
            raise ProbeError(f"{self.url} answers, but not as OpenAI's API does")
        return found

    @property
    def _late(self) -> PassingError:
        return PassingError(f"no answer in {self.timeout:.0f} s (compute.timeout)")

    def _clean(self, text: str) -> str:
        """A server's words without the key: some refusals repeat it."""
        return (text.replace(self.key, "***") if self.key else text)[:_WORDS]

    def _refusal(self, status: int, words: str, trying: bool) -> Exception:
        """What a status that is no success means."""
        if status in (401, 403):
            if self.key:
                return ProbeError(f"{self.url} does not take the key in {KEY}: {words}")
            return ProbeError(
                f"{self.url} asks for a key; a key goes to its own host only: set {KEY}, and "
                f"{KEYS_HOST} to this address"
            )
        # What a server cannot do often ends in a fault of its own.
        if status in (408, 429) or (status >= 500 and not (trying and status in (500, 501))):
            return PassingError(f"it answers {status} ({words})")
        return RefusedError(f"{self.url} refuses ({status}): {words}")


def open_completions(
    address: str,
    timeout: float = TIMEOUT,
    say: Callable[[str], object] = lambda line: None,
) -> CompletionServer:
    """A server by its address; nothing is sent yet.

    Args:
        address: `http://host:port/v1`; behind a `#` may stand the model's name there.
        timeout: See `CompletionServer.timeout`.
        say: See `CompletionServer.say`.

    Raises:
        ProbeError: No such address, or a damaged key.
    """
    url, name = urldefrag(address)
    parts = check_address(url, f"answers are from {address!r}; give an address", KEY)
    key = os.environ.get(KEY, "").strip()
    own = urlsplit(os.environ.get(KEYS_HOST, "").strip() or _KEYS_OWN_HOST)
    if (own.scheme, own.hostname) != (parts.scheme, parts.hostname):
        key = ""
    check_key(key, KEY)
    return CompletionServer(url.rstrip("/"), unquote(name), key, timeout, say)


def _last(name: str) -> str:
    return name.rstrip("/").split("/")[-1]


@cache
def _certificates() -> "ssl.SSLContext":
    """Whom to trust; reading them takes longer than a small request."""
    import httpx

    return httpx.create_ssl_context()


def _complaint(found: object) -> str:
    """A server's words on a refusal; each kind of server has its own place for them."""
    while isinstance(found, dict | list):
        if isinstance(found, list):
            found = found[0] if found else None
        else:
            found = next((found[key] for key in _COMPLAINTS if key in found), "")
    return found if isinstance(found, str) else ""


def _completion(url: str, found: Mapping[str, object]) -> Completion:
    """A completion in an answer.

    Raises:
        ProbeError: There is none.
    """
    choices, usage = found.get("choices"), found.get("usage")
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise ProbeError(f"{url} answers, but not as OpenAI's API does: there is no completion")
    usage = usage if isinstance(usage, dict) else {}
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Completion(
        text,
        _token_ids(choice),
        choice.get("finish_reason") != "length",
        read if type(read) is int else None,
        written if type(written) is int else None,
    )


def _token_ids(choice: Mapping[str, object]) -> tuple[int, ...] | None:
    """The token ids of a completion, where a server puts them: vLLM in two ways, llama.cpp."""
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    tokens, content = logprobs.get("tokens"), logprobs.get("content")
    named = tokens if isinstance(tokens, list) else []
    listed = content if isinstance(content, list) else []
    places: tuple[Sequence[object] | object, ...] = (
        choice.get("token_ids"),
        [_number(name) for name in named],
        [entry.get("id") if isinstance(entry, dict) else None for entry in listed],
    )
    for ids in places:
        if isinstance(ids, list) and ids and all(type(number) is int for number in ids):
            return tuple(ids)
    return None


def _number(name: object) -> int | None:
    digits = name.removeprefix(_TOKEN) if isinstance(name, str) else ""
    return int(digits) if name != digits and digits.isdecimal() and len(digits) < 10 else None
