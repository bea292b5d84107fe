"""What the engine's own code costs, found by running it on tensors without data: FLOPs, bytes moved, operations and bytes kept for backward.

Modules come on the meta device (dry_run.py) and run as torch's fake CPU tensors, forward and backward, so what is counted is what the code
does and not what a formula says of it.  Of a stack of equal blocks one and two are run and the rest is extrapolated; stacks of unequal
blocks are run whole.  Letters: G groups (images), N image tokens, Q queries, W width of a word embedding.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from ...kernels.frozen_linear import ALIGNMENT
from ..data.packing import Batch, PackedBatch
from ..models.causal import CausalLanguageModel, fold_input_projection
from ..models.llm import LanguageModel
from ..models.seq2seq import Seq2SeqLanguageModel
from ..models.tower import VisionTower
from ..models.vpg import VPG

aten = torch.ops.aten
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"  # torch's FLOP counter has no formula for it
_LOOK_UPS = {
    "embedding",
    "index",
    "index_select",
    "gather",
    "slice_backward",
    "select_backward",
    "nll_loss_forward",
    "nll_loss_backward",
}
_FREE = {
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view", "_reshape_alias",
    "is_same_size",
}  # fmt: skip


# Of elementwise operations and reductions, those that compute more than a sum or a product a value.
_FUNCTIONS = (
    "silu", "gelu", "sigmoid", "tanh", "exp", "pow", "rsqrt", "_softmax", "_log_softmax", "native_layer_norm", "native_dropout",
    "bernoulli", "where", "masked_fill",
)  # fmt: skip


Kind = Literal["product", "fp8", "attention", "function", "plain"]


class Operation(NamedTuple):
    """What decides an operation's time: its kind, its FLOPs, the bytes that it reads and writes; and whether it is of the backward pass."""

    kind: Kind
    flops: int
    moved: int
    backward: bool = False


@dataclass(frozen=True)
class Cost:
    """operations: how many of each; saved: bytes kept for the backward pass."""

    operations: dict[Operation, float]
    saved: float = 0.0

    @property
    def flops(self) -> float:
        return sum(n * o.flops for o, n in self.operations.items())

    @property
    def backward_flops(self) -> float:
        return sum(n * o.flops for o, n in self.operations.items() if o.backward)

    @property
    def moved_bytes(self) -> float:
        return sum(n * o.moved for o, n in self.operations.items())

    @property
    def count(self) -> float:
        return sum(self.operations.values())

    def __add__(self, other: Cost) -> Cost:
        both = dict(self.operations)
        for key, n in other.operations.items():
            both[key] = both.get(key, 0.0) + n
        return Cost(both, self.saved + other.saved)

    def __mul__(self, factor: float) -> Cost:
        return Cost({key: n * factor for key, n in self.operations.items()}, self.saved * factor)

    def resized(self, factor: float, constant: float = 0.0) -> Cost:
        """The same operations on `factor` times as much; constant: saved bytes that do not grow."""
        sizes: dict[Operation, float] = {}
        for o, n in self.operations.items():
            key = o._replace(flops=round(o.flops * factor), moved=round(o.moved * factor))
            sizes[key] = sizes.get(key, 0.0) + n
        return Cost(sizes, constant + (self.saved - constant) * factor)


NOTHING = Cost({})


@dataclass(frozen=True)
class Setting:
    """How the engine computes: dtype of the forward pass, whether on a GPU, whose autocast keeps LayerNorm in float32, and whether the frozen linears
    of tower and language model are in FP8 (kernels/quantise_frozen.py)."""

    compute_dtype: torch.dtype
    on_gpu: bool
    fp8: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.compute_dtype)


_KNOWN: dict[str, tuple[Cost, Cost]] = {}  # traces of this process: a plan asks for the same one again for every switch

_TARGETS: dict[str, int] = {}  # supervised positions of the micro-batch that was traced


def trace_tower(tower: VisionTower, images: int, setting: Setting) -> Cost:
    """The frozen tower's forward pass over `images` images; nothing is kept."""
    near = _near(images, setting)

    def run(part: VisionTower, _: Callable[[Tensor], Tensor]) -> None:
        pixels = torch.empty(near, 3, part.image_size, part.image_size, dtype=setting.compute_dtype)
        part.features(pixels)

    key = _key("tower", type(tower.module).__name__, tower, [near], setting)
    blocks, rest = _traced(tower, run, setting, key, setting.compute_dtype, fp8_but=0 if setting.fp8 else None)
    return (blocks + rest).resized(images / near)


def _near(images: int, setting: Setting) -> int:
    """For GPUs a power of two near the number of images, so that stages, recipes and switches share traces; their operations are large."""
    return 2 ** round(math.log2(images)) if setting.on_gpu else images


