"""Any BLIP-2 as the source of a transfer: what it holds (`describe_source`), and its tensors under our names (`read_source`).

    Hugging Face    folder or hub id: config.json (model_type blip-2), model.safetensors or pytorch_model.bin, sharded or not
    LAVIS           .pth, {"model": {...}} or flat; `blip2_pretrained_*` files hold neither ViT nor LLM: give eva_vit_g.pth as an extra file
    the authors'    .pth of VPGTrans, LAVIS's layout with what trained only: a projector alone, or VPG and projector
    a run           folder with vl_config.json that this engine wrote

Headers are read first and everything is checked against them, so a source that does not fit fails before any weight is read.  Then the
tensors that are asked for are read one at a time; of the rest nothing but names and shapes is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig, Blip2VisionModel

from ..checkpoint import CheckpointError, check_fit
from ..recipe import QFormerConfig
from .keys import (
    PARTS,
    QFORMER_ANCHORS,
    VISION_ANCHORS,
    VIT_G_BLOCKS,
    VIT_G_WIDTH,
    Leftover,
    bare_block,
    infer_qformer,
    infer_vision,
    lacking_anchors,
    place,
)
from .tensor_files import LoadedFile, Stored, TensorFile, download, first_line, open_file, weight_files
from .vpg import VPG, read_parts

Format = Literal["hugging_face", "lavis", "run"]


@dataclass(frozen=True)
class SourceInfo:
    """What a source holds, from its headers alone."""

    path: str
    format: Format
    files: tuple[Path, ...]
    qformer: QFormerConfig | None  # None: no Q-Former, or not enough of one to tell its sizes
    image_width: int | None
    vision: (
        dict[str, Any] | None
    )  # fields of a Blip2VisionConfig; num_attention_heads is None where shapes cannot tell it
    projector_shape: tuple[int, int] | None  # (LLM width, Q-Former width)
    llm: str | None  # folder or hub id of the language model, where the source names it
    llm_inside: bool
    llm_config: dict[str, Any] | None


@dataclass(frozen=True)
class UsedTensor:
    part: str
    name: str
    stored_as: str
    file: Path
    bytes: int


@dataclass(frozen=True)
class DroppedTensor:
    name: str
    file: Path
    bytes: int
    reason: str


@dataclass
class LoadReport:
    """Every tensor of a source: used or dropped, and the parts that it does not have."""

    path: str
    used: list[UsedTensor] = field(default_factory=list)
    dropped: list[DroppedTensor] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Plain text for the screen and the log: a line a part used, a line a reason for dropping, a line a missing part."""
        lines = []
        for part in (p for p in PARTS if any(u.part == p for u in self.used)):
            of_part = [u for u in self.used if u.part == part]
            files = list(dict.fromkeys(u.file.name for u in of_part))
            where = ", ".join(files) if len(files) < 4 else f"{len(files)} files, {files[0]} and on"
            lines.append(f"used {part}: {len(of_part)} tensors, {_mib(of_part)}, from {where}")
        for reason in dict.fromkeys(d.reason for d in self.dropped):
            for_it = [d for d in self.dropped if d.reason == reason]
            names = ", ".join(d.name for d in for_it[:2]) + (", …" if len(for_it) > 2 else "")
            lines.append(f"dropped {len(for_it)} tensors, {_mib(for_it)} ({reason}): {names}")
        return lines + [f"missing {part}" for part in self.missing]


def _mib(tensors: Sequence[UsedTensor | DroppedTensor]) -> str:
    return f"{sum(t.bytes for t in tensors) / 2**20:,.1f} MiB"


def describe_source(path: str | Path, extra_files: Sequence[str | Path] = ()) -> SourceInfo:
    """What a BLIP-2 source holds; reads configurations and headers, no weights.  A hub id is downloaded first.

    Raises CheckpointError when the source, or a file of it, cannot be read.
    """
    source = _open(path, extra_files)
    return _describe(source, _plan(source)[0])


