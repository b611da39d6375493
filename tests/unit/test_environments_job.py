"""Whole jobs of episodes: what is trained on, what is written down, faults, ranks, resumes."""

import statistics

import pytest
import tiny_job
import torch
from helpers import run_ranks
from test_trainer_faults import raises
from tiny_job import records, rollout
from transformers import AutoTokenizer

from torchrft.config.manager import ConfigError
from torchrft.environments.renderer import ChatRenderer
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer

SUMS = f"{tiny_job.ROOT}/tests/tiny_environments.py:Sums"
OPTIONS = {"name": SUMS, "environment_workers": 2, "functions": None, "max_len": 48}
OPTIONS |= {"eval_data": tiny_job.FLAGS["prompt_data"], "max_steps": 4, "train_batch_size": 32}
STOPS = {1, *range(10, 28)}  # eos, and those of the tiny job


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_job.run(folder, **OPTIONS)
    return folder


def test_rows_are_the_conversation_token_by_token(whole):
    """The first prompt is the template's; a reply is at most three tokens up to a stop; the rest
    is what the template writes, never trained on."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_job.MODEL)
    renderer = ChatRenderer(tokenizer, sorted(STOPS))
    seen = 0
    for row in rollout(whole, 1):
        (branch,) = row["branches"]
        opening = row["messages"][:1]
        assert branch["prompt"] == renderer.render_ids(opening, add_generation_prompt=True)
        begin, sampled = 0, []
        for end in branch["turn_ends"]:
            ids, own = branch["token_ids"][begin:end], branch["sampled"][begin:end]
            reply = [t for t, is_own in zip(ids, own, strict=True) if is_own]
            assert own == [False] * (len(ids) - len(reply)) + [True] * len(reply)
            assert 1 <= len(reply) <= 3
            assert not STOPS & {*reply[:-1]}
            assert reply[-1] in STOPS or len(reply) == 3
            sampled.append(reply)
            begin, seen = end, seen + 1
        assert row["length"] == sum(map(len, sampled))
        assert row["reward"] == pytest.approx(sum(branch["turn_rewards"]))
        assert [m["role"] for m in row["messages"]] == ["user", *["assistant", "user"] * 3]
        observed = [
            p for p, own in zip(branch["logprobs"], branch["sampled"], strict=True) if not own
        ]
        assert set(observed) == {0.0}
    assert seen == 16 * 3


def test_what_is_logged(whole):
    for record in records(whole):
        assert record["reward/environment/turns"] == 3.0
        assert record["reward/environment/status/done"] == 1.0
        assert record["reward/environment/status/error"] == 0.0
        assert 0 <= record["reward/environment/told"] <= 9
        # float32 on a CPU: what the engine said of each token is what a full forward says.
        if "mismatch/logprob_abs_max" in record and record["update/optimizer_steps"]:
            assert record["mismatch/logprob_abs_max"] < 1e-5
    first = records(whole)[0]
    rewards = [row["reward"] for row in rollout(whole, 1)]
    assert first["reward/mean"] == pytest.approx(statistics.fmean(rewards))
    assert first["reward_parts/environment"] == first["reward/mean"]
    assert records(whole)[-1]["grad_norm"] > 0


def test_it_resumes_bit_identically(whole, tmp_path):
    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.collector.scorer, "score", 5, RuntimeError("it broke"))
        with pytest.raises(RuntimeError, match="it broke"):
            job.train()
    tiny_job.run(tmp_path, **OPTIONS, load_checkpoint="true")
    ends = [folder / "hf" / "step-4" / "model.safetensors" for folder in (whole, tmp_path)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    for step in range(1, 5):
        assert rollout(whole, step) == rollout(tmp_path, step)


def _two_steps(rank, world_size, folder):
    options = OPTIONS | {"max_steps": 2, "train_batch_size": 16, "save_path": folder}
    config = tiny_job.tiny_config(world_size, **options)
    job = Trainer(config, World(rank, world_size, rank, torch.device("cpu")))
    job.train()
    job.sampler.close()
    return None


@pytest.mark.slow
def test_two_ranks_take_the_same_steps(tmp_path):
    for ranks in (1, 2):
        run_ranks(_two_steps, ranks, ranks, str(tmp_path / str(ranks)))
    alone, together = (records(tmp_path / name) for name in "12")
    for one, two in zip(alone, together, strict=True):
        for name in ("reward/mean", "policy/loss", "grad_norm", "response_length/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


def test_an_environment_that_fails_is_counted_and_teaches_nothing(tmp_path):
    tiny_job.run(
        tmp_path,
        **OPTIONS | {"environment.options": '{"bad": 3}', "max_steps": 1, "max_reward_failures": 1},
    )
    rows = rollout(tmp_path, 1)
    bad = [row for row in rows if row["fault"] is not None]
    assert 0 < len(bad) < len(rows)
    for row in bad:
        assert "ValueError: a bad row" in row["fault"]
        assert row["messages"] == []
    (record,) = records(tmp_path)
    assert record["reward/environment/errors"] == len(bad)
    assert record["reward/environment/status/done"] == pytest.approx(1 - len(bad) / len(rows))


def test_fewer_turns_and_another_weight(tmp_path):
    tiny_job.run(tmp_path, **OPTIONS | {"max_turns": 2, "environment_weight": -0.5, "max_steps": 1})
    (record,) = records(tmp_path)
    assert record["reward/environment/turns"] == 2.0
    assert record["reward/environment/status/turns"] == 1.0
    for row in rollout(tmp_path, 1):
        assert row["reward"] == pytest.approx(-0.5 * row["reward_parts"]["environment"])
        assert len(row["branches"][0]["turn_ends"]) == 2


def test_what_cannot_go_together():
    served = {"engine_type": "sglang", "engine_tp_size": 2, "mixed_mm_data": True}
    with pytest.raises(ConfigError) as fault:
        tiny_job.tiny_config(2, **OPTIONS | served)
    assert "whose episodes need engine_tp_size = 1 with SGLang, not 2" in str(fault.value)
    assert "have no images yet; leave images_key and mixed_mm_data out" in str(fault.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "nowhere.py:Sums"}, "there is no file nowhere.py"),
        ({"name": f"{SUMS}s"}, "has no function 'Sumss'"),
        ({"environment.options": '{"turn": 3}'}, "unexpected keyword argument 'turn'"),
        (
            {"name": None, "max_turns": 3},
            "has no effect without name; set that, or leave max_turns out",
        ),
        ({"environment_timeout": -1}, "environment_timeout -1: expected number > 0"),
    ],
)
def test_bad_input(tmp_path, options, said):
    with (
        pytest.raises((ValueError, ConfigError)) as fault,
        tiny_job.trainer(tmp_path, **OPTIONS | options) as job,
    ):
        job.train()
    assert said in str(fault.value)
