"""Recipes: typed, closed, and checked before anything heavy is imported.

A recipe is one YAML file; `section.key=value` on the command line overrides it (list items by index: `stages.0.learning_rate=1e-4`).
Relative paths in a file are relative to that file, those of an override to the working directory, so a recipe runs from anywhere.
`kind` says what the recipe makes: `transfer` (a vision-language model, the default) or one of the parts, `lm`, `vision` and `vpg`.
This module imports neither torch nor transformers, so that a mistake is reported in well under a second.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]


class _FromFile(str):
    """A string of a recipe file, which remembers the folder that relative paths start from."""

    folder: Path


def _resolve(value: Any) -> Any:
    return Path(os.path.normpath(value.folder / value)) if isinstance(value, _FromFile) else value


def _resolve_or_hub(value: Any) -> Any:
    """A path when it is written as one (`./`, `../`, `/`), otherwise a hub id."""
    if not isinstance(value, str) or not value.startswith((".", "/")):
        return value
    return os.path.abspath(_resolve(value))


def _resolve_existing_or_hub(value: Any) -> Any:
    """A path, unless it reads as `owner/name`, names no weight file and is not there: then a hub id."""
    if not isinstance(value, str):
        return value
    local = Path(_resolve(value)).absolute()
    reads_as_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and local.suffix not in WEIGHT_SUFFIXES
    return str(value) if reads_as_id and not local.exists() else local


WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
RecipePath = Annotated[Path, BeforeValidator(_resolve)]


class RecipeError(ValueError):
    """A recipe that cannot be used; the command line prints the message and exits with code 2."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(_Section):
    """AdamW as in the authors' code: no decay on parameters with fewer than two dimensions."""

    implementation: Literal["fused", "apex"] = Field(
        "fused", description="fused: torch's; apex: FusedAdam of NVIDIA's apex, where it is installed (a GPU only)"
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: float = Field(0.05, ge=0.0)
    clip_norm: float | None = Field(None, gt=0.0, description="global gradient-norm limit; the reference has none")


def _resolve_pattern(value: Any) -> Any:
    """A path, or a string where the name is a pattern (`{00000..00010}.tar`, `*.tar`), which no single file has to match."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected a file, a folder or a pattern, got {value!r}")
    path = Path(_resolve(value))
    return str(path) if set(value) & set("{*?[") and not path.exists() else path


class ImageData(_Section):
    """One captioned data set, in any of the formats of `engine/data/formats.py`."""

    name: str = Field("train", pattern=r"^[A-Za-z0-9_.-]+$")
    captions: Annotated[Path | str, BeforeValidator(_resolve_pattern)] = Field(
        description="the caption file; a tar, a folder of tars or a pattern (laion_coco); the alignment folder (minigpt4); the folder of a packed set"
    )
    images: RecipePath | None = Field(
        None,
        description="folder that image names start at; none for tars and packed sets, and for minigpt4's own `image`",
    )
    format: Literal["auto", "coco", "karpathy", "visual_genome", "sbu", "laion_coco", "nocaps", "minigpt4", "pack"] = (
        Field("auto", description="auto: recognised by the file's shape; pack: what vpgtrans pack has written")
    )
    split: Literal["train", "val", "test"] | None = Field(
        None, description="of Karpathy's own file, which holds all three; train includes restval"
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        description="share of pairs when sets are mixed; none: sets are joined and each image comes once an epoch",
    )
    skip: NonNegative = Field(0, description="leave out the first N images")
    limit: Positive | None = Field(None, description="use at most N images after those skipped")
    transform: Literal["train", "eval"] | None = Field(
        None, description="of this set's images; default: data.transform"
    )
    style: Literal["caption", "conversation"] = Field(
        "caption",
        description="caption: [visual][bos][caption][newline]; conversation: [bos]###Human: [visual] instruction ###Assistant: answer###",
    )
    instructions: list[str] | None = Field(
        None,
        min_length=1,
        description="conversation only: one is drawn for each answer; default: requests to describe the image",
    )
    max_text_tokens: Positive | None = Field(
        None,
        description="of this set; default: data.max_text_tokens for captions; for conversations 160, answer and ###, as in the authors' code",
    )

    @model_validator(mode="after")
    def _fits_its_style(self) -> ImageData:
        if self.instructions is not None and self.style != "conversation":
            raise ValueError(f"instructions: expected none for style {self.style}; set style to conversation")
        for index, instruction in enumerate(self.instructions or []):
            if not instruction.strip() or "###" in instruction:
                raise ValueError(
                    f"instructions.{index}: expected some text without '###', which ends a turn, got {instruction!r}"
                )
        return self

    @model_validator(mode="after")
    def _has_images(self) -> ImageData:
        is_json = isinstance(self.captions, Path) and self.captions.name.removesuffix(".gz").endswith(".json")
        own_folder = self.format in ("minigpt4", "laion_coco", "pack") or Path(self.captions).name == "filter_cap.json"
        if self.images is None and is_json and not own_folder:
            raise ValueError(f"images: expected the folder of images that {self.captions} names, got nothing")
        return self


class TransferData(_Section):
    train: list[ImageData] = Field(min_length=1)
    val: ImageData
    captions_per_image: Literal["all"] | Positive = "all"
    max_text_tokens: Positive = Field(32, description="BOS included, as in the authors' code")
    row_tokens: Positive = Field(512, description="token budget of one packed row")
    rows_per_micro_batch: Positive = 8
    transform: Literal["train", "eval"] = "train"
    views: Positive = Field(
        1, description="stored augmented views an image when the vision cache is on and transform is 'train'"
    )
    prefetch_batches: NonNegative = Field(
        4,
        description="micro-batches packed and decoded ahead by a thread; 0 for none; what is trained does not depend on it",
    )
    order: Literal["random", "quasi_random", "sequential"] = Field(
        "random",
        description="of the images in an epoch; quasi_random keeps neighbours of a file near each other, for packed sets on slow disks",
    )
    vision_cache: bool = Field(
        False, description="compute the frozen tower once an image (and view) and memory-map its outputs"
    )
    cache_fill: Literal["ahead", "first_epoch"] = Field(
        "ahead", description="of the vision cache: before training, or each row when it is first asked for"
    )
    cache_precision: Literal["compute", "fp8"] = Field(
        "compute",
        description="of what caches hold: compute is exact; fp8 (e4m3, one scale a token) takes half of bfloat16's disk and is not",
    )
    prompt_cache: Literal["auto"] | bool = Field(
        "auto",
        description="keep the outputs of the frozen Q-Former in stages that train the projector alone; auto: where that can be, and a stage would "
        "read at least a tenth of them again",
    )
    verify_images: Literal["none", "header", "full"] = Field(
        "full",
        description="full: decode every image once before training, so that none stops an epoch; header is quicker for large sets",
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="of training JPEGs: exact equals Pillow bit for bit; fast decodes at 1/2, 1/4 or 1/8 where the crop stays at least as "
        "large as the tower's input, and differs visibly where it does; validation images are always decoded exactly",
    )
    bad_images: Literal["fail", "skip"] = Field(
        "fail",
        description="an image that turns out to be unusable in training (damaged since it was checked): fail stops the run with its name; skip "
        "names it once and leaves its captions out of the loss, whose mean is then over the other targets of the update; its pairs count as "
        "dealt; more than 1 % of the images (and 8) stop the run",
    )
    loader: Literal["native", "ffcv"] = Field(
        "native",
        description="of training images: ffcv is FFCV's own Loader over packed sets, where it is installed (extra `ffcv`); it has no bicubic filter "
        "and no seeded crops, so that neither two runs nor a resumed one are exact; see engine/data/ffcv_loader.py",
    )

    @model_validator(mode="after")
    def _ffcv_can(self) -> TransferData:
        if self.loader == "native":
            return self
        for key, native in (("decode", "exact"), ("bad_images", "fail"), ("vision_cache", False)):
            if (value := getattr(self, key)) != native:
                raise ValueError(
                    f"{key}: expected {native!r}, because loader is 'ffcv', which has no such thing, got {value!r}"
                )
        if self.prompt_cache is True:
            raise ValueError("prompt_cache: expected auto or false, because loader is 'ffcv', got True")
        for index, entry in enumerate(self.train):
            if entry.format not in ("auto", "pack"):
                raise ValueError(
                    f"train.{index}.format: expected pack, because loader is 'ffcv', got {entry.format!r}; pack it with `vpgtrans pack`, or set "
                    "loader to native"
                )
        return self


class Vision(_Section):
    """The frozen tower.  What does not exist yet and reads as `owner/name` is a hub id; a folder to be is written `./folder`."""

    kind: Literal["eva_vit", "clip_vit", "hf", "mobilenet_v2"] = Field(
        description="eva_vit: BLIP-2's ViT, from a BLIP-2 folder, hub id or LAVIS .pth file; hf: any vision model that transformers' AutoModel knows"
    )
    path: Annotated[Path | str, BeforeValidator(_resolve_existing_or_hub)] = Field(
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


class QFormerConfig(_Section):
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


class Target(_Section):
    llm: Annotated[str, BeforeValidator(_resolve_or_hub)] = Field(
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


SourcePath = Annotated[Path | str, BeforeValidator(_resolve_existing_or_hub)]


class Source(_Section):
    """What the VPG and the projector come from: a finished run, an export, a Hugging Face BLIP-2 (folder or hub id), or a LAVIS .pth."""

    vlm: SourcePath | None = Field(None, description="the vision-language model to inherit from")
    vpg: SourcePath | None = Field(None, description="an image-text pre-trained VPG, where TFS starts")
    llm: Annotated[str, BeforeValidator(_resolve_or_hub)] | None = Field(
        None, description="the language model of `vlm`, where it does not name or hold one (LAVIS .pth files)"
    )
    files: list[RecipePath] = Field(
        default_factory=list,
        description="more checkpoint files of `vlm`: the projector of a LAVIS model kept apart, say",
    )


class Converter(_Section):
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


class Stage(_Section):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    trains: Literal["projector", "vpg_and_projector"]
    data: list[str] | None = Field(None, description="names of the training sets of this stage; default: all")
    learning_rate: Rate
    schedule: Literal["constant", "cosine"] = "constant"
    min_learning_rate: float = Field(0.0, ge=0.0)
    warmup_pairs: NonNegative = 0
    warmup_learning_rate: float = Field(1e-6, ge=0.0, description="rate at which a warm-up starts")
    epochs: float | None = Field(None, gt=0.0)
    pairs: Positive | None = None
    batch_pairs: Positive = Field(1728, description="pairs in one update, over all ranks and micro-batches")
    frozen_dropout: bool = Field(
        False, description="the reference runs frozen parts with dropout on; off allows their outputs to be reused"
    )
    optimizer: Optimizer = Optimizer()
    eval_every_pairs: Positive | None = None
    patience: Positive | None = Field(
        None, description="end the stage after this many evaluations without a better validation score"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.epochs is None) == (self.pairs is None):
            raise ValueError("epochs, pairs: expected exactly one of the two")
        return self


class Initialise(_Section):
    """Where the parts that will train come from; the five arms of the paper are choices of these two and of the stages."""

    vpg: Literal["vlm", "vpg", "random"] = "vlm"
    projector: Literal["converter", "vlm", "random"] = "converter"


class Generation(_Section):
    """Defaults are the reference's for captions (LAVIS's COCO configuration)."""

    num_beams: Positive = 5
    max_new_tokens: Positive = 30
    min_new_tokens: NonNegative = Field(7, description="the reference's minimum length of 8 counts BOS")
    length_penalty: float = 1.0
    beam_score: Literal["generated", "prompt_and_generated"] = Field(
        "generated",
        description="length that divides a beam's score; the library version of the reference counted the text prompt too",
    )


class Evaluation(_Section):
    batch_images: Positive = 32
    generate: Generation = Generation()
    loss_images: Positive | None = Field(
        None, description="validation images, from the first, whose captions give the loss; default: all"
    )
    generate_images: NonNegative = Field(
        200, description="validation images captioned and scored at the end; 0 for none"
    )
    generate_every_pairs: Positive | None = Field(
        None, description="also score captions during training, for score curves"
    )
    questions: RecipePath | None = Field(None, description="official VQA questions of the validation images")
    answers: RecipePath | None = None
    question_prompt: str | None = Field(
        None, description="`{}` stands for the question; default: the reference's, by the kind of language model"
    )
    attributes: bool = Field(False, description="miniature world only: share of captions with every attribute right")
    select: Literal["val_loss", "cider"] = Field("val_loss", description="score by which the best checkpoint is kept")
    samples: NonNegative = 12

    @model_validator(mode="after")
    def _both_files(self) -> Evaluation:
        if (self.questions is None) != (self.answers is None):
            raise ValueError("questions, answers: expected both or neither")
        if self.question_prompt is not None and "{}" not in self.question_prompt:
            raise ValueError(f"question_prompt: expected {{}} where the question goes, got {self.question_prompt!r}")
        return self


class Output(_Section):
    folder: RecipePath
    checkpoint_every_pairs: Positive | None = None
    keep_checkpoints: Positive = 2
    log_every_updates: Positive = 10
    max_skipped_updates: Positive = Field(5, description="stop after this many non-finite updates in a row")
    tensorboard: bool = True
    wandb: str | None = Field(
        None,
        min_length=1,
        description="name of a Weights & Biases project to send the log to as well; needs the package `wandb`",
    )
    cache: RecipePath | None = Field(
        None, description="vision caches and token tables, keyed by content; default: `cache` beside output.folder"
    )


class Guards(_Section):
    """What keeps a run from losing work or going wrong unseen."""

    deterministic: bool = Field(
        False,
        description="only algorithms that give the same bits every time; without it two runs on the CPU with one thread agree anyway, on a GPU "
        "they may not. Its cost on the CPU cannot be told from noise (demo: 0.96 to 1.02 of the processor time); on a GPU it was not measured",
    )
    timeout_s: Positive = Field(600, description="of a collective, after which a run names where each rank stands")
    heartbeat_s: Rate = Field(5.0, description="how often each rank writes where it is into output.folder/ranks/")
    background_saves: bool = Field(
        True,
        description="checkpoints are copied to host memory, then written while training goes on; at most one at a time",
    )
    spike_deviations: Rate | None = Field(
        8.0,
        description="report a loss this many running deviations (and a fifth) above the median of 100 updates; none: no reports",
    )


class _Recipe(_Section):
    name: str
    inputs_from: str | None = Field(
        None, description="the command that makes the input files; named when one is missing"
    )
    seed: NonNegative = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on the CPU")
    threads: Positive | None = Field(None, description="CPU threads of a process; default: torch's")
    output: Output


class Kernels(_Section):
    """Operations of kernels/ in place of torch's; auto: those that were measured to pay on a GPU (none yet)."""

    prefix_attention: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="attention to packed rows that skips what a caption does not see; torch: sdpa behind a dense mask",
    )
    qformer_attention: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="the Q-Former's cross-attention in the form that costs least, tokens cast and normalised once; also on the CPU",
    )
    projector_converter: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="the projector writes soft prompts straight into the packed rows (before prompt_assembly, where both are on)",
    )
    prompt_assembly: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="words and soft prompts written once into the packed rows; torch: a copy of the words, overwritten",
    )
    linear_cross_entropy: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="loss behind the frozen head by chunks, without all logits in memory; torch: its cross-entropy",
    )
    adamw_step: Literal["auto", "kernel", "torch"] = Field(
        "auto", description="norm, finite check, clipping and AdamW in three launches; torch: its fused AdamW"
    )
    frozen_linear: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="frozen linears of tower and language model in FP8 (not exact; compute capability 9.0); torch: the compute dtype",
    )


