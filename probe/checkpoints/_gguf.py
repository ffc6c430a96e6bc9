"""GGUF files as references: turned back into an ordinary model folder, once.

What llama.cpp and its like run is one file with weights in few bits, config and tokenizer.
Attribution needs plain numbers, so they are dequantised to float32 and kept as a folder in the
cache (`PROBE_CACHE`, by default `probe` in the user's cache), where everything else reads them.

    >>> gguf_folder(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    PosixPath('~/.cache/probe/gguf/SmolLM2-135M-Instruct.Q4_1-6f0d6e6fd42b')
"""

import io
from collections import Counter
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from probe.checkpoints._file_digests import file_digests
from probe.checkpoints._made import CONFIG, cache_folder, made_folder
from probe.errors import ProbeError, install, reason
from probe.files import at_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"


def is_gguf(reference: str) -> bool:
    """Whether a reference names a GGUF file."""
    return reference.endswith(SUFFIX)


def gguf_remark(reference: str) -> str:
    """Say what is done with one."""
    file = at_home(reference)
    kinds = ", ".join(_kinds(file))
    return f"{reference}: GGUF ({kinds}), dequantised to float32 in {_place(file)}"


def gguf_folder(file: Path) -> Path:
    """A model folder with the weights of a GGUF file, made if it is not there yet.

    Raises:
        ProbeError: There is no such file, it cannot be read, or the package `gguf` is missing.
    """
    if not file.is_file():
        raise ProbeError(f"the GGUF file {str(file)!r} does not exist")
    place = _place(file)
    if find_spec("gguf") is None and not (place / CONFIG).is_file():
        raise ProbeError(f"{file} is a GGUF file, which needs: {install('gguf')}")
    try:
        return made_folder(place, lambda folder: _convert(file, folder))
    except ProbeError:
        raise
    except Exception as error:  # what a file of strangers holds may end in any
        raise ProbeError(f"cannot read the GGUF file {file}: {reason(error)}") from error


def _convert(file: Path, folder: Path) -> None:
    """Write what a GGUF file holds as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # its bar knows no switch
            packed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            plain = type(packed)(config)
        plain.load_state_dict(packed.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        ).save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _place(file: Path) -> Path:
    """Where its folder is: by name and content."""
    return cache_folder() / "gguf" / f"{file.stem}-{file_digests([file])[file][:12]}"


def _kinds(file: Path) -> list[str]:
    """The formats of its tensors, the one of most numbers first."""
    if find_spec("gguf") is None:  # it was there when the folder was made
        return ["packed numbers"]
    from gguf import GGUFReader

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return [name for name, _ in counts.most_common(2)]
