"""`vision`, `qformer`, `target`, `source` and `converter`: what a vision-language model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .values import Fraction, Positive, Rate, RecipePath, Section, SourcePath, resolve_existing_or_hub, resolve_or_hub


class Vision(Section):
    """The frozen tower.  What does not exist yet and reads as `owner/name` is a hub id; a folder to be is written `./folder`."""

    kind: Literal["eva_vit", "clip_vit", "hf", "mobilenet_v2"] = Field(
        description="eva_vit: BLIP-2's ViT, from a BLIP-2 folder, hub id or LAVIS .pth file; hf: any vision model that transformers' AutoModel knows"
    )
    path: Annotated[Path | str, BeforeValidator(resolve_existing_or_hub)] = Field(
        description="folder, weight file or hub id"
    )
    image_size: Positive | None = Field(None, description="pixels a side; default: the tower's own")
    blocks: Positive | None = Field(
        None,
        description="clip_vit only: keep this many blocks; the authors' code keeps 21, LAVIS 23; default: all but the last (arXiv 2301.12597)",
    )
    architecture: Literal["eva_vit_g", "clip_vit_l"] | None = Field(
        None, description="sizes known without reading `path`: what a dry run without weights needs"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="sizes of a transformers vision config, for what `architecture` does not name; hf needs model_type",
    )
    mean: tuple[float, float, float] | None = Field(None, description="of pixels in 0..1; default: the tower's own")
    std: tuple[Rate, Rate, Rate] | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Vision:
        if self.kind == "mobilenet_v2" and isinstance(self.path, str):
            raise ValueError(
                f"path: expected an existing local folder for kind mobilenet_v2, found none at {self.path!r}"
            )
        if self.blocks is not None and self.kind != "clip_vit":
            raise ValueError(f"blocks: expected nothing for kind {self.kind}, got {self.blocks}; only clip_vit is cut")
        kinds = {"eva_vit_g": "eva_vit", "clip_vit_l": "clip_vit"}
        if self.architecture is not None and kinds[self.architecture] != self.kind:
            raise ValueError(
                f"architecture: {self.architecture} belongs to kind {kinds[self.architecture]}, got {self.kind}"
            )
        if self.architecture is not None and self.config is not None:
            raise ValueError("architecture, config: expected at most one of the two")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: expected both or neither")
        return self


class QFormerConfig(Section):
    """Used when there is no source to inherit from; an inherited Q-Former brings its own."""

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    cross_attention_frequency: Positive = 2
    num_query_tokens: Positive = 32
    dropout: Fraction = Field(0.1, description="hidden and attention dropout while the Q-Former trains")
    layer_norm_eps: Rate = 1e-12
    initializer_range: Rate = Field(
        0.02, description="deviation of random weights and query tokens; BERT's for width 768"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> QFormerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, got {self.num_attention_heads}"
            )
        return self


class Target(Section):
    llm: Annotated[str, BeforeValidator(resolve_or_hub)] = Field(
        description="folder or hub id of a language model, decoder-only or encoder-decoder"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="its sizes as a transformers config with model_type: what a dry run reads where the model is not on this machine",
    )

    @model_validator(mode="after")
    def _names_its_type(self) -> Target:
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(
                f"config: expected model_type (opt, llama, t5, ...) among the sizes, got {', '.join(self.config) or 'nothing'}"
            )
        return self


class Source(Section):
    """What the VPG and the projector come from: a finished run, an export, a Hugging Face BLIP-2 (folder or hub id), or a LAVIS .pth."""

    vlm: SourcePath | None = Field(None, description="the vision-language model to inherit from")
    vpg: SourcePath | None = Field(None, description="an image-text pre-trained VPG, where TFS starts")
    llm: Annotated[str, BeforeValidator(resolve_or_hub)] | None = Field(
        None, description="the language model of `vlm`, where it does not name or hold one (LAVIS .pth files)"
    )
    files: list[RecipePath] = Field(
        default_factory=list,
        description="more checkpoint files of `vlm`: the projector of a LAVIS model kept apart, say",
    )


class Converter(Section):
    """The word converter (arXiv 2305.01278, section 4): `ridge` closed form, `sgd_cosine` as in the paper, `identity` where embeddings agree."""

    method: Literal["ridge", "sgd_cosine"] = "ridge"
    held_out: Fraction = Field(
        0.1, description="share of the shared tokens kept for choosing the ridge and judging the converter"
    )
    ridges: list[Rate] = Field(default_factory=lambda: [10.0**k for k in range(-6, 4)])
    sgd_learning_rate: Rate = 5.0
    sgd_steps: Positive = 2000
    sgd_batch_tokens: Positive = 4096
    match_prompt_norm: bool = Field(
        True,
        description="scale the merged projector so that soft prompts keep their norm relative to words, which a ridge shrinks (docs/RESULTS.md)",
    )
