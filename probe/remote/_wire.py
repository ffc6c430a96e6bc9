"""The wire to an NDIF server: what its answers mean, read as plain data.

A response is a status, and a result is tensors; what could run code here is not read. The server's
refusals and failures become one clear line each: a `ProbeError` where a user can do something, a
`PassingError` where it is worth trying again.

    >>> refusal("http://localhost:8001", "", 503, "starting")
    PassingError('it answers 503 (starting)')
"""

import io
import pickle
from typing import TYPE_CHECKING

from probe.errors import ProbeError, reason
from probe.escaping import printable
from probe.remote._limits import TooLargeError, archive, check_tensors, unpack
from probe.vocabulary import KEY_VARIABLE

if TYPE_CHECKING:
    import torch
    from nnsight.schema.response import ResponseModel

# How many letters of a server's words are repeated.
_WORDS = 20_000

GO_ON = "; nothing is lost, the same command goes on from here"


class IncompleteError(ProbeError):
    """A server says that a request lacks something."""


class PassingError(Exception):
    """A fault of the server or of the way to it that may be gone in a while."""


def refusal(url: str, key: str, status: int, detail: str) -> Exception:
    """What a status that is no success means.

    Args:
        url: The server.
        key: The key that was sent; it is not repeated.
        status: Of HTTP.
        detail: The server's words.
    """
    if status in (401, 403) or (status == 400 and "API key" in detail):
        if not key:
            return ProbeError(f"{url} asks for a key; set {KEY_VARIABLE}")
        return ProbeError(f"{url} does not take the key in {KEY_VARIABLE}")
    if status == 422:
        return IncompleteError(f"{url} refuses (422): {detail}")
    if status >= 500 or status in (408, 429):
        return PassingError(f"it answers {status} ({detail})")
    if status == 404:
        return ProbeError(f"{url} answers, but it is no NDIF server (404)")
    return ProbeError(f"{url} refuses ({status}): {detail}")


def failure(url: str, text: str) -> Exception:
    """What a server's words on a failed job mean.

    Args:
        url: The server.
        text: Its words.
    """
    lines = text.strip().splitlines() or ["it does not say why"]
    last = lines[-1]
    smaller = "take smaller batches (solutions.batch_size, attribution.batch_size)"
    if text.startswith("Could not deploy"):  # its reason may be a whole traceback
        return ProbeError(f"{url}: {lines[0]}")
    if "try again later" in text and "cancelled" not in text:
        return PassingError(last.partition(" Please try again later")[0])
    if "exceeded the execution timeout" in text:
        return ProbeError(f"{url}: {last} {smaller}{GO_ON}")
    if "OutOfMemoryError" in text or "out of memory" in text:
        import torch

        return torch.OutOfMemoryError(f"{url}: a job ran out of memory there; {smaller}")
    if "EndpointConnectionError" in text or "object store" in text.lower():
        return ProbeError(
            f"{url}: what a job saved is more than the server can send without an object "
            f"store; {smaller}{GO_ON}"
        )
    if "Traceback" in text:
        return RuntimeError(f"{url}: a job failed there:\n{printable(text[-_WORDS:])}")
    return ProbeError(f"{url}: {last}")


def read_saved(url: str, data: bytes) -> "dict[str, torch.Tensor]":
    """What a job saved, from what the server sends.

    Args:
        url: The server, for complaints.
        data: Compressed; below that, a file of torch.

    Raises:
        ProbeError: It holds more than plain tensors, or more of them than it may.
    """
    import torch

    try:
        plain = unpack(data)
        archive(plain).close()
    except TooLargeError as error:
        raise too_large(url, error) from None
    except Exception as error:  # damaged archives raise nearly anything
        raise ProbeError(f"{url} sends a result that cannot be unpacked: {reason(error)}") from None
    try:
        saved: dict[str, torch.Tensor] = torch.load(
            io.BytesIO(plain), map_location="cpu", weights_only=True
        )
        check_tensors(saved)
    except TooLargeError as error:
        raise too_large(url, error) from None
    except pickle.UnpicklingError:
        raise ProbeError(f"{url} sends more than plain tensors; it is not read") from None
    except Exception as error:  # bytes that are no pickle raise nearly anything
        raise ProbeError(f"{url} sends no tensors: {reason(error)}") from error
    return saved


def too_large(url: str, error: TooLargeError) -> ProbeError:
    """The complaint about a server that sends more than it may."""
    return ProbeError(
        f"{url} sends {error}; if it is yours to trust, take smaller batches "
        "(solutions.batch_size, attribution.batch_size)"
    )


class _PlainUnpickler(pickle._Unpickler):
    """Takes plain values and the status of a response, and nothing that could run.

    Python's own: for a few bytes, the one in C makes room for billions of values to remember.
    """

    def find_class(self, module: str, name: str) -> object:
        from nnsight.schema.response import Status

        if (module, name) == (Status.__module__, Status.__name__):
            return Status
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_response(message: str | bytes) -> "ResponseModel":
    """A status as it comes over the websocket: text, or torch's archive with the result in it."""
    from nnsight.schema.response import ResponseModel

    if isinstance(message, str):
        return ResponseModel.model_validate_json(message)
    try:
        with archive(message) as file:
            name = next(name for name in file.namelist() if name.endswith("data.pkl"))
            table = _PlainUnpickler(io.BytesIO(file.read(name))).load()
        return ResponseModel(**table)
    except TooLargeError:
        raise
    except Exception as error:  # bytes that are no pickle raise nearly anything
        raise ValueError("not a response") from error


def connection_reason(error: BaseException) -> str:
    """The inmost cause of a failed connection, in words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return reason(error)
