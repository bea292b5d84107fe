"""AdamW groups and learning-rate schedules as the authors' code has them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.adamw_step import StepResult, adamw_step, reference_adamw_step
from .recipe import Optimizer

APEX_INSTALL = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW with two groups: decay on matrices, none on vectors (biases, norms).  Query tokens are 3-D, hence decayed.

    torch's, fused on the CPU too, or apex's (`settings.implementation`): both skip an update on the device where `found_inf` is 1, without
    waiting for it, and have the same `state_dict`.  The learning rate is set before every update by the schedule.  Raises ValueError when
    nothing trains, or apex is asked for and cannot run.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        is_plain = parameter.ndim < 2 or any(part in ("bias", "ln", "bn") for part in name.split("."))
        (plain if is_plain else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("optimizer: expected at least one parameter to train, got none")
    both = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [g for g in both if g["params"]]
    if settings.implementation == "fused":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
    if reason := apex_unsupported_reason(groups[0]["params"][0].device):
        raise ValueError(f"optimizer.implementation: expected fused, got apex: {reason}")
    from .apex_adamw import ApexAdamW

    return ApexAdamW(groups, betas=settings.betas, eps=settings.eps)


def apex_unsupported_reason(device: torch.device) -> str | None:
    """Why the FusedAdam of NVIDIA's apex cannot run on `device`; None where it can."""
    try:
        import amp_C  # noqa: F401  # its kernels, which a build of apex without CUDA lacks
        import apex.optimizers  # noqa: F401
    except Exception as error:  # the package index holds another project of that name
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"NVIDIA's apex with its CUDA extensions cannot be imported ({found}); {APEX_INSTALL}"
    return None if device.type == "cuda" else f"its FusedAdam does not run on the {device.type.upper()}"


def take_step(
    optimizer: torch.optim.Optimizer, clip_norm: float | None, loss: Tensor | None, with_kernels: bool = False
) -> StepResult:
    """One update, clipped, skipped on the device where norm or loss is not finite: kernels.adamw_step, or torch's lines around the optimizer."""
    if isinstance(optimizer, torch.optim.AdamW):
        return adamw_step(optimizer, clip_norm, loss, impl=None if with_kernels else "reference")
    return reference_adamw_step(optimizer, clip_norm, loss)


def steps_by_parameter(state: dict) -> dict:
    """apex's `state_dict`, which counts steps by group, in the form of torch's AdamW: `step` (float32 scalar) beside each parameter's moments."""
    steps = {index: group["step"] for group in state["param_groups"] for index in group["params"]}
    return {
        "state": {
            index: {"step": torch.as_tensor(steps[index]).detach().reshape(()).to(torch.float32), **moments}
            for index, moments in state["state"].items()
        },
        "param_groups": [{k: v for k, v in group.items() if k != "step"} for group in state["param_groups"]],
    }


def steps_by_group(state: dict) -> dict:
    """The `state_dict` of torch's AdamW in apex's form: `step` (int32, one element) in each group.

    Raises ValueError where the parameters of a group have taken different numbers of steps, which apex cannot continue.
    """
    groups = []
    for group in state["param_groups"]:
        steps = {int(state["state"][index]["step"]) for index in group["params"] if index in state["state"]}
        if len(steps) > 1:
            raise ValueError(
                f"optimizer: expected one number of steps for all parameters of a group, as apex counts them, got {sorted(steps)}; go on with "
                "implementation: fused"
            )
        groups.append({**group, "step": torch.tensor([steps.pop() if steps else 0], dtype=torch.int32)})
    moments = {i: {k: v for k, v in entry.items() if k != "step"} for i, entry in state["state"].items()}
    return {"state": moments, "param_groups": groups}


def learning_rate(
    done: float,
    total: float,
    peak: float,
    *,
    schedule: str = "constant",
    minimum: float = 0.0,
    warmup: float = 0.0,
    warmup_start: float = 0.0,
) -> float:
    """The rate of the update that starts after `done` of `total` (pairs or steps): linear warm-up, then constant or cosine to `minimum`."""
    if done < warmup:
        return warmup_start + (peak - warmup_start) * done / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (done - warmup) / max(1e-9, total - warmup))
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # apex's kernels read it on the device
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Global gradient norm, float32 on the device (no host sync); gradients are scaled down to `limit` where one is given."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
