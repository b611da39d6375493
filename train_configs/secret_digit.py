"""An environment of two turns that a tiny model with random weights learns in a minute.

The first reply is a request, which "?" makes well; whatever it is, the environment then shows a
digit. The second reply must begin with that digit. Nobody knows it before: without the second turn,
the best policy names one of the four digits and is right once in four times.
"""

from collections.abc import Mapping
from typing import Any

from torchrft.environments import Opening, Turn


class SecretDigit:
    """An episode; the row's label is the digit, `bonus` the reward of a first reply with "?"."""

    def __init__(self, bonus: float = 0.1) -> None:
        self.bonus, self.secret, self.is_shown = bonus, "", False

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        self.secret = str(row["label"])
        return Opening(({"role": "user", "content": row["prompt"]},))

    def step(self, reply: Mapping[str, Any]) -> Turn:
        first = reply["content"].strip()[:1]
        if not self.is_shown:
            self.is_shown = True
            asked = float(first == "?")
            shown = ({"role": "user", "content": self.secret},)
            return Turn(shown, self.bonus * asked, metrics={"asked": asked})
        right = float(first == self.secret)
        return Turn(reward=right, done=True, metrics={"right": right})

    def close(self) -> None: ...
