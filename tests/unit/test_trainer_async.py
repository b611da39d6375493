"""async_level = 1: the next rollout is generated while the trainer updates.

The engine is the native one, in another thread; servers are in tests/engines/test_remote_engine.py.
"""

import threading

import pytest
import tiny_job
import torch
from helpers import run_ranks
from tiny_job import records, rollout

from torchrft.build import rollout as engines
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer

ASYNC = {
    "engine_type": "vllm",
    "server_urls": "http://127.0.0.1:1",
    "async_level": 1,
    "rollout_correction": "token_tis",
    "max_steps": 5,
}


@pytest.fixture(autouse=True)
def native_in_place_of_servers(monkeypatch):
    build = engines.build_engine

    def native(config, *rest, **options):
        changed = {"engine_type": "native", "server_urls": []}
        return build(config.model_copy(update=changed), *rest, **options)

    monkeypatch.setattr(engines, "build_engine", native)


def responses(path, step):
    return [(row["row"], row["response"], row["policy_version"]) for row in rollout(path, step)]


def test_versions_and_prompts(tmp_path):
    """With a policy that stands still, level 1 makes the very samples of level 0."""
    still = {"actor_learning_rate": "1e-30"}
    tiny_job.run(tmp_path / "on", **(ASYNC | {"async_level": 0}), **still)
    tiny_job.run(tmp_path / "off", **ASYNC, **still)
    for step in range(1, 6):
        on, off = (responses(tmp_path / name, step) for name in ("on", "off"))
        assert [row[:2] for row in on] == [row[:2] for row in off]
        assert {row[2] for row in on} == {step - 1}
        assert {row[2] for row in off} == {max(step - 2, 0)}
    for name, late in (("on", [0.0] * 5), ("off", [0.0, 1.0, 1.0, 1.0, 1.0])):
        assert [record["rollout/staleness"] for record in records(tmp_path / name)] == late


@pytest.mark.slow
def test_a_late_rollout_is_that_of_the_earlier_policy(tmp_path):
    """Step 2 of level 1 is made by the weights that made step 1's samples."""
    fast = {"actor_learning_rate": "0.05"}
    tiny_job.run(tmp_path / "on", **(ASYNC | {"async_level": 0}), **fast)
    tiny_job.run(tmp_path / "off", **ASYNC, **fast)
    tiny_job.run(tmp_path / "still", **ASYNC, actor_learning_rate="1e-30")
    assert responses(tmp_path / "off", 2) == responses(tmp_path / "still", 2)
    assert responses(tmp_path / "off", 2) != responses(tmp_path / "on", 2)


def test_generation_and_update_overlap(tmp_path):
    """The second rollout does not end before the first update has begun."""
    with tiny_job.trainer(tmp_path, **(ASYNC | {"max_steps": 2})) as job:
        updating = threading.Event()
        generate, update = job.engine.generate, job.learner.update
        calls = []

        def slow(prompts, sampling):
            calls.append(threading.current_thread() is threading.main_thread())
            if len(calls) == 2:
                assert updating.wait(60)
            return generate(prompts, sampling)

        def run(*rest):
            updating.set()
            return update(*rest)

        job.engine.generate, job.learner.update = slow, run
        assert job.train() is None
    assert calls == [True, False, False]  # the last one for a run that goes on beyond max_steps


def test_an_error_in_the_thread_ends_the_run(tmp_path):
    with tiny_job.trainer(tmp_path, **ASYNC) as job:
        generate = job.engine.generate
        calls = []

        def fails(prompts, sampling):
            calls.append(1)
            if len(calls) == 3:
                raise ConnectionError("no rollout server is left")
            return generate(prompts, sampling)

        job.engine.generate = fails
        with pytest.raises(ConnectionError, match="no rollout server is left"):
            job.train()
    assert len(records(tmp_path)) == 1


