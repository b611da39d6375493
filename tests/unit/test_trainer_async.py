"""async_level = 1: the next rollout is generated while the trainer updates.

The engine is the native one, in another thread; servers are in tests/engines/test_remote_engine.py.
"""

import threading

import pytest
import tiny_job
from tiny_job import records, rollout

from torchrft import model_builder

ASYNC = {
    "engine_type": "vllm",
    "server_urls": "http://127.0.0.1:1",
    "async_level": 1,
    "rollout_correction": "token_tis",
    "max_steps": 5,
}


@pytest.fixture(autouse=True)
def native_in_place_of_servers(monkeypatch):
    build = model_builder.build_engine

    def native(config, *rest, **options):
        changed = {"engine_type": "native", "server_urls": []}
        return build(config.model_copy(update=changed), *rest, **options)

    monkeypatch.setattr(model_builder, "build_engine", native)


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
        generate, update = job.engine.generate, job.update.run
        calls = []

        def slow(prompts, sampling):
            calls.append(threading.current_thread() is threading.main_thread())
            if len(calls) == 2:
                assert updating.wait(60)
            return generate(prompts, sampling)

        def run(*rest):
            updating.set()
            return update(*rest)

        job.engine.generate, job.update.run = slow, run
        assert job.train() is None
    assert calls == [True, False]


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


def test_a_resumed_run_skips_no_prompt(tmp_path):
    """What was generated ahead is not saved: its prompts come again, with the newest weights."""
    tiny_job.run(tmp_path / "whole", **ASYNC)
    tiny_job.run(tmp_path / "cut", **(ASYNC | {"max_steps": 3}))
    tiny_job.run(tmp_path / "cut", **ASYNC, load_checkpoint="true")
    for step in range(1, 6):
        whole, cut = (responses(tmp_path / name, step) for name in ("whole", "cut"))
        assert [row[0] for row in whole] == [row[0] for row in cut]
    late = [record["rollout/staleness"] for record in records(tmp_path / "cut")]
    assert late == [0.0, 1.0, 1.0, 0.0, 1.0]
