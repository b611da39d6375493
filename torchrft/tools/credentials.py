"""Where the secrets of servers may stand: in environment variables, never in URLs."""

import os
from urllib.parse import urlsplit

from torchrft.tools.text import redact, remember_secret


def check_url(url: str, option: str) -> None:
    """Raises ValueError, naming `option`, unless `url` is http://host:port or https://host:port,
    with or without a path, and holds no secret."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(redact(f'{option} holds "{url}"; write each as http://host:port'))
    if (shown := redact(f'"{url}"')) != f'"{url}"':
        raise ValueError(
            f"{option} holds {shown}: a URL is shown in logs and trackers, so it may hold no "
            "password or key; put a bearer token into an environment variable "
            "(remote_rm_token_env, token_env of a judge, VLLM_API_KEY)"
        )


def bearer_token(variable: str | None, option: str) -> str | None:
    """The token in an environment variable. It shows in no message from then on.

    Raises ValueError, naming `option`, if none is set or it cannot be sent as a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f'{option} = "{variable}": the variable is not set')
    remember_secret(token)
    if token.split() != [token] or not token.isprintable():
        fault = "its token has a line break, a blank or a control character in it; correct it"
        raise ValueError(f'{option} = "{variable}": {fault}')
    return token
