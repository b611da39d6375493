"""A checkpoint from outside runs no code where it is read; those of earlier versions load."""

import builtins
import io
import json
import os
import pickle
import random
import subprocess
import warnings
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_job
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from torchrft import deepspeed
from torchrft.checkpoint import CheckpointManager, dcp_files, manifest, objects
from torchrft.models.loader import load_model
from torchrft.tools.seeds import rng_state, set_rng_state
from torchrft.types import Completion, Kept, Prompt, Sample, Score


class Calls:
    """Pickled, a call of `function`."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    """What creates `marker` where it is unpickled."""
    touch = f"open({str(marker)!r}, 'w').close()"
    system = Calls(getattr, Calls(__import__, "os"), "system")
    inner = marker.with_name("inner.pt")
    torch.save(Calls(exec, touch), inner)
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(builtins.eval, touch.replace(".close()", "")),
        "exec": Calls(exec, touch),
        "subprocess": Calls(subprocess.getoutput, f"touch {marker}"),
        "getattr": Calls(next, Calls(map, system, [f"touch {marker}"])),
        "torch.load": Calls(partial(torch.load, weights_only=False), str(inner)),
        "rebuild": Calls(torch._utils._rebuild_parameter, Calls(exec, touch), False, {}),
        "numpy": Calls(np.frompyfunc, Calls(exec, touch), 1, 1),
    }


NAMES = ["os.system", "eval", "exec", "subprocess", "getattr", "torch.load", "rebuild", "numpy"]


def dotted(marker: Path) -> bytes:
    """A pickle that reaches for os.system through a module that is admitted."""
    name = f"touch {marker}".encode()
    return (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
        b"\x8c" + bytes([len(name)]) + name + b"\x85R."
    )


def state() -> dict:
    return {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "data": {"position": 3}}


def saved(folder: Path, content: dict, planner=None) -> Path:
    """A checkpoint as DCP itself writes it, objects pickled, with a manifest."""
    path = folder / "checkpoints" / "step-1"
    path.mkdir(parents=True)
    planner = planner or dcp.DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = {"model/w": content["model"]["w"], "data": content["data"]}
        dcp.save(flat, storage_writer=dcp.FileSystemWriter(path), planner=planner)
    seal(path)
    return path


def seal(path: Path) -> None:
    (path / "manifest.json").unlink(missing_ok=True)
    names = [file.name for file in path.iterdir()]
    manifest.write(path, 1, 1, manifest.fingerprint(path, names))


def load(folder: Path, path: Path) -> dict:
    manager = CheckpointManager(folder, max_num=3, max_bytes=10**12)
    assert manager.find_latest() == path
    target = {"model": {"w": torch.zeros(2, 3)}, "data": {}}
    manager.load(path, target)
    return target


@pytest.mark.parametrize("name", [*NAMES, "dotted"])
def test_forged_metadata_is_refused(tmp_path, name):
    marker = tmp_path / "ran"
    path = saved(tmp_path, state())
    forged = dotted(marker) if name == "dotted" else pickle.dumps(attacks(marker)[name], 4)
    (path / ".metadata").write_bytes(forged)
    seal(path)
    with pytest.raises(ValueError, match=r"/\.metadata is damaged or was forged \("):
        load(tmp_path, path)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_forged_object_is_refused(tmp_path, name):
    marker = tmp_path / "ran"
    path = saved(tmp_path, {**state(), "data": {"position": attacks(marker)[name]}})
    with pytest.raises(ValueError, match=r"/__0_0\.distcp is damaged or was forged \("):
        load(tmp_path, path)
    assert not marker.exists()


class Attributes:
    """Pickled, an object of DCP's own whose attributes are others."""

    def __init__(self, value, **attributes) -> None:
        self.value, self.attributes = value, attributes

    def __reduce__(self):
        return type(self.value), (), {**vars(self.value), **self.attributes}


@pytest.mark.parametrize("target", ["../../../secret", "/etc/passwd", "fifo"])
def test_metadata_that_points_elsewhere_is_refused(tmp_path, target):
    path = saved(tmp_path, state())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = target
    os.mkfifo(path / "fifo")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / "manifest.json").unlink()
    names = [".metadata", "__0_0.distcp"]
    manifest.write(path, 1, 1, manifest.fingerprint(path, names))
    with pytest.raises(ValueError, match=r"was forged .it holds what no checkpoint holds"):
        load(tmp_path, path)


