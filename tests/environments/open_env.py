"""An OpenEnv environment, and its server on a port that stays open when the server dies.

`python open_env.py PORT`: a parent holds the port and starts the server anew when it dies, so that
only the sessions of that moment are lost.
"""

import os
import socket
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app


class Say(Action):
    message: str


class Heard(Observation):
    text: str = ""


class Echo(Environment):
    """Three turns, each worth the place of the row's `word` in the reply; "die" ends the server."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, turns: int = 3) -> None:
        super().__init__()
        self.turns = turns

    def reset(self, seed: int, word: str, dies: bool = False) -> Heard:
        self.count, self.word, self.dies = 0, word, dies
        return Heard(text=f"{word} {seed}")

    def step(self, action: Say, timeout_s: float | None = None) -> Heard:
        self.count += 1
        if self.dies and self.count == 2:
            os._exit(1)
        reward = float(self.word in action.message)
        return Heard(text=action.message * 2, reward=reward, done=self.count == self.turns)

    @property
    def state(self) -> State:
        return State()


def serve(port: int) -> None:
    """Serves forever, in children one after the other."""
    listening = socket.create_server(("127.0.0.1", port), backlog=128)
    app = create_app(Echo, Say, Heard, max_concurrent_envs=64)
    print("ready", flush=True)
    while True:
        child = os.fork()
        if not child:
            uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
