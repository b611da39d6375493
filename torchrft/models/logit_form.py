"""What some families do to the logits of their head: a constant factor, a soft cap."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitForm:
    """Logits become scale * logits or, with a cap, cap * tanh(scale * logits / cap)
    (arXiv:2408.00118).

    >>> LogitForm(scale=0.5)(torch.tensor([4.0]))
    tensor([2.])
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits; float32 where they are not the head's own."""
        if self == PLAIN:
            return logits
        logits = logits.float() * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the head's logits, from that of the model's `logits`."""
        if self == PLAIN:
            return grad
        if self.cap is not None:  # logits that are left out of the softmax lie far below the cap
            grad = grad * (1 - (logits / self.cap).clamp(-1, 1).square())
        return grad * self.scale

    @classmethod
    def measured(cls, logits: Tensor, out: Tensor, cap: float | None) -> "LogitForm | None":
        """The form that makes `out` of a head's `logits` with the cap of the model's config, if
        any does: `logits` reach from one sign to the other."""
        # Where tanh is neither flat nor, for want of digits, the identity.
        at = (logits.abs() - (cap or 50) / 8).abs().argmin()
        value, logit = out.flatten()[at].double(), logits.flatten()[at].double()
        scale = float((value / cap).atanh() * cap / logit) if cap else float(value / logit)
        form = cls(1.0 if abs(scale - 1) < 1e-5 else scale, cap)
        return form if torch.allclose(form(logits), out, rtol=1e-5, atol=1e-5) else None


PLAIN = LogitForm()
