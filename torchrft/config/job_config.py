"""Every parameter of a run: one field each, in the section where a reader would look.

A field's name is unique over all sections, so `--algorithm.kl_estimator k2` and `--kl_estimator k2`
mean the same. The text under a field is its documentation: `--help`, the JSON schema and
docs/configuration.md are made from it. Rules that join several fields are in rules.py and needs.py.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from torchrft.config.environment_config import Environment
from torchrft.config.field_types import (
    AdvantageEstimator,
    Count,
    Fraction,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PolicyLoss,
    PositiveFloat,
    PositiveInt,
    RawText,
    Seconds,
    Section,
    Temperature,
    Text,
    TextOrList,
    TwoRates,
    exact_int,
)
from torchrft.config.reward_config import Reward as Reward
from torchrft.config.reward_config import RewardFunction as RewardFunction


class Model(Section):
    """Which model is trained."""

    pretrain: Text
    """Hugging Face folder or hub id of the policy and its tokenizer."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Load the weights of `pretrain`, or make "random" ones from its config and `seed`."""
    ref_pretrain: Text | None = None
    """Folder or hub id of the KL term's reference; by default the policy's initial weights."""
    critic_pretrain: Text | None = None
    """Folder or hub id the critic starts from; by default `pretrain`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models and `processor` named here, as this user."""
    fp32_head: bool = False
    """Logits of policy, reference and engine in float32, from the bfloat16 states and weights."""
    freeze_vision: bool = False
    """Train the language model only: the image tower and its projector stay as they are."""


class Data(Section):
    """Where prompts come from and how they become tokens."""

    prompt_data: Text | None = None
    """Training prompts: .jsonl or .parquet file, dataset folder or hub id; `:split` may follow."""
    input_key: Text = "prompt"
    """Column of the prompt: a string, or a list of chat messages."""
    label_key: Text = "label"
    """Column handed to the reward functions as `label`; rows may lack it."""
    images_key: Text | None = None
    """Column of a prompt's images, one or a list; with `mixed_mm_data` by default `images`."""
    metadata_keys: list[Text] = []
    """Columns handed to the reward functions in `metadata`."""
    system_prompt: Text | None = None
    """Put before every prompt as the system message; needs `apply_chat_template`."""
    apply_chat_template: bool = False
    """Format prompts with the tokenizer's chat template."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Variables of the chat template, for prompts, as Qwen3's `enable_thinking = false`."""
    max_len: PositiveInt = 4096
    """Maximum tokens of prompt + response."""
    prompt_max_len: PositiveInt = 2048
    """Maximum tokens of a prompt, below `max_len`; longer ones are dropped, counted, never cut."""
    mixed_mm_data: bool = False
    """Prompts may have images or none; without it, `images_key` means that every one has some."""
    processor: Text | None = None
    """Folder or hub id of the multimodal processor; by default detected from `pretrain`."""
    min_pixels: PositiveInt | None = None
    """Smaller images are scaled up to so many pixels before the processor sees them."""
    max_pixels: PositiveInt | None = None
    """Larger images are scaled down to so many pixels before the processor sees them."""


