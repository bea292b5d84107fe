"""`kind: transfer`: a vision-language model out of another one's visual prompt generator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .data import TransferData
from .models import Converter, QFormerConfig, Source, Target, Vision
from .training import Distribution, Evaluation, Guards, Initialise, Kernels, RecipeOfAnyKind, Stage, Step


class TransferRecipe(RecipeOfAnyKind):
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
