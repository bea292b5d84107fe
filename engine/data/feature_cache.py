"""Vision and prompt caches: features, or what a frozen VPG makes of them, read from a table (feature_table.py) and stored where they are absent.

The key of a cache is a hash of what its rows depend on: the tower's weights and config, the transform, precision and images (names, bytes and
times of change), and for prompts the VPG's weights and sizes too, so a stale cache is never found.  View v of image i is what epoch v would draw,
and epoch e reads view e mod views: with the eval transform one view is the truth, with the train transform k views stand for all.

Where a row of a micro-batch is absent, all of the micro-batch is computed and what was absent is stored: so what a run stores depends on its
own order alone, not on how far ahead it reads, and a run that was stopped goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..models.vision import VisionTower
from ..models.vpg import VPG, VPGOutput
from ..runlog import RunLog
from ..runtime import Runtime
from .decode import pixels_of
from .feature_table import FeatureTable, Layout, disk_free_bytes, present_rows
from .features import Computed, FeatureSource, LiveFeatures
from .packing import Group, TokenisedCaptions
from .reading import DataError

PROGRESS_S = 1.0
BUILD_BATCH = 32
GIB = 2**30
NOT_OF_OUTPUTS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
)  # of a transformers config


@dataclass(frozen=True)
class Identity:
    """What the rows of a cache depend on (`made_of`), and what is only good to know of it (`notes`)."""

    kind: Literal["vision", "prompt"]
    name: str
    layout: Layout
    made_of: dict[str, Any]
    notes: dict[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps([self.kind, self.made_of, self.layout.precision, str(self.layout.dtype)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def folder(self, root: Path) -> Path:
        return root / f"{self.kind}-{self.name}-{self.key}"

    def open(self, root: Path) -> FeatureTable:
        """The table, made where there is none; DataError when it is damaged or another's."""
        about = {"key": self.key, "kind": self.kind, "made_of": self.made_of, "notes": self.notes}
        return FeatureTable(self.folder(root), self.layout, about)


def vision_identity(live: LiveFeatures, views: int, precision: str = "compute") -> Identity:
    """Of the tower's outputs for all images of `live`; views: stored views, 1 with the eval transform."""
    data, tower, runtime = live.data, live.tower, live.runtime
    is_random = live.transform == "train"
    made_of = {
        "tower": weights_hash(tower), "config": config_of(tower), "image_size": tower.image_size,
        "mean": list(tower.norm.mean), "std": list(tower.norm.std),
        "transform": live.transform, "seed": live.seed if is_random else None, "views": views, "decode": pixels_of(live.decode),
        "eval_images": [[images.start, images.stop] for images in live.fixed] if is_random else [],
        "dtype": str(runtime.compute_dtype).removeprefix("torch."), "precision": precision, "images": _images_hash(data),
    }  # fmt: skip
    layout = Layout(views, len(data.records), tower.tokens, tower.width, runtime.compute_dtype, precision)
    return Identity("vision", data.name, layout, made_of, {"tower": str(tower.path), "images": len(data.records)})


def prompt_identity(features: Identity, vpg: VPG, precision: str = "compute") -> Identity:
    """Of the outputs of a frozen VPG for `features`."""
    before = features.layout
    layout = Layout(
        before.views, before.images, vpg.config.num_query_tokens, vpg.config.hidden_size, before.dtype, precision
    )
    # Neither heads nor epsilons show in the weights.
    config = vpg.config.model_dump(exclude={"dropout", "initializer_range"})
    made_of = {"vpg": weights_hash(vpg), "config": config, "precision": precision, "features": features.made_of}
    return Identity("prompt", features.name, layout, made_of, features.notes)


