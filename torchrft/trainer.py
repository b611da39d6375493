"""The training loop. `train_step` is the whole algorithm, in the order data flows."""

from functools import partial
from pathlib import Path

import torch

from torchrft.build.learner import build_learner
from torchrft.build.models import check_models, load_vision
from torchrft.build.rewards import build_rewards, with_source_key
from torchrft.build.rollout import policy_engine, sampling_params
from torchrft.checkpoint.hf_export import export_hf, files_beside_weights
from torchrft.checkpoint.manager import CheckpointManager
from torchrft.checkpoint.set_aside import set_aside
from torchrft.collector import Collector, Drawing
from torchrft.config.job_config import Data, JobConfig
from torchrft.config.manager import to_toml
from torchrft.config.start import lacks_bf16, start_notes, with_precision
from torchrft.data.loader import PromptLoader
from torchrft.data.prompts import PromptDataset, load_prompts
from torchrft.learn.batch import make_batch
from torchrft.metrics.console import Console
from torchrft.metrics.files import METRICS_FILE, read_metrics, write_atomically
from torchrft.metrics.logger import MetricLogger
from torchrft.metrics.plots import plot_curves, plot_lengths
from torchrft.metrics.rollout_dump import dump
from torchrft.metrics.rollout_stats import dump_rows, rollout_metrics, warn_of_mismatch
from torchrft.metrics.stuck import StuckAlarm
from torchrft.metrics.timing import PhaseTimer, peak_memory_gib
from torchrft.models.loader import load_tokenizer
from torchrft.parallel import ParallelDims, reshard
from torchrft.rewards.shaping import RewardShaper
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.run_state import RunState
from torchrft.tools import distributed
from torchrft.tools.distributed import World, on_all, on_main
from torchrft.tools.lock import hold
from torchrft.tools.logging import logger
from torchrft.tools.seeds import seed_everything
from torchrft.tools.signals import Abandoned, SecondKeyboardInterrupt, StopSignal
from torchrft.types import Prompt, Sample

SECONDS_TO_AGREE = 20.0  # that ranks may be apart when a fault has ended what they do


