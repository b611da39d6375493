"""Two digits are shown, one after each reply; the last reply has to be the larger one.

Whoever has seen fewer digits can only guess, so that nothing but the last of three turns earns more
than chance.
"""

from torchrft.environments import Opening, Turn


class HiddenDigits:
    """The row's prompt holds the digits, its label the larger one. `shown` digits are shown."""

    def __init__(self, shown: int = 2) -> None:
        self.shown = shown

    def reset(self, row, seed):
        """Nothing of the digits is in the opening."""
        self.hidden, self.label = list(row["prompt"][: self.shown]), row["label"]
        return Opening(({"role": "user", "content": "?"},))

    def step(self, reply):
        """The next digit, or the end."""
        if self.hidden:
            return Turn(({"role": "user", "content": self.hidden.pop(0)},))
        return Turn(reward=float(reply["content"].strip() == self.label), done=True)

    def close(self):
        """Nothing is held."""