class Training(Section):
    """How long training runs, in which batches and with which numerics."""

    num_episodes: PositiveInt = 1
    """Passes over the prompt set; fixes the learning-rate schedule."""
    max_steps: PositiveInt | None = None
    """Stop after so many rollouts, counted from the start of the run, also across resumes."""
    max_epochs: PositiveInt = 1
    """Passes over the samples of one rollout."""
    train_batch_size: PositiveInt
    """Samples per optimizer step, over all ranks."""
    micro_train_batch_size: PositiveInt = 1
    """Samples per data-parallel rank per forward and backward pass."""
    strict_batch_rule: bool = False
    """Refuse train_batch_size < rollout_batch_size x n_samples_per_prompt instead of warning."""
    packing_samples: bool = False
    """Pack samples of different lengths into one row without padding; the loss stays the same."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Token budget of a packed micro-batch; by default micro_train_batch_size x max_len."""
    freezing_actor_steps: NonNegativeInt = 0
    """The first so many rollouts train the critic only."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seeds weights, prompt order and sampling."""
    deterministic: bool = False
    """Use deterministic kernels only, on a GPU too (torch.use_deterministic_algorithms)."""
    bf16: bool = True
    """Compute in bfloat16 with float32 master weights and reductions, false in float32; unset, it
    is false on CPUs that lack bfloat16 instructions."""
    compile: bool = False
    """torch.compile every decoder layer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpointing_mode: Literal["full", "selective"] = "full"
    """What `gradient_checkpointing` recomputes: all of a layer, or not its dearest operations."""
    fused_linear_logprob: bool = False
    """Log-probs from hidden states without ever holding all logits."""
    chunk_size: PositiveInt = 4096
    """Tokens per chunk of `fused_linear_logprob`."""


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    actor_learning_rate: LearningRate = 5e-7
    """Peak learning rate of the policy."""
    critic_learning_rate: LearningRate = 9e-6
    """Peak learning rate of the critic."""
    lr_warmup_ratio: Fraction = 0.03
    """Share of the schedule's steps over which the learning rate rises linearly from 0."""
    lr_total_steps: PositiveInt | None = None
    """Optimizer steps that warm-up and decay span; by default those of `num_episodes`."""
    lr_decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    lr_min_ratio: Fraction = 0.1
    """The learning rate decays to this share of its peak."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm, over all parameters and ranks together."""
    l2: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay (AdamW), on matrices only."""
    adam_betas: TwoRates = (0.9, 0.95)
    """AdamW's two decay rates."""
    adam_offload: bool = False
    """Keep the optimizer's state in host memory between updates."""
    use_mp_opt: bool = False
    """bfloat16 sharded parameters with float32 master weights inside the optimizer."""


class Rollout(Section):
    """The engine that generates, and how it samples."""

    engine_type: Literal["vllm", "sglang", "native"] = "vllm"
    """Rollout engine; "native" is torchrft's own, in PyTorch, on any device."""
    rollout_batch_size: Count
    """Prompts per rollout, over all ranks."""
    micro_rollout_batch_size: PositiveInt = 2
    """Samples per data-parallel rank per forward without gradient (old and reference log-probs)."""
    n_samples_per_prompt: Count = 4
    """Responses sampled per prompt."""
    temperature: Temperature = 1.0
    """Sampling temperature; log-probs for training are taken at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus sampling: keep the most likely tokens that hold this probability; 1 is off."""
    top_k: NonNegativeInt = 0
    """Sample among the k most likely tokens; 0 is off."""
    truncation_replay: bool = False
    """Training log-probs are over the tokens that `top_p` and `top_k` left at each position."""
    first_token_temperature: Temperature | None = None
    """Temperature of a response's first token (FIRE sampling); by default `temperature`."""
    max_new_tokens: PositiveInt | None = None
    """Maximum tokens of a response, if smaller than what max_len leaves."""
    min_new_tokens: NonNegativeInt = 0
    """No stop token is sampled before so many tokens."""
    stop: list[RawText] = []
    """Strings that end a response, in addition to the model's end-of-sequence tokens."""
    stop_token_ids: list[NonNegativeInt] = []
    """Token ids that end a response, in addition to the model's end-of-sequence tokens."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once by one engine; the others wait."""
    engine_tp_size: PositiveInt = 1
    """Tensor parallelism of the engine."""
    engine_mem_util: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of GPU memory the engine may take."""
    enable_engine_sleep: bool = True
    """The engine gives its memory back while the trainer computes."""
    vllm: dict[str, bool | int | float | str] = {}
    """Further arguments of `vllm.LLM`, as a table [rollout.vllm]."""
    sglang: dict[str, bool | int | float | str] = {}
    """Further arguments of `sglang.Engine`, as a table [rollout.sglang]."""
    server_urls: TextOrList = []
    """Running vLLM or SGLang servers that generate, as http://host:port."""
    request_timeout: Seconds = 600.0
    """Seconds within which a server must answer a request; past it, others get its work."""
    request_retries: NonNegativeInt = 3
    """Retries of a request that found no connection or ended in a server's error."""
    async_level: Annotated[Literal[0, 1], BeforeValidator(exact_int)] = 0
    """1 generates the next rollout on servers while the trainer updates, one step off-policy."""
    weight_folder: Text | None = None
    """Folder that trainer and servers share, for weights; by default the temporary folder."""
    mismatch_alarm: PositiveFloat = 0.1
    """Warn when the engine's log-probs differ from the trainer's by more than this on average."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample on until the batch is full (DAPO)."""
    dynamic_sampling_max_rounds: PositiveInt = 4
    """Rounds of generation after which a step runs on what dynamic sampling found."""


