"""TRL's GRPOTrainer on a torchrft job: same weights, prompts, sampling and loss."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from common import DEBUG_MODEL
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from torchrft.config.job_config import JobConfig
from torchrft.data.loader import PromptLoader
from torchrft.data.prompts import load_prompts
from torchrft.models.loader import load_tokenizer
from torchrft.rewards.registry import REWARDS
from torchrft.trainer import Trainer
from torchrft.types import RolloutBatch

# The old name of the option works in every supported version.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated")
logging.disable_progress_bar()
logging.set_verbosity_error()


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that adds up the seconds of its phases in `spent`."""

    spent: dict[str, float]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + perf_counter() - start

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # part of the update
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self._phase("logprob"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("prepare"):
            return super()._prepare_inputs(*args, **kwargs)


class StepClock(TrainerCallback):
    """Records a TRL step's seconds by phase, then lets `other` take a step outside the clock."""

    def __init__(self, other: Callable[[], None]) -> None:
        self.other = other
        self.steps: list[dict[str, float]] = []
        self.trainer: TimedTrainer | None = None
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        step = perf_counter() - self.start
        spent, self.trainer.spent = self.trainer.spent, {}
        parts = {name: spent.get(name, 0.0) for name in ("rollout", "reward", "logprob")}
        times = {"update": step - spent["prepare"], "step": step}
        times["other"] = spent["prepare"] - sum(parts.values())
        length = self.trainer._metrics["train"]["completions/mean_length"][-1]
        self.steps.append(parts | times | {"length": length})
        self.other()
        self.start = perf_counter()


def build(
    mine: Trainer, config: JobConfig, steps: int, callback: StepClock, rows: int = 512
) -> TimedTrainer:
    """The TRL trainer that does what `mine` does, from the same weights, `rows` a micro-batch."""
    folder = tempfile.mkdtemp()
    # Saved, because TRL makes its reference model from the folder that the policy came from.
    mine.learner.model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", trust_remote_code=False
    )
    model.generation_config = GenerationConfig.from_pretrained(DEBUG_MODEL)
    trainer = TimedTrainer(
        model=model,
        reward_funcs=_reward(config),
        args=_arguments(config, folder, steps, rows),
        train_dataset=_dataset(mine, config, steps),
        processing_class=load_tokenizer(DEBUG_MODEL),
        callbacks=[callback],
    )
    trainer.spent = {}
    callback.trainer = trainer
    return trainer


def _arguments(config: JobConfig, folder: str, steps: int, rows: int) -> GRPOConfig:
    """Nothing logged or saved, no recomputation; a reference model if the job has one."""
    training, rollout, algorithm = config.training, config.rollout, config.algorithm
    forced = {"min_new_tokens": rollout.min_new_tokens} if rollout.min_new_tokens else None
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=training.train_batch_size // rows,
        num_generations=rollout.n_samples_per_prompt,
        max_completion_length=rollout.max_new_tokens,
        generation_kwargs=forced,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        beta=algorithm.init_kl_coef,
        epsilon=algorithm.clip_range,
        epsilon_high=algorithm.clip_range_higher,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=config.optimizer.actor_learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=config.optimizer.adam_betas[0],
        adam_beta2=config.optimizer.adam_betas[1],
        weight_decay=config.optimizer.l2,
        max_grad_norm=config.optimizer.max_norm,
        max_steps=steps,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _dataset(mine: Trainer, config: JobConfig, steps: int) -> Dataset:
    """The prompts of the first `steps` steps of `mine`, in its order."""
    assert config.data.prompt_data is not None
    loader = PromptLoader(
        load_prompts(config.data.prompt_data, config.data, mine.export.args[1]),
        config.rollout.rollout_batch_size,
        config.training.seed,
    )
    prompts = [prompt for _ in range(steps) for prompt in loader.next()]
    return Dataset.from_list([{"prompt": p.text, "label": p.label} for p in prompts])


def _reward(config: JobConfig) -> Callable[..., list[float]]:
    """The job's one reward function, called as TRL calls them."""
    (entry,) = config.reward.functions
    function = REWARDS.get(entry.name)
    if entry.name == "exact_match":
        return lambda completions, label, **kwargs: [
            function(text, wanted) for text, wanted in zip(completions, label, strict=True)
        ]
    return lambda completions, **kwargs: [function(text) for text in completions]


def loss_and_norm(trainer: TimedTrainer, batch: RolloutBatch) -> tuple[float, float]:
    """TRL's loss and gradient norm on the very tensors of `batch`; no optimizer step."""
    inputs = _padded(batch)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    trainer.model.zero_grad()
    return float(loss.detach()), norm


def _padded(batch: RolloutBatch) -> dict[str, Tensor]:
    """Prompts padded on the left, responses on the right, as TRL does."""
    pairs = list(zip(batch.sequences, batch.prompt_lens.tolist(), strict=True))
    prompts = [sequence[:length] for sequence, length in pairs]
    responses = [sequence[length:] for sequence, length in pairs]
    pad = torch.nn.utils.rnn.pad_sequence
    advantages, old = batch.advantages, batch.old_logprobs
    assert advantages is not None
    assert old is not None
    return {
        "prompt_ids": pad(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad(
            [torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"
        ),
        "completion_ids": pad(responses, batch_first=True),
        "completion_mask": batch.mask.long(),
        "advantages": advantages[:, 0],
        "old_per_token_logps": old,
        "num_items_in_batch": batch.mask.sum(),
    }
