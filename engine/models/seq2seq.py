"""Encoder-decoder language models (Flan-T5): the encoder reads `[visual][text </s>]`, the decoder writes the caption.

The contract, checked when a model is loaded: embeddings in place of encoder ids give the model's own logits, padding of the encoder is
honoured, and the tokenizer's pieces never reach over two words, which is what lets a caption be split between words after tokenisation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import Group, TokenisedCaptions
from ..data.pair_batches import PairBatch, pack_pairs
from ..recipe import Generation
from .llm import LanguageModel, ModelError, prompt_counts_in_beam_score

WORD_MARK = "▁"  # sentencepiece's


class Seq2SeqLanguageModel(LanguageModel):
    """A frozen encoder-decoder language model."""

    is_encoder_decoder = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        super().__init__(model, tokenizer, path)
        self.start = model.config.decoder_start_token_id
        if self.start is None:
            raise ModelError(f"llm: expected decoder_start_token_id in the config of {path!r}, got none; set it")
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        marked = np.array([str(piece).startswith(WORD_MARK) for piece in pieces])
        self.starts_word = marked if marked.any() else ~marked  # a vocabulary of whole words has no marks

    def hidden_states(self, inputs: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
        """inputs (P, Q + E, W), mask (P, Q + E) bool, decoder_ids (P, D) -> (P, D, W): what the head takes."""
        encoded = self.model.get_encoder()(inputs_embeds=inputs, attention_mask=mask.long()).last_hidden_state
        return self.model.get_decoder()(
            input_ids=decoder_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask.long(), use_cache=False
        ).last_hidden_state

    def head_input(self, hidden: Tensor) -> Tensor:
        """T5's tied head takes scaled states."""
        config = self.model.config
        return hidden * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else hidden

    def framed(self, ids: list[int], max_tokens: int) -> list[int]:
        """The caption's pieces, cut to `max_tokens` with `</s>`, which `pack` adds to both halves."""
        return ids[: max_tokens - 1]

    def pack(
        self, groups: list[Group], data: TokenisedCaptions, queries: int, *, row_tokens: int, rows_per_batch: int, fixed_shape: bool = False,
        split_seed: int | None = None,
    ) -> list[PairBatch]:  # fmt: skip
        """One pair a row (data/pair_batches.py); `row_tokens x rows_per_batch` is the budget of padded tokens."""
        return pack_pairs(
            groups, data, queries, token_budget=row_tokens * rows_per_batch, starts_word=self.starts_word, start=self.start,
            eos=self.special.eos, pad=self.special.pad, split_seed=split_seed,
        )  # fmt: skip

    def loss_sum(self, prompts: Tensor, batch: PairBatch) -> Tensor:
        words = self.embed(batch.encoder_ids)
        inputs = torch.cat([prompts[batch.source].to(words.dtype), words], 1)
        mask = F.pad(batch.encoder_mask, (prompts.shape[1], 0), value=True)
        hidden = self.hidden_states(inputs, mask, batch.decoder_ids)
        return self.cross_entropy_sum(hidden.flatten(0, 1)[batch.predict], batch.labels)

    @torch.no_grad()
    def generate_ids(self, prompts: Tensor, texts: Sequence[str], settings: Generation) -> Tensor:
        """As the base class says, without the decoder's start token; ragged texts are padded on the right of `[visual][text </s>]`."""
        device = prompts.device
        ids = [[*self.text_ids(text), self.special.eos] for text in texts]
        longest = max(len(i) for i in ids)
        padded = torch.tensor([[*i, *[self.special.pad] * (longest - len(i))] for i in ids], device=device)
        mask = torch.tensor([[1] * (prompts.shape[1] + len(i)) + [0] * (longest - len(i)) for i in ids], device=device)
        words = self.embed(padded)
        inputs = torch.cat([prompts.to(words.dtype), words], 1)
        config = self.generation_config(settings, decoder_start_token_id=self.start)
        # The decoder's own prompt is its start token, which today's rule leaves out and the authors' library version counted.
        counted = settings.beam_score == "prompt_and_generated"
        with prompt_counts_in_beam_score(self.model, 1, self.ends) if counted else contextlib.nullcontext():
            return self.model.generate(
                inputs_embeds=inputs, attention_mask=mask, generation_config=config, synced_gpus=self.is_sharded
            )[:, 1:]

    @torch.no_grad()
    def check_contract(self) -> None:
        """Embeddings for ids, padding, and pieces that end with words; raises ModelError naming the clause that fails."""
        kind = f"{self.path!r} ({self.model.config.model_type})"
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary_size, (2, 6), generator=generator).to(device)
        decoder_ids = torch.full((2, 3), self.start, device=device)
        mask = torch.ones(2, 6, dtype=torch.bool, device=device)
        mask[1, 4:] = False
        try:
            own = self.model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits.float()
            ours = self.logits(self.hidden_states(self.embed(ids), mask, decoder_ids)).float()
            short = self.logits(self.hidden_states(self.embed(ids[1:, :4]), mask[1:, :4], decoder_ids[1:])).float()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"llm: {kind} does not take embeddings and masks: {error}; choose another model"
            ) from error
        tolerance = (1e-4 if next(self.model.parameters()).dtype.itemsize >= 4 else 5e-2) * own.abs().max().clamp(
            min=1.0
        )
        worst = torch.maximum((ours - own).abs().max(), (short[0] - ours[1]).abs().max())
        if worst > tolerance:
            raise ModelError(
                f"llm: {kind} does not take embeddings and padding as expected: logits differ by {worst:.2e}; choose another model"
            )
        whole, parts = self.text_ids("two red cars"), [self.text_ids(word) for word in ("two", "red", "cars")]
        marked = all(self.starts_word[p[0]] or p[0] == self.tokenizer.unk_token_id for p in parts)
        if whole != [token for part in parts for token in part] or not marked:
            raise ModelError(
                f"llm: the tokenizer of {kind} joins words in its pieces, so captions cannot be split between words; choose another model"
            )
