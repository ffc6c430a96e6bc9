"""Prompts: from the text of a question to the tokens that a model is given.

>>> encode_text(model.tokenizer, "50-7-67-53=?", chat=False)
[8, 3, 14, 10, 14, 9, 10, 14, 8, 6, 16, 18]
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from probe.errors import ProbeError, reason
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
    if chat:
        if not tokenizer.chat_template:
            raise ProbeError(no_template(tokenizer.name_or_path))
        from jinja2 import TemplateError  # what transformers fills templates with

        turns = [{"role": "user", "content": text}] if isinstance(text, str) else [*map(dict, text)]
        try:
            text = str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            name = tokenizer.name_or_path
            raise ProbeError(f"{name}: the chat template refuses: {reason(error)}") from error
    # A template writes special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return tokens


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
