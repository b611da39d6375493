"""A letter and a digit are shown after the first reply; the second reply has to be the digit.

Nothing of them is in the opening, so that the first reply alone earns nothing.
"""

from torchrft.environments import Opening, Turn


class HiddenDigit:
    """The row's prompt is what is shown, its label the digit."""

    def reset(self, row, seed):
        """A question that says nothing."""
        self.hidden, self.label, self.is_shown = row["prompt"], row["label"], False
        return Opening(({"role": "user", "content": "?"},))

    def step(self, reply):
        """What was hidden, after whatever was said; then the end."""
        if self.is_shown:
            return Turn(reward=float(reply["content"].strip() == self.label), done=True)
        self.is_shown = True
        return Turn(({"role": "user", "content": self.hidden},))

    def close(self):
        """Nothing is held."""
