"""The whole loop under several layouts: rollouts, steps, and checkpoints from one to another."""

import pytest
import torch
from helpers import run_ranks
from tiny_job import MODEL, ROOT, records, rollout, tiny_config

from torchrft.models.loader import load_model, load_tokenizer
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer

COMMON = {
    "init_kl_coef": 0.01,
    "lr_warmup_ratio": 0.0,
    "rollout_batch_size": 4,
    "micro_train_batch_size": 2,
    "actor_learning_rate": 1e-4,  # Adam's first steps would blow rounding errors up
}
NUMBERS = ("policy/loss", "grad_norm", "policy/kl", "policy/entropy", "reward/mean", "lr")


def train(rank, folder, world_size, options):
    torch.set_num_threads(1)
    config = tiny_config(world_size, save_path=folder, **(COMMON | options))
    job = Trainer(config, World(rank, world_size, rank, torch.device("cpu")))
    assert job.train() is None
    critic = job.learner.critic.model if job.learner.critic else None
    return None if critic is None else sum(float(p.sum()) for p in critic.parameters())


def assert_same_lines(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name in NUMBERS:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_resumes_under_another(tmp_path):
    """dp4 -> tp2 x dp2 -> tp2 x sp2 -> one process: the same losses as one that never changed."""
    chain, alone = str(tmp_path / "chain"), str(tmp_path / "alone")
    layouts = [
        (4, {}),
        (4, {"tp_size": 2}),
        (4, {"tp_size": 2, "sp_size": 2, "gradient_checkpointing": True}),
        (1, {"fused_linear_logprob": True}),
    ]
    for step, (world_size, layout) in enumerate(layouts, start=1):
        options = layout | {"max_steps": step, "load_checkpoint": step > 1}
        run_ranks(train, world_size, chain, world_size, options)
    run_ranks(train, 1, alone, 1, {"max_steps": 4})
    assert_same_lines(records(chain), records(alone))
    for step in range(1, 5):
        responses = [[row["response"] for row in rollout(run, step)] for run in (chain, alone)]
        assert responses[0] == responses[1]


@pytest.mark.slow
def test_truncated_sampling_under_tensor_and_sequence_parallelism(tmp_path):
    """What was kept is cut by rows over sp ranks, by vocabulary over tp ranks."""
    options = {"top_k": 7, "truncation_replay": True, "max_steps": 2, "fused_linear_logprob": True}
    run_ranks(train, 4, str(tmp_path / "a"), 4, options | {"tp_size": 2, "sp_size": 2})
    run_ranks(train, 1, str(tmp_path / "b"), 1, options)
    assert_same_lines(records(tmp_path / "a"), records(tmp_path / "b"))
    for line in records(tmp_path / "a"):
        assert line["mismatch/logprob_abs_max"] < 1e-5


@pytest.mark.slow
def test_a_critic_under_tensor_and_sequence_parallelism(tmp_path):
    options = {"advantage_estimator": "gae", "critic_learning_rate": 1e-3, "max_steps": 3}
    layout = {"tp_size": 2, "sp_size": 2, "packing_samples": True}
    run_ranks(train, 4, str(tmp_path / "a"), 4, options | layout)
    run_ranks(train, 1, str(tmp_path / "b"), 1, options)
    found, expected = records(tmp_path / "a"), records(tmp_path / "b")
    assert_same_lines(found, expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("critic/loss", "critic/grad_norm", "critic/value_mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
    assert expected[1]["critic/grad_norm"] > 0


@pytest.mark.slow
def test_pretrained_weights_go_straight_into_shards(tmp_path):
    """Policy, reference and critic from files, as one process that loads them whole."""
    load_tokenizer(MODEL).save_pretrained(tmp_path / "model")
    load_model(MODEL, "random", seed=5).save_pretrained(tmp_path / "model")
    options = {"pretrain": str(tmp_path / "model"), "init": "pretrained", "max_steps": 2}
    options |= {"advantage_estimator": "gae", "critic_learning_rate": 1e-3}
    run_ranks(train, 4, str(tmp_path / "a"), 4, options | {"tp_size": 2})
    run_ranks(train, 1, str(tmp_path / "b"), 1, options)
    assert_same_lines(records(tmp_path / "a"), records(tmp_path / "b"))


@pytest.mark.slow
def test_waiting_samples_of_an_odd_number_of_groups_move_to_more_ranks(tmp_path):
    """Dynamic sampling keeps 3 of 4 groups, which wait on one rank and go on on two and on one."""
    options = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 1, "train_batch_size": 48}
    options |= {"functions": f"{ROOT}/tests/tiny_rewards.py:mostly"}
    chain, alone = str(tmp_path / "chain"), str(tmp_path / "alone")
    for step, world_size in enumerate((1, 2, 1), start=1):
        more = {"max_steps": step, "load_checkpoint": step > 1}
        run_ranks(train, world_size, chain, world_size, options | more)
    run_ranks(train, 1, alone, 1, options | {"max_steps": 3})
    assert any(line["dynamic_sampling/groups_missing"] % 2 for line in records(alone)[:2])
    for mine, theirs in zip(records(chain), records(alone), strict=True):
        for name in ("reward/mean", "policy/loss", "grad_norm"):
            if theirs[name] is not None:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)
    assert records(alone)[2]["grad_norm"] > 0
