"""The vision-language model as the paper's figure has it: frozen tower -> VPG -> projector -> frozen language model.

What depends on the kind of language model (packing, the loss, generation) is its adapter's business (llm.py); dividing by the global
target count is the loop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data.packing import Batch, Group, TokenisedCaptions
from ..recipe import Generation, TransferData
from .causal import CausalLanguageModel
from .llm import LanguageModel
from .vpg import VPG, VPGOutput


class VisionLanguageModel(nn.Module):
    """VPG and projector train (or not, by stage); the language model never does.  The tower lives with the data (data/features.py)."""

    after_prompts: Callable[[], None] | None = (
        None  # called between soft prompts and language model: a clock's lap (cost.py)
    )

    has_compiled_blocks = False
    projects_into_rows = False  # whether `kernels.projector_converter` writes soft prompts into the packed rows

    def __init__(self, vpg: VPG, projector: nn.Linear, llm: LanguageModel):
        super().__init__()
        self.vpg = vpg
        self.projector = projector
        self.llm = llm

    @property
    def queries(self) -> int:
        return self.vpg.config.num_query_tokens

    def soft_prompts(self, features: Tensor | VPGOutput) -> Tensor:
        """features (B, N, image width), or what the VPG made of them before -> (B, queries, LLM width)."""
        return self.projector(self._visual(features))

    def _visual(self, features: Tensor | VPGOutput) -> Tensor:
        return features.values if isinstance(features, VPGOutput) else self.vpg(features)

    def freeze_for(self, trains: str, frozen_dropout: bool) -> None:
        """Set what trains in a stage, and the mode of every part: frozen parts run in eval mode unless the recipe says otherwise."""
        trains_vpg = trains == "vpg_and_projector"
        self.vpg.requires_grad_(trains_vpg)
        self.projector.requires_grad_(True)
        self.llm.requires_grad_(False)
        self.vpg.train(trains_vpg or frozen_dropout)
        self.projector.train()
        self.llm.train(frozen_dropout)

    def pack(
        self, groups: list[Group], data: TokenisedCaptions, layout: TransferData, *, fixed_shape: bool = False, split_seed: int | None = None
    ) -> Sequence[Batch]:  # fmt: skip
        """The groups of an update as micro-batches of the language model's kind."""
        return self.llm.pack(
            groups, data, self.queries, row_tokens=layout.row_tokens, rows_per_batch=layout.rows_per_micro_batch, fixed_shape=fixed_shape,
            split_seed=split_seed,
        )  # fmt: skip

    def loss_sum(self, features: Tensor | VPGOutput, batch: Batch) -> Tensor:
        """features (groups, N, image width) of `batch.groups` -> scalar, float32 or wider, summed over `batch.target_count` targets."""
        if self.projects_into_rows:
            assert isinstance(self.llm, CausalLanguageModel)
            visual = self._visual(features)
            if self.after_prompts is not None:
                self.after_prompts()
            return self.llm.loss_sum(visual, batch, self.projector)
        prompts = self.soft_prompts(features)
        if self.after_prompts is not None:
            self.after_prompts()
        return self.llm.loss_sum(prompts, batch)

    @torch.no_grad()
    def generate(self, features: Tensor, prompts: Sequence[str], settings: Generation) -> list[str]:
        """One answer an image: features (B, N, image width), prompts B strings ("" for a caption) -> B strings."""
        # Compiled blocks would be compiled again for every length and for the cache of keys and values.
        with torch.compiler.set_stance("force_eager") if self.has_compiled_blocks else contextlib.nullcontext():
            return self.llm.generate(self.soft_prompts(features), prompts, settings)
