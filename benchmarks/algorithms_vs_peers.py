"""Every formula that torchrft shares with TRL and verl, on random ragged tensors in float64.

    pip install --no-deps trl==1.16.0 verl==0.9.1
    pip install accelerate datasets tensordict omegaconf hydra-core codetiming ray
    python benchmarks/algorithms_vs_peers.py [--cases 20]

The peers' own functions are called, none is copied; a peer that is not installed is named and left
out. The first table holds what must agree: its numbers are the largest differences of values and of
gradients over all cases, and the script fails if one is above 1e-8 (advantages: 1e-6, since
torchrft returns them in float32). The second table holds what differs on purpose, and by how much.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import machine, table
from formula_cases import (
    BETA,
    BUDGET,
    CLIPS,
    GROUPS,
    HIGH,
    KL,
    LOW,
    MODES,
    SHARE,
    SIZE,
    WIDTH,
    Case,
    Pair,
    biased,
    difference,
    estimated,
    ours,
)
from torch import Tensor

from torchrft.algorithms import advantages
from torchrft.algorithms.corrections import correction_weights
from torchrft.algorithms.kl import adapt_coefficient, kl_divergence
from torchrft.algorithms.losses import value_loss
from torchrft.algorithms.selection import high_entropy_mask

# ------------------------------------------------------------------------------------------ TRL


def trl_loss(trainer: Any, loss_type: str, **settings: Any) -> Callable[[Case], Tensor]:
    """The loss of a TRL trainer on a case's tensors, without a model."""

    def call(case: Case) -> Tensor:
        same = SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        )
        arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False)
        arguments.steps_per_generation = 1
        defaults = {
            "loss_type": loss_type,
            "importance_sampling_level": "token",
            "epsilon_low": LOW,
            "epsilon_high": HIGH,
            "beta": 0.0,
            "top_entropy_quantile": 1.0,
            "max_completion_length": BUDGET,
        }
        self = SimpleNamespace(
            **(defaults | settings),
            args=arguments,
            accelerator=same,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            off_policy_mask_threshold=None,
            use_vllm=False,
            aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *a, **k: (case.logprobs, case.entropy, None),
        )
        self.get_high_entropy_mask = lambda *a: trainer.get_high_entropy_mask(self, *a)
        ids = torch.zeros(case.mask.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": case.float_mask,
            "advantages": case.sequence[:, 0],
            "old_per_token_logps": case.old,
            "ref_per_token_logps": case.ref,
            "num_items_in_batch": case.float_mask.sum(),
        }
        return trainer._compute_loss(self, None, inputs)

    return call


def trl_mask(trainer: Any, share: float) -> Callable[[Case], Tensor]:
    same = SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, dim, pad_index: x)
    self = SimpleNamespace(accelerator=same)
    return lambda case: trainer.get_high_entropy_mask(self, case.entropy, case.mask, 1 - share)


def trl_pairs(trainer: Any, geometric: Any) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {
        "grpo": (ours("ppo_clip", MODES[1], **CLIPS), trl_loss(trainer, "grpo")),
        "dapo": (ours("ppo_clip", MODES[0], **CLIPS), trl_loss(trainer, "dapo")),
        "dr_grpo": (ours("ppo_clip", MODES[2], **CLIPS), trl_loss(trainer, "dr_grpo")),
        "grpo + KL (k3)": (
            ours("ppo_clip", MODES[1], **CLIPS, **KL),
            trl_loss(trainer, "grpo", beta=BETA),
        ),
        "cispo (cap 1.3)": (
            ours("cispo", clip_range_higher=0.3),
            trl_loss(trainer, "cispo", epsilon_high=1.3),
        ),
        "gspo": (
            ours("gspo"),
            trl_loss(
                *(trainer, "grpo"),
                importance_sampling_level="sequence",
                epsilon_low=3e-4,
                epsilon_high=4e-4,
            ),
        ),
        "gmpo": (ours("gmpo"), trl_loss(geometric, "grpo", epsilon_low=0.4, epsilon_high=0.4)),
    }
    keep = {"keep": trl_mask(trainer, SHARE)}
    for mode, kind in zip(MODES, ("dapo", "grpo", "dr_grpo"), strict=True):
        pairs[f"{kind} + KL, high-entropy tokens"] = (
            ours("ppo_clip", mode, **CLIPS, **KL, **keep),
            trl_loss(trainer, kind, beta=BETA, top_entropy_quantile=SHARE),
        )
    return pairs


