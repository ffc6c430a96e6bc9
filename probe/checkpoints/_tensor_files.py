"""Weight files: the names, shapes and types of their tensors, and the tensors themselves.

Files in two formats are read, safetensors and torch's `.bin`; of the second only tensors, never the
code that a pickle may hold. A file that is something else is refused in one line that says what.

    >>> headers = read_headers(weight_files("probe:tiny-math/sft"))
    >>> headers["model.norm.weight"].shape, headers["model.norm.weight"].device.type
    (torch.Size([160]), 'meta')
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from probe.errors import ProbeError, reason

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of a safetensors file. Others (8-bit scales, say) stand as bytes of their size."""


def read_headers(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Read what tensors weight files hold, without their numbers.

    Returns:
        A tensor without numbers (on the device `meta`) by its name.

    Raises:
        ProbeError: A file cannot be read, or two of them hold the same tensor.
    """
    headers: dict[str, torch.Tensor] = {}
    for file in files:
        found = _safe_header(file) if file.suffix == ".safetensors" else _torch_load(file, "meta")
        twice = sorted(headers.keys() & found.keys())
        if twice:
            raise ProbeError(f"{file}: {twice[0]} is in another weight file too; remove one")
        headers |= found
    return headers


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[dict[str, torch.Tensor]]:
    """Open weight files: each tensor by its name, read from the disk when it is used.

    Those of safetensors are slices, which become tensors by `[...]`.

    Raises:
        ProbeError: A file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for file in files:
            if file.suffix == ".safetensors":
                opened = stack.enter_context(_reading(file, safe_open, framework="pt"))
                tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            else:
                tensors |= _torch_load(file, "cpu")
        yield tensors


def find_not_finite(files: Sequence[Path]) -> str | None:
    """Look through all numbers of weight files for one that is NaN or infinite.

    Returns:
        The first such tensor and its file, in words; None where all numbers are finite.

    Raises:
        ProbeError: A file cannot be read.
    """
    for file in files:
        with open_tensors([file]) as tensors:
            for name, tensor in tensors.items():
                if not is_finite(tensor[...]):
                    return f"{name} in {file}"
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, in one pass and without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # 8-bit floats have few operations
        tensor = tensor.to(torch.bfloat16)
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _safe_header(file: Path) -> dict[str, torch.Tensor]:
    with _reading(file, safe_open, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: torch.empty(
                part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta"
            )
            for name, part in slices.items()
        }


def _reading(file: Path, read: Callable[..., "safe_open"], **options: str) -> "safe_open":
    try:
        return read(file, **options)
    except (SafetensorError, OSError, ValueError) as error:
        raise ProbeError(_unreadable(file, error)) from error


def _torch_load(file: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file; nothing else in it is let in."""
    try:
        # Files of torch before 1.6 are no archives, and cannot stay on the disk.
        found = torch.load(
            file,
            map_location=device,
            weights_only=True,
            mmap=device == "cpu" and zipfile.is_zipfile(file),
        )
    except Exception as error:  # damaged pickles raise nearly anything
        raise ProbeError(_unreadable(file, error)) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
        raise ProbeError(f"{file} does not hold tensors by name, so it is no weight file")
    return found


def _unreadable(file: Path, error: Exception) -> str:
    """Say what a file is that is no weight file."""
    try:
        with file.open("rb") as opened:
            start = opened.read(512).lstrip()
    except OSError as closed:
        return f"cannot read the weights {file}: {closed.strerror or closed}"
    lower = start[:200].lower()
    if not start:
        return f"{file} is empty; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
    if lower.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{file} is a web page, not weights; the download went wrong, fetch it again"
    if start[:1] in b"{[" and _is_json(file):
        return f"{file} is JSON text, not weights; fetch it again"
    text = str(error)
    if re.search(r"Unsupported (global|class)|not an allowed global|Can only build", text):
        return (
            f"{file} holds Python objects beside tensors, which could run any code and are not "
            "loaded; save the model again as safetensors"
        )
    return f"cannot read the weights {file}: damaged or cut short ({reason(error)}); fetch it again"


def _is_json(file: Path) -> bool:
    if file.stat().st_size > 2**20:
        return False
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
