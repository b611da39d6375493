"""Rollout engines side by side on one GPU, with log-probs: tokens/s, sleep, weight hand-over.

    python benchmarks/engines.py [--engines native vllm sglang] [--sequences 8 256 1024]

Random weights in the shape of Qwen2.5, bf16, prompts of 128 tokens, 8 samples each. Lengths are
equal (512 tokens) or ragged: so many tokens end a response that its length is drawn, 512 at most.
Every engine runs in a process of its own, beside a float32 copy of the model as the trainer's. The
hand-over casts and copies it, with the canary; the copy rate is that of a large tensor on the same
GPU; "asleep GiB" is what stays beyond the memory of a process that has trained without an engine.
`--model tiny --device cpu` runs on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import DEBUG_MODEL, machine, table
from train_step import SHAPES
from transformers import AutoModelForCausalLM, Qwen2Config

from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPT, N = 128, 8
GIB = 2**30
# What each engine needs on the GPU host, see docs/rollout_engines.md.
OPTIONS: dict[str, dict[str, Any]] = {
    "native": {},
    "compiled": {},  # the native engine with its layers compiled
    "vllm": {"engine_mem_util": 0.6},
    "sglang": {
        "engine_mem_util": 0.6,
        "sglang": {
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_flashinfer_autotune": True,
        },
    },
}


def folder_of(model: str) -> str:
    """A folder with the config of that shape and some tokenizer, but no weights."""
    folder = tempfile.mkdtemp()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{DEBUG_MODEL}/{name}", folder)
    config = Qwen2Config(**SHAPES[model], max_position_embeddings=4096, eos_token_id=1)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    return folder


class Bench:
    """One engine and the trainer's model, on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        folder = folder_of(options.model)
        length = PROMPT + options.tokens
        rollout = Rollout.model_validate(
            {
                "rollout_batch_size": 1,
                "engine_type": options.engine.replace("compiled", "native"),
                "max_num_seqs": max(options.sequences),
                **OPTIONS[options.engine],
            }
        )
        self.load_trainers_kernels()
        self.unused = free = self.free()
        start = time.perf_counter()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.engine = build_engine(
            rollout,
            folder,
            dtype,
            self.device,
            load_weights=False,
            max_len=length,
            compile=options.engine == "compiled",
        )
        self.found: dict[str, Any] = {"start s": time.perf_counter() - start}
        self.found["engine GiB"] = (free - self.free()) / GIB
        config = Qwen2Config.from_pretrained(folder)
        config._attn_implementation = "sdpa"
        with self.device:
            torch.manual_seed(0)
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.vocabulary = config.vocab_size

    def load_trainers_kernels(self) -> None:
        """CUDA's context and the kernels of a step: a run without an engine holds them as well."""
        if self.device.type != "cuda":
            return
        config = Qwen2Config(**{**SHAPES[self.options.model], "num_hidden_layers": 1})
        with self.device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            ids = torch.zeros(4, 512, dtype=torch.long)
        model(ids, labels=ids).loss.backward()
        torch.optim.AdamW(model.parameters()).step()

    def free(self) -> int:
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sync(self, version: int) -> float:
        start = self.wait()
        self.engine.update_weights(named_full_tensors(self.model), version)
        return self.wait() - start

    def memory(self) -> None:
        """Seconds of sleep, wake and hand-over, the memory that sleep gives back, and what an
        engine that sleeps still holds."""
        self.sync(0)
        self.rollout(8, ragged=False)
        names = ("sleep s", "wake s", "freed GiB", "asleep GiB")
        found: dict[str, list[float]] = {name: [] for name in names}
        trainer = sum(p.nbytes for p in self.model.parameters()) / GIB
        before = self.free()
        for version in (1, 2, 3):
            start = self.wait()
            self.engine.sleep()
            found["sleep s"].append(self.wait() - start)
            found["freed GiB"].append((self.free() - before) / GIB)
            found["asleep GiB"].append((self.unused - self.free()) / GIB - trainer)
            start = self.wait()
            self.engine.wake()
            found["wake s"].append(self.wait() - start)
            self.sync(version)
        self.found |= {name: median(values) for name, values in found.items()}
        found = {"sync s": [self.sync(version) for version in (4, 5, 6, 7)]}
        self.found |= {name: median(values) for name, values in found.items()}
        size = sum(p.numel() for p in self.model.parameters()) * 2
        self.found["sync GB/s"] = size / self.found["sync s"] / 1e9
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(5):
            start = self.wait()
            target.copy_(source)
            times.append(self.wait() - start)
        self.found["copy GB/s"] = size / median(times) / 1e9

    def prompts(self, count: int) -> list[Prompt]:
        draw = torch.Generator().manual_seed(count)
        ids = torch.randint(2, self.vocabulary, (count, PROMPT), generator=draw).tolist()
        return [Prompt(row, "", tuple(row_ids)) for row, row_ids in enumerate(ids)]

    def rollout(self, sequences: int, ragged: bool) -> tuple[int, float, list[Any]]:
        """Tokens, seconds and completions."""
        n = min(N, sequences)
        prompts = self.prompts(sequences // n)
        tokens = self.options.tokens
        ends = range(2, 2 + self.vocabulary * 2 // tokens) if ragged else ()
        sampling = SamplingParams(
            n=n,
            max_new_tokens=tokens,
            max_total_tokens=PROMPT + tokens,
            stop_token_ids=tuple(ends),
        )
        start = self.wait()
        completions = self.engine.generate(prompts, sampling)
        spent = self.wait() - start
        return sum(len(c.token_ids) for c in completions), spent, completions

    def speed(self) -> None:
        for sequences in self.options.sequences:
            for ragged in (False, True):
                rates = []
                self.rollout(sequences, ragged)  # compiles, and captures graphs
                for _ in range(self.options.repeats):
                    tokens, spent, completions = self.rollout(sequences, ragged)
                    rates.append(tokens / spent)
                kind = "ragged" if ragged else "equal"
                self.found[f"{sequences} {kind}"] = median(rates)
                if ragged:
                    lengths = [len(c.token_ids) for c in completions]
                    self.found[f"{sequences} mean length"] = sum(lengths) / len(lengths)

    @torch.no_grad()
    def difference(self) -> None:
        """Of log-probs, against a forward pass of the trainer's weights in the engine's dtype."""
        _, _, completions = self.rollout(8, ragged=False)
        model = self.model.to(torch.bfloat16) if self.device.type == "cuda" else self.model
        prompts = self.prompts(1)
        differences = []
        for c in completions:
            prompt = prompts[c.prompt_index].token_ids
            ids = torch.tensor([prompt + c.token_ids], device=self.device)
            log_p = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            exact = log_p.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()
            differences.append((exact - torch.tensor(c.logprobs)).abs())
        every = torch.cat(differences)
        self.found["log-prob difference"] = float(every.mean())
        self.found["largest"] = float(every.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", default=list(OPTIONS))
    parser.add_argument("--engine", help="run this one here and print JSON")
    parser.add_argument("--model", default="1.5b", choices=sorted(SHAPES))
    parser.add_argument("--sequences", type=int, nargs="*", default=[8, 256, 1024])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.engine:
        bench = Bench(options)
        bench.memory()
        bench.speed()
        bench.difference()
        bench.engine.close()
        print("RESULT " + json.dumps(bench.found), flush=True)
        return
    columns = {}
    for engine in options.engines:
        command = [sys.executable, str(Path(__file__)), "--engine", engine, *sys.argv[1:]]
        out = subprocess.run(command, capture_output=True, text=True)
        results = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
        if not results:
            print(f"{engine} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}", flush=True)
            continue
        columns[engine] = json.loads(results[-1].removeprefix("RESULT "))
        print(engine, columns[engine], flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    print(f"\n{name} {machine('torch', 'transformers')}; {options.model}\n")
    keys = list(dict.fromkeys(key for found in columns.values() for key in found))
    rows = [[key, *(f"{found.get(key, 0):,.4g}" for found in columns.values())] for key in keys]
    print(table(["", *columns], rows))


if __name__ == "__main__":
    main()
