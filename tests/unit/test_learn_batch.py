"""From scored samples to tensors."""

import pytest
import torch

from torchrft.learn.batch import make_batch
from torchrft.types import Completion, Prompt, Sample, Score


def sample(prompt_ids, token_ids, logprobs, reward=0.0, group=0):
    return Sample(
        prompt=Prompt(row=7, text="", token_ids=prompt_ids),
        completion=Completion(0, 0, token_ids, logprobs, "", "stop"),
        score=Score(reward),
        group=group,
    )


def test_values():
    batch = make_batch(
        [
            sample((3, 4, 5), (6,), (-0.5,), reward=1.5, group=4),
            sample((8,), (9, 10, 1), (-1.0, -2.0, -3.0), reward=-2.0, group=9),
        ]
    )
    assert len(batch) == 2
    assert [s.tolist() for s in batch.sequences] == [[3, 4, 5, 6], [8, 9, 10, 1]]
    assert all(s.dtype == torch.int64 for s in batch.sequences)
    assert batch.prompt_lens.tolist() == [3, 1]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.rewards.tolist() == [1.5, -2.0]
    assert batch.group.tolist() == [4, 9]
    assert batch.rollout_logprobs.tolist() == [[-0.5, 0.0, 0.0], [-1.0, -2.0, -3.0]]
    assert batch.rewards.dtype == batch.rollout_logprobs.dtype == torch.float32
    assert batch.advantages is batch.old_logprobs is batch.ref_logprobs is None


def test_what_goes_to_the_device():
    """Micro-batches are built on the host; only the loss's tensors travel."""
    batch = make_batch([sample((3,), (6,), (-0.5,))], device="meta")
    on_meta = {
        name for name in ("prompt_lens", "mask", "rewards", "group", "rollout_logprobs")
        if getattr(batch, name).device.type == "meta"
    }  # fmt: skip
    assert on_meta == {"mask", "rewards", "group", "rollout_logprobs"}
    assert batch.sequences[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("tokens", "logprobs", "match"),
    [
        ((), (), "prompt row 7 has 0 tokens and 0 log-probs"),
        ((1, 2), (-0.5,), "prompt row 7 has 2 tokens and 1 log-probs"),
    ],
)
def test_completions_without_tokens_or_log_probs(tokens, logprobs, match):
    with pytest.raises(ValueError, match=match):
        make_batch([sample((3,), (1,), (-0.1,)), sample((3,), tokens, logprobs)])