def test_a_run_that_max_steps_stopped_goes_on_as_one_that_never_stopped(tmp_path):
    tiny_job.run(tmp_path / "whole", **ASYNC)
    tiny_job.run(tmp_path / "cut", **(ASYNC | {"max_steps": 3}))
    tiny_job.run(tmp_path / "cut", **ASYNC, load_checkpoint="true")
    assert_same(tmp_path / "whole", tmp_path / "cut", 5)
    late = [record["rollout/staleness"] for record in records(tmp_path / "cut")]
    assert late == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_a_run_killed_at_a_checkpoint_resumes_bit_identically(tmp_path):
    """What was generated beside the update is in the checkpoint, with its log-probs."""
    options = ASYNC | {"save_steps": 2, "max_steps": 6, "train_batch_size": 32}
    whole = tiny_job.run(tmp_path / "whole", **options)

    class KilledError(BaseException):
        pass

    with tiny_job.trainer(tmp_path / "cut", **options) as job:
        save = job.save

        def dies():
            save()
            raise KilledError

        job.save = dies
        with pytest.raises(KilledError):
            job.train()
    assert len(records(tmp_path / "cut")) == 2
    with tiny_job.trainer(tmp_path / "cut", **options, load_checkpoint="true") as job:
        assert job.collector.flight.position == job.prompts.stream.position
        flown = job.collector.flight.completions.result()
        assert {completion.policy_version for completion in flown} == {1}
        assert len(flown) == 16
        job.train()
    assert_same(tmp_path / "whole", tmp_path / "cut", 6)
    assert whole.progress.step == job.progress.step


def assert_same(whole, cut, steps):
    ends = [path / "hf" / f"step-{steps}" / "model.safetensors" for path in (whole, cut)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    for step in range(1, steps + 1):
        assert rollout(whole, step) == rollout(cut, step)
    measured = ("time/", "throughput/", "memory/")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(measured)} for row in records(path)]
        for path in (whole, cut)
    ]
    assert rows[0] == rows[1]


def test_a_reward_that_fails_loses_neither_steps_nor_what_was_generated(tmp_path):
    """By then the next flight has landed, or the one of this step was taken."""
    options = ASYNC | {"max_steps": 5}
    tiny_job.run(tmp_path / "whole", **options)
    with tiny_job.trainer(tmp_path / "cut", **options) as job:
        score, calls = job.collector.scorer.score, []

        def fails(*rest):
            calls.append(1)
            if len(calls) == 4:
                raise ValueError("the reward server has gone")
            return score(*rest)

        job.collector.scorer.score = fails
        with pytest.raises(ValueError, match="has gone"):
            job.train()
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-3"]
    tiny_job.run(tmp_path / "cut", **options, load_checkpoint="true")
    assert_same(tmp_path / "whole", tmp_path / "cut", 5)


def _on_two_ranks(rank, folder, options):
    build = engines.build_engine
    changed = {"engine_type": "native", "server_urls": []}
    engines.build_engine = lambda config, *rest, **more: build(
        config.model_copy(update=changed), *rest, **more
    )
    config = tiny_job.tiny_config(2, save_path=folder, **options)
    job = Trainer(config, World(rank, 2, rank, torch.device("cpu")))
    landed = job.collector.flight is not None and len(job.collector.flight.completions.result())
    job.train()
    return landed


@pytest.mark.slow
def test_ranks_share_what_was_generated_ahead(tmp_path):
    """Each rank takes up what it had generated; on one rank, that takes up everything."""
    options = ASYNC | {"max_steps": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ranks(_on_two_ranks, 2, str(whole), options)
    run_ranks(_on_two_ranks, 2, str(cut), options | {"max_steps": 2})
    with tiny_job.trainer(cut, **options, load_checkpoint="true") as job:
        flown = job.collector.flight.completions.result()
    assert [(c.prompt_index, c.sample_index) for c in flown] == [divmod(i, 4) for i in range(16)]
    assert run_ranks(_on_two_ranks, 2, str(cut), options | {"load_checkpoint": "true"}) == [8, 8]
    assert_same(whole, cut, 4)


def test_other_sampling_options_generate_anew(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("torchrft.collector.logger.propagate", True)
    tiny_job.run(tmp_path, **(ASYNC | {"max_steps": 2}))
    changed = ASYNC | {"max_steps": 3, "temperature": "0.5", "load_checkpoint": "true"}
    tiny_job.run(tmp_path, **changed)
    assert "what was generated ahead is generated anew" in caplog.text
    assert [record["rollout/staleness"] for record in records(tmp_path)] == [0.0, 1.0, 0.0]
