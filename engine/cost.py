"""What a run costs while it runs: seconds by component, tokens a second, share of the measured peak, device-hours so far and to go.

Time is cut into laps: `lap(part)` charges what has passed since the last one to `part`, so that the parts add up to the run.  On the CPU a lap
reads the clock.  On a GPU it records an event in the stream, which is read in the log branch, after that branch's own wait: the parts are then
times of the device, idle moments included, and nothing waits for it in between.

FLOPs are those of the plain formulation (torch's own operations, no kernels), forward and backward, counted once a stage by running one
micro-batch on the meta device, and scaled by the images, tokens and targets that were computed: padding counts (`computed_tokens_per_s` against
`tokens_per_s` tells how much), and so does every query and key of a row, seen or not.  They are set against a product of large matrices, measured
at the start, over the time of updates alone: `flop_utilisation`.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .data.features import Computed
from .data.packing import Batch, Group, PackedBatch, TokenisedCaptions
from .models.tower import VisionTower
from .models.vlm import VisionLanguageModel
from .recipe import Stage, TransferData
from .runtime import Runtime

if TYPE_CHECKING:
    from .data.pair_batches import PairBatch

START_UP, WAITING, TOWER, PROMPTS, LANGUAGE_MODEL, BACKWARD, REDUCTION, OPTIMISER, EVALUATION, CHECKPOINTS, OTHER = PARTS = (
    "start-up", "waiting for data", "vision tower", "VPG and projector", "language model, forward", "backward", "gradient reduction",
    "optimiser", "evaluation", "checkpoints", "other",
)  # fmt: skip
TRAINING = (WAITING, TOWER, PROMPTS, LANGUAGE_MODEL, BACKWARD, REDUCTION, OPTIMISER)
PEAK_SECONDS_CPU = 0.2
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
COUNTED_IMAGES = 64  # at most, of the micro-batch whose FLOPs are counted


@dataclass(frozen=True)
class WorkRates:
    """FLOPs, forward and backward, of one encoding by the tower, of one image's VPG and projector, of one computed token of the language model,
    of one supervised position at its head; of one image's projector alone; of an average pair, without what caches spare (a vision cache is full,
    a prompt cache is none); of one image's frozen VPG where its prompts are stored, which `image` leaves out then."""

    encoding: float
    image: float
    token: float
    target: float
    projector: float = 0.0
    pair: float = 0.0
    prompt: float = 0.0


@dataclass
class Work:
    """What was computed: images, those of them that the tower encoded and whose prompts a frozen VPG made for a store, tokens (`used` of them hold
    something), supervised positions."""

    images: int = 0
    encodings: int = 0
    prompts: int = 0
    tokens: int = 0
    used: int = 0
    targets: int = 0

    def add(self, batch: Batch, queries: int, computed: Computed) -> None:
        used, tokens = token_counts(batch, queries)
        self.images += len(batch.groups)
        self.encodings += computed.encodings
        self.prompts += computed.prompts
        self.tokens += tokens
        self.used += used
        self.targets += batch.target_count

    def flops(self, rates: WorkRates) -> float:
        of_images = self.encodings * rates.encoding + self.prompts * rates.prompt + self.images * rates.image
        return of_images + self.tokens * rates.token + self.targets * rates.target


def token_counts(batch: Batch, queries: int) -> tuple[int, int]:
    """(tokens that hold something, tokens computed) of a micro-batch on the host, visual ones included."""
    if isinstance(batch, PackedBatch):
        # Padding alone sees an empty span of text (packing.py).
        return int((batch.segments[..., 2] < batch.segments[..., 3]).sum()), batch.ids.numel()
    pairs: PairBatch = batch  # type: ignore[assignment]
    visual = pairs.pair_count * queries
    used = visual + int(pairs.encoder_mask.sum()) + pairs.target_count
    return used, visual + pairs.encoder_ids.numel() + pairs.decoder_ids.numel()


