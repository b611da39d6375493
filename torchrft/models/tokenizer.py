"""Text to token ids, chats to text and token ids to text, for the policy and for reward models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta

# Variables of a chat template that torchrft and transformers set themselves.
_SET = {"messages", "tools", "documents", "add_generation_prompt"}
_SET |= {"raise_exception", "strftime_now"}


def encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """The token ids of `texts`, with the tokenizer's own special tokens if `special`; see
    `without_second_bos`."""
    ids = tokenizer(list(texts), add_special_tokens=special, verbose=False).input_ids
    return without_second_bos(tokenizer, ids) if special else list(ids)


def without_second_bos(tokenizer: Any, rows: Sequence[list[int]]) -> list[list[int]]:
    """Token ids of texts, to which the tokenizer added its special tokens, but not twice what it
    puts in front (a BOS) where a text begins with that already."""
    empty, one = (tokenizer(text, verbose=False).input_ids[:1] for text in ("", "1"))
    twice = empty * 2 if empty == one else None
    return [row[1:] if row[:2] == twice else row for row in rows]


def decode(
    tokenizer: Any,
    token_ids: Sequence[int],
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
) -> str:
    """A response's text as it was sampled, special tokens included, without what ended it.

    The last token is left out if it is one of `stop_ids`. The text ends before the first of the
    strings `stop`. No space is taken away, not at the beginning either, since a prompt goes before.

    >>> decode(tokenizer, [7, 8, 1], stop_ids=[1])                       # doctest: +SKIP
    ' <think>12'
    """
    ids = list(token_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    # Behind another token: some decoders strip the space in front of the first one.
    anchor = [tokenizer.eos_token_id]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, text = (tokenizer.decode(row, **options) for row in (anchor, anchor + ids))
    text = text.removeprefix(before)
    ends = [text.index(string) for string in stop if string in text]
    return text[: min(ends, default=len(text))]


def render_chat(
    teller: Any, messages: Sequence[Mapping[str, Any]], where: str, **options: Any
) -> str:
    """The messages as text, by the chat template of `teller`, a tokenizer or processor.

    Raises ValueError, which begins with `where`, for a template that raises anything.
    """
    try:
        text = str(teller.apply_chat_template(list(messages), tokenize=False, **options))
        text.encode()  # raises for lone surrogates, which tokenizers refuse
        return text
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses it: {error}") from error
    except Exception as error:  # expressions in a template raise what they like
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: the chat template fails on it with {why}") from error


def template_variables(teller: Any) -> set[str]:
    """The variables of the chat template of `teller` that a user may set, as `enable_thinking`.

    Raises ValueError for a template that does not parse.
    """
    template = teller.chat_template
    if isinstance(template, dict):  # of several, by their names
        template = template.get("default", "")
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateError as error:
        raise ValueError(f"the chat template does not parse: {error}") from error
    names = meta.find_undeclared_variables(parsed) - _SET
    return {name for name in names if not name.endswith("_token")}  # as bos_token
