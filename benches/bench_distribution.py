"""What the engine's loop on several processes costs beside a plain one, and the bytes that it really sends beside the plan's formulas.

Times. Every arm trains the same recipe (a LLaMA, a ViT and a Q-Former with random weights, on generated scenes) from the same stream of
micro-batches, with the same AdamW step, on N processes of one thread each:

    plain                     a bare loop: forward and backward of each micro-batch, one all-reduce of all gradients, copied into one tensor, after
                              the last; the step. No meter, no guards, no log
    engine                    the engine's loop, nothing sharded, without guards: gradients are summed bucket by bucket during the last backward pass
    guards                    the same with heartbeats (20 times as often as by default), exchange of flags and loss spikes
    frozen sharded            the engine's loop with distribution.frozen=sharded
    optimizer sharded         with distribution.optimizer=sharded
    saves in background       with a checkpoint every 3 updates, written by a thread
    saves in line             written before the next update begins

An arm's time is the mean over 6 updates after one that does not count, that of the slowest rank; one chunk of each arm follows the other, and ratios
are those to the plain chunk of the same round; medians over rounds. CPU s is the processor time of all ranks together, steadier where cores are
shared. A save's cost is for 3 updates' worth of difference to "engine". Communication weighs more here than at full size: the model is small, and
trainable parameters are many beside its FLOPs.

Bytes. On 2 and on 4 processes: payloads handed to torch.distributed in each update, and what went through the loopback interface, against
`engine/planning/communication.py`. Where the system lets it, processes run in a network namespace of their own (Linux, root), where nobody sends;
else what others sent in a second before is named as noise.

    python benches/bench_distribution.py [--repeats N] [--ranks N] [--device cpu|cuda] [--part times|bytes] [--out FILE]

--device cuda asks for as many GPUs as ranks, and NCCL; loopback bytes are not counted there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from payloads import count_payloads, loopback_bytes
from timing import about
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vpgtrans.engine import loop, prepare
from vpgtrans.engine.checkpoint import CheckpointWriter, trainable_tensors
from vpgtrans.engine.data.dealing import group_tokens
from vpgtrans.engine.data.stream import UpdateStream
from vpgtrans.engine.distributed.sharded_adamw import ShardedAdamW
from vpgtrans.engine.dry_run import Plan, make_plan
from vpgtrans.engine.guards import Guard
from vpgtrans.engine.notice import Notice
from vpgtrans.engine.optim import build_adamw, take_step
from vpgtrans.engine.planning.communication import traffic
from vpgtrans.engine.planning.devices import find_device
from vpgtrans.engine.planning.layout import frozen_blocks
from vpgtrans.engine.recipe import Stage, TransferRecipe, load_recipe
from vpgtrans.engine.resume import Progress
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import Runtime, start, stop
from vpgtrans.engine.stage_data import update_lengths, update_order
from vpgtrans.engine.tiny_world import tiny_recipe, write_tiny_world, write_tower

UPDATES, SAVE_EVERY = 6, 3
CLONE_NEWNET = 0x40000000  # unshare(2)
BATCH_PAIRS = 32
TOWER = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
    "hidden_act": "gelu",
}  # fmt: skip
QFORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_query_tokens": 16,
}
LLAMA = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What is on in an arm; saves: "background" or "in line"."""

    name: str
    frozen: str = "replicated"
    optimizer: str = "replicated"
    guards: bool = False
    saves: str | None = None


PLAIN = Arm("plain")
ARMS = (
    PLAIN,
    Arm("engine"),
    Arm("guards", guards=True),
    Arm("frozen sharded", frozen="sharded"),
    Arm("optimizer sharded", optimizer="sharded"),
    Arm("saves in background", saves="background"),
    Arm("saves in line", saves="in line"),
)
SENDING = (ARMS[1], *ARMS[3:5])


class Enough(Exception):
    """Ends the engine's loop after the updates that were asked for."""


