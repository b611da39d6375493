"""torch.compile, layer by layer."""

from torch import nn

from torchrft.parallel.modules import decoder_layers, language_part


def apply_compile(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles every decoder layer for any sequence length; equal layers share the code.

    Attention stays outside of the graph (its layout differs from batch to batch), so that a layer
    becomes two graphs, both with a dynamic length.
    """
    for layer in decoder_layers(language_part(model)):  # image towers loop over the images
        layer.compile(dynamic=True, backend=backend)
