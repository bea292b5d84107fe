"""AdamW by the FusedAdam of NVIDIA's apex (`optimizer.implementation: apex`), with torch's manners.  Imports apex: only where it is installed.

Its kernels read the learning rate, the number of steps and whether to skip on the device (`capturable`), so nothing waits for it.  What differs
from torch.optim.AdamW(fused=True) is evened out here: FusedAdam learns of a bad update from a gradient scaler, `found_inf` tells torch's; it
counts steps by group; its `zero_grad` takes no argument.  State dicts, and hence checkpoints, are those of torch's AdamW.

Source: apex/optimizers/fused_adam.py and csrc/multi_tensor_adam.cu of https://github.com/NVIDIA/apex.
"""

from __future__ import annotations

from typing import Any

import torch
from apex.optimizers import FusedAdam
from torch import Tensor

from .optim import steps_by_group, steps_by_parameter


class _Verdict:
    """What FusedAdam asks of a gradient scaler: which update is bad, and the scale, which is 1."""

    def __init__(self, found_inf: Tensor):
        self.found_inf = found_inf.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.found_inf)


class ApexAdamW(FusedAdam):
    """Parameters on one GPU, in float32.  `found_inf` (a float32 scalar on the device), where set, skips the update where it is 1."""

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True, capturable=True)
        for group in self.param_groups:  # FusedAdam would count its first update even where that is bad
            group["step"] = torch.zeros(1, dtype=torch.int32, device=group["params"][0].device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    def step(self, closure: Any = None) -> Any:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros(1, device=self.param_groups[0]["params"][0].device)
        # FusedAdam counts a step by what this says before it asks the scaler: of the update before, unless it is told now.
        self._dummy_overflow_buf.copy_(found_inf.reshape(1))
        return super().step(closure, grad_scaler=_Verdict(found_inf))

    def state_dict(self) -> dict[str, Any]:
        return steps_by_parameter(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(steps_by_group(state_dict))
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"]))
            group["step"] = group["step"].to(rate.device)
