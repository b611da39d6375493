"""Files of other formats that a job's options may come from; the config knows nothing of them."""

from torchrft.config.flags import Draft
from torchrft.config.manager import Filled, Sources


def _deepspeed_json(path: str, draft: Draft, ranks: int | None) -> Filled:
    from torchrft.deepspeed.job_fields import fill  # a room that few jobs need

    return fill(path, draft, ranks)


SOURCES: Sources = {"deepspeed_config": _deepspeed_json}
"""How each is read, by the field that names the file."""
