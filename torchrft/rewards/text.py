"""Texts that a configuration holds or names, and the text of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from torchrft.types import Prompt


def chat_text(teller: Any, template: str, prompt: Prompt, response: Any) -> str:
    """The prompt's messages (its text, where it has none) with the response, in a chat template.

    Raises ValueError, naming the prompt's row, where the template refuses them.
    """
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    try:
        text: str = teller.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}],
            chat_template=template,
            tokenize=False,
        )
        return text
    except TemplateError as error:
        raise ValueError(
            f"prompt row {prompt.row}: the chat template refuses it: {error}"
        ) from error


def text_or_file(value: str, option: str) -> str:
    """The text of the file `value`, or `value` itself if it is a template.

    Raises ValueError for one that is neither.
    """
    path = Path(value)
    if "{{" in value or "{%" in value:
        return value
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'{option} = "{value}" is no text file that can be read, and no template, which would '
            "have {{ ... }} in it"
        ) from error