def trl_reasons(trainer: Any) -> list[list[str]]:
    kept = [
        (high_entropy_mask(c.entropy, c.mask, SHARE) ^ trl_mask(trainer, SHARE)(c)).sum()
        for c in map(Case, range(20))
    ]
    empty = Case(0, empty=True)
    first, second = ours("ppo_clip", MODES[1], **CLIPS), trl_loss(trainer, "grpo")
    ratio = float(first(empty).detach() / second(empty).detach())
    return [
        [
            "TRL: which tokens have high entropy",
            f"{int(max(kept))} token a batch at most",
            "torchrft keeps at least the share (rounded up), TRL those above a quantile that "
            "is interpolated",
        ],
        [
            "TRL: rows without a token",
            f"x {ratio:.4f} = 24 / 22",
            "TRL's mean over sequences counts them, torchrft's does not",
        ],
        [
            "TRL: std's epsilon",
            f"{1e-4 / 0.3:.1e} of an advantage, at a std of 0.3",
            "std + 1e-4 in TRL (inside its trainer), std + 1e-6 in torchrft and verl",
        ],
        [
            "TRL: cispo's epsilon_high",
            "1.3 is 1 + 0.3",
            "TRL's is the cap of the ratio itself; clip_range_higher is what it may exceed 1 by",
        ],
        [
            "TRL: entropy bonus",
            "with high-entropy tokens",
            "TRL takes the mean entropy of the tokens that are kept, torchrft of all",
        ],
    ]


# ----------------------------------------------------------------------------------------- verl


def verl_loss(core: Any, config: Any, name: str, mode: str = MODES[1]) -> Callable[[Case], Tensor]:
    function = core.get_policy_loss_fn(name)

    def call(case: Case) -> Tensor:
        args = (case.old, case.logprobs, case.advantages, case.float_mask)
        return function(*args, mode.replace("_", "-"), config)[0]

    return call


def verl_advantages(core: Any, name: str, **options: Any) -> Callable[[Case], Tensor]:
    function = core.get_adv_estimator_fn(name)
    config = SimpleNamespace(gamma=0.9)

    def call(case: Case) -> Tensor:
        more = {"index": case.group.numpy()} if name != "reinforce_plus_plus" else {}
        args = {"token_level_rewards": case.token_rewards.clone()}
        return function(**args, response_mask=case.float_mask, config=config, **more, **options)[0]

    return call


def verl_pairs(core: Any, actor: Any) -> dict[str, Pair]:
    base = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}

    def config(low: float, high: float) -> Any:
        made = actor(**base, clip_ratio_low=low, clip_ratio_high=high)
        made.global_batch_info["loss_scale_factor"] = BUDGET
        return made

    guide = config(LOW, HIGH)
    pairs: dict[str, Pair] = {}
    for mode in MODES:
        dual = {**CLIPS, "dual_clip": 3.0}
        for name, peer, options, clips in (
            ("ppo_clip", "vanilla", dual, guide),
            ("gspo", "gspo", {}, config(3e-4, 4e-4)),
            ("cispo", "cispo", {}, config(1.0, 0.3)),
        ):
            pairs[f"{name}, {mode}"] = (
                ours(name, mode, **options),
                verl_loss(core, clips, peer, mode),
            )
    pairs["gmpo"] = (ours("gmpo"), verl_loss(core, config(0.4, 0.4), "geo_mean"))
    for name, peer in (("k1", "k1+"), ("k2", "k2"), ("k3", "k3")):
        pairs[f"KL {name} (verl's {peer})"] = (
            lambda c, name=name: (kl_divergence(c.logprobs, c.ref, name) * c.mask).sum(),
            lambda c, peer=peer: (core.kl_penalty(c.logprobs, c.ref, peer) * c.mask).sum(),
        )
    for mode in MODES:

        def own(c: Case, mode: str = mode) -> Tensor:
            args = (c.logprobs, c.old_values, c.values, c.mask)
            return value_loss(*args, loss_aggregation=mode, max_response_length=BUDGET)[0]

        def peers(c: Case, mode: str = mode) -> Tensor:
            args = (c.logprobs, c.values, c.old_values, c.float_mask, 0.2)
            kind = mode.replace("_", "-")
            return core.compute_value_loss(*args, kind, loss_scale_factor=BUDGET)[0]

        pairs[f"value loss, {mode}"] = (own, peers)
    pairs |= verl_advantage_pairs(core)
    pairs["adaptive coefficient"] = (
        lambda c: torch.tensor(adapt_coefficient(0.1, float(c.rewards[0]) / 20, 0.02, 512, 10000)),
        lambda c: torch.tensor(adapted(core, float(c.rewards[0]) / 20)),
    )
    return pairs


