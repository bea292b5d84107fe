"""Checkpoint files, read header first: names, shapes and sizes of every tensor, then one tensor at a time."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import CheckpointError


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not read yet."""

    name: str
    file: Path
    shape: tuple[int, ...]
    bytes: int


class SafetensorsFile:
    def __init__(self, path: Path):
        self.path = path
        self.stored = []
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    bits = re.search(r"\d+", view.get_dtype())  # F32, BF16, F8_E4M3; BOOL has none
                    count = torch.Size(shape).numel()
                    self.stored.append(Stored(name, path, shape, count * int(bits[0]) // 8 if bits else count))
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            with safe_open(self.path, "pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: expected a whole safetensors file: {error}; copy it again or choose another checkpoint"
        )


class LoadedFile:
    """Tensors that are already objects; those of a `torch.save` file are still on disk, mapped, until they are copied."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], mapped: bool):
        self.path, self.tensors, self.mapped = path, tensors, mapped
        self.stored = [Stored(k, path, tuple(v.shape), v.numel() * v.element_size()) for k, v in tensors.items()]

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = self.tensors[name].detach()
            # A copy, so that the file can be replaced while its tensors live; one at a time, so that there are never two models.
            yield name, tensor.clone(memory_format=torch.contiguous_format) if self.mapped else tensor


TensorFile = SafetensorsFile | LoadedFile


def download(repo: str) -> Path:
    """A hub repository in the local cache: configurations, tokenizer, and weights in one format only."""
    from huggingface_hub import snapshot_download  # a fresh machine without network needs none of it

    small = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*small, "pytorch_model*.bin"]))
    except (
        OSError,
        ValueError,
    ) as error:  # huggingface_hub's own errors, and those of the connection, are OSError or ValueError
        raise CheckpointError(
            f"{repo}: found no such folder, and the hub gave none: {first_line(error)}; correct the path or the id, or download it first"
        ) from error
    return folder


def weight_files(folder: Path) -> list[TensorFile]:
    """The weights of a folder, in the order in which transformers looks for them."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [open_file(folder / single)]
        if (folder / f"{single}.index.json").is_file():
            return _shards(folder, folder / f"{single}.index.json")
    raise CheckpointError(
        f"{folder}: expected model.safetensors or pytorch_model.bin, or the index of its shards, found neither; "
        "download the weights of the folder, not only its configuration"
    )


def _shards(folder: Path, index: Path) -> list[TensorFile]:
    try:
        shard_of = dict(json.loads(index.read_text())["weight_map"])
        shards = sorted(set(shard_of.values()))
        # an index from elsewhere must not make the program open arbitrary files
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("a shard outside the folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: expected the index of a sharded checkpoint: {error!r}; download it again"
        ) from error
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{index}: names {len(shards)} shards, missing: {', '.join(absent[:8])}; download them into {folder}"
        )
    files = [open_file(folder / shard) for shard in shards]
    held = {(stored.name, file.path.name) for file in files for stored in file.stored}
    if lacking := [name for name, shard in shard_of.items() if (name, shard) not in held]:
        raise CheckpointError(
            f"{index}: {len(lacking)} tensors are not in the shard it names, first {lacking[0]} in {shard_of[lacking[0]]}; "
            "index and shards are of different checkpoints, download both again"
        )
    return files


def open_file(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # the layout before torch 1.6 is no zip and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:Unsupported (?:global|class|operand)[^\n]*|Trying to [^\n]*)", str(error))
        raise CheckpointError(
            f"{path}: expected tensors only, refused what else its pickle holds or a damaged pickle "
            f"({refused[0] if refused else first_line(error)}); where the file is trusted, save its tensors alone with torch.save, "
            "otherwise copy it again"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(
            f"{path}: expected a file of torch.save: {first_line(error)}; copy it again or choose another checkpoint"
        ) from error
    inner = content.get("model", content) if isinstance(content, dict) else content
    tensors = {k: v for k, v in inner.items() if isinstance(v, Tensor)} if isinstance(inner, dict) else {}
    if not tensors:
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, or one under 'model', got {type(inner).__name__} without any; name a model checkpoint"
        )
    return LoadedFile(path, tensors, mapped)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
