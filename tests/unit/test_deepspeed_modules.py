"""DeepSpeed's module names on the shim: what is there, what is refused, and by what sentence."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import run_ranks
from test_deepspeed import MICRO, OPTIMIZER, Net, data
from torch import nn

from torchrft import deepspeed
from torchrft.deepspeed import modules
from torchrft.deepspeed.accelerator import get_accelerator
from torchrft.deepspeed.adam import DeepSpeedCPUAdam, FusedAdam
from torchrft.deepspeed.json_config import read_json

PROGRAM = """
from torchrft.deepspeed.everywhere import deepspeed
import torchrft.deepspeed
from deepspeed import get_accelerator, init_distributed, log_dist
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator as same
from deepspeed.compression.helper import recursive_getattr, recursive_setattr
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.runtime.utils import see_memory_usage
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from deepspeed.utils import RepeatingLoader, logger
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
import deepspeed as again
from torchrft.parallel.deepspeed.ops.adam import FusedAdam as third
import torchrft.parallel.deepspeed as old

assert again is deepspeed is torchrft.deepspeed is old
assert same is get_accelerator is deepspeed.accelerator.get_accelerator
assert third is FusedAdam is deepspeed.ops.adam.FusedAdam
assert deepspeed.zero.Init and deepspeed.runtime.zero.GatheredParameters is GatheredParameters
assert str(OffloadDeviceEnum.cpu) == "cpu"
for statement in ("import deepspeed.nvme", "from deepspeed.runtime.swap_tensor import x"):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
"""


def test_a_program_finds_deepspeeds_names_with_one_line_changed():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("torchrft has no deepspeed.nvme, which it does not need or cannot")
    assert "runtime.swap_tensor" in lines[1]
    assert "accelerator, accelerator.real_accelerator, checkpointing, comm" in lines[1]


def test_the_real_deepspeed_is_not_replaced():
    code = (
        "import sys, types; sys.modules['deepspeed'] = types.ModuleType('deepspeed')\n"
        "import torchrft.deepspeed.everywhere"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "ImportError: the real deepspeed is imported already" in done.stderr


@pytest.mark.parametrize("path", modules.REFUSED)
def test_what_cannot_be_is_refused_when_it_is_called(path):
    reason, names = modules.REFUSED[path]
    module = sys.modules[f"torchrft.deepspeed.{path}".rstrip(".")]
    for name in names:
        refused = getattr(module, name)
        with pytest.raises(ValueError, match="deepspeed") as caught:
            refused(1, x=2)
        assert reason in str(caught.value)
        if name[0].isupper():
            assert not isinstance(1, refused)


@pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam])
def test_the_adams_compute_what_deepspeeds_do(kind):
    """The first steps of Adam with decay by hand, in float64."""
    mode = {"adam_w_mode": False} if kind is FusedAdam else {"adamw_mode": False}
    for options, decoupled in (
        ({"weight_decay": 0.1}, True),
        ({"weight_decay": 0.1} | mode, False),
    ):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = kind([weight], lr=0.1, betas=(0.8, 0.9), **options)
        x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        m, v = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for step in (1, 2, 3):
            gradient = torch.tensor([0.5, 0.25], dtype=torch.float64) * step
            weight.grad = gradient.float()
            optimizer.step()
            if decoupled:
                x = x * (1 - 0.1 * 0.1)
            else:
                gradient = gradient + 0.1 * x
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            x = x - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
            torch.testing.assert_close(weight.detach().double(), x, atol=1e-6, rtol=1e-6)
    assert kind([weight]).param_groups[0]["weight_decay"] == 0
    for wrong, message in (
        ({"bias_correction": False}, "corrects"),
        ({"amsgrad": True}, "amsgrad"),
    ):
        with pytest.raises(ValueError, match=message):
            kind([weight], **wrong)


def test_the_accelerator_of_this_machine():
    accelerator = get_accelerator()
    if accelerator.has_gpu:
        pytest.skip("values of a CPU")
    assert (accelerator.device_name(), accelerator.device_name(3)) == ("cpu", "cpu")
    assert accelerator.communication_backend_name() == "gloo"
    assert accelerator.memory_allocated() > 2**20
    assert accelerator.max_memory_allocated() >= accelerator.memory_allocated() // 2
    assert accelerator.synchronize() is None
    assert accelerator.FloatTensor([1.0]).dtype == torch.float32
    assert accelerator.available_memory() < accelerator.total_memory()
    with pytest.raises(AttributeError, match="'cpu' has no attribute 'nonsense'"):
        _ = accelerator.nonsense


HJSON = """\ufeff{
  // a comment
  "train_batch_size": 8, # another
  "bf16": {"enabled": true,},
}
"""


def test_configs_with_comments_trailing_commas_and_a_byte_order_mark(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text(HJSON, encoding="utf-8")
    assert read_json(path).values == {"train_batch_size": 8, "bf16.enabled": True}
    path.write_text('{"train_batch_size": 8, "train_batch_size": 9,}')
    with pytest.raises(ValueError, match=r"ds.json is no valid JSON: .*more than once"):
        read_json(path)
    path.write_text('{"train_batch_size": ')
    with pytest.raises(ValueError, match="is no valid JSON: "):
        read_json(path)
    monkeypatch.setitem(sys.modules, "hjson", None)
    with pytest.raises(ValueError, match=r"need hjson: pip install 'torchrft\[deepspeed\]'"):
        read_json(path)


@pytest.mark.parametrize(
    "config",
    [
        {"_comment": "x", "//": "y", "# z": 1, "zero_optimization": False},
        {"amp": {"opt_level": "O1"}},
        {
            "compression_training": {
                "weight_quantization": {"shared_parameters": {"enabled": False}}
            }
        },
        {"zero_optimization": {"max_live_parameters": 1e9, "prefetch_bucket_size": 5e7}},
        {"steps_per_print": 2000.0},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(config):
    read_json(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction"),
        ({"compression_training": {"weight_pruning": {"enabled": True}}}, "not compressed"),
        ({"zero_optimization": {"zero_quantized_weight": True}}, "has no key"),
    ],
    ids=str,
)
def test_what_would_have_another_meaning_is_refused(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_json(config)
    assert 'did you mean "zero_optimization.zero_quantized' not in str(caught.value)  # refused too


def weights_of(rank, folder):
    config = MICRO | {"optimizer": OPTIMIZER, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=Net(), config=config)
    parameter = engine.module.first.weight
    x, y = (part[0][4 * rank : 4 * rank + 4] for part in data())
    engine.backward((engine(x) - y).square().mean())
    grad = deepspeed.utils.safe_get_full_grad(parameter)
    engine.step()
    engine.save_checkpoint(folder)
    marks = parameter.ds_shape, parameter.ds_numel, parameter.ds_status.name, parameter.numel()
    with deepspeed.zero.GatheredParameters(parameter):
        inside = parameter.ds_status.name
    whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
    state = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
    deepspeed.utils.safe_set_full_fp32_param(parameter, torch.ones(8, 6))
    ones = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return grad, state, marks, inside, whole, ones


def test_whole_tensors_of_a_sharded_parameter(tmp_path):
    model = Net()
    x, y = (part[0] for part in data())
    (model(x) - y).square().mean().backward()
    expected = model.first.weight.grad
    ranks = run_ranks(weights_of, 2, str(tmp_path))
    for grad, state, marks, inside, _, ones in ranks:
        torch.testing.assert_close(grad, expected)
        # After the step the gradient that counted was clipped to a norm of 1.
        torch.testing.assert_close(state / state.norm(), expected / expected.norm())
        assert marks == ((8, 6), 48, "NOT_AVAILABLE", 48)
        assert inside == "AVAILABLE"
        assert torch.equal(ones, torch.ones(8, 6))
    whole = ranks[0][4]
    load = deepspeed.utils.get_fp32_state_dict_from_zero_checkpoint
    assert torch.equal(load(str(tmp_path))["first.weight"], whole)
    loaded = sys.modules[
        "torchrft.deepspeed.utils.zero_to_fp32"
    ].load_state_dict_from_zero_checkpoint(Net(), str(tmp_path))
    assert torch.equal(loaded.first.weight, whole)
    with pytest.raises(ValueError, match="give the tag"):
        load(str(tmp_path / "nowhere"))


def asked(rank):
    config = MICRO | {"optimizer": OPTIMIZER, "gradient_accumulation_steps": 2}
    engine, *_ = deepspeed.initialize(model=Net(), config=config)
    loss = torch.tensor(1.0)
    engine.set_train_micro_batch_size(3)
    facts = [engine.get_batch_info(), engine.loss_scale(), engine.scale(loss) is loss]
    engine.offload_states()
    engine.reload_states()
    engine.empty_partition_cache()
    engine.tput_timer.update_epoch_count()
    facts += [engine.tput_timer.epoch_count, engine.gradient_clipping(), engine.dp_world_size]
    errors = []
    for call in (
        lambda: engine.offload_states(device="nvme"),
        lambda: engine.set_train_micro_batch_size(0),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    return facts, errors


def test_what_public_loops_ask_the_engine():
    for facts, errors in run_ranks(asked, 2):
        assert facts == [(12, 3, 2), 1.0, True, 1, 1.0, 2]
        assert "offload_states(include=['optim_states'], device='nvme') is not" in errors[0]
        assert "micro_batch_size = 0 must be above 0" in errors[1]
