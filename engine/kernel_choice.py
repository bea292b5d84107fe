"""Which operations of kernels/ a run uses in place of torch's: what the recipe's `kernels` section says.

`auto` uses an operation only where a measurement on a GPU, committed under benches/results/, has shown that it pays; MEASURED names those.
Everything else stays torch's until then, and `on` is there for whoever wants to try.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.triton_support import triton_unsupported_reason
from .models.causal import CausalLanguageModel
from .models.llm import LanguageModel, ModelError
from .recipe import Kernels, RecipeError

MEASURED: frozenset[str] = frozenset()  # none yet: no GPU has run them


@dataclass(frozen=True)
class Choice:
    """One operation in this run: whether it is on, and why."""

    name: str
    on: bool
    why: str


def use_kernels(llm: LanguageModel, asked: Kernels, device: torch.device) -> list[Choice]:
    """Switch the operations of a language model on as the recipe asks; the model is on `device`.

    Raises RecipeError where one that is asked for by name cannot run.
    """
    reasons = {
        "prefix_attention": _prefix_attention_reason(llm, device),
        "linear_cross_entropy": triton_unsupported_reason(device) or llm.fused_head_unsupported_reason(),
    }
    choices = []
    for name, reason in reasons.items():
        setting = getattr(asked, name)
        on = setting == "on" or (setting == "auto" and name in MEASURED and reason is None)
        if on and name == "prefix_attention" and reason is None:
            assert isinstance(llm, CausalLanguageModel)
            try:
                llm.use_prefix_attention()
            except ModelError as error:
                reason, on = str(error), setting == "on"
        if on and reason is not None:
            raise RecipeError(f"kernels.{name}: expected auto or off here, got on: {reason}")
        if on and name == "linear_cross_entropy":
            llm.fuses_head = True
        choices.append(
            Choice(
                name, on, f"kernels.{name} is {setting}" + ("" if on else f"; {reason or 'not measured on a GPU yet'}")
            )
        )
    return choices


def _prefix_attention_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return llm.prefix_attention_unsupported_reason(device)
