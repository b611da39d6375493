"""The training loop as a whole, on runs of a few tiny steps in this process."""

import json
import math
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny_job import (
    ASSETS,
    MODEL,
    ROOT,
    SPREAD,
    argv,
    prompt_file,
    records,
    rollout,
    run,
    run_process,
    trainer,
    weights,
)

import torchrft.collector as collector_module
from torchrft.checkpoint import export_hf
from torchrft.config.manager import load
from torchrft.models.loader import load_model, load_tokenizer
from torchrft.types import SamplingParams

# DESIGN.md, "Contracts": what every line of metrics.jsonl has at least.
KEYS = [
    *("step", "episode", "reward/mean", "reward/std"),
    *("response_length/mean", "response_length/max", "response/truncated_ratio", "policy/loss"),
    *("policy/kl", "policy/entropy", "policy/clip_fraction", "grad_norm"),
    *("lr", "mismatch/logprob_abs_mean", "throughput/tokens_per_second", "time/rollout"),
    *("time/reward", "time/logprob", "time/update", "time/weight_sync"),
    *("time/step", "memory/peak_gib"),
]
EVAL = str(ASSETS / "max_digit" / "eval.jsonl")


def held_out_file(path, count=8):
    rows = [{"prompt": f"{1000 + i}=", "label": "held out"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def steps_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def same_weights(one, other, tolerance=0.0):
    return all(torch.allclose(v, other[k], atol=tolerance, rtol=0) for k, v in one.items())


# ------------------------------------------------------------- rollout and steps


@pytest.mark.parametrize(("prompts", "samples"), [(4, 4), (6, 2)])
def test_rollout_has_the_configured_size(tmp_path, prompts, samples):
    sizes = {"rollout_batch_size": prompts, "n_samples_per_prompt": samples}
    run(tmp_path, **sizes, train_batch_size=prompts * samples)
    texts = []
    for step in (1, 2):
        rows = rollout(tmp_path, step)
        groups = [row["group"] for row in rows]
        first = (step - 1) * prompts
        assert groups == [g for g in range(first, first + prompts) for _ in range(samples)]
        by_group = {g: {r["prompt"] for r in rows if r["group"] == g} for g in groups}
        assert all(len(found) == 1 for found in by_group.values())
        texts += [found.pop() for found in by_group.values()]
    assert len(set(texts)) == 2 * prompts


def test_max_steps_ends_the_run(tmp_path):
    job = run(tmp_path, max_steps=3)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert (job.progress.step, job.last_step, job.prompts.rollouts) == (3, 3, 450)
    assert steps_in(tmp_path / "checkpoints") == [3]


def test_without_max_steps_a_run_ends_after_its_episodes(tmp_path):
    prompts = prompt_file(tmp_path / "p.jsonl", 10)
    job = run(tmp_path, prompt_data=prompts, max_steps=None, num_episodes=2)
    assert job.progress.step == 5  # ceil(2 x 10 / 4)
    assert [record["episode"] for record in records(tmp_path)] == [0.4, 0.8, 1.2, 1.6, 2.0]
    seen = [row["row"] for step in range(1, 6) for row in rollout(tmp_path, step)[::4]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    # max_steps beyond that adds nothing.
    job = run(tmp_path / "b", prompt_data=prompts, max_steps=100, num_episodes=2)
    assert job.progress.step == 5


def test_metrics_hold_every_key_with_finite_values(tmp_path):
    run(tmp_path, init_kl_coef=0.1, eval_data=EVAL)
    lines = records(tmp_path)
    for line in lines:
        for key in KEYS:
            assert math.isfinite(line[key]), key
        phases = ("rollout", "reward", "logprob", "update", "weight_sync")
        assert 0 < sum(line[f"time/{name}"] for name in phases) < line["time/step"]
        rows = rollout(tmp_path, line["step"])
        rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        lengths = [row["length"] for row in rows]
        assert line["reward/mean"] == pytest.approx(float(rewards.mean()))
        assert line["reward/std"] == pytest.approx(float(rewards.std(correction=0)))
        assert line["response_length/mean"] == pytest.approx(sum(lengths) / 16)
        assert line["response_length/max"] == max(lengths) == 3
        cut = sum(row["finish_reason"] == "length" for row in rows) / 16
        assert line["response/truncated_ratio"] == cut > 0
        tokens = sum(lengths) + 16 * 5  # prompts are four digits and "="
        assert line["throughput/tokens_per_second"] == pytest.approx(tokens / line["time/step"])
        assert line["grad_norm"] > 0
        assert line["mismatch/logprob_abs_mean"] < 1e-5
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["policy/kl"] == pytest.approx(0.0, abs=1e-7)
    assert lines[1]["policy/kl"] > 1e-6


def test_rollout_rows(tmp_path):
    run(tmp_path, max_steps=1, functions=f"[{{name='exact_match', weight=2.0}}, '{SPREAD}']")
    tokenizer = load_tokenizer(MODEL)
    rows = rollout(tmp_path, 1)
    lines = (ASSETS / "max_digit" / "train.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    for row in rows:
        assert prompts[row["row"]] == {"prompt": row["prompt"], "label": row["label"]}
        parts = row["reward_parts"]
        assert list(parts) == ["exact_match", SPREAD]
        assert parts["exact_match"] == float(row["response"].strip() == row["label"])
        assert row["reward"] == 2 * parts["exact_match"] + parts[SPREAD]
        assert row["finish_reason"] in ("stop", "length")
        assert row["policy_version"] == 0
        shown = len(tokenizer(row["response"], add_special_tokens=False).input_ids)
        assert 1 <= row["length"] <= 3
        assert shown <= row["length"]
    assert len({row["reward"] for row in rows}) > 2


def test_the_engine_gets_the_new_weights_after_every_step(tmp_path):
    with trainer(tmp_path, max_steps=3) as job:
        job.train()
        versions = [rollout(tmp_path, step)[0]["policy_version"] for step in (1, 2, 3)]
        assert versions == [0, 1, 2]
    with trainer(tmp_path / "b") as job:
        job._sync_weights()
        before = weights(job)
        for _ in range(2):
            job.train_step()
            assert not same_weights(weights(job), before)
            assert same_weights(weights(job), dict(job.engine.model.named_parameters()))


@pytest.mark.parametrize("sleeps", [True, False])
def test_engine_sleeps_while_training(tmp_path, sleeps):
    with trainer(tmp_path, enable_engine_sleep=sleeps) as job:
        parameters = list(job.engine.model.parameters())
        seen = []

        def size():
            # Joined projections share one storage.
            storages = (p.data.untyped_storage() for p in parameters)
            return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

        for name in ("compute_logprobs", "update"):
            original = getattr(job.learner, name)

            def spy(batch, *rest, original=original):
                seen.append(size())
                return original(batch, *rest)

            setattr(job.learner, name, spy)
        # Asleep while the models are built, so that both never lie in memory at once.
        assert (size() == 0) is sleeps
        full = sum(p.nbytes for p in parameters)
        job.train()
        assert full > 10**6
        assert seen == [0 if sleeps else full] * 4


@pytest.mark.parametrize("alarm", [1e-9, 10.0])
def test_mismatch_alarm(tmp_path, alarm, caplog):
    with caplog.at_level("WARNING"), trainer(tmp_path, mismatch_alarm=alarm) as job:
        job.train()
    said = [record.message for record in caplog.records if "mismatch_alarm" in record.message]
    if alarm == 10.0:
        assert said == []
        return
    assert len(said) == 2
    value = records(tmp_path)[0]["mismatch/logprob_abs_mean"]
    assert said[0].startswith(
        "step 1: the engine's log-probs differ from the trainer's by "
        f"{value:.3g} on average, above mismatch_alarm = 1e-09"
    )


def test_deterministic_sets_torchs_switch(tmp_path):
    """On a CPU always; test_trainer_numerics.py has the rest."""
    for value in (True, False):
        with trainer(tmp_path, deterministic=value):
            assert torch.are_deterministic_algorithms_enabled()


def test_the_seed_decides_everything(tmp_path):
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    other = run(tmp_path / "c", seed=7)
    assert same_weights(weights(first), weights(again))
    assert not same_weights(weights(first), weights(other))
    for step in (1, 2):
        assert rollout(tmp_path / "a", step) == rollout(tmp_path / "b", step)
        assert rollout(tmp_path / "a", step) != rollout(tmp_path / "c", step)


# ------------------------------------------------------------- reference model


def test_reference_model_from_ref_pretrain(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    tokenizer = load_tokenizer(MODEL)
    export_hf(load_model(MODEL, "random", seed=5), tokenizer, folder, torch.float32)
    options = {"init_kl_coef": 0.1, "max_steps": 1}
    run(tmp_path / "other", **options, ref_pretrain=folder)
    run(tmp_path / "own", **options)
    own, other = records(tmp_path / "own")[0], records(tmp_path / "other")[0]
    assert own["policy/kl"] == pytest.approx(0.0, abs=1e-7)
    assert other["policy/kl"] > 1e-3
    assert other["policy/loss"] > own["policy/loss"] + 0.1 * 0.9 * other["policy/kl"]
    # The same weights as the policy's give no KL either: the folder is really what is read.
    same = tmp_path / "same"
    same.mkdir()
    export_hf(load_model(MODEL, "random", seed=42), tokenizer, same, torch.float32)
    run(tmp_path / "third", **options, ref_pretrain=same)
    assert records(tmp_path / "third")[0]["policy/kl"] == pytest.approx(0.0, abs=1e-7)


def test_no_reference_model_without_a_kl_term(tmp_path):
    with trainer(tmp_path) as job:
        assert job.learner.reference is None
    with trainer(tmp_path, init_kl_coef=0.1) as job:
        reference = dict(job.learner.reference.model.named_parameters())
        assert same_weights(weights(job), reference)
        assert not any(p.requires_grad for p in reference.values())
        assert all(p is not reference[n] for n, p in job.learner.model.named_parameters())


# ------------------------------------------------------------- batches


@pytest.fixture
def seeds_by_sample(monkeypatch):
    """What is sampled for a prompt depends on the weights only, not on the step or its place."""
    monkeypatch.setattr(collector_module, "derive_seed", lambda *parts: parts[-1])


def test_a_batch_larger_than_a_rollout_accumulates(tmp_path, seeds_by_sample):
    options = {"loss_aggregation": "token_mean", "lr_warmup_ratio": 0.0, "train_batch_size": 32}
    small = run(tmp_path / "a", **options, max_steps=4)
    large = run(tmp_path / "b", **options, max_steps=2, rollout_batch_size=8)
    first, second, third, fourth = records(tmp_path / "a")
    assert first.keys() == second.keys()
    waits = {name for name, value in first.items() if value is None}
    assert waits == {
        *("policy/loss", "policy/kl", "policy/approx_kl", "policy/entropy"),
        *("policy/clip_fraction", "grad_norm", "mismatch/logprob_abs_mean"),
        *("mismatch/logprob_abs_max", "mismatch/kl", "mismatch/effective_sample_size"),
    }
    assert (first["time/update"], first["update/optimizer_steps"]) == (0, 0)
    assert (third["policy/loss"], first["lr"]) == (None, second["lr"])
    assert (second["update/optimizer_steps"], fourth["update/optimizer_steps"]) == (1, 1)
    for mine, theirs in zip((second, fourth), records(tmp_path / "b"), strict=True):
        for name in ("policy/loss", "grad_norm", "lr", "policy/entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
        assert mine["grad_norm"] > 0
        assert abs(mine["policy/loss"]) > 1e-4
    assert same_weights(weights(small), weights(large), tolerance=1e-6)
    rows = rollout(tmp_path / "a", 1) + rollout(tmp_path / "a", 2)
    assert [row["response"] for row in rows] == [
        row["response"] for row in rollout(tmp_path / "b", 1)
    ]


def test_what_is_left_at_the_end_makes_a_step(tmp_path, seeds_by_sample):
    # 3 rollouts of 16 with batches of 32: the third rollout is a step of its own.
    prompts = prompt_file(tmp_path / "p.jsonl", 12)
    job = run(tmp_path / "a", prompt_data=prompts, max_steps=None, train_batch_size=32)
    lines = records(tmp_path / "a")
    assert [line["policy/loss"] is not None for line in lines] == [False, True, True]
    assert lines[2]["update/optimizer_steps"] == 1
    assert lines[2]["grad_norm"] > 0
    assert job.progress.pending == []
    # max_steps ends a run before its time: what is pending then is for the run that goes on.
    job = run(tmp_path / "b", prompt_data=prompts, max_steps=1, train_batch_size=32)
    assert len(job.progress.pending) == 16
    assert records(tmp_path / "b")[0]["policy/loss"] is None


def test_a_batch_smaller_than_a_rollout_makes_several_steps(tmp_path):
    run(tmp_path, train_batch_size=4, max_epochs=2)
    for line in records(tmp_path):
        assert line["update/optimizer_steps"] == 2 * 16 / 4
        assert line["policy/approx_kl"] > 0


# ------------------------------------------------------------- evaluation


@pytest.mark.slow
def test_evaluation(tmp_path):
    options = {"eval_data": EVAL, "functions": "exact_match", "max_steps": 7}
    run(tmp_path / "a", **options, eval_steps=2, train_batch_size=16)
    evaluated = [r["step"] for r in records(tmp_path / "a") if "eval/reward/mean" in r]
    assert evaluated == [1, 3, 5, 7]  # before step 1, every 2 steps, at the end
    run(tmp_path / "b", **options)
    evaluated = [r["step"] for r in records(tmp_path / "b") if "eval/reward/mean" in r]
    assert evaluated == [1, 7]
    run(tmp_path / "c", max_steps=2)
    assert not any("eval/reward/mean" in record for record in records(tmp_path / "c"))


def test_evaluation_before_the_first_step_is_that_of_the_untrained_policy(tmp_path):
    options = {"eval_data": EVAL, "eval_steps": 1, "max_steps": 4, "actor_learning_rate": 0.01}
    with trainer(tmp_path / "a", **options) as job:
        job._sync_weights()
        untrained = job.evaluate()["eval/reward/mean"]
        job.train()
        with_trained = records(tmp_path / "a")
        assert with_trained[0]["eval/reward/mean"] == untrained
    values = [record["eval/reward/mean"] for record in with_trained]
    assert values[-1] != untrained
    # The last line belongs to the policy after all steps: the one that was saved.
    with trainer(tmp_path / "b", **(options | {"max_steps": 5})) as job:
        exported = load_file(tmp_path / "a" / "hf" / "step-4" / "model.safetensors")
        job.engine.wake()
        job.engine.update_weights(exported.items(), version=4)
        assert job.evaluate()["eval/reward/mean"] == values[-1]


def test_evaluation_is_greedy_and_does_not_disturb_training(tmp_path):
    with trainer(tmp_path / "a", eval_data=EVAL, eval_steps=1) as job:
        seen: list[SamplingParams] = []
        generate = job.engine.generate

        def spy(prompts, sampling):
            seen.append((len(prompts), sampling.n, sampling.temperature))
            return generate(prompts, sampling)

        job.engine.generate = spy
        job.train()
        evaluated = weights(job)
    count = len(Path(EVAL).read_text().splitlines())
    assert seen == [(count, 1, 0.0), (4, 4, 1.0), (4, 4, 1.0), (count, 1, 0.0)]
    assert same_weights(weights(run(tmp_path / "b")), evaluated)


def test_eval_data_is_what_is_evaluated(tmp_path):
    held_out = held_out_file(tmp_path / "held_out.jsonl")
    function = f"{ROOT}/tests/tiny_rewards.py:held_out"
    run(tmp_path, eval_data=held_out, functions=function)
    for record in records(tmp_path):
        assert record["eval/reward/mean"] == 1.0
        assert record["reward/mean"] == 0.0


# ------------------------------------------------------------- what a run writes


def test_what_a_run_writes(tmp_path):
    save_path = tmp_path / "deep" / "run"
    job = run(save_path, plot_every=2)
    assert sorted(path.name for path in save_path.iterdir()) == [
        *("checkpoints", "config.toml", "hf", "logs")
    ]
    assert steps_in(save_path / "checkpoints") == steps_in(save_path / "hf") == [2]
    logs = save_path / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["metrics.jsonl", "plots", "rollouts"]
    assert sorted(p.name for p in (logs / "rollouts").iterdir()) == ["step-1.jsonl", "step-2.jsonl"]
    plots = sorted(p.name for p in (logs / "plots").iterdir())
    assert plots == ["lengths-step-2.png", "reward.png"]
    assert load(["--config_file", str(save_path / "config.toml")], 1).config == job.config
    exported = load_file(save_path / "hf" / "step-2" / "model.safetensors")
    for name, value in weights(job).items():
        assert torch.equal(exported[name], value)


def test_log_dir(tmp_path):
    run(tmp_path / "run", log_dir=tmp_path / "elsewhere")
    assert not (tmp_path / "run" / "logs").exists()
    names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert names == ["metrics.jsonl", "plots", "rollouts"]


def test_tensorboard_and_wandb_get_the_metrics(tmp_path, monkeypatch):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class FakeRun:
        logged: ClassVar[list] = []

        def log(self, metrics, step):
            self.logged.append((step, metrics["reward/mean"]))

        def finish(self):
            self.logged.append("finished")

    def fake_init(**options):
        FakeRun.options = options
        return FakeRun()

    monkeypatch.setattr(wandb, "init", fake_init)
    board = tmp_path / "board"
    options = {"use_wandb": "project", "wandb_org": "org", "wandb_run_name": "name"}
    run(tmp_path / "run", use_tensorboard=board, **options)
    rewards = [(line["step"], line["reward/mean"]) for line in records(tmp_path / "run")]
    events = EventAccumulator(str(board))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert seen == rewards  # multiples of 1/64, exact in float32
    assert FakeRun.logged == [*rewards, "finished"]
    kept = {key: FakeRun.options[key] for key in ("project", "entity", "name")}
    assert kept == {"project": "project", "entity": "org", "name": "name"}
    assert FakeRun.options["config"]["rollout"]["rollout_batch_size"] == 4


def test_optimizer_and_sharding_options_reach_the_update(tmp_path):
    options = {"max_norm": 0.25, "l2": 0.125, "adam_betas": "0.5,0.75", "zero_stage": 1}
    with trainer(tmp_path, **options) as job:
        assert job.learner.policy.max_norm == 0.25
        assert job.learner.policy.reduce_every_micro_batch is False
        assert {group["betas"] for group in job.learner.policy.optimizer.param_groups} == {
            (0.5, 0.75)
        }
        assert [group["weight_decay"] for group in job.learner.policy.optimizer.param_groups] == [
            0.125,
            0.0,
        ]
        assert job.learner.policy.max_response_length == 3
        assert job.learner.policy.max_len == 16
    with trainer(tmp_path, max_new_tokens=None, stop_token_ids=None) as job:
        assert job.learner.policy.reduce_every_micro_batch is True
        assert job.learner.policy.max_response_length == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "saved"),
    [
        # 10 prompts in rollouts of 4: passes end within steps 3, 5, 8, 10; there are 10 steps.
        ({"save_interval": 1}, [3, 5, 8, 10]),
        ({"save_interval": 2}, [5, 10]),
        ({"save_interval": 3}, [8, 10]),  # and the last step always
        ({"save_interval": 9, "save_steps": 4}, [4, 8, 10]),
        ({"save_interval": 2, "save_steps": 4}, [4, 5, 8, 10]),
        ({"save_interval": 1, "max_ckpt_num": 2}, [8, 10]),
    ],
    ids=str,
)
def test_save_interval_and_steps(tmp_path, options, saved):
    prompts = prompt_file(tmp_path / "p.jsonl", 10)
    options = {"max_ckpt_num": 100} | options
    run(tmp_path / "run", prompt_data=prompts, max_steps=None, num_episodes=4, **options)
    assert steps_in(tmp_path / "run" / "checkpoints") == saved
    assert steps_in(tmp_path / "run" / "hf") == saved


def test_a_pass_ends_where_it_ends_in_whole_numbers(tmp_path):
    # 3 prompts, 1 a step: with quotients of floats, step 13 seemed to end the fourth pass again.
    prompts = prompt_file(tmp_path / "p.jsonl", 3)
    options = {"rollout_batch_size": 1, "train_batch_size": 4, "max_ckpt_num": 100}
    with trainer(tmp_path, prompt_data=prompts, num_episodes=6, max_steps=None, **options) as job:
        due = []
        for job.progress.step in range(1, 18):
            job.progress.began_at = job.prompts.stream.position
            job.prompts.stream.next()
            due += [job.progress.step] if job._save_is_due() else []
    assert due == [3, 6, 9, 12, 15]


def test_max_ckpt_mem_is_in_gigabytes(tmp_path):
    with trainer(tmp_path, max_ckpt_mem=3, max_ckpt_num=7) as job:
        assert (job.checkpoints.max_bytes, job.checkpoints.max_num) == (3 * 10**9, 7)


def test_a_second_fresh_run_sets_the_first_aside(tmp_path):
    run(tmp_path)
    first = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    run(tmp_path, seed=7, max_steps=1)
    kept = tmp_path / "previous-1"
    for path, content in first.items():
        assert (kept / path).read_bytes() == content, path
    assert [record["step"] for record in records(tmp_path)] == [1]
    assert steps_in(tmp_path / "checkpoints") == [1]
    run(tmp_path, max_steps=1)
    assert (tmp_path / "previous-2" / "logs" / "metrics.jsonl").exists()
    assert not (tmp_path / "previous-3").exists()


# ------------------------------------------------------------- jobs that cannot start


def bad_jobs(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1=", "label": "1"}\n{"prompt": 5}\n')
    bare = tmp_path / "bare_model"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_text((ROOT / "tests/assets/debug_model" / name).read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    return {
        "no prompt file": ({"prompt_data": "no/such.jsonl"}, "no/such.jsonl"),
        "bad prompt row": ({"prompt_data": broken}, "line 2"),
        "no eval file": ({"eval_data": "no/such.jsonl"}, "eval_data"),
        "no model folder": ({"pretrain": empty}, str(empty)),
        "no weights": ({"pretrain": MODEL, "init": "pretrained"}, '"random"'),
        "unknown reward": ({"functions": "exact_mach"}, 'did you mean "exact_match"'),
        "no chat template": ({"pretrain": bare, "apply_chat_template": "true"}, "chat template"),
        "bad checkpoint": (
            {"load_checkpoint": "true", "ckpt_path": empty},
            "holds no complete checkpoint",
        ),
    }


def test_a_job_that_cannot_start_exits_with_2_and_one_line(tmp_path):
    run(tmp_path / "run", max_steps=1)
    for name, (options, text) in bad_jobs(tmp_path).items():
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        code = run_process(argv(save_path=tmp_path / "run", **options), log)
        lines = log.read_text().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert code == 2, (name, lines)
        assert len(errors) == 1, (name, lines)
        assert text in errors[0], name
        assert "Traceback" not in log.read_text(), name
    # None of them has touched the run that lay there.
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").glob("previous-*"))


def test_python_dash_m_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torchrft.train",
            *argv(save_path=tmp_path, prompt_data="no/p.jsonl"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 2
    assert "no/p.jsonl" in done.stderr
    assert [line[:7] for line in done.stderr.strip().splitlines()] == ["error: "]
    assert done.stdout == ""


def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path):
    with trainer(tmp_path, max_steps=5) as job:
        log = job.reporter.logger.log

        def log_and_stop(step, metrics):
            log(step, metrics)
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

        job.reporter.logger.log = log_and_stop
        assert job.train() == signal.SIGTERM
    assert job.progress.step == 3  # the step that was under way when the loop looked
    assert steps_in(tmp_path / "checkpoints") == [3]
    assert tomllib.loads((tmp_path / "config.toml").read_text())["training"]["max_steps"] == 5
