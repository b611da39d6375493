"""The training loop. `train_step` is the whole algorithm, in the order data flows."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from torchrft.build.data import build_prompts
from torchrft.build.environments import build_sampler
from torchrft.build.learner import build_learner
from torchrft.build.models import check_models, load_vision
from torchrft.build.rewards import build_rewards
from torchrft.build.rollout import policy_engine, sampling_params
from torchrft.checkpoint.hf_export import export_hf, files_beside_weights
from torchrft.checkpoint.manager import CheckpointManager
from torchrft.checkpoint.set_aside import set_aside
from torchrft.collector import Collector, RolloutPlan
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import to_toml
from torchrft.config.start import lacks_bf16, start_notes, with_precision
from torchrft.learn.batch import make_batch
from torchrft.metrics.files import write_atomically
from torchrft.metrics.reporter import Reporter
from torchrft.metrics.rollout_stats import rollout_metrics
from torchrft.metrics.timing import PhaseTimer, peak_memory_gib
from torchrft.models.loader import load_tokenizer
from torchrft.parallel import ParallelDims, reshard
from torchrft.rewards.shaping import RewardShaper
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.run_state import RunState
from torchrft.tools import distributed
from torchrft.tools.distributed import World, on_main
from torchrft.tools.lock import hold
from torchrft.tools.logging import logger
from torchrft.tools.seeds import seed_everything
from torchrft.tools.signals import Abandoned, SecondKeyboardInterrupt, StopSignal
from torchrft.types import Sample

SECONDS_TO_AGREE = 20.0  # that ranks may be apart when a fault has ended what they do
PHASES = ("rollout", "reward", "logprob", "update", "weight_sync", "step")


@dataclass
class Progress:
    """Where a run is: steps done and saved, and what the step under way has so far.

    `pending` samples of `pending_rollouts` wait for a full train_batch_size. `began_at` is the
    position in the stream of prompts at which the step began.
    """

    step: int = 0
    saved_step: int = 0
    pending: list[Sample] = field(default_factory=list)
    pending_rollouts: int = 0
    began_at: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One training run, on one rank of it: `Trainer(config, world).train()`.

    Raises ValueError, from the constructor, for what only loading can show: a prompt file, a model
    folder, a reward function or a checkpoint that cannot be used.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        slow_bf16 = distributed.any_rank(lacks_bf16())  # as the slowest host of the job computes
        self.config = config = with_precision(config, lambda: slow_bf16)
        self.world, self.save_path = world, Path(config.checkpoint.save_path)
        log_dir = Path(config.logging.log_dir or self.save_path / "logs")
        on_main(lambda: hold(self.save_path, "save_path"), "lock save_path")
        on_main(lambda: hold(log_dir, "log_dir"), "lock log_dir")
        seed_everything(config.training.seed)
        # On a CPU it costs nothing: there several threads add up in any order otherwise.
        on_cpu = world.device.type == "cpu"
        torch.use_deterministic_algorithms(on_cpu or config.training.deterministic)
        check_models(config)  # before data and engines, which take minutes
        dims = ParallelDims.of(config.parallel, world.world_size)
        dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        tokenizer, vision = load_tokenizer(config.model.pretrain), load_vision(config)
        scorer = build_rewards(config, world, dtype, tokenizer)
        ranks = dims.data_ranks(world.device.type)
        self.prompts = build_prompts(config, world, ranks, tokenizer, vision, scorer)
        rows = self.prompts.stream.num_prompts
        for note in start_notes(config, rows, slow_bf16) if world.is_main else ():
            logger.warning(note)
        self.timer = PhaseTimer(world.device, PHASES)
        # First: an engine that does not start or fit shows at once.
        self.engine = policy_engine(config, dtype, world.device, vision)
        # Servers that generate while the trainer computes cannot sleep then.
        self.sleeps = config.rollout.enable_engine_sleep and not config.rollout.async_level
        if self.sleeps:
            self.engine.sleep()
        shaper = RewardShaper(config.reward)
        sampling = sampling_params(config)
        plan = RolloutPlan.of(config.rollout, config.training, sampling, ranks, dims.model_ranks)
        self.sampler = build_sampler(config, self.engine, tokenizer)
        self.collector = Collector(
            plan, self.sampler, self.prompts.stream, scorer, shaper, self.timer
        )
        rollouts = self.prompts.rollouts
        self.last_step = min(rollouts, config.training.max_steps or rollouts)
        self.learner = build_learner(config, world, dims, dtype, rollouts, shaper, vision)
        self.state = RunState(config.checkpoint, self.collector, self.learner)
        processor = tokenizer if vision is None else vision.processor
        other_files: dict[str, bytes] = {}  # rank 0's; read now, since they may be gone later
        read = partial(files_beside_weights, config.model.pretrain)
        on_main(lambda: other_files.update(read()), "read pretrain")
        model = self.learner.model
        self.export = partial(export_hf, model, processor, dtype=dtype, files=other_files)
        self.stop_requested: int | None = None
        self._start(log_dir)

    def _start(self, log_dir: Path) -> None:
        """Goes on from a checkpoint, or starts anew beside what an earlier run has left."""
        config, options = self.config, self.config.checkpoint
        max_bytes = options.max_ckpt_mem * 10**9
        self.checkpoints = CheckpointManager(self.save_path, options.max_ckpt_num, max_bytes)
        if not (options.load_checkpoint and self.state.resume(self.checkpoints)):
            set_aside(self.save_path, log_dir)
        saved, position = self.state.progress, self.prompts.stream.position
        step, pending = saved["step"], list(saved["pending"])
        self.progress = Progress(step, step, pending, saved["pending_rollouts"], position)
        config_file, text = self.save_path / "config.toml", to_toml(config)
        on_main(lambda: write_atomically(config_file, text), "write config.toml")
        self.reporter = Reporter(
            config.logging,
            log_dir,
            config.model_dump(mode="json"),
            start_step=step,
            last_step=self.last_step,
            max_len=config.data.max_len,
            mismatch_alarm=config.rollout.mismatch_alarm,
        )
        if self.reporter.is_logged:
            self.state.mark_logged()

    def train(self) -> int | None:
        """Runs to the last step. Returns the number of the signal that ended it early, or None.

        Whatever ends it, the state after the last finished step is saved, if all ranks get there.
        """
        progress = self.progress
        with StopSignal(partial(self._save_after, Abandoned())) as stop, self.reporter:
            self.collector.abandonable = stop.abandonable
            try:
                self._sync_weights()
                if unlogged := self.state.progress["unlogged"]:  # a fault came after its update
                    self._finish_step(self._with_final_metrics(unlogged))
                while progress.step < self.last_step and self.stop_requested is None:
                    metrics = self._step_with_evaluation()
                    stopping = distributed.any_rank(stop.received is not None)
                    self.stop_requested = (stop.received or 15) if stopping else None
                    self._finish_step(metrics)
            except BaseException as fault:
                self._save_after(fault)
                if isinstance(fault, SystemExit):  # it would end the job as if all were well
                    raise RuntimeError("a function of the job called sys.exit()") from fault
                if not (stop.received and isinstance(fault, Abandoned | distributed.RankError)):
                    raise
                if self.state.step != progress.saved_step:
                    raise TimeoutError(
                        "stopped in a step that did not end, without saving"
                    ) from None
                self.stop_requested = stop.received
        self.sampler.close()
        self.collector.scorer.close()
        exported = self.checkpoints.exports / f"step-{progress.step}"
        paths = {"config": self.save_path / "config.toml"}
        paths |= {"checkpoints": self.checkpoints.checkpoints, "Hugging Face": exported}
        self.reporter.print_summary(progress.step, paths)
        return self.stop_requested

    def train_step(self) -> dict[str, float]:
        """One rollout and what is learned from it."""
        progress, stream, learner = self.progress, self.prompts.stream, self.learner
        progress.began_at = stream.position
        # Ahead even past max_steps: a run that goes on later is then the run that never stopped.
        ahead = self.collector.plan.is_async and progress.step + 1 < self.prompts.rollouts
        samples, metrics = self.collector.collect(ahead)
        if self.sleeps:
            self.engine.sleep()
        self.reporter.write_samples(progress.step + 1, samples)
        tokens = sum(len(s.prompt.token_ids) + len(s.completion.token_ids) for s in samples)
        metrics |= {**rollout_metrics(samples, progress.step), "tokens": float(tokens)}
        progress.pending += self.collector.split_over_ranks(samples)
        progress.pending_rollouts += 1
        if self._batch_is_full():
            learner.fetch_states()
            filtering = self.config.algorithm.overlong_filtering
            batch = make_batch(progress.pending, self.world.device, filtering)
            progress.pending, progress.pending_rollouts = [], 0
            with self.timer.phase("logprob"):
                batch = learner.compute_logprobs(batch)
            batch, shaped = learner.compute_advantages(batch, self.collector.splits_groups)
            metrics |= shaped
            with self.timer.phase("update"):
                frozen = progress.step < self.config.training.freezing_actor_steps
                metrics |= learner.update(batch, frozen)
                learner.offload_states()
        else:
            metrics |= learner.metrics_without_update()
        progress.step += 1
        progress.metrics |= metrics
        # Whatever fails from here on, the update is not lost.
        waiting = progress.pending, progress.pending_rollouts
        self.state.capture(progress.step, *waiting, progress.metrics)
        self.collector.wait_for_flight()
        with self.timer.phase("weight_sync"):
            self._sync_weights()
        return metrics

    def _batch_is_full(self) -> bool:
        """Whether an optimizer step is due; what is left over at the end of the run makes one."""
        rollout, progress = self.config.rollout, self.progress
        samples_per_rollout = rollout.rollout_batch_size * rollout.n_samples_per_prompt
        samples = progress.pending_rollouts * samples_per_rollout
        enough = samples >= self.config.training.train_batch_size
        return enough or progress.step + 1 == self.prompts.rollouts

    def _sync_weights(self) -> None:
        if self.sleeps:
            self.engine.wake()
        weights = named_full_tensors(self.learner.model)
        self.engine.update_weights(weights, version=self.progress.step)

    def _step_with_evaluation(self) -> dict[str, float]:
        """A step with what surrounds it: evaluation, times, throughput and memory."""
        progress = self.progress
        progress.metrics = {}
        every = self.config.evaluation.eval_steps or self.prompts.rollouts
        with self.timer.phase("step"):
            if progress.step % every == 0 and progress.step + 1 < self.last_step:
                progress.metrics |= self.evaluate()
            self.train_step()
        return self._with_final_metrics(progress.metrics)

    def _with_final_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step with what comes after its update."""
        with self.timer.phase("step"):
            if self.progress.step == self.last_step:
                metrics = metrics | self.evaluate()
        metrics = metrics | self.timer.pop()
        tokens = metrics.pop("tokens")
        metrics["throughput/tokens_per_second"] = tokens / metrics["time/step"]
        peak = {"memory/peak_gib": peak_memory_gib(self.world.device)}
        metrics |= distributed.all_reduce_max(peak)
        metrics["episode"] = self.prompts.stream.episode
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Greedy reward of the current policy on the held-out prompts, if there are any."""
        if (held_out := self.prompts.held_out) is None:
            return {}
        return {"eval/reward/mean": self.collector.evaluate(held_out)}

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Records the step, and saves when a checkpoint is due."""
        # In this order, a kill in between costs nothing: a step that was logged but not saved is
        # dropped from the log and run again when the run resumes.
        self.reporter.write_step(self.progress.step, metrics)
        self.state.mark_logged()
        self.reporter.print_step(self.progress.step, metrics)
        if self._save_is_due():
            self.save()

    def _save_is_due(self) -> bool:
        options, step = self.config.checkpoint, self.progress.step
        if self.stop_requested is not None or step == self.last_step:
            return True
        if options.save_steps is not None and step % options.save_steps == 0:
            return True
        stream = self.prompts.stream
        return stream.finished_episode(options.save_interval, since=self.progress.began_at)

    def save(self) -> None:
        """Writes checkpoints/step-N and hf/step-N."""
        with self.timer.phase("checkpoint"):
            step = self.progress.step
            self.progress.saved_step = step  # even if it fails: a second time it would, too
            self.checkpoints.save(step, self.state.state_dict(), self.export)

    def _save_after(self, fault: BaseException) -> None:
        """Saves the last finished step before a `fault` ends the run; says so where it cannot."""
        step, saved = self.state.step, self.progress.saved_step
        if isinstance(fault, SecondKeyboardInterrupt) or step == saved:
            return
        why = "the fault came in the middle of an update"
        if step is not None:
            why = "the other ranks have not come to the same point"
            if self.state.agreement.on(step, SECONDS_TO_AGREE):
                try:
                    for stepper in self.learner.steppers.values():
                        reshard(stepper.model)  # it may have been left in the middle of a pass
                        stepper.optimizer.zero_grad(set_to_none=True)
                    return self.save()
                except Exception as error:
                    self.progress.saved_step, why = saved, str(error)
        logger.error("what came after step %d is lost: %s", saved, why)
