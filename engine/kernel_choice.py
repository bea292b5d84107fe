"""Which operations of kernels/ a run uses in place of torch's: what the recipe's `kernels` section says.

`auto` uses an operation only where a measurement, committed under benches/results/, has shown that it pays: on a GPU MEASURED names those, on
the CPU MEASURED_ON_CPU.  Everything else stays torch's until then, and `kernel` is there for whoever wants to try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.frozen_linear import fp8_unsupported_reason
from ..kernels.qformer_attention import AttentionShape, choose_form
from ..kernels.quantise_frozen import FrozenLinear, QuantiseError, quantise_frozen_
from ..kernels.triton_support import triton_unsupported_reason
from .models.causal import CausalLanguageModel
from .models.llm import LanguageModel, ModelError
from .models.tower import VisionTower
from .models.vlm import VisionLanguageModel
from .models.vpg import VPG
from .recipe import Kernels, RecipeError
from .runlog import RunLog
from .runtime import Runtime

MEASURED: frozenset[str] = frozenset()  # none yet: no GPU has run them
# Through latents, where they cost less: a step is 1.01 to 1.19 times as fast while the VPG trains (step_latents_cpu_2026-11-23.json).
MEASURED_ON_CPU: frozenset[str] = frozenset({"qformer_attention"})
TRITON_ALONE = ("prefix_attention", "prompt_assembly", "linear_cross_entropy", "adamw_step")
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


def use_kernels(
    asked: Kernels,
    model: VisionLanguageModel,
    tower: VisionTower,
    runtime: Runtime,
    log: RunLog,
    attention: str = "auto",
) -> list[Choice]:
    """Switch operations on as the recipe asks; models are on the device, and the run looks at `on` for what is not a model's.

    attention: what the recipe says; but for `auto` it takes the place of `asked.prefix_attention`.
    Raises RecipeError where one that is asked for by name cannot run.
    """
    if attention != "auto":
        asked = asked.model_copy(update={"prefix_attention": "torch"})
    device, llm = runtime.device, model.llm
    measured = MEASURED_ON_CPU if device.type == "cpu" else MEASURED
    no_gain = {"qformer_attention": latents_cost_more_reason(model.vpg, tower.tokens) if device.type == "cpu" else None}
    without_triton = triton_unsupported_reason(device)
    # Operation -> why it cannot run (None where it can), and what switches it on.
    operations: dict[str, tuple[str | None, Callable[[], None]]] = {
        "frozen_linear": (
            fp8_reason(device),
            lambda: [quantise_(part, llm, tower, device, log) for part in ("language model", "tower")],
        ),  # first: the others see the new modules
        "prefix_attention": (_prefix_attention_reason(llm, device), lambda: _attend_by_prefix(llm)),
        # Its formed keys and values, and on the CPU its latents, are torch's own operations.
        "qformer_attention": (None, lambda: _fuse_cross_attention(model, asked, device)),
        "projector_converter": (_projection_reason(llm, device), lambda: _project_into_rows(model)),
        "prompt_assembly": (_prompt_assembly_reason(llm, device), lambda: _assemble(llm)),
        "linear_cross_entropy": (without_triton or llm.fused_head_unsupported_reason(), lambda: _fuse_head(llm)),
        "adamw_step": (without_triton, lambda: None),
    }
    choices = []
    for name, (reason, switch_on) in operations.items():
        setting = getattr(asked, name)
        auto_reason = reason or no_gain.get(name)
        on = setting == "kernel" or (setting == "auto" and name in measured and auto_reason is None)
        if on and reason is None:
            try:
                switch_on()
            except (ModelError, QuantiseError) as error:
                auto_reason = reason = str(error)
                on = setting == "kernel"
        if on and reason is not None:
            raise RecipeError(f"kernels.{name}: expected auto or torch here, got kernel: {reason}")
        named = (
            f"attention is {attention}"
            if attention != "auto" and name == "prefix_attention"
            else f"kernels.{name} is {setting}"
        )
        why = named
        if not on and setting == "auto":
            why += f"; {auto_reason or 'not measured on a GPU yet'}"
        choices.append(Choice(name, on, name not in INEXACT, why))
    if attention != "auto":
        choices.append(_use_attention(attention, llm))
    return choices


def _use_attention(attention: str, llm: LanguageModel) -> Choice:
    """The back end that the recipe names; that it can run here was found out before the models were loaded (back_ends.py)."""
    if attention == "sdpa":
        return Choice("packed attention", False, True, "attention is sdpa")
    reason = "an encoder-decoder has no packed rows"
    if isinstance(llm, CausalLanguageModel) and (reason := llm.stands_in_for_sdpa_reason()) is None:
        try:
            llm.use_back_end(attention)
        except ModelError as error:
            reason = str(error)
    if reason is not None:
        raise RecipeError(f"attention: expected auto or sdpa here, got {attention}: {reason}")
    return Choice("packed attention", True, True, f"attention is {attention}")


def unsupported_kernels(asked: Kernels, device: torch.device) -> dict[str, str]:
    """Operations asked for by name that cannot run on a kind of device, whatever the model: {name: why}."""
    reasons = {name: triton_unsupported_reason(device) for name in TRITON_ALONE} | {"frozen_linear": fp8_reason(device)}
    return {n: reason for n, reason in reasons.items() if reason is not None and getattr(asked, n) == "kernel"}


def _prefix_attention_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return llm.prefix_attention_unsupported_reason(device)


def _attend_by_prefix(llm: LanguageModel) -> None:
    assert isinstance(llm, CausalLanguageModel)
    llm.use_prefix_attention()


def _fuse_cross_attention(model: VisionLanguageModel, asked: Kernels, device: torch.device) -> None:
    model.vpg.fuses_cross_attention = True
    if device.type == "cpu" and asked.qformer_attention == "auto":
        # Torch's operations are what was measured; under Triton's interpreter the kernels would run.
        model.vpg.cross_attention_impl = "reference"


def fuses_cross_attention_on_cpu(asked: Kernels, vpg: VPG, image_tokens: int) -> bool:
    """What `use_kernels` decides there, without a model on a device."""
    setting = asked.qformer_attention
    pays = "qformer_attention" in MEASURED_ON_CPU and latents_cost_more_reason(vpg, image_tokens) is None
    return setting == "kernel" or (setting == "auto" and pays)


def latents_cost_more_reason(vpg: VPG, image_tokens: int) -> str | None:
    """Why a CPU that trains this VPG gains nothing from its cross-attention through latents; None where it does."""
    config = vpg.config
    shape = AttentionShape(
        1, config.num_query_tokens, image_tokens, vpg.image_width, config.hidden_size, config.num_attention_heads
    )
    if choose_form(shape, gradients=True, image_gradient=False, device="cpu") == "latents":
        return None
    head = config.hidden_size // config.num_attention_heads
    return f"{config.num_query_tokens} queries and heads of {head}: latents cost no less than keys and values"


def _projection_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return triton_unsupported_reason(device)


def _project_into_rows(model: VisionLanguageModel) -> None:
    model.projects_into_rows = True


def _prompt_assembly_reason(llm: LanguageModel, device: torch.device) -> str | None:
    if not isinstance(llm, CausalLanguageModel):
        return "an encoder-decoder has no packed rows"
    return llm.prompt_assembly_unsupported_reason(device)


def _assemble(llm: LanguageModel) -> None:
    assert isinstance(llm, CausalLanguageModel)
    llm.assembles_prompts = True


def _fuse_head(llm: LanguageModel) -> None:
    llm.fuses_head = True


def fp8_reason(device: torch.device) -> str | None:
    """Why models on `device` do not use FP8; None where they can.  On the CPU it works, and is no use."""
    if device.type == "cpu":
        return "the models are on the CPU, where FP8 is slower than float32"
    return fp8_unsupported_reason(device)


def uses_fp8(asked: Kernels, device: torch.device) -> bool:
    """Whether frozen linears of a run on `device` are in FP8."""
    named = asked.frozen_linear == "kernel" or (asked.frozen_linear == "auto" and "frozen_linear" in MEASURED)
    return named and fp8_reason(device) is None


def quantise_(
    part: str, llm: LanguageModel, tower: VisionTower, device: torch.device, log: RunLog, copies: Literal[1, 2] = 2
) -> None:
    """Put the "language model" or the "tower" into FP8, unless it is; weights are quantised on `device`, wherever they are."""
    module = llm.model if part == "language model" else tower.module
    if any(isinstance(m, FrozenLinear) for m in module.modules()):
        return  # before it was sharded
    forward = llm.check_contract if part == "language model" else lambda: tower.features(_blank(tower))
    for line in quantise_frozen_(module, run=forward, copies=copies, device=device).lines():
        log.say(f"{part}: {line}")


def _blank(tower: VisionTower) -> torch.Tensor:
    """Pixels of one image, where the tower is."""
    first = next(tower.parameters())
    return torch.zeros(1, 3, tower.image_size, tower.image_size, device=first.device, dtype=first.dtype)


def quantise_tower(asked: Kernels, tower: VisionTower, runtime: Runtime) -> None:
    """Leave the tower as `use_kernels` leaves it, so that its caches have the run's key; RecipeError as there."""
    reason = fp8_reason(runtime.device)
    if asked.frozen_linear == "kernel" and reason is not None:
        raise RecipeError(f"kernels.frozen_linear: expected auto or torch here, got kernel: {reason}")
    if uses_fp8(asked, runtime.device):
        quantise_frozen_(tower.module, run=lambda: tower.features(_blank(tower)))
