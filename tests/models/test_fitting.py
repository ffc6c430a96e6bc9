"""Weights that are not the model's, in every way in which people have them on their disks."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MODELS, save_small_model

import probe
from probe.checkpoints import find_not_finite, read_headers, weight_files
from probe.errors import ProbeError
from probe.models import _fitting as fitting
from probe.models import read_config

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"


def check_weights(reference):
    """What is said of the weights, with the config that is beside them."""
    return fitting.check_weights(reference, read_config(reference))


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SFT, tmp_path / "model"))


def state_of(folder):
    return load_file(folder / "model.safetensors")


def save(folder, state):
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, message):
    """The check without numbers and the loading itself end in the same line."""
    found = []
    for use in (check_weights, probe.load_model):
        with pytest.raises(ProbeError, match=message) as caught:
            use(str(folder))
        assert "\n" not in str(caught.value)
        found.append(str(caught.value))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_fits_itself_and_misses_what_is_taken_away(tmp_path, name):
    folder = save_small_model(tmp_path / "m", name)
    assert check_weights(str(folder)) == ()
    whole = state_of(folder)
    norm = next(key for key in whole if "norm" in key or "ln_f" in key or name == "olmo")
    end = norm.partition(".")[2]  # a file may call the decoder something else
    for state, message in (
        ({k: v for k, v in whole.items() if k != norm}, rf"1 tensor \(.*{end}\) .* is not there"),
        (whole | {"extra.weight": torch.ones(2)}, r"\(extra.weight\) is in no place"),
        (whole | {norm: whole[norm][:-1]}, "is of another shape"),
    ):
        save(folder, state)
        refused(folder, message)


def without(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), r"model.norm.weight\) that the model needs is not there"),
        (without("model.layers.2.mlp.down_proj.weight"), "layers.2.mlp.down_proj.weight"),
        (without("model.embed_tokens.weight"), "embed_tokens.weight"),
        (
            lambda s: {k: v for k, v in s.items() if "layers.3." not in k},
            r"9 tensors \(.* and 6 more\) that the model needs are not there",
        ),
        (
            lambda s: s | {"model.layers.0.self_attn.q_proj.bias": torch.ones(160)},
            "layers.0.self_attn.q_proj.bias.* is in no place",
        ),
        (lambda s: s | {"lm_head.bias": torch.ones(18)}, "lm_head.bias"),
        (lambda s: s | {"model.layers.4.mlp.up_proj.weight": torch.ones(2, 2)}, "layers.4"),
        (lambda s: s | {"score.weight": torch.ones(1, 160)}, "reward model or classifier"),
        (lambda s: s | {"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}, "look quantised"),
        (lambda s: {"base_model.model." + k: v for k, v in s.items()}, "from PEFT"),
        (lambda s: {"module." + k: v for k, v in s.items()}, "from DistributedDataParallel"),
        (lambda s: {"_orig_mod." + k: v for k, v in s.items()}, "from torch.compile"),
        (lambda s: {"pretrained_model." + k: v for k, v in s.items()}, "from TRL's value head"),
        (lambda s: {"_fsdp_wrapped_module." + k: v for k, v in s.items()}, "from FSDP"),
        (lambda s: {k.upper(): v for k, v in s.items()}, "are not there; "),
        (lambda s: {k: v[:0] if n % 2 else v for n, (k, v) in enumerate(s.items())}, "ZeRO-3"),
        (
            lambda s: {
                k: torch.cat([v, torch.zeros(2, 160)]) if "embed" in k else v for k, v in s.items()
            },
            r"\[20, 160\] instead of \[18, 160\]\); the vocabulary was resized: set vocab_size to",
        ),
        (lambda s: {k: v.T if "down_proj" in k else v for k, v in s.items()}, "another shape"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    save(folder, change(state_of(folder)))
    refused(folder, message)


def test_a_config_of_another_size(folder):
    configure(folder, num_hidden_layers=3)
    refused(folder, r"9 tensors \(model.layers.3")
    configure(folder, num_hidden_layers=5)
    refused(folder, "that the model needs are not there")


def test_an_untied_head_is_needed_and_a_tied_one_is_not(tmp_path):
    folder = save_small_model(tmp_path / "m", "llama", tie_word_embeddings=False)
    save(folder, without("lm_head.weight")(state_of(folder)))
    refused(folder, r"lm_head.weight\) that the model needs")
    configure(folder, tie_word_embeddings=True)
    module = probe.load_model(str(folder)).network._module
    assert torch.equal(module.lm_head.weight, module.model.embed_tokens.weight)


def test_what_is_harmless_is_allowed_by_name(folder, tmp_path):
    truth = probe.load_model(str(folder)).network._module.state_dict()
    save(
        folder,
        state_of(folder)
        | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(20) for n in range(4)}
        | {"v_head.summary.weight": torch.ones(1, 160), "v_head.summary.bias": torch.ones(1)},
    )
    assert check_weights(str(folder)) == (f"{folder}: the value head of PPO training is left out",)
    found = probe.load_model(str(folder)).network._module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    for name, extra in (
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
    ):
        old = save_small_model(tmp_path / name, name)
        save(old, state_of(old) | extra)
        assert check_weights(str(old)) == ()


def test_a_bare_decoder_without_its_prefix_is_the_same_model(tmp_path):
    folder = save_small_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    truth = probe.load_model(str(folder)).network._module.state_dict()
    save(folder, {k.removeprefix("model."): v for k, v in state_of(folder).items()})
    found = probe.load_model(str(folder)).network._module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_that_is_missing(tmp_path, name):
    folder = save_small_model(tmp_path / "m", name)
    state = state_of(folder)
    gone = next(key for key in state if "experts.2." in key)
    save(folder, without(gone)(state))
    refused(folder, "another shape|cannot be joined")


HTML = b"\n<!DOCTYPE html><html>Log in</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer, not the weights; run `git lfs pull`"),
        (HTML, "is a web page"),
        (b"", "is empty"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"\x00\x01\x02" * 50, "damaged or cut short"),
    ],
)
def test_files_that_hold_no_weights(folder, file, content, message):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    refused(folder, f"{file} .*{message}|{file}: .*{message}")


def torch_file(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_files_that_are_cut_short(folder, kept):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name.endswith("bin"):
            shutil.copy(SFT / "model.safetensors", folder)
            torch_file(folder, state_of(folder))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(kept * len(content))])
        refused(folder, f"{name}: damaged or cut short")


def test_torch_files_are_read_and_their_code_is_not(folder):
    truth = probe.load_model(str(folder)).network._module.state_dict()
    state = state_of(folder)
    torch_file(folder, state)
    assert {k: v.shape for k, v in read_headers(weight_files(str(folder))).items()} == {
        k: v.shape for k, v in state.items()
    }
    found = probe.load_model(str(folder)).network._module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = probe.load_model(str(folder)).network._module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    torch.save(without("model.norm.weight")(state), folder / "pytorch_model.bin")
    refused(folder, "model.norm.weight")

    class Evil:
        def __reduce__(self):
            return Path.write_text, (folder / "evil", "here")

    torch.save(state | {"x": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "holds Python objects beside tensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    refused(folder, "pytorch_model.bin")
    assert not (folder / "evil").exists()
    torch.save([1, 2, 3], folder / "pytorch_model.bin")
    refused(folder, "does not hold tensors by name")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(folder, "damaged or cut short")


def test_shards(folder):
    state = state_of(folder)
    names = list(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({k: state[k] for k in part}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {k: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, k in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert check_weights(str(folder)) == ()
    gone = folder / "model-00002-of-00002.safetensors"
    content = gone.read_bytes()
    gone.unlink()
    refused(folder, "lacks the weight file model-00002-of-00002.safetensors")
    index.unlink()
    refused(folder, "lacks the weight file model-00002-of-00002.safetensors")
    gone.write_bytes(content)
    assert check_weights(str(folder)) == ()
    gone.write_bytes(LFS)
    refused(folder, "model-00002-of-00002.safetensors is a Git LFS pointer")


def test_an_index_of_strangers(folder, tmp_path):
    """What it names lies beside it, whatever it says; and it may be nonsense of any kind."""
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(folder, "names a file that is not beside it: ")
    for nonsense in (
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": []}}',
        "[" * 100_000,
        "9" * 5000,
    ):
        index.write_text(nonsense)
        refused(folder, "not an index of weight files")
    index.unlink()
    (folder / "model-1-of-99999999999999.safetensors").touch()
    refused(folder, "is empty; fetch it again")


@pytest.mark.parametrize("file", ["generation_config.json", "adapter_config.json"])
def test_json_that_is_nested_deeply(folder, file):
    (folder / file).write_text("[" * 100_000)
    if file == "adapter_config.json":
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    with pytest.raises(ProbeError, match=file.split("_")[0]):
        probe.load_model(str(folder))


def test_a_config_that_no_model_can_be_built_of(folder):
    configure(folder, pad_token_id=10**6)
    refused(folder, "cannot read the weights of .*[Pp]adding_idx")


def test_numbers_that_are_none(folder):
    assert find_not_finite(weight_files(str(folder))) is None
    state = state_of(folder)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = state["model.layers.1.mlp.up_proj.weight"].clone()
        broken[3, 5] = value
        save(folder, state | {"model.layers.1.mlp.up_proj.weight": broken})
        assert find_not_finite(weight_files(str(folder))).startswith(
            "model.layers.1.mlp.up_proj.weight in "
        )
        with pytest.raises(ProbeError, match=r"layers.1.mlp.up_proj.weight.* NaN or infinite"):
            probe.load_model(str(folder))


def test_numbers_that_a_short_dtype_cannot_hold(folder):
    state = {name: tensor.float() for name, tensor in state_of(folder).items()}
    state["model.norm.weight"][0] = 1e6
    save(folder, state)
    probe.load_model(str(folder), dtype="bfloat16")
    with pytest.raises(ProbeError, match="model.norm.weight.*float16"):
        probe.load_model(str(folder), dtype="float16")


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "aqlm", "hqq", "quanto", "torchao", "eetq", "new"]
)
def test_quantised_weights_that_cannot_be_undone(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    refused(folder, f"is quantised by {method}, which cannot be turned back")
    configure(folder, quantization_config={"load_in_4bit": True})
    refused(folder, "is quantised by bitsandbytes")


def test_fp8_becomes_plain_weights(folder):
    """Weights in 8 bits with a scale for each block of 128 x 128."""
    truth = probe.load_model(str(folder)).network._module.state_dict()
    state = {}
    for name, tensor in state_of(folder).items():
        if tensor.ndim < 2 or "embed" in name or "head" in name:
            state[name] = tensor
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scale = torch.full((rows, columns), tensor.abs().max().float().item() / 448)
        state[name] = (tensor.float() / scale[0, 0]).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
    save(folder, state)
    configure(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
    )
    assert check_weights(str(folder)) == ()
    found = probe.load_model(str(folder)).network._module
    for name, tensor in found.state_dict().items():
        error = (tensor - truth[name]).norm() / truth[name].norm()
        assert error < 0.05, name
    assert not any("scale" in name for name in found.state_dict())
    save(folder, without("model.layers.0.mlp.up_proj.weight")(state))
    refused(folder, "layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no weights \(model.safetensors or pytorch_model.bin\)"),
        (["model_world_size_2_rank_0.pt"], "verl.model_merger merge --backend fsdp --local_dir"),
        (["dist_ckpt/common.pt"], "verl.model_merger merge --backend megatron"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "accelerate merge-weights"),
        (["global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "python zero_to_fp32.py"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        (["__0_0.distcp", ".metadata"], "dcp_to_torch"),
        (["iter_0000100/mp_rank_00/model_optim_rng.pt"], "Megatron"),
        (["model-q4_k_m.gguf"], "GGUF files only"),
        (["consolidated.00.pth"], "their maker's own format"),
        (["lit_model.pth"], "litgpt convert_from_litgpt"),
        (["tf_model.h5"], "another library"),
        (["last.ckpt"], "a training script"),
    ],
)
def test_folders_without_weights(folder, files, message):
    (folder / "model.safetensors").unlink()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x")
    refused(folder, message)


def test_the_folder_of_verl_beside_its_shards(folder):
    inner = folder / "actor" / "huggingface"
    inner.parent.mkdir()
    shutil.copytree(SFT, inner)
    (inner / "model.safetensors").unlink()
    (inner.parent / "model_world_size_8_rank_0.pt").write_text("x")
    refused(inner, f"shards of verl .FSDP. in {inner.parent}; run: .*--local_dir {inner.parent} ")
    refused(inner.parent, "holds no config.json .*verl")


def test_a_checkpoint_further_in_is_named(tmp_path):
    for number in (100, 1000):
        shutil.copytree(SFT, tmp_path / f"checkpoint-{number}")
    refused(tmp_path, f"give {tmp_path / 'checkpoint-1000'}")
