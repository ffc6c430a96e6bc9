"""Inputs: all that a model brings to a run, file by file, so that a change of it is noticed.

>>> model_inputs("probe:tiny-math/sft")["tokenizer.json"]
'8f5b...'
"""

from pathlib import Path

from probe.checkpoints._file_digests import digest_entries, file_digests, unread_bytes
from probe.checkpoints._gguf import is_gguf
from probe.checkpoints._references import ADAPTER_WEIGHTS, WEIGHTS, find_checkpoint, weights_in
from probe.files import at_home

_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
)
"""What counts beside weights: what is computed, how an answer ends, what a text's tokens are."""


def model_inputs(reference: str) -> dict[str, str]:
    """A digest of every file that a model's numbers depend on, as far as they are here.

    Each file counts whole. Those of an adapter's base are named `base/FILE`; of a GGUF file it is
    the one.
    """
    files = _files(reference)
    digests = file_digests(files.values())
    return {name: digests[path] for name, path in files.items()}


def input_entries(reference: str) -> dict[str, list[object]]:
    """What is kept of these files, once they are read; `keep_entries` takes it elsewhere."""
    return digest_entries(_files(reference).values())


def unread_inputs(reference: str) -> int:
    """How many bytes of these files have not been read before."""
    return unread_bytes(_files(reference).values())


def _files(reference: str) -> dict[str, Path]:
    """The files by their names."""
    if is_gguf(reference):
        file = at_home(reference)
        return {file.name: file} if file.is_file() else {}
    found = find_checkpoint(reference)
    if found is None:
        return {}
    if found.adapter is None:
        return _in_folder(found.folder, WEIGHTS)
    base = _in_folder(found.folder, WEIGHTS)
    return {
        **{f"base/{name}": path for name, path in base.items()},
        **_in_folder(found.adapter, ADAPTER_WEIGHTS),
    }


def _in_folder(folder: Path, weights: tuple[str, str]) -> dict[str, Path]:
    small = (path for pattern in _FILES for path in folder.glob(pattern) if path.is_file())
    found = {*small, *weights_in(folder, weights)}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}
