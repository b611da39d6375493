"""What scripts call on the DeepSpeed shim beside the training loop."""

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import run_ranks
from test_deepspeed import MICRO, OPTIMIZER, Net, data
from torch import nn

from torchrft import deepspeed
from torchrft.deepspeed import comm, zero

ADAM = MICRO | {"optimizer": OPTIMIZER}


def engine_of(stage=2, model=None, **config):
    made = deepspeed.initialize(
        model=model or Net(), config=ADAM | {"zero_optimization": {"stage": stage}} | config
    )
    return made[0]


def one_step(engine, rank, scale=1.0):
    x, y = (part[0][4 * rank : 4 * rank + 4] for part in data())
    loss = (engine(x) - y).square().mean() * scale
    returned = engine.backward(loss)
    engine.step()
    return float(loss.detach()), float(returned.detach())


@contextlib.contextmanager
def said(messages):
    """The message of the ValueError that must be raised within it."""
    with pytest.raises(ValueError) as caught:
        yield
    messages.append(str(caught.value))


class Buffered(Net):
    """With constants as a file that rank 0 alone has read may hold them."""

    def __init__(self, rank):
        super().__init__()
        for name, dtype in (("scale", torch.float32), ("seen", torch.int64), ("on", torch.bool)):
            self.register_buffer(name, torch.full((2,), 1 - rank).to(dtype))
        self.register_buffer("bias", torch.tensor(0.5 + rank, dtype=torch.bfloat16))
        self.register_buffer("turn", torch.tensor([1j * rank]), persistent=False)


def buffers_after_initialize(rank):
    engine = engine_of(model=Buffered(rank), bf16={"enabled": True})
    names = dict(engine.module.named_buffers())
    return names, {name: engine.module_state_dict()[name] for name in names if name != "turn"}


def test_buffers_begin_as_rank_0_has_them():
    expected = dict(Buffered(0).named_buffers())
    for buffers, saved in run_ranks(buffers_after_initialize, 2):
        for name, value in expected.items():
            assert buffers[name].dtype == value.dtype
            assert torch.equal(buffers[name], value)
            assert name == "turn" or torch.equal(saved[name], value)


def parameters_given(rank):
    found = []
    for pick in (
        lambda m: m.parameters(),
        lambda m: filter(lambda p: p.requires_grad, m.parameters()),
        lambda m: [{"params": m.parameters(), "lr": 0.5}],
        lambda m: [{"params": m.first.weight}],
    ):
        model = Net()
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=pick(model), config=ADAM
        )
        one_step(engine, rank)
        found.append((len(optimizer.param_groups[0]["params"]), engine.get_lr()))
    model, errors = Net(), []
    with said(errors):
        deepspeed.initialize(model=model, model_parameters=Net().parameters(), config=ADAM)
    return found, errors, type(model.first.weight.data) is torch.Tensor


def test_parameters_may_be_generators():
    for found, errors, untouched in run_ranks(parameters_given, 2):
        assert found == [(4, [0.02]), (4, [0.02]), (4, [0.5]), (1, [0.02])]
        assert "a parameter (8, 6) that is not the model's" in errors[0]
        assert untouched


def untrained_parameters(rank, stage):
    """Only the second layer is trained."""
    model = Net()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.second.parameters(),
        config=ADAM | {"gradient_clipping": 0.5, "zero_optimization": {"stage": stage}},
    )
    norms = []
    for _ in range(2):
        one_step(engine, rank)
        norms.append(engine.get_global_grad_norm())
    return norms, [p.grad is None for p in engine.module.parameters()]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_untrained_parameters_count_in_the_norm_of_stage_0_only(stage):
    model = Net()
    x, y = (part[0] for part in data())
    (model(x) - y).square().mean().backward()
    counted = model if stage == 0 else model.second
    norm = torch.cat([p.grad.flatten() for p in counted.parameters()]).norm()
    for norms, cleared in run_ranks(untrained_parameters, 2, stage):
        assert norms[0] == pytest.approx(float(norm), rel=1e-5)
        assert cleared == [True] * 4


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.third = nn.Linear(1, 1)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(8, 2)