class Clock:
    """In the place of the loop's guard, which it asks where there is one: marks the end of the first update and that of the last."""

    def __init__(
        self, runtime: Runtime, updates: int, folder: Path, arm: Arm, guard: Guard | None, sends: Counter[str]
    ):
        self.runtime, self.updates, self.guard, self.sends = runtime, updates, guard, sends
        # Another folder for each, so that none pays for the removal of another's.
        self.writer = CheckpointWriter(folder / arm.name.replace(" ", "-"), 2, arm.saves == "background")
        self.marks: list[tuple[float, float, int | None]] = []
        self.payloads: list[Counter[str]] = []
        self.done = 0

    def at(self, *arguments: Any, **settings: Any) -> None:
        if self.guard:
            self.guard.at(*arguments, **settings)

    def attempt(self, save: Callable[[], None]) -> None:
        save()

    def record(self, *arguments: Any) -> None:
        if self.guard:
            self.guard.record(*arguments)

    def inspect(self, *arguments: Any) -> None:
        if self.guard:
            self.guard.inspect(*arguments)

    def after_update(self, save: Any) -> None:
        if self.guard:
            self.guard.after_update(save)
        self.done += 1
        self.payloads.append(Counter(self.sends))
        self.sends.clear()
        if self.done == 1:
            self._mark()
        elif self.done > self.updates:
            self.writer.finish()
            self._mark()
            raise Enough

    def _mark(self) -> None:
        self.runtime.wait()
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        sent = loopback_bytes() if self.runtime.device.type == "cpu" else None
        self.marks.append((time.perf_counter(), time.process_time(), sent))
        self.runtime.wait()
        self.sends.clear()


class Bench:
    """One rank: the parts of both layouts, and chunks of updates of each arm."""

    def __init__(self, runtime: Runtime, recipe: TransferRecipe, folder: Path):
        self.runtime, self.folder = runtime, folder
        self.sends: Counter[str] = Counter()
        self.runs = {}
        for frozen in ("replicated", "sharded"):
            chosen = recipe.distribution.model_copy(update={"frozen": frozen})
            own = recipe.model_copy(update={"distribution": chosen})
            torch.manual_seed(recipe.seed)
            log = RunLog(folder / f"run-{frozen}", enabled=False)
            self.runs[frozen] = this = prepare.prepare(own, runtime, log, Progress())
            this.meter.stage_pairs = {stage.name: stage.pairs for stage in own.stages}

    def chunk(self, arm: Arm, updates: int) -> Clock:
        """Train; the clock has the marks.  What an arm leaves behind in weights is no matter: the learning rate is next to 0."""
        this = self.runs[arm.frozen]
        this.progress, stage = Progress(), this.recipe.stages[0]
        this.model.freeze_for(stage.trains, stage.frozen_dropout)
        tensors = trainable_tensors(this.model)
        optimizer = build_adamw(tensors.items(), stage.optimizer)
        if arm.optimizer == "sharded":
            optimizer = ShardedAdamW(optimizer, self.runtime)
        recipe = this.recipe
        every = SAVE_EVERY * stage.batch_pairs if arm.saves else None
        output = recipe.output.model_copy(update={"checkpoint_every_pairs": every, "folder": self.folder / "guarded"})
        this.recipe = recipe.model_copy(update={"output": output})
        guard = Guard(this.recipe, self.runtime, Notice()) if arm.guards else None
        this.guard = clock = Clock(self.runtime, updates, self.folder, arm, guard, self.sends)
        train = plain_loop if arm is PLAIN else loop._loop
        try:
            order = update_order(this, stage)
            train(this, 0, stage, order, optimizer, tensors, (updates + 2) * stage.batch_pairs)
        except Enough:
            pass
        finally:
            this.recipe = recipe
            if guard:
                guard.close()
        return clock

    def times(self, repeats: int) -> dict[str, dict[str, Any]]:
        """Of each arm: seconds of an update by the clock and of processor time, medians of rounds, and the ratios to plain."""
        rounds: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in ARMS}
        for _ in range(repeats):
            for arm in ARMS:
                (began, cpu_began, _), (ended, cpu_ended, _) = self.chunk(arm, UPDATES).marks
                found = self.runtime.gather(((ended - began) / UPDATES, (cpu_ended - cpu_began) / UPDATES))
                rounds[arm.name].append((max(f[0] for f in found), sum(f[1] for f in found)))
        rows = {}
        for arm in ARMS:
            own, plain, engine = rounds[arm.name], rounds[PLAIN.name], rounds[ARMS[1].name]
            row: dict[str, Any] = {"rounds": own}
            for at, name in enumerate(("step_s", "cpu_s")):
                ratios = [o[at] / p[at] for o, p in zip(own, plain, strict=True)]
                row |= {name: statistics.median(o[at] for o in own), f"times_plain_{name}": statistics.median(ratios)}
                row |= {f"least_{name}": min(ratios), f"most_{name}": max(ratios)}
                if arm.saves:
                    row[f"save_{name}"] = SAVE_EVERY * statistics.median(
                        o[at] - e[at] for o, e in zip(own, engine, strict=True)
                    )
            rows[arm.name] = row
        return rows

    def bytes_sent(self, updates: int) -> dict[str, dict[str, Any]]:
        """Of each layout: bytes of one rank in one update by the formulas and as payloads, and of all ranks on the loopback interface."""
        rows, accumulate = {}, loop._accumulate
        self.sends, plan = count_payloads(), make_plan(self.runs["replicated"].recipe)
        for arm in SENDING:
            micro_batches: list[int] = []
            loop._accumulate = counting_micro_batches(accumulate, micro_batches)
            clock = self.chunk(arm, updates)
            counted = micro_batches[1 : updates + 1]
            formula = expected(plan, arm, counted, self.runtime.world_size)
            payloads = sum(clock.payloads[1:], Counter())
            (_, _, before), (_, _, after) = clock.marks
            share = (self.runtime.world_size - 1) / self.runtime.world_size
            sent = 2 * share * payloads["all_reduce"] + share * (payloads["all_gather"] + payloads["weights"])
            reckoned = formula["reduced"] + formula["gathered"]
            through = None if before is None or after is None else (after - before) / updates
            rows[arm.name] = {
                "micro_batches": counted, "payloads": {k: v / updates for k, v in payloads.items()}, "formula": formula,
                "sent_by_payloads": sent / updates, "payloads_over_formula": sent / updates / reckoned,
                "loopback_bytes": through, "loopback_over_formula": through and through / (self.runtime.world_size * reckoned),
            }  # fmt: skip
        return rows