def verl_reasons() -> list[list[str]]:
    one = torch.zeros(1, dtype=torch.int64)
    lone = advantages.compute("group_norm", torch.tensor([0.7]), one, one[:, None] == 0)
    case = Case(0)
    return [
        [
            "verl: whitening",
            f"x {biased(case):.5f} at {int(case.mask.sum())} tokens",
            "verl's variance is unbiased; torchrft's is that of the tokens there are, so that it "
            "exists for one token (verl's rows above are multiplied by sqrt(n / (n - 1)))",
        ],
        [
            "verl: GAE",
            "whitened or not",
            "verl whitens its advantages always, torchrft with advantages_norm = true",
        ],
        [
            "verl: a group of one",
            f"{float(lone.advantages):.1f} and 0.7 for a reward of 0.7",
            "verl takes the reward as advantage, torchrft 0: there is nothing to compare with",
        ],
        [
            "verl: k1",
            "gradient",
            "verl's k1 without + has the derivative of d, whose mean is 0; torchrft's has k2's",
        ],
        [
            "verl: k3 above 10",
            "value and gradient",
            "verl clamps the estimate to 10, where its gradient ends; torchrft clamps d to +-20 "
            "and keeps the gradient",
        ],
        [
            "verl: dual_clip",
            "3.0 or none",
            "verl always bounds the loss of negative advantages, torchrft with dual_clip",
        ],
    ]


def verl_advantage_pairs(core: Any) -> dict[str, Pair]:
    returned = {"gamma": 0.9}
    pairs: dict[str, Pair] = {
        "advantages: group_norm": (estimated("group_norm"), verl_advantages(core, "grpo")),
        "advantages: dr_grpo": (
            estimated("dr_grpo"),
            verl_advantages(core, "grpo", norm_adv_by_std_in_grpo=False),
        ),
        "advantages: rloo": (estimated("rloo"), verl_advantages(core, "rloo")),
    }
    whitened = {
        "reinforce_plus_plus": (returned, "reinforce_plus_plus"),
        "reinforce_baseline": ({}, "reinforce_plus_plus_baseline"),
    }
    for name, (options, peer) in whitened.items():
        pairs[f"advantages: {name}"] = (
            estimated(name, **options),
            lambda c, peer=peer: verl_advantages(core, peer)(c) * biased(c),
        )
    pairs["advantages: gae, whitened"] = (
        estimated("gae", values=lambda c: c.values, **returned, lambd=0.8, advantages_norm=True),
        lambda c: (
            core.compute_gae_advantage_return(c.token_rewards, c.values, c.float_mask, 0.9, 0.8)[0]
            * (biased(c) * c.float_mask)
        ),
    )
    return pairs


def adapted(core: Any, kl: float) -> float:
    controller = core.AdaptiveKLController(0.1, 0.02, 10000)
    controller.update(kl, 512)
    return float(controller.value)


def verl_corrections(helper: Any) -> dict[str, Pair]:
    def peer(level: str) -> Callable[[Case], Tensor]:
        def call(c: Case) -> Tensor:
            log_ratio = (c.old - c.rollout) * c.float_mask
            options = {"rollout_is": level, "rollout_is_threshold": 2.0}
            return helper.compute_rollout_correction_weights(log_ratio, c.float_mask, **options)[0]

        return call

    def own(name: str) -> Callable[[Case], Tensor]:
        return lambda c: correction_weights(name, c.old, c.rollout, c.mask) * c.float_mask

    return {
        "correction: token_tis": (own("token_tis"), peer("token")),
        "correction: seq_tis": (own("seq_tis"), peer("sequence")),
    }


# --------------------------------------------------------------------------------------- tables


def imported(*modules: str) -> list[Any] | None:
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        print(f"{modules[0].split('.')[0]} is left out: {error}", file=sys.stderr)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20)
    cases = parser.parse_args().cases
    pairs, reasons, packages = {}, [], ["torch"]
    if trl := imported("trl.trainer.grpo_trainer", "trl.experimental.gmpo"):
        trainer, geometric = trl[0].GRPOTrainer, trl[1].GMPOTrainer
        pairs |= {("TRL", n): pair for n, pair in trl_pairs(trainer, geometric).items()}
        reasons += trl_reasons(trainer)
        packages.append("trl")
    core = "verl.trainer.ppo.core_algos"
    if verl := imported(core, "verl.workers.config", "verl.trainer.ppo.rollout_corr_helper"):
        shared = verl_pairs(verl[0], verl[1].ActorConfig) | verl_corrections(verl[2])
        pairs |= {("verl", name): pair for name, pair in shared.items()}
        reasons += verl_reasons()
        packages.append("verl")
    if not pairs:
        sys.exit("neither TRL nor verl is installed: there is nothing to compare with")
    rows, failed = [], []
    for (peer, name), pair in pairs.items():
        value, slope = difference(pair, cases)
        rows.append([peer, name, f"{value:.0e}", "" if slope is None else f"{slope:.0e}"])
        if max(value, slope or 0.0) > (1e-6 if name.startswith("advantages") else 1e-8):
            failed.append(f"{peer}: {name}")
    print(machine(*packages), f"; {cases} cases of {GROUPS * SIZE} x {WIDTH}\n", sep="")
    print(table(["peer", "shared", "value", "gradient"], rows) + "\n")
    print(table(["differs", "by", "because"], reasons))
    if failed:
        sys.exit("these differ: " + "; ".join(failed))


if __name__ == "__main__":
    main()
