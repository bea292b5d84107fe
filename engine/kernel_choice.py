"""Which operations of kernels/ a run uses in place of torch's: what the recipe's `kernels` section says.

`auto` uses an operation only where a measurement on a GPU, committed under benches/results/, has shown that it pays; MEASURED names those.
Everything else stays torch's until then, and `kernel` is there for whoever wants to try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.frozen_linear import fp8_unsupported_reason
from ..kernels.quantise_frozen import QuantiseError, quantise_frozen_
from ..kernels.triton_support import triton_unsupported_reason
from .models.causal import CausalLanguageModel
from .models.llm import LanguageModel, ModelError
from .models.tower import VisionTower
from .recipe import Kernels, RecipeError
from .runlog import RunLog
from .runtime import Runtime

MEASURED: frozenset[str] = frozenset()  # none yet: no GPU has run them
INEXACT = frozenset({"frozen_linear"})


@dataclass(frozen=True)
class Choice:
    """One switch of how an update is computed: whether it is on, whether it changes results beyond rounding, and why."""

    name: str
    on: bool
    exact: bool
    why: str
    section: str = "kernels"

    @property
    def title(self) -> str:
        """Of its row in the table of savings."""
        return f"{self.section.removesuffix('s')}: {self.name.replace('_', ' ')}"


def use_kernels(asked: Kernels, llm: LanguageModel, tower: VisionTower, runtime: Runtime, log: RunLog) -> list[Choice]:
    """Switch operations on as the recipe asks; models are on the device, and the run looks at `on` for what is not a model's.

    Raises RecipeError where one that is asked for by name cannot run.
    """
    device = runtime.device
    without_triton = triton_unsupported_reason(device)
    # Operation -> why it cannot run (None where it can), and what switches it on.
    operations: dict[str, tuple[str | None, Callable[[], None]]] = {
        "frozen_linear": (
            _fp8_reason(device),
            lambda: _quantise(llm, tower, device, log),
        ),  # first: the others see the new modules
        "prefix_attention": (_prefix_attention_reason(llm, device), lambda: _attend_by_prefix(llm)),
        "prompt_assembly": (_prompt_assembly_reason(llm, device), lambda: _assemble(llm)),
        "linear_cross_entropy": (without_triton or llm.fused_head_unsupported_reason(), lambda: _fuse_head(llm)),
        "adamw_step": (without_triton, lambda: None),
    }
    choices = []
    for name, (reason, switch_on) in operations.items():
        setting = getattr(asked, name)
        on = setting == "kernel" or (setting == "auto" and name in MEASURED and reason is None)
        if on and reason is None:
            try:
                switch_on()
            except (ModelError, QuantiseError) as error:
                reason, on = str(error), setting == "kernel"
        if on and reason is not None:
            raise RecipeError(f"kernels.{name}: expected auto or torch here, got kernel: {reason}")
        why = f"kernels.{name} is {setting}" + ("" if on else f"; {reason or 'not measured on a GPU yet'}")
        choices.append(Choice(name, on, name not in INEXACT, why))
    return choices


def unsupported_kernels(asked: Kernels, device: torch.device) -> dict[str, str]:
    """Operations asked for by name that cannot run on a kind of device, whatever the model: {name: why}."""
    named = [name for name in type(asked).model_fields if getattr(asked, name) == "kernel"]
    reasons = {n: _fp8_reason(device) if n == "frozen_linear" else triton_unsupported_reason(device) for n in named}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _prefix_attention_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return llm.prefix_attention_unsupported_reason(device)


def _attend_by_prefix(llm: LanguageModel) -> None:
    assert isinstance(llm, CausalLanguageModel)
    llm.use_prefix_attention()


def _prompt_assembly_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return llm.prompt_assembly_unsupported_reason(device)


def _assemble(llm: LanguageModel) -> None:
    assert isinstance(llm, CausalLanguageModel)
    llm.assembles_prompts = True


def _fuse_head(llm: LanguageModel) -> None:
    llm.fuses_head = True


def _fp8_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "the models are on the CPU, where FP8 is slower than float32"
    return fp8_unsupported_reason(device)


def _quantise(llm: LanguageModel, tower: VisionTower, device: torch.device, log: RunLog) -> None:
    pixels = torch.zeros(1, 3, tower.image_size, tower.image_size, device=device, dtype=next(tower.parameters()).dtype)
    for name, module, forward in (
        ("language model", llm.model, llm.check_contract),
        ("tower", tower.module, lambda: tower.features(pixels)),
    ):
        for line in quantise_frozen_(module, run=forward).lines():
            log.say(f"{name}: {line}")
