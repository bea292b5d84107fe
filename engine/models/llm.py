"""Frozen Hugging Face language models behind one adapter: what the engine needs of a family, and nothing more.

`LanguageModel` is what every family has in common; `CausalLanguageModel` (causal.py) and `Seq2SeqLanguageModel` (seq2seq.py) say how a
family takes soft prompts, packs captions, counts its loss and generates.  `load_language_model` picks one and checks its contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ...kernels.linear_cross_entropy import linear_cross_entropy
from ..recipe import Generation

if TYPE_CHECKING:
    from ..data.packing import Batch, Group, TokenisedCaptions


LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
)  # of a folder that is absent, foreign or damaged


class ModelError(ValueError):
    """A model or checkpoint that cannot be used; the message says what was expected, what came and the remedy."""


TOKENIZE_AT_ONCE = 10_000  # what a tokenizer returns takes kilobytes a caption


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that frame a caption: `[visual][bos][caption][newline]` (as in the authors' code); encoder-decoders end with `eos` instead."""

    bos: int
    eos: int
    pad: int
    newline: int


class LanguageModel(nn.Module, ABC):
    """A frozen language model and its tokenizer.  Shapes: G groups (images), Q queries, W width of a word embedding."""

    is_encoder_decoder = False
    # Whether the loss is `kernels.linear_cross_entropy`'s, which never holds the logits of all rows. On the CPU its chunks took 1.2 to 1.5 times
    # as long as torch's own lines at the demo's sizes.
    fuses_head = False
    # Whether its blocks are in pieces over the ranks (engine/distributed/frozen.py), which then must run equally many steps of generation.
    is_sharded = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        super().__init__()
        if bool(model.config.is_encoder_decoder) != self.is_encoder_decoder:
            wanted = "an encoder-decoder" if self.is_encoder_decoder else "a decoder-only"
            raise ModelError(f"llm: expected {wanted} model, got {model.config.model_type!r} at {path!r}")
        rows, vocabulary = model.get_input_embeddings().num_embeddings, len(tokenizer)
        if vocabulary > rows:
            raise ModelError(
                f"tokenizer: expected at most {rows} entries (rows of the word embedding of {path!r}), got {vocabulary}; "
                "the tokenizer belongs to another model"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.special = special_tokens(tokenizer, path, newline=not self.is_encoder_decoder)
        self.ends = sorted({self.special.eos, self.special.newline})  # ids that end an answer
        self.hidden_width = int(model.config.hidden_size)
        # A folder's own generation settings (a repetition penalty, say) would fill what ours leave open, unrecorded.
        start = getattr(model.generation_config, "decoder_start_token_id", None)
        self.model.generation_config = GenerationConfig(decoder_start_token_id=start)
        self.model.requires_grad_(False).eval()

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokenizer)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def has_dropout(self) -> bool:
        """Whether training mode changes its outputs, by its config (`dropout`, `attention_dropout`, `resid_pdrop`, `layerdrop`, ...)."""
        settings = self.model.config.to_dict().items()
        return any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., W): what enters the first block, before positions."""
        return self.model.get_input_embeddings()(ids)

    def word_embeddings(self) -> Tensor:
        """(vocabulary, W): `embed` of every id of the tokenizer."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.embed(torch.arange(self.vocabulary_size, device=device))

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head takes of the last hidden states; T5 scales them."""
        return hidden

    @property
    def softcap(self) -> float | None:
        """The model's own bound of its logits, where it has one (Gemma 2)."""
        return getattr(self.model.config, "final_logit_softcapping", None) or None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, head width) -> (n, rows of the head), with the model's own soft-cap where it has one."""
        logits = self.model.get_output_embeddings()(self.head_input(hidden))
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def fused_head_unsupported_reason(self) -> str | None:
        """Why the loss cannot be formed by `kernels.linear_cross_entropy`; None where it can."""
        head = type(self.model.get_output_embeddings())
        return None if head is nn.Linear else f"the head is a {head.__name__}, not a linear layer"

    def cross_entropy_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (n, head width) at the supervised positions, labels (n,) int64 -> scalar in float32 or wider."""
        if self.fuses_head:
            head = self.model.get_output_embeddings()
            states = self.head_input(hidden).to(head.weight.dtype)
            return linear_cross_entropy(states, head.weight, labels, head.bias, self.softcap)
        logits = self.logits(hidden)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, reduction="sum")

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without any special token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def caption_ids(self, caption: str, max_tokens: int) -> list[int]:
        """Ids of one caption as `pack` wants them."""
        return self.framed(self.text_ids(caption), max_tokens)

    def all_caption_ids(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        """`caption_ids` of many captions, tokenised thousands at a time (ten times as fast)."""
        found: list[list[int]] = []
        for at in range(0, len(captions), TOKENIZE_AT_ONCE):
            chunk = self.tokenizer(list(captions[at : at + TOKENIZE_AT_ONCE]), add_special_tokens=False)["input_ids"]
            found += [self.framed(ids, max_tokens) for ids in chunk]
        return found

    @abstractmethod
    def framed(self, ids: list[int], max_tokens: int) -> list[int]:
        """A caption's ids, cut to `max_tokens` and framed as `pack` wants them."""

    @abstractmethod
    def pack(
        self,
        groups: list[Group],
        data: TokenisedCaptions,
        queries: int,
        *,
        row_tokens: int,
        rows_per_batch: int,
        fixed_shape: bool = False,
        split_seed: int | None = None,
    ) -> Sequence[Batch]:
        """The groups of an update as micro-batches; `split_seed` (encoder-decoders, in training): split captions at random words."""

    @abstractmethod
    def loss_sum(self, prompts: Tensor, batch: Any) -> Tensor:
        """prompts (G, Q, W) of `batch.groups` -> scalar in float32 or wider, cross-entropy summed over `batch.target_count` targets."""

    @abstractmethod
    def generate_ids(self, prompts: Tensor, texts: Sequence[str], settings: Generation) -> Tensor:
        """prompts (B, Q, W), texts B strings ("" for a caption) -> (B, new tokens) int64, padded after the end."""

    @torch.no_grad()
    def generate(self, prompts: Tensor, texts: Sequence[str], settings: Generation) -> list[str]:
        """One answer an image, as text without special tokens; it ends at EOS or, where captions do, at a newline."""
        ids = self.generate_ids(prompts, texts, settings)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def generation_config(self, settings: Generation, **more: Any) -> GenerationConfig:
        """transformers' settings for ours."""
        config = GenerationConfig(
            do_sample=False, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None, length_penalty=settings.length_penalty if settings.num_beams > 1 else None,
            pad_token_id=self.special.pad, eos_token_id=self.ends, use_cache=True, **more,
        )  # fmt: skip
        return config


