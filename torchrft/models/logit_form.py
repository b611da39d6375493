"""What some families do to the logits of their head: a constant factor, a soft cap."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOGIT_CHANGES = (  # options by which known families do it, for the message
    *("final_logit_softcapping", "logit_scale", "logits_scaling"),
    *("lm_head_multiplier", "output_multiplier"),
)


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


class _Hidden(dict[str, Any]):
    """Stands for any model output: hidden states, and None for all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None


def probed_form(model: Any, text: Any) -> LogitForm | str:
    """Runs the code around the decoder and the head, whose outputs are numbers made up here.

    The logits must be the head's output, and its input the decoder's, up to a `LogitForm`: returns
    that, or else the fault.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "needs a language-model head without bias"
    outputs, inputs = head.weight.shape
    hidden, logits = (torch.linspace(-50, 50, 3 * n).view(1, 3, n) for n in (inputs, outputs))
    for module in (model.base_model, model.get_decoder()):
        module.forward = lambda *args, **kwargs: _Hidden(hidden)
    seen: list[Tensor] = []
    head.forward = lambda x: seen.append(x) or logits  # type: ignore[func-returns-value]
    try:
        out = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
        before = LogitForm.measured(hidden, seen[0], None) if len(seen) == 1 else None
        after = LogitForm.measured(logits, out, getattr(text, "final_logit_softcapping", None))
    except Exception:  # code that wants more of the decoder than its hidden states
        before = after = None
    if before is not None and after is not None:
        return LogitForm(before.scale * after.scale, after.cap)
    values = {name: getattr(text, name, None) for name in _LOGIT_CHANGES}
    options = ", ".join(f"{k} = {v}" for k, v in values.items() if v not in (None, 1))
    return f"changes its logits by {options or 'code around its head'}"
