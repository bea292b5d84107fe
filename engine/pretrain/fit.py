"""The small training loop that the parts of a miniature world share: `lm`, `vision` and `vpg`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, trainable_tensors, write_json
from ..optim import build_adamw, clip_, learning_rate, set_learning_rate
from ..recipe import PretrainSchedule
from ..runlog import RunLog, console
from ..runtime import Runtime


def fit(
    module: nn.Module,
    schedule: PretrainSchedule,
    loss_of: Callable[[np.random.Generator], dict[str, Tensor]],
    evaluate: Callable[[], dict[str, float]],
    *,
    folder: Path,
    seed: int,
    runtime: Runtime,
    label: str,
    log_every: int = 20,
) -> dict[str, float]:
    """Train `module` in place for `schedule.steps` updates and return the last evaluation.

    loss_of: draws its batch from the generator that it is given (seeded by (seed, step), so a resumed run sees the same batches) and
    returns scalar losses; their sum is minimised.  evaluate: scores on held-out data, with `loss` among them.  A killed run resumes.
    """
    tensors = trainable_tensors(module)
    optimizer = build_adamw(tensors.items(), schedule.optimizer)
    found, passed_over = latest_checkpoint(folder / "checkpoints")
    step, seconds = 0, 0.0
    if found:
        state = load_checkpoint(found, tensors, optimizer)
        step, seconds = int(state["step"]), float(state["seconds"])
        console.print(f"{label}: resumed at step {step} from {found}")
    log = RunLog(folder, enabled=runtime.is_main, resume_at=step if found else None)
    for line in passed_over:
        log.warn("checkpoint_passed_over", line)
    scores: dict[str, float] = {}
    while step < schedule.steps:
        started = time.perf_counter()
        set_learning_rate(
            optimizer,
            learning_rate(
                step + 1,
                schedule.steps,
                schedule.learning_rate,
                schedule="cosine",
                minimum=schedule.min_learning_rate,
                warmup=schedule.warmup_steps,
            ),
        )
        module.train()
        with runtime.autocast():
            losses = loss_of(np.random.default_rng((seed, step)))
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        clip_(list(tensors.values()), schedule.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.perf_counter() - started
        if step % log_every == 0 or step == schedule.steps:
            numbers = {name: value.item() for name, value in losses.items()}
            log.event("train", step=step, seconds=seconds, **numbers)
            rate = schedule.batch * step / seconds
            log.progress(label, step, schedule.steps, f"loss {total.item():.3f}  {rate:.0f}/s")
        if step % schedule.eval_every_steps == 0 or step == schedule.steps:
            module.eval()
            with torch.no_grad(), runtime.autocast():
                scores = evaluate()
            log.event("eval", step=step, seconds=seconds, **scores)
            save_checkpoint(
                folder / "checkpoints",
                step,
                tensors,
                optimizer,
                {"step": step, "seconds": seconds, "scores": scores},
                keep=1,
            )
    if not scores:  # resumed at the very end
        module.eval()
        with torch.no_grad():
            scores = evaluate()
    log.close()
    write_json(folder / "summary.json", {"kind": label, "steps": step, "seconds": seconds, **scores})
    return scores