def read_source(
    path: str | Path, parts: Sequence[str] = ("vpg", "projector"), extra_files: Sequence[str | Path] = ()
) -> tuple[dict[str, dict[str, Tensor]], LoadReport]:
    """The tensors of `parts` (vpg, projector, vision, llm) on the CPU, in their stored dtype: part -> our name -> tensor, and a report.

    extra_files: checkpoint files that give what `path` does not have; where both have a tensor, `path` counts, then the earlier file.
    Raises CheckpointError, before any weight is read, when a part is missing, incomplete or of other shapes; and when a file is damaged.
    """
    if unknown := [p for p in parts if p not in PARTS]:
        raise ValueError(f"parts: expected names among {', '.join(PARTS)}, got {unknown[0]!r}")
    source = _open(path, extra_files)
    wanted, dropped = _plan(source)
    info = _describe(source, wanted)
    for part in parts:
        _check_part(part, info, wanted)
    report = LoadReport(source.where, dropped=dropped)
    for key, tensor in wanted.items():
        for stored in tensor.stored.values():
            if key[0] in parts:
                report.used.append(UsedTensor(*key, stored.name, stored.file, stored.bytes))
            else:
                reason = "language model" if key[0] == "llm" else f"{key[0]} not asked for"
                report.dropped.append(DroppedTensor(stored.name, stored.file, stored.bytes, reason))
    held = {part for part, _ in wanted}
    report.missing = [f"{p}: {_ABSENT[p]}" for p in PARTS if p not in held]
    return _read(source, wanted, parts), report


_ABSENT = {
    "vpg": "no Q-Former in this source; add the file that has it to extra_files",
    "projector": "no projector in this source; add the file that has it to extra_files, or start from a converter or a random one",
    "vision": "no ViT in this source; add eva_vit_g.pth to extra_files, or name the tower in the recipe",
    "llm": "no language model in this source; name its folder or hub id in the recipe",
}


@dataclass
class _Wanted:
    """One tensor of ours: stored whole, or as the query and value thirds of a fused bias."""

    group: int
    stored: dict[str, Stored]

    @property
    def shape(self) -> tuple[int, ...]:
        first = next(iter(self.stored.values())).shape
        return first if "whole" in self.stored else (3 * first[0],)


_Plan = dict[tuple[str, str], _Wanted]  # (part, our name) -> where it is stored


@dataclass
class _Source:
    where: str
    format: Format
    groups: list[list[TensorFile]]  # the files of the source itself, then each extra file
    config: dict[str, Any]  # config.json or vl_config.json; empty for LAVIS


def _open(path: str | Path, extra_files: Sequence[str | Path]) -> _Source:
    where, path = str(path), Path(path)
    if not path.exists():
        # `org/name` is a hub id unless it is written, or ends, like a path.
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where) or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
            raise CheckpointError(
                f"{where}: expected a BLIP-2 folder, a checkpoint file or a hub id, found nothing there; correct the path"
            )
        path = download(where)
    if path.is_file():
        source = _Source(where, "lavis", [[open_file(path)]], {})
    elif (path / "vl_config.json").is_file() or (path / "model" / "vl_config.json").is_file():
        config, parts = read_parts(path)
        folder = path if (path / "vl_config.json").is_file() else path / "model"
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        source = _Source(where, "run", [[LoadedFile(folder / "model.safetensors", tensors, mapped=False)]], config)
    else:
        source = _Source(where, "hugging_face", [], _hugging_face_config(path))
        source.groups.append(weight_files(path))
    for extra in map(Path, extra_files):
        if not extra.is_file():
            raise CheckpointError(
                f"extra_files: expected a checkpoint file, found none at {extra}; correct the path, or name the file inside the folder"
            )
        source.groups.append([open_file(extra)])
    return source


def _hugging_face_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: expected config.json (Hugging Face BLIP-2) or vl_config.json (a run): {first_line(error)}; "
            "name the folder that holds it, or a checkpoint file"
        ) from error
    found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if found != "blip-2":
        raise CheckpointError(
            f"{folder}/config.json: expected model_type 'blip-2', got {found!r}; name a BLIP-2 folder (InstructBLIP is another model)"
        )
    return config