def checkpoints(rank, folder):
    engine, errors = engine_of(), []
    one_step(engine, rank)
    with said(errors):
        engine.save_checkpoint(folder, tag=f"tag{rank}")
    assert not os.path.exists(f"{folder}/tag0")
    engine.save_checkpoint(folder, tag=5)
    assert engine_of().load_checkpoint(folder, tag=5)[0] == f"{folder}/5"
    with said(errors):
        engine_of(model=Longer()).load_checkpoint(folder)
    longer = engine_of(model=Longer())
    with said(errors):
        longer.load_checkpoint(folder, load_module_strict=False)
    longer.load_checkpoint(folder, load_module_strict=False, load_module_only=True)
    same = torch.equal(
        longer.module_state_dict()["first.weight"], engine.module_state_dict()["first.weight"]
    )
    with said(errors):
        engine_of(model=Wider()).load_checkpoint(folder, load_module_strict=False)
    with said(errors):
        engine.load_checkpoint(folder, tag="none")
    with said(errors):
        engine.load_checkpoint(folder, custom_load_fn=print)
    frozen = Net()
    frozen.first.requires_grad_(False)
    half = engine_of(model=frozen)
    half.save_checkpoint(folder, tag="half", exclude_frozen_parameters=True)
    with said(errors):
        half.load_checkpoint(folder, tag="half")
    half.load_checkpoint(folder, tag="half", load_module_strict=False)
    return same, errors


def test_checkpoints_that_do_not_fit(tmp_path):
    for same, errors in run_ranks(checkpoints, 2, str(tmp_path)):
        assert same
        assert all("\n" not in error for error in errors)
        expected = [
            "save_checkpoint was given the tags 'tag0', 'tag1'; give the same tag on all ranks",
            "it lacks third.weight, third.bias; load_module_strict=False loads what both have",
            "does not fit the optimizer",
            "it has second.weight (1, 8) instead of (2, 8), second.bias (1,) instead of (2,)",
            "there is no checkpoint of this engine in",
            "load_checkpoint(custom_load_fn=...) is not supported",
            "it lacks first.weight, first.bias; load_module_strict=False",
        ]
        for error, part in zip(errors, expected, strict=True):
            assert part in error


def whole_weights(rank, folder):
    found = {}
    for stage in (0, 2, 3):
        engine = engine_of(stage, tiny.model("llama", "sdpa"))
        errors = []
        state = engine.module_state_dict()
        if rank == 0:  # must not wait for the other
            with said(errors) if stage == 3 else contextlib.nullcontext():
                engine.module.save_pretrained(f"{folder}/{stage}")
            engine.module.save_pretrained(f"{folder}/{stage}", state_dict=state)
        engine.save_16bit_model(f"{folder}/{stage}")
        found[stage] = errors, all(type(value) is torch.Tensor for value in state.values())
    return found


def test_whole_weights_come_out(tmp_path):
    from transformers import AutoModelForCausalLM

    expected = tiny.model("llama", "sdpa").state_dict()
    for found in run_ranks(whole_weights, 2, str(tmp_path)):
        for stage, (errors, whole) in found.items():
            assert whole
            assert all("call engine.module_state_dict() on all ranks" in line for line in errors)
            assert len(errors) <= (stage == 3)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(stage), dtype="float32")
            half = torch.load(tmp_path / str(stage) / "pytorch_model.bin")
            for name, value in expected.items():
                assert torch.equal(loaded.state_dict()[name], value)
                assert torch.equal(half[name], value.bfloat16())


def gathering(rank):
    with zero.Init(config_dict_or_path=ADAM):
        model = Net()
    with zero.GatheredParameters(model.first.bias, modifier_rank=1), torch.no_grad():
        model.first.bias.fill_(rank)
    before = model.first.bias.tolist()
    engine = engine_of(3, model)
    held = engine.module.first.weight
    with zero.GatheredParameters([held, engine.module.first.bias], modifier_rank=0):
        shapes = [held.data.numpy().shape, tuple(model.first.weight.cpu().shape)]
        with torch.no_grad():
            if rank == 0:
                held.fill_(3.0)
                held.data[1, 2] = 7.0
    with zero.GatheredParameters(engine.parameters()), torch.no_grad():
        engine.module.second.weight.zero_()
    state = engine.module_state_dict()
    one_step(engine, rank)
    second = engine_of(2)
    with torch.no_grad():
        second(torch.zeros(1, 6))
        with zero.GatheredParameters(second.module.first.weight, modifier_rank=0):
            second.module.first.weight.fill_(rank + 2.0)
    one_step(second, rank)
    stays = (second.module.first.weight - 2).abs().max()
    expected = torch.full((8, 6), 3.0)
    expected[1, 2] = 7.0
    return (
        before,
        shapes,
        torch.equal(state["first.weight"], expected),
        float(state["second.weight"].abs().sum()) > 0,
        torch.equal(engine.module_state_dict()["first.weight"], expected),
        float(stays),
    )


