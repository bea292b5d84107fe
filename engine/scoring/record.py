"""What a score was measured with: settings, versions and hashes that go into every result file."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORDED_LIBRARIES = ("vpgtrans", "torch", "transformers")


def result_record(
    *,
    generation: Mapping[str, Any] | None,
    prompt: str | None,
    transform: str | Mapping[str, Any],
    checkpoint: Path,
) -> dict[str, Any]:
    """The part that every result file shares, as plain data that `json.dumps` takes.

    Args:
        generation: every generation setting in force, by name; None where nothing was generated (a loss alone).
        prompt: the template given to the language model, before the question is filled in; None for none.
        transform: what was done to the images, by name or setting by setting.
        checkpoint: the model's file, or a folder whose `*.safetensors` files are the model.

    Returns:
        {"generation", "prompt", "transform", "versions": {library: version}, "checkpoint": {"path", "sha256":
        {file name: digest}}}. Versions come from the installed packages' metadata, so that torch is not imported.

    Raises:
        FileNotFoundError: `checkpoint` is neither a file nor a folder with a `.safetensors` file.
    """
    return {
        "generation": None if generation is None else dict(generation),
        "prompt": prompt,
        "transform": transform if isinstance(transform, str) else dict(transform),
        "versions": library_versions(RECORDED_LIBRARIES),
        "checkpoint": {"path": str(checkpoint), "sha256": checkpoint_sha256(checkpoint)},
    }


def library_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Distribution name -> installed version, None where it is not installed; imports none of them."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def checkpoint_sha256(checkpoint: Path) -> dict[str, str]:
    """File name -> SHA-256 of a model file, or of each `*.safetensors` in a folder; errors as `result_record`."""
    files = [checkpoint]
    if checkpoint.is_dir():
        files = sorted(checkpoint.glob("*.safetensors")) or sorted(checkpoint.glob("pytorch_model*.bin"))
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"checkpoint: expected a model file, or a folder with .safetensors files, got {checkpoint}; "
            "name the file that was evaluated"
        )
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
