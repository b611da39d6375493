"""Every algorithm option through the trainer: that it reaches the step, and what it does there."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import run_ranks
from tiny_job import MODEL, ROOT, argv, records, rollout, run, tiny_config, trainer, weights

from torchrft.algorithms.presets import PRESETS
from torchrft.config.manager import ConfigError, load
from torchrft.models.loader import load_model
from torchrft.tools import distributed
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer

SMALL_CLIPS = {"clip_range": 0.1, "clip_range_higher": 0.1}


def step_of(path, **options):
    """The metrics of the first step, with a policy that is not at its start."""
    run(path, **options, max_steps=1)
    return records(path)[0]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(tmp_path, name):
    start = weights(run(tmp_path / "start", max_steps=1, actor_learning_rate=1e-30))
    job = run(tmp_path / "run", advantage_estimator=name, train_batch_size=8, init_kl_coef=0.01)
    lines = records(tmp_path / "run")
    assert [line["update/optimizer_steps"] for line in lines] == [2, 2]
    assert [line["update/skipped_steps"] for line in lines] == [0, 0]
    for line in lines:
        assert all(value is not None and math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
    assert not same(weights(job), start)


ON_RANKS = {
    **{name: {"advantage_estimator": name} for name in PRESETS},
    "norms": {"reward_running_norm": True, "advantages_norm": True, "advantage_clip": 1.0},
    "entropy": {"high_entropy_token_ratio": 0.3, "entropy_coef": 0.1},
    "corrections": {"rollout_correction": "token_tis"},
    "masks": {"rollout_correction": "seq_mask"},
    "dynamic": {"dynamic_sampling": True, "n_samples_per_prompt": 2, "train_batch_size": 8},
    # Few groups differ: ranks without their share of samples hold fillers.
    "fillers": {
        "dynamic_sampling": True,
        "dynamic_sampling_max_rounds": 1,
        "advantage_estimator": "cpgd",
        "cpgd_weight": "clip_filter",
        "reward_running_norm": True,
        "kl_controller": "adaptive",
        "functions": f"{ROOT}/tests/tiny_rewards.py:mostly",
    },
    "fillers in parts": {
        "dynamic_sampling": True,
        "dynamic_sampling_max_rounds": 1,
        "train_batch_size": 4,
        "micro_train_batch_size": 1,
        "functions": f"{ROOT}/tests/tiny_rewards.py:mostly",
    },
    "kl": {"kl_placement": "reward", "kl_controller": "adaptive"},
    "padded": {"packing_samples": False},
    "parts of groups": {"train_batch_size": 4, "micro_train_batch_size": 1},
}


def _first_steps(rank, folder, world_size):
    """Two optimizer steps on one rollout of every algorithm, so that ratios leave 1."""
    found = {}
    for name, options in ON_RANKS.items():
        common = {"train_batch_size": 8, "micro_train_batch_size": 2, "init_kl_coef": 0.01}
        common |= {"ref_pretrain": f"{folder}/ref", "max_steps": 1, "lr_warmup_ratio": 0.0}
        # Adam's first steps turn a rounding error of a tiny gradient into one of the learning rate.
        common["actor_learning_rate"] = 1e-4
        path = f"{folder}/{world_size}/{name}"
        config = tiny_config(world_size, save_path=path, **(common | options))
        job = Trainer(config, World(rank, world_size, rank, torch.device("cpu")))
        with job.reporter.logger:
            job._sync_weights()
            metrics = job.train_step()
        parameters = [
            p.full_tensor() if world_size > 1 else p for p in job.learner.policy.model.parameters()
        ]
        metrics["kl_coef"], metrics["drift_coef"] = job.learner.kl_coef, job.learner.drift_coef
        metrics["next lr"] = job.learner.policy.scheduler.get_last_lr()[0]
        metrics["sum of squares"] = sum(
            float(p.detach().double().square().sum()) for p in parameters
        )
        found[name] = metrics
    return found


@pytest.mark.slow
def test_every_algorithm_takes_the_same_step_on_1_and_2_ranks(tmp_path):
    load_model(MODEL, "random", seed=7).save_pretrained(tmp_path / "ref")
    alone = run_ranks(_first_steps, 1, str(tmp_path), 1)[0]
    assert alone["parts of groups"]["update/optimizer_steps"] == 4
    for name in ("fillers", "fillers in parts"):
        assert alone[name]["dynamic_sampling/groups_missing"] % 2 == 1
    for found in run_ranks(_first_steps, 2, str(tmp_path), 2):
        for name, metrics in found.items():
            assert metrics.keys() == alone[name].keys()
            for key, value in metrics.items():
                expected = pytest.approx(alone[name][key], rel=1e-6, abs=1e-6)
                assert value == expected, (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"policy_loss": "reinforce"}, True),
        ({"policy_loss": "ppo_clip"}, False),  # the preset's own
        ({"loss_aggregation": "token_mean"}, True),
        ({"advantages_norm": True}, True),
        ({"advantage_clip": 0.5}, True),
        ({"entropy_coef": 0.5}, True),
        ({"high_entropy_token_ratio": 0.3}, True),
        ({"overlong_filtering": True}, True),
        ({"reward_running_norm": True, "advantage_estimator": "dr_grpo"}, True),
        ({"reward_clip": 0.4}, True),
        ({"overlong_buffer_len": 2}, True),
        ({"overlong_buffer_len": 2, "overlong_penalty_factor": 0.1}, True),
        ({"dynamic_sampling": True}, False),  # all groups differ here already
        ({"first_token_temperature": 0.05}, True),
    ],
    ids=str,
)
def test_option_reaches_the_step(tmp_path, options, changes):
    base = {"advantage_estimator": options.get("advantage_estimator", "group_norm")}
    base |= {"train_batch_size": 4, "actor_learning_rate": 1e-2}  # several steps: ratios move
    plain = weights(run(tmp_path / "a", max_steps=1, **base))
    other = weights(run(tmp_path / "b", max_steps=1, **(base | options)))
    assert same(plain, other) is not changes


@pytest.mark.slow
def test_rollout_correction_weighs_the_loss(tmp_path):
    """With engine log-probs one nat too low, w = e: capped at 2 the gradient doubles."""
    norms = {}
    for correction in ("none", "token_tis", "seq_tis", "token_mask", "seq_mask"):
        folder = tmp_path / correction
        options = {} if correction == "none" else {"rollout_correction": correction}
        with trainer(folder, max_steps=1, max_norm=1e9, **options) as job:
            generate = job.engine.generate

            def shifted(prompts, sampling, generate=generate):
                found = generate(prompts, sampling)
                return [replace(c, logprobs=tuple(x - 1.0 for x in c.logprobs)) for c in found]

            job.engine.generate = shifted
            job.train()
        line = records(folder)[0]
        norms[correction] = line["grad_norm"]
        assert line["mismatch/logprob_abs_mean"] == pytest.approx(1.0, abs=1e-4)
        assert line["mismatch/effective_sample_size"] == pytest.approx(1.0, abs=1e-4)
    assert norms["token_tis"] == pytest.approx(2 * norms["none"], rel=1e-4)
    assert norms["seq_tis"] == pytest.approx(2 * norms["none"], rel=1e-4)
    assert norms["token_mask"] == norms["seq_mask"] == 0.0
    with trainer(
        tmp_path / "cap", rollout_correction="token_tis", rollout_correction_cap=3.0
    ) as job:
        assert job.learner.algorithm.rollout_correction_cap == 3.0


@pytest.mark.slow
def test_kl_in_the_reward_or_in_the_loss(tmp_path):
    """A reference of other weights, so that the KL is not 0 in the first step."""
    other = load_model(MODEL, "random", seed=7)
    other.save_pretrained(tmp_path / "ref")
    options = {"ref_pretrain": tmp_path / "ref", "init_kl_coef": 0.5, "kl_estimator": "k3"}
    inside = step_of(tmp_path / "a", **options, kl_placement="loss")
    outside = step_of(tmp_path / "b", **options, kl_placement="reward")
    assert inside["policy/kl"] == pytest.approx(outside["policy/kl"], rel=1e-5)
    assert inside["policy/loss"] > 0.4 * inside["policy/kl"]
    assert abs(outside["policy/loss"]) < 1e-3  # centered by group
    assert inside["grad_norm"] != pytest.approx(outside["grad_norm"], rel=1e-3)
    preset = step_of(tmp_path / "c", **options, advantage_estimator="reinforce_plus_plus")
    moved = step_of(
        tmp_path / "d", **options, advantage_estimator="reinforce_plus_plus", kl_placement="loss"
    )
    assert moved["policy/loss"] - preset["policy/loss"] > 0.4 * preset["policy/kl"]
    # Left out, the estimator in the reward is k1, whose mean here differs from k3's.
    del options["kl_estimator"]
    unset = step_of(tmp_path / "e", **options, kl_placement="reward")
    k1 = step_of(tmp_path / "f", **options, kl_placement="reward", kl_estimator="k1")
    assert unset["policy/kl"] == k1["policy/kl"] != outside["policy/kl"]
    assert unset["grad_norm"] == k1["grad_norm"] != outside["grad_norm"]


@pytest.mark.slow
def test_the_adaptive_coefficient_follows_its_target_and_is_saved(tmp_path):
    load_model(MODEL, "random", seed=7).save_pretrained(tmp_path / "ref")
    options = {
        "ref_pretrain": tmp_path / "ref",
        "init_kl_coef": 0.1,
        "kl_controller": "adaptive",
        "kl_target": 1e-9,
        "kl_horizon": 64,
    }
    run(tmp_path / "run", **options, max_steps=1)
    # Far above the target: 0.1 (1 + 0.2 x 16 samples / 64) = 0.105 for the second rollout.
    run(tmp_path / "run", **options, max_steps=2, load_checkpoint=True)
    found = [line["policy/kl_coef"] for line in records(tmp_path / "run")]
    assert found == pytest.approx([0.1, 0.105])
    below = run(
        tmp_path / "below", **(options | {"kl_target": 0.05, "kl_horizon": 32}), max_steps=1
    )
    kl = records(tmp_path / "below")[0]["policy/kl"]
    error = max(-0.2, min(0.2, kl / 0.05 - 1))
    assert below.learner.kl_coef == pytest.approx(0.1 * (1 + error * 16 / 32))


def test_cpgd_holds_to_the_old_policy_and_adapts(tmp_path):
    options = {"advantage_estimator": "cpgd", "train_batch_size": 4, "actor_learning_rate": 3e-2}
    drifts = {}
    for coefficient in (0.0, 20.0):
        job = run(tmp_path / str(coefficient), **options, max_steps=1, cpgd_drift_coef=coefficient)
        drifts[coefficient] = records(tmp_path / str(coefficient))[0]["policy/drift"]
    assert 0 < drifts[20.0] < drifts[0.0]
    # Above kl_target 0.01 by more than a fifth: 20 (1 + 0.2 x 16 / 10000).
    assert drifts[20.0] > 0.012
    assert job.learner.drift_coef == pytest.approx(20 * (1 + 0.2 * 16 / 10000))
    unweighted = step_of(tmp_path / "w", advantage_estimator="cpgd", cpgd_weight="none")
    weighted = step_of(tmp_path / "s", advantage_estimator="cpgd")
    assert unweighted["grad_norm"] != pytest.approx(weighted["grad_norm"], rel=1e-2)


def test_dual_clip(tmp_path):
    options = {"train_batch_size": 4, "actor_learning_rate": 0.1, "max_epochs": 2}
    plain = run(tmp_path / "a", **options, max_steps=1)
    bounded = run(tmp_path / "b", **options, max_steps=1, dual_clip=1.01)
    assert not same(weights(plain), weights(bounded))


@pytest.mark.slow
def test_gamma_and_lambd_reach_the_estimator(tmp_path):
    def norm(name, **options):
        return step_of(
            tmp_path / str(len(list(tmp_path.iterdir()))), advantage_estimator=name, **options
        )["grad_norm"]

    assert norm("reinforce") != pytest.approx(norm("reinforce", gamma=0.5), rel=1e-3)
    # The critic starts at 0, so that lambda alone decides how far a reward reaches back.
    assert norm("gae") != pytest.approx(norm("gae", lambd=0.1), rel=1e-3)


def test_dynamic_sampling_drops_equal_groups_and_refills(tmp_path):
    job = run(
        tmp_path,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=3,
        n_samples_per_prompt=2,
        train_batch_size=8,
        max_steps=4,
    )
    drawn = 0
    for step, line in enumerate(records(tmp_path), start=1):
        rows = rollout(tmp_path, step)
        groups = {}
        for row in rows:
            groups.setdefault(row["group"], set()).add(row["reward"])
        assert line["dynamic_sampling/groups_missing"] == 0
        assert len(groups) == 4
        assert all(len(rewards) == 2 for rewards in groups.values())
        drawn += line["dynamic_sampling/groups_drawn"]
    assert drawn > 16  # two samples are often equal: it had to draw again
    assert job.prompts.stream.position == drawn


def test_dynamic_sampling_ends_after_its_rounds(tmp_path):
    always = tmp_path / "always.py"
    always.write_text("def one(response):\n    return 1.0\n")
    run(
        tmp_path / "run",
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=2,
        functions=f"{always}:one",
        max_steps=2,
    )
    for line in records(tmp_path / "run"):
        assert line["dynamic_sampling/groups_drawn"] == 8
        assert line["dynamic_sampling/groups_missing"] == 4
        assert line["grad_norm"] == 0.0


def test_fire_draws_only_the_first_token_at_its_temperature(tmp_path):
    run(tmp_path, first_token_temperature=1e-4, min_new_tokens=2, max_steps=1)
    by_prompt = {}
    for row in rollout(tmp_path, 1):
        by_prompt.setdefault(row["prompt"], []).append(row["response"])
    # Nearly greedy first tokens: the samples of a prompt begin alike, and then differ.
    assert all(len({text[:1] for text in texts}) == 1 for texts in by_prompt.values())
    assert any(len(set(texts)) > 1 for texts in by_prompt.values())
    # The log-probs are those at `temperature`, which is what the trainer computes.
    assert records(tmp_path)[0]["mismatch/logprob_abs_max"] < 1e-5


# ---------------------------------------------------------------- the critic


def test_freezing_trains_the_critic_only(tmp_path):
    options = {"advantage_estimator": "gae", "critic_learning_rate": 1e-2, "max_steps": 2}
    with trainer(tmp_path / "a", **options, freezing_actor_steps=1) as job:
        start = weights(job)
        critic = [p.detach().clone() for p in job.learner.critic.model.parameters()]
        job._sync_weights()
        first = job.train_step()
        assert same(weights(job), start)
        assert first["update/optimizer_steps"] == 0
        assert first["policy/entropy"] > 0
        after = list(job.learner.critic.model.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(critic, after, strict=True))
        job.train_step()
        assert not same(weights(job), start)


@pytest.mark.slow
def test_the_critic_learns_the_returns(tmp_path):
    constant = tmp_path / "constant.py"
    constant.write_text("def half(response):\n    return 0.5\n")
    run(
        tmp_path / "run",
        advantage_estimator="gae",
        critic_learning_rate=1e-2,
        value_clip=10.0,
        lambd=1.0,  # so that every token's return is the reward
        functions=f"{constant}:half",
        max_steps=25,
        lr_decay="constant",
        freezing_actor_steps=25,
    )
    lines = records(tmp_path / "run")
    # An untrained critic says 0: (0.5 - 0)^2 / 2.
    assert lines[0]["critic/loss"] == pytest.approx(0.125)
    assert lines[-1]["critic/loss"] < 0.125 / 20
    assert lines[-1]["critic/value_mean"] == pytest.approx(0.5, abs=0.15)


def test_critic_options(tmp_path):
    load_model(MODEL, "random", seed=9).save_pretrained(tmp_path / "critic")
    options = {"advantage_estimator": "gae", "critic_pretrain": tmp_path / "critic"}
    with trainer(tmp_path / "a", **options, critic_learning_rate=3e-4, value_clip=0.125) as job:
        optimizer = job.learner.critic.optimizer
        assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-4}
        assert job.learner.algorithm.value_clip == 0.125
        loaded = load_model(str(tmp_path / "critic")).get_input_embeddings().weight
        assert torch.equal(job.learner.critic.model.model.get_input_embeddings().weight, loaded)
        assert not torch.equal(job.learner.model.get_input_embeddings().weight, loaded)


@pytest.mark.slow
def test_a_run_with_critic_and_running_norm_resumes_bit_identically(tmp_path):
    options = {
        "advantage_estimator": "gae",
        "critic_learning_rate": 1e-3,
        "reward_running_norm": True,
        "reward_running_norm_minus_mean": True,
    }
    whole = run(tmp_path / "a", **options, max_steps=4)
    run(tmp_path / "b", **options, max_steps=2)
    resumed = run(tmp_path / "b", **options, max_steps=4, load_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    critics = [job.learner.critic.model.state_dict() for job in (whole, resumed)]
    assert same(*critics)
    assert whole.learner.shaper.state_dict() == resumed.learner.shaper.state_dict()


# ---------------------------------------------------------------- a user's own

OWN = """
from torchrft.algorithms.advantages import Advantages, Rewards, center_by_group


