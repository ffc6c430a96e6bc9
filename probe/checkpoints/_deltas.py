"""Deltas: a checkpoint as what training changed in another one's weights, bit for bit.

A folder with `delta.json` and `delta.xz` stands for a whole model: the folder beside it that
`base` names, with other 16-bit weights. Those are counted in steps from one representable number to
the next, which are few where little was trained, and fewer in large weights than in small ones; so
the steps are sorted by the size of the base's weight before they are packed. Reading runs no code
of a stranger's: JSON, xz, and whole numbers that are added up and compared with a digest.

    >>> write_delta(Path("runs/sft"), Path("runs/grpo/checkpoint-9"), Path("runs/packed/9"))
    >>> find_checkpoint("runs/packed/9").folder
    PosixPath('~/.cache/probe/deltas/9-5d2c8a41b0f7')
"""

import json
import lzma
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from probe.checkpoints._made import CONFIG, cache_folder, made_folder
from probe.errors import ProbeError, reason
from probe.files import read_file

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

DELTA, _PACKED, _WEIGHTS = "delta.json", "delta.xz", "model.safetensors"
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""What is taken from the base as it is: its config and tokenizer."""


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta."""
    return (folder / DELTA).is_file()


def delta_folder(folder: Path) -> Path:
    """A model folder with the weights that a delta stands for, made if it is not there yet.

    Raises:
        ProbeError: It is damaged, or of another base than the one beside it.
    """
    text, base, digest = _read_note(folder)
    beside = _beside_weights(base)
    key = sha256(text)
    for path in beside:
        key.update(path.name.encode() + b"\0" + read_file(path))
    place = cache_folder() / "deltas" / f"{folder.name}-{key.hexdigest()[:12]}"

    def make(made: Path) -> None:
        from safetensors.torch import save_file

        save_file(_apply(folder, base, digest), made / _WEIGHTS, {"format": "pt"})
        for path in beside:
            shutil.copyfile(path, made / path.name)

    try:
        return made_folder(place, make)
    except OSError as error:
        raise ProbeError(f"cannot unpack the delta {folder}: {reason(error)}") from error


def write_delta(base: Path, folder: Path, target: Path) -> None:
    """Pack a model folder as its difference from another one.

    Args:
        base: The model that it was trained from, one safetensors file of 16-bit floats; the delta
            names it by its path from `target`.
        folder: The model, with the same tensors.
        target: The folder to be written.

    Raises:
        ProbeError: A folder has other weights than these, or not the same tensors.
    """
    old, new = _weights(base), _weights(folder)
    if _shapes(old) != _shapes(new):
        raise ProbeError(f"{folder} and {base} do not have the same tensors")
    before, after = _ordered(_bits(old)), _ordered(_bits(new))
    steps = after - before  # modulo 2 ** 16, so nothing is lost
    signless = ((steps << 1) ^ (steps >> 15)).view("<u2")[_by_size(before)]
    target.mkdir(parents=True, exist_ok=True)
    planes = signless.view("u1").reshape(-1, 2).T.tobytes()
    (target / _PACKED).write_bytes(lzma.compress(planes, preset=9))
    note = {
        "base": Path(os.path.relpath(base, target)).as_posix(),
        "sha256": sha256(_bits(new).tobytes()).hexdigest(),
    }
    (target / DELTA).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _read_note(folder: Path) -> tuple[bytes, Path, str]:
    """The text of a delta's note, the base that it names, and the digest of its weights."""
    path = folder / DELTA
    try:
        text = read_file(path)
        table = json.loads(text)
        base, digest = (folder / table["base"]).resolve(), str(table["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProbeError(f"cannot read {path}: {reason(error)}") from error
    if not (base / CONFIG).is_file():
        raise ProbeError(f"{path} is of the base {base}, which is not there")
    return text, base, digest


def _apply(folder: Path, base: Path, digest: str) -> dict[str, "torch.Tensor"]:
    """The tensors that a delta stands for.

    Raises:
        ProbeError: They are not those that were packed.
    """
    import numpy as np
    import torch

    old = _weights(base)
    before = _ordered(_bits(old))
    planes = np.frombuffer(_unpacked(folder / _PACKED, 2 * before.size), "u1")
    signless = np.empty_like(before, "<u2")
    signless[_by_size(before)] = planes.reshape(2, -1).T.copy().view("<u2")[:, 0]
    steps = (signless >> 1).view("<i2") ^ -(signless & 1).view("<i2")
    bits = _ordered(before + steps)
    if sha256(bits.tobytes()).hexdigest() != digest:
        raise ProbeError(f"{folder} is not a delta of the weights in {base}; fetch both again")
    tensors, begin = {}, 0
    for name, tensor in old.items():
        part = torch.from_numpy(bits[begin : begin + tensor.numel()].copy())
        tensors[name] = part.view(tensor.dtype).reshape(tensor.shape)
        begin += tensor.numel()
    return tensors


def _unpacked(path: Path, size: int) -> bytes:
    """What an xz file holds, if it is of this size; a larger one is not unpacked."""
    try:
        packed = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        found = packed.decompress(read_file(path), max_length=size + 1)
    except (OSError, lzma.LZMAError) as error:
        raise ProbeError(f"cannot read {path}: {reason(error)}") from error
    if len(found) != size:
        raise ProbeError(f"{path} is not of as many weights as its base has; fetch both again")
    return found


def _weights(folder: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a model folder, by their names in order.

    Raises:
        ProbeError: They are not one safetensors file of 16-bit floats.
    """
    import torch

    from probe.checkpoints._tensor_files import open_tensors

    path = folder / _WEIGHTS
    if not path.is_file():
        raise ProbeError(f"{folder} holds no {_WEIGHTS}, which a delta is of")
    with open_tensors([path]) as opened:
        tensors = {name: opened[name][...] for name in sorted(opened)}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            raise ProbeError(f"{path}: {name} is {tensor.dtype}; a delta is of 16-bit floats")
    return tensors


def _shapes(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _bits(tensors: Mapping[str, "torch.Tensor"]) -> "NDArray[np.int16]":
    """The bits of all numbers, one after the other."""
    import numpy as np
    import torch

    parts = [tensor.contiguous().view(torch.int16).numpy().ravel() for tensor in tensors.values()]
    return np.concatenate(parts).astype("<i2")


def _ordered(bits: "NDArray[np.int16]") -> "NDArray[np.int16]":
    """Bits as whole numbers in the order of the floats that they are; the same takes them back."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def _by_size(ordered: "NDArray[np.int16]") -> "NDArray[np.intp]":
    """The places of numbers by how large they are, to a factor of two or less."""
    return ((_ordered(ordered) >> 8) & 0x7F).argsort(kind="stable")


def _beside_weights(folder: Path) -> list[Path]:
    """The small files of a model folder."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _TEXTS)
