"""A callback for the trainers of transformers and TRL: it scores each checkpoint that is saved.

>>> trainer.add_callback(ProbeCallback(trainer, "mine.toml", overrides={"compute.device": "cpu"}))
>>> trainer.train()
"""

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.recipe import Recipe
from probe.run import Scored, score_checkpoint, watch_recipe


class ProbeCallback(TrainerCallback):
    """Compares each saved checkpoint with the base, and logs the numbers as the trainer does.

    They are `probe/tiny-math/accuracy` and so on, see `probe.run.Scored.scalars`, beside
    `probe/step`; every tracker of the trainer gets them. A checkpoint that cannot be compared is a
    warning, and the training goes on; its random numbers are as they would have been.
    """

    def __init__(
        self,
        trainer: Trainer,
        recipe: str | Path | Recipe,
        output: str | Path | None = None,
        *,
        overrides: Mapping[str, str | int | float] | None = None,
        after: bool = False,
    ) -> None:
        """Set up what is scored.

        Args:
            trainer: The trainer that this is added to, whose `log` gets the numbers.
            recipe: As in `probe.watch`; its `compute.device` had better not be one that trains.
            output: The run folder; `probe` in the trainer's output folder if not given.
            overrides: Values by dotted key, as in `run_recipe`; not for a `Recipe`.
            after: Score all checkpoints once the training is through, instead of each while it
                waits. Of several processes that train together the others would wait, too, and may
                give up.

        Raises:
            ProbeError: There is no such recipe, or it has several bases.
        """
        self._trainer = trainer
        self._recipe = watch_recipe(recipe, overrides)
        self._output = None if output is None else Path(output)
        self._after = after
        self._waiting: list[int] = []

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Score what was saved, or keep it in mind."""
        if not state.is_world_process_zero:
            return
        if self._after:
            self._waiting.append(state.global_step)
        else:
            self._score(args, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Score what waits."""
        for step in self._waiting:
            self._score(args, step)
        self._waiting = []

    def _score(self, args: TrainingArguments, step: int) -> None:
        assert args.output_dir is not None
        folder, name = Path(args.output_dir), f"checkpoint-{step}"
        try:
            with _own_random_numbers():
                scored: Scored = score_checkpoint(
                    self._recipe,
                    name,
                    f"{folder}#{name}",
                    self._output or folder / "probe",
                    PlainConsole(stderr=True),
                )
        except (ProbeError, torch.OutOfMemoryError) as error:
            warnings.warn(f"{name} was not scored: {error}", stacklevel=2)
            return
        numbers = {f"probe/{key}": value for key, value in scored.scalars.items()}
        self._trainer.log(numbers | {"probe/step": float(step)})


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the random numbers of the training as they are."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
