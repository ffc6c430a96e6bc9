"""What a folder holds that has no weights to read: said in one line, with what turns it into some.

Training frameworks keep checkpoints of their own beside, or instead of, those that transformers
reads. Each is recognised by the names of its files, in one table.

    >>> no_weights(Path("global_step_100/actor"))
    'global_step_100/actor holds no weights, but shards of verl (FSDP); ...'
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Foreign(NamedTuple):
    """A format that transformers does not read."""

    files: tuple[str, ...]
    """Patterns of names; one that is found is enough."""

    what: str
    """What such files are."""

    export: str
    """What makes a model folder of them; `{folder}` is where they lie."""


FORMATS = (
    Foreign(
        ("model_world_size_*_rank_*.pt",),
        "shards of verl (FSDP)",
        "run: python -m verl.model_merger merge --backend fsdp --local_dir {folder} "
        "--target_dir OUT",
    ),
    Foreign(
        ("dist_ckpt/*",),
        "a distributed checkpoint of Megatron, as verl writes it",
        "run: python -m verl.model_merger merge --backend megatron --local_dir {folder} "
        "--target_dir OUT",
    ),
    Foreign(
        ("pytorch_model_fsdp*/*", "pytorch_model_fsdp*.bin", "*_fsdp_*/*.distcp"),
        "shards of FSDP, as accelerate writes them",
        "run: accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT",
    ),
    Foreign(
        (
            "zero_to_fp32.py",
            "*_optim_states.pt",
            "mp_rank_*_model_states.pt",
            "global_step*/*_states.pt",
        ),
        "a checkpoint of DeepSpeed",
        "run: python zero_to_fp32.py {folder} OUT --safe_serialization",
    ),
    Foreign(
        ("*.distcp", ".metadata"),
        "a distributed checkpoint of torch (FSDP)",
        "run: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt, "
        "and save its tensors by save_pretrained",
    ),
    Foreign(
        (
            "latest_checkpointed_iteration.txt",
            "iter_*/*",
            "mp_rank_*/model_optim_rng.pt",
            "model_optim_rng.pt",
            "metadata.json",
        ),
        "a checkpoint of Megatron-LM",
        "export it by Megatron Bridge (AutoBridge.export_ckpt) or Megatron's "
        "tools/checkpoint/convert.py",
    ),
    Foreign(
        ("*.nemo", "model_weights/*", "weights/*.distcp"),
        "a checkpoint of NeMo",
        "export it by nemo.collections.llm.export_ckpt(path, target='hf')",
    ),
    Foreign(
        ("*.gguf",),
        "GGUF files only",
        "give one of them, as {folder}/NAME.gguf, or better the model that they were made from",
    ),
    Foreign(
        ("consolidated*.pth", "consolidated*.safetensors"),
        "weights in their maker's own format",
        "take the transformers version of the model, or run the convert_..._weights_to_hf script "
        "of its architecture in transformers",
    ),
    Foreign(
        ("lit_model*.pth",),
        "a checkpoint of LitGPT",
        "run: litgpt convert_from_litgpt {folder} OUT",
    ),
    Foreign(
        ("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "onnx/*"),
        "weights of another library (TensorFlow, Flax or ONNX)",
        "save the model again from PyTorch",
    ),
    Foreign(
        ("*.ckpt", "*.pt", "*.pth"),
        "a checkpoint of a training script",
        "save the model by save_pretrained",
    ),
)
"""Every format that is recognised, the more telling names first."""


def no_weights(folder: Path, adapter: bool = False) -> str:
    """Say what lies in a folder where its weights should be.

    Args:
        folder: The folder.
        adapter: Whether it is that of an adapter.
    """
    missing = missing_shards(folder)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return (
            f"{folder} lacks the weight file {missing[0]}{more}, which its index names; fetch it "
            "again"
        )
    usual = "adapter_model.safetensors" if adapter else "model.safetensors"
    return f"{folder} holds no weights{_instead(folder) or f' ({usual} or pytorch_model.bin)'}"


def no_model(folder: Path) -> str:
    """Say what lies in a folder that has no config."""
    return (
        f"{folder} holds no config.json and no adapter_config.json, so it is not a model folder"
        f"{_instead(folder).replace(', but', '; it holds')}"
    )


def missing_shards(folder: Path) -> list[str]:
    """The weight files that an index names, or the numbers in their names, and that are not there.

    An index that cannot be read names none.
    """
    missing: set[str] = set()
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        missing |= {str(name) for name in names if not (folder / str(name)).is_file()}
    for file in folder.iterdir():
        numbered = re.fullmatch(r"(.*-)(\d+)(-of-)(\d{1,5})(\.safetensors|\.bin)", file.name)
        if numbered:
            start, width, of, count, end = numbered.groups()
            names = {f"{start}{n:0{len(width)}}{of}{count}{end}" for n in range(1, int(count) + 1)}
            missing |= {name for name in names if not (folder / name).is_file()}
    return sorted(missing)


def _instead(folder: Path) -> str:
    """What is there instead of weights, and what to do about it; empty where nothing is known."""
    for inner in _folders(folder):
        if (inner / "config.json").is_file() and any(
            next(inner.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")
        ):
            return f", but the folder {inner.name} in it does; give {inner}"
    # verl keeps config and tokenizer in a folder `huggingface` beside the shards.
    for place in (folder, folder.parent) if folder.name == "huggingface" else (folder,):
        for format in FORMATS:
            if any(next(place.glob(pattern), None) for pattern in format.files):
                where = "" if place == folder else f" in {place}"
                return f", but {format.what}{where}; {format.export.format(folder=place)}"
    return ""


def _folders(folder: Path) -> Iterable[Path]:
    """The folders in a folder, the latest checkpoint first."""

    def number(path: Path) -> int:
        return int((re.findall(r"\d+", path.name) or ["0"])[-1])

    return sorted((path for path in folder.iterdir() if path.is_dir()), key=number, reverse=True)
