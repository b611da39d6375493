"""Texts that a configuration holds or names, and the text of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrft.models.tokenizer import render_chat

if TYPE_CHECKING:
    from torchrft.types import Prompt


def chat_text(teller: Any, template: str, prompt: Prompt, response: Any) -> str:
    """The prompt's messages (its text, where it has none) with the response, in a chat template.

    Raises ValueError, naming the prompt's row, where the template refuses them.
    """
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    chat = [*messages, {"role": "assistant", "content": response}]
    chosen = template if isinstance(template, str) else None  # of several by name, the default one
    return render_chat(teller, chat, f"prompt row {prompt.row}", chat_template=chosen)


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
