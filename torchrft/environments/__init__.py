"""Episodes of several turns: the environment's side, and what is trained on."""

from torchrft.environments.protocol import (
    Branch,
    Environment,
    EnvironmentFault,
    Episode,
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
    "Branch",
    "Environment",
    "EnvironmentFault",
    "Episode",
    "Limits",
    "Message",
    "Opening",
    "ParsedResponse",
    "Renderer",
    "Status",
    "ToolSpec",
    "Turn",
]
