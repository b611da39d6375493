"""Two digits are shown after the first reply; the second reply has to be the larger one.

Nothing of them is in the opening, so that the first reply alone earns nothing.
"""

from torchrft.environments import Opening, Turn


class HiddenDigits:
    """The row's prompt holds the digits, its label the larger one."""

    def reset(self, row, seed):
        """A question that says nothing."""
        self.digits, self.label, self.is_shown = row["prompt"], row["label"], False
        return Opening(({"role": "user", "content": "?"},))

    def step(self, reply):
        """The digits after whatever was said; then the end."""
        if self.is_shown:
            return Turn(reward=float(reply["content"].strip() == self.label), done=True)
        self.is_shown = True
        return Turn(({"role": "user", "content": self.digits},))

    def close(self):
        """Nothing is held."""
