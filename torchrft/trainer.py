"""The training loop. `train_step` is the whole algorithm, in the order data flows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torchrft.algorithms import advantages
from torchrft.checkpoint.hf_export import export_hf
from torchrft.checkpoint.manager import CheckpointManager
from torchrft.checkpoint.set_aside import set_aside
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import to_toml
from torchrft.data.batch import make_batch
from torchrft.data.loader import PromptLoader
from torchrft.data.prompts import load_prompts
from torchrft.metrics.console import Console
from torchrft.metrics.files import METRICS_FILE, read_metrics
from torchrft.metrics.logger import MetricLogger
from torchrft.metrics.plots import plot_curves, plot_lengths
from torchrft.metrics.rollout_dump import dump
from torchrft.metrics.rollout_stats import dump_rows, rollout_metrics
from torchrft.metrics.timing import PhaseTimer, peak_memory_gib
from torchrft.models.loader import load_model, load_tokenizer
from torchrft.models.policy import PolicyModel
from torchrft.optim.lr_scheduler import build_scheduler
from torchrft.optim.optimizer import build_optimizer
from torchrft.parallel import ParallelDims, parallelize
from torchrft.parallel.zero import sharding
from torchrft.policy_update import PolicyUpdate
from torchrft.rewards.scorer import build_scorer
from torchrft.rollout import build_engine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.tools import distributed
from torchrft.tools.distributed import World
from torchrft.tools.logging import logger
from torchrft.tools.seeds import derive_seed, rng_state, seed_everything, set_rng_state
from torchrft.tools.signals import StopSignal
from torchrft.types import Completion, Prompt, RolloutBatch, Sample, SamplingParams


class Trainer:
    """One training run, on one rank of it: `Trainer(config, world).train()`.

    Raises ValueError, from the constructor, for what only loading can show: a prompt file, a model
    folder, a reward function or a checkpoint that cannot be used.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        self.config, self.world = config, world
        seed_everything(config.training.seed)
        torch.use_deterministic_algorithms(config.training.deterministic)
        self.dims = ParallelDims.of(config.parallel, world.world_size)
        self.dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        self.step = 0
        self.stop_requested: int | None = None
        self.pending: list[Sample] = []  # samples that wait for a full train_batch_size
        self._build_data()
        self._build_policy()
        self._build_rollout()
        self._build_output()

    # ---------------------------------------------------------------- build

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.tokenizer = load_tokenizer(config.model.pretrain)
        self.scorer = build_scorer(config.reward.functions)
        assert config.data.prompt_data is not None
        prompts = load_prompts(config.data.prompt_data, config.data, self.tokenizer)
        self.prompts = PromptLoader(
            prompts,
            config.rollout.rollout_batch_size,
            config.training.seed,
            rank=world.rank,
            world_size=self.dims.dp,
        )
        self.eval_prompts: list[Prompt] = []
        self.evaluates = config.evaluation.eval_data is not None
        if config.evaluation.eval_data is not None:
            held_out = load_prompts(
                config.evaluation.eval_data, config.data, self.tokenizer, name="eval_data"
            )
            self.eval_prompts = list(held_out[world.rank :: self.dims.dp])
        self.schedule_steps = self.prompts.total_steps(config.training.num_episodes)
        self.last_step = min(self.schedule_steps, config.training.max_steps or self.schedule_steps)

    def _build_policy(self) -> None:
        config, training = self.config, self.config.training
        source = config.model.pretrain
        policy = self._model(source, config.model.init, torch.float32)
        reference = None
        if config.algorithm.init_kl_coef > 0:
            init = config.model.init if config.model.ref_pretrain is None else "pretrained"
            reference = self._model(config.model.ref_pretrain or source, init, self.dtype)
            reference.requires_grad_(False)
        samples = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
        optimizer_steps = self.schedule_steps * samples * training.max_epochs
        total = max(1, -(-optimizer_steps // training.train_batch_size))
        self.policy = policy
        self.optimizer = build_optimizer(
            policy, config.optimizer, config.optimizer.actor_learning_rate
        )
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, total)
        self.update = PolicyUpdate(
            policy,
            reference,
            self.optimizer,
            self.scheduler,
            training,
            config.rollout,
            config.algorithm,
            max_norm=config.optimizer.max_norm,
            max_len=config.data.max_len,
            max_response_length=config.rollout.max_new_tokens or config.data.max_len,
            reduce_every_micro_batch=sharding(config.parallel).reduce_every_micro_batch,
        )

    def _model(self, source: str, init: str, dtype: torch.dtype) -> PolicyModel:
        config = self.config
        model: Any = load_model(source, init, dtype, config.training.seed)
        model = model.to(self.world.device)
        policy = PolicyModel(
            model.eval(),  # no dropout: log-probs must be those of the policy that sampled
            config.rollout.temperature,
            config.training.fused_linear_logprob,
            config.training.chunk_size,
        )
        parallelize(policy, self.dims, config.parallel, self.dtype)
        return policy

    def _build_rollout(self) -> None:
        self.engine = build_engine(
            self.config.rollout,
            self.config.model.pretrain,
            self.dtype,
            self.world.device,
            load_weights=False,
        )

    def _build_output(self) -> None:
        config = self.config
        save_path = Path(config.checkpoint.save_path)
        self.log_dir = Path(config.logging.log_dir or save_path / "logs")
        self.checkpoints = CheckpointManager(
            save_path, config.checkpoint.max_ckpt_num, config.checkpoint.max_ckpt_mem * 10**9
        )
        if not (config.checkpoint.load_checkpoint and self._resume()):
            set_aside(save_path, self.log_dir)
        if self.world.is_main:
            save_path.mkdir(parents=True, exist_ok=True)
            (save_path / "config.toml").write_text(to_toml(config))
        self.timer = PhaseTimer(self.world.device)
        self.logger = MetricLogger(
            config.logging,
            self.log_dir,
            config.model_dump(mode="json"),
            resume_step=self.step if self.step else None,
        )
        self.console = Console(self.last_step, self.step)

    # ---------------------------------------------------------------- train

    def train(self) -> int | None:
        """Runs to the last step. Returns the number of the signal that ended it early, or None."""
        with StopSignal() as stop, self.console, self.logger:
            self._sync_weights()
            while self.step < self.last_step and self.stop_requested is None:
                metrics = self._measured_step()
                stopping = distributed.any_rank(stop.received is not None)
                self.stop_requested = (stop.received or 15) if stopping else None
                self._finish_step(metrics)
        self.engine.close()
        self._summarize()
        return self.stop_requested

    def _summarize(self) -> None:
        if not self.world.is_main:
            return
        plot_curves(self.log_dir)
        paths = {
            "config": Path(self.config.checkpoint.save_path) / "config.toml",
            "checkpoints": self.checkpoints.checkpoints,
            "Hugging Face": self.checkpoints.exports / f"step-{self.step}",
            "metrics": self.log_dir / METRICS_FILE,
            "rollouts": self.log_dir / "rollouts",
            "plots": self.log_dir / "plots",
        }
        self.console.summary(paths, read_metrics(self.log_dir))

    def train_step(self) -> dict[str, float]:
        """One rollout and what is learned from it."""
        prompts = self.prompts.next()
        with self.timer.phase("rollout"):
            completions = self.engine.generate(prompts, self._sampling(len(prompts)))
            if self.config.rollout.enable_engine_sleep:
                self.engine.sleep()
        with self.timer.phase("reward"):
            samples = self._score(prompts, completions)
            self.pending += samples
        metrics = self._log_samples(samples)
        if self._batch_is_full():
            batch = make_batch(self.pending, self.world.device)
            self.pending = []
            with self.timer.phase("logprob"):
                batch = self.update.with_logprobs(batch)
            batch = self._with_advantages(batch)
            with self.timer.phase("update"):
                metrics |= self.update.run(batch)
        self.step += 1
        with self.timer.phase("weight_sync"):
            self._sync_weights()
        return metrics

    def _measured_step(self) -> dict[str, float]:
        """A step with what surrounds it: evaluation, times, throughput and memory."""
        metrics: dict[str, float] = {}
        every = self.config.evaluation.eval_steps or self.schedule_steps
        with self.timer.phase("step"):
            if self.evaluates and self.step % every == 0 and self.step + 1 < self.last_step:
                metrics |= self.evaluate()
            metrics |= self.train_step()
            if self.evaluates and self.step == self.last_step:
                metrics |= self.evaluate()
        metrics |= self.timer.pop()
        tokens = metrics.pop("tokens")
        metrics["throughput/tokens_per_second"] = tokens / metrics["time/step"]
        peak = {"memory/peak_gib": peak_memory_gib(self.world.device)}
        metrics |= distributed.all_reduce_max(peak)
        metrics["episode"] = self.prompts.episode
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Greedy reward of the current policy on the held-out prompts."""
        with self.timer.phase("eval"):
            sampling = dataclasses.replace(self._sampling(0), n=1, temperature=0.0, seeds=None)
            completions = self.engine.generate(self.eval_prompts, sampling)
            scores = self.scorer.score(self.eval_prompts, completions)
            total = distributed.all_reduce_sum(
                {"sum": sum(score.value for score in scores), "count": len(scores)}, "evaluation"
            )
        return {"eval/reward/mean": total["sum"] / total["count"]}

    def _sampling(self, num_prompts: int) -> SamplingParams:
        """How this rank samples in this step; seeds depend on the prompt's place in the rollout."""
        rollout, data = self.config.rollout, self.config.data
        seed, dp, rank = self.config.training.seed, self.dims.dp, self.world.rank
        return SamplingParams(
            n=rollout.n_samples_per_prompt,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_total_tokens=data.max_len,
            max_new_tokens=rollout.max_new_tokens,
            min_new_tokens=rollout.min_new_tokens,
            stop_token_ids=tuple(rollout.stop_token_ids),
            stop=tuple(rollout.stop),
            seeds=tuple(
                tuple(
                    derive_seed(seed, self.step, index * dp + rank, sample)
                    for sample in range(rollout.n_samples_per_prompt)
                )
                for index in range(num_prompts)
            ),
        )

    def _score(self, prompts: Sequence[Prompt], completions: list[Completion]) -> list[Sample]:
        scores = self.scorer.score(prompts, completions)
        first = self.step * self.config.rollout.rollout_batch_size + self.world.rank
        return [
            Sample(
                prompt=prompts[completion.prompt_index],
                completion=completion,
                score=score,
                group=first + completion.prompt_index * self.dims.dp,
            )
            for completion, score in zip(completions, scores, strict=True)
        ]

    def _batch_is_full(self) -> bool:
        """Whether an optimizer step is due; what is left over at the end of the run makes one."""
        enough = len(self.pending) * self.dims.dp >= self.config.training.train_batch_size
        return enough or self.step + 1 == self.schedule_steps

    def _with_advantages(self, batch: RolloutBatch) -> RolloutBatch:
        result = advantages.compute(
            self.update.preset.estimator, batch.rewards, batch.group, batch.mask
        )
        return dataclasses.replace(batch, advantages=result.advantages, returns=result.returns)

    def _sync_weights(self) -> None:
        if self.config.rollout.enable_engine_sleep:
            self.engine.wake()
        self.engine.update_weights(named_full_tensors(self.policy.model), version=self.step)

    # ---------------------------------------------------------------- output

    def _log_samples(self, samples: list[Sample]) -> dict[str, float]:
        """Writes all ranks' samples down and returns their metrics, equal on all ranks."""
        gathered = distributed.gather_objects(samples, "gather samples")
        everyone = sorted((s for part in gathered for s in part), key=lambda s: s.group)
        step = self.step + 1
        if self.world.is_main:
            dump(self.log_dir, step, dump_rows(everyone))
            if step % self.config.logging.plot_every == 0:
                lengths = [len(sample.completion.token_ids) for sample in everyone]
                plot_lengths(self.log_dir, step, lengths, self.config.data.max_len)
        tokens = sum(len(s.prompt.token_ids) + len(s.completion.token_ids) for s in everyone)
        return {**rollout_metrics(everyone), "tokens": float(tokens)}

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Records the step, and saves when a checkpoint is due."""
        # In this order, a kill in between costs nothing: a step that was logged but not saved is
        # dropped from the log and run again when the run resumes.
        self.logger.log(self.step, metrics)
        self.console.step(self.step, metrics)
        if self._save_is_due():
            self.save()

    def _save_is_due(self) -> bool:
        options = self.config.checkpoint
        if self.stop_requested is not None or self.step == self.last_step:
            return True
        if options.save_steps is not None and self.step % options.save_steps == 0:
            return True
        return self.prompts.finished_episode(options.save_interval)

    def save(self) -> None:
        """Writes checkpoints/step-N and hf/step-N."""
        with self.timer.phase("checkpoint"):
            self.checkpoints.save(self.step, self.state_dict(), self._export)

    def _export(self, folder: Path) -> None:
        export_hf(self.policy.model, self.tokenizer, folder, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on as if it had never stopped."""
        model, optimizer = get_state_dict(self.policy, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "data": self.prompts.state_dict(),
            "progress": {"step": self.step, "pending": self._all_pending()},
            "rng": {f"rank{self.world.rank}": rng_state()},
        }

    def _all_pending(self) -> list[Sample]:
        gathered = distributed.gather_objects(self.pending, "gather pending samples")
        return sorted((s for part in gathered for s in part), key=lambda sample: sample.group)

    def _resume(self) -> bool:
        """Goes on from a checkpoint; False if there is none."""
        options = self.config.checkpoint
        path = self.checkpoints.resolve(options.ckpt_path)
        if path is None:
            logger.info("no checkpoint under %s: starting from the beginning", options.save_path)
            return False
        state = self.state_dict()
        self.checkpoints.load(path, state)
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.prompts.load_state_dict(state["data"])
        self.step = state["progress"]["step"]
        dp, rank = self.dims.dp, self.world.rank
        self.pending = [s for s in state["progress"]["pending"] if s.group % dp == rank]
        set_rng_state(state["rng"][f"rank{rank}"])
        # What a later step left behind belongs to a course of training that is not gone on with.
        self.checkpoints.set_aside_after(self.step)
        logger.info("resumed from %s, after step %d", path, self.step)
        return True
