"""The `[reward]` section: where rewards come from, how they add up and how they are shaped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from torchrft.config.field_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveInt,
    Seconds,
    Section,
    Text,
    TextOrList,
    name_to_table,
)


class RewardFunction(Section):
    """One entry of `[reward] functions`."""

    name: Text
    """A registered name, or `path/to/file.py:function`."""
    weight: Number = 1.0
    """Weight in the sum."""
    options: dict[str, bool | int | float | str | list[str]] = {}
    """The function's keyword-only parameters, by name."""
    normalize: bool = False
    """Put the z-score by this source's running mean and deviation into the sum."""
    alias: Text | None = None
    """What parts, recipes and gate call it; by default `name`."""
    isolate: bool = True
    """Run the function of a file in worker processes; false runs it in the trainer's own."""


class RewardModel(Section):
    """One entry of `[reward] models`."""

    pretrain: Text
    """Folder or hub id of a model with a sequence-classification head of one label."""
    name: Text | None = None
    """What parts, recipes and gate call it; by default the last part of `pretrain`."""
    weight: Number = 1.0
    """Weight in the sum."""
    normalize: bool = False
    """Put the z-score by this source's running mean and deviation into the sum."""
    tokenizer: Text | None = None
    """Folder or hub id of its tokenizer; by default `pretrain`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or its tokenizer, as this user."""
    chat_template: Text | None = None
    """Jinja chat template, or file of it, that makes one text of prompt and response; by default
    the tokenizer's own, where it is another than the policy's."""


class Judge(Section):
    """One entry of `[reward] judges`."""

    name: Text = "judge"
    """What parts, recipes and gate call it."""
    pretrain: Text | None = None
    """Folder or hub id of the judge; its tokenizer is there as well."""
    trust_remote_code: bool = False
    """Run Python code that comes with the judge, as this user."""
    engine: Literal["native", "vllm", "remote"] = "native"
    """What generates: the native engine, vLLM, or an OpenAI-compatible server."""
    server_url: TextOrList = []
    """URL of the server, or several of the same; for engine "remote"."""
    model: Text | None = None
    """The server's name of the model; for engine "remote"."""
    template: Text
    """Jinja text, or file of it, of {{ prompt }}, {{ response }}, {{ label }}, {{ metadata.x }},
    {{ images }}."""
    parser: Text = "last_number"
    """How an answer becomes a number: "last_number", "verdict", a regular expression with one
    group, or `path/to/file.py:function`."""
    votes: Annotated[int, Field(gt=0, le=1000)] = 1
    """Answers per sample."""
    aggregate: Literal["majority", "mean"] = "majority"
    """How the votes become one number."""
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Sampling temperature of the answers."""
    max_new_tokens: PositiveInt = 256
    """Maximum tokens of an answer."""
    max_len: PositiveInt = 4096
    """Maximum tokens of a judge's prompt with its answer."""
    timeout: Seconds = 120.0
    """Seconds for one answer of a server, retries included."""
    concurrency: PositiveInt = 16
    """Requests to servers under way at once, per rank."""
    token_env: Text | None = None
    """Environment variable that holds the server's bearer token."""
    weight: Number = 1.0
    """Weight in the sum."""
    normalize: bool = False
    """Put the z-score by this source's running mean and deviation into the sum."""

    def faults(self) -> list[str]:
        """What its fields lack, and which of them have no effect."""
        served = self.engine == "remote"
        rules = (
            (served and not (self.server_url and self.model),
             'engine = "remote" needs server_url and model'),
            (not served and self.pretrain is None,
             f'engine = "{self.engine}" needs pretrain, the judge\'s model'),
            (self.votes > 1 and self.temperature == 0,
             f"votes = {self.votes} at temperature = 0 would all be equal; set temperature > 0 or "
             "votes = 1"),
            (0 < self.temperature < 1e-3,
             f"temperature = {self.temperature} makes logits overflow; use 0 or 0.001"),
            (not served and self.max_new_tokens >= self.max_len,
             f"max_new_tokens must be below max_len = {self.max_len}; lower it"),
        )  # fmt: skip
        faults = [text for is_broken, text in rules if is_broken]
        idle = ["pretrain", "trust_remote_code", "max_len"] if served else list(_OF_SERVERS)
        without = f'has no effect with engine = "{self.engine}" and votes = {self.votes}'
        for name in idle + ["aggregate"] * (self.votes == 1):
            if getattr(self, name) != type(self).model_fields[name].default:
                faults.append(f"{name} {without}; leave {name} out")
        return [f"judge {self.name!r}: {fault}" for fault in faults]


_OF_SERVERS = ("server_url", "model", "timeout", "concurrency", "token_env")