class StoredFeatures(FeatureSource):
    """Rows of a table; what is absent comes from `inner` and is stored.  `unusable` is that of `inner`."""

    def __init__(
        self, identity: Identity, table: FeatureTable, inner: LiveFeatures | StoredFeatures, log: RunLog, must_store: bool = False
    ):  # fmt: skip
        """must_store: a row that cannot be written is an error; otherwise it is said once and the row is computed each time."""
        self.identity, self.table, self.inner, self.log, self.must_store = identity, table, inner, log, must_store
        self.runtime: Runtime = inner.runtime
        self.bad_images: str = inner.bad_images
        self.unusable = inner.unusable
        self._stores = True
        self._said_damage = False
        self._add_unusable(table.unusable(), f"was made with 'skip' and lacks {len(table.unusable()):,} images")

    def prepare(self, groups: list[Group]) -> Any:
        rows = [self._row(g) for g in groups]
        raw = self.table.read(rows, pinned=self.runtime.device.type == "cuda")
        if raw is None:
            self._say_damage()
            return _Absent(groups, rows, self.inner.prepare(groups))
        self._add_unusable(self.table.unusable(rows), "lacks images")
        return raw

    def finish(self, prepared: Any) -> Any:
        layout, device = self.table.layout, self.runtime.device
        self.computed = Computed()
        if not isinstance(prepared, _Absent):
            return layout.decode(prepared.to(device, non_blocking=True))
        stored = self.table.read(
            prepared.rows
        )  # since it was prepared, another micro-batch or process may have stored them
        if stored is None:
            raw = layout.encode(self._compute(prepared.of_inner))
            self._store(prepared, raw.cpu())
            stored = self.table.read(prepared.rows)  # what another process stored first counts
        return layout.decode(raw if stored is None else stored.to(device))

    def settle(self) -> None:
        """Mark the table complete where all of it is there and sound.  Every rank must call it."""
        runtime, table = self.runtime, self.table
        # All ranks or none: another run may store the last row between two of them, and each verifies a share.
        if not all(runtime.gather(not table.is_complete and not table.missing())):
            return
        table.verify(runtime.rank, runtime.world_size)
        runtime.wait()  # for every rank's share
        if runtime.is_main and not table.missing():
            table.mark_complete()

    def _compute(self, of_inner: Any) -> Tensor:
        features = self.inner.finish(of_inner)
        self.computed = self.inner.computed
        return features

    def _row(self, group: Group) -> int:
        layout = self.table.layout
        return group.epoch % layout.views * layout.images + group.image

    def _store(self, absent: _Absent, raw: Tensor) -> None:
        if not self._stores:
            return
        told = zip(absent.rows, absent.groups, strict=True)
        unusable = {row: self.unusable[group.image] for row, group in told if group.image in self.unusable}
        try:
            self.table.write(absent.rows, raw, unusable)
        except OSError as error:
            if self.must_store:
                raise DataError(
                    f"{self.table.folder}: cannot be written: {error}; free some disk, or set output.cache"
                ) from error
            self._stores = False
            self.log.warn("cache_not_stored", f"{self.table.folder}: {error}; what is absent is computed each time")

    def _add_unusable(self, rows: dict[int, str], what: str) -> None:
        if rows and self.bad_images == "fail":
            raise DataError(
                f"data.bad_images: {self.table.folder} {what}, the first: {next(iter(rows.values()))}; "
                "set it to skip, or mend the images and delete the folder"
            )
        for row, why in rows.items():
            self.unusable.setdefault(row % self.table.layout.images, why)

    def _say_damage(self) -> None:
        if self.table.damaged and not self._said_damage:
            self._said_damage = True
            self.log.say(
                f"{self.table.folder}: rows that fail their checksum (a power cut while they were written?) are computed again"
            )


class StoredPrompts(StoredFeatures):
    """Outputs of a VPG that is frozen and in eval mode, in place of features: `finish` gives a VPGOutput."""

    def __init__(
        self, identity: Identity, table: FeatureTable, inner: LiveFeatures | StoredFeatures, log: RunLog, vpg: VPG, must_store: bool = False
    ):  # fmt: skip
        super().__init__(identity, table, inner, log, must_store)
        self.vpg = vpg

    @torch.no_grad()
    def _compute(self, of_inner: Any) -> Tensor:
        features = self.inner.finish(of_inner)
        self.computed = Computed(self.inner.computed.encodings, len(features))
        with self.runtime.autocast():
            return self.vpg(features)

    def finish(self, prepared: Any) -> VPGOutput:
        return VPGOutput(super().finish(prepared))