def counting_micro_batches(accumulate: Callable[..., Tensor], found: list[int]) -> Callable[..., Tensor]:
    """`loop._accumulate` that appends this rank's number of micro-batches of each update to `found`."""

    def call(this: Any, update: Any, *rest: Any) -> Tensor:
        found.append(update.own_batches)
        return accumulate(this, update, *rest)

    return call


def expected(plan: Plan, arm: Arm, micro_batches: list[int], ranks: int) -> dict[str, float]:
    """Bytes that the plan says a rank sends in an average update, those with so many micro-batches on each."""
    device, costs, found = find_device("h200", torch.bfloat16), plan.stages[0].costs, []
    for own in micro_batches:
        dealt = replace(costs, workload=replace(costs.workload, micro_batches=own * ranks))
        layout = "world" if arm.frozen == "sharded" else "replicated"
        seconds = dict.fromkeys(costs.update, 1.0)
        found.append(traffic(dealt, seconds, frozen_blocks(plan), device, ranks, layout, optimizer=arm.optimizer))
    return {
        "reduced": statistics.mean(f.reduced_bytes for f in found), "gathered": statistics.mean(f.gathered_bytes for f in found)
    }  # fmt: skip


def plain_loop(this: prepare.Run, _index: int, stage: Stage, order: Any, optimizer: Any, tensors: dict[str, Tensor], total: int) -> None:  # fmt: skip
    """What a careful engineer would write first, over the engine's stream of micro-batches."""
    runtime, data, parameters = this.runtime, this.recipe.data, list(tensors.values())
    stream = UpdateStream(
        order, update_lengths(0, total, stage.batch_pairs),
        lambda groups: this.model.pack(
            groups, this.data, data, fixed_shape=runtime.device.type == "cuda", split_seed=this.recipe.seed
        ),
        this.features, rank=runtime.rank, world_size=runtime.world_size, depth=data.prefetch_batches,
        tokens=lambda g: group_tokens(g, this.data, this.model.queries, not this.model.llm.is_encoder_decoder),
    )  # fmt: skip
    with contextlib.closing(stream):
        for update, batches in stream:
            loss_sum = torch.zeros(1, device=runtime.device)
            for batch, prepared in batches:
                features = this.features.finish(prepared)
                with runtime.autocast():
                    loss = this.model.loss_sum(features, batch.to(runtime.device)) / update.targets
                loss.backward()
                loss_sum += loss.detach()
            gradients = [p.grad for p in parameters if p.grad is not None] + [loss_sum]
            flat = _flatten_dense_tensors(gradients)
            if runtime.world_size > 1:
                dist.all_reduce(flat)
            for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(summed)
            take_step(optimizer, stage.optimizer.clip_norm, loss_sum[0], this.fuses_adamw)
            optimizer.zero_grad(set_to_none=True)
            this.guard.after_update(None)


