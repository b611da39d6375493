"""Checkpoints of a run (torch.distributed.checkpoint) and Hugging Face exports."""

from torchrft.checkpoint.hf_export import export_hf
from torchrft.checkpoint.manager import CheckpointManager
from torchrft.checkpoint.set_aside import set_aside

__all__ = ["CheckpointManager", "export_hf", "set_aside"]