def test_no_file_of_a_checkpoint_holds_a_pickled_object(tmp_path):
    manager = CheckpointManager(tmp_path, max_num=3, max_bytes=10**12)
    path = manager.save(1, state())
    assert b'{"position": 3}' in (path / "__0_0.distcp").read_bytes()
    assert load(tmp_path, path)["data"] == {"position": 3}


def test_objects_come_back_as_they_were():
    completion = Completion(0, 1, (5,) * 20, (-0.1,) * 20, "\ud800é", "stop", 3)
    values = [
        *(None, True, 2**70, -0.0, 1e-300, "\ud800", b"\x00\xff", (), (1, 2), {3, 4}, frozenset()),
        *({"torchrft": "tuple", "is": 1}, {1: {"a": (1,)}}, Counter("aab"), {(1, 2): 3}),
        *(np.float64(0.1), np.arange(3, dtype=np.uint32), np.zeros((0, 2)), rng_state()["python"]),
        *(completion, Score(1.5, {"a": 0.5}, {"b": 1.0}), tuple(range(100)), (2**64,) * 20),
    ]
    again = objects.loads(objects.dumps(values))
    for old, new in zip(values, again, strict=True):
        assert type(old) is type(new)
        assert np.array_equal(old, new) if isinstance(old, np.ndarray) else old == new
    assert str(again[3]) == "-0.0"
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        for shape in ((), (0, 4), (2, 3)):
            tensor = torch.ones(shape, dtype=dtype)
            new = objects.loads(objects.dumps(tensor))
            assert (new.dtype, new.shape, torch.equal(new, tensor)) == (dtype, shape, True)
    kept = Kept(torch.tensor([2, 4, 0], dtype=torch.int32), torch.tensor([2, 1]))
    new = objects.loads(objects.dumps(kept))
    assert torch.equal(new.ids, kept.ids)
    assert torch.equal(new.counts, kept.counts)


@pytest.mark.parametrize("value", [object(), print, np.array([None]), Path("a"), random.Random(1)])
def test_what_is_no_plain_data_is_not_saved(tmp_path, value):
    manager = CheckpointManager(tmp_path, max_num=3, max_bytes=10**12)
    with pytest.raises(ValueError, match="data: a checkpoint holds plain data, tensors and"):
        manager.save(1, {**state(), "data": {"position": value}})
    assert not (tmp_path / "checkpoints" / "step-1").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"\x80\x04.",
        b'{"torchrft": "eval", "is": "1"}',
        b'{"torchrft": ["tuple"], "is": []}',
        b'{"torchrft": "tuple"}',
        b'{"torchrft": "Score", "is": {"__class__": 1}}',
        b'{"torchrft": "tensor", "is": ["load", [1], {"torchrft": "bytes", "is": "AAAA"}]}',
        b'{"torchrft": "array", "is": ["O", [1], {"torchrft": "bytes", "is": "AAAAAAAAAAA="}]}',
    ],
)
def test_forged_json_is_one_kind_of_error(content):
    with pytest.raises(ValueError):
        objects.loads(content)


def test_objects_that_an_earlier_version_pickled_load(tmp_path):
    kept = Kept(torch.tensor([2, 4], dtype=torch.int32), torch.tensor([2]))
    prompt = Prompt(3, "1 2=", (3, 4), "2", {"level": 1})
    completion = Completion(0, 0, (7,), (-0.1,), "7", "stop", 3, kept)
    sample = Sample(prompt, completion, Score(1.0, {"a": 1.0}), 5)
    position = {
        "pending": [sample],
        "rng": {**rng_state(), "seen": {3, 4}},
        "groups": [OrderedDict(lr=0.1, betas=(0.9, 0.95), mean=np.float64(0.5))],
    }
    torch.rand(1), random.random(), np.random.rand()
    path = saved(tmp_path, {**state(), "data": position})
    target = load(tmp_path, path)
    assert target["model"]["w"].tolist() == state()["model"]["w"].tolist()
    data = target["data"]
    assert data["pending"] == [sample]
    assert data["pending"][0].completion.kept.ids.tolist() == [2, 4]
    assert data["groups"] == position["groups"]
    assert data["rng"]["seen"] == {3, 4}
    set_rng_state(data["rng"])
    first = torch.rand(1), random.random(), np.random.rand()
    set_rng_state(position["rng"])
    assert first == (torch.rand(1), random.random(), np.random.rand())


