"""A class in TRL's style, which knows nothing of torchrft."""


class Counter:
    """TRL's style: reset(**row), public methods as tools, get_reward()."""

    def reset(self, target: int, **row):
        self.target, self.total = target, 0
        return f" Count to {target}."

    def increment(self, by: int) -> int:
        """Adds to the count.

        Args:
            by: How much.
        """
        self.total += by
        return self.total

    def get_reward(self) -> float:
        return 1.0 if self.total == self.target else self.total / 10