def test_gathered_parameters_are_whole_and_written_back():
    for before, shapes, written, kept, trained, stays in run_ranks(gathering, 2):
        assert before == [1.0] * 8
        assert shapes == [(8, 6), (8, 6)]
        assert written
        assert kept
        assert not trained
        assert stays < 0.1  # a step of Adam


def surface(rank):
    torch.manual_seed(rank)
    model = nn.Linear(6, 2)
    model.answer = lambda: 42
    engine = engine_of(1, model, gradient_accumulation_steps=2, gradient_clipping=0.5)
    facts = [
        engine.answer(),
        engine.in_features,
        (engine.world_size, engine.zero_optimization_stage(), engine.gradient_clipping()),
        (engine.zero_optimization(), engine.bfloat16_enabled(), engine.fp16_enabled()),
        engine.get_mom(),
        (comm.get_world_size(), comm.get_local_rank(), engine.local_rank),
    ]
    initial, errors = engine.module_state_dict()["weight"], []
    applied = []
    for _ in range(2):
        one_step(engine, rank)
        applied.append(engine.was_step_applied())
    facts += [applied, engine.global_samples]
    engine.set_train_batch_size(4)
    engine.set_lr(0.125)
    facts += [engine.gradient_accumulation_steps(), engine.get_lr()]
    loss = engine(torch.ones(2, 6)).mean()
    with engine.no_sync():
        engine.backward(loss)
        with said(errors):
            engine.step()
    with said(errors):
        engine.step()
    engine.backward(engine(torch.ones(2, 6)).mean())
    engine.set_gradient_accumulation_boundary(False)
    engine.step()
    facts += [engine.was_step_applied(), engine.is_gradient_accumulation_boundary()]
    with said(errors), engine_of(2).no_sync():
        pass
    with said(errors):
        engine.set_train_batch_size(3)
    with said(errors):
        comm.init_distributed("nonsense")
    with pytest.raises(TypeError):
        comm.init_distributed(bogus_argument=1)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing
    engine.destroy()
    return facts, initial, errors


def test_what_scripts_ask_the_engine():
    ranks = run_ranks(surface, 2)
    torch.manual_seed(0)
    weight = nn.Linear(6, 2).weight
    for facts, initial, errors in ranks:
        assert torch.equal(initial, weight)  # rank 0's, as in DeepSpeed
        assert facts == [
            *(42, 6, (2, 1, 0.5), (True, False, False), [(0.8, 0.9)], (2, 0, 0)),
            *([False, True], 8, 1, [0.125], False, False),
        ]
        expected = ("within no_sync", "gradients of all ranks", "stage 2", "= 3 must", "'nonsense'")
        for error, part in zip(errors, expected, strict=True):
            assert part in error


def half_model(rank, own):
    """A bfloat16 model, two steps that are too small for bfloat16."""
    model = Net().bfloat16()
    before = [p.detach().float() for p in model.parameters()]
    given = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.0) if own else None
    section = {"type": "AdamW", "params": {"lr": 1e-6}}
    config = ADAM | {"bf16": {"enabled": True}, "optimizer": section}
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=given, config=config)
    x = data()[0][0]
    for _ in range(2):
        output = engine(x)
        engine.backward(output.float().square().mean())
        engine.step()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moved = [p.full_tensor().detach() - b for p, b in zip(trained, before, strict=True)]
    state = [v.dtype for values in optimizer.state.values() for v in values.values()]
    seen = {p.dtype for p in model.parameters()}  # as DeepSpeed's, what the model computes in
    return (output.dtype, seen), {p.dtype for p in trained} | {*state}, moved


@pytest.mark.parametrize("own", [False, True])
def test_a_bfloat16_model_gets_float32_master_weights(own):
    for computed, dtypes, moved in run_ranks(half_model, 2, own):
        assert computed == (torch.bfloat16, {torch.bfloat16})
        assert dtypes == {torch.float32}
        for change in moved:  # Adam's steps are lr long, but for gradients of 0
            alive = change[change != 0].abs()
            assert alive.numel() > 0.8 * change.numel()
            torch.testing.assert_close(alive, torch.full_like(alive, 2e-6), rtol=0.2, atol=0)


