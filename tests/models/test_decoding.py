"""Greedy is greedy, whatever a model's own settings say, and answers end where any file says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import probe
from probe.models import (
    NOT_DECODING,
    encode_prompt,
    end_tokens,
    greedy,
    left_out,
    over,
    own,
    read_settings,
)
from probe.solutions import generate

GRPO = Path(probe.__file__).parent / "data" / "tiny-math" / "grpo"
QUESTIONS = ("50-7-67-53=?", "3+4=?", "12+30-4=?", "91-13-2=?")
LENGTH = 64

NASTY = {
    "do_sample": True, "temperature": 5.0, "top_k": 2, "top_p": 0.5, "min_p": 0.2, "top_h": 0.5,
    "typical_p": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "min_new_tokens": 50, "min_length": 60, "max_length": 15, "max_new_tokens": 3, "max_time": 1e-6,
    "num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 1.0, "length_penalty": -5.0,
    "early_stopping": True, "num_return_sequences": 2, "suppress_tokens": [5, 6, 7, 16],
    "begin_suppress_tokens": [3, 4, 5, 6, 7, 8], "bad_words_ids": [[16], [5]],
    "forced_bos_token_id": 4, "forced_eos_token_id": 1, "stop_strings": ["="],
    "sequence_bias": [[[16], -50.0]], "guidance_scale": 3.0, "renormalize_logits": True,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 5.0],
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}, "token_healing": True,
    "penalty_alpha": 0.6, "dola_layers": "low", "constraints": [1], "force_words_ids": [[4]],
    "use_cache": False, "cache_implementation": "static", "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    "output_attentions": True, "output_hidden_states": True, "low_memory": True,
    "prefill_chunk_size": 2, "assistant_early_exit": 1, "is_assistant": True,
    "disable_compile": True, "max_matching_ngram_size": 2,
    "assistant_ensemble_weight": 0.5, "decoder_start_token_id": 5,
}  # fmt: skip
"""A value for each setting that would change an answer, or how it is made."""

ALL = sorted(
    name
    for name in vars(GenerationConfig())
    if not name.startswith("_")
    and name not in ("transformers_version", "eos_token_id", "pad_token_id", "bos_token_id")
)


def with_settings(folder, **settings):
    shutil.copytree(GRPO, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


def answers(model, **options):
    prompts = [encode_prompt(model.tokenizer, "{question}", text) for text in QUESTIONS]
    found = {}
    for finished in generate(model, prompts, [LENGTH] * len(prompts), **options):
        found |= {answer.place: answer.tokens for answer in finished}
    return [found[place] for place in range(len(prompts))]


@pytest.fixture(scope="module")
def plain():
    return answers(probe.load_model(str(GRPO)))


def test_every_setting_of_this_transformers_has_a_neutral_value():
    wanted = greedy([1], 0, LENGTH)
    assert set(ALL) <= set(wanted)
    for name in ALL:
        assert wanted[name] in (None, False, 0, 0.0, 1, 1.0, True, LENGTH, "constant", 0.4, 10), (
            name
        )


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_all_settings_at_once_change_nothing(tmp_path, plain, engine):
    model = probe.load_model(with_settings(tmp_path / "m", **NASTY))
    assert answers(model, engine=engine) == plain


def test_no_setting_leaks_where_a_model_brings_its_own(plain):
    """As on a server: what is None in a request is filled in from the model's settings."""
    model = probe.load_model(str(GRPO))
    module = model.network._module
    prompt = torch.tensor([encode_prompt(model.tokenizer, "{question}", QUESTIONS[0])])
    wanted = greedy([1], 0, LENGTH)
    # transformers takes no number for the last ones
    for name in sorted({*ALL} - {"continuous_batching_config", "compile_config", "cache_config"}):
        module.generation_config = GenerationConfig()
        setattr(module.generation_config, name, NASTY.get(name, 3))
        beside = over({name: NASTY.get(name, 3)}, wanted)
        found = module.generate(prompt, generation_config=GenerationConfig(**wanted), **beside)
        assert found[0, prompt.shape[1] :].tolist() == plain[0], name