# Clip ranges of papers by policy loss, and of DAPO; for all others the guide's are the defaults.
CLIP_RANGES = {
    "gspo": {"clip_range": 3e-4, "clip_range_higher": 4e-4},
    "gmpo": {"clip_range": 0.4, "clip_range_higher": 0.4},
    "cispo": {"clip_range": 1.0},  # a ratio is never below 0: no lower bound
    "dapo": {"clip_range_higher": 0.28},
}


class Algorithm(Section):
    """Advantage, loss and KL; formulas and papers are in docs/algorithms.md."""

    advantage_estimator: AdvantageEstimator = "group_norm"
    """Preset of advantage, policy loss and aggregation (group_norm is GRPO), or your own."""
    advantage_options: dict[str, bool | int | float | str] = {}
    """Options of an advantage estimator of your own."""
    policy_loss: PolicyLoss | None = None
    """Policy loss in place of the preset's, or your own."""
    policy_loss_options: dict[str, bool | int | float | str] = {}
    """Options of a policy loss of your own."""
    loss_aggregation: (
        Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"] | None
    ) = None
    """How token losses become one number, in place of the preset's way."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence to the reference model."""
    init_kl_coef: NonNegativeFloat = 0.001
    """KL coefficient (initial, if it adapts); 0 means that no reference model is loaded."""
    kl_placement: Literal["loss", "reward"] | None = None
    """Where the KL term goes, in place of the preset's way (reinforce_plus_plus: the reward).
    In the reward, an unset `kl_estimator` is k1."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether the KL coefficient follows `kl_target`."""
    kl_target: PositiveFloat = 0.01
    """KL divergence that the adaptive coefficient aims for (and CPGD's drift)."""
    kl_horizon: PositiveInt = 10000
    """Samples over which the adaptive coefficient reacts."""
    clip_range: PositiveFloat = 0.2
    """Lower clip: the ratio stays above 1 - clip_range. For gspo 3e-4, gmpo 0.4, cispo 1 (none)."""
    clip_range_higher: PositiveFloat = 0.3
    """Upper clip: the ratio stays below 1 + this value. For gspo 4e-4, gmpo 0.4, dapo 0.28."""
    dual_clip: Annotated[float, Field(gt=1, le=1e9)] | None = None
    """Bound of the loss on negative advantages (dual-clip PPO), as a multiple of the advantage."""
    value_clip: PositiveFloat = 0.2
    """Clip of the critic's change."""
    gamma: Fraction = 1.0
    """Discount."""
    lambd: Fraction = 0.95
    """Lambda of generalized advantage estimation."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    high_entropy_token_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of response tokens, by entropy, that keep their policy loss; 1 keeps all."""
    cpgd_weight: Literal["std", "clip_filter", "none"] = "std"
    """Weighting of CPGD's advantages."""
    cpgd_drift_coef: NonNegativeFloat = 0.001
    """Initial weight of CPGD's policy drift."""
    overlong_filtering: bool = False
    """Responses cut off by the length limit do not count in the loss."""
    advantages_norm: bool = False
    """Whiten advantages over all response tokens of the rollout."""
    advantage_clip: NonNegativeFloat = 0.0
    """Clip advantages to plus or minus this; 0 is off."""
    rollout_correction: Literal["none", "token_tis", "seq_tis", "token_mask", "seq_mask"] = "none"
    """Correction of the mismatch between the engine's log-probs and the trainer's."""
    rollout_correction_cap: Annotated[float, Field(ge=1, le=1e9)] = 2.0
    """Cap of the importance weight of `rollout_correction`."""

    @property
    def loss(self) -> str:
        """The policy loss in use: the field, or the preset's."""
        named = self.advantage_estimator in ("cpgd", "gspo", "gmpo", "cispo")  # like their loss
        return self.policy_loss or (self.advantage_estimator if named else "ppo_clip")

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL term goes into the reward: by the field, or the preset."""
        named = self.advantage_estimator == "reinforce_plus_plus"
        return self.kl_placement == "reward" or (named and self.kl_placement is None)

    @model_validator(mode="after")
    def _take_the_papers_values(self) -> Self:
        """Fields that are not set get the values of the paper, where the guide's do not fit it."""
        dapo = self.advantage_estimator == "dapo" and self.loss == "ppo_clip"
        values: dict[str, Any] = CLIP_RANGES.get("dapo" if dapo else self.loss, {})
        values = values | ({"kl_estimator": "k1"} if self.kl_in_reward else {})
        unset = {name: v for name, v in values.items() if name not in self.model_fields_set}
        self.__dict__.update(unset)  # past the freeze, and without counting as set
        return self


