"""Whole runs with rewards other than the default job's rule."""

import json

import pytest
import tiny_job
import torch
from helpers import run_ranks
from tiny_job import ASSETS, IN_PROCESS, SPREAD, records, rollout, tiny_config

from torchrft.rewards import RewardError, RewardResult
from torchrft.rewards.scorer import Scorer, Weighted
from torchrft.tools import distributed
from torchrft.tools.distributed import DataRanks, World
from torchrft.trainer import Trainer
from torchrft.types import Completion, Prompt

OWN = """
import asyncio
from torchrft.rewards import RewardResult

def single(token_ids):
    return sum(token_ids) % 5 / 4

def many(responses, labels, token_ids):
    parts = [{"length": len(ids)} for ids in token_ids]
    return [RewardResult(len(r) / 8, part) for r, part in zip(responses, parts)]

async def later(prompt, response):
    await asyncio.sleep(0.001)
    return len(prompt) - len(response)

def hangs(token_ids):
    while sum(token_ids) % 5 == 0:
        pass
    return 1.0

def nan(token_ids):
    return float("nan") if sum(token_ids) % 5 == 0 else 1.0
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def entries(own, *names, **options):
    """`functions` as a flag."""
    more = "".join(f", {name} = {json.dumps(value)}" for name, value in options.items())
    tables = [f'{{ name = "{own}:{name}", alias = "{name}"{more} }}' for name in names]
    return f"[{', '.join(tables)}]"


def test_the_job_trains_with_functions_of_the_users(own, tmp_path):
    """One by one, a batch, and async; in workers or not, the run is the same."""
    jobs = []
    for isolate in (True, False):
        folder = tmp_path / str(isolate)
        functions = entries(own, "single", "many", "later", isolate=isolate)
        jobs.append(tiny_job.run(folder, functions=functions, reward_workers=2))
        for step in (1, 2):
            for row in rollout(folder, step):
                parts = row["reward_parts"]
                assert list(parts) == ["single", "many", "many/length", "later"]
                assert parts["many"] == len(row["response"]) / 8
                assert parts["many/length"] == row["length"]
                assert parts["later"] == len(row["prompt"]) - len(row["response"])
                assert row["reward"] == parts["single"] + parts["many"] + parts["later"]
        assert all(line["grad_norm"] > 1e-3 for line in records(folder))
    for name, value in tiny_job.weights(jobs[0]).items():
        assert torch.equal(value, tiny_job.weights(jobs[1])[name]), name


def test_a_column_chooses_the_rewards_of_a_row(own, tmp_path):
    rows = [json.loads(line) for line in (ASSETS / "max_digit" / "train.jsonl").open()][:8]
    prompts = tmp_path / "prompts.jsonl"

    def write(*kinds):
        lines = [json.dumps({**row, "kind": kinds[i % len(kinds)]}) for i, row in enumerate(rows)]
        prompts.write_text("\n".join(lines))

    options = {
        "functions": entries(own, "single", "later", isolate=False),
        "prompt_data": prompts,
        "source_key": "kind",
        "recipes": "{ a = ['single'], b = ['later', 'single'] }",
    }
    write("a", "b")
    tiny_job.run(tmp_path / "run", **options)
    found = [row for step in (1, 2) for row in rollout(tmp_path / "run", step)]
    assert {row["row"] % 2 for row in found} == {0, 1}
    for row in found:
        assert set(row["reward_parts"]) == ({"single", "later"} if row["row"] % 2 else {"single"})
    write("a", "c")
    with pytest.raises(ValueError, match=r"prompt row 1: kind = 'c' has no recipe"):
        tiny_job.run(tmp_path / "other", **options)
    prompts.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="kind"):
        tiny_job.run(tmp_path / "third", **options)


def test_a_rule_that_hangs_costs_its_samples_and_the_run_goes_on(own, tmp_path):
    functions = entries(own, "hangs")
    options = {"reward_timeout": 2, "error_reward": -3, "reward_workers": 4, "max_steps": 1}
    tiny_job.run(tmp_path / "run", functions=functions, **options)
    values = [row["reward"] for row in rollout(tmp_path / "run", 1)]
    assert set(values) == {-3.0, 1.0}
    (line,) = records(tmp_path / "run")
    assert line["reward/hangs/errors"] == values.count(-3.0)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_reward_that_is_no_number_stops_before_the_optimizer(isolate, own, tmp_path):
    functions = entries(own, "nan", isolate=isolate)
    with tiny_job.trainer(tmp_path / "run", functions=functions) as job:
        before = tiny_job.weights(job)
        with pytest.raises(RewardError, match=r"reward function 'nan', prompt row \d+: .* got nan"):
            job.train()
        job.collector.scorer.close()
        for name, value in tiny_job.weights(job).items():
            assert torch.equal(value, before[name])
        assert not (tmp_path / "run" / "hf").exists()


NORMALIZED = {
    "functions": f'[{{ name = "{SPREAD}", isolate = false, normalize = true, weight = 2.0 }}, '
    '{ name = "length", options = { target = 1, limit = 4 } }]',
    "overlong_buffer_len": 2,
}


def test_a_run_with_normalized_rewards_resumes_bit_identically(tmp_path):
    whole = tiny_job.run(tmp_path / "whole", max_steps=4, **NORMALIZED)
    tiny_job.run(tmp_path / "parts", max_steps=2, **NORMALIZED)
    resumed = tiny_job.run(tmp_path / "parts", max_steps=4, load_checkpoint="true", **NORMALIZED)
    assert rollout(tmp_path / "parts", 4) == rollout(tmp_path / "whole", 4)
    for name, value in tiny_job.weights(whole).items():
        assert torch.equal(value, tiny_job.weights(resumed)[name]), name
    # The value is the z-score, twice, plus the other reward and the penalty; the parts are raw.
    rows = rollout(tmp_path / "whole", 1)
    raw = torch.tensor([row["reward_parts"][SPREAD] for row in rows], dtype=torch.float64)
    z = (raw - raw.mean()) / raw.std()
    rest = [row["reward_parts"]["length"] + row["reward_parts"]["overlong"] for row in rows]
    expected = 2 * z + torch.tensor(rest, dtype=torch.float64)
    assert [row["reward"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


def train(rank, folder, world_size):
    torch.set_num_threads(1)
    config = tiny_config(world_size, save_path=folder, init_kl_coef=0.0, **NORMALIZED)
    Trainer(config, World(rank, world_size, rank, torch.device("cpu"))).train()


def test_normalization_does_not_depend_on_the_number_of_ranks(tmp_path):
    for ranks in (1, 2):
        run_ranks(train, ranks, str(tmp_path / str(ranks)), ranks)
    one, two = (rollout(tmp_path / str(ranks), 1) for ranks in (1, 2))
    assert [row["reward"] for row in one] == [row["reward"] for row in two]


class Together:
    """Sums over ranks in each call, as a sharded model does."""

    name, collective = "together", True

    def score(self, requests):
        total = DataRanks.all().sum({"n": len(requests)}, "together")["n"]
        return [RewardResult(total)] * len(requests)

    def close(self):
        pass


class Alone:
    name, collective = "alone", False

    def __init__(self, fails):
        self.fails = fails

    def score(self, requests):
        if self.fails:
            raise RewardError("prompt row 3: no")
        return [RewardResult(1.0)] * len(requests)

    def close(self):
        pass


def ask(rank, fails):
    scorer = Scorer([Weighted(Alone(fails and rank == 1)), Weighted(Together())])
    prompts = [Prompt(3, "", (1,))]
    completions = [Completion(0, i, (1,), (0.0,), "", "stop") for i in range(rank)]
    try:
        parts = distributed.on_all(lambda: scorer.score(prompts, completions), "reward")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [score.value for part in parts for score in part]


def test_a_failure_of_one_rank_does_not_leave_the_others_in_a_collective_source():
    assert run_ranks(ask, 2, False) == [[2.0], [2.0]]
    first, second = run_ranks(ask, 2, True)
    assert second == "RewardError: prompt row 3: no"
    assert first == "RankError: rank 1 failed in phase 'reward': RewardError: prompt row 3: no"


def test_a_job_whose_reward_fails_ends_with_a_line(own, tmp_path):
    words = tiny_job.argv(save_path=tmp_path / "run", functions=entries(own, "nan"))
    assert tiny_job.run_process(words, tmp_path / "log") == 1
    (line,) = [x for x in (tmp_path / "log").read_text().splitlines() if x.startswith("error: ")]
    assert "reward function 'nan', prompt row" in line


def test_the_tiny_job_itself_needs_no_worker(tmp_path):
    """What makes the other tests quick."""
    job = tiny_job.run(tmp_path, max_steps=1)
    (source,) = job.collector.scorer.sources.values()
    assert source.pool is None
    assert IN_PROCESS.count("isolate = false") == 1
