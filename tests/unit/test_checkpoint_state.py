import random
import re
import warnings

import pytest
import torch
from helpers import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchrft.checkpoint.manager import CheckpointManager
from torchrft.tools.distributed import get_world_size
from torchrft.tools.seeds import rng_state, seed_everything, set_rng_state


def manager(folder) -> CheckpointManager:
    return CheckpointManager(folder, max_num=3, max_bytes=10**12)


def test_tensors_load_in_place_and_objects_are_replaced(tmp_path):
    weight = nn.Parameter(torch.randn(3, 4))
    saved = {
        "model": {"weight": weight, "empty": torch.zeros(0, 4)},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "m": torch.randn(3, 4)}}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "name": None}],
        "data": {"position": 17, "nested": {"seen": {3, 4}}},
        "step": 12,
        "coefficient": 0.1 + 0.2,
        "raw": b"\x00\xff",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a single process is no reason for a warning
        path = manager(tmp_path).save(12, saved)
    target = {
        "model": {"weight": nn.Parameter(torch.zeros(3, 4)), "empty": torch.ones(0, 4)},
        "optimizer": {"state": {0: {"step": torch.tensor(0.0), "m": torch.zeros(3, 4)}}},
        "groups": [],
        "data": {},  # a fresh loader's state has other keys than one in the middle of an episode
        "step": 0,
        "coefficient": 0.0,
        "raw": b"",
    }
    parameter = target["model"]["weight"]
    manager(tmp_path).load(path, target)
    assert target["model"]["weight"] is parameter
    assert torch.equal(parameter, weight)
    assert target["optimizer"]["state"][0]["step"].item() == 7.0
    assert torch.equal(target["optimizer"]["state"][0]["m"], saved["optimizer"]["state"][0]["m"])
    for key in ("groups", "data", "step", "coefficient", "raw"):
        assert target[key] == saved[key], key


def test_part_of_a_checkpoint_can_be_loaded(tmp_path):
    path = manager(tmp_path).save(1, {"model": {"w": torch.ones(2)}, "step": 1})
    target = {"model": {"w": torch.zeros(2)}}
    manager(tmp_path).load(path, target)
    assert target["model"]["w"].tolist() == [1.0, 1.0]


def test_what_does_not_fit_is_one_error_that_names_everything(tmp_path):
    saved = {
        "model": {
            "shape": torch.zeros(2, 3),
            "dtype": torch.zeros(2),
            "gone": torch.zeros(1),
            "kind": torch.zeros(1),
        },
        "step": 1,
    }
    path = manager(tmp_path).save(1, saved)
    target = {
        "model": {
            "shape": torch.zeros(3, 2),
            "dtype": torch.zeros(2, dtype=torch.bfloat16),
            "new": torch.zeros(1),
            "kind": "object",
        },
        "step": 0,
    }
    with pytest.raises(ValueError) as caught:
        manager(tmp_path).load(path, target)
    text = str(caught.value)
    assert str(path) in text
    for line in (
        "model/shape has shape [2, 3] in the checkpoint, [3, 2] in this run",
        "model/dtype has dtype torch.float32 in the checkpoint, torch.bfloat16 in this run",
        "model/new is not in the checkpoint",
        "model/gone is only in the checkpoint",
        "model/kind is a tensor in one of the two, an object in the other",
    ):
        assert line in text
    assert len(text.splitlines()) == 6
    assert target["step"] == 0  # nothing was loaded


def test_many_faults_are_cut_short(tmp_path):
    path = manager(tmp_path).save(1, {"model": {"w": torch.zeros(1)}})
    target = {"model": {f"w{i}": torch.zeros(1) for i in range(30)}}
    with pytest.raises(ValueError, match=re.escape("... and 21 more")):
        manager(tmp_path).load(path, target)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": {(1, 2): torch.zeros(1)}}, "checkpoint key a/(1, 2) must be a string"),
        (
            {"a": {"b/c": torch.zeros(1), "b": {"c": torch.zeros(1)}}},
            "two checkpoint keys give the path 'a/b/c'",
        ),
        ({"a": {1: torch.zeros(1), "1": 3}}, "two checkpoint keys give the path 'a/1'"),
    ],
)
def test_keys_that_cannot_be_saved_are_refused(tmp_path, state, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        manager(tmp_path).save(1, state)


class Net(nn.Module):
    """Rows that do not divide by two, and a parameter with a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 1)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def _trained(rank: int, steps: int, seed: int = 0):
    torch.manual_seed(seed)
    model = Net()
    if get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    seed_everything(100 + rank)
    random.random()
    return model, optimizer


def _state(rank: int, model, optimizer) -> dict:
    return {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "rng": {f"rank{rank}": rng_state()},
        "counter": {"samples": 5 * (1 + 10 * rank)},  # shared: rank 0's value counts
    }


def _full(tree):
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().clone()
    if isinstance(tree, dict):
        return {key: _full(value) for key, value in tree.items()}
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def _save(rank: int, folder: str) -> tuple[dict, float]:
    state = _state(rank, *_trained(rank, steps=3))
    manager(folder).save(3, state)
    full = _full({key: state[key] for key in ("model", "optimizer")})
    return full, random.random()


def _load(rank: int, folder: str) -> dict:
    """The loaded state as whole tensors, and the next random number of this rank."""
    model, optimizer = _trained(rank, steps=0, seed=9)
    fresh = rng_state()
    state = _state(rank, model, optimizer)
    here = manager(folder)
    path = here.resolve(folder)
    assert path is not None
    here.load(path, state)
    mine = state["rng"][f"rank{rank}"]
    set_rng_state(mine)
    full = _full({key: state[key] for key in ("model", "optimizer", "counter")})
    return {**full, "fresh": mine["torch"] == fresh["torch"], "random": random.random()}


def _assert_equal(left, right, path="") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            _assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def test_two_ranks_save_one_and_two_load(tmp_path):
    (saved, next0), (_, next1) = run_ranks(_save, 2, str(tmp_path))
    assert saved["model"]["first.weight"].shape == (5, 4)
    alone = _load(0, str(tmp_path))
    for key in ("model", "optimizer"):
        _assert_equal(alone[key], saved[key], key)
    assert alone["counter"] == {"samples": 5}
    assert alone["random"] == next0
    first, second = run_ranks(_load, 2, str(tmp_path))
    _assert_equal(second["model"], saved["model"])
    _assert_equal(second["optimizer"], saved["optimizer"])
    assert second["counter"] == {"samples": 5}
    assert (first["random"], second["random"]) == (next0, next1)
    assert next0 != next1


def test_one_rank_saves_and_two_load(tmp_path):
    saved, next0 = _save(0, str(tmp_path))
    first, second = run_ranks(_load, 2, str(tmp_path))
    _assert_equal(second["model"], saved["model"])
    _assert_equal(first["optimizer"], saved["optimizer"])
    assert first["random"] == next0
    assert second["fresh"]  # rank 1 was not there: its own state stays