class Reward(Section):
    """Where rewards come from and how they are processed."""

    functions: list[
        Annotated[
            RewardFunction,
            BeforeValidator(name_to_table, json_schema_input_type=RewardFunction | Text),
        ]
    ] = []
    """Rule rewards, summed by weight: `[{ name = "exact_match", weight = 1.0 }]`; a plain name
    counts with weight 1."""
    reward_pretrain: TextOrList | None = None
    """Folders or hub ids of scalar reward models, each with weight 1."""
    models: list[RewardModel] = []
    """Scalar reward models with weights, tokenizers and templates of their own."""
    reward_model_offload: bool = False
    """Reward models are in host memory between rewards."""
    judges: list[Judge] = []
    """Generative judges, each with its template and parser."""
    rm_use_engine: bool = False
    """Reward models (by default `pretrain`) run in the inference engine, as pooling models."""
    remote_rm_url: TextOrList = []
    """URL of a reward server, or several of servers that are alike."""
    remote_rm_weight: Number = 1.0
    """Weight of the remote reward in the sum."""
    remote_rm_normalize: bool = False
    """Put the z-score by the remote reward's running mean and deviation into the sum."""
    remote_rm_protocol: Literal["torchrft", "predecessor"] = "torchrft"
    """Form of request and answer; docs/rewards_remote.md has both."""
    remote_rm_timeout: Seconds = 300.0
    """Seconds within which a reward server must answer a request; past it, others get its work."""
    remote_rm_deadline: Seconds = 1800.0
    """Seconds after which rewards that were asked for end the job, retries included."""
    remote_rm_retries: NonNegativeInt = 10
    """Retries of a request after connection errors, 429 and 5xx, from 0.5 s to 30 s apart."""
    remote_rm_batch_size: PositiveInt = 64
    """Samples per request."""
    remote_rm_concurrency: PositiveInt = 4
    """Requests under way at once, per rank."""
    remote_rm_token_env: Text | None = None
    """Environment variable that holds the server's bearer token."""
    error_reward: Number = 0.0
    """Reward of a source that has no verdict: a rule that hung or crashed, an unreadable judge."""
    max_reward_failures: Fraction = 0.5
    """Share of a source's last samples, of 64 or one rollout, that may end without a verdict."""
    reward_timeout: Seconds = 10.0
    """Seconds that a rule in a worker process may take for one sample."""
    reward_workers: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Worker processes per rank for rules; by default its share of the CPU cores, at most 8."""
    reward_memory: Annotated[float, Field(gt=0, le=1e6)] = 2.0
    """GiB that a rule may take in a worker process."""
    allow_unsafe_code: bool = False
    """Let `code` run programs where no isolation works: they may then do what this user may."""
    source_key: Text | None = None
    """Column that names a row's data source, for `recipes`."""
    recipes: dict[str, list[Text]] = {}
    """Which rewards count for a data source, as a table [reward.recipes]; without it, all do."""
    gate: list[Text] = []
    """Rewards of which none may be <= 0, or the whole reward is `gate_reward`."""
    gate_reward: Number = 0.0
    """The whole reward of a sample that the gate stops."""
    overlong_buffer_len: NonNegativeInt = 0
    """Responses that end within so many tokens of the limit are penalized (DAPO); 0 is off."""
    overlong_penalty_factor: NonNegativeFloat = 1.0
    """Largest overlong penalty."""
    reward_running_norm: bool = False
    """Divide rewards by the running standard deviation of all rewards so far."""
    reward_running_norm_minus_mean: bool = False
    """Subtract the running mean as well; needs `reward_running_norm`."""
    reward_clip: NonNegativeFloat = 0.0
    """Clip rewards to plus or minus this; 0 is off."""

    def scalar_models(self, policy: str) -> list[RewardModel]:
        """`models` and `reward_pretrain`; for `rm_use_engine` alone, the model `policy`."""
        plain = self.reward_pretrain or []
        if self.rm_use_engine and not (self.models or plain or self.judges):
            plain = [policy]
        return [*self.models, *(RewardModel(pretrain=pretrain) for pretrain in plain)]

    def weights(self, policy: str) -> list[tuple[str, float]]:
        """What parts, recipes and gate call the rewards, with weights, in the order of the sum."""
        sources = [(entry.alias or entry.name, entry.weight) for entry in self.functions]
        for entry in self.scalar_models(policy):
            sources.append((entry.name or Path(entry.pretrain).name, entry.weight))
        sources += [(judge.name, judge.weight) for judge in self.judges]
        return sources + ([("remote", self.remote_rm_weight)] if self.remote_rm_url else [])

    def names(self, policy: str) -> list[str]:
        """What parts, recipes and gate call the rewards."""
        return [name for name, _ in self.weights(policy)]

    def faults(self, policy: str) -> list[str]:
        """What is wrong with the rewards, taken together."""
        weights = dict(self.weights(policy))
        faults = self.name_faults(self.names(policy))
        faults += [fault for judge in self.judges for fault in judge.faults()]
        elsewhere = self.overlong_buffer_len or (self.gate and self.gate_reward)
        recipes = {f"of recipes.{key} ": recipe for key, recipe in self.recipes.items()}
        for where, recipe in (recipes or {"": list(weights)} if weights else {}).items():
            if not elsewhere and not any(weights.get(name, 1.0) for name in recipe):
                fault = f"every weight {where}is 0, so that every reward is: raise one"
                faults.append(f"[reward] {fault}")
        for name in weights if recipes else ():
            if not any(name in recipe for recipe in recipes.values()):
                fault = (
                    f'no recipe names "{name}", which then never counts: name it, or take it out'
                )
                faults.append(f"[reward] {fault}")
        if self.overlong_buffer_len and "overlong" in weights:
            faults.append('[reward] "overlong" is the overlong penalty; call the source otherwise')
        return faults

    def name_faults(self, names: Sequence[str]) -> list[str]:
        """What is wrong with the rewards' `names`, or with those that recipes and gate use."""
        faults = [
            f'[reward] has two sources named "{name}"; give one of them an alias or a name'
            for name in dict.fromkeys(name for name in names if names.count(name) > 1)
        ]
        recipes = {f"recipes.{key}": value for key, value in self.recipes.items()}
        return faults + [
            f'[reward] {where} names "{name}", which is no reward of this job; there are '
            f"{', '.join(names) or 'none'}"
            for where, listed in {"gate": self.gate, **recipes}.items()
            for name in listed
            if name not in names
        ]


TABLES: dict[str, type[Section]] = {
    "functions": RewardFunction,
    "models": RewardModel,
    "judges": Judge,
}
"""Fields that are lists of tables, and what an entry is."""