def _plan(source: _Source) -> tuple[_Plan, list[DroppedTensor]]:
    """Which stored tensor becomes which of ours, and what no part of ours takes."""
    wanted: _Plan = {}
    dropped: list[DroppedTensor] = []
    for number, files in enumerate(source.groups):
        blocks = _bare_blocks_used(files)
        for stored in (s for file in files for s in file.stored):
            to = place(stored.name)
            reason = to.reason if isinstance(to, Leftover) else None
            if (bare_block(stored.name) or 0) >= blocks > 0:
                reason = f"ViT block past the {blocks} that BLIP-2 uses"
            if reason is not None or isinstance(to, Leftover):
                dropped.append(DroppedTensor(stored.name, stored.file, stored.bytes, str(reason)))
                continue
            entry = wanted.setdefault((to.part, to.name), _Wanted(number, {}))
            if entry.group != number:
                earlier = next(iter(entry.stored.values())).file
                dropped.append(DroppedTensor(stored.name, stored.file, stored.bytes, f"already in {earlier.name}"))
            elif to.slot in entry.stored or (entry.stored and "whole" in (to.slot, *entry.stored)):
                other = next(iter(entry.stored.values()))
                raise CheckpointError(
                    f"{source.where}: {stored.name} ({stored.file.name}) and {other.name} ({other.file.name}) are both "
                    f"{to.part}.{to.name}; expected one of the two, keep the one that belongs to the model"
                )
            else:
                entry.stored[to.slot] = stored
    return wanted, dropped


def _bare_blocks_used(files: list[TensorFile]) -> int:
    """How many blocks of a bare EVA-CLIP file BLIP-2 uses: all but the last (arXiv 2301.12597, section 3.4); 0 where there is none."""
    stored = {s.name: s for file in files for s in file.stored if bare_block(s.name) is not None}
    if not stored:
        return 0
    first = stored.get("blocks.0.norm1.weight")
    if first is not None and first.shape == (VIT_G_WIDTH,):
        return VIT_G_BLOCKS
    return max(bare_block(name) or 0 for name in stored)


def _describe(source: _Source, wanted: _Plan) -> SourceInfo:
    shapes = {part: {n: w.shape for (p, n), w in wanted.items() if p == part} for part in PARTS}
    config = source.config
    vision = infer_vision(shapes["vision"])
    llm, llm_config = None, None
    try:
        if source.format == "hugging_face":
            vision = _vision_fields(config)
            qformer, image_width = _qformer_fields(config), vision["hidden_size"]
            llm_config = config.get("text_config")
            llm = (llm_config or {}).get("_name_or_path") or None
        elif source.format == "run":
            qformer, image_width, llm = (
                QFormerConfig(**config["qformer"]),
                int(config["image_width"]),
                config.get("llm"),
            )
        else:
            qformer = infer_qformer(shapes["vpg"], source.where)
            image_width = shapes["vpg"]["ln_vision.weight"][0] if qformer else None
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # pydantic's is a ValueError
        raise CheckpointError(
            f"{source.where}: expected the sizes of a BLIP-2, got ones that cannot be used: {error}; "
            "compare its configuration with the checkpoint it came from"
        ) from error
    projector = shapes["projector"].get("weight", ())
    files = tuple(file.path for group in source.groups for file in group)
    return SourceInfo(
        source.where, source.format, files, qformer, image_width, vision, projector if len(projector) == 2 else None,
        llm, bool(shapes["llm"]), llm_config,
    )  # fmt: skip


_VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "hidden_act",
    "layer_norm_eps", "qkv_bias",
)  # fmt: skip


