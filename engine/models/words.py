"""The word embeddings of a language model without the rest of it: what the word converter reads of a source, gigabytes less than the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..checkpoint import CheckpointError
from .llm import ModelError
from .tensor_files import TensorFile, download, weight_files


class HasWords(Protocol):
    """What a converter needs of a language model."""

    tokenizer: PreTrainedTokenizerBase
    path: str
    hidden_width: int

    def word_embeddings(self) -> Tensor: ...


@dataclass
class WordTable:
    """A tokenizer and what enters the first block for each of its ids: table (vocabulary, width) float32."""

    tokenizer: PreTrainedTokenizerBase
    path: str
    table: Tensor

    @property
    def hidden_width(self) -> int:
        return self.table.shape[1]

    def word_embeddings(self) -> Tensor:
        return self.table


@torch.no_grad()
def load_words(path: str | Path) -> WordTable:
    """The words of a language model folder or hub id, or of the language model inside a Hugging Face BLIP-2.

    Projected for OPT-350M and scaled for Gemma, as they enter the first block.  Raises ModelError when the folder holds no such table.
    """
    where = str(path)
    try:
        config = AutoConfig.from_pretrained(where)
        tokenizer = AutoTokenizer.from_pretrained(where)
        files = weight_files(Path(where) if Path(where).is_dir() else download(where))
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise ModelError(f"llm: expected a language model folder or hub id, got {where!r}: {error}") from error
    text = config.text_config if config.model_type == "blip-2" else config
    embedding, project_in = _modules_on_meta(text)
    embedding = _filled(
        embedding, files, ("embed_tokens.weight", "shared.weight", "wte.weight", "embed_in.weight"), where
    )
    ids = torch.arange(min(len(tokenizer), embedding.num_embeddings))
    if len(tokenizer) > embedding.num_embeddings:
        raise ModelError(
            f"tokenizer: expected at most {embedding.num_embeddings} entries (rows of the word embedding of {where!r}), "
            f"got {len(tokenizer)}; the tokenizer belongs to another model"
        )
    table = embedding(ids)
    if project_in is not None:
        table = _filled(project_in, files, ("project_in.weight",), where)(table)
    return WordTable(tokenizer, where, table)


def _modules_on_meta(config: PreTrainedConfig) -> tuple[nn.Embedding, nn.Linear | None]:
    with torch.device("meta"):
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config)
    decoder = getattr(model.base_model, "decoder", None)
    return model.get_input_embeddings(), getattr(decoder, "project_in", None)


def _filled(module: Any, files: list[TensorFile], endings: tuple[str, ...], where: str) -> Any:
    """The module with its weight read from the file and its constants restored, in float32."""
    shape = tuple(module.weight.shape)
    found = [
        (file, stored.name)
        for file in files
        for stored in file.stored
        if stored.name.endswith(endings) and stored.shape == shape and not stored.name.startswith("qformer.")
    ]
    if not found:
        raise ModelError(
            f"llm: expected a tensor {' or '.join(endings)} of shape {shape} in {where!r}, found none; name a folder with the whole model"
        )
    file, name = found[0]
    filled = module.to_empty(device="cpu")
    filled.weight = nn.Parameter(next(iter(file.read([name])))[1].float(), requires_grad=False)
    if hasattr(filled, "scalar_embed_scale"):  # Gemma: not in the file, computed when a model is made
        filled.embed_scale = torch.tensor(filled.scalar_embed_scale)
    return filled
