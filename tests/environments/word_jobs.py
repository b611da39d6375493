"""Jobs of three steps with a tiny policy that says whole words, so that its moves count."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import chat_families
import tiny_job
from transformers import AutoTokenizer

from torchrft.environments.renderer import ChatRenderer

STEPS = 3
SPELLINGS = 24  # of each word, by the spaces before it: so many more random replies are words


def word_policy(folder: Path, words: list[str]) -> str:
    """A policy with Qwen2.5's chat template and a token for each spelling of the `words`."""
    tokenizer = chat_families.tokenizer("qwen2_5")
    tokenizer.add_tokens([" " * count + word for word in words for count in range(SPELLINGS)])
    tokenizer.save_pretrained(folder)
    config = json.loads((tiny_job.ASSETS / "debug_model" / "config.json").read_text())
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, **ends}
    config |= {"hidden_size": 32, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def train(
    folder: Path,
    name: str,
    words: list[str],
    rows: list[dict[str, Any]],
    tools: Any = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains three steps, checks what holds for all libraries, and returns the episodes."""
    model, data = word_policy(folder / "policy", words), folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "?", **row}) + "\n" for row in rows))
    keys = sorted({key for row in rows for key in row} - {"prompt", "label"})
    flags = {"name": name, "pretrain": model, "prompt_data": data, "functions": None}
    flags |= {"metadata_keys": ",".join(keys) or None, "max_steps": STEPS, "max_turns": 4}
    flags |= {"num_episodes": 99, "environment_workers": 2, "stop_token_ids": None}
    flags |= {"max_len": 2048, "prompt_max_len": 512, "train_batch_size": 32, "max_new_tokens": 2}
    flags |= {"n_samples_per_prompt": 8, "packing_samples": "true", "seed": 3}
    flags |= {"max_tokens_per_microbatch": 8192, "micro_train_batch_size": None}
    if isinstance(options.get("environment.options"), dict):
        options["environment.options"] = json.dumps(options["environment.options"])
    flags |= options
    tiny_job.run(folder, **flags)
    records = tiny_job.records(folder)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert max(record["grad_norm"] for record in records) > 0
    for record in records:
        # float32 on a CPU: what the engine said of each token is what a full forward says.
        assert record.get("mismatch/logprob_abs_max", 0.0) < 1e-5
    episodes = [row for step in range(1, STEPS + 1) for row in tiny_job.rollout(folder, step)]
    assert len(episodes) == STEPS * int(flags["train_batch_size"])
    for episode in episodes:
        _check_tokens(model, episode, tools)
    return records, episodes


def no_faults(records: list[dict[str, Any]], episodes: list[dict[str, Any]]) -> None:
    assert [row["fault"] for row in episodes if row["fault"] is not None] == []
    for record in records:
        assert "reward/environment/errors" not in record
        assert record["reward/environment/status/error"] == 0.0
        assert record["reward/environment/status/timeout"] == 0.0


def replies(episode: dict[str, Any]) -> list[str]:
    """What the policy said, turn by turn."""
    return [m["content"] for m in episode["messages"] if m["role"] == "assistant"]


@cache
def _tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


def _check_tokens(model: str, episode: dict[str, Any], tools: Any) -> None:
    """The first prompt is the template's, and what was sampled is what the messages say."""
    renderer, said = ChatRenderer(_tokenizer(model)), replies(episode)
    if not said:  # the environment failed before
        return
    first = next(i for i, m in enumerate(episode["messages"]) if m["role"] == "assistant")
    prompt = renderer.render_ids(
        episode["messages"][:first], tools=tools, add_generation_prompt=True
    )
    assert episode["branches"][0]["prompt"] == prompt
    texts = []
    for branch in episode["branches"]:
        begin = 0
        for end in branch["turn_ends"]:
            own = branch["sampled"][begin:end]
            ids = [t for t, s in zip(branch["token_ids"][begin:end], own, strict=True) if s]
            assert own == [False] * (len(own) - len(ids)) + [True] * len(ids)
            assert 1 <= len(ids) <= 2
            texts.append(renderer.parse_response(ids, tools=tools).content)
            begin = end
    assert len(texts) == len(said)
    for text, content in zip(texts, said, strict=True):
        assert content == text
    assert episode["length"] == sum(sum(branch["sampled"]) for branch in episode["branches"])
