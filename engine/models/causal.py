"""Decoder-only language models: `[visual][bos][caption][newline]`, all captions of an image behind one visual prefix in one row.

The contract, checked on a short sequence when a model is loaded:

* `embed(ids)` is what enters the first block (OPT-350M's 512-wide embeddings after `project_in`, Gemma's after scaling);
* `hidden_states(embed(ids), positions, mask)` followed by `logits` equals the model's own forward of `ids`;
* a boolean mask (rows, 1, tokens, tokens) and explicit positions are honoured, which is what lets the captions of one image share
  their visual prefix in one row.

Packed rows can be attended to by kernels/prefix_attention.py or by other people's attention (attention_back_ends.py), through transformers'
attention interface (attention.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.prefix_attention import dense_mask
from ...kernels.projector_converter import linear_into
from ...kernels.prompt_assembly import prompt_assembly
from ...kernels.triton_support import triton_unsupported_reason
from ..data.packing import Group, PackedBatch, TokenisedCaptions, pack_update
from ..recipe import Generation
from .attention import BACK_END, PREFIX, PackedMask, register_back_ends, register_prefix_attention
from .attention_back_ends import BackEnd, layout_for
from .llm import LanguageModel, ModelError, prompt_counts_in_beam_score


class ProjectedEmbedding(nn.Module):
    """Word embedding followed by the model's input projection (OPT-350M), so that one call gives what enters the first block."""

    def __init__(self, embedding: nn.Embedding, project_in: nn.Linear):
        super().__init__()
        self.embedding = embedding
        self.project_in = project_in

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.project_in(self.embedding(ids))


def fold_input_projection(model: PreTrainedModel) -> None:
    """Put OPT-350M's input projection behind its word embedding; leaves every other model, and one that has it there, as it is."""
    decoder = getattr(model.base_model, "decoder", None)
    if getattr(decoder, "project_in", None) is not None:
        decoder.embed_tokens = ProjectedEmbedding(decoder.embed_tokens, decoder.project_in)
        decoder.project_in = None


