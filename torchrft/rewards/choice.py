"""Finds the letter that a response chooses."""

import re
from typing import Any

from torchrft.rewards.answer import answer_part, last_box
from torchrft.rewards.labels import label_text, plain_label
from torchrft.rewards.registry import LabelError

_WRAPPED = re.compile(r"\\(?:text|math)(?:bf|rm|it|sf|tt)?\s*\{([^{}]*)\}|[*$`\"“”'‘’]|\\[()\[\]]")
# "A or B" is no choice; "A, B is wrong" is one.
_HEDGED = (
    r"(?!\)?\s*(?:,|/|&|or\b|and\b)\s*(?:\(|option\s|choice\s)?[A-Z]\b(?!\s+(?:is|was|has)\b))"
)
# A and I are words where another word follows, unless it goes on with a reason.
_NO_WORD = r"(?!(?<=[AI])[ ]+(?!because|since|as\b|and\b|for\b|is\b)[a-z])"
_LETTER = rf"[\s:(\[{{]{{0,8}}([A-Z])\b(?!-){_NO_WORD}{_HEDGED}"
# What counts as a choice, the surest sign first; of equal signs the last one.
_CHOICES = (
    r"(?:答案[是为：:]|(?i:answer|choice|option)(?i:\s+(?:is|(?:would|should|must) be)|\s*[-:=：]))"
    rf"(?i:\s+(?:therefore|thus|hence|clearly|indeed|likely))?(?i:\s*(?:option|choice|answer))?{_LETTER}"
    rf"|\b(?i:choose|pick|select|go with)(?i:\s+(?:option|choice|answer))?{_LETTER}"
    r"|(?<![A-Za-z])\(?([A-Z])\)?\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)|is\s+the\s+answer)\b",
    r"(?<=[^\s])[ \t]*\(([A-Z])\)",
    r"(?m:^[ \t]*\(?([A-Z])(?:[.):](?=\s|$)|[ \t]*$))",
    rf"(?i:answer|choice|option|\bits|\bit\s+is){_LETTER}"
    r"|(?i:answer|choice|option)(?i:\s+is|\s*[:=])?\s*\(?((?<!is )a|[b-z])\)?\W*\Z",
)
_ONLY = re.compile(r"[\s({\[]*([A-Za-z])[)}\]]*(?:[.:)]?\s*|(?:[.:)]|\)[.:]?)\s+\S.*)", re.DOTALL)

_ALONE = re.compile(r"\W{0,6}[A-Za-z]\W{0,6}")


def _chosen(text: str, choices: str) -> str | None:
    """The letter that a text chooses; None for none or for several at once."""
    text = _WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", text))
    for place, pattern in enumerate(_CHOICES):
        letters = [match[match.lastindex or 0].upper() for match in re.finditer(pattern, text)]
        found = [letter for letter in letters if letter in choices]
        # Lines that start with letters are a list of choices, unless there is but one.
        if found and (place != 2 or len({*found}) == 1):
            return found[-1]
    return None


def chosen_letter(response: str, choices: str) -> str | None:
    """Return the letter of `choices` that a response chooses, in a box or in words, or None."""
    text = answer_part(response)
    box = last_box(text)
    alone = text if box is None and _ALONE.fullmatch(text) else box
    return (_only(alone, choices) if alone is not None else None) or _chosen(text, choices)


def _only(text: str, choices: str) -> str | None:
    """The letter that is all of a text, or is before a full stop and words."""
    match = _ONLY.fullmatch(_WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", text)))
    return match[1].upper() if match and match[1].upper() in choices else None


def label_letter(label: Any, choices: str = "ABCDE") -> str:
    """Return the letter that a label means: a letter in any dress, or its number from 0."""
    choices, label = choices.upper(), plain_label(label)
    if isinstance(label, int) and 0 <= label < len(choices):
        return choices[label]
    text = label_text(label)
    box = last_box(text)
    letter = _only(text if box is None else box, choices)
    if letter is None:
        raise LabelError(f"the label {label!r:.80} is none of the choices {choices}")
    return letter
