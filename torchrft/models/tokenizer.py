"""Text to token ids, chats to text and token ids to text, for the policy and for reward models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta

# Variables of a chat template that torchrft and transformers set themselves.
_SET = "messages tools documents add_generation_prompt raise_exception strftime_now"


def affixes(tokenizer: Any) -> tuple[list[int], int]:
    """The special tokens that the tokenizer puts in front of a text, and how many it appends.

    Raises ValueError for one that changes the text's own tokens thereby.
    """
    bare = tokenizer("1", add_special_tokens=False, verbose=False).input_ids
    full = tokenizer("1", add_special_tokens=True, verbose=False).input_ids
    starts = [n for n in range(len(full)) if full[n : n + len(bare)] == bare]
    if not starts:
        raise ValueError("the tokenizer changes a text's own tokens when it adds special ones")
    return full[: starts[0]], len(full) - starts[0] - len(bare)


def encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """The token ids of `texts`, with the tokenizer's own special tokens if `special`; see
    `without_second_bos`."""
    ids = tokenizer(list(texts), add_special_tokens=special, verbose=False).input_ids
    return without_second_bos(tokenizer, ids) if special else list(ids)


def without_second_bos(tokenizer: Any, rows: Sequence[list[int]]) -> list[list[int]]:
    """Token ids of texts, to which the tokenizer added its special tokens, but not twice what it
    puts in front (a BOS) where a text begins with that already."""
    size = len(first := affixes(tokenizer)[0])
    return [row[size:] if row[: 2 * size] == first * 2 else row for row in rows]


def decode(
    tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = (), stop_ids: Collection[int] = ()
) -> str:
    """A response's text as it was sampled, special tokens included, without what ended it.

    The last token is left out if it is one of `stop_ids`. The text ends before the first of the
    strings `stop`. No space is taken away, not at the beginning either, since a prompt goes before.

    >>> decode(tokenizer, [7, 8, 1], stop_ids=[1])                       # doctest: +SKIP
    ' <think>12'
    """
    sampled = ids[:-1] if ids and ids[-1] in stop_ids else ids
    # Behind another token: some decoders take the space in front of the first one away.
    rows = ([tokenizer.eos_token_id], [tokenizer.eos_token_id, *sampled])
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, text = (tokenizer.decode(row, **options) for row in rows)
    text = text.removeprefix(before)
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


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
    except Exception as error:  # expressions in a template raise what they like
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: the chat template refuses it: {kind}{error}") from error


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
    names = meta.find_undeclared_variables(parsed) - {*_SET.split()}
    return {name for name in names if not name.endswith("_token")}  # as bos_token