def summed(rank):
    dist.barrier()
    mean, total = engine_of(1), engine_of(1, gradient_allreduce_op="sum")
    pairs = [one_step(mean, rank), one_step(total, rank)]
    own = engine_of(1, managed_gradient_accumulation=False, gradient_accumulation_steps=2)
    inside = []
    own.optimizer.register_step_pre_hook(
        lambda *_: inside.append(own.is_gradient_accumulation_boundary())
    )
    outside = own.is_gradient_accumulation_boundary()
    one_step(own, rank)
    norms = [e.get_global_grad_norm() for e in (mean, total)]
    twice = engine_of(1)
    x, y = (part[0][4 * rank : 4 * rank + 4] for part in data())
    with twice.no_sync():
        twice.backward((twice(x) - y).square().mean())
    one_step(twice, rank)
    norms.append(twice.get_global_grad_norm())
    return pairs, norms, (outside, inside, own.was_step_applied(), own.global_samples)


def test_sums_and_unmanaged_accumulation():
    for pairs, norms, unmanaged in run_ranks(summed, 2):
        assert all(loss == returned for loss, returned in pairs)
        assert norms[1:] == pytest.approx([2 * norms[0]] * 2)
        assert unmanaged == (False, [True], True, 4)


LINES = """
import sys, argparse
from test_deepspeed_engine import Net, one_step
from torchrft import deepspeed

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
args = parser.parse_args(sys.argv[1:])
engine, *_ = deepspeed.initialize(args=args, model=Net())
one_step(engine, 0)
"""


@pytest.mark.slow
def test_a_plain_script_sees_the_lines(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ADAM | {"steps_per_print": 1, "wall_clock_breakdown": True}))
    done = subprocess.run(
        [sys.executable, "-c", LINES, "--deepspeed_config", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeepSpeed key wall_clock_breakdown has no effect") == 1
    assert done.stderr.count("step=1, skipped=0, lr=[0.02]") == 1


def given_beside_the_config(rank):
    model, lines = Net(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("torchrft").addHandler(handler)
    logging.getLogger("torchrft").setLevel("INFO")
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.25), config=ADAM
    )
    return engine.get_lr(), lines


def test_what_is_given_comes_before_the_config_and_is_said():
    [(lr, lines)] = run_ranks(given_beside_the_config, 1)
    assert lr == [0.25]
    assert lines == ["the section optimizer has no effect beside initialize(optimizer=...)"]


def auto(lr="auto", groups=None, own=False, **options):
    """The learning rates of an engine made with "auto", or the error."""
    model = Net()
    section = {"type": "AdamW", "params": {"lr": lr} | options.pop("params", {})}
    given = torch.optim.SGD(model.parameters(), 0.25) if own else None
    parameters = groups and [{"params": model.parameters()} | groups]
    config = MICRO | {"optimizer": section} | options
    try:
        made = deepspeed.initialize(
            model=model, optimizer=given, model_parameters=parameters, config=config
        )
    except ValueError as error:
        return str(error)
    return made[0].get_lr()


def warmup(**params):
    return {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"} | params}}


def autos(rank):
    return [
        *(auto(groups={"lr": 0.5}), auto(own=True), auto(**warmup(warmup_max_lr=0.5))),
        *(auto(), auto(0.1, params={"eps": "auto"}), auto(**warmup())),
        auto(0.1, params={"bias_correction": "auto", "fused": "auto"}),
    ]


def test_auto_needs_a_value_from_elsewhere():
    [found] = run_ranks(autos, 1)
    assert found[:3] == [[0.5], [0.25], [0.0]]
    for name, error in zip(("lr", "eps", "lr"), found[3:6], strict=True):
        assert f'optimizer.params.{name} = "auto" has no value: set one' in error
    assert found[6] == [0.1]


def test_what_initialize_refuses_leaves_the_model_alone():
    model = Net()
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
    for config, message in (
        (MICRO | {"scheduler": {"type": "WarmupLR"}}, "needs an optimizer"),
        (ADAM | {"scheduler": schedule}, "needs scheduler.params.total_num_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            deepspeed.initialize(model=model, config=config)
    arguments = argparse.Namespace(deepspeed_config="x.json")
    with pytest.raises(ValueError, match=r"one of config=.* and --deepspeed_config"):
        deepspeed.initialize(args=arguments, model=model, config=ADAM)
    assert type(model.first.weight.data) is torch.Tensor