@pytest.mark.slow
def test_waiting_samples_of_an_earlier_version_are_gone_on_with(tmp_path, monkeypatch):
    """Their prompts were pickled with them, by way of DCP's own planner."""
    options = {"train_batch_size": 32, "top_p": 0.9, "truncation_replay": "true"}
    tiny_job.run(tmp_path / "new", max_steps=3, **options)
    from torchrft.checkpoint import state_io
    from torchrft.collector import Collector

    with monkeypatch.context() as old:
        old.setattr(state_io, "Planner", dcp.DefaultSavePlanner)
        old.setattr(Collector, "to_rows", lambda self, samples: list(samples))
        tiny_job.run(tmp_path / "old", max_steps=3, **options)
    ends = []
    for name in ("new", "old"):
        tiny_job.run(tmp_path / name, max_steps=4, load_checkpoint="true", **options)
        ends.append((tmp_path / name / "hf" / "step-4" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


@pytest.fixture
def engine(tmp_path):
    torch.manual_seed(0)
    made, *_ = deepspeed.initialize(
        model=nn.Linear(2, 2), config={"train_batch_size": 1, "optimizer": {"type": "AdamW"}}
    )
    made.save_checkpoint(str(tmp_path), "a", client_state={"epoch": 3, "best": torch.ones(2)})
    yield made
    from torchrft.tools import distributed

    distributed.teardown()


def test_forged_files_of_the_deepspeed_engine_are_refused(engine, tmp_path):
    marker = tmp_path / "ran"
    folder = tmp_path / "a"
    assert engine.load_checkpoint(str(tmp_path), "a")[1]["epoch"] == 3
    expected = {name: value.clone() for name, value in engine.module_state_dict().items()}
    whole = deepspeed.utils.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "a")
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in whole)
    good = (folder / "client_state.json").read_bytes()
    json.loads(good)
    (folder / "client_state.json").unlink()
    for attack in attacks(marker).values():
        torch.save({"counts": {}, "schedule": None, "client": attack}, folder / "client_state.pt")
        with pytest.raises(ValueError, match=r"client_state\.pt is damaged or was forged"):
            engine.load_checkpoint(str(tmp_path), "a")
        assert not marker.exists()
    (folder / "client_state.json").write_bytes(good)
    metadata = (folder / ".metadata").read_bytes()
    for attack in attacks(marker).values():
        (folder / ".metadata").write_bytes(pickle.dumps(attack))
        for read in (
            lambda: engine.load_checkpoint(str(tmp_path), "a"),
            lambda: deepspeed.utils.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "a"),
        ):
            with pytest.raises(ValueError, match=r"\.metadata is damaged or was forged"):
                read()
            assert not marker.exists()
    (folder / ".metadata").write_bytes(metadata)
    with pytest.raises(ValueError, match="a checkpoint holds plain data, tensors and arrays, not"):
        engine.save_checkpoint(str(tmp_path), "b", client_state={"args": object()})


def test_a_forged_object_of_the_deepspeed_engine_is_refused(engine, tmp_path):
    marker = tmp_path / "ran"
    for number, attack in enumerate(attacks(marker).values()):
        folder = tmp_path / str(number)
        with engine.weights.as_shards():
            content = engine._state()
        content["optimizer"]["param_groups"][0]["lr"] = attack
        dcp.save(content, checkpoint_id=folder)
        host = {"counts": {}, "schedule": None, "client": {}}
        (folder / "client_state.json").write_bytes(objects.dumps(host))
        with pytest.raises(ValueError, match=r"\.distcp is damaged or was forged"):
            engine.load_checkpoint(str(tmp_path), str(number))
        assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_forged_weights_of_a_model_are_refused(tmp_path, name):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    for file in Path(tiny_job.MODEL).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"lm_head.weight": attacks(marker)[name]}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"forged: pytorch_model\.bin holds more than"):
        load_model(str(folder), "pretrained", torch.float32, 0, "policy")
    assert not marker.exists()


def test_a_pickle_that_sets_attributes_of_an_admitted_class_is_refused():
    """BUILD on a class would change it for the whole process."""
    path = b"cpathlib\nPosixPath\n"
    place = path + b"(X\x0a\x00\x00\x00/elsewheretR"
    forged = b"\x80\x02" + path + b"N}(X\x06\x00\x00\x00parent" + place + b"u\x86b."
    with pytest.raises(pickle.UnpicklingError, match="sets attributes of what is no part"):
        dcp_files._Unpickler(io.BytesIO(forged)).load()
    assert Path("/a/b").parent == Path("/a")


