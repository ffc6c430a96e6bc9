"""Controls: the same change again, with something held fixed that could have caused it.

Between before and after several things differ: the circuit, how sure the model is of its answer,
and the text that it is scored on. Scores are slopes of the loss, and a model that is surer has
smaller slopes everywhere, whatever its circuit. Each control scores some more sides, and compares
two of them exactly as the raw change compares `before` and `after`; so it has the same estimands,
intervals and p-values.

    >>> CONTROLS["sharpness"].compared
    (('sharpness', 'before', 'before-sharp'),)
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple

from probe.errors import ProbeError, not_known

if TYPE_CHECKING:
    from probe.attribution import TokenSequence

Model = Literal["before", "after"]
Answers = Literal["own", "other", "shuffled"]

CONTROL_SEED = 42


class ControlSide(NamedTuple):
    """One more side of a comparison: a model, what it is scored on, and what is differentiated."""

    name: str
    """Its name in files, `after-matched`."""

    model: Model
    """Which model of the pair."""

    text: Model
    """Whose answers it is scored on."""

    answers: Answers = "own"
    """Each question's own answer, that of another question, or its own with tokens shuffled."""

    target: str = ""
    """A name in `probe.tracing.TARGETS`; what the recipe says if empty."""

    like: Model | None = None
    """The temperature of each question is the one that gives it the loss that this model has of it,
    on the answer that it writes itself; 1 if None."""

    only_if_surer: bool = False
    """Whether the temperature stays 1 where its own loss is the larger one."""


class Control(NamedTuple):
    """What is held fixed, and how the change then is."""

    asks: str
    """Its question, for tables and help."""

    sides: tuple[ControlSide, ...]
    """What has to be scored for it, beside both models on their own answers."""

    compared: tuple[tuple[str, str, str], ...]
    """What it shows: a label, and the sides that stand for before and after."""


CONTROLS: dict[str, Control] = {
    "sharpness": Control(
        "what would being surer do by itself? the model before against itself, each question at "
        "the temperature that gives it the loss of the model after",
        (ControlSide("before-sharp", "before", "before", like="after"),),
        (("sharpness", "before", "before-sharp"),),
    ),
    "loss-matched": Control(
        "what is left at equal loss? of each question the surer model, at the temperature that "
        "gives it the loss of the other",
        (
            ControlSide("before-matched", "before", "before", like="after", only_if_surer=True),
            ControlSide("after-matched", "after", "after", like="before", only_if_surer=True),
        ),
        (("equal loss", "before-matched", "after-matched"),),
    ),
    "margin": Control(
        "and with a target that does not saturate? the answer's logit over the best other one",
        (
            ControlSide("before-margin", "before", "before", target="margin"),
            ControlSide("after-margin", "after", "after", target="margin"),
        ),
        (("margin", "before-margin", "after-margin"),),
    ),
    "cross-text": Control(
        "is it the model, or the text that it writes? both models on the same answers",
        (
            ControlSide("before-on-after", "before", "after"),
            ControlSide("after-on-before", "after", "before"),
        ),
        (
            ("on text before", "before", "after-on-before"),
            ("on text after", "before-on-after", "after"),
        ),
    ),
    "random-text": Control(
        "does it need a text that answers the question? both models on another question's answer, "
        "and on shuffled tokens",
        tuple(
            ControlSide(f"{model}-on-{answers}", model, "before", answers)
            for answers in ("other", "shuffled")
            for model in ("before", "after")
        ),
        (
            ("another's answer", "before-on-other", "after-on-other"),
            ("shuffled tokens", "before-on-shuffled", "after-on-shuffled"),
        ),
    ),
}
"""Every control by its name; the one place to add one."""


def control_sides(names: Iterable[str]) -> list[ControlSide]:
    """What has to be scored for some controls, each side once.

    Raises:
        ProbeError: There is no control of a name.
    """
    found: dict[str, ControlSide] = {}
    for name in names:
        if name not in CONTROLS:
            raise ProbeError(not_known("control", name, CONTROLS))
        found |= {side.name: side for side in CONTROLS[name].sides}
    return list(found.values())


def texts_of(
    side: ControlSide, own: "Sequence[TokenSequence]", texts: "Sequence[TokenSequence]"
) -> "list[TokenSequence]":
    """What a side is scored on: each model keeps the prompt as it tokenises it.

    Args:
        side: The side.
        own: Prompts with answers of its model.
        texts: Those of the model whose answers it is scored on.
    """
    random = Random(CONTROL_SEED)
    answers = [list(sequence.answer) for sequence in texts]
    if side.answers == "other":
        # A cycle through all questions in a random order: nobody keeps an answer of its own.
        order = random.sample(range(len(answers)), len(answers))
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        answers = [answers[following[index]] for index in range(len(answers))]
    if side.answers == "shuffled":
        answers = [random.sample(answer, len(answer)) for answer in answers]
    return [sequence._replace(answer=answer) for sequence, answer in zip(own, answers, strict=True)]
