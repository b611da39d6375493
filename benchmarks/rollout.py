"""Tokens per second of torchrft's native engine beside `transformers.generate`.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py [--repeats 5] [--threads 1] [--cpu-time]

Both sides get the same weights, prompts (4 to 24 tokens), number of samples and sampling options,
and run alternately in this process. Lengths are ragged because the random weights draw the
end-of-sequence token after about 60 tokens, by chance, up to 128 tokens; or equal, because it is
forbidden until the last of 64. Tokens are those of the responses, without padding. The native
engine always returns the log-probs of its tokens; `generate` is timed without and with them.
With --cpu-time a second is one of this process, for a machine that other jobs use as well.
`generate` runs with SDPA attention and 256 rows a call (eager attention, 64 and 128 rows were tried
and slower), its dynamic cache, and top-k off (its default of 50 costs a sort).
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time

import torch
from common import DEBUG_MODEL, machine, middle, table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from torchrft.models.loader import load_config, load_tokenizer
from torchrft.rollout.native.engine import NativeEngine
from torchrft.types import Prompt, SamplingParams

EOS, PAD = 1, 0
SLOTS = 256


@dataclass(frozen=True)
class Workload:
    """What both sides are asked to generate."""

    name: str
    prompts: int
    max_new_tokens: int
    min_new_tokens: int = 0
    n: int = 8


WORKLOADS = (
    Workload("ragged, 32 prompts x 8", prompts=32, max_new_tokens=128),
    Workload("ragged, 128 prompts x 8", prompts=128, max_new_tokens=128),
    Workload("equal, 32 prompts x 8", prompts=32, max_new_tokens=64, min_new_tokens=64),
)


class Pair:
    """The native engine and a transformers model with equal weights."""

    def __init__(self, config: PreTrainedConfig) -> None:
        torch.manual_seed(0)
        plain = copy.deepcopy(config)
        plain._attn_implementation = "sdpa"
        self.model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32).eval()
        self.model.generation_config.pad_token_id = PAD
        self.model.generation_config.eos_token_id = EOS
        self.engine = NativeEngine(config, load_tokenizer(DEBUG_MODEL), (EOS,), max_num_seqs=SLOTS)
        self.engine.update_weights(self.model.named_parameters(), version=0)

    def native(self, prompts: Sequence[Prompt], workload: Workload, greedy: bool = False) -> list:
        """Completions of the native engine."""
        sampling = SamplingParams(
            n=workload.n,
            temperature=0.0 if greedy else 1.0,
            max_new_tokens=workload.max_new_tokens,
            min_new_tokens=workload.min_new_tokens,
        )
        return self.engine.generate(prompts, sampling)

    @torch.inference_mode()
    def peer(
        self,
        prompts: Sequence[Prompt],
        workload: Workload,
        greedy: bool = False,
        logprobs: bool = False,
    ) -> list[Tensor]:
        """Response tokens of `transformers.generate`, padded after the first end-of-sequence."""
        size = SLOTS // workload.n
        responses = []
        for start in range(0, len(prompts), size):
            ids, mask = left_padded(prompts[start : start + size])
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=not greedy,
                num_return_sequences=workload.n,
                max_new_tokens=workload.max_new_tokens,
                min_new_tokens=workload.min_new_tokens or None,
                top_k=None if greedy else 0,
                return_dict_in_generate=True,
                output_logits=logprobs,
            )
            new = out.sequences[:, ids.shape[1] :]
            if logprobs:
                logits = torch.stack(out.logits, dim=1)
                logits.log_softmax(-1).gather(-1, new[:, :, None]).squeeze(-1)
            responses += list(new)
        return responses


def left_padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 [P, longest]."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    gaps = [longest - len(prompt.token_ids) for prompt in prompts]
    ids = [[PAD] * gap + list(p.token_ids) for gap, p in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


def make_prompts(count: int) -> list[Prompt]:
    """Random prompts of 4 to 24 tokens, the same every time."""
    draw = random.Random(0)
    lengths = [draw.randint(4, 24) for _ in range(count)]
    return [
        Prompt(row, "", tuple(draw.randint(3, 55) for _ in range(length)))
        for row, length in enumerate(lengths)
    ]


def tokens_of(responses: Sequence[Tensor]) -> int:
    """Tokens up to and with the first end-of-sequence of each response."""
    total = 0
    for response in responses:
        ends = (response == EOS).nonzero()
        total += int(ends[0]) + 1 if len(ends) else response.numel()
    return total


@torch.inference_mode()
def check(config: PreTrainedConfig) -> str:
    """Asserts greedy tokens equal to `generate`'s, and log-probs equal to a full forward's.

    The greedy ones on weights ten times as large: small ones repeat the prompt's last token.
    """
    prompts, greedy = make_prompts(32), Workload("greedy", prompts=32, max_new_tokens=64, n=1)
    large = copy.deepcopy(config)
    large.initializer_range *= 10
    pair = Pair(large)
    completions = pair.native(prompts, greedy, greedy=True)
    expected = pair.peer(prompts, greedy, greedy=True)
    for mine, theirs in zip(completions, expected, strict=True):
        count = tokens_of([theirs])
        assert list(mine.token_ids) == theirs[:count].tolist(), mine.prompt_index
    pair = Pair(config)
    sampled = pair.native(prompts, WORKLOADS[0])
    worst = max(logprob_error(pair.model, prompts, completion) for completion in sampled)
    assert worst < 1e-5, worst
    kinds = len({token for completion in completions for token in completion.token_ids})
    return (
        f"{tokens_of(expected)} greedy tokens of {kinds} kinds equal generate's; "
        f"log-probs of {len(sampled)} samples equal a full forward's to {worst:.1e}"
    )


def logprob_error(model: PreTrainedModel, prompts: Sequence[Prompt], completion) -> float:
    """Largest difference of a completion's log-probs from those of one whole forward pass."""
    prompt = prompts[completion.prompt_index].token_ids
    ids = torch.tensor([prompt + completion.token_ids])
    log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    exact = log_p.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
    return float((exact - torch.tensor(completion.logprobs)).abs().max())