def scaled(rewards: Rewards, scale: float = 1.0) -> Advantages:
    centered, _ = center_by_group(rewards.samples, rewards.group)
    return rewards.spread(scale * centered)


def faded(rewards: Rewards, *, gamma: float, weight: float) -> Advantages:
    steps = rewards.mask.cumsum(-1) - 1
    result = rewards.spread(weight * rewards.samples)
    return Advantages(result.advantages * gamma**steps, result.returns)


def usual(rewards: Rewards, weight: float) -> Advantages:
    return rewards.spread(weight * rewards.samples)


def needy(logprobs, old_logprobs, advantages, mask, eps: float):
    return -advantages * logprobs, {}


def valued(rewards: Rewards, values) -> Advantages:
    advantages = (rewards.samples[:, None] - values.double()).where(rewards.mask, 0.0).float()
    return Advantages(advantages, advantages + values)


def plain(logprobs, old_logprobs, advantages, mask, power: int = 1):
    return -advantages * logprobs**power, {"policy/mine": advantages}
"""


@pytest.mark.slow
def test_custom_algorithms(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    options = {"advantage_estimator": f"{own}:scaled", "max_norm": 1e9}
    base = step_of(
        tmp_path / "a",
        advantage_estimator="dr_grpo",
        policy_loss="reinforce",
        loss_aggregation="seq_mean_token_mean",
        max_norm=1e9,
    )
    mine = step_of(tmp_path / "b", **options, policy_loss=f"{own}:plain")
    assert mine["grad_norm"] == pytest.approx(base["grad_norm"], rel=1e-5)
    assert "policy/mine" in mine
    double = step_of(
        tmp_path / "c", **options, policy_loss=f"{own}:plain", advantage_options="{ scale = 2.0 }"
    )
    assert double["grad_norm"] == pytest.approx(2 * base["grad_norm"], rel=1e-5)
    square = step_of(
        tmp_path / "d", **options, policy_loss=f"{own}:plain", policy_loss_options="{ power = 2 }"
    )
    assert square["grad_norm"] != pytest.approx(base["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_a_users_estimator_takes_fields_of_the_job(tmp_path):
    """gamma, and the critic with its options, by the function's parameters."""
    own = tmp_path / "own.py"
    own.write_text(OWN)
    faded = {"advantage_estimator": f"{own}:faded", "advantage_options": "{ weight = 1.0 }"}
    norms = [
        step_of(tmp_path / str(gamma), **faded, gamma=gamma)["grad_norm"] for gamma in (1.0, 0.5)
    ]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
    valued = {"advantage_estimator": f"{own}:valued", "critic_learning_rate": 1e-3}
    job = run(tmp_path / "v", **valued, value_clip=0.125, freezing_actor_steps=1)
    assert job.learner.algorithm.value_clip == 0.125
    steps = [line["update/optimizer_steps"] for line in records(tmp_path / "v")]
    assert steps == [0, 1]


