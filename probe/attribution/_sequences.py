"""Sequences: the texts whose edges are scored, as token ids.

    >>> sequence = TokenSequence.from_text("probe:tiny-math/sft", "50-7-67-53=?", "50-7=43;")
    >>> sequence.prompt
    [7, 2, 13, 9, 13, 8, 9, 13, 7, 5, 14, 15]

Every function that scores takes them through `as_sequences`: a text, a pair of prompt and answer,
a `TokenSequence`, or a list of these.
"""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

from probe.errors import ProbeError, check_count
from probe.models import Model, encode_text, read_tokenizer, tokens_of
from probe.solutions import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
"""A chat so far: what was said, each a `role` and a `content`."""

MAX_NEW_TOKENS = 1024
"""The longest answer that a model writes where none is given, in tokens; as in a recipe."""


class TokenSequence(NamedTuple):
    """One text to attribute, as token ids."""

    prompt: Sequence[int]
    """What the model is given; at least one token."""

    answer: Sequence[int]
    """What is scored; at least one token."""

    id: str = ""
    """A name for messages; its place in the list where empty."""

    @property
    def length(self) -> int:
        """How many tokens the model is fed: the last one of the answer is only scored."""
        return len(self.prompt) + len(self.answer) - 1

    @classmethod
    def from_text(
        cls,
        model: Model | str | Path,
        prompt: str | Messages,
        answer: str,
        *,
        chat: bool | None = None,
        id: str = "",
    ) -> "TokenSequence":
        """The tokens of a prompt and its answer, as in a run.

        Args:
            model: The model, or its reference; only its tokenizer is used.
            prompt: A text, or the messages of a chat.
            answer: What is scored.
            chat: Whether the prompt goes through the tokenizer's chat template; where it has one
                if not given. Messages always do.
            id: A name for messages.

        Raises:
            ProbeError: A prompt or an answer without tokens, or no chat template where one is
                needed.
        """
        tokenizer = model.tokenizer if isinstance(model, Model) else read_tokenizer(str(model))
        sequence = cls(_asked(tokenizer, prompt, chat), _answered(tokenizer, answer), id)
        if not sequence.prompt or not sequence.answer:
            raise ProbeError(f"the {'answer' if sequence.prompt else 'prompt'} is empty")
        return sequence


Pair = tuple[str | Messages, str]
"""A prompt and its answer, as texts."""

One = str | Messages | Pair | TokenSequence
"""What can be scored: a text that the model answers itself, a chat that it answers unless the
assistant spoke last, a pair, or tokens."""

Given = One | Sequence[One] | Iterator[One]
"""One of these, or several."""


def as_sequences(
    model: Model,
    given: Given,
    answer: str | Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[TokenSequence]:
    """Make sequences of what a user may give, and check them.

    Where there is no answer, the model writes its own, greedily, as in a run.

    Args:
        model: The model that will read them.
        given: A text, a chat, a pair of prompt and answer, a `TokenSequence`, or several of these.
            What the assistant said at the end of a chat is its answer.
        answer: The answer, or one for each of several; for texts and chats only.
        max_new_tokens: The longest answer that the model writes itself.

    Returns:
        A sequence each, with an id: its own, or its place in the list.

    Raises:
        ProbeError: Something else, an empty prompt or answer, a token that the model does not
            have, or more of them than fit into its context.
    """
    check_count("max_new_tokens", max_new_tokens)
    items = _items(given)
    found: list[TokenSequence] = []
    waiting = []
    for index, (item, text) in enumerate(zip(items, _answers(answer, len(items)), strict=True)):
        sequence, answered = _tokenised(model, item, text, str(index))
        _check_tokens(model, sequence, answered)
        found.append(sequence)
        if not answered:
            waiting.append(index)
    limits = [max_new_tokens] * len(waiting)
    if model.context:
        limits = [min(max_new_tokens, model.context - len(found[i].prompt)) for i in waiting]
    for batch in generate(model, [found[index].prompt for index in waiting], limits):
        for number, tokens in batch:
            index = waiting[number]
            found[index] = found[index]._replace(answer=tokens)
    return found


def corrupted_beside(
    model: Model, given: Given, sequences: Sequence[TokenSequence]
) -> list[TokenSequence]:
    """Texts beside sequences, each as long as its own.

    Args:
        model: The model that will read them.
        given: What `as_sequences` takes; of texts without an answer only the prompt is used, and
            the answer is that of the sequence.
        sequences: The sequences.

    Raises:
        ProbeError: Not as many, or a prompt or an answer of another length.
    """
    items = _items(given)
    if len(items) != len(sequences):
        raise ProbeError(f"{len(items)} corrupted texts do not fit {len(sequences)} sequences")
    found = []
    for item, own in zip(items, sequences, strict=True):
        text, _ = _tokenised(model, item, None, own.id)
        text = TokenSequence(text.prompt, text.answer or own.answer, own.id)
        for name, one, other in (
            ("prompt", text.prompt, own.prompt),
            ("answer", text.answer, own.answer),
        ):
            if len(one) != len(other):
                raise ProbeError(
                    f"sequence {own.id}: its corrupted {name} has {len(one)} tokens, its own "
                    f"{len(other)}; they must be as long as each other"
                )
        _check_tokens(model, text, answered=True)
        found.append(text)
    return found


def _tokenised(
    model: Model, item: One, answer: str | None, index: str
) -> tuple[TokenSequence, bool]:
    """One sequence with a name and plain numbers as tokens, and whether it has an answer."""
    pair = _as_pair(item)
    own = isinstance(item, TokenSequence) or pair is not None
    name = (str(item.id) if isinstance(item, TokenSequence) else "") or index
    if own and answer is not None:
        raise ProbeError(f"sequence {name} has an answer already; leave answer out")
    if isinstance(item, TokenSequence):
        tokens, scored = item.prompt, item.answer
    else:
        prompt, answer = pair or (cast(str | Messages, item), answer)
        tokens = _asked(model.tokenizer, prompt, None)
        scored = [] if answer is None else _answered(model.tokenizer, answer)
    what = f"sequence {name}: the"
    sequence = TokenSequence(
        _plain(tokens, f"{what} prompt"), _plain(scored, f"{what} answer"), name
    )
    return sequence, own or answer is not None


def _items(given: object) -> list[One]:
    """What was given, one by one."""
    if isinstance(given, TokenSequence | str) or _is_pair(given) or _is_messages(given):
        items: list[object] = [given]
    elif isinstance(given, Sequence | Iterator) and not isinstance(given, bytes | range):
        items = list(given)
    else:
        raise ProbeError(f"{_kind(given)} cannot be scored; {_WANTED}, or a list of these")
    for index, item in enumerate(items):
        known = isinstance(item, TokenSequence | str) or _is_pair(item) or _is_messages(item)
        if not known:
            raise ProbeError(f"sequence {index}: {_kind(item)} cannot be scored; {_WANTED}")
    return items  # type: ignore[return-value]


_WANTED = "give a text, a pair (prompt, answer) of texts, or a TokenSequence of token ids"


def _answers(answer: object, count: int) -> list[str | None]:
    """The answer to each; None where the model writes it."""
    if answer is None:
        return [None] * count
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list | tuple) or not all(isinstance(a, str) for a in answers):
        raise ProbeError(f"answer is {_kind(answer)}; give a text, or a list of texts")
    if len(answers) != count:
        raise ProbeError(f"{len(answers)} answers do not fit {count} prompts; give one for each")
    return list(answers)