def write_recipe(root: Path, device: str) -> Path:
    """The world, the parts and the recipe of every arm."""
    write_tiny_world(root, train=96)
    tokenizer = AutoTokenizer.from_pretrained(root / "lm_target")
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA)).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    write_tower(root / "vit", TOWER)
    values = tiny_recipe(root, root / "run")
    values |= {
        "device": device, "source": {}, "initialise": {"vpg": "random", "projector": "random"}, "target": {"llm": str(root / "llm")},
        "vision": {"kind": "eva_vit", "path": str(root / "vit"), "image_size": TOWER["image_size"]}, "qformer": QFORMER,
        "guards": {"heartbeat_s": 0.25, "timeout_s": 60},
    }  # fmt: skip
    values["data"] |= {"row_tokens": 128, "rows_per_micro_batch": 2, "transform": "eval", "captions_per_image": "all"}
    # Not 0, which the recipe refuses, and too small to change anything.
    stage = {
        "name": "direct",
        "trains": "vpg_and_projector",
        "learning_rate": 1e-12,
        "pairs": 10**6,
        "batch_pairs": BATCH_PAIRS,
    }
    values["stages"] = [stage]
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rank_main(recipe_path: Path, what: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """What each rank does: its share of "times" and "bytes"."""
    recipe = load_recipe(recipe_path)
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed, 120.0)
    try:
        bench = Bench(runtime, recipe, recipe_path.parent)
        found: dict[str, Any] = {"ranks": runtime.world_size}
        if "times" in what:
            found |= {"repeats": repeats, "arms": bench.times(repeats)}
        if "bytes" in what:
            found |= {"noise_bytes_s": quiet_bytes_a_second(), "layouts": bench.bytes_sent(2)}
        return found
    finally:
        stop()


def quiet_bytes_a_second() -> int | None:
    """What others send through `lo` while this process does nothing."""
    before = loopback_bytes()
    time.sleep(1.0)
    after = loopback_bytes()
    return None if before is None or after is None else after - before


