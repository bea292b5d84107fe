"""Compiled regions and CUDA graphs: what the recipe's `step` section says of how an update is executed.

compile      every block of the frozen tower, the Q-Former and the language model through torch.compile; blocks of a kind share one compilation.
             Captioning runs the plain blocks, whose shapes change with every token; the language model's stay plain where `attention` names
             a back end.
cuda_graphs  the language model's forward and backward over a full micro-batch of packed rows, captured once (torch.compile's "reduce-overhead"),
             since only those rows have a fixed shape: numbers of images change, an update's last micro-batch is smaller, validation forms
             no gradient; all of that runs outside the graphs.

`auto` switches one on only where PAYS has the kind of device: where it was measured to pay, its start included (benches/LOG.md).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import nn

from .kernel_choice import Choice
from .models.causal import CausalLanguageModel
from .models.tower import VisionTower
from .models.vlm import VisionLanguageModel
from .planning.trace import block_stacks
from .recipe import RecipeError, Step, TransferData
from .runtime import Runtime

PAYS: frozenset[tuple[str, str]] = frozenset()  # (switch, kind of device)
NOT_YET = {"cpu": "it does not pay on the CPU (benches/LOG.md)", "cuda": "not measured on a GPU yet"}


def unsupported_steps(asked: Step, device: torch.device) -> dict[str, str]:
    """Switches set to true that cannot be on on a kind of device, whatever the model: {name: why}."""
    reasons = {"compile": compile_unsupported_reason(device), "cuda_graphs": graphs_unsupported_reason(device)}
    return {name: reason for name, reason in reasons.items() if reason is not None and getattr(asked, name) is True}


def compile_unsupported_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot run here; None where it can."""
    if device.type == "cuda":
        return (
            None if importlib.util.find_spec("triton") else "Triton is not installed (pip install 'vpgtrans[triton]')"
        )
    compilers = [c for c in (os.environ.get("CXX"), "g++", "clang++") if c]
    return None if any(map(shutil.which, compilers)) else f"found no C++ compiler (tried: {', '.join(compilers)})"


def graphs_unsupported_reason(device: torch.device) -> str | None:
    """Why nothing can be captured here; None where it can."""
    return compile_unsupported_reason(device) if device.type == "cuda" else "CUDA graphs need a CUDA GPU"


def use_regions(
    asked: Step, model: VisionLanguageModel, tower: VisionTower, layout: TransferData, runtime: Runtime, backend: str = "inductor"
) -> list[Choice]:  # fmt: skip
    """Switch on what the recipe asks for, after the kernels are in place; a choice for each switch.

    Raises RecipeError where one that is asked for cannot be had.
    """
    device = runtime.device
    graphs = graphs_unsupported_reason(device)
    if graphs is None and not isinstance(model.llm, CausalLanguageModel):
        graphs = "an encoder-decoder has no rows of a fixed shape"
    if graphs is None and model.llm.is_sharded:
        graphs = "distribution.frozen shards the blocks, whose weights lie elsewhere each time that they are gathered"
    back_end = getattr(model.llm, "back_end", None)
    if graphs is None and back_end is not None:
        graphs = f"attention is {back_end}, whose layout of the rows has another shape every micro-batch"
    graphed = _choice("cuda_graphs", asked.cuda_graphs, graphs, device)
    compiled = _choice("compile", asked.compile, compile_unsupported_reason(device), device)
    if graphed.on:
        graph_rows(model.llm, layout.rows_per_micro_batch, backend)
    if compiled.on:
        compile_blocks(tower.module, backend)
        compile_blocks(model.vpg.qformer, backend)
        if (
            not graphed.on and back_end is None
        ):  # a layout's lengths are numbers, for each of which a block would be compiled anew
            compile_blocks(model.llm.model, backend)
        model.has_compiled_blocks = True
    return [compiled, graphed]


def _choice(name: str, setting: bool | str, reason: str | None, device: torch.device) -> Choice:
    if setting is True and reason is not None:
        raise RecipeError(f"step.{name}: expected auto or false here, got true: {reason}")
    on = setting is True or (setting == "auto" and reason is None and (name, device.type) in PAYS)
    why = f"step.{name} is {str(setting).lower()}"
    if not on and setting == "auto":
        why += f"; {reason or NOT_YET[device.type]}"
    return Choice(name, on, True, why, "step")


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile each block of a module's stacks in place, shapes free; returns how many."""
    blocks = [block for stack in block_stacks(module) for block in stack]
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    return len(blocks)


def graph_rows(llm: CausalLanguageModel, rows: int, backend: str = "inductor") -> None:
    """Run micro-batches of `rows` packed rows through one captured graph; others, and those without gradients, as before."""
    base = llm.model.base_model

    def run(**inputs: Any) -> Any:  # a function: a compiled module would become a second part of `llm`
        return base(**inputs)

    mode = "reduce-overhead" if backend == "inductor" else None
    llm.graphed = torch.compile(run, dynamic=False, mode=mode, backend=backend)
    llm.graphed_rows = rows
