"""What a run computes in and over: threads, precision, the schedule's span, truncated sampling."""

from unittest.mock import MagicMock

import pytest
import torch
from tiny_job import records, rollout, run, tiny_config, trainer, weights

from torchrft.config.manager import to_toml
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer


def test_deterministic_on_a_gpu_only_by_option(tmp_path, monkeypatch):
    """As far as a rank on a GPU that is not there comes."""
    monkeypatch.setattr("torchrft.trainer.check_models", MagicMock(side_effect=StopIteration))

    def begin(device, value):
        config = tiny_config(save_path=tmp_path, deterministic=value)
        with pytest.raises(StopIteration):
            Trainer(config, World(0, 1, 0, device))
        return torch.are_deterministic_algorithms_enabled()

    cuda = torch.device("cuda", 0)
    assert [begin(cuda, value) for value in (True, False)] == [True, False]
    assert begin(torch.device("cpu"), False)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_runs_have_equal_bits_for_any_number_of_threads(tmp_path, threads):
    """256 packed samples in one pass, which index operations' backward splits over the threads.
    The second run stops after its first step and is resumed."""
    sizes = {"train_batch_size": 256, "rollout_batch_size": 16, "n_samples_per_prompt": 16}
    sizes |= {"micro_train_batch_size": 256, "packing_samples": True}
    runs = []
    for name, steps in (("a", (2,)), ("b", (1, 2))):
        for stop in steps:
            options = {"max_steps": stop, "load_checkpoint": stop > steps[0]}
            with trainer(
                tmp_path / name, max_tokens_per_microbatch=8192, **options, **sizes
            ) as job:
                torch.set_num_threads(threads)
                assert job.train() is None
                assert job.progress.step == stop
        runs.append(weights(job))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacks", "options", "dtype", "said"),
    [
        (True, {"bf16": None}, torch.float32, "bf16 = false: left unset, and the CPU has no"),
        (True, {}, torch.float32, ""),
        (True, {"bf16": True}, torch.bfloat16, "bf16 = true is slow here"),
        (True, {"bf16": None, "fp32_head": True}, torch.bfloat16, "bf16 = true is slow here"),
        (True, {"bf16": None, "use_mp_opt": True}, torch.bfloat16, "bf16 = true is slow here"),
        (False, {"bf16": None}, torch.bfloat16, ""),
        (False, {"bf16": True}, torch.bfloat16, ""),
    ],
    ids=str,
)
def test_unset_bf16(tmp_path, monkeypatch, caplog, lacks, options, dtype, said):
    """False where the CPU lacks the instructions and nothing needs it; slow choices are named."""
    for module in ("torchrft.trainer", "torchrft.config.manager"):
        monkeypatch.setattr(f"{module}.lacks_bf16", lambda: lacks)
    with trainer(tmp_path, **options) as job:
        assert job.export.keywords["dtype"] == dtype == next(job.engine.model.parameters()).dtype
        assert f"bf16 = {str(dtype == torch.bfloat16).lower()}\n" in to_toml(job.config)
    texts = [text for text in caplog.messages if "bf16" in text]
    assert len(texts) == bool(said)
    assert not said or said in texts[0]


def test_one_host_without_bfloat16_decides_for_all(tmp_path, monkeypatch):
    """Where hosts differ, those that have it compute in float32 as well."""
    for module in ("torchrft.trainer", "torchrft.config.manager"):
        monkeypatch.setattr(f"{module}.lacks_bf16", lambda: False)
    asked = []
    monkeypatch.setattr("torchrft.tools.distributed.any_rank", lambda flag: asked.append(flag) or 1)
    with trainer(tmp_path, bf16=None) as job:
        assert job.export.keywords["dtype"] == torch.float32
        assert not job.config.training.bf16
    assert asked == [False]


def test_lr_total_steps(tmp_path, caplog):
    options = {"lr_decay": "linear", "lr_min_ratio": 0.0, "max_steps": 4}
    run(tmp_path / "a", lr_total_steps=5, lr_warmup_ratio=0.4, **options)
    rates = [line["lr"] for line in records(tmp_path / "a")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 * 2 / 3], rel=1e-12)
    assert not [text for text in caplog.messages if "learning rate's schedule" in text]
    run(tmp_path / "b", **options)
    (text,) = [text for text in caplog.messages if "learning rate's schedule" in text]
    assert text == (
        "[training] max_steps = 4 makes 4 of the 450 optimizer steps of the learning rate's "
        "schedule, which ends at 29% of its peak, in its warm-up of 14; lr_total_steps = 4 fits it"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6, "packing_samples": True},
        {"top_k": 7, "init_kl_coef": 0.1, "train_batch_size": 8, "fused_linear_logprob": True},
        {"top_p": 0.7, "top_k": 20, "first_token_temperature": 3.0, "temperature": 0.7},
        {"top_p": 0.6, "advantage_estimator": "gae", "min_new_tokens": 2},
    ],
    ids=str,
)
def test_truncation_replay(tmp_path, caplog, options):
    """The trainer's log-probs are the sampler's, over the tokens that were left."""
    run(tmp_path / "a", truncation_replay=True, **options)
    assert not [text for text in caplog.messages if "truncates" in text]
    for line in records(tmp_path / "a"):
        assert line["mismatch/logprob_abs_max"] < 1e-5
        assert line["grad_norm"] > 0
        if "init_kl_coef" in options:  # both over the same tokens
            assert 0 <= line["policy/kl"] < 0.01
    run(tmp_path / "b", max_steps=1, **options)
    assert len([text for text in caplog.messages if "truncates what is sampled" in text]) == 1
    assert rollout(tmp_path / "a", 1) == rollout(tmp_path / "b", 1)  # the same draws
    replayed, whole = records(tmp_path / "a")[0], records(tmp_path / "b")[0]
    assert replayed["policy/entropy"] < whole["policy/entropy"] - 0.1


def test_samples_that_wait_keep_what_they_were_sampled_among(tmp_path):
    """An optimizer step of two rollouts, and a resume between them."""
    options = {"top_k": 7, "truncation_replay": True, "train_batch_size": 32}
    run(tmp_path / "a", max_steps=2, **options)
    run(tmp_path / "b", max_steps=1, **options)
    run(tmp_path / "b", max_steps=2, load_checkpoint=True, **options)
    one, other = records(tmp_path / "a"), records(tmp_path / "b")
    for name in ("grad_norm", "policy/entropy", "mismatch/logprob_abs_mean"):
        assert one[1][name] == other[1][name]
    assert one[1]["mismatch/logprob_abs_max"] < 1e-5
