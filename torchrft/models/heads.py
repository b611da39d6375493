"""Heads other than the language model's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchrft.models.policy import Inputs


class ValueModel(nn.Module):
    """A critic: the decoder of a causal LM with a scalar head on its hidden states.

    The head starts at zero, so an untrained critic predicts 0 everywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: nn.Module = model.get_decoder()
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: Inputs) -> Tensor:
        """Values float32 [M]: entry m is that of the state in which response token m was chosen."""
        hidden = self.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            layout=inputs.layout,
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[inputs.targets]
        return torch.nn.functional.linear(hidden, self.head.weight).squeeze(-1).float()
