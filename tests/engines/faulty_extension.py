"""torchrft's extension of vLLM's workers, with faults that a test can switch on."""

from typing import Any

from torchrft.rollout import vllm_server
from torchrft.rollout.canary import Canary

_watch = Canary.watch
_fault: dict[str, Any] = {}


def _faulty(self, pairs):
    checks_only = not self.find("lm_head.weight")  # nothing is loaded
    for name, tensor in _watch(self, pairs):
        if checks_only:
            yield name, tensor
            continue
        if name != _fault.get("name"):
            yield name, tensor
        elif _fault["kind"] != "dropped":
            yield name, _fault["last"] if _fault["kind"] == "stale" else tensor.flip(0)
        if name == _fault.get("remember"):
            _fault["last"] = tensor.clone()


class Extension(vllm_server.Extension):
    def test_fault(self, name, kind):
        """`kind` is stale, permuted, dropped or none; a stale one is that of the last update."""
        Canary.watch = _faulty
        _fault["remember"] = name
        _fault["name"] = None if kind == "none" else name
        _fault["kind"] = kind