class prompt_counts_in_beam_score:
    """Inside, a beam's score is its log-probability over (prompt + generated tokens, the end token not counted)^length_penalty, as in the
    library version that the authors used; transformers today divides by the generated length alone, end token included.

    prompt_tokens: length of the text prompt, BOS included.  ends: ids of end tokens.
    """

    def __init__(self, model: PreTrainedModel, prompt_tokens: int, ends: Sequence[int]):
        self.model, self.prompt_tokens, self.ends = model, prompt_tokens, ends

    def __enter__(self) -> None:
        finished, heuristic = self.model._update_finished_beams, self.model._check_early_stop_heuristic

        def update(
            *, topk_running_sequences: Tensor, topk_log_probs: Tensor, cur_len: int, decoder_prompt_len: int, length_penalty: float, **more: Any
        ) -> Any:  # fmt: skip
            start = decoder_prompt_len - self.prompt_tokens
            length = cur_len + 1 - start
            newest = topk_running_sequences[:, :, cur_len]
            ended = torch.isin(newest, torch.tensor(self.ends, device=newest.device))
            factor = (length / max(length - 1, 1)) ** length_penalty
            return finished(
                topk_running_sequences=topk_running_sequences, topk_log_probs=torch.where(ended, topk_log_probs * factor, topk_log_probs),
                cur_len=cur_len, decoder_prompt_len=start, length_penalty=length_penalty, **more,
            )  # fmt: skip

        def check(*arguments: Any, decoder_prompt_len: int, **more: Any) -> Any:
            return heuristic(*arguments, decoder_prompt_len=decoder_prompt_len - self.prompt_tokens, **more)

        self.model._update_finished_beams, self.model._check_early_stop_heuristic = update, check

    def __exit__(self, *_: object) -> None:
        del (
            self.model._update_finished_beams,
            self.model._check_early_stop_heuristic,
        )  # the class's own methods show again


def special_tokens(tokenizer: PreTrainedTokenizerBase, path: str = "", newline: bool = True) -> SpecialTokens:
    """BOS, EOS, pad and newline of a tokenizer; pad falls back to EOS as LLaMA's does, BOS to EOS as Qwen's does.

    Raises ModelError when there is no EOS, or when `newline` is asked for and is not one token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"tokenizer: expected an eos token, got none in {path!r}; set eos_token in its tokenizer_config.json"
        )
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not newline:
        return SpecialTokens(bos, eos, pad, eos)
    # Sentencepiece puts a word-boundary mark before a lone newline, so only the last id is the newline itself.
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids[-1:]) if ids else ""
    if not ids or "\n" not in text:
        raise ModelError(
            f"tokenizer: expected a token for the newline that ends a caption, got {text!r} in {path!r}; add one"
        )
    return SpecialTokens(bos, eos, pad, ids[-1])


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = "") -> LanguageModel:
    """The adapter of a model that is already in memory."""
    from .causal import CausalLanguageModel
    from .seq2seq import Seq2SeqLanguageModel

    return (Seq2SeqLanguageModel if model.config.is_encoder_decoder else CausalLanguageModel)(model, tokenizer, path)


def check_complete(report: dict[str, Any], name: str) -> None:
    """ModelError naming tensors that a folder lacks, which transformers would fill with random numbers."""
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} tensors of the model are not in its files, first {', '.join(missing[:3])}; download the folder again"
        )


def load_language_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32, check: bool = True
) -> LanguageModel:
    """Load a local folder or a hub id through transformers, `auto`: in its stored dtype; never runs remote code.

    Raises ModelError when the folder is missing, is no language model, or breaks the adapter's contract.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    name = str(path)
    disable_progress_bar()  # its bars and ours would write over each other
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, report = kind.from_pretrained(
            name, dtype=dtype, attn_implementation=attention_of(config), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except LOAD_ERRORS as error:
        raise ModelError(f"llm: expected a language model folder or hub id, got {name!r}: {error}") from error
    check_complete(report, name)
    language_model = wrap(model, tokenizer, name)
    if check:
        language_model.check_contract()
    return language_model


def load_tokenizer_only(path: str | Path) -> LanguageModel:
    """A language model without weights, for what needs its tokenizer and sizes alone; raises ModelError as `load_language_model`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    name = str(path)
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, attn_implementation=attention_of(config))
        return wrap(model, AutoTokenizer.from_pretrained(name), name)
    except LOAD_ERRORS as error:
        raise ModelError(f"llm: expected a language model folder or hub id, got {name!r}: {error}") from error


def attention_of(config: Any) -> str:
    """The attention implementation for a model: sdpa, but eager where scores are soft-capped (Gemma 2) or T5's bias is added."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.is_encoder_decoder else "sdpa"
