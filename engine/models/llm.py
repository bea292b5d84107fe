"""One adapter for any decoder-only Hugging Face language model, kept frozen.

The contract, checked by `check_contract` on a short sequence when a model is loaded:

* `embed(ids)` is what enters the first block (OPT-350M's 512-wide embeddings after `project_in`, Gemma's after scaling);
* `hidden_states(embed(ids), positions, mask)` followed by `logits` equals the model's own forward of `ids`;
* a boolean mask (rows, 1, tokens, tokens) and explicit positions are honoured, which is what lets the captions of one image share
  their visual prefix in one row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


class ModelError(ValueError):
    """A model or checkpoint that cannot be used; the message says what was expected, what came and the remedy."""


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


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that frame a caption: `[visual][bos][caption][newline]` (REFERENCE: the reference ends captions with a newline)."""

    bos: int
    eos: int
    pad: int
    newline: int


class LanguageModel(nn.Module):
    """A frozen decoder-only language model and its tokenizer, behind the four calls that the engine needs."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        super().__init__()
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"llm: expected a decoder-only model, got the encoder-decoder {model.config.model_type!r} at {path!r}; "
                "choose an OPT, LLaMA or other causal language model"
            )
        rows, vocabulary = model.get_input_embeddings().num_embeddings, len(tokenizer)
        if vocabulary > rows:
            raise ModelError(
                f"tokenizer: expected at most {rows} entries (rows of the word embedding of {path!r}), got {vocabulary}; "
                "the tokenizer belongs to another model"
            )
        decoder = getattr(model.base_model, "decoder", None)
        if getattr(decoder, "project_in", None) is not None:
            decoder.embed_tokens = ProjectedEmbedding(decoder.embed_tokens, decoder.project_in)
            decoder.project_in = None
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.special = special_tokens(tokenizer, path)
        self.hidden_width = int(model.config.hidden_size)
        self.model.requires_grad_(False).eval()

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokenizer)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., hidden_width): what enters the first block, before positions."""
        return self.model.get_input_embeddings()(ids)

    def word_embeddings(self) -> Tensor:
        """(vocabulary, hidden_width): `embed` of every id of the tokenizer."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.embed(torch.arange(self.vocabulary_size, device=device))

    def hidden_states(self, inputs: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """inputs (rows, tokens, width), positions (rows, tokens) int64, mask (rows, 1, tokens, tokens) bool -> (rows, tokens, head width)."""
        return self.model.base_model(
            inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, head width) -> (n, rows of the head), with the model's own soft-cap where it has one."""
        logits = self.model.get_output_embeddings()(hidden)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def caption_ids(self, caption: str, max_tokens: int) -> list[int]:
        """`[bos] caption [newline]`; a caption over `max_tokens` (BOS included, newline not) is cut, as in the reference."""
        text = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
        return [self.special.bos, *text[: max_tokens - 1], self.special.newline]


def special_tokens(tokenizer: PreTrainedTokenizerBase, path: str = "") -> SpecialTokens:
    """BOS, EOS, pad and newline of a tokenizer; pad falls back to EOS as LLaMA's does, BOS to EOS as Qwen's does.

    Raises ModelError when there is no EOS, or when a newline is not one token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"tokenizer: expected an eos token, got none in {path!r}; set eos_token in its tokenizer_config.json"
        )
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Sentencepiece puts a word-boundary mark before a lone newline, so only the last id is the newline itself.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(newline[-1:]) if newline else ""
    if not newline or "\n" not in text:
        raise ModelError(
            f"tokenizer: expected a token for the newline that ends a caption, got {text!r} in {path!r}; add one"
        )
    return SpecialTokens(bos, eos, pad, newline[-1])


def load_language_model(path: str | Path, dtype: torch.dtype = torch.float32, check: bool = True) -> LanguageModel:
    """Load a local folder or a hub id through transformers; never runs remote code.

    Raises ModelError when the folder is missing, is no causal language model, or breaks the adapter's contract.
    """
    name = str(path)
    disable_progress_bar()  # its bars and ours would write over each other
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"llm: expected a causal language model folder or hub id, got {name!r}: {error}") from error
    language_model = LanguageModel(model, tokenizer, name)
    if check:
        check_contract(language_model)
    return language_model


@torch.no_grad()
def check_contract(llm: LanguageModel) -> None:
    """Compare `hidden_states` + `logits` with the model's own forward, and a packed two-caption row with two plain rows.

    Raises ModelError naming the clause that fails; tolerances are relative to the size of the logits.
    """
    device = next(llm.model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, llm.vocabulary_size, (2, 6), generator=generator).to(device)
    own = llm.model(input_ids=ids).logits.float()
    causal = torch.ones(6, 6, dtype=torch.bool, device=device).tril()[None, None]
    positions = torch.arange(6, device=device).expand(2, -1)
    ours = llm.logits(llm.hidden_states(llm.embed(ids), positions, causal.expand(2, -1, -1, -1))).float()
    tolerance = (1e-4 if own.dtype == next(llm.model.parameters()).dtype else 5e-2) * own.abs().max().clamp(min=1.0)
    if (difference := (ours - own).abs().max()) > tolerance:
        raise ModelError(
            f"llm: {llm.path!r} ({llm.model.config.model_type}) does not accept embeddings, positions and a mask as expected: "
            f"logits differ by {difference:.2e}; choose another model, or report it"
        )
    # Two rows that share their first three tokens, told as one row of prefix + two tails.
    ids[1, :3] = ids[0, :3]
    plain = llm.logits(llm.hidden_states(llm.embed(ids), positions, causal.expand(2, -1, -1, -1))).float()
    packed = torch.cat([ids[0], ids[1, 3:]])[None]
    mask = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    mask[6:, 3:6] = False
    packed_positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]], device=device)
    got = llm.logits(llm.hidden_states(llm.embed(packed), packed_positions, mask[None, None])).float()[0]
    difference = torch.maximum((got[:6] - plain[0]).abs().max(), (got[6:] - plain[1, 3:]).abs().max())
    if difference > tolerance:
        raise ModelError(
            f"llm: {llm.path!r} ({llm.model.config.model_type}) does not honour a shared prefix (logits differ by {difference:.2e}); "
            "set data.captions_per_image to 1, or choose another model"
        )


def describe(llm: LanguageModel) -> dict[str, object]:
    """What the start-up table prints of a language model."""
    return {
        "path": llm.path,
        "type": llm.model.config.model_type,
        "hidden_width": llm.hidden_width,
        "parameters": llm.parameter_count,
        "vocabulary": llm.vocabulary_size,
        "special_tokens": asdict(llm.special),
    }
