"""The DeepSpeed shim: its configuration, and training equal to plain torch."""

import json
import math

import pytest
import tiny
import torch
from helpers import run_ranks
from torch import nn

from torchrft import deepspeed
from torchrft.deepspeed.config import offloads, read
from torchrft.deepspeed.keys import KEYS
from torchrft.deepspeed.schedules import Schedule, WarmupLR

MICRO = {"train_micro_batch_size_per_gpu": 2}


def adam(**params):
    return MICRO | {"optimizer": {"type": "adam", "params": params}}


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, 2, (16, 2, 4)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, 2, (16, 2, 4)),
        (MICRO | {"gradient_accumulation_steps": 3}, 4, (24, 2, 3)),
        (MICRO | {"train_batch_size": "auto"}, 4, (8, 2, 1)),
        ({"train_batch_size": 8}, 4, (8, 2, 1)),
    ],
)
def test_batch_sizes_follow_from_each_other(config, ranks, expected):
    found = read(config, ranks)
    assert (found.train_batch_size, found.micro_batch_size, found.accumulation) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "set train_batch_size or train_micro_batch_size_per_gpu"),
        (
            MICRO | {"train_batch_size": 9},
            "= 9 must be a multiple of train_micro_batch_size_per_gpu = 2 x 2 ranks",
        ),
        (
            MICRO | {"train_batch_size": 9, "gradient_accumulation_steps": 2},
            "= 9 must be .* = 2 x 2 x 2 = 8",
        ),
        ({"train_batch_size": 1}, "train_batch_size = 1 must be a multiple of 2 ranks"),
        ({"train_batch_size": 0}, "train_batch_size = 0 must be an integer above 0"),
        (MICRO | {"train_batchsize": 8}, 'no key "train_batchsize"; did you mean "train_batch_siz'),
        (MICRO | {"fp16": {"enabled": True}}, "fp16.enabled = True is not supported: there is no"),
        (MICRO | {"zero_optimization": {"stage": 4}}, "stage = 4 must be 0, 1, 2 or 3"),
        (
            MICRO | {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device = 'nvme' must be 'none' or 'cpu'",
        ),
        (
            MICRO | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}},
            "zero_optimization.zero_hpz_partition_size = 4 must divide the 2 ranks",
        ),
        (MICRO | {"gradient_clipping": -1.0}, "gradient_clipping = -1.0 must be a number of 0 or"),
        (MICRO | {"gradient_clipping": float("nan")}, "gradient_clipping = nan must be a number"),
        (MICRO | {"bf16": {"enabled": "maybe"}}, "bf16.enabled = 'maybe' must be true or false"),
        (MICRO | {"bf16": True}, "bf16 = True must be a table of keys such as bf16.enabled"),
        (adam(lr="1e-3"), "optimizer.params.lr = '1e-3' must be a number of 0 or more"),
        (adam(lr=-0.1), "optimizer.params.lr = -0.1 must be a number of 0 or more"),
        (adam(weight_decay=None), "optimizer.params.weight_decay = None must be a number"),
        (adam(betas=0.9), "optimizer.params.betas = 0.9 must be a list of two numbers from 0 to"),
        (adam(betas=[0.9, 1.0]), "must be a list of two numbers from 0 to below 1"),
        (MICRO | {"optimizer": {"type": "Lamb"}}, "optimizer.type = 'Lamb' must be Adam or AdamW"),
        (
            MICRO | {"optimizer": {"params": {"lr": 0.1}}},
            "optimizer.params.lr = 0.1 has no effect without optimizer.type",
        ),
        (
            MICRO | {"scheduler": {"params": {"warmup_num_steps": 3}}},
            "scheduler.params.warmup_num_steps = 3 has no effect without scheduler.type",
        ),
        (
            MICRO | {"scheduler": {"type": "Cosine"}},
            "scheduler.type = 'Cosine' must be 'WarmupLR', .* or 'WarmupCosineLR'",
        ),
        (
            MICRO | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "10"}}},
            "scheduler.params.warmup_num_steps = '10' must be an integer above 0",
        ),
        (
            MICRO | {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype = 'float16' must be 'bfloat16', ",
        ),
        (
            MICRO | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "2"}},
            "zero_hpz_partition_size = '2' must be an integer of -1 or more",
        ),
        (
            MICRO | {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 7}},
            "zero_hpz_partition_size = 7 has no effect at stage 2; use stage 3",
        ),
        ("missing.json", "missing.json is not a file"),
    ],
    ids=str,
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read(config, 2)


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_met_with_what_the_table_says(name, caplog):
    """A value that asks for something: accepted in silence, accepted with a line, or refused."""
    caplog.set_level("INFO", logger="torchrft")
    key = KEYS[name]
    value = {"x": 1} if "." not in name and key.disposition == "refused" else 123456
    if key.disposition == "mapped":
        return  # what they do is tested below, each by its effect
    nested = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    if key.disposition == "refused":
        with pytest.raises(ValueError, match="is not supported"):
            read(MICRO | nested, 2)
        is_on = any(off is True for off in key.off)
        for off in ("auto", *key.off) if is_on else ("auto", False, *key.off):
            inner = off
            for part in reversed(name.split(".")):
                inner = {part: inner}
            read(MICRO | inner, 2)
        return
    read(MICRO | nested, 2)
    assert f"DeepSpeed key {name} has no effect: {key.reason}" in caplog.text


