"""Makes the installed torchvision importable beside a CPU build of torch; run it once after pip.

Its wheel is for CUDA: beside a CPU build the compiled operators cannot load, and then the import
fails where Python declares fake versions of two of them. So these two are declared when loading
fails, in the installed file, since vLLM also looks at models in processes of its own.
"""

import importlib.util
from pathlib import Path

LOADED = 'if _load_library("_C"):\n'
DECLARED = """if not _load_library("_C"):
    _lib = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _lib.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
else:
"""

if __name__ == "__main__":
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("extension.py")
    text = path.read_text()
    assert text.count(LOADED) == 1 or DECLARED in text, f"{path} is not as expected"
    path.write_text(text.replace(LOADED, DECLARED))
    __import__("torchvision")
