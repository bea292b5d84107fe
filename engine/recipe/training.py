"""Stages, their optimiser, evaluation, output, guards, kernels and the layout over ranks; and what recipes of every kind share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .values import NonNegative, Positive, Rate, RecipePath, Section


class Optimizer(Section):
    """AdamW as in the authors' code: no decay on parameters with fewer than two dimensions."""

    implementation: Literal["fused", "apex"] = Field(
        "fused", description="fused: torch's; apex: FusedAdam of NVIDIA's apex, where it is installed (a GPU only)"
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: float = Field(0.05, ge=0.0)
    clip_norm: float | None = Field(None, gt=0.0, description="global gradient-norm limit; the reference has none")


class Stage(Section):
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


class Initialise(Section):
    """Where the parts that will train come from; the five arms of the paper are choices of these two and of the stages."""

    vpg: Literal["vlm", "vpg", "random"] = "vlm"
    projector: Literal["converter", "vlm", "random"] = "converter"


class Generation(Section):
    """Defaults are the reference's for captions (LAVIS's COCO configuration)."""

    num_beams: Positive = 5
    max_new_tokens: Positive = 30
    min_new_tokens: NonNegative = Field(7, description="the reference's minimum length of 8 counts BOS")
    length_penalty: float = 1.0
    beam_score: Literal["generated", "prompt_and_generated"] = Field(
        "generated",
        description="length that divides a beam's score; the library version of the reference counted the text prompt too",
    )


class Evaluation(Section):
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


class Output(Section):
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


class Guards(Section):
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


class Kernels(Section):
    """Operations of kernels/ in place of torch's; auto: those that were measured to pay (on the CPU qformer_attention, on a GPU none yet)."""

    prefix_attention: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="attention to packed rows that skips what a caption does not see; torch: sdpa behind a dense mask",
    )
    qformer_attention: Literal["auto", "kernel", "torch"] = Field(
        "auto",
        description="the Q-Former's cross-attention in the form that costs least, tokens normalised once; auto: on the CPU, where latents pay",
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


class Step(Section):
    """How an update is executed, the same result within rounding; auto: where it was measured to pay (nowhere yet, benches/LOG.md)."""

    compile: Literal["auto"] | bool = Field(
        "auto", description="blocks of tower, Q-Former and language model through torch.compile"
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto", description="the language model's pass over full micro-batches of packed rows, captured (CUDA only)"
    )


class Distribution(Section):
    """What each rank of a run with several keeps; on one process nothing changes.  Any setting may differ from that of the run that is resumed:
    results differ by rounding, with `kernels.frozen_linear` by that of FP8."""

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


class RecipeOfAnyKind(Section):
    name: str
    inputs_from: str | None = Field(
        None, description="the command that makes the input files; named when one is missing"
    )
    seed: NonNegative = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on the CPU")
    threads: Positive | None = Field(None, description="CPU threads of a process; default: torch's")
    output: Output
