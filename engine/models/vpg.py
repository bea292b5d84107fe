"""The visual prompt generator after its frozen tower: `ln_vision`, the learned query tokens and the Q-Former."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import CheckpointError, load_tensors, readable
from ..recipe import QFormerConfig
from .cross_attention import Impl
from .qformer import QFormer

LN_VISION_EPS = 1e-5  # the reference's; transformers' BLIP-2 uses the ViT's 1e-6 in the same place


@dataclass(frozen=True)
class VPGOutput:
    """What a VPG gave for the images of a batch: (B, queries, hidden width), in place of their features."""

    values: Tensor


class VPG(nn.Module):
    """features (B, N, image width) -> soft prompts (B, queries, hidden width).  Names as in transformers' BLIP-2, but for `ln_vision`."""

    fuses_cross_attention = False  # whether `kernels.qformer_attention` reads the image tokens
    cross_attention_impl: Impl = None  # of its latents; None: by kernels where they can run

    def __init__(self, config: QFormerConfig, image_width: int, text_branch: bool = False):
        super().__init__()
        self.config = config
        self.image_width = image_width
        self.ln_vision = nn.LayerNorm(image_width, eps=LN_VISION_EPS)
        self.query_tokens = nn.Parameter(
            torch.randn(1, config.num_query_tokens, config.hidden_size) * config.initializer_range
        )
        self.qformer = QFormer(config, image_width, text_branch)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        if self.fuses_cross_attention:
            return self.qformer(queries, features, norm=self.ln_vision, impl=self.cross_attention_impl)
        return self.qformer(queries, self.ln_vision(features))


def save_parts(folder: Path, parts: dict[str, nn.Module], config: dict[str, object]) -> None:
    """Write `model.safetensors` with each part's tensors under its name, and `vl_config.json`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{k}": v.detach().cpu().contiguous()
        for name, part in parts.items()
        for k, v in part.state_dict().items()
    }
    temporary = folder / ".model.safetensors.tmp"
    save_file(tensors, temporary)
    readable(temporary)
    temporary.replace(folder / "model.safetensors")
    temporary = folder / ".vl_config.json.tmp"
    temporary.write_text(json.dumps({"format": "vpgtrans-1", **config}, indent=1))
    temporary.replace(folder / "vl_config.json")


def read_parts(folder: Path) -> tuple[dict[str, object], dict[str, dict[str, Tensor]]]:
    """`vl_config.json` and the tensors of each part of a folder that `save_parts` wrote; a run folder stands for its `model/`.

    Raises CheckpointError when the folder is none, or a file is damaged.
    """
    folder = Path(folder)
    if not (folder / "vl_config.json").is_file() and (folder / "model" / "vl_config.json").is_file():
        folder = folder / "model"
    try:
        config = json.loads((folder / "vl_config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: expected a finished run or a pre-trained VPG (vl_config.json): {error}"
        ) from error
    if config.get("format") != "vpgtrans-1":
        raise CheckpointError(f"{folder}: expected format vpgtrans-1, got {config.get('format')!r}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(folder / "model.safetensors").items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return config, parts
