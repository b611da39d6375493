"""Episodes of several turns: the environment's side, and what is trained on."""

from torchrft.environments.protocol import (
    Environment,
    EnvironmentFault,
    Limits,
    Message,
    Opening,
    ParsedResponse,
    Renderer,
    Status,
    ToolSpec,
    Turn,
)

__all__ = [
    "Environment",
    "EnvironmentFault",
    "Limits",
    "Message",
    "Opening",
    "ParsedResponse",
    "Renderer",
    "Status",
    "ToolSpec",
    "Turn",
]