def _is_messages(item: object) -> TypeGuard[Messages]:
    return (
        isinstance(item, list | tuple)
        and bool(item)
        and all(isinstance(message, Mapping) for message in item)
    )


def _is_pair(item: object) -> TypeGuard[Pair]:
    if not isinstance(item, tuple) or isinstance(item, TokenSequence) or len(item) != 2:
        return False
    return isinstance(item[1], str) and (isinstance(item[0], str) or _is_messages(item[0]))


def _as_pair(item: object) -> Pair | None:
    """A pair, or a chat that ends with what the assistant said, as prompt and answer."""
    if _is_pair(item):
        return item
    if _is_messages(item) and item[-1].get("role") == "assistant":
        return item[:-1], item[-1].get("content", "")
    return None


def _kind(value: object) -> str:
    """What a value is, for messages."""
    name = "None" if value is None else type(value).__name__
    return name if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _asked(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, chat: bool | None
) -> list[int]:
    """Tokens of a prompt; through the chat template where there is one, if nothing is said."""
    if isinstance(prompt, str):
        through = bool(tokenizer.chat_template) if chat is None else chat
    elif not _is_messages(prompt):
        raise ProbeError(f"{_kind(prompt)} is no prompt; give a text or a list of messages")
    elif chat is False:
        raise ProbeError("messages need the chat template; leave chat out, or give a text")
    else:
        through = True
    return encode_text(tokenizer, prompt, through) if prompt else []


def _answered(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    if not isinstance(answer, str):
        raise ProbeError(f"{_kind(answer)} is no answer; give a text")
    return tokens_of(tokenizer, answer)


def _plain(tokens: object, what: str) -> list[int]:
    if isinstance(tokens, str):
        raise ProbeError(f"{what} is text, not token ids; TokenSequence.from_text takes text")
    if not isinstance(tokens, Sequence) or isinstance(tokens, bytes):
        raise ProbeError(f"{what} is {_kind(tokens)}; give a list of token ids")
    for token in tokens:
        if type(token) is not int and (isinstance(token, bool) or not isinstance(token, Integral)):
            raise ProbeError(f"{what} holds {token!r}, which is no token id")
    return [int(token) for token in tokens]


def _check_tokens(model: Model, sequence: TokenSequence, answered: bool) -> None:
    """Check that a model can read a sequence, or a prompt that it will answer itself."""
    name, context = f"sequence {sequence.id}", model.context
    if not sequence.prompt or (answered and not sequence.answer):
        part = "answer" if sequence.prompt else "prompt"
        raise ProbeError(f"{name}: the {part} is empty; it needs at least one token")
    if context and answered and sequence.length > context:
        raise ProbeError(
            f"{name}: {sequence.length} tokens are more than the model's context of {context}; "
            "cut the answer"
        )
    if context and not answered and len(sequence.prompt) >= context:
        raise ProbeError(
            f"{name}: a prompt of {len(sequence.prompt)} tokens leaves no room for an answer in "
            f"the model's context of {context}"
        )
    vocabulary = int(model.config.vocab_size)
    for token in (*sequence.prompt, *sequence.answer):
        if not 0 <= token < vocabulary:
            raise ProbeError(
                f"{name}: token {token} is outside the model's vocabulary (0 to {vocabulary - 1})"
            )
