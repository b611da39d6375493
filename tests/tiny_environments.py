"""Environments of a few lines for jobs of a few steps."""

from torchrft.environments import Opening, Turn


class Sums:
    """Tells a number after each reply; a reply is worth its length. `bad` rows go wrong."""

    def __init__(self, turns: int = 3, bad: int = 0) -> None:
        self.left, self.bad = turns, bad

    def reset(self, row, seed):
        self.seed = seed
        if self.bad and int(row["prompt"][0]) % self.bad == 0:
            raise ValueError("a bad row")
        return Opening(({"role": "user", "content": row["prompt"]},))

    def step(self, reply):
        self.left -= 1
        self.seed = self.seed * 7 % 10
        reward = (len(reply["content"]) * 3 + self.seed) % 5 / 4
        told = ({"role": "user", "content": str(self.seed)},)
        return Turn(told, reward, self.left == 0, {"told": float(self.seed)})

    def close(self):
        """Nothing is held."""