def unused_tables(identity: Identity, root: Path) -> dict[Path, list[str]]:
    """Caches of the same kind and set that `identity` is not: folder -> what each was made of otherwise."""
    found = {}
    for folder in sorted(root.glob(f"{identity.kind}-{identity.name}-*")):
        key = folder.name.removeprefix(f"{identity.kind}-{identity.name}-")
        if key == identity.key or not re.fullmatch("[0-9a-f]{16}", key):
            continue
        try:
            about = json.loads((folder / "about.json").read_text())
            found[folder] = _otherwise(about["made_of"], identity.made_of, "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found[folder] = [f"about.json, which cannot be read ({error})"]
    return found


def _otherwise(found: dict[str, Any], wanted: dict[str, Any], prefix: str) -> list[str]:
    differing = []
    for name in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(name), wanted.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            differing += _otherwise(theirs, ours, f"{prefix}{name}.")
        elif theirs != ours:
            differing.append(prefix + name)
    return differing


def tell_unused(identity: Identity, root: Path, log: RunLog) -> None:
    """Before a cache is made anew: say which there are of the same set, and why they do not serve."""
    if identity.folder(root).is_dir():
        return
    for folder, differing in unused_tables(identity, root).items():
        log.say(f"{identity.kind} cache: not the one in {folder}, made of other {', '.join(differing)}")


@dataclass(frozen=True)
class _Absent:
    """Groups of which a row is absent, prepared by the source behind the cache."""

    groups: list[Group]
    rows: list[int]
    of_inner: Any


def open_features(
    data: TokenisedCaptions,
    tower: VisionTower,
    *,
    transform: str,
    seed: int,
    runtime: Runtime,
    cache_root: Path | None,
    views: int = 1,
    log: RunLog,
    fixed: Sequence[range] = (),
    decode: Literal["exact", "fast"] = "exact",
    bad_images: Literal["fail", "skip"] = "fail",
    fill: Literal["ahead", "first_epoch"] = "ahead",
    precision: Literal["compute", "fp8"] = "compute",
) -> LiveFeatures | StoredFeatures:
    """Live features, or, with `cache_root`, the vision cache of this tower and data, whose absent rows are computed first.

    Args:
        fixed: ranges of images that take the eval transform whatever `transform` is.
        decode: as in `load_batch`'s mode.
        bad_images: of images that cannot be read.
        fill: first_epoch computes a row when it is first asked for.
        precision: of what is stored, as in `Layout`.

    Raises:
        DataError: the cache is damaged, another's, or does not fit on the disk.
    """
    live = LiveFeatures(data, tower, transform, seed, runtime, fixed, decode, bad_images)
    if cache_root is None:
        return live
    identity = vision_identity(live, views if transform == "train" else 1, precision)
    check_space(identity, identity.folder(cache_root))
    tell_unused(identity, cache_root, log)
    stored = StoredFeatures(identity, identity.open(cache_root), live, log, must_store=fill == "ahead")
    if fill == "ahead":
        fill_ahead(stored)
    else:
        stored.settle()
    return stored


def fill_ahead(stored: StoredFeatures) -> None:
    """Compute every absent row.  Ranks and other processes that fill the same table share the work; every rank must call it."""
    table, runtime, log = stored.table, stored.runtime, stored.log
    if not table.is_complete and (absent := table.missing()):
        log.say(
            f"{stored.identity.kind} cache: {absent:,} of {table.layout.rows:,} rows to compute -> {table.folder} "
            f"({table.layout.bytes / 2**20:,.0f} MiB)"
        )
        while True:
            _fill(stored)
            if not table.verify(runtime.rank, runtime.world_size):
                break
        log.end_progress()
    stored.settle()


def _fill(stored: StoredFeatures) -> None:
    table, runtime = stored.table, stored.runtime
    views, images = table.layout.views, table.layout.images
    # Chunks begin at fixed places, so that what is computed does not depend on where an earlier process stopped.
    chunks = [(v, at, min(BUILD_BATCH, images - at)) for v in range(views) for at in range(0, images, BUILD_BATCH)]
    own = chunks[runtime.rank :: runtime.world_size]
    waiting = own + [c for n, c in enumerate(chunks) if n % runtime.world_size != runtime.rank]
    show_at = 0.0
    while waiting:
        left = []
        for view, at, count in waiting:
            first = view * images + at
            if table.holds(range(first, first + count)):
                continue
            with table.claim(first, count) as is_ours:
                if is_ours:
                    stored([Group(i, view, ()) for i in range(at, at + count)])
                else:
                    left.append((view, at, count))
            if time.monotonic() >= show_at:  # counting passes over the entries of all rows
                show_at = time.monotonic() + PROGRESS_S
                done = table.layout.rows - table.missing()
                stored.log.progress(
                    f"{stored.identity.kind} cache", done, table.layout.rows, f"{done:,} of {table.layout.rows:,} rows"
                )
        if len(left) == len(waiting):
            time.sleep(0.1)  # another process is at all of them
        waiting = left


def check_space(identity: Identity, folder: Path) -> None:
    """DataError where what a cache still lacks is more than the disk has free."""
    wanted = (identity.layout.rows - present_rows(folder)) * identity.layout.row_bytes
    free = disk_free_bytes(folder)
    if wanted > free:
        raise DataError(
            f"{folder}: expected {wanted / GIB:.1f} GiB free for the {identity.kind} cache, found {free / GIB:.1f} GiB; set output.cache to "
            "another disk, or data.cache_precision to fp8, or turn the cache off"
        )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's names and tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # flattened first: a 1 x 1 kernel in channels-last counts as contiguous and still has a last stride above 1
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_of(module: nn.Module) -> dict[str, Any]:
    """Numbers and names of a transformers model's config, which its weights do not tell: heads, activation, epsilons; nothing of other models."""
    found = next((m.config for m in module.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)), None)
    told = {} if found is None else found.to_dict()
    return {k: v for k, v in sorted(told.items()) if isinstance(v, (int, float, str)) and k not in NOT_OF_OUTPUTS}


def _images_hash(data: TokenisedCaptions) -> str:
    digest = hashlib.sha256()
    for record in data.records:
        stat = record.path.stat()
        # In whole seconds: members of packs and tars have no finer time, that of their file.
        digest.update(f"{record.image_id}\0{record.path.name}\0{stat.st_size}\0{int(stat.st_mtime)}\n".encode())
    return digest.hexdigest()