class Step(_Section):
    """How an update is executed, the same result within rounding; auto: where it was measured to pay (nowhere yet, benches/LOG.md)."""

    compile: Literal["auto"] | bool = Field(
        "auto", description="blocks of tower, Q-Former and language model through torch.compile"
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto", description="the language model's pass over full micro-batches of packed rows, captured (CUDA only)"
    )


class Distribution(_Section):
    """What each rank of a run with several keeps; on one process nothing changes.  Any setting may differ from that of the run that is resumed."""

    frozen: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="blocks of language model and tower; auto: whole on each GPU where plan's memory model says that everything fits, else in pieces "
        "over the ranks, gathered block by block (engine/distributed/frozen.py); on the CPU auto is replicated",
    )
    shard_over: Literal["world", "node"] = Field(
        "world",
        description="ranks that share one copy of sharded blocks: all, or those of a node, so that gathers stay inside it",
    )
    cpu_offload: bool = Field(
        False,
        description="keep a rank's pieces in the host's memory and copy each block for each use: a last resort; needs frozen: sharded",
    )
    optimizer: Literal["replicated", "sharded"] = Field(
        "replicated", description="AdamW's moments on each rank, or spread over the ranks; results are the same bits"
    )
    prefetch_blocks: NonNegative = Field(1, description="sharded blocks gathered ahead of the one that computes")

    @model_validator(mode="after")
    def _offloads_shards(self) -> Distribution:
        if self.cpu_offload and self.frozen != "sharded":
            raise ValueError(
                f"cpu_offload: expected false unless frozen is sharded, got true with frozen {self.frozen}"
            )
        return self