class Parallel(Section):
    """How models are spread over ranks."""

    zero_stage: Annotated[Literal[1, 2, 3], BeforeValidator(exact_int)] = 2
    """ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    fsdp: bool = False
    """Full sharding with FSDP2's own options; excludes an explicit `zero_stage`."""
    fsdp_cpu_offload: bool = False
    """Parameters, gradients and optimizer state live in host memory."""
    sp_size: PositiveInt = 1
    """Sequence parallelism: ranks that share one sequence."""
    tp_size: PositiveInt = 1
    """Tensor parallelism: ranks that share one layer."""
    dp_replicate: PositiveInt = 1
    """Data-parallel replicas (HSDP's outer dimension)."""
    dp_shard: Annotated[Literal[-1] | PositiveInt, BeforeValidator(exact_int)] = -1
    """Ranks over which a replica is sharded; -1 takes all that are left."""
    deepspeed_config: Text | None = None
    """DeepSpeed JSON that fills the fields it has a name for; they may not say otherwise."""
    collective_timeout: Seconds = 600.0
    """Seconds after which a wait for another rank ends the job."""


class Evaluation(Section):
    """Greedy evaluation on held-out prompts."""

    eval_data: Text | None = None
    """Evaluation prompts, in the form of `prompt_data`."""
    eval_steps: PositiveInt | None = None
    """Evaluate before step 1 and every so many steps; by default only at the start and the end."""


class Logging(Section):
    """What a run writes down about itself."""

    log_dir: Text | None = None
    """Folder of metrics.jsonl, rollouts and plots; by default save_path/logs."""
    plot_every: PositiveInt = 10
    """Plot the distribution of generation lengths every so many steps."""
    use_tensorboard: Text | None = None
    """TensorBoard folder."""
    use_wandb: Text | None = None
    """Weights & Biases project (WANDB_MODE=offline works)."""
    wandb_org: Text | None = None
    """Weights & Biases organization."""
    wandb_run_name: Text | None = None
    """Weights & Biases run name; by default generated."""


class Checkpoint(Section):
    """What is saved, how often, and how a run resumes."""

    save_path: Text = "./checkpoints"
    """Folder of the run: config.toml, checkpoints/step-N, hf/step-N."""
    save_interval: PositiveInt = 1
    """Save every so many episodes."""
    save_steps: PositiveInt | None = None
    """Save every so many steps as well."""
    load_checkpoint: bool = False
    """Resume from `ckpt_path`, by default from the newest complete checkpoint under save_path."""
    ckpt_path: Text | None = None
    """Checkpoint to resume from: a step-N folder, or a folder of them; needs `load_checkpoint`."""
    max_ckpt_num: PositiveInt = 3
    """Checkpoints kept; the oldest go once a new one is complete."""
    max_ckpt_mem: PositiveInt = 1000
    """Gigabytes (1e9 bytes) that kept checkpoints and exports may take; the newest always stays."""


class JobConfig(Section):
    """The whole configuration of a run."""

    model: Model
    data: Data = Data()
    training: Training
    optimizer: Optimizer = Optimizer()
    rollout: Rollout
    algorithm: Algorithm = Algorithm()
    reward: Reward = Reward()
    environment: Environment = Environment()
    parallel: Parallel = Parallel()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def trusted_sources(self) -> set[str]:
        """Folders and hub ids whose own Python code may run."""
        model, reward = self.model, self.reward
        sources = [model.pretrain, model.ref_pretrain, model.critic_pretrain, self.data.processor]
        sources = sources if model.trust_remote_code else []
        for entry in reward.models:
            sources += [entry.pretrain, entry.tokenizer] if entry.trust_remote_code else []
        sources += [judge.pretrain for judge in reward.judges if judge.trust_remote_code]
        return {source for source in sources if source is not None}
