"""`python -m torchrft.rewards.server --config x.toml --port 5000`: rewards over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tomllib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchrft.config import flags as command_line
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import ConfigError, load
from torchrft.sources import SOURCES
from torchrft.tools.credentials import bearer_token
from torchrft.tools.logging import logger, setup_logging
from torchrft.tools.text import one_line

if TYPE_CHECKING:
    from torchrft.rewards.scorer import Scorer

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What a config must have and only training uses, where the file leaves it out.
_UNUSED = {"pretrain": "none", "rollout_batch_size": "1", "train_batch_size": "4"}


def _options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "python -m torchrft.rewards.server",
        description="Serves the rewards of a TOML's [reward] section; see docs/rewards_remote.md. "
        "Further flags change the configuration, as for a training run.",
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", default=5000, type=int, help="port to listen at (%(default)s)")
    parser.add_argument("--token_env", metavar="NAME", help="variable that holds a bearer token")
    parser.add_argument(
        "--max_request_mb", default=64, type=int, help="limit of a request in MiB (%(default)s)"
    )
    options, flags = parser.parse_known_args(argv)
    if not 0 < options.port < 1 << 16 or options.max_request_mb < 1:
        parser.error("--port must be 1 to 65535, and --max_request_mb at least 1")
    return options, flags


def _config(path: str, flags: list[str]) -> tuple[JobConfig, bool]:
    """The configuration, and whether it names a policy. Raises ConfigError for all its faults."""
    document: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:  # load() tells these
        document = tomllib.load(file)
    tables = (table for table in document.values() if isinstance(table, dict))
    given = {name for table in tables for name in table} | command_line.parse(flags).values.keys()
    extra = [word for n, v in _UNUSED.items() if n not in given for word in (f"--{n}", v)]
    words = ["--config_file", path, "--dry_run", *flags, *extra]
    return load(words, 1, SOURCES).config, "pretrain" in given


def _scorer(path: str, flags: list[str]) -> Scorer:
    """What is served, on the devices of this process."""
    import torch

    from torchrft.build.rewards import build_rewards
    from torchrft.models.loader import load_tokenizer
    from torchrft.tools import distributed
    from torchrft.tools.hub import trust_code_of

    config, has_policy = _config(path, flags)
    trust_code_of(config.trusted_sources)
    tokenizer = load_tokenizer(config.model.pretrain) if has_policy else None
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    scorer = build_rewards(config, distributed.setup(), dtype, tokenizer)
    if scorer.norms:
        scorer.close()
        raise ValueError(
            f"normalize of {', '.join(scorer.norms)} needs the rewards of all ranks: leave it out "
            "here, and set remote_rm_normalize where the training is configured"
        )
    return scorer


def serve(argv: Sequence[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM, after which requests have 10 seconds to end.

    Raises ConfigError or ValueError for what cannot be served.
    """
    options, flags = _options(argv)
    setup_logging()
    try:
        import uvicorn

        from torchrft.rewards.server_app import create_app
        from torchrft.rewards.server_gate import LIMITS
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the reward server needs {error.name}: pip install 'torchrft[server]'"
        ) from error
    token = bearer_token(options.token_env, "token_env")
    if token is None and options.host not in _LOOPBACK:
        logger.warning(f"anybody who reaches {options.host} may ask for rewards; see --token_env")
    scorer = _scorer(options.config, flags)
    # Within one machine, compressing takes longer than sending.
    zipped = options.host not in _LOOPBACK
    app = create_app(scorer, token, options.max_request_mb << 20, zipped)
    logger.info(f"serving {', '.join(scorer.sources)} at http://{options.host}:{options.port}")
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", **LIMITS)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 after one line for each thing that is wrong."""
    try:
        serve(argv)
    except (ConfigError, ValueError) as error:
        for line in str(error).splitlines():
            print(f"error: {one_line(line)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a reward that hangs in its thread is not waited for
