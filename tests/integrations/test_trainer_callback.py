"""Checkpoints that a real trainer saves are scored, and its trackers get the numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import probe
from probe.checkpoints import PACKAGE_DATA
from probe.errors import ProbeError
from probe.integrations.transformers import ProbeCallback

SFT = PACKAGE_DATA / "tiny-math" / "sft"
KEYS = {
    "solutions.questions": 20,
    "selection.alpha": "[0.3]",
    "attribution.control": "none",
    "report.resamples": 0,
    "report.extra": "[]",
}


class Tracker(TrainerCallback):
    """What TensorBoard's and W&B's callbacks are to a trainer."""

    def __init__(self):
        """Keep what is logged."""
        self.got = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got.append((state.global_step, dict(logs)))


def train(folder, callback=None, tokenizer=True, **options):
    """Two steps of a real training, with dropout; what a tracker was told."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(SFT, attention_dropout=0.1, dtype="float32")
    numbers = torch.randint(2, 18, (8, 12)).tolist()
    arguments = Arguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    tracker = Tracker()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in numbers],
        processing_class=AutoTokenizer.from_pretrained(SFT) if tokenizer else None,
        callbacks=[tracker],
    )
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return [(step, logs) for step, logs in tracker.got if "probe/step" in logs]


@pytest.mark.parametrize("after", [False, True])
def test_each_checkpoint_is_scored_and_logged(tmp_path, after):
    got = train(
        tmp_path / "t", lambda t: ProbeCallback(t, "tiny-math", overrides=KEYS, after=after)
    )
    assert [(step, logs["probe/step"]) for step, logs in got] == (
        [(2, 1.0), (2, 2.0)] if after else [(1, 1.0), (2, 2.0)]
    )
    found = list(probe.watch(tmp_path / "t", "tiny-math", overrides=KEYS))
    assert [scored.name for scored in found] == ["checkpoint-1", "checkpoint-2"]
    for (_, logs), scored in zip(got, found, strict=True):
        numbers = {f"probe/{key}": value for key, value in scored.scalars.items()}
        assert numbers == {key: logs[key] for key in numbers}
        assert "probe/tiny-math/accuracy" in numbers
        assert "probe/tiny-math/alpha-0.3/activation_intensity" in numbers
    if after:
        return
    # The training is what it would have been.
    train(tmp_path / "plain")
    ours, plain = (
        load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("t", "plain")
    )
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    state = json.loads((tmp_path / "t" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("probe/step" in row for row in state["log_history"])


def test_a_checkpoint_that_cannot_be_compared_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="checkpoint-1 was not scored: .*tokenizer"):
        got = train(
            tmp_path,
            lambda t: ProbeCallback(t, "tiny-math", overrides=KEYS),
            tokenizer=False,
        )
    assert got == []


def test_a_recipe_that_is_none_stops_before_the_training(tmp_path):
    with pytest.raises(ProbeError, match="no recipe 'tiny-maths'"):
        train(tmp_path, lambda t: ProbeCallback(t, "tiny-maths"))
