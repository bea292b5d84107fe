"""The vision-language model as the paper's figure has it: frozen tower -> VPG -> projector -> frozen language model.

`loss_sum` runs packed rows (see data/packing.py) and returns the summed cross-entropy of the supervised positions only; dividing by the
global target count is the loop's business.  `generate` answers prompts through transformers' own generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from ..data.packing import PackedBatch
from ..recipe import Generation
from .llm import LanguageModel
from .vpg import VPG


class VisionLanguageModel(nn.Module):
    """VPG and projector train (or not, by stage); the language model never does.  The tower lives with the data (data/features.py)."""

    def __init__(self, vpg: VPG, projector: nn.Linear, llm: LanguageModel):
        super().__init__()
        self.vpg = vpg
        self.projector = projector
        self.llm = llm

    @property
    def queries(self) -> int:
        return self.vpg.config.num_query_tokens

    def soft_prompts(self, features: Tensor) -> Tensor:
        """features (B, N, image width) -> (B, queries, LLM width)."""
        return self.projector(self.vpg(features))

    def freeze_for(self, trains: str, frozen_dropout: bool) -> None:
        """Set what trains in a stage, and the mode of every part: frozen parts run in eval mode unless the recipe says otherwise."""
        trains_vpg = trains == "vpg_and_projector"
        self.vpg.requires_grad_(trains_vpg)
        self.projector.requires_grad_(True)
        self.llm.requires_grad_(False)
        self.vpg.train(trains_vpg or frozen_dropout)
        self.projector.train()
        self.llm.train(frozen_dropout)

    def loss_sum(self, features: Tensor, batch: PackedBatch) -> Tensor:
        """features (groups, N, image width) of `batch.groups` -> scalar, float32 or wider, summed over `batch.target_count` targets."""
        prompts = self.soft_prompts(features).flatten(0, 1)
        words = self.llm.embed(batch.ids).flatten(0, 1)
        inputs = words.index_copy(0, batch.visual_slots, prompts[batch.visual_source].to(words.dtype))
        hidden = self.llm.hidden_states(inputs.view(*batch.ids.shape, -1), batch.positions, batch.mask)
        logits = self.llm.logits(hidden.flatten(0, 1)[batch.predict])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, batch.labels, reduction="sum")

    @torch.no_grad()
    def generate(self, features: Tensor, prompts: Sequence[str], settings: Generation) -> list[str]:
        """One answer an image: features (B, N, image width), prompts B strings ("" for a caption) -> B strings.

        The answer ends at a newline or EOS.  Ragged prompts are padded on the left.
        """
        special, tokenizer = self.llm.special, self.llm.tokenizer
        ids = [
            [special.bos, *tokenizer(p, add_special_tokens=False)["input_ids"]] if p else [special.bos] for p in prompts
        ]
        longest = max(len(i) for i in ids)
        device = features.device
        visual = self.soft_prompts(features)
        width = longest + self.queries
        inputs = torch.zeros(len(ids), width, visual.shape[-1], dtype=visual.dtype, device=device)
        mask = torch.zeros(len(ids), width, dtype=torch.long, device=device)
        for row, tokens in enumerate(ids):
            start = longest - len(tokens)
            inputs[row, start : start + self.queries] = visual[row]
            inputs[row, start + self.queries :] = self.llm.embed(torch.tensor(tokens, device=device)).to(visual.dtype)
            mask[row, start:] = 1
        config = GenerationConfig(
            do_sample=False, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens or None,
            length_penalty=settings.length_penalty, bos_token_id=special.bos, pad_token_id=special.pad,
            eos_token_id=sorted({special.eos, special.newline}), use_cache=True,
        )  # fmt: skip
        if settings.num_beams == 1:
            config.length_penalty = None
        out = self.llm.model.generate(inputs_embeds=inputs, attention_mask=mask, generation_config=config)
        return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
