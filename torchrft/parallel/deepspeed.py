"""`torchrft.deepspeed` under its first name."""

import importlib
import sys

_room = importlib.import_module("torchrft.deepspeed")
_room.modules.register(__name__)
sys.modules[__name__] = _room
