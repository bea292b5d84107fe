"""A language model as `Blip2ForConditionalGeneration` takes it: an `<image>` token on a real row, no projections around the embeddings."""

from __future__ import annotations

import copy
import json

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..models.causal import ProjectedEmbedding
from ..models.llm import LanguageModel, ModelError

IMAGE_TOKEN = "<image>"
UNUSED_BYTE = "<0x00>"  # of a byte-fallback vocabulary: no caption holds a NUL


def for_export(llm: LanguageModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int, str]:
    """(model, tokenizer, image token id, how the image token got its row), computing what `llm` computes.

    OPT-350M's projections are folded into its embedding and its head, exactly; tokenizers begin texts as the engine does.
    Raises ModelError for a tokenizer without a `tokenizers` backend.
    """
    model, tokenizer = without_projections(llm.model), copy.deepcopy(llm.tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"export: expected a fast tokenizer for {llm.path!r}, got {type(tokenizer).__name__}; convert it first"
        )
    model, tokenizer, image, how = _with_image_token(model, tokenizer, llm)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if llm.is_encoder_decoder:
        if tokenizer("a")["input_ids"][-1:] != [llm.special.eos]:
            eos = tokenizer.convert_ids_to_tokens(llm.special.eos)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"$A:0 {eos}:0", pair=f"$A:0 {eos}:0 $B:1 {eos}:1", special_tokens=[(eos, llm.special.eos)]
            )
    else:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what gets saved
        if tokenizer("a")["input_ids"][:1] != [llm.special.bos]:
            bos = tokenizer.convert_ids_to_tokens(llm.special.bos)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=[(bos, llm.special.bos)]
            )
    return model, tokenizer, image, how


@torch.no_grad()
def without_projections(model: PreTrainedModel) -> PreTrainedModel:
    """OPT-350M as an OPT whose embedding is as wide as its blocks: E W_in and E W_out in place of E, W_in and W_out."""
    decoder = getattr(model.base_model, "decoder", None)
    if not isinstance(getattr(decoder, "embed_tokens", None), ProjectedEmbedding):
        return model
    config = copy.deepcopy(model.config)
    config.word_embed_proj_dim, config.tie_word_embeddings = config.hidden_size, False
    dtype = next(model.parameters()).dtype
    folded = OPTForCausalLM(config).to(dtype).eval()
    stored = {
        k: v
        for k, v in model.state_dict().items()
        if "embed_tokens" not in k and "project_" not in k and "lm_head" not in k
    }
    stored["model.decoder.embed_tokens.weight"] = decoder.embed_tokens.project_in(decoder.embed_tokens.embedding.weight)
    head = model.get_output_embeddings().weight
    stored["lm_head.weight"] = head @ decoder.project_out.weight if decoder.project_out is not None else head
    folded.load_state_dict(stored)
    return folded


def _with_image_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, llm: LanguageModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int, str]:
    """A row for `<image>` that changes no output where possible: its own, a spare one, that of an unused byte, at worst a new one."""
    vocabulary, rows = tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings
    if IMAGE_TOKEN in vocabulary:
        return model, _marked(tokenizer), vocabulary[IMAGE_TOKEN], "the tokenizer had it"
    if len(tokenizer) < rows and max(vocabulary.values()) + 1 < rows:
        tokenizer = _marked(tokenizer)
        return model, tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), "a spare row of the word embedding"
    if UNUSED_BYTE in vocabulary:
        renamed = _marked(_renamed(tokenizer, UNUSED_BYTE))
        if renamed.convert_tokens_to_ids(IMAGE_TOKEN) == vocabulary[UNUSED_BYTE]:
            return model, renamed, vocabulary[UNUSED_BYTE], f"the row of {UNUSED_BYTE}, a byte that no text holds"
    tokenizer = _marked(tokenizer)
    return (
        _with_new_row(model, llm),
        tokenizer,
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "a new row, a copy of the pad token's",
    )


def _marked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return tokenizer


def _renamed(tokenizer: PreTrainedTokenizerBase, entry: str) -> PreTrainedTokenizerBase:
    """The same tokenizer whose vocabulary calls `entry` `<image>`."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    entries = raw["model"]["vocab"]
    if isinstance(entries, dict):
        raw["model"]["vocab"] = {IMAGE_TOKEN if k == entry else k: v for k, v in entries.items()}
    else:  # unigram: [[piece, score], ...]
        raw["model"]["vocab"] = [[IMAGE_TOKEN if k == entry else k, v] for k, v in entries]
    renamed = copy.deepcopy(tokenizer)
    renamed._tokenizer = Tokenizer.from_str(json.dumps(raw))
    return renamed


@torch.no_grad()
def _with_new_row(model: PreTrainedModel, llm: LanguageModel) -> PreTrainedModel:
    """One row more in embedding and head; never predicted in training, the pad token's row is as improbable as any."""
    model = copy.deepcopy(model)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(part, (nn.Embedding, nn.Linear)):
            part.weight[rows] = part.weight[llm.special.pad]
            if getattr(part, "bias", None) is not None:
                part.bias[rows] = part.bias[llm.special.pad]
    return model.requires_grad_(False).eval()
