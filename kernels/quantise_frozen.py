"""The FP8 pass over a frozen model: its linears become FP8 with row-wise scales, the norms in front of them quantise as they write.

    report = quantise_frozen_(llm.model, run=llm.check_contract)      # any language model of transformers
    report = quantise_frozen_(tower.module, run=lambda: tower.features(images))

Memory stays that of bf16: FP8 is kept twice, once for each direction (frozen_linear.py); with `copies=1`, for blocks that are sharded over ranks
and gathered for each pass, it halves, and so do the bytes of a gather.  A norm is taken when `run`, one forward of the model,
shows that its result is what a quantised linear takes, and when our formula gives what the module gives.  Left as they are: what trains, the
output head (linear_cross_entropy reads it), weights that two modules share, sizes that are no multiples of 16.
Bench: benches/bench_frozen_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .frozen_linear import ALIGNMENT, FP8, QuantisedWeight, Rows, fp8_unsupported_reason, frozen_linear, quantise_weight
from .frozen_norm import Norm, norm_and_quantise, reference_norm


class QuantiseError(RuntimeError):
    """The pass cannot run on this model or device; nothing was changed."""


@dataclass
class Report:
    """Names of what was replaced, and why what was not.  Bytes: of the replaced linears' weights and scales, before and after."""

    linears: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    copies: int = 2

    def lines(self) -> list[str]:
        """For a log: what runs in FP8, its memory, and what was left for which reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        kept = "two copies, one a direction" if self.copies == 2 else "one copy for both directions"
        return [
            f"FP8: {len(self.linears)} linears and {len(self.norms)} norms in front of them, {self.bytes_after / 2**20:,.1f} MiB of weights and "
            f"scales after {self.bytes_before / 2**20:,.1f} MiB ({kept})",
            *(f"left, {reason}: {len(names)}, first {names[0]}" for reason, names in reasons.items()),
        ]


class _Fixed(nn.Module):
    """A module whose FP8 values and scales follow it to other devices and keep their dtype, whatever `.to(dtype)` asks for."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Fixed:
        fixed = {n: b for n, b in self._buffers.items() if n.startswith("weight_")}
        super()._apply(fn, recurse)
        for name, buffer in fixed.items():
            self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class FrozenLinear(_Fixed):
    """An nn.Linear (K -> N) in FP8 that holds no parameter.  `weight` tells shape and dtype of what it stands for, and has no values."""

    def __init__(self, linear: nn.Linear, fast_accumulation: bool = False, device: torch.device | None = None):
        super().__init__()
        quantised = quantise_weight(linear.weight.to(device or linear.weight.device))
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.fast_accumulation = fast_accumulation
        for direction, rows in (("output", quantised.by_output), ("input", quantised.by_input)):
            self.register_buffer(f"weight_by_{direction}", rows.values.to(linear.weight.device))
            self.register_buffer(f"weight_{direction}_scales", rows.scales.to(linear.weight.device))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """(N, K) on the meta device: models ask for a weight's dtype (T5 does)."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def quantised(self) -> QuantisedWeight:
        return QuantisedWeight(
            Rows(self.weight_by_output, self.weight_output_scales), Rows(self.weight_by_input, self.weight_input_scales)
        )

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.quantised(), self.bias, rows_of(x), self.fast_accumulation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, e4m3"


class ShardableFrozenLinear(FrozenLinear):
    """With one copy, as parameters that `fully_shard` cuts and gathers: values (N, K) and scales (N, 4), both as bytes.

    Bytes, because no `.to(dtype)` converts them and every collective moves them.
    """

    def __init__(self, linear: nn.Linear, fast_accumulation: bool = False, device: torch.device | None = None):
        nn.Module.__init__(self)
        rows = quantise_weight(linear.weight.to(device or linear.weight.device), copies=1).by_output
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.fast_accumulation = fast_accumulation
        for name, tensor in (("weight_by_output", rows.values), ("weight_output_scales", rows.scales)):
            held = tensor.to(linear.weight.device).view(torch.uint8)
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def quantised(self) -> QuantisedWeight:
        return QuantisedWeight(
            Rows(self.weight_by_output.view(FP8), self.weight_output_scales.view(torch.float32)), None
        )


class FrozenNorm(nn.Module):
    """A frozen norm whose result carries its FP8 rows to the linears that take it."""

    def __init__(self, module: nn.Module, norm: Norm):
        super().__init__()
        self.norm = norm
        self.weight = module.weight
        self.bias = getattr(module, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y, rows = norm_and_quantise(x, self.weight, self.bias, self.norm)
        y.fp8_rows = (rows, y._version)
        return y


def rows_of(x: Tensor) -> Rows | None:
    """The FP8 rows that a FrozenNorm attached to this very tensor, unless it was written to since."""
    rows, version = getattr(x, "fp8_rows", (None, -1))
    return rows if rows is not None and version == x._version else None


def quantise_frozen_(
    module: nn.Module,
    run: Callable[[], object] | None = None,
    keep: Iterable[nn.Module] = (),
    fast_accumulation: bool = False,
    copies: Literal[1, 2] = 2,
    device: torch.device | None = None,
) -> Report:
    """Replace the frozen linears of `module` by FP8 ones, in place, and the norms in front of them.

    Args:
        module: a model on the device where it will run, its weights frozen; a language model's output head is left.
        run: one forward of it (small inputs will do); None: no norm is replaced.
        keep: modules that stay as they are.
        fast_accumulation: see `frozen_linear`.
        copies: 2: one a direction, as buffers; 1: one for both, as parameters, which can be sharded.
        device: where it will run, and where weights are quantised, one at a time; None: where the weights are.

    Raises:
        QuantiseError: the device has no FP8 GEMM, or no linear of `module` can be replaced; nothing was changed.
    """
    report = Report(copies=copies)
    linears = _replaceable(module, {id(m) for m in keep}, report)
    if not linears:
        reasons = "; ".join(dict.fromkeys(report.left.values())) or "it has no nn.Linear"
        raise QuantiseError(
            f"quantise_frozen_: expected a module with frozen linears to replace, found none: {reasons}"
        )
    device = device or next(iter(linears.values())).weight.device
    if reason := fp8_unsupported_reason(device):
        raise QuantiseError(f"quantise_frozen_: {reason}; leave the model in bf16 on this machine")
    norms = _norms_in_front(module, set(linears.values()), run) if run else {}
    for name, linear in linears.items():
        quantised = (FrozenLinear if copies == 2 else ShardableFrozenLinear)(linear, fast_accumulation, device)
        report.linears.append(name)
        report.bytes_before += linear.weight.numel() * linear.weight.element_size()
        held = (*quantised.named_buffers(), *quantised.named_parameters())
        report.bytes_after += sum(b.numel() * b.element_size() for n, b in held if n != "bias")
        _put(module, name, quantised)
    for name, (found, norm) in norms.items():
        report.norms.append(name)
        _put(module, name, FrozenNorm(found, norm))
    return report


def _replaceable(module: nn.Module, kept: set[int], report: Report) -> dict[str, nn.Linear]:
    """name -> linear of those that are to be replaced; the others' reasons go into the report."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    owners: dict[int, int] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear) or not name:
            continue
        if id(linear) in kept:
            report.left[name] = "asked for"
        elif linear is head:
            report.left[name] = "the output head"
        elif type(linear) is not nn.Linear:
            report.left[name] = f"a {type(linear).__name__}"
        elif any(p.requires_grad for p in linear.parameters()):
            report.left[name] = "it trains"
        elif owners[id(linear.weight)] > 1:
            report.left[name] = "its weight is shared with another module"
        elif linear.weight.is_meta or not linear.weight.is_floating_point():
            report.left[name] = "its weight has no values to quantise"
        elif linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
            report.left[name] = f"a side is no multiple of {ALIGNMENT}"
        else:
            found[name] = linear
    return found


