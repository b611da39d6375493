"""Configuration: the fields, how they are read from TOML and flags, and the rules over them."""

from torchrft.config.job_config import JobConfig
from torchrft.config.manager import ConfigError, LoadedConfig, load, read, to_toml
from torchrft.tools.registry import Registry

__all__ = ["ConfigError", "JobConfig", "LoadedConfig", "Registry", "load", "read", "to_toml"]
