"""Prompts: from the text of a question to the tokens that a model is given.

>>> encode_text(model.tokenizer, "50-7-67-53=?", chat=False)
[8, 3, 14, 10, 14, 9, 10, 14, 8, 6, 16, 18]
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from probe.errors import ProbeError, reason
from probe.models._templates import RefusalError, TooMuchError, fill
from probe.recipe import CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MESSAGE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What the prompt `chat` asks."""


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, question: str) -> list[int]:
    """Tokens of a recipe's prompt; `{question}` in it stands for the question.

    Raises:
        ProbeError: The prompt is a chat, and the tokenizer has no template for one.
    """
    chat, message = chat_message(prompt)
    # Not str.format: prompts hold other braces, as in \boxed{}.
    return encode_text(tokenizer, message.replace("{question}", question), chat)


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", text: str | Sequence[Mapping[str, str]], chat: bool
) -> list[int]:
    """Tokens of a text, as it stands or as a chat.

    Args:
        tokenizer: The model's tokenizer.
        text: What the user says; of a chat also the messages so far, each a role and a content.
        chat: Whether it goes through the tokenizer's chat template.

    Raises:
        ProbeError: The tokenizer has no chat template, or it refuses these messages.
    """
    if not chat:
        assert isinstance(text, str)
        return _without_what_follows(tokenizer, text)
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else [*map(dict, text)]
    # A template writes special tokens itself.
    tokens = tokens_of(tokenizer, _filled(tokenizer, turns))
    # One that does not open the model's turn may end in the token that closes the user's.
    while tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def tokens_of(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = False) -> list[int]:
    """Tokens of a text, as it stands.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        special: Whether with what the tokenizer puts before and behind every text.

    Raises:
        ProbeError: The tokenizer cannot take it: its vocabulary may lack a letter.
    """
    try:
        tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # the tokenizers of Rust have no exception of their own
        raise ProbeError(
            f"{tokenizer.name_or_path}: the tokenizer cannot take the text {text[:60]!r}: "
            f"{reason(error)}"
        ) from error
    return tokens


def _filled(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> str:
    """The text of a chat, whether its template wants contents as text or as a list of parts."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ProbeError(no_template(name))
    said = turns[-1]["content"].strip()
    parts: list[dict[str, object]]
    parts = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    fault = "it leaves the question out, as text and as a list of parts"
    for messages in (turns, parts):
        try:
            template = tokenizer.get_chat_template()
            text = fill(template, messages, tokenizer.special_tokens_map)
        except TooMuchError as error:
            raise ProbeError(
                f"{name}: the chat template {error} for a question; mend it, or give a prompt as "
                "text"
            ) from None
        except (RefusalError, ValueError) as error:  # or there are several, and none of them is it
            if messages is turns:
                fault = reason(error)
            continue
        if said in text:
            return text
    raise ProbeError(
        f"{name}: the chat template refuses: {fault}; mend it, or give a prompt as text"
    )


def _without_what_follows(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """A text's tokens with what the tokenizer puts before every text, not with what it puts behind.

    An end token that closes a prompt would make an empty answer the likeliest one.
    """
    tokens, plain = tokens_of(tokenizer, text, special=True), tokens_of(tokenizer, text)
    around = tokens_of(tokenizer, "", special=True)
    found = [n for n in range(len(around) + 1) if tokens == [*around[:n], *plain, *around[n:]]]
    # Where the text itself begins or ends in such tokens, none that ends a text goes before it.
    likely = [n for n in found if tokenizer.eos_token_id not in around[:n]] or found
    return tokens[: likely[-1] + len(plain)] if likely else tokens


def chat_message(prompt: str) -> tuple[bool, str]:
    """Whether a recipe's prompt goes through the chat template, and its text in that case."""
    if prompt == CHAT:
        return True, CHAT_MESSAGE
    if prompt.startswith(f"{CHAT}:"):
        return True, prompt.removeprefix(f"{CHAT}:").strip()
    return False, prompt


def no_template(reference: str) -> str:
    """The complaint about a model that cannot be asked by `chat`."""
    return (
        f"{reference}: the tokenizer has no chat template; give the prompt as text, "
        "with {question} in it"
    )