def launch(recipe: Path, what: tuple[str, ...], ranks: int, repeats: int, device: str) -> dict[str, Any]:
    """Do `what` on so many processes, forked because imports take longer than a round; exits where one of them fails."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    launcher = context.Process(target=_launch, args=(answers, recipe, what, ranks, repeats, device))
    launcher.start()
    launcher.join()
    if launcher.exitcode:
        sys.exit(f"{' and '.join(what)} on {ranks} processes: one of them failed, see above")
    return answers.get()


def _launch(answers: Any, recipe: Path, what: tuple[str, ...], ranks: int, repeats: int, device: str) -> None:
    """Between the bench and its ranks: a process whose network the ranks share."""
    is_alone = device == "cpu" and leave_network()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    if device == "cpu":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        found = rank_main(recipe, what, repeats)
        if rank == 0:
            answers.put({**found, "own_network_namespace": is_alone})

    context = multiprocessing.get_context("fork")
    running = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in running:
        process.start()
    while running:
        multiprocessing.connection.wait([p.sentinel for p in running])
        if any(p.exitcode for p in running):  # the others would wait for it
            for process in running:
                process.terminate()
            sys.exit(1)
        running = [p for p in running if p.exitcode is None]


def leave_network() -> bool:
    """Move this process into a network namespace of its own with nothing but a loopback interface; False where the system does not let it."""
    if not shutil.which("ip") or ctypes.CDLL(None).unshare(CLONE_NEWNET):
        return False
    return subprocess.run(["ip", "link", "set", "lo", "up"], check=False).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def print_times(found: dict[str, Any]) -> None:
    if "arms" not in found:
        return
    print(
        f"{found['ranks']} processes of one thread, medians of {found['repeats']} rounds of {UPDATES} updates an arm; ratios to plain (least-most)"
    )
    print(f"{'':22} {'step s':>8} {'ratio':>22} {'CPU s':>8} {'ratio':>22} {'a save, s':>10} {'CPU s':>7}")
    for name, row in found["arms"].items():
        ratios = [f"{row['times_plain_' + k]:.3f} ({row['least_' + k]:.3f}-{row['most_' + k]:.3f})" for k in ("step_s", "cpu_s")]  # fmt: skip
        save = f"{row['save_step_s']:10.3f} {row['save_cpu_s']:7.3f}" if "save_step_s" in row else ""
        print(f"{name:22} {row['step_s']:8.3f} {ratios[0]:>22} {row['cpu_s']:8.3f} {ratios[1]:>22} {save}")


def print_bytes(found: dict[str, Any]) -> None:
    if "layouts" not in found:
        return
    ranks = found["ranks"]
    noise = f"{found['noise_bytes_s']} bytes/s of others' on lo before"
    where = "in a network namespace of their own" if found["own_network_namespace"] else noise
    print(f"\n{ranks} processes, MB of a rank in an update, sent in reductions and gathers; {where}")
    print(f"{'':22} {'formula':>10} {'payloads':>10} {'over it':>8} {'loopback':>10} {'over it':>8}")
    for name, row in found["layouts"].items():
        reckoned = sum(row["formula"].values())
        line = f"{name:22} {reckoned / 1e6:10.3f} {row['sent_by_payloads'] / 1e6:10.3f} {row['payloads_over_formula']:8.4f}"
        if row["loopback_bytes"] is not None:
            line += f" {row['loopback_bytes'] / ranks / 1e6:10.3f} {row['loopback_over_formula']:8.4f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of the times; default: %(default)s")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=("times", "bytes"), help="default: both")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")
    options = parser.parse_args()
    if options.repeats < 1 or options.ranks < 2:
        parser.error(f"--repeats, --ranks: expected at least 1 and 2, got {options.repeats} and {options.ranks}")
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        parser.error(f"--device: expected {options.ranks} GPUs, torch sees {torch.cuda.device_count()}; lower --ranks")
    torch.set_num_threads(1)  # before anything computes: processes are forked
    what = (options.part,) if options.part else ("times", "bytes")
    found = about("distribution", options.device, cores=os.cpu_count(), load_before=os.getloadavg())
    sizes = {"llama": LLAMA, "tower": TOWER, "qformer": QFORMER, "batch_pairs": BATCH_PAIRS}
    with tempfile.TemporaryDirectory(prefix="bench_distribution-") as folder:
        recipe = write_recipe(Path(folder), options.device)
        run = functools.partial(launch, recipe, repeats=options.repeats, device=options.device)
        found["runs"] = [run(what, options.ranks)]
        # On the CPU bytes are counted on four processes too.
        if "bytes" in what and options.device == "cpu" and options.ranks != 4:
            found["runs"].append(run(("bytes",), 4))
    for of_run in found["runs"]:
        print_times(of_run)
        print_bytes(of_run)
    found |= {"load_after": os.getloadavg(), "sizes": sizes}
    print(f"load: {found['load_before'][0]:.1f} before, {found['load_after'][0]:.1f} after, on {found['cores']} cores")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