def test_what_is_left_out_is_known(tmp_path):
    settings = read_settings(Path(with_settings(tmp_path / "m", **NASTY)))
    out = left_out(settings)
    assert out["repetition_penalty"] == 1.5
    assert out["do_sample"] is True
    assert not set(out) & {*NOT_DECODING, "eos_token_id"}
    idle = Path(with_settings(tmp_path / "n", repetition_penalty=1.0, num_beams=1, do_sample=False))
    assert left_out(read_settings(idle)) == {}


def test_the_models_own_settings_on_request(tmp_path, plain):
    model = probe.load_model(with_settings(tmp_path / "m", suppress_tokens=[16], num_beams=2))
    found = answers(model, decoding="model")
    assert found != plain
    assert not any(16 in tokens for tokens in found)
    drawn = probe.load_model(with_settings(tmp_path / "n", do_sample=True, temperature=3.0))
    first = answers(drawn, decoding="model", seed=1)
    state = torch.random.get_rng_state()
    assert answers(drawn, decoding="model", seed=1) == first != plain
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers(drawn, decoding="model", seed=2) != first
    stopping = probe.load_model(with_settings(tmp_path / "o", stop_strings=["="]))
    assert all(
        stopping.tokenizer.decode(tokens).count("=") <= 1
        for tokens in answers(stopping, decoding="model")
    )
    with pytest.raises(probe.ProbeError, match="in static batches only"):
        answers(drawn, decoding="model", engine="continuous")
    with pytest.raises(probe.ProbeError, match="decoding 'beam' is not known"):
        answers(drawn, decoding="beam")
    kept = own(drawn.settings, [1], 0, LENGTH)
    assert kept["temperature"] == 3.0
    assert kept["max_new_tokens"] == LENGTH


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": "x"}, {"num_beams": -1}, {"stop_strings": 5}, {"stop_strings": [[1]]}],
)
def test_settings_that_cannot_be_used_are_one_line(tmp_path, plain, settings):
    model = probe.load_model(with_settings(tmp_path / "m", **settings))
    with pytest.raises(probe.ProbeError, match=r"generation_config.json.*(greedy|list of texts)"):
        answers(model, decoding="model")
    assert answers(model) == plain


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ({}, {}, {1}),
        ({"eos_token_id": 0}, {"eos_token_id": 0}, {0, 1}),
        ({"eos_token_id": [7, 8]}, {}, {1, 7, 8}),
        ({}, {"eos_token_id": [7, 8]}, {1, 7, 8}),
        ({"eos_token_id": 9}, {"eos_token_id": [7]}, {1, 7, 9}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {1}),
        ({"eos_token_id": -1}, {"eos_token_id": "x"}, {1}),
        ({"eos_token_id": 2**32}, {"eos_token_id": [2**70]}, {1}),
    ],
)
def test_every_file_may_name_an_end(tmp_path, config, settings, expected):
    folder = Path(shutil.copytree(GRPO, tmp_path / "m"))
    for name, changes in (("config.json", config), ("generation_config.json", settings)):
        table = json.loads((folder / name).read_text())
        table.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(table | changes))
    tokenizer = probe.models._loading.read_tokenizer(str(folder))
    assert set(end_tokens(read_settings(folder), tokenizer)) == expected


def test_the_tokenizers_end_counts_beside_another(tmp_path, plain):
    model = probe.load_model(with_settings(tmp_path / "m", eos_token_id=0))
    assert answers(model) == plain
    assert answers(model, engine="continuous") == plain


def test_a_file_of_settings_that_is_none(tmp_path):
    folder = Path(with_settings(tmp_path / "m"))
    for text in ("{", "[]"):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(probe.ProbeError, match=r"generation_config.json: not"):
            probe.load_model(str(folder))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("/dev/zero")
    with pytest.raises(probe.ProbeError, match=r"generation_config.json: not JSON"):
        probe.load_model(str(folder))
    (folder / "generation_config.json").unlink()
    assert probe.load_model(str(folder)).settings.get("repetition_penalty") is None
