"""One rank of a run in a process of its own, for tests: environment, output and faults first, then engine/train.py's main.

Run by runpy from a fork server that has already imported torch, with these globals: ENVIRONMENT, LOG, ARGUMENTS, FAULT.
"""

from __future__ import annotations

import os
import sys


def make_fault(name: str) -> None:
    """`nan-at-3`: this rank's third loss is not a number."""
    from vpgtrans.engine.models.vlm import VisionLanguageModel

    real, at, calls = VisionLanguageModel.loss_sum, int(name.rpartition("-")[2]), []

    def loss_sum(self, *arguments):
        loss = real(self, *arguments)
        if self.projector.training:
            calls.append(1)
        return loss * float("nan") if loss.requires_grad and len(calls) == at else loss

    VisionLanguageModel.loss_sum = loss_sum


if __name__ == "worker":
    given = globals()
    os.environ.update(given["ENVIRONMENT"])
    descriptor = os.open(given["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if given["FAULT"]:
        make_fault(given["FAULT"])
    from vpgtrans.engine.train import main

    sys.exit(main(given["ARGUMENTS"]))