def cast_bytes(module: nn.Module, setting: Setting) -> int:
    """Of the copies of trained weights that autocast keeps through a micro-batch."""
    itemsize = setting.compute_dtype.itemsize
    trained = [m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    return itemsize * sum(trained) if itemsize < 4 else 0


def trace_vpg(vpg: VPG, projector: nn.Linear, images: int, image_tokens: int, setting: Setting) -> tuple[Cost, Cost]:
    """(VPG, projector) over `images` images, frozen and in the mode that the modules are in; backward as far as anything trains."""
    trains = any(p.requires_grad for p in vpg.parameters())
    width, queries = vpg.config.hidden_size, vpg.config.num_query_tokens
    near = _near(images, setting)

    def run(part: VPG, _: Callable[[Tensor], Tensor]) -> None:
        features = torch.empty(near, image_tokens, part.image_width, dtype=setting.compute_dtype)
        with setting.autocast():
            made = part(features)
        if trains:
            made.backward(torch.empty_like(made))

    def project(part: nn.Linear, _: Callable[[Tensor], Tensor]) -> None:
        prompts = torch.empty(near, queries, width).requires_grad_(trains)
        with setting.autocast():
            made = part(prompts)
        made.backward(torch.empty_like(made))

    shape = [near, image_tokens, trains, vpg.training, vpg.fuses_cross_attention]
    key = _key("vpg", vpg.config.model_dump_json(), vpg, shape, setting)
    blocks, rest = _traced(vpg, run, setting, key, None, every=vpg.config.cross_attention_frequency)
    key = _key("projector", "", projector, shape, setting)
    made = _traced(projector, project, setting, key, None)[1]
    factor = images / near
    return (blocks + rest).resized(factor, cast_bytes(vpg, setting)), made.resized(
        factor, cast_bytes(projector, setting)
    )


def trace_llm(model: PreTrainedModel, batch: Batch, queries: int, setting: Setting) -> tuple[Cost, Cost]:
    """(blocks, head with loss and embedding) of the frozen language model over one micro-batch: forward and the gradient of its inputs."""

    def run(part: PreTrainedModel, fake: Callable[[Tensor], Tensor]) -> None:
        adapter = without_tokenizer(part)
        width = int(part.config.hidden_size)
        prompts = torch.empty(len(batch.groups), queries, width, dtype=setting.compute_dtype).requires_grad_()
        with setting.autocast():
            loss = adapter.loss_sum(prompts, _moved(batch, fake))
        loss.backward()

    # Rows of one shape differ only in how many positions are supervised, which the head is in proportion to.
    if isinstance(batch, PackedBatch):
        shape = [list(batch.ids.shape)]
    else:
        shape = [(name, list(t.shape)) for name, t in vars(batch).items() if isinstance(t, Tensor)]
    key = _key("llm", json.dumps(model.config.to_diff_dict(), default=str), model, [*shape, queries], setting)
    fp8_but = model.config.vocab_size if setting.fp8 else None  # the head stays as it is
    blocks, head = _traced(model, run, setting, key, setting.compute_dtype, fp8_but=fp8_but)
    traced = _TARGETS.setdefault(key, batch.target_count)
    return blocks, head if traced == batch.target_count else head * (batch.target_count / traced)


def without_tokenizer(model: PreTrainedModel) -> LanguageModel:
    """The engine's adapter of a model, for its loss alone: sizes have no tokenizer."""
    kind = Seq2SeqLanguageModel if model.config.is_encoder_decoder else CausalLanguageModel
    adapter = kind.__new__(kind)
    nn.Module.__init__(adapter)
    adapter.model = model
    fold_input_projection(model)
    return adapter


def _moved(batch: Batch, fake: Callable[[Tensor], Tensor]) -> Any:
    return type(batch)(**{name: fake(v) if isinstance(v, Tensor) else v for name, v in vars(batch).items()})


def _key(kind: str, config: str, module: nn.Module, shape: list, setting: Setting) -> str:
    sizes = [list(p.shape) for p in module.parameters()]
    return json.dumps([kind, config, sizes, shape, str(setting.compute_dtype), setting.on_gpu, setting.fp8])


def _traced(
    module: nn.Module,
    run: Callable[[Any, Callable[[Tensor], Tensor]], None],
    setting: Setting,
    key: str,
    dtype: torch.dtype | None,
    every: int = 1,
    fp8_but: int | None = None,
) -> tuple[Cost, Cost]:
    """(blocks, rest) of `run`; dtype: that of all weights, None to keep each one's own; every: blocks in which the stack repeats; fp8_but: as in
    `_Recorder`."""
    if key not in _KNOWN:
        stacks = block_stacks(module)
        depth = _common_depth(stacks, every)
        if depth is None or depth <= 2 * every:
            _KNOWN[key] = NOTHING, _trace(module, stacks, None, run, setting, dtype, fp8_but)
        else:
            first = _trace(module, stacks, every, run, setting, dtype, fp8_but)
            one = _trace(module, stacks, 2 * every, run, setting, dtype, fp8_but) + first * -1.0
            _KNOWN[key] = one * (depth / every), first + one * -1.0
    return _KNOWN[key]


def block_stacks(module: nn.Module) -> list[nn.ModuleList]:
    """Lists of blocks that lie in no other list."""
    found: list[nn.ModuleList] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found.append(child)
        else:
            found += block_stacks(child)
    return found


def _common_depth(stacks: list[nn.ModuleList], every: int) -> int | None:
    """How many blocks each stack has; None where they differ, or where blocks do: T5's first alone has the position table."""
    if not stacks or len({len(s) for s in stacks}) > 1 or len(stacks[0]) % every:
        return None
    for stack in stacks:
        sizes = [[list(p.shape) for p in block.parameters()] for block in stack]
        if any(size != sizes[i % every] and size != sizes[every + i % every] for i, size in enumerate(sizes[every:])):
            return None
    return len(stacks[0])


def _trace(
    module: nn.Module,
    stacks: list[nn.ModuleList],
    blocks: int | None,
    run: Callable[[Any, Callable[[Tensor], Tensor]], None],
    setting: Setting,
    dtype: torch.dtype | None,
    fp8_but: int | None,
) -> Cost:
    with _cut(stacks, blocks):
        part = copy.deepcopy(module)
    mode = FakeTensorMode()
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), storage  # held, so that no other takes its place
        return tensor

    recorder = _Recorder(fp8_but)
    with mode:
        own = _fill(part, dtype)
        with contextlib.ExitStack() as stack:
            if setting.on_gpu:
                stack.enter_context(_AsOnGpu())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
            stack.enter_context(recorder)
            run(part, mode.from_tensor)
    return Cost(recorder.operations, sum(size for place, (size, _) in kept.items() if place not in own))


