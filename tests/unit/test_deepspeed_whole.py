"""Weights of the DeepSpeed shim as a script sees, saves, loads and changes them."""

import pytest
import torch
from helpers import run_ranks
from test_deepspeed import Net
from test_deepspeed_engine import engine_of, one_step, said
from torch import Tensor

from torchrft import deepspeed
from torchrft.deepspeed.whole import shard_of


def alone(rank):
    """By stage: the types and sums that rank 0 sees by itself, and the sums of all ranks."""
    seen = {}
    for stage in (0, 1, 2):
        engine = engine_of(stage)
        one_step(engine, rank)
        mine = []
        if rank == 0:  # must not wait for the other
            parameters = list(engine.module.parameters())
            mine += [type(p.data) is Tensor and p.grad is None for p in parameters]
            mine += [float(sum(p.data.sum() for p in parameters))]
            mine += [float(sum(value.sum() for value in engine.module.state_dict().values()))]
            mine += [float(engine.module.second.state_dict()["weight"].sum())]
        whole = engine.module_state_dict()
        seen[stage] = (
            mine,
            float(sum(value.sum() for value in whole.values())),
            float(whole["second.weight"].sum()),
        )
    return seen


def test_one_rank_sees_whole_weights_in_stages_0_to_2():
    first, second = run_ranks(alone, 2)
    for stage in (0, 1, 2):
        mine, total, part = first[stage]
        assert mine[:4] == [True] * 4
        assert mine[4:] == pytest.approx([total, total, part])
        assert second[stage] == ([], total, part)


def loading(rank):
    """By stage: what is read after loading into a module, a part of it, and the engine."""
    read = {}
    for stage in (0, 1, 3):
        engine, errors = engine_of(stage), []
        ones = {name: torch.ones_like(value) for name, value in Net().state_dict().items()}
        engine.module.load_state_dict(ones)
        sums = [float(engine.module_state_dict()["first.weight"].sum())]
        engine.module.second.load_state_dict({"weight": torch.full((1, 8), 3.0)}, strict=False)
        sums.append(float(engine.module_state_dict()["second.weight"].sum()))
        engine.load_state_dict({f"module.{name}": 2 * value for name, value in ones.items()})
        sums.append(float(engine.module_state_dict()["first.weight"].sum()))
        with pytest.raises(RuntimeError, match="size mismatch for first"):
            engine.module.load_state_dict(ones | {"first.weight": torch.ones(3)})
        one_step(engine, rank)
        sums.append(float(engine.module_state_dict()["first.weight"].sum()))
        if stage == 3:
            with said(errors):
                engine.module.second.state_dict()
        read[stage] = sums, errors
    return read


def test_whole_weights_are_loaded_and_stay():
    for read in run_ranks(loading, 2):
        for sums, errors in read.values():
            assert sums[:3] == [48.0, 24.0, 96.0]
            assert sums[3] == pytest.approx(96, abs=48 * 0.06)  # a step of Adam
            assert all("call engine.module_state_dict() on all ranks" in line for line in errors)
        assert len(read[3][1]) == 1


def edges(rank, folder):
    engine, errors = engine_of(1, gradient_accumulation_steps=2), []
    with said(errors):
        engine.backward(engine(torch.ones(2, 6)))
    with said(errors):
        engine.backward(3.0)
    engine.set_gradient_accumulation_boundary(True)
    with said(errors):
        engine.step()
    model = Net()
    model.first.requires_grad_(False)
    groups = [{"params": list(part.parameters())} for part in (model.first, model.second)]
    given = torch.optim.Adam(groups, lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    config["zero_optimization"] = {"stage": 1}
    engine = deepspeed.initialize(model=model, optimizer=given, config=config)[0]
    for _ in range(3):
        one_step(engine, rank)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)  # with a group of which nothing is trained
    trained = [id(p) for group in given.param_groups for p in group["params"]]
    same = trained == [id(shard_of(p)) for p in model.second.parameters()]
    other = deepspeed.initialize(model=Net(), config=config, model_parameters=None)[0]
    other.load_checkpoint(folder, load_module_only=True)
    loader = engine.deepspeed_io(list(range(6)), batch_size=2, route="eval")
    batches = [batch.tolist() for batch in loader]
    return errors, same, (engine.global_steps, engine.micro_steps, other.micro_steps), batches


def test_edges(tmp_path):
    for rank, (errors, same, steps, batches) in enumerate(run_ranks(edges, 2, str(tmp_path))):
        words = ("tensor of one number", "tensor of one number", "has seen no backward pass")
        for error, part in zip(errors, words, strict=True):
            assert part in error
        assert same
        assert steps == (1, 3, 0)  # a loaded engine begins a step anew
        assert batches == [[rank, 2 + rank], [4 + rank]]