class Trainer:
    """One training run, on one rank of it: `Trainer(config, world).train()`.

    Raises ValueError, from the constructor, for what only loading can show: a prompt file, a model
    folder, a reward function or a checkpoint that cannot be used.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        self.world = world
        # As the slowest host of the job computes.
        self.lacks_bf16 = distributed.any_rank(lacks_bf16())
        self.config = config = with_precision(config, lambda: self.lacks_bf16)
        save_path = Path(config.checkpoint.save_path)
        self.log_dir = Path(config.logging.log_dir or save_path / "logs")
        on_main(lambda: hold(save_path, "save_path"), "lock save_path")
        on_main(lambda: hold(self.log_dir, "log_dir"), "lock log_dir")
        self.dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        seed_everything(config.training.seed)
        # On a CPU it costs nothing: there several threads add up in any order otherwise.
        on_cpu = world.device.type == "cpu"
        torch.use_deterministic_algorithms(on_cpu or config.training.deterministic)
        self.dims = ParallelDims.of(config.parallel, world.world_size)
        self.ranks = self.dims.data_ranks(world.device.type)
        self.step = self.saved_step = self.pending_rollouts = 0
        self.step_began = 0  # where in the stream
        self.row: dict[str, float] = {}  # metrics of the step under way
        self.stop_requested: int | None = None
        self.pending: list[Sample] = []  # samples that wait for a full train_batch_size
        check_models(config)  # before data and engines, which take minutes
        self._build_data()
        self._build_rollout()  # first: an engine that does not start or fit shows at once
        self.learner = build_learner(
            config, world, self.dims, self.dtype, self.schedule_steps, self.shaper, self.vision
        )
        self.state = self._build_state()
        self.agreement = distributed.Agreement()
        self._build_output()

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.tokenizer = load_tokenizer(config.model.pretrain)
        self.scorer = build_rewards(config, world, self.dtype, self.tokenizer)
        self.shaper = RewardShaper(config.reward)
        data = with_source_key(config)
        self.vision = load_vision(config)
        self.processor = self.tokenizer if self.vision is None else self.vision.processor
        prompts = self._load_prompts("prompt_data", data.prompt_data or "", data)
        size, ranks = config.rollout.rollout_batch_size, self.ranks
        self.samples_per_rollout = size * config.rollout.n_samples_per_prompt
        self.prompts = PromptLoader(prompts, size, config.training.seed, ranks.rank, ranks.size)
        self.eval_prompts: list[Prompt] = []
        if (source := config.evaluation.eval_data) is not None:
            held_out = self._load_prompts("eval_data", source, data)
            self.eval_prompts = list(held_out[world.rank :: world.world_size])
        self.evaluates = source is not None
        self.scorer.check(prompts)
        self.scorer.check(self.eval_prompts, "eval_data")
        self.schedule_steps = self.prompts.total_steps(config.training.num_episodes)
        self.last_step = min(self.schedule_steps, config.training.max_steps or self.schedule_steps)
        for note in start_notes(config, len(prompts), self.lacks_bf16) if world.is_main else ():
            logger.warning(note)

    def _load_prompts(self, name: str, source: str, data: Data) -> PromptDataset:
        prompts = load_prompts(source, data, self.tokenizer, name, self.vision)
        kept = on_all(lambda: (len(prompts), prompts.digest()), name)
        if any(other != kept[0] for other in kept):
            raise ValueError(
                f"{name}: the ranks keep other prompts, {', '.join(str(n) for n, _ in kept)} of "
                "them: give all hosts the same files, with their images"
            )
        return prompts

    def _build_rollout(self) -> None:
        config = self.config
        phases = ("rollout", "reward", "logprob", "update", "weight_sync", "step")
        self.timer = PhaseTimer(self.world.device, phases)
        self.engine = policy_engine(config, self.dtype, self.world.device, self.vision)
        # Servers that generate while the trainer computes cannot sleep then.
        self.sleeps = config.rollout.enable_engine_sleep and not config.rollout.async_level
        if self.sleeps:
            self.engine.sleep()
        rollout, train_batch_size = config.rollout, config.training.train_batch_size
        # Whole prompts go to one rank, which computes each once. If an optimizer step takes parts
        # of groups, samples go one by one, so that any number of ranks takes the same.
        n = rollout.n_samples_per_prompt
        drawing = Drawing(
            sampling_params(config),
            config.training.seed,
            rollout.rollout_batch_size,
            rollout.dynamic_sampling_max_rounds if rollout.dynamic_sampling else None,
            unit=1 if train_batch_size % (n * self.ranks.size) else n,
            ranks=self.ranks,
            helpers=self.dims.model_ranks,
            is_async=rollout.async_level > 0,
        )
        self.collector = Collector(
            drawing, self.engine, self.prompts, self.scorer, self.shaper, self.timer
        )

    def _build_state(self) -> RunState:
        rollout = self.config.rollout
        batch_sizes = {
            "rollout_batch_size": rollout.rollout_batch_size,
            "n_samples_per_prompt": rollout.n_samples_per_prompt,
            "train_batch_size": self.config.training.train_batch_size,
            "data_parallel_ranks": self.ranks.size,
        }
        options, rank = self.config.checkpoint, self.world.rank
        return RunState(options, batch_sizes, rank, self.collector, self.learner)

    def _build_output(self) -> None:
        config = self.config
        save_path = Path(config.checkpoint.save_path)
        most, size = config.checkpoint.max_ckpt_num, config.checkpoint.max_ckpt_mem * 10**9
        self.checkpoints = CheckpointManager(save_path, most, size)
        self.other_files: dict[str, bytes] = {}  # rank 0's; read now, since they may be gone later
        read = partial(files_beside_weights, config.model.pretrain)
        on_main(lambda: self.other_files.update(read()), "read pretrain")
        if not (config.checkpoint.load_checkpoint and self.state.resume(self.checkpoints)):
            set_aside(save_path, self.log_dir)
        progress = self.state.progress
        self.step = self.saved_step = progress["step"]
        self.pending = list(progress["pending"])
        self.pending_rollouts = progress["pending_rollouts"]
        self.step_began = self.prompts.position
        config_file, text = save_path / "config.toml", to_toml(config)
        on_main(lambda: write_atomically(config_file, text), "write config.toml")
        settings, began = config.model_dump(mode="json"), self.step or None
        self.logger = MetricLogger(config.logging, self.log_dir, settings, resume_step=began)
        records = read_metrics(self.log_dir) if began else []
        if on_main(lambda: bool(records) and records[-1]["step"] == self.step, "read metrics"):
            self.state.mark_logged()
        self.stuck = StuckAlarm(records)
        self.console = Console(self.last_step, self.step)

    def train(self) -> int | None:
        """Runs to the last step. Returns the number of the signal that ended it early, or None.

        Whatever ends it, the state after the last finished step is saved, if all ranks get there.
        """
        with StopSignal() as stop, self.console, self.logger:
            self.collector.abandonable = stop.abandonable
            try:
                self._sync_weights()
                if unlogged := self.state.progress["unlogged"]:  # a fault came after its update
                    self._finish_step(self._completed(unlogged))
                while self.step < self.last_step and self.stop_requested is None:
                    metrics = self._measured_step()
                    stopping = distributed.any_rank(stop.received is not None)
                    self.stop_requested = (stop.received or 15) if stopping else None
                    self._finish_step(metrics)
            except BaseException as fault:
                self._save_after(fault)
                if isinstance(fault, SystemExit):  # it would end the job as if all were well
                    raise RuntimeError("a function of the job called sys.exit()") from fault
                if not (stop.received and isinstance(fault, Abandoned | distributed.RankError)):
                    raise
                if self.state.step != self.saved_step:
                    raise TimeoutError(
                        "stopped in a step that did not end, without saving"
                    ) from None
                self.stop_requested = stop.received
        self.engine.close()
        self.scorer.close()
        self._summarize()
        return self.stop_requested

    def _save_after(self, fault: BaseException) -> None:
        """Saves the last finished step before a `fault` ends the run; says so where it cannot."""
        step = self.state.step
        if isinstance(fault, SecondKeyboardInterrupt) or step == self.saved_step:
            return
        saved, why = self.saved_step, "the fault came in the middle of an update"
        if step is not None:
            why = "the other ranks have not come to the same point"
            if self.agreement.on(step, SECONDS_TO_AGREE):
                try:
                    for stepper in self.learner.steppers.values():
                        reshard(stepper.model)  # it may have been left in the middle of a forward
                    return self.save()
                except Exception as error:
                    self.saved_step, why = saved, str(error)
        logger.error("what came after step %d is lost: %s", saved, why)

    def _summarize(self) -> None:
        if not self.world.is_main:
            return
        paths = {
            "config": Path(self.config.checkpoint.save_path) / "config.toml",
            "checkpoints": self.checkpoints.checkpoints,
            "Hugging Face": self.checkpoints.exports / f"step-{self.step}",
            "metrics": self.log_dir / METRICS_FILE,
            **{name: self.log_dir / name for name in ("rollouts", "plots")},
        }
        paths = {name: path for name, path in paths.items() if path.exists()}
        try:
            plot_curves(self.log_dir)
            records = read_metrics(self.log_dir)
        except (OSError, ValueError) as error:  # all is saved by now
            logger.warning("the summary lacks metrics: %s", error)
            records = [{"step": self.step}]
        self.console.summary(paths, records)

    def train_step(self) -> dict[str, float]:
        """One rollout and what is learned from it."""
        self.step_began = self.prompts.position
        # Beyond max_steps, too: a run that it stops goes on as one that never stopped.
        ahead = self.config.rollout.async_level > 0 and self.step + 1 < self.schedule_steps
        samples, metrics = self.collector.collect(ahead)
        if self.sleeps:
            self.engine.sleep()
        metrics |= self._log_samples(samples)
        self.pending += self.collector.split_over_ranks(samples)
        self.pending_rollouts += 1
        if self._batch_is_full():
            for stepper in self.learner.steppers.values():
                stepper.fetch_state()
            filtering = self.config.algorithm.overlong_filtering
            batch = make_batch(self.pending, self.world.device, filtering)
            self.pending, self.pending_rollouts = [], 0
            with self.timer.phase("logprob"):
                batch = self.learner.compute_logprobs(batch)
            batch, shaped = self.learner.compute_advantages(batch, self.collector.splits_groups)
            metrics |= shaped
            with self.timer.phase("update"):
                self.state.invalidate()
                frozen = self.step < self.config.training.freezing_actor_steps
                metrics |= self.learner.update(batch, frozen)
                for stepper in self.learner.steppers.values():
                    stepper.offload_state()
        else:
            metrics |= self.learner.metrics_without_update()
        self.step += 1
        self.row |= metrics
        # Whatever fails from here on, the update is not lost.
        self.state.capture(self.step, self.pending, self.pending_rollouts, self.row)
        self.collector.wait_for_flight()
        with self.timer.phase("weight_sync"):
            self._sync_weights()
        return metrics

    def _measured_step(self) -> dict[str, float]:
        """A step with what surrounds it: evaluation, times, throughput and memory."""
        self.row = {}
        every = self.config.evaluation.eval_steps or self.schedule_steps
        with self.timer.phase("step"):
            if self.evaluates and self.step % every == 0 and self.step + 1 < self.last_step:
                self.row |= self.evaluate()
            self.train_step()
        return self._completed(self.row)

    def _completed(self, row: dict[str, float]) -> dict[str, float]:
        """The metrics of a step with what comes after its update."""
        with self.timer.phase("step"):
            if self.evaluates and self.step == self.last_step:
                row = row | self.evaluate()
        metrics = row | self.timer.pop()
        tokens = metrics.pop("tokens")
        metrics["throughput/tokens_per_second"] = tokens / metrics["time/step"]
        peak = {"memory/peak_gib": peak_memory_gib(self.world.device)}
        metrics |= distributed.all_reduce_max(peak)
        metrics["episode"] = self.prompts.episode
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Greedy reward of the current policy on the held-out prompts."""
        return {"eval/reward/mean": self.collector.evaluate(self.eval_prompts)}

    def _batch_is_full(self) -> bool:
        """Whether an optimizer step is due; what is left over at the end of the run makes one."""
        samples = self.pending_rollouts * self.samples_per_rollout
        enough = samples >= self.config.training.train_batch_size
        return enough or self.step + 1 == self.schedule_steps

    def _sync_weights(self) -> None:
        if self.sleeps:
            self.engine.wake()
        self.engine.update_weights(
            named_full_tensors(self.learner.policy.model.model), version=self.step
        )

    def _log_samples(self, samples: list[Sample]) -> dict[str, float]:
        """Writes all ranks' samples down and returns their metrics."""
        step = self.step + 1
        if self.world.is_main:
            dump(self.log_dir, step, dump_rows(samples))
            if step % self.config.logging.plot_every == 0:
                lengths = [len(sample.completion.token_ids) for sample in samples]
                plot_lengths(self.log_dir, step, lengths, self.config.data.max_len)
        tokens = sum(len(s.prompt.token_ids) + len(s.completion.token_ids) for s in samples)
        return {**rollout_metrics(samples, self.step), "tokens": float(tokens)}

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Records the step, and saves when a checkpoint is due."""
        # In this order, a kill in between costs nothing: a step that was logged but not saved is
        # dropped from the log and run again when the run resumes.
        if self.world.is_main:
            warn_of_mismatch(self.step, metrics, self.config.rollout.mismatch_alarm)
            if warning := self.stuck.hear(metrics):
                logger.warning("step %d: %s", self.step, warning)
        self.logger.log(self.step, metrics)
        self.state.mark_logged()
        self.console.step(self.step, metrics)
        if self._save_is_due():
            self.save()

    def _save_is_due(self) -> bool:
        options = self.config.checkpoint
        if self.stop_requested is not None or self.step == self.last_step:
            return True
        if options.save_steps is not None and self.step % options.save_steps == 0:
            return True
        return self.prompts.finished_episode(options.save_interval, since=self.step_began)

    def save(self) -> None:
        """Writes checkpoints/step-N and hf/step-N."""
        model, files = self.learner.policy.model.model, self.other_files
        export = partial(export_hf, model, self.processor, dtype=self.dtype, files=files)
        with self.timer.phase("checkpoint"):
            self.saved_step = self.step  # even if it fails: a second time it would, too
            self.checkpoints.save(self.step, self.state.state_dict(), export)