class _FlopCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # "is nothing masked?", which weightless tensors cannot answer: then the mask counts
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def work_rates(
    model: VisionLanguageModel, tower: VisionTower, stage: Stage, data: TokenisedCaptions, layout: TransferData
) -> WorkRates:
    """The FLOPs of a stage, counted on copies without weights; before kernels, sharding or compilation change the model.

    The Q-Former's are those with keys and values formed: latents are a way to compute less.  Leaves the model frozen as the stage has it; draws
    no random number.
    """
    model.freeze_for(stage.trains, stage.frozen_dropout)
    batch = first_batch(model, data, layout)
    work = Work()
    work.add(batch, model.queries, Computed(0 if layout.vision_cache else len(batch.groups)))
    meta = torch.device("meta")
    dtype = next(model.llm.parameters()).dtype
    with _FlopCount() as encoding:
        pixels = torch.empty(1, 3, tower.image_size, tower.image_size, device=meta)
        _on_meta(tower, {}).float().features(pixels)
    bare = _on_meta(model, {id(model.llm.tokenizer): model.llm.tokenizer})
    with _FlopCount() as image:
        prompts = bare.soft_prompts(torch.empty(work.images, tower.tokens, tower.width, device=meta))
        prompts.sum().backward()
    with _FlopCount() as text:
        prompts = torch.empty_like(prompts, dtype=dtype).requires_grad_()
        bare.llm.loss_sum(prompts, batch.to(meta)).backward()
    head = 4 * model.llm.model.get_output_embeddings().weight.numel()  # one product forward, one backward
    rates = WorkRates(
        float(encoding.flops), image.flops / work.images, (text.flops - work.targets * head) / work.tokens, float(head)
    )
    projector = model.queries * model.projector.weight.numel() * (6 if stage.trains == "vpg_and_projector" else 4)
    return replace(rates, projector=float(projector), pair=work.flops(rates) / batch.pair_count)


def first_batch(model: VisionLanguageModel, data: TokenisedCaptions, layout: TransferData) -> Batch:
    """The micro-batch whose FLOPs are counted: of the first images, with as many captions as an update has of them."""
    limit = None if layout.captions_per_image == "all" else int(layout.captions_per_image)
    images = range(min(COUNTED_IMAGES, len(data.ids)))
    groups = [Group(i, 0, tuple(range(min(data.counts[i], limit or data.counts[i])))) for i in images]
    return model.pack(groups, data, layout)[0]