class TransferRecipe(_Recipe):
    kind: Literal["transfer"] = "transfer"
    arm: str = Field("vpgtrans", description="label by which a report groups runs")
    source: Source = Source()
    target: Target
    vision: Vision
    qformer: QFormerConfig | None = None
    initialise: Initialise = Initialise()
    converter: Converter = Converter()
    data: TransferData
    stages: list[Stage] = Field(min_length=1)
    loss_mean: Literal["global", "micro_batch"] = Field(
        "global",
        description="tokens of the whole update weigh alike; micro_batch: a mean of micro-batches' means, as in the authors' code",
    )
    evaluation: Evaluation = Evaluation()
    kernels: Kernels = Kernels()
    step: Step = Step()
    guards: Guards = Guards()
    distribution: Distribution = Distribution()
    attention: Literal["auto", "sdpa", "flex", "flash", "xformers"] = Field(
        "auto",
        description="of a decoder-only language model to packed rows; auto: as kernels.prefix_attention says; sdpa: torch's behind a dense mask; "
        "flex: torch's FlexAttention; flash, xformers: those packages, where they are installed (a GPU only)",
    )

    @model_validator(mode="after")
    def _one_implementation(self) -> TransferRecipe:
        """A kernel of ours and someone else's implementation of the same operation are not both asked for."""
        kernel = self.kernels.prefix_attention
        if self.attention != "auto" and kernel != "auto" and (self.attention, kernel) != ("sdpa", "torch"):
            raise ValueError(
                f"attention, kernels.prefix_attention: expected at most one of the two to be named, got {self.attention!r} and {kernel!r}; set one "
                "to auto"
            )
        if self.step.cuda_graphs is True and self.attention not in ("auto", "sdpa"):
            raise ValueError(
                f"attention, step.cuda_graphs: expected auto or sdpa with captured graphs, because other layouts of rows have another shape every "
                f"micro-batch, got {self.attention!r} and true; set one to auto"
            )
        for index, stage in enumerate(self.stages):
            if stage.optimizer.implementation == "apex" and self.kernels.adamw_step == "kernel":
                raise ValueError(
                    f"stages.{index}.optimizer.implementation, kernels.adamw_step: expected at most one of the two to be named, got 'apex' and "
                    "'kernel'; set implementation to fused, or adamw_step to auto"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TransferRecipe:
        needs_vlm = (
            "vlm" in (self.initialise.vpg, self.initialise.projector) or self.initialise.projector == "converter"
        )
        if needs_vlm and self.source.vlm is None:
            raise ValueError(
                "source.vlm: expected the run to inherit from, because initialise asks for it; got nothing"
            )
        if self.initialise.vpg == "vpg" and self.source.vpg is None:
            raise ValueError("source.vpg: expected a pre-trained VPG, because initialise.vpg is 'vpg'; got nothing")
        if self.initialise.vpg == "random" and self.qformer is None:
            raise ValueError("qformer: expected its sizes, because initialise.vpg is 'random'; got nothing")
        if len({s.name for s in self.stages}) != len(self.stages):
            raise ValueError("stages: expected distinct names")
        names = [s.name for s in self.data.train]
        if len(set(names)) != len(names):
            raise ValueError(f"data.train: expected distinct names, got {names}")
        for index, stage in enumerate(self.stages):
            if unknown := [n for n in stage.data or [] if n not in names]:
                raise ValueError(
                    f"stages.{index}.data: expected names of data.train ({', '.join(names)}), got {unknown[0]!r}"
                )
            chosen = [s.weight for s in self.data.train if s.name in (stage.data or names)]
            if any(chosen) and not all(chosen):
                raise ValueError(f"stages.{index}: expected a weight for all of its training sets or for none")
            if any(chosen) and stage.pairs is None:
                raise ValueError(f"stages.{index}.epochs: weighted sets have no common epoch; give the length in pairs")
        if self.data.transform == "eval" and any(s.transform == "train" for s in self.data.train):
            raise ValueError(
                "data.train: expected transform 'eval' or nothing, because data.transform is 'eval'; set data.transform to 'train' and "
                "the transform of the other sets to 'eval'"
            )
        if self.data.vision_cache and self.data.transform == "train" and "views" not in self.data.model_fields_set:
            raise ValueError(
                "data.vision_cache, data.transform: a cache of randomly transformed images needs data.views (stored views an image); "
                "set data.views, or data.transform=eval"
            )
        if self.data.views > 1 and not (self.data.vision_cache and self.data.transform == "train"):
            raise ValueError("data.views: expected 1 unless data.vision_cache is on and data.transform is 'train'")
        if self.data.cache_fill != "ahead" and not self.data.vision_cache:
            raise ValueError("data.cache_fill: expected 'ahead' unless data.vision_cache is on, got 'first_epoch'")
        if self.data.prompt_cache is True:
            faults = {s.name: self.prompt_cache_fault(s) for s in self.stages if s.trains == "projector"}
            if not faults:
                raise ValueError(
                    "data.prompt_cache: expected a stage with trains: projector, because a VPG that trains has nothing to keep; set it to auto"
                )
            for name, fault in faults.items():
                if fault:
                    raise ValueError(f"data.prompt_cache: cannot be on in the stage {name!r}: {fault}")
        return self

    @model_validator(mode="after")
    def _kernels_suit_the_distribution(self) -> TransferRecipe:
        if self.kernels.frozen_linear == "kernel" and self.distribution.frozen == "sharded":
            raise ValueError(
                "kernels.frozen_linear, distribution.frozen: FP8 linears cannot be sharded, got kernel and sharded; set frozen_linear to torch, or "
                "frozen to replicated"
            )
        if self.kernels.adamw_step == "kernel" and self.distribution.optimizer == "sharded":
            raise ValueError(
                "kernels.adamw_step, distribution.optimizer: the kernel updates every parameter that has a gradient, got kernel and sharded; set "
                "adamw_step to torch, or optimizer to replicated"
            )
        for index, stage in enumerate(self.stages):
            if stage.optimizer.implementation == "apex" and self.distribution.optimizer == "sharded":
                raise ValueError(
                    f"stages.{index}.optimizer.implementation, distribution.optimizer: only torch's AdamW is sharded, got apex and sharded; set "
                    "implementation to fused, or optimizer to replicated"
                )
        return self

    def prompt_cache_fault(self, stage: Stage) -> str | None:
        """Why the outputs of the Q-Former cannot be kept in a stage, naming the settings; None where they can."""
        data = self.data
        if stage.trains != "projector":
            return f"the VPG trains (stages.{stage.name}.trains is {stage.trains!r})"
        if stage.frozen_dropout:
            return "frozen_dropout draws them anew each time; set frozen_dropout of the stage to false, or data.prompt_cache to auto"
        if data.loader == "ffcv":
            return "data.loader is 'ffcv', whose views cannot be had again"
        if data.vision_cache:
            return None
        random = [
            e.name
            for e in data.train
            if e.name in (stage.data or [e.name]) and (e.transform or data.transform) == "train"
        ]
        if random:
            return (
                f"data.transform 'train' draws a new view of {', '.join(random)} each epoch; set data.vision_cache with data.views, or "
                "data.transform=eval"
            )
        return None


class TextData(_Section):
    """Documents that tell one scene several times: the captions of an image, then questions about it."""

    captions: RecipePath
    questions: RecipePath | None = None
    answers: RecipePath | None = None
    val_images: Positive = Field(200, description="this many images' captions are kept for validation")
    captions_per_document: tuple[Positive, Positive] = (2, 5)
    questions_per_document: tuple[NonNegative, NonNegative] = (0, 0)
    bos_between_captions: Fraction = Field(
        0.5, description="share of captions inside a document that begin with BOS, as after a visual prompt"
    )
    repeat_captions: Fraction = Field(
        0.0, description="chance that the next caption repeats one verbatim: copying is learned from it first"
    )
    max_text_tokens: Positive = 32


class TrainTokenizer(_Section):
    min_frequency: Positive = 1
    max_words: Positive = 8192


class PretrainSchedule(_Section):
    steps: Positive
    batch: Positive = Field(description="documents (lm) or images (vision, vpg) in one update")
    learning_rate: Rate
    min_learning_rate: float = Field(0.0, ge=0.0)
    warmup_steps: NonNegative = 50
    optimizer: Optimizer = Optimizer(betas=(0.9, 0.98), clip_norm=1.0)
    eval_every_steps: Positive = 200


class LMRecipe(_Recipe):
    kind: Literal["lm"]
    tokenizer: TrainTokenizer | RecipePath
    trim_vocabulary: NonNegative = Field(
        0,
        description="keep only tokens that occur this often in the corpus (0: all); the real ids stay in real_ids.json",
    )
    model: dict[str, Any] = Field(
        description="a transformers config: model_type and its sizes; vocabulary and special ids are filled in"
    )
    data: TextData
    schedule: PretrainSchedule


class PairedData(_Section):
    train: list[ImageData] = Field(min_length=1)
    val: ImageData
    max_text_tokens: Positive = 32
    transform: Literal["train", "eval"] = "eval"
    vision_cache: bool = Field(True, description="vpg only: compute the frozen tower once an image")
    views: Positive = 1
    verify_images: Literal["none", "header", "full"] = Field(
        "full",
        description="full: decode every image once before training, so that none stops an epoch; header is quicker for large sets",
    )

    @model_validator(mode="after")
    def _captions_only(self) -> PairedData:
        if any(entry.style != "caption" or entry.transform is not None for entry in (*self.train, self.val)):
            raise ValueError(
                "train, val: expected plain captions and one transform for all, got a style or a transform of one set"
            )
        return self


class VisionRecipe(_Recipe):
    """A small ViT trained by captioning through cross-attention (CapPa, arXiv 2306.07915); the decoder is dropped."""

    kind: Literal["vision"]
    tokenizer: TrainTokenizer | RecipePath
    model: dict[str, Any] = Field(description="sizes of a Blip2VisionConfig")
    decoder_layers: Positive = 2
    data: PairedData
    schedule: PretrainSchedule


class VPGRecipe(_Recipe):
    """BLIP-2's first step: contrastive, matching and captioning losses on the Q-Former over a frozen tower (arXiv 2301.12597)."""

    kind: Literal["vpg"]
    tokenizer: TrainTokenizer | RecipePath
    vision: Vision
    qformer: QFormerConfig
    losses: list[Literal["contrastive", "matching", "captioning"]] = ["contrastive", "captioning"]
    projection_size: Positive = 256
    data: PairedData
    schedule: PretrainSchedule


Recipe = TransferRecipe | LMRecipe | VisionRecipe | VPGRecipe
_KINDS: dict[str, type[_Recipe]] = {
    "transfer": TransferRecipe,
    "lm": LMRecipe,
    "vision": VisionRecipe,
    "vpg": VPGRecipe,
}


def load_recipe(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    kinds: tuple[str, ...] | None = None,
    check_files: bool = True,
    keep_unset_variables: bool = False,
) -> Recipe:
    """Read, override and validate a recipe, and check that every file that it names as an input exists.

    overrides: `section.key=value`, values in YAML.  kinds: the kinds that the caller can run.  check_files: false for a plan whose inputs are
    still to be made.  keep_unset_variables: `${NAME}` of an unset variable stays as text, for a dry run, which opens no file.
    Raises RecipeError with one message: the key, what was expected, what came, and the nearest valid key.
    """
    values = _read_yaml(Path(path))
    for override in overrides:
        _apply(values, override)
    kind = values.get("kind", "transfer")
    if kind not in _KINDS or (kinds and kind not in kinds):
        expected = ", ".join(kinds or tuple(_KINDS))
        raise RecipeError(f"{path}: kind: expected one of {expected}, got {kind!r}")
    try:
        recipe = _KINDS[kind].model_validate(_expand(values, "", keep_unset_variables))
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "\n".join(_explain(e, _KINDS[kind]) for e in error.errors())) from None
    if check_files:
        _check_files(recipe, str(path))
    return recipe  # type: ignore[return-value]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default included, as YAML that `load_recipe` reads back."""
    temporary = path.with_name(f".{path.name}.tmp")  # other ranks, and runs that follow, read it at any time
    temporary.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    temporary.replace(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1
        )
        raise RecipeError(
            f"{path}: expected a recipe file, found none" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: expected YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping of sections at the top, got {type(values).__name__}")
    values = _mark(values, path.parent)
    if "extends" in values:
        base = path.parent / str(values.pop("extends"))
        return _merge(_read_yaml(base), values)
    return values


def _mark(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _mark(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_mark(v, folder) for v in value]
    if isinstance(value, str):
        marked = _FromFile(value)
        marked.folder = folder.absolute()
        return marked
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if key == "target" and isinstance(value, dict) and "llm" in value and isinstance(merged.get(key), dict):
            merged[key] = {k: v for k, v in merged[key].items() if k != "config"}  # sizes of another model
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: expected a YAML value: {error}") from None
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    node: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"override {override!r}: {where} holds {node!r}, which has no keys inside")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value
        if key == "target.llm":  # its sizes were those of another model
            node.pop("config", None)


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"override {where}: expected a number from 0 to {len(items) - 1}, got {part!r}")
    return int(part)


