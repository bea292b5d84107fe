"""What the engine's savings save in a plan, and what a recipe's switches would change.

A saving's effect is what a pair would cost without it.  A switch's is found by planning the recipe again with the switch flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..recipe import TransferRecipe
from .costs import BLOCKS, HEAD, PROJECTOR, TOWER, VPG_, StageCosts
from .trace import Cost


@dataclass(frozen=True)
class Saving:
    """flops_without: of a pair, were this saving alone missing; None where it is off."""

    name: str
    is_on: bool
    flops_without: float | None
    why: str


@dataclass(frozen=True)
class Switch:
    """A change of recipe settings, `section.key=value` as the command line takes them."""

    settings: tuple[str, ...]
    changes: dict[str, Any]
    note: str = ""


def savings(
    recipe: TransferRecipe, costs: StageCosts, tower: Cost | None, is_encoder_decoder: bool, without_prompts: StageCosts | None = None
) -> list[Saving]:  # fmt: skip
    """The engine's savings in one stage; tower: the forward pass of an update's images where the vision cache spares it; without_prompts: the
    costs were there no prompt cache, where there is one."""
    load, data = costs.workload, recipe.data
    total, pairs = costs.all_flops_a_pair, load.pairs
    encoding = sum(costs.flops_a_pair(part) for part in (TOWER, VPG_, PROJECTOR))
    again = pairs / load.encodings
    shares = load.encodings < 0.999 * pairs
    found = [
        Saving(
            "one image, one encoding", shares, total + encoding * (again - 1) if shares else None,
            f"{again:.2f} captions an encoding (captions_per_image={data.captions_per_image})",
        )
    ]  # fmt: skip
    token = costs.update[BLOCKS].flops / load.tokens
    if not is_encoder_decoder:
        repeated = (pairs - load.encodings) * costs.queries
        found.append(
            Saving(
                "shared visual prefix", shares, total + token * repeated / pairs if shares else None,
                f"{load.used_tokens / pairs:.1f} tokens a pair instead of {(load.used_tokens + repeated) / pairs:.1f}",
            )
        )  # fmt: skip
        mean = (load.used_tokens - load.encodings * costs.queries) / pairs
        padding = max(0.0, load.longest - mean - (load.tokens - load.used_tokens) / pairs)
        found.append(
            Saving(
                "no padding", True, total + token * padding,
                f"rows {load.used_tokens / load.tokens:.0%} full; the longest of 36 captions has {load.longest:.0f} tokens, the mean {mean:.0f}",
            )
        )  # fmt: skip
    every = load.tokens / load.targets
    found.append(
        Saving(
            "only supervised positions reach the head", True, total + costs.flops_a_pair(HEAD) * (every - 1),
            f"{load.targets / load.tokens:.0%} of the positions",
        )
    )  # fmt: skip
    cached = tower is not None
    found.append(
        Saving(
            "vision cache", cached, total + tower.flops / pairs if tower else None,
            f"{data.views} stored view(s)" if cached else "data.vision_cache is off",
        )
    )  # fmt: skip
    found.append(
        Saving(
            "prompt cache", without_prompts is not None, without_prompts.all_flops_a_pair if without_prompts else None,
            f"data.prompt_cache is {data.prompt_cache}",
        )
    )  # fmt: skip
    return found


def switches(recipe: TransferRecipe, largest_rows: int, on_gpu: bool, has_fp8: bool = False) -> list[Switch]:
    """The switches of a recipe that change its cost, each flipped, where it can be.

    largest_rows: rows_per_micro_batch that fits; has_fp8: the device has FP8 products.
    """
    data = recipe.data
    found = []
    if data.captions_per_image != "all":
        found.append(_data("captions_per_image", "all", "exact but for one view and one dropout mask a group"))
    if data.captions_per_image != 1:
        found.append(_data("captions_per_image", 1, "the authors' sampling"))
    if data.vision_cache:
        ahead = ("data.cache_fill=ahead",) if data.cache_fill != "ahead" else ()
        changes = {"vision_cache": False, "views": 1, "cache_fill": "ahead"}
        found.append(Switch(("data.vision_cache=false", "data.views=1", *ahead), changes))
    elif data.transform == "eval":
        found.append(_data("vision_cache", True, "exact"))
    else:
        own = (f"data.train.{i}.transform=eval" for i, entry in enumerate(data.train) if entry.transform == "train")
        found.append(
            Switch(
                ("data.vision_cache=true", "data.views=2"), {"vision_cache": True, "views": 2},
                "two stored augmented views an image",
            )
        )  # fmt: skip
        found.append(
            Switch(
                ("data.vision_cache=true", "data.transform=eval", *own), {"vision_cache": True, "transform": "eval"},
                "no augmentation",
            )
        )  # fmt: skip
    for tokens in (data.row_tokens // 2, data.row_tokens * 2):
        found.append(_data("row_tokens", tokens, ""))
    if largest_rows > 1 and largest_rows != data.rows_per_micro_batch:
        found.append(more_rows(largest_rows))
    found.append(_precision(recipe, on_gpu))
    if has_fp8:
        other = "torch" if recipe.kernels.frozen_linear == "kernel" else "kernel"
        note = "frozen linears in FP8, not exact" if other == "kernel" else ""
        found.append(Switch((f"kernels.frozen_linear={other}",), {"frozen_linear": other}, note))
    return [switch for switch in found if _is_valid(recipe, switch)]


def more_rows(rows: int) -> Switch:
    """Larger micro-batches."""
    return _data("rows_per_micro_batch", rows, "rows: the most that fit or that an update has")


def _is_valid(recipe: TransferRecipe, switch: Switch) -> bool:
    """Whether the recipe would be taken with the switch's settings: FFCV's loader has no vision cache, say."""
    try:
        TransferRecipe.model_validate(flipped(recipe, switch).model_dump())
    except ValidationError:
        return False
    return True


def flipped(recipe: TransferRecipe, switch: Switch) -> TransferRecipe:
    """The recipe with a switch's changes."""
    if "precision" in switch.changes:
        return recipe.model_copy(update=switch.changes)
    if "frozen_linear" in switch.changes:
        return recipe.model_copy(update={"kernels": recipe.kernels.model_copy(update=switch.changes)})
    changes = dict(switch.changes)
    if changes.get("transform") == "eval":
        changes["train"] = [
            e.model_copy(update={"transform": None if e.transform == "train" else e.transform})
            for e in recipe.data.train
        ]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def _data(key: str, value: Any, note: str) -> Switch:
    return Switch((f"data.{key}={str(value).lower()}",), {key: value}, note)


def _precision(recipe: TransferRecipe, on_gpu: bool) -> Switch:
    is_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    other = "fp32" if is_bf16 else "bf16"
    return Switch((f"precision={other}",), {"precision": other}, "" if is_bf16 else "float32 master weights stay")
