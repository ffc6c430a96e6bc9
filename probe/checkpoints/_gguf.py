"""GGUF files as references: turned back into an ordinary model folder, once.

What llama.cpp and its like run is one file with weights in few bits, config and tokenizer.
Attribution needs plain numbers, so they are dequantised to float32 and kept as a folder in the
cache (`PROBE_CACHE`, by default `probe` in the user's cache), where everything else reads them.

    >>> gguf_folder(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    PosixPath('~/.cache/probe/gguf/SmolLM2-135M-Instruct.Q4_1-6f0d6e6fd42b')
"""

import io
import re
import shutil
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from probe.checkpoints._file_digests import cache_folder, file_digests
from probe.errors import ProbeError, install, reason
from probe.files import at_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"

_BLOCK = re.compile(r"blk\.(\d{1,9})\.")


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
    folder = _place(file)
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise ProbeError(f"{file} is a GGUF file, which needs: {install('gguf')}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _convert(file, made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process was not first
                raise
    except ProbeError:
        raise
    except Exception as error:  # what a file of strangers holds may end in any
        raise ProbeError(f"cannot read the GGUF file {file}: {reason(error)}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write what a GGUF file holds as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it complains of is refused here
    try:
        _check_header(file)
        with redirect_stderr(io.StringIO()):  # its bar knows no switch
            found = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        packed, loaded = cast("tuple[PreTrainedModel, dict[str, set[str]]]", found)
        # transformers makes up what is missing, and says so in a log.
        if missing := sorted(loaded["missing_keys"]):
            raise ProbeError(
                f"the GGUF file {file} lacks {len(missing)} of its model's weights, the first is "
                f"{missing[0]}; get the file again"
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
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _check_header(file: Path) -> None:
    """Check that a file holds as many blocks and numbers as it says, before a model is built.

    Raises:
        ProbeError: It does not.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = GGUFReader(file)
    kind = reader.get_field("general.architecture")
    said = reader.get_field(f"{kind.contents()}.block_count") if kind else None
    found = [_BLOCK.match(tensor.name) for tensor in reader.tensors]
    blocks = max((int(block[1]) + 1 for block in found if block), default=0)
    if said is None or said.contents() != blocks:
        raise ProbeError(
            f"the GGUF file {file} says that it holds {said and said.contents()} blocks and holds "
            f"{blocks}; get the file again"
        )
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = sum(weight.numel() for weight in model.parameters())
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if needed > 2 * held:
        raise ProbeError(
            f"the GGUF file {file} is of a model of {needed:,} numbers and holds {held:,}; get the "
            "file again"
        )


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