def _norms_in_front(
    module: nn.Module, linears: set[nn.Module], run: Callable[[], object]
) -> dict[str, tuple[nn.Module, Norm]]:
    """name -> module and formula of the frozen norms whose result, as the very same tensor, enters one of `linears` during `run`."""
    candidates = {name: (m, norm) for name, m in module.named_modules() if (norm := _formula(m)) is not None}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no id is given again
    taken: set[str] = set()

    def note(name: str) -> Callable:
        return lambda _module, _inputs, output: made.__setitem__(id(output), (name, output))

    def look(_module: nn.Module, inputs: tuple) -> None:
        if inputs and id(inputs[0]) in made:
            taken.add(made[id(inputs[0])][0])

    hooks = [m.register_forward_hook(note(name)) for name, (m, _) in candidates.items()]
    hooks += [linear.register_forward_pre_hook(look) for linear in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: candidates[name] for name in candidates if name in taken}


@torch.no_grad()
def _formula(module: nn.Module) -> Norm | None:
    """The formula of a frozen norm over its last axis; None for any module that is something else."""
    weight, eps = getattr(module, "weight", None), getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.is_meta or not isinstance(eps, float):
        return None
    bias = getattr(module, "bias", None)
    parameters = list(module.parameters())
    if any(p.requires_grad for p in parameters) or len(parameters) != 1 + (bias is not None):
        return None
    generator = torch.Generator().manual_seed(0)
    x = (1.0 + 2.0 * torch.randn(4, len(weight), generator=generator)).to(weight.device, weight.dtype)
    try:
        wanted = module(x)
    except (RuntimeError, TypeError, ValueError):
        return None  # batch norms and the like take other shapes
    for kind in ("layer",) if bias is not None else ("rms_rounded", "rms", "layer"):
        got = reference_norm(x, weight, bias, Norm(kind, eps))
        step = torch.finfo(weight.dtype).eps * 4
        if (
            isinstance(wanted, Tensor)
            and wanted.shape == got.shape
            and torch.allclose(got, wanted, rtol=step, atol=step)
        ):
            return Norm(kind, eps)
    return None


def _put(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    new.train(module.training)
    setattr(module.get_submodule(parent), leaf, new)
