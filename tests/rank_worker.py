"""One rank of a run in a process of its own, for tests: environment, output and faults first, then engine/train.py's main.

Run by runpy from a fork server that has already imported torch, with these globals: ENVIRONMENT, LOG, ARGUMENTS, FAULT.
"""

from __future__ import annotations

import os
import sys


def make_fault(name: str) -> None:
    """What is wrong with this rank:

    nan-at-3            its third loss is not a number
    killed-in-eval-4    it is noticed in its fourth evaluation, and killed there when it has saved what it saves
    other-projector     it begins with other values
    other-captions      its captions score as if it alone got better
    full-disk           its disk has no room for checkpoints from update 4 on
    full-disk-at-best   nor for the best model
    """
    from vpgtrans.engine.models.vlm import VisionLanguageModel

    if name == "other-projector":
        return begin_elsewhere()
    if name == "other-captions":
        return score_better()
    if name.startswith("full-disk"):
        return have_no_room("best" in name)
    if name.startswith("killed-in-eval"):
        return be_killed(int(name.rpartition("-")[2]))

    real, at, calls = VisionLanguageModel.loss_sum, int(name.rpartition("-")[2]), []

    def loss_sum(self, *arguments):
        loss = real(self, *arguments)
        if self.projector.training:
            calls.append(1)
        return loss * float("nan") if loss.requires_grad and len(calls) == at else loss

    VisionLanguageModel.loss_sum = loss_sum


def be_killed(at: int) -> None:
    import signal
    import threading

    from vpgtrans.engine.evaluation import Validator

    real, calls = Validator.loss, []

    def loss(self, model):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            os._exit(9)
        return real(self, model)

    Validator.loss = loss


def begin_elsewhere() -> None:
    from vpgtrans.engine import prepare

    real = prepare.build_model

    def build_model(*arguments):
        model, origins = real(*arguments)
        model.projector.weight.data.mul_(1.001)
        return model, origins

    prepare.build_model = build_model


def have_no_room(at_best: bool) -> None:
    import re

    from safetensors import SafetensorError

    from vpgtrans.engine import checkpoint
    from vpgtrans.engine.models import vpg

    real = checkpoint.save_file

    def save_file(tensors, path):
        step = re.search(r"step-(\d+)", str(path))
        if int(step[1]) >= 4 if step else at_best:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    checkpoint.save_file = vpg.save_file = save_file


def score_better() -> None:
    from vpgtrans.engine.evaluation import Validator

    real, calls = Validator.captions, []

    def captions(self, model):
        calls.append(1)
        scores, texts = real(self, model)
        return {**scores, "cider": float(len(calls))}, texts

    Validator.captions = captions


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
