"""Heads other than the language model's."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from torchrft.models.loader import sees_images
from torchrft.models.policy import Inputs
from torchrft.models.split import joined, part_of, shared
from torchrft.models.vision import hidden_states
from torchrft.parallel.mesh import ModelMesh


class ValueModel(nn.Module):
    """A critic: the decoder of a causal LM with a scalar head on its hidden states.

    The head starts at zero, so an untrained critic predicts 0 everywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        whole: Any = model.base_model if sees_images(model.config) else model.get_decoder()
        self.model: nn.Module = whole
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        self.mesh: ModelMesh | None = None  # set by torchrft.parallel.parallelize

    def forward(self, inputs: Inputs) -> Tensor:
        """Values float32 [M]: entry m is that of the state in which response token m was chosen."""
        hidden = hidden_states(
            self.model, inputs.input_ids, inputs.position_ids, inputs.layout, inputs.images
        )
        ranks = None if self.mesh is None else self.mesh.all
        rows = part_of(inputs.targets.numel(), ranks)
        hidden = shared(hidden, ranks).flatten(0, 1)[inputs.targets[rows]]
        weight = self.head.weight
        if isinstance(weight, DTensor):  # each tp rank's gradient is that of its rows
            weight = weight.to_local(grad_placements=[Partial()])
        values = (hidden @ weight[0]).float()
        return joined(values, rows, inputs.targets.numel(), ranks)