def test_a_users_estimator_starts_again_from_its_own_config(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    run(tmp_path / "a", advantage_estimator=f"{own}:scaled", max_steps=1)
    written = str(tmp_path / "a" / "config.toml")
    config = load(["--config_file", written, "--save_path", str(tmp_path / "b")], 1).config
    world = distributed.setup()
    try:
        assert Trainer(config, world).train() is None
    finally:
        distributed.teardown()
    assert records(tmp_path / "b")[0]["grad_norm"] == records(tmp_path / "a")[0]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.5}, "gamma has no effect: .*:scaled does not take it"),
        ({"value_clip": 0.1}, "value_clip has no effect: .*:scaled needs no critic"),
        (
            {"advantage_estimator": ":faded"},
            "faded: its option weight has no default and is not set",
        ),
        (
            {"advantage_estimator": ":usual"},
            "usual: its option weight has no default and is not set",
        ),
        ({"policy_loss": ":needy"}, "needy: its option eps has no default and is not set"),
        ({"advantage_options": "{ scal = 2.0 }"}, 'scaled has no option "scal"'),
        ({"advantage_options": "{ scale = 'x' }"}, "scaled: option scale = 'x': input should be a"),
        (
            {"policy_loss_options": "{ power = 1.5 }"},
            "plain: option power = 1.5: input should be a",
        ),
        ({"policy_loss": "own.py"}, None),
    ],
    ids=str,
)
def test_faults_of_custom_options_are_found_when_built(tmp_path, options, message):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    base = {"advantage_estimator": f"{own}:scaled", "policy_loss": f"{own}:plain"}
    options = {k: f"{own}{v}" if str(v).startswith(":") else v for k, v in options.items()}
    if message is None:
        with pytest.raises(ConfigError):
            tiny_config(**(base | options))
        return
    with (
        pytest.raises(ValueError, match=message),
        trainer(tmp_path / "run", **(base | options)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage_estimator": "rloo", "n_samples_per_prompt": 1, "train_batch_size": 4}, "rloo"),
        ({"policy_loss": "cpgd", "clip_range": 1.0}, "clip_range"),
        ({"lambd": 0.9}, "lambd"),
        ({"kl_controller": "adaptive"}, "kl_controller"),
        ({"rollout_correction": "token_tis", "rollout_correction_cap": 0.5}, "_cap"),
    ],
    ids=str,
)
def test_what_the_config_alone_shows_is_refused_there(options, message):
    with pytest.raises(ConfigError) as error:
        load(argv(**options), 1)
    assert any(message in fault for fault in error.value.faults)