class CausalLanguageModel(LanguageModel):
    """A frozen decoder-only language model."""

    assembles_prompts = False  # whether `kernels.prompt_assembly` puts words and soft prompts together
    graphed: Callable[..., Any] | None = (
        None  # the base model captured in a CUDA graph, for `graphed_rows` rows (regions.py)
    )
    graphed_rows = 0
    back_end: BackEnd | None = None  # of packed attention, where it is neither sdpa nor the kernels

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        super().__init__(model, tokenizer, path)
        fold_input_projection(model)

    def hidden_states(self, inputs: Tensor, positions: Tensor, mask: Tensor | PackedMask) -> Tensor:
        """inputs (rows, tokens, W), positions (rows, tokens) int64, mask (rows, 1, tokens, tokens) bool or what `packed_mask` gives ->
        (rows, tokens, head width)."""
        more: dict[str, Any] = {}
        if isinstance(mask, PackedMask):
            mask, more = mask.segments, {"packed": mask}
        elif self.model.config._attn_implementation == "eager":  # which adds its mask to the scores
            mask = torch.zeros(mask.shape, dtype=inputs.dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(inputs.dtype).min
            )
        run = self.model.base_model
        if self.graphed is not None and inputs.shape[0] == self.graphed_rows and torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()  # the last micro-batch's outputs are done with
            run = self.graphed
        return run(
            inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=False, **more
        ).last_hidden_state

    def prompt_assembly_unsupported_reason(self, device: torch.device) -> str | None:
        """Why words and soft prompts cannot be put together by `kernels.prompt_assembly` on `device`; None where they can."""
        table = self.model.get_input_embeddings()
        if type(table) is not nn.Embedding:
            return f"words come from a {type(table).__name__}: scaled or projected before the first block"
        return triton_unsupported_reason(device)

    def packed_mask(self, segments: Tensor, on_cpu: Tensor | None = None) -> Tensor | PackedMask:
        """segments (rows, tokens, 4) int32 of packed rows -> the mask that the model's attention takes.

        on_cpu: the same on the CPU, where it is there: what some back ends are told of it needs no wait for the device then.
        """
        implementation = self.model.config._attn_implementation
        if implementation == BACK_END:
            layout = layout_for(self.back_end, segments if on_cpu is None else on_cpu, segments.device)
            return PackedMask(segments[:, None], self.back_end, layout)
        return segments[:, None] if implementation == PREFIX else dense_mask(segments)

    def stands_in_for_sdpa_reason(self) -> str | None:
        """Why other attention cannot stand in for this model's own; None where it can."""
        if (implementation := self.model.config._attn_implementation) not in ("sdpa", PREFIX, BACK_END):
            return f"{self.path!r} attends by {implementation}, and other attention stands in for sdpa only"
        return None

    def use_back_end(self, back_end: BackEnd) -> None:
        """From here on attend to packed rows by `back_end`; as `use_prefix_attention`."""
        register_back_ends()
        self.back_end = back_end
        self._attend_by(BACK_END)

    def prefix_attention_unsupported_reason(self, device: torch.device) -> str | None:
        """Why this model cannot attend to packed rows by the kernels on `device`; None where it can."""
        return self.stands_in_for_sdpa_reason() or triton_unsupported_reason(device)

    def use_prefix_attention(self) -> None:
        """From here on attend to packed rows by the kernels.  The model is on its device; raises ModelError where its contract does not hold
        then, and all stays as it was."""
        register_prefix_attention()
        self._attend_by(PREFIX)

    def _attend_by(self, implementation: str) -> None:
        self.model.set_attn_implementation(implementation)
        try:
            self.check_contract()
        except ModelError:
            self.model.set_attn_implementation("sdpa")
            raise

    def framed(self, ids: list[int], max_tokens: int) -> list[int]:
        """`[bos] caption [newline]`; a caption over `max_tokens` (BOS and newline included) is cut and has no newline, as in LAVIS."""
        return [self.special.bos, *ids, self.special.newline][:max_tokens]

    def pack(
        self, groups: list[Group], data: TokenisedCaptions, queries: int, *, row_tokens: int, rows_per_batch: int, fixed_shape: bool = False,
        split_seed: int | None = None,
    ) -> list[PackedBatch]:  # fmt: skip
        """Rows of `[visual][caption 1][caption 2]...`, best fit (data/packing.py)."""
        return pack_update(groups, data, queries, row_tokens, rows_per_batch, self.special.pad, fixed_shape)

    def loss_sum(self, prompts: Tensor, batch: PackedBatch, projector: nn.Linear | None = None) -> Tensor:
        """As the base class says; with a projector `prompts` are what it takes, and it writes into the rows."""
        if projector is not None:
            rows = self.embed(batch.ids.flatten())
            projection = (t.to(rows.dtype) for t in (prompts.flatten(0, 1), projector.weight, projector.bias))
            rows = linear_into(*projection, rows, batch.visual_slots, batch.visual_source)
            inputs = rows.view(*batch.ids.shape, -1)
        elif self.assembles_prompts:
            table = self.model.get_input_embeddings().weight
            inputs = prompt_assembly(batch.ids, table, prompts, batch.visual_slots, batch.visual_source)
        else:
            words = self.embed(batch.ids).flatten(0, 1)
            prompt_rows = prompts.flatten(0, 1)[batch.visual_source].to(words.dtype)
            inputs = words.index_copy(0, batch.visual_slots, prompt_rows).view(*batch.ids.shape, -1)
        hidden = self.hidden_states(inputs, batch.positions, self.packed_mask(batch.segments, batch.segments_on_cpu))
        return self.cross_entropy_sum(hidden.flatten(0, 1)[batch.predict], batch.labels)

    @torch.no_grad()
    def generate_ids(self, prompts: Tensor, texts: Sequence[str], settings: Generation) -> Tensor:
        """As the base class says; ragged prompts are padded on the left, `[pad...][visual][bos][text]`."""
        queries, device = prompts.shape[1], prompts.device
        ids = [[self.special.bos, *self.text_ids(text)] for text in texts]
        longest = max(len(i) for i in ids)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and queries + longest + settings.max_new_tokens > room:
            raise ModelError(
                f"max_new_tokens: expected at most {room - queries - longest} after {queries} visual tokens and a prompt of {longest}, because "
                f"{self.path!r} has {room} positions, got {settings.max_new_tokens}"
            )
        words = self.embed(torch.tensor([self.special.pad], device=device))
        inputs = words.new_zeros(len(ids), longest + queries, words.shape[-1])
        mask = torch.zeros(inputs.shape[:2], dtype=torch.long, device=device)
        for row, tokens in enumerate(ids):
            start = longest - len(tokens)
            inputs[row, start : start + queries] = prompts[row].to(inputs.dtype)
            inputs[row, start + queries :] = self.embed(torch.tensor(tokens, device=device))
            mask[row, start:] = 1
        config = self.generation_config(settings, bos_token_id=self.special.bos)
        counted = settings.beam_score == "prompt_and_generated"
        with prompt_counts_in_beam_score(self.model, longest, self.ends) if counted else contextlib.nullcontext():
            return self.model.generate(
                inputs_embeds=inputs, attention_mask=mask, generation_config=config, synced_gpus=self.is_sharded
            )

    @torch.no_grad()
    def generate_after(
        self, before: Sequence[int], prompt: Tensor, after: Sequence[int], config: GenerationConfig, **more: Any
    ) -> list[int]:
        """New ids after `[before][visual][after]`: ids before and after prompt (Q, W), with BOS where the format has one.

        more: for transformers' generate, a streamer or stopping criteria.
        """
        words = [self.embed(torch.tensor(ids, device=prompt.device, dtype=torch.long)) for ids in (before, after)]
        inputs = torch.cat([words[0], prompt.to(words[0].dtype), words[1]])[None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=prompt.device)
        return self.model.generate(inputs_embeds=inputs, attention_mask=mask, generation_config=config, **more)[
            0
        ].tolist()

    @torch.no_grad()
    def check_contract(self) -> None:
        """Compare `hidden_states` + `logits` with the model's own forward, and a packed two-caption row with two plain rows.

        Raises ModelError naming the clause that fails; tolerances are relative to the size of the logits.
        """
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary_size, (2, 6), generator=generator).to(device)
        own = self.model(input_ids=ids).logits.float()
        causal = torch.ones(6, 6, dtype=torch.bool, device=device).tril()[None, None].expand(2, -1, -1, -1)
        positions = torch.arange(6, device=device).expand(2, -1)
        kind = f"{self.path!r} ({self.model.config.model_type})"
        tolerance = (1e-4 if next(self.model.parameters()).dtype.itemsize >= 4 else 5e-2) * own.abs().max().clamp(
            min=1.0
        )
        try:
            ours = self.logits(self.hidden_states(self.embed(ids), positions, causal)).float()
            # Two rows that share their first three tokens, told as one row of prefix + two tails.
            ids[1, :3] = ids[0, :3]
            plain = self.logits(self.hidden_states(self.embed(ids), positions, causal)).float()
            packed = torch.cat([ids[0], ids[1, 3:]])[None]
            spans = [[0, 3, 3, 9]] * 3 + [[0, 3, 3, 6]] * 3 + [[0, 3, 6, 9]] * 3
            mask = self.packed_mask(torch.tensor([spans], dtype=torch.int32, device=device))
            packed_positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]], device=device)
            got = self.logits(self.hidden_states(self.embed(packed), packed_positions, mask)).float()[0]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"llm: {kind} does not take embeddings, position ids and a 4-d mask: {error}; choose another model"
            ) from error
        if (difference := (ours - own).abs().max()) > tolerance:
            raise ModelError(
                f"llm: {kind} does not accept embeddings, positions and a mask as expected: "
                f"logits differ by {difference:.2e}; choose another model, or report it"
            )
        difference = torch.maximum((got[:6] - plain[0]).abs().max(), (got[6:] - plain[1, 3:]).abs().max())
        if difference > tolerance:
            raise ModelError(
                f"llm: {kind} does not honour a shared prefix (logits differ by {difference:.2e}); "
                "choose another model, or report it"
            )