def reseal(path: Path, change) -> None:
    """Changes the manifest's content, and its own checksum with it."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    content = change(content) or content
    content = {**content, "sha256": manifest._own_digest(content)}
    (path / "manifest.json").write_text(json.dumps(content))


FILES = {"bytes": 3, "sha256": "x"}
MANIFESTS = {
    "no format": (lambda c: c.pop("format") and None, "it/format is None"),
    "no files": (lambda c: c.pop("files") and None, "it/files is None"),
    "files a list": (lambda c: c.update(files=[]), "it/files is"),
    "a step below 0": (lambda c: c.update(step=-1), "it/step is -1"),
    "a huge format": (lambda c: c.update(format=10**4000), "has format 1000"),
    "no record": (lambda c: c["files"].update({".metadata": None}), "names '.metadata', which"),
    "no size": (lambda c: c["files"][".metadata"].pop("bytes") and None, "bytes instead of None"),
    "a name that leads out": (lambda c: c["files"].update({"../../x": FILES}), "names '../../x', "),
    "an absolute name": (lambda c: c["files"].update({"/etc/passwd": FILES}), "names '/etc/pas"),
    "a null character": (lambda c: c["files"].update({"a\0b": FILES}), r"names 'a\\x00b', "),
    "a long name": (lambda c: c["files"].update({"x" * 300: FILES}), "names 'xxx"),
}


@pytest.mark.parametrize("kind", list(MANIFESTS))
def test_a_forged_manifest_is_one_sentence(tmp_path, kind):
    change, fault = MANIFESTS[kind]
    path = saved(tmp_path, state())
    reseal(path, change)
    with pytest.raises(ValueError, match="is not a complete checkpoint: ") as raised:
        CheckpointManager(tmp_path, 3, 10**12).resolve(str(path))
    assert fault.replace("\\\\", "\\") in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0x", b"[" * 100_000, b"[]", b"7", b"1" * 9999])
def test_a_damaged_manifest_is_one_sentence(tmp_path, content):
    path = saved(tmp_path, state())
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged and cannot be read \("):
        CheckpointManager(tmp_path, 3, 10**12).resolve(str(path))


METADATA = {
    "no place": lambda m: m.storage_data.clear(),
    "a place before the file": lambda m: [
        setattr(p, "offset", -7) for p in m.storage_data.values()
    ],
    "no chunks": lambda m: m.state_dict_metadata["model/w"].chunks.clear(),
    "other dimensions": lambda m: setattr(
        m.state_dict_metadata["model/w"], "size", torch.Size([6])
    ),
}


@pytest.mark.parametrize("kind", list(METADATA))
def test_metadata_that_lacks_something_is_refused(tmp_path, kind):
    path = saved(tmp_path, state())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    METADATA[kind](metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(path)
    with pytest.raises(ValueError, match=r"/\.metadata is damaged or was forged \("):
        load(tmp_path, path)


@pytest.mark.parametrize("position", [-1, 1.5, "3", True, None, []])
def test_a_state_of_another_kind_is_refused(tmp_path, position):
    manager = CheckpointManager(tmp_path, max_num=3, max_bytes=10**12)
    path = manager.save(1, {**state(), "data": {"position": position}})
    target = {"model": {"w": torch.zeros(2, 3)}, "data": {"position": 0}}
    with pytest.raises(ValueError, match=r"was forged \(data/position is"):
        manager.load(path, target)


@pytest.mark.parametrize("text", [b"checkpoint = 3", b"\xff", b"a = " + b"[" * 50_000, b"[a"])
def test_a_damaged_config_of_the_run_is_named(tmp_path, text):
    manager = CheckpointManager(tmp_path, max_num=3, max_bytes=10**12)
    (tmp_path / "config.toml").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.toml is damaged or was forged \("):
        manager.began_from("/elsewhere")


@pytest.mark.parametrize("name", ["../a", "/etc", "x" * 300, "a\0b", ""])
def test_a_latest_that_leads_elsewhere_is_refused(engine, tmp_path, name):
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "latest").write_text(name)
    for read in (
        lambda: engine.load_checkpoint(str(folder)),
        lambda: deepspeed.utils.get_fp32_state_dict_from_zero_checkpoint(str(folder)),
    ):
        with pytest.raises(
            ValueError, match=r"which is not in its folder; give a tag|no checkpoint"
        ):
            read()


@pytest.mark.parametrize("counts", [None, {}, {"global_steps": -1}, {"global_steps": "7"}])
def test_forged_counts_of_the_deepspeed_engine_are_refused(engine, tmp_path, counts):
    path = tmp_path / "a" / "client_state.json"
    content = {**objects.loads(path.read_bytes()), "counts": counts}
    path.write_bytes(objects.dumps(content))
    with pytest.raises(ValueError, match=r"client_state\.json is damaged or was forged \(it"):
        engine.load_checkpoint(str(tmp_path), "a")