def _vision_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Only the fields that shape the tower: folders of 2023 carry others, and leave defaults out."""
    default = Blip2VisionConfig()
    given = config.get("vision_config") or {}
    fields = {name: given.get(name, getattr(default, name)) for name in _VISION_FIELDS}
    for name in _VISION_FIELDS[:4]:
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ValueError(f"vision_config.{name}: expected a positive integer, got {fields[name]!r}")
    return fields


def _qformer_fields(config: dict[str, Any]) -> QFormerConfig:
    default, given = Blip2QFormerConfig(), config.get("qformer_config") or {}
    activation = given.get("hidden_act", default.hidden_act)
    if activation != "gelu":
        raise CheckpointError(
            f"qformer_config.hidden_act: expected 'gelu', got {activation!r}; this Q-Former is not supported"
        )
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "cross_attention_frequency", "layer_norm_eps",
        "initializer_range",
    )  # fmt: skip
    sizes = {name: given.get(name, getattr(default, name)) for name in names}
    dropout = given.get("hidden_dropout_prob", default.hidden_dropout_prob)
    return QFormerConfig(**sizes, dropout=dropout, num_query_tokens=config.get("num_query_tokens", 32))


def _check_part(part: str, info: SourceInfo, wanted: _Plan) -> None:
    """CheckpointError when a part of the source is absent, incomplete, or not of the shapes that its sizes ask for."""
    shapes = {n: w.shape for (p, n), w in wanted.items() if p == part}
    if not shapes:
        raise CheckpointError(f"{info.path}: expected the {part}: {_ABSENT[part]}; or leave it out of parts")
    if part == "llm":
        return  # transformers checks it against its own class
    halves = [f"{n} (one of q_bias, v_bias)" for (p, n), w in wanted.items() if p == part and _is_half(w)]
    anchors = {"vpg": QFORMER_ANCHORS, "vision": VISION_ANCHORS}.get(part, {})
    known = {"vpg": info.qformer, "vision": info.vision}.get(part, True) is not None
    lacking = halves + ([] if known else lacking_anchors(shapes, anchors))
    if lacking:
        raise CheckpointError(
            f"{info.path}: {part}: missing, or of a wrong number of dimensions: {', '.join(lacking)}; "
            "the file holds only some of it, add the file that has the rest to extra_files"
        )
    try:
        expected = _expected(part, info, shapes)
    except (TypeError, ValueError) as error:  # transformers' own checks of a configuration
        raise CheckpointError(
            f"{info.path}: {part}: expected sizes of a BLIP-2, got ones that cannot be used: {error}; correct its config.json"
        ) from error
    try:
        stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        check_fit(stored, expected, f"{info.path}: {part}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  add the file that has what is missing to extra_files, or choose another checkpoint"
        ) from None


def _is_half(wanted: _Wanted) -> bool:
    return len(wanted.stored) == 1 and "whole" not in wanted.stored


def _expected(part: str, info: SourceInfo, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Names and shapes (on the meta device) that a part of these sizes has."""
    with torch.device("meta"):
        if part == "vpg":
            assert info.qformer is not None and info.image_width is not None  # _check_part saw to it
            return dict(VPG(info.qformer, info.image_width).state_dict())
        if part == "projector":
            outputs, inputs = info.projector_shape or (shapes.get("bias", (1,))[0], 1)
            text = info.llm_config or {}
            return dict(
                nn.Linear(
                    info.qformer.hidden_size if info.qformer else inputs,
                    text.get("hidden_size") or text.get("d_model") or outputs,
                ).state_dict()
            )
        fields = {**(info.vision or {})}
        fields["num_attention_heads"] = fields["num_attention_heads"] or 1  # shapes do not depend on it
        module = Blip2VisionModel(Blip2VisionConfig(**fields))
        return {k: v for k, v in module.state_dict().items() if not k.startswith("post_layernorm.")}


def _read(source: _Source, wanted: _Plan, parts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Read what is asked for, file by file and one tensor at a time; thirds of a bias wait for each other."""
    out: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    waiting: dict[tuple[str, str], dict[str, Tensor]] = {}
    places = {
        (s.file, s.name): (key, slot) for key, w in wanted.items() if key[0] in parts for slot, s in w.stored.items()
    }
    for file in (f for group in source.groups for f in group):
        names = [s.name for s in file.stored if (s.file, s.name) in places]
        for name, tensor in file.read(names):
            key, slot = places[file.path, name]
            if slot == "whole":
                out[key[0]][key[1]] = tensor
                continue
            thirds = waiting.setdefault(key, {})
            thirds[slot] = tensor
            if len(thirds) == 2:
                query, value = thirds["query"], thirds["value"]
                out[key[0]][key[1]] = torch.cat([query, torch.zeros_like(query), value])
                del waiting[key]
    return out
