"""Targets: what is differentiated, a number for each sequence from the logits of its answer.

A score is how much its target grows without an edge. Each target here gives its value and its slope
in closed form; a function of one's own gives its value, and autograd the slope. Functions of this
module travel with a trace to a server; see `_hooks`.

    >>> probe.attribute(model, sequences, target="margin")
    >>> probe.attribute(model, sequences, target=Target("loss", temperature=1.6))
    >>> probe.attribute(model, sequences, target=Target("loss", temperature=[0.7, 1.6]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch

from probe.errors import ProbeError, not_known
from probe.registry import Registry

Slope = Callable[
    [torch.Tensor, torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor]"
]
"""From logits [token, vocabulary], labels int64 [token] and reference log probabilities [token,
vocabulary] to the value of each token, [token], and its derivative by the logits, [token,
vocabulary]."""

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A target of one's own: from logits [token, vocabulary] and labels int64 [token] to a value for
each token, [token]; plain torch that autograd can differentiate."""


def loss(
    logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the answer's token, in nats (paper, Eq. 13)."""
    logs = logits.log_softmax(-1)  # [token, vocabulary]
    values = -logs.gather(1, labels[:, None])[:, 0]
    return values, less_at(logs.exp(), labels)


def margin(
    logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logit of the answer's token minus the largest of another token."""
    own = logits.gather(1, labels[:, None])  # [token, 1]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    best, rival = others.max(1, keepdim=True)
    slopes = torch.zeros_like(logits).scatter_(1, rival, -1.0)
    return (own - best)[:, 0], -less_at(-slopes, labels)


def logit(
    logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logit of the answer's token minus the mean of all."""
    own = logits.gather(1, labels[:, None])[:, 0]
    slopes = torch.full_like(logits, 1 / logits.shape[1])
    return own - logits.mean(1), -less_at(slopes, labels)


def kl(
    logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || model) of the next token, in nats."""
    assert reference is not None
    logs = logits.log_softmax(-1)
    chances = reference.exp()
    terms = chances * (reference - logs)
    # A token that the reference never gives counts nothing, whatever the model gives it.
    values = torch.where(chances > 0, terms, torch.zeros_like(terms)).sum(1)
    return values, logs.exp() * chances.sum(1, keepdim=True) - chances


def less_at(slopes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Slopes [token, vocabulary] with 1 taken off at each label, in place."""
    return slopes.scatter_add_(1, labels[:, None], -torch.ones_like(slopes[:, :1]))


class ByAutograd:
    """Value and slope of a target that says its value alone."""

    def __init__(self, value: Value) -> None:
        """Keep the function."""
        self.value = value

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope of each token."""
        with torch.enable_grad():
            logits = logits.detach().requires_grad_(True)
            values = self.value(logits, labels)
            if values.shape != labels.shape:
                raise ValueError(f"a target gave {[*values.shape]} values for {len(labels)} tokens")
            (slopes,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), slopes


class EachAtItsOwn:
    """Value and slope of a target where the logits of each token are divided by its own number."""

    def __init__(self, slope: Slope) -> None:
        """Keep the function of divided logits."""
        self.slope = slope

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope of each token; what stands beside it are temperatures [token, 1]."""
        assert reference is not None
        values, slopes = self.slope(logits / reference, labels, None)
        return values, slopes / reference


class TargetFunction(NamedTuple):
    """A row of `TARGETS`."""

    slope: Slope
    """Its value and its slope."""

    reference: bool = False
    """Whether it compares with reference probabilities. Other targets are given None."""


_ROWS = {
    "loss": TargetFunction(loss),
    "margin": TargetFunction(margin),
    "logit": TargetFunction(logit),
    "kl": TargetFunction(kl, reference=True),
}

TARGETS = Registry("target", TargetFunction, _ROWS, takes="slope")
"""Every target by its name; the one place to add one."""


@dataclass(frozen=True)
class Target:
    """What is differentiated: the mean over a sequence's answer of something of its logits."""

    what: str | Value = "loss"
    """A name in `TARGETS`, or a function of one's own."""

    temperature: float | Sequence[float] = 1.0
    """By what logits are divided first, or a number for each sequence. Values are those of the
    divided logits, slopes those by the logits before."""

    reference: Sequence[torch.Tensor] | None = None
    """For `kl` and others that compare: log probabilities [answer token, vocabulary] for each
    sequence. Not given, it is what the model itself says when no edge is removed."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ProbeError: An unknown name, a temperature that is not positive, or a reference where
                none is used.
        """
        # The plain loss is made while this package is imported; plugins, which the table asks for,
        # cannot be imported then.
        if self.what != "loss" and not callable(self.what) and self.what not in TARGETS:
            raise ProbeError(not_known("target", self.what, TARGETS))
        given: object = self.temperature
        numbers = tuple(given) if isinstance(given, Iterable) else (given,)
        if isinstance(given, Iterable):
            object.__setattr__(self, "temperature", numbers)
        for number in numbers:
            sound = isinstance(number, int | float) and not isinstance(number, bool)
            if not (sound and isfinite(number) and number > 0):
                raise ProbeError(f"temperature is {number}; it must be above 0")
        if self.temperatures is not None and self.compares:
            raise ProbeError(f"target {self.name} takes one temperature, not one for each sequence")
        if self.reference is not None and not self.compares:
            raise ProbeError(f"target {self.name} has no reference; as kl has")

    @classmethod
    def of(cls, target: Target | str | Value) -> Target:
        """A target from its name or function.

        Raises:
            ProbeError: It is not known.
        """
        return target if isinstance(target, Target) else cls(target)

    @property
    def name(self) -> str:
        """Its name."""
        return self.what if isinstance(self.what, str) else getattr(self.what, "__name__", "own")

    @property
    def temperatures(self) -> Sequence[float] | None:
        """The temperature of each sequence; None where all have one."""
        return None if isinstance(self.temperature, int | float) else self.temperature

    @property
    def divisors(self) -> Sequence[float]:
        """The temperature of each sequence, or the one of all."""
        return (
            (self.temperature,) if isinstance(self.temperature, int | float) else self.temperature
        )

    @property
    def shared_temperature(self) -> float:
        """By what the logits of all sequences are divided."""
        return float(self.temperature) if isinstance(self.temperature, int | float) else 1.0

    @property
    def slope(self) -> Slope:
        """What gives its value and slope, of logits that are divided by what all have in common."""
        what = self.what
        slope = TARGETS[what].slope if isinstance(what, str) else ByAutograd(what)
        return slope if self.temperatures is None else EachAtItsOwn(slope)

    @property
    def function(self) -> Slope | Value:
        """The function that it was made of: a row's, or one of the user's own."""
        return TARGETS[self.what].slope if isinstance(self.what, str) else self.what

    @property
    def compares(self) -> bool:
        """Whether it compares with reference probabilities."""
        return isinstance(self.what, str) and TARGETS[self.what].reference

    @property
    def compares_itself(self) -> bool:
        """Whether it compares with what the model itself says when no edge is removed."""
        return self.compares and self.reference is None

    @property
    def is_loss(self) -> bool:
        """Whether it is the paper's: the plain loss."""
        return self.what == "loss" and self.temperature == 1

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its scores from those of the plain loss; nothing for that."""
        if self.is_loss:
            return ()
        return (self.name, *(repr(float(divisor)) for divisor in self.divisors))

    def beside(self, indices: Sequence[int], tokens: Sequence[int]) -> list[torch.Tensor] | None:
        """What stands beside the scored tokens of some sequences, for `slope`: [token, ...].

        Args:
            indices: The places of these sequences among all.
            tokens: How many tokens of each of them are scored.
        """
        if self.temperatures is not None:
            divisors = [self.temperatures[index] for index in indices]
            sizes = zip(tokens, divisors, strict=True)
            return [torch.full((count, 1), t, dtype=torch.float64) for count, t in sizes]
        return None if self.reference is None else [self.reference[i] for i in indices]