@pytest.mark.parametrize("name", [name for name in KEYS if KEYS[name].disposition == "mapped"])
def test_every_mapped_key_has_a_type(name):
    for wrong in ("wrong", {"x": 1}, -2, [[]]):
        assert KEYS[name].fault(wrong).startswith("must be ")
    assert KEYS[name].fault("auto") is None


def test_values_that_ask_for_nothing_are_accepted():
    steps = {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "warmup_max_lr": None}}
    found = read(MICRO | {"steps_per_print": math.inf, "scheduler": steps, "bf16": None}, 2)
    assert found.judged.section("scheduler.params") == {"warmup_num_steps": 1}
    assert found.get("gradient_clipping", 0.0) == 0.0


def test_zero_section_to_dims_and_offload(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps(MICRO | {"zero_optimization": zero}))
    found = read(path, 8)
    assert (found.dims.dp_replicate, found.dims.dp_shard) == (4, 2)
    assert found.sharding.reshard_after_forward
    assert offloads(found)
    plain = read(MICRO, 8)
    assert (plain.dims.dp_replicate, plain.dims.dp_shard) == (8, 1)
    assert not offloads(plain)
    assert not read(MICRO | {"zero_optimization": {"stage": 1}}, 2).sharding.reshard_after_forward


def test_warmup_by_hand():
    log = WarmupLR(warmup_max_lr=0.1, warmup_num_steps=4)
    assert log(-1, 1.0) == 0.0
    assert log(1, 1.0) == pytest.approx(0.1 * math.log(2) / math.log(4))
    assert log(9, 1.0) == 0.1
    line = {"warmup_min_lr": 0.02, "warmup_max_lr": 0.1, "warmup_type": "linear"}
    assert WarmupLR(**line, warmup_num_steps=4)(2, 1.0) == pytest.approx(0.02 + 0.08 * 2 / 4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = Schedule(optimizer, "WarmupLR", {"warmup_num_steps": 2, "warmup_type": "linear"})
    seen = [schedule.get_lr()[0]]
    for _ in range(4):
        schedule.step()
        seen.append(schedule.get_lr()[0])
    assert seen == [0.0, 0.0, 0.25, 0.5, 0.5]
    with pytest.raises(ValueError, match="must be one value, or one for each of the 1 parameter"):
        Schedule(optimizer, "WarmupLR", {"warmup_max_lr": [0.1, 0.2]})


# ---------------------------------------------------------------- training


class Net(nn.Module):
    """No transformers model: sharded as a whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 8, 6, generator=generator)  # steps x batch x features
    return x, x.sum(-1, keepdim=True) * 0.3


OPTIMIZER = {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1, "betas": [0.8, 0.9]}}
COMMON = MICRO | {
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": OPTIMIZER,
}


def plain_training():
    model, losses = Net(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    for x, y in zip(*data(), strict=True):
        loss = (model(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, [p.detach() for p in model.parameters()]


def train(engine, steps, rank):
    losses = []
    for x, y in list(zip(*data(), strict=True))[steps]:
        total = 0.0
        for micro in range(2):  # 8 samples: 2 ranks x 2 micro-batches x 2
            rows = slice(4 * micro + 2 * rank, 4 * micro + 2 * rank + 2)
            loss = (engine(x[rows]) - y[rows]).square().mean()
            engine.backward(loss)
            engine.step()
            total += float(loss) / 2
        losses.append(total)
    return losses


def whole(engine):
    return [deepspeed.utils.safe_get_full_fp32_param(p).cpu() for p in engine.module.parameters()]


def shim(rank, folder):
    found = {}
    for name, zero in {
        "0": {"stage": 0},
        "1": {"stage": 1},
        "2": {"stage": 2},
        "3": {"stage": 3},
        "offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }.items():
        engine, optimizer, _, _ = deepspeed.initialize(
            model=Net(), config=COMMON | {"zero_optimization": zero}
        )
        assert optimizer is engine.optimizer
        losses = train(engine, slice(0, 3), rank)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"epoch": 7})
        rest = train(engine, slice(3, 5), rank)
        again, _, _, _ = deepspeed.initialize(
            model=Net(), config=COMMON | {"zero_optimization": zero}
        )
        path, client = again.load_checkpoint(f"{folder}/{name}")
        assert path.endswith("global_step3")
        assert client == {"epoch": 7}
        assert again.global_steps == 3
        assert train(again, slice(3, 5), rank) == rest
        pairs = zip(whole(again), whole(engine), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        found[name] = losses + rest, whole(engine), engine.get_global_grad_norm()
    return found


@pytest.mark.slow
def test_every_stage_trains_as_plain_torch_does(tmp_path):
    losses, weights = plain_training()
    ranks = run_ranks(shim, 2, str(tmp_path))
    for name in ranks[0]:
        mine = [sum(pair) / 2 for pair in zip(*(found[name][0] for found in ranks), strict=True)]
        assert mine == pytest.approx(losses, rel=1e-5)
        for value, expected in zip(ranks[0][name][1], weights, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert ranks[0][name][2] > 0


def own_optimizer(rank):
    model = Net()
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, _, schedule = deepspeed.initialize(
        model=model,
        optimizer=given,
        config=MICRO
        | {
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
        },
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
    )
    assert optimizer is given
    assert schedule is engine.lr_scheduler
    losses = train(engine, slice(0, 3), rank)
    return losses, engine.get_lr(), engine.is_gradient_accumulation_boundary()


def test_an_optimizer_of_ones_own():
    model, losses = Net(), []
    for step, (x, y) in enumerate(zip(*(part[:3] for part in data()), strict=True)):
        loss = (model(x) - y).square().mean()
        losses.append(float(loss))
        for parameter, gradient in zip(
            model.parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        ):
            parameter.data -= (0.05 if step < 2 else 0.1) * gradient
    ranks = run_ranks(own_optimizer, 2)
    mine = [sum(pair) / 2 for pair in zip(*(found[0] for found in ranks), strict=True)]
    assert mine == pytest.approx(losses, rel=1e-5)
    assert ranks[0][1:] == ([0.1], False)


SCRIPT = """
import torch
import deepspeed
from test_deepspeed import Net, data

x, y = (part.flatten(0, 1) for part in data())
dataset = torch.utils.data.TensorDataset(x, y)
engine, _, loader, schedule = deepspeed.initialize(
    model=Net(),
    training_data=dataset,
    config={
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.05}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.05}},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": False},
        "steps_per_print": 5,
    },
)
losses = []
for epoch in range(6):
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
"""


def run_script(rank):
    names: dict = {}
    exec(SCRIPT.replace("import deepspeed", "from torchrft import deepspeed"), names)
    return names["losses"], names["schedule"].get_lr()


def test_a_script_with_its_import_changed():
    for losses, lr in run_ranks(run_script, 2):
        assert len(losses) == 6 * 40 // 4
        assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
        assert lr == [0.05]


def decoder(rank):
    engine, _, _, _ = deepspeed.initialize(
        model=tiny.model("llama", "sdpa"),
        config={
            "train_batch_size": 2,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
        },
    )
    ids = torch.arange(8)[None] + rank
    logits = engine(input_ids=ids).logits
    sharded = sum(hasattr(m, "_get_fsdp_state") for m in engine.module.modules())
    return str(logits.dtype), sharded, {str(p.dtype) for p in engine.module.parameters()}


def test_a_transformers_model_is_sharded_layer_by_layer_in_bf16():
    for dtype, sharded, parameters in run_ranks(decoder, 2):
        assert dtype == "torch.bfloat16"
        assert sharded == 5  # embedding, two layers, head and the root
        assert parameters == {"torch.float32"}