def compare(pair: Pair, workload: Workload, repeats: int, clock: Callable[[], float]) -> list[str]:
    """A row of the table: tokens/s of the three ways, measured alternately, and ratios."""
    prompts = make_prompts(workload.prompts)
    ways: list[tuple[Callable[[], list], Callable[[list], int]]] = [
        (lambda: pair.native(prompts, workload), lambda out: sum(len(c.token_ids) for c in out)),
        (lambda: pair.peer(prompts, workload), tokens_of),
        (lambda: pair.peer(prompts, workload, logprobs=True), tokens_of),
    ]
    rates: list[list[float]] = [[], [], []]
    for repeat in range(repeats + 1):
        for way, (generate, count) in enumerate(ways):
            start = clock()
            out = generate()
            spent = clock() - start
            if repeat:  # the first round warms up
                rates[way].append(count(out) / spent)
    native, *peers = rates
    # Run by run: what else the machine does slows a run's neighbors down equally.
    pairs = [zip(native, peer, strict=True) for peer in peers]
    ratios = [f"{median(mine / theirs for mine, theirs in pair):.2f}" for pair in pairs]
    return [workload.name, *(middle(rate) for rate in rates), *ratios]


def models() -> dict[str, PreTrainedConfig]:
    """The debug model, and one of about 12 times its size."""
    debug = load_config(DEBUG_MODEL)
    wider = copy.deepcopy(debug)
    wider.num_hidden_layers, wider.hidden_size, wider.intermediate_size = 4, 256, 768
    wider.num_attention_heads, wider.num_key_value_heads = 8, 4
    wider.layer_types = ["full_attention"] * 4
    return {"debug": debug, "4 layers x 256": wider}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = process_time if options.cpu_time else perf_counter
    torch.set_num_threads(options.threads)
    print(f"{machine('torch', 'transformers')}; {options.threads} thread(s), fp32")
    rows = []
    for name, config in models().items():
        print(f"{name}: {check(config)}")
        pair = Pair(config)
        chosen = WORKLOADS if name == "debug" else WORKLOADS[::2]
        rows += [[name, *compare(pair, workload, options.repeats, clock)] for workload in chosen]
    print("\nTokens/s, median (lowest-highest) of", options.repeats, "alternating runs\n")
    header = ["model", "workload", "native", "generate", "generate + log-probs"]
    print(table([*header, "native/generate", "with log-probs"], rows))


if __name__ == "__main__":
    main()
