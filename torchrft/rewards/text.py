"""Texts that a configuration holds or names."""

from pathlib import Path


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
