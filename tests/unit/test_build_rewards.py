"""Which sources a config makes, and with which weight each enters the sum."""

import pytest
import torch
from tiny_job import IN_PROCESS, tiny_config

from torchrft.build.rewards import build_rewards, with_source_key
from torchrft.tools.distributed import World


class Source:
    collective = False

    def __init__(self, name):
        self.name = name


@pytest.fixture
def built(monkeypatch):
    """Builds the rewards of a config with stand-ins for models, judges and servers."""
    model, judge, remote = (lambda entry, *_: Source(entry.name or entry.pretrain)), None, None
    judge, remote = (lambda entry, *_: Source(entry.name)), (lambda reward: Source("remote"))
    monkeypatch.setattr("torchrft.build.reward_models.build_scalar_model", model)
    monkeypatch.setattr("torchrft.build.judges.build_judge", judge)
    monkeypatch.setattr("torchrft.rewards.remote.RemoteRewards", remote)

    def build(**options):
        world = World(0, 1, 0, torch.device("cpu"))
        return build_rewards(tiny_config(**options), world, torch.float32, None)

    return build


def test_every_kind_has_its_weight(built):
    scorer = built(
        functions='[{ name = "exact_match", weight = 2.0, normalize = true }, "numeric"]',
        models='[{pretrain = "m", weight = 3.0}, {pretrain = "n", name = "o", normalize = true}]',
        reward_pretrain="p,q",
        judges='[{ template = "{{ response }}", weight = 0.5, pretrain = "j", normalize = true }]',
        remote_rm_url="http://a:1",
        remote_rm_weight=7,
        remote_rm_normalize="true",
    )
    assert scorer.weights == {
        **{"exact_match": 2.0, "numeric": 1.0, "m": 3.0, "o": 1.0, "p": 1.0, "q": 1.0},
        **{"judge": 0.5, "remote": 7.0},
    }
    assert set(scorer.norms) == {"exact_match", "o", "judge", "remote"}
    assert list(scorer.sources) == list(scorer.weights)


def test_the_names_are_those_of_the_rules(built):
    config = tiny_config(functions=IN_PROCESS, reward_pretrain="a/b")
    names = config.reward.names(config.model.pretrain)
    assert names[1:] == ["b"]


def test_the_engine_scores_with_the_policys_own_model_by_default():
    config = tiny_config(functions=IN_PROCESS, rm_use_engine="true")
    (model,) = config.reward.scalar_models("policy")
    assert model.pretrain == "policy"
    assert not tiny_config().reward.scalar_models("policy")


def test_the_column_of_data_sources_is_read():
    recipes = "{ a = ['exact_match'] }"
    config = tiny_config(functions="exact_match", source_key="kind", recipes=recipes)
    assert with_source_key(config).metadata_keys == ["kind"]
    config = tiny_config(
        functions="exact_match", source_key="kind", recipes=recipes, metadata_keys="x,kind"
    )
    assert with_source_key(config).metadata_keys == ["x", "kind"]
    assert with_source_key(tiny_config()) == tiny_config().data
