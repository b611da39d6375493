"""Finds the answer in a response. Every rule that compares with a label looks only there."""

import re

TAIL = 4000  # characters of a box, or at the end of a response without one, that are looked at

_NAMES = r"(?:seed:)?(?:think|thinking|thoughts?|reason|reasoning)"
_OPENED = re.compile(rf"(?i)<{_NAMES}>|\[think\]|◁think▷|<\|begin_of_thought\|>")
_CLOSED = re.compile(rf"(?i)</{_NAMES}>|\[/think\]|◁/think▷|<\|end_of_thought\|>")
_ANSWER = re.compile(r"(?i)<(/?)(?:final[ _]?)?answer>")
_BOX = re.compile(r"\\[fd]?box(?:ed)?(?![A-Za-z])\s*")


def answer_part(response: str) -> str:
    """Return what follows the thinking, and there what stands in the last `<answer>`, if any.

    Thinking that does not end has no answer behind it: the result is empty. The prompt may have
    opened either tag, and the last `<answer>` need not be closed.

    >>> answer_part("<think>3?</think>It is <answer>4</answer>."), answer_part("<think>4")
    ('4', '')
    """
    ends = [mark.end() for mark in _CLOSED.finditer(response)]
    text = response[ends[-1] :] if ends else response
    if _OPENED.search(text):
        return ""
    tags = list(_ANSWER.finditer(text))
    opened = [tag.end() for tag in tags if not tag[1]]
    start = opened[-1] if opened else 0
    closed = [tag.start() for tag in tags if tag[1] and tag.start() >= start]
    return text[start : closed[0] if closed else None].strip()


def last_box(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` holds; None where there is no box.

    A box may do without braces. One that is not closed, or is longer than `TAIL`, holds nothing.

    >>> last_box(r"so $\boxed {\{1, 2\}}$"), last_box(r"$\boxed 5$"), last_box("5")
    ('\\{1, 2\\}', '5', None)
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth, escaped = boxes[-1].end(), 0, False
    if text[start : start + 1] != "{":
        bare = re.match(r"(?:\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s$\\{}])+", text[start : start + TAIL])
        return bare[0].rstrip(".,;") if bare else ""
    for place in range(start, min(start + TAIL, len(text))):
        sign = text[place]
        depth += 0 if escaped else (sign == "{") - (sign == "}")
        escaped = sign == "\\" and not escaped
        if depth == 0:
            return text[start + 1 : place].strip()
    return ""