@contextlib.contextmanager
def _cut(stacks: list[nn.ModuleList], blocks: int | None) -> Iterator[None]:
    """Inside, the stacks have their first `blocks` blocks only."""
    whole = [stack._modules for stack in stacks]
    try:
        if blocks is not None:
            for stack in stacks:
                stack._modules = dict(list(stack._modules.items())[:blocks])
        yield
    finally:
        for stack, modules in zip(stacks, whole, strict=True):
            stack._modules = modules


def _fill(part: nn.Module, dtype: torch.dtype | None) -> set[int]:
    """Fake tensors in place of the meta device's; storages of the parameters."""
    made: dict[int, nn.Parameter] = {}
    for module in part.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:  # tied weights stay tied
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype or old.dtype), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    return {p.untyped_storage()._cdata for p in made.values()}


class _AsOnGpu(TorchFunctionMode):
    """Autocast on a GPU keeps LayerNorm in float32, and fused attention takes dropout there, which on the CPU it does not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        elif func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {**kwargs, "dropout_p": 0.0}
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Every operation that does work: its FLOPs (a multiplication and an addition count two) and the bytes that it reads and writes.

    fp8_but: products with a matrix are in FP8, those excepted where a side of it is that long: one more operation quantises the rows (norms in
    front of several linears would do it once for all), and both factors are read at a byte an element.  None: no FP8.  Left out: linears with one
    copy (sharded blocks) transpose it for each backward product, 2 bytes a weight.
    """

    def __init__(self, fp8_but: int | None = None) -> None:
        super().__init__()
        self.operations: dict[Operation, float] = {}
        self.fp8_but = fp8_but

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE or func.namespace == "prim":
            return out
        backward = torch._C._current_autograd_node() is not None
        read = [] if name in _LOOK_UPS else tree_leaves((args, kwargs))
        written = tree_leaves(out)
        moved = sum(_bytes(t) for t in (*read, *written) if isinstance(t, Tensor)) * (2 if name in _LOOK_UPS else 1)
        flops = _flops(func, name, args, kwargs, out)
        kind = _kind(name, flops)
        if self.fp8_but is not None and name in ("mm", "addmm") and _can_be_fp8(args[-1], self.fp8_but):
            x, weight = args[-2:]
            self._add(Operation("plain", 0, x.numel() * (x.element_size() + 1), backward))
            kind, moved = "fp8", x.numel() + weight.numel() + _bytes(out)
        self._add(Operation(kind, flops, moved, backward))
        return out

    def _add(self, operation: Operation) -> None:
        self.operations[operation] = self.operations.get(operation, 0.0) + 1.0


def _can_be_fp8(weight: Tensor, excepted: int) -> bool:
    return not any(side % ALIGNMENT or side == excepted for side in weight.shape)


def _kind(name: str, flops: int) -> Kind:
    if "scaled_dot_product" in name:
        return "attention"
    if flops:
        return "product"
    return "function" if name.startswith(_FUNCTIONS) else "plain"


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> int:
    if name.startswith(_CPU_FLASH):
        backward = name.endswith("backward")
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        batch, heads, length, width = query.shape
        products = 5 if backward else 2  # the backward pass computes the scores again
        return 2 * products * batch * heads * length * key.shape[2] * width
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def count_operations(run: Callable[[], Any]) -> float:
    """Operations of `run` on real tensors, counted as in `Cost`."""
    return _recorded(run).count


def count_flops(run: Callable[[], Any]) -> float:
    """FLOPs of `run` on real tensors, counted as in `Cost`."""
    return _recorded(run).flops


def _recorded(run: Callable[[], Any]) -> Cost:
    recorder = _Recorder()
    with recorder:
        run()
    return Cost(recorder.operations)
