"""Random episodes under the chat templates of many families: what is trained on is what was said.

    EPISODES=10000 pytest tests/unit/test_environments_exact.py

plays that many for each family instead of a few.
"""

import asyncio
import os
import random

import chat_families
import pytest
import tiny
import torch
from test_environments_renderer import FAMILIES, Conversation

from torchrft.environments.play import play
from torchrft.environments.protocol import Limits, Opening, Turn
from torchrft.environments.renderer import ChatRenderer
from torchrft.learn.batch import make_batch
from torchrft.learn.packing import build
from torchrft.models.policy import PolicyModel
from torchrft.types import Completion, Prompt, Sample, Score

EPISODES = int(os.environ.get("EPISODES", "25"))
COMPUTED = 10  # of so many episodes, one's log-probs are those of a model


class Spoken(Conversation):
    """The random conversation as an environment and as an engine."""

    def __init__(self, renderer, family, chance, model=None):
        super().__init__(renderer, family, chance)
        self.model, self.turns = model, chance.randint(1, 5)
        self.seen = []  # prompt, reply and log-probs of each turn

    def reset(self, row, seed):
        return Opening(tuple(self.messages), tuple(self.tools or ()))

    async def step(self, reply):
        reply = dict(reply)
        reply.pop("fault", None)
        parsed = self.renderer.parse_response(
            self.seen[-1][1], tools=self.tools, prompt_ids=self.seen[-1][0]
        )
        assert parsed.message() == reply
        answer = self.answer(parsed)
        self.messages += [reply, *answer]
        done = len(self.seen) == self.turns
        return Turn(() if done else tuple(answer), self.chance.choice([0.0, 0.25]), done)

    def close(self):
        pass

    async def generate(self, ids, turn):
        assert turn == len(self.seen)
        _, reply = self.sampled()
        reply = reply or [self.renderer.get_stop_token_ids()[0]]
        logprobs = [-self.chance.random() for _ in reply]
        if self.model is not None:
            with torch.no_grad():
                rows = self.model(input_ids=torch.tensor([[*ids, *reply]])).logits[0]
            places = torch.arange(len(ids) - 1, len(ids) + len(reply) - 1)
            chosen = rows.log_softmax(-1)[places, torch.tensor(reply)]
            logprobs = chosen.tolist()
        self.seen.append((tuple(ids), tuple(reply), tuple(logprobs)))
        return Completion(0, 0, tuple(reply), tuple(logprobs), "", "stop", turn)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """The family, its renderer, and a model of its vocabulary twice: transformers' and ours."""
    renderer = ChatRenderer(chat_families.tokenizer(request.param))
    options = {"vocab_size": len(renderer.tokenizer), "max_position_embeddings": 8192}
    models = [tiny.model("llama", kind, **options) for kind in ("eager", "torchrft")]
    return request.param, renderer, *models


def check(episode, spoken):
    """Sampled tokens, masks, log-probs and prompts."""
    branches = episode.branches
    replies, logprobs, versions = [], [], []
    for branch in branches:
        begin = 0
        for end, version in zip(branch.turn_ends, branch.versions, strict=True):
            own = branch.sampled[begin:end]
            size = sum(own)
            # What was observed comes before a turn's reply, never within it or behind the last.
            assert own == (False,) * (len(own) - size) + (True,) * size
            replies.append(branch.token_ids[end - size : end])
            logprobs.append(branch.logprobs[end - size : end])
            assert set(branch.logprobs[begin : end - size]) <= {0.0}
            versions.append(version)
            begin = end
        assert begin == len(branch.token_ids)
    assert replies == [reply for _, reply, _ in spoken.seen]
    assert logprobs == [values for _, _, values in spoken.seen]
    assert versions == list(range(len(spoken.seen)))
    wholes = [branch.prompt + branch.token_ids for branch in branches]
    turns = [place for place, branch in enumerate(branches) for _ in branch.turn_ends]
    for (prompt, reply, _), place in zip(spoken.seen, turns, strict=True):
        before = prompt + reply
        assert wholes[place][: len(before)] == before
    rewards = [value for branch in branches for value in branch.turn_rewards]
    assert episode.reward == pytest.approx(sum(rewards))


def test_random_episodes(family):
    name, renderer, theirs, ours = family
    chance = random.Random(f"episodes of {name}")
    policy, statuses, branched, worst = PolicyModel(ours), set(), 0, 0.0
    for number in range(EPISODES):
        model = theirs if number % COMPUTED == 0 else None
        spoken = Spoken(renderer, name, chance, model)
        limits = Limits(chance.randint(1, 6), chance.choice([200, 4096]))
        episode = asyncio.run(play(spoken, {}, 0, spoken.generate, renderer, limits))
        assert episode.status in ("done", "turns", "length"), episode.fault
        statuses.add(episode.status)
        branched += len(episode.branches) > 1
        if not spoken.seen:
            continue
        check(episode, spoken)
        if model is not None:
            worst = max(worst, difference(policy, episode))
    assert worst < 1e-5
    assert statuses >= {"done", "turns"}
    if name in ("qwen3", "mistral", "gpt_oss"):
        assert branched > EPISODES / 20


def difference(policy, episode):
    """The largest one between an episode's log-probs and those of its packed and padded rows."""
    own = [b for branch in episode.branches for b in zip(*_columns(branch), strict=True) if b[2]]
    tokens, logprobs = tuple(b[0] for b in own), tuple(b[1] for b in own)
    completion = Completion(0, 0, tokens, logprobs, "", "stop", 0, None, episode.branches)
    prompt = Prompt(0, "", episode.branches[0].prompt)
    batch = make_batch([Sample(prompt, completion, Score(0.0), 0)])
    found = []
    for packed in (True, False):
        with torch.no_grad():
            micro = build(batch, [0], packed)
            found.append((micro.scatter(policy(micro)[0])[0, : len(own)], torch.tensor(logprobs)))
    return max(float((mine - theirs).abs().max()) for mine, theirs in found)


def _columns(branch):
    return branch.token_ids, branch.logprobs, branch.sampled