def _on_meta(module: nn.Module, kept: dict[int, Any]) -> Any:
    """A copy on the meta device; `kept`: what is shared with the original instead, by id."""
    copied = dict(kept)
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        copied[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, copied)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices, the best of those that fit into a fraction of a second; waits for the device."""
    side = PEAK_SIDE[device.type]
    # Random: on a GPU a product of equal numbers draws less power and runs faster than any that a model has.
    a = torch.randn(side, side, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    best, until = float("inf"), time.perf_counter() + PEAK_SECONDS_CPU
    runs = 0
    while runs < 3 or (device.type == "cpu" and time.perf_counter() < until):
        best, runs = min(best, _product_seconds(a)), runs + 1
    return 2.0 * side**3 / best


def _product_seconds(a: Tensor) -> float:
    if a.device.type == "cpu":
        before = time.perf_counter()
        a @ a
        return time.perf_counter() - before
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    products = 5
    first.record()
    for _ in range(products):
        a @ a
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / products


class CostMeter:
    """The clock of a run, and what it has computed."""

    def __init__(self, runtime: Runtime, seconds: dict[str, float] | None = None) -> None:
        """seconds: by part, of the run before it was resumed; the dictionary is filled from here on, and a checkpoint keeps it."""
        self.runtime = runtime
        self.seconds = {} if seconds is None else seconds
        self.rates: dict[str, WorkRates] = {}  # by stage
        self.peak_flops_s = 0.0
        self.stage_pairs: dict[str, int] = {}
        self._on_gpu = runtime.device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._last_event = self._recorded() if self._on_gpu else None
        self._last = time.perf_counter()
        self._read: dict[str, float] = dict(self.seconds)
        self._since_log = Work()
        self._stage_began = "", 0, 0.0  # name, pairs of it that were done, seconds of training before
        self._stage_flops = 0.0  # since then, of all ranks

    def _recorded(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        """Charge the time since the last lap to `part`; waits for nothing."""
        if self._on_gpu:
            self._events.append((part, self._recorded()))
            return
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def prompts_made(self) -> None:
        """A lap between soft prompts and language model, in training only."""
        if torch.is_grad_enabled():
            self.lap(PROMPTS)

    def count(self, batch: Batch, queries: int, computed: Computed) -> None:
        """Note a micro-batch that is still on the host, and what was computed of its images."""
        self._since_log.add(batch, queries, computed)

    def begin_stage(self, name: str, done_pairs: int, seconds: float, prompts_are_stored: bool = False) -> None:
        """done_pairs: of the stage.  seconds: of training so far, as `gpu_hours` counts them.  prompts_are_stored: the VPG counts for those images
        alone that it runs for."""
        if prompts_are_stored:
            rates = self.rates[name]
            self.rates[name] = replace(rates, image=rates.projector, prompt=rates.image - rates.projector)
        self._stage_began = name, done_pairs, seconds
        self._stage_flops = 0.0
        self.lap(OTHER)
        self.settle()
        self._read, self._since_log = dict(self.seconds), Work()  # a stage that ended early has left some

    def settle(self) -> None:
        """Read the events; waits for the device only where nobody has since the last lap."""
        if not self._events:
            return
        self._events[-1][1].synchronize()
        for part, event in self._events:
            self.seconds[part] = self.seconds.get(part, 0.0) + self._last_event.elapsed_time(event) / 1e3
            self._spare.append(self._last_event)
            self._last_event = event
        self._events.clear()

    def live(self, done_pairs: int, seconds: float) -> dict[str, float]:
        """More fields of a `train` event, on the time since the last one; every rank calls it, after it has waited for the device.

        Tokens and FLOPs are of all ranks; `waiting_share` and `flop_utilisation` are means over the ranks.
        """
        self.settle()
        spent = {part: self.seconds.get(part, 0.0) - self._read.get(part, 0.0) for part in TRAINING}
        self._read = dict(self.seconds)
        work, self._since_log = self._since_log, Work()
        flops = work.flops(self.rates[self._stage_began[0]])
        sums = torch.tensor([work.used, work.tokens, flops, spent[WAITING], sum(spent.values())], dtype=torch.float64)
        world = self.runtime.world_size
        if world > 1:
            sums = self.runtime.sum_(sums.to(self.runtime.device)).cpu()
        used, tokens, flops, waited_s, device_s = sums.tolist()
        self._stage_flops += flops
        device_s = max(device_s, 1e-9)
        return {
            "tokens_per_s": used * world / device_s,
            "computed_tokens_per_s": tokens * world / device_s,
            "waiting_share": waited_s / device_s,
            "flop_utilisation": flops / device_s / self.peak_flops_s,
            "gpu_hours_to_go": self.seconds_to_go(done_pairs, seconds) * world / 3600,
        }

    def seconds_to_go(self, done_pairs: int, seconds: float) -> float:
        """Of training until the end of the last stage: at this stage's mean pace, the others' by their FLOPs a pair.

        A stage that fills a cache gets quicker, so that the estimate for its own rest comes down.
        """
        name, before_pairs, before_s = self._stage_began
        done = max(1, done_pairs - before_pairs)
        pace_s, a_pair = (seconds - before_s) / done, self._stage_flops / done or self.rates[name].pair
        names = list(self.stage_pairs)
        later = names[names.index(name) + 1 :]
        pairs = self.stage_pairs[name] - done_pairs
        pairs += sum(self.stage_pairs[n] * self.rates[n].pair / a_pair for n in later)
        return pace_s * pairs

    def breakdown(self) -> dict[str, dict[str, float]]:
        """{part: {"seconds", "share"}} of everything so far, of this rank; parts without a lap are left out."""
        self.settle()
        total = max(sum(self.seconds.values()), 1e-9)
        return {p: {"seconds": self.seconds[p], "share": self.seconds[p] / total} for p in PARTS if p in self.seconds}


def cost_table(breakdown: dict[str, dict[str, float]], devices: int) -> Table:
    """What `CostMeter.breakdown` returned, for the screen."""
    table = Table(title="where the time went", title_justify="left")
    for column in ("part", "seconds", "share", "device-hours"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, entry in breakdown.items():
        seconds = entry["seconds"]
        table.add_row(part, f"{seconds:,.1f}", f"{entry['share']:.1%}", f"{seconds * devices / 3600:.4f}")
    total = sum(entry["seconds"] for entry in breakdown.values())
    table.add_section()
    table.add_row("together", f"{total:,.1f}", "", f"{total * devices / 3600:.4f}")
    return table
