"""A judge's prompt as a Jinja template; imports no torch, so that a dry run can look at it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchrft.rewards.text import text_or_file
from torchrft.tools.images import Image

if TYPE_CHECKING:
    from torchrft.types import Prompt

VARIABLES = ("prompt", "response", "label", "metadata", "messages", "images")
"""What a judge's template may show."""

Content = str | tuple[str | Image, ...]  # what a judge reads: a text, or pieces of it and pictures


class JudgeTemplate:
    """A judge's prompt, with the sample in it; `{{ images }}` stands where the pictures go.

    Raises ValueError for one that is no template, shows something else than `VARIABLES`, or not the
    response.
    """

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        text = text_or_file(source, f"judge {name!r}: template")
        self.mark = f"<{secrets.token_hex(16)}>"  # of the pictures: no response can hold it
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_not_none)
        strict = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_not_empty)
        try:
            parsed = environment.parse(text)
            self.shown = meta.find_undeclared_variables(parsed)
            if [*meta.find_referenced_templates(parsed)]:
                raise TemplateError("it cannot include other templates")
            self.template, self.strict = environment.from_string(text), strict.from_string(text)
        except TemplateError as error:
            raise ValueError(f"judge {name!r}: its template does not parse: {error}") from error
        unknown = sorted(self.shown - set(VARIABLES))
        if unknown or "response" not in self.shown:
            what = f"shows {unknown[0]!r}" if unknown else "does not show the response"
            raise ValueError(
                f"judge {name!r}: its template {what}; it can show {', '.join(VARIABLES)}, as in "
                "{{ response }}"
            )

    @property
    def shows_images(self) -> bool:
        return "images" in self.shown

    def render(self, prompt: Prompt, response: str) -> Content:
        """Raises ValueError for what the template shows and the row does not have."""
        first, *rest = self._render(self.template, prompt, response).split(self.mark)
        if not prompt.images:
            return "".join([first, *rest])
        parts: list[str | Image] = [first]
        for text in rest:
            parts += [*prompt.images, text]
        return tuple(part for part in parts if part) if rest else first

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first row that leaves a variable of the template empty."""
        for prompt in prompts:
            self._render(self.strict, prompt, "response")
        if self.shows_images and prompts and not any(prompt.images for prompt in prompts):
            raise ValueError(
                f"judge {self.name!r}: its template shows images, but no prompt has any; set "
                "images_key, or leave {{ images }} out"
            )

    def _render(self, template: Template, prompt: Prompt, response: str) -> str:
        values: dict[str, Any] = {
            "prompt": prompt.text,
            "response": response,
            "label": prompt.label,
            "metadata": prompt.metadata,
            "messages": prompt.messages,
            "images": self.mark,
        }
        try:
            return template.render(values)
        except Exception as error:  # expressions in a template raise what they like
            empty = sorted(name for name in self.shown if values[name] in (None, ""))
            what = f"{', '.join(empty)} is empty" if empty else str(error)
            raise ValueError(
                f"judge {self.name!r}, prompt row {prompt.row}: {what}, but its template shows it"
            ) from error


def _not_none(value: Any) -> Any:
    if value is None:
        raise TemplateError("a value is None")
    return value


def _not_empty(value: Any) -> Any:
    if value is None or value == "":
        raise TemplateError("a value is empty")
    return value
