"""Heads other than the language model's."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from torchrft.models.mixers import gather_mixers
from torchrft.models.policy import Inputs, target_states
from torchrft.models.split import joined
from torchrft.models.support import mixers, refuse_unsupported, sees_images
from torchrft.parallel.mesh import ModelMesh


class ValueModel(nn.Module):
    """A critic: the decoder of a causal LM with a scalar head on its hidden states.

    The head starts at zero, so an untrained critic predicts 0 everywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.limit = refuse_unsupported(model.config, head=False, kind=type(model))
        gather_mixers(model.get_decoder(), mixers(model.config, type(model)))
        whole: Any = model.base_model if sees_images(model.config) else model.get_decoder()
        self.model: nn.Module = whole
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        self.mesh: ModelMesh | None = None  # set by torchrft.parallel.parallelize

    def forward(self, inputs: Inputs) -> Tensor:
        """Values float32 [M]: entry m is that of the state in which response token m was chosen."""
        ranks = None if self.mesh is None else self.mesh.all
        hidden, rows = target_states(self.model, inputs, ranks, ranks, self.limit)
        weight = self.head.weight
        if isinstance(weight, DTensor):  # each tp rank's gradient is that of its rows
            weight = weight.to_local(grad_placements=[Partial()])
        values = (hidden @ weight[0]).float()
        return joined(values, rows, inputs.targets.numel(), ranks)
