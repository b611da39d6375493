"""Two digits are shown after the first reply; the second reply has to be the larger one.

Nothing of them is in the opening, so that the first reply alone earns no more than chance.
"""

from torchrft.environments import Opening, Turn


class HiddenDigits:
    """The row's prompt holds the digits, its label the larger one."""

    def reset(self, row, seed):
        """A question that says nothing."""
        self.digits, self.label, self.is_shown = row["prompt"], row["label"], False
        return Opening(({"role": "user", "content": "?"},))

    def step(self, reply):
        """A right reply ends the episode at once, if by chance; a wrong one after the digits."""
        right = reply["content"].strip() == self.label
        if right or self.is_shown:
            return Turn(reward=float(right), done=True)
        self.is_shown = True
        return Turn(({"role": "user", "content": self.digits},))

    def close(self):
        """Nothing is held."""