def _expand(value: Any, where: str, keep_unset: bool = False) -> Any:
    """`${NAME}` in strings becomes the environment variable NAME; unset ones stay as they are where `keep_unset`."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}".lstrip("."), keep_unset) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{where}.{i}", keep_unset) for i, v in enumerate(value)]
    if isinstance(value, str):
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name not in os.environ:
                if keep_unset:
                    continue
                raise RecipeError(
                    f"{where}: expected the environment variable {name} (in {value!r}), which is not set; set it or override {where}"
                )
            expanded = value.replace(f"${{{name}}}", os.environ[name])
            if isinstance(value, _FromFile):
                expanded = _FromFile(expanded)
                expanded.folder = value.folder
            value = expanded
    return value


def _explain(error: Any, model: type[BaseModel]) -> str:
    location = [
        p
        for p in error["loc"]
        if not isinstance(p, str) or p not in ("TrainTokenizer", "path", "constrained-int") or p == error["loc"][0]
    ]
    key = ".".join(str(p) for p in location)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: expected a value, got nothing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {error['input']!r}"


def _keys_at(model: Any, location: list[Any]) -> list[str]:
    """The field names of the section that `location` leads to."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        sections = [] if field is None else list(_sections(field.annotation))
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _sections(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


def _check_files(recipe: Any, where: str) -> None:
    """Every path that names an input must exist now, not an hour into the run."""
    for key, value in missing_files(recipe):
        near = difflib.get_close_matches(
            value.name, [p.name for p in value.parent.iterdir()] if value.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {value.parent / near[0]}?" if near else ""
        if recipe.inputs_from:
            hint = f"; make it with `{recipe.inputs_from}`"
        raise RecipeError(f"{where}: {key}: expected an existing file or folder, found none at {str(value)!r}{hint}")


def missing_files(recipe: Any) -> list[tuple[str, Path]]:
    """The inputs of a recipe that are not on this machine: (key, path)."""
    return [(k, path) for k, path in _paths(recipe, "") if not k.startswith("output.") and not path.exists()]


def _paths(section: Any, where: str) -> typing.Iterator[tuple[str, Path]]:
    if isinstance(section, Path):
        yield where, section
    elif isinstance(section, BaseModel):
        for name in type(section).model_fields:
            yield from _paths(getattr(section, name), f"{where}.{name}".lstrip("."))
    elif isinstance(section, str) and where in ("target.llm", "source.llm") and section.startswith("/"):
        yield where, Path(section)
    elif isinstance(section, (list, tuple)):
        for index, item in enumerate(section):
            yield from _paths(item, f"{where}.{index}")
