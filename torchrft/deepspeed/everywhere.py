"""Lets this room stand in for DeepSpeed in a whole program, whose other imports stay as they are:

    from torchrft.deepspeed.everywhere import deepspeed    # instead of: import deepspeed

After that line `from deepspeed.ops.adam import FusedAdam` and the like find this room, in the
program's other files too. Raises ImportError if the real DeepSpeed was imported before.
"""

import sys

from torchrft import deepspeed

_loaded = sys.modules.get("deepspeed")
if _loaded is not None and _loaded is not deepspeed:
    raise ImportError(
        "the real deepspeed is imported already: import torchrft.deepspeed.everywhere before it, "
        "at the top of the script"
    )
if _loaded is None:
    deepspeed.modules.register("deepspeed")

__all__ = ["deepspeed"]
