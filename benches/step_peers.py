"""What bench_step.py compares: the engine and three ways to train transformers' BLIP-2, each around the same random weights and the same pairs.

    transformers   Blip2ForConditionalGeneration in a plain loop: one row a pair, so that an image is encoded once for each of its captions, rows
                   padded to the longest, logits at all positions, frozen parts without gradient and in eval mode, SDPA, AdamW
    tuned          the same with the ViT under no_grad, fused AdamW, its blocks compiled where that is faster, and liger-kernel where installed
    reference      the same as `transformers`, with the authors' habits: frozen Q-Former and OPT in train mode, for their dropout, and a host sync
                   at every micro-step.  Their attention was not fused; here it is, and bf16 is granted too.
    engine         what engine/loop.py does for an update: captions of an image in one row behind one encoding, supervised positions only

Weights are float32 where they train and of the compute dtype where they are frozen; below float32 all compute under autocast.  The learning rate
is 0: AdamW does all its work and the weights stay as they are, so that the loss of any two steps can be compared.

A vision tower of CLIP's sizes comes in BLIP-2's layout (one product for query, key and value), which is the one that transformers' BLIP-2 has.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.util
import multiprocessing
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from loader_peers import memory_mib
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig, OPTConfig
from transformers.initialization import no_init_weights

from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.kernel_choice import use_kernels
from vpgtrans.engine.models.llm import wrap
from vpgtrans.engine.models.tower import CLIP_NORM, VisionTower
from vpgtrans.engine.models.vision import eva_vit
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import LN_VISION_EPS, VPG, VPGOutput
from vpgtrans.engine.optim import build_adamw
from vpgtrans.engine.planning.trace import count_flops
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.recipe import Kernels, Optimizer, QFormerConfig
from vpgtrans.engine.runtime import Runtime
from vpgtrans.kernels.adamw_step import adamw_step

STAGES = {1: "projector", 2: "vpg_and_projector"}
WEIGHT_DECAY = 0.05
FIRST_WORD = 8  # smaller ids are special


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, pairs of a step by kind of device, and the micro-batches that are tried: rows of a peer, (row tokens, rows) of the engine."""

    vision: dict[str, int | float | str]
    text: dict[str, int]
    family: str
    pairs: dict[str, int]
    peer_rows: dict[str, tuple[int, ...]]
    engine_rows: dict[str, tuple[tuple[int, int], ...]]
    qformer: dict[str, int] = field(default_factory=dict)


_VIT_G = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
    "hidden_act": "gelu",
}  # fmt: skip
_VIT_L = {
    **_VIT_G, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 21, "hidden_act": "quick_gelu",
}  # fmt: skip
_CUDA_ROWS: dict[str, Any] = {
    "pairs": {"cuda": 180},
    "peer_rows": {"cuda": (180, 90, 36)},
    "engine_rows": {"cuda": ((512, 16), (512, 8), (512, 4))},
}
SHAPES = {
    "vl_llama_7b": Shape(_VIT_G, {"vocab_size": 32000}, "llama", **_CUDA_ROWS),
    "blip2": Shape(
        _VIT_G, {"vocab_size": 50272, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                 "num_attention_heads": 32}, "opt", **_CUDA_ROWS,
    ),
    "exploration": Shape(
        _VIT_L, {"vocab_size": 50272}, "opt", {"cpu": 15, "cuda": 180}, {"cpu": (15, 5), "cuda": (180, 90, 36)},
        {"cpu": ((512, 8), (128, 8), (128, 1)), "cuda": ((512, 16), (512, 8), (512, 4))},
    ),
    "tiny": Shape(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
         "hidden_act": "gelu"},
        {"vocab_size": 200, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128},
        "opt", {"cpu": 10, "cuda": 10}, {"cpu": (10, 5), "cuda": (10,)}, {"cpu": ((128, 4), (64, 1)), "cuda": ((128, 4),)},
        {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "num_query_tokens": 8},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What every peer of a run shares."""

    shape: str
    device: str
    dtype: torch.dtype
    threads: int
    seed: int = 0

    @property
    def sizes(self) -> Shape:
        return SHAPES[self.shape]


def caption_lengths(count: int, seed: int) -> list[int]:
    """Tokens of captions with BOS and newline.

    OPT's tokenizer on 20,000 captions of COCO's validation set, cleaned: mean 13.1, deviation 2.6, 9 to 32, skewed to the right; so is this.
    """
    drawn = 9 + np.random.default_rng(seed).gamma(2.5, 1.65, count)
    return np.minimum(drawn.round(), 32).astype(int).tolist()


def make_captions(settings: Settings, captions_per_image: int) -> list[list[list[int]]]:
    """Ids of each caption of each image: the shape's pairs, dealt to images of so many captions; the captions are the same for any grouping."""
    shape = settings.sizes
    images = max(1, round(shape.pairs[settings.device] / captions_per_image))
    rng = np.random.default_rng(settings.seed)
    texts = [
        [1, *rng.integers(FIRST_WORD, shape.text["vocab_size"] - 1, length - 2).tolist(), 4]
        for length in caption_lengths(images * captions_per_image, settings.seed)
    ]
    return [texts[i * captions_per_image : (i + 1) * captions_per_image] for i in range(images)]


def make_pixels(settings: Settings, images: int) -> Tensor:
    side = settings.sizes.vision["image_size"]
    drawn = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(settings.seed))
    return drawn.to(settings.device)


def make_blip2(settings: Settings) -> Blip2ForConditionalGeneration:
    """transformers' model with random weights, the same ones wherever it is made."""
    shape = settings.sizes
    kind = LlamaConfig if shape.family == "llama" else OPTConfig
    qformer = QFormerConfig(**shape.qformer)
    config = Blip2Config(
        vision_config={**shape.vision, "layer_norm_eps": 1e-6, "attention_dropout": 0.0},
        qformer_config={
            "hidden_size": qformer.hidden_size, "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads, "intermediate_size": qformer.intermediate_size,
            "cross_attention_frequency": qformer.cross_attention_frequency, "encoder_hidden_size": shape.vision["hidden_size"],
            "hidden_dropout_prob": qformer.dropout, "attention_probs_dropout_prob": qformer.dropout,
        },
        text_config=kind(pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape.text).to_dict(),
        num_query_tokens=qformer.num_query_tokens, image_token_index=shape.text["vocab_size"] - 1,
    )  # fmt: skip
    with no_init_weights(), torch.device(settings.device):
        model = Blip2ForConditionalGeneration._from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    model.vision_model.post_layernorm.eps = LN_VISION_EPS
    trained = [model.qformer, model.language_projection, model.vision_model.post_layernorm]
    for module in trained:
        module.float()
    model.query_tokens.data = model.query_tokens.data.float()
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.normal_(1.0, 0.02, generator=generator)
            else:  # queries as large as BERT's after training, so that heads differ
                parameter.normal_(0.0, 0.5 if name == "query_tokens" else 0.02, generator=generator)
    return model.requires_grad_(False).eval()


class Peer(ABC):
    """One way to make an optimiser step.  `load` sets a stage and the pairs; then `check`, `step`, `flops` and `peak_mib` can be asked for."""

    sources = ("live",)  # where image features come from; the engine has stored ones too

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, torch.device(settings.device)
        self.runtime = Runtime(self.device, settings.dtype, 0, 1)
        self.optimizer: torch.optim.Optimizer | None = None
        self.modules: nn.Module

    @abstractmethod
    def load(self, stage: int, captions: int, **setting: Any) -> dict[str, Any]:
        """Set a stage and its pairs; what a row tells of the setting."""

    def train_mode(self) -> None:  # noqa: B027, nothing to set for some
        """Every part in the mode that it trains in."""

    @abstractmethod
    def accumulate(self, source: str) -> Tensor:
        """Gradients of the mean loss of all pairs; returns that mean."""

    @abstractmethod
    def watched(self) -> dict[str, Tensor | None]:
        """Gradients by which peers are compared."""

    def update(self, loss: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, source: str = "live", counts: bool = False) -> dict[str, float]:
        """Loss and norms of gradients, without dropout; weights stay as they are.

        Also `check_s`, the seconds it took, and where `counts` is set the FLOPs of its products and attentions as `flops`, a multiplication and an
        addition counted as two.
        """
        self.modules.eval()
        flops, began = 0.0, time.perf_counter()
        losses: list[Tensor] = []
        if counts:
            flops = count_flops(lambda: losses.append(self.accumulate(source)))
        else:
            losses.append(self.accumulate(source))
        found = {"loss": float(losses[0]), "check_s": time.perf_counter() - began, "flops": flops}
        found |= {name: float(g.double().norm()) for name, g in self.watched().items() if g is not None}
        self.optimizer.zero_grad(set_to_none=True)
        self.train_mode()
        return found

    def once(self, source: str) -> None:
        self.update(self.accumulate(source))

    def step(self, source: str = "live") -> tuple[float, float]:
        """Seconds of one step: by the clock, and of CPU time a thread."""
        return timed(lambda: self.once(source), self.settings)

    def peak_mib(self, source: str = "live") -> float:
        """Memory that a step takes beyond what lies there between steps: weights, AdamW's moments and the pairs; after a first step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.once(source)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before_mib = memory_mib("VmRSS")
        self.once(source)
        return memory_mib("VmHWM") - before_mib

    def moments_mib(self) -> float:
        """AdamW's moments."""
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        return 8 * trained / 2**20

    def rate(self, size: int) -> tuple[float, float]:
        """Seconds, as `step` has them, of a square matrix product of the compute dtype."""
        a, b = (torch.randn(size, size, device=self.device).to(self.settings.dtype) for _ in range(2))
        return timed(lambda: a @ b, self.settings)

    def free(self) -> None:
        """Give back what torch's allocator keeps, so that the next peer has it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def timed(run: Callable[[], object], settings: Settings) -> tuple[float, float]:
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, (time.process_time() - cpu) / (1 if on_gpu else settings.threads)


class Transformers(Peer):
    """transformers' BLIP-2, one pair a row."""

    kind = "transformers"

    def __init__(self, settings: Settings, base: Blip2ForConditionalGeneration | None = None):
        super().__init__(settings)
        self.model = self.modules = make_blip2(settings) if base is None else share(base)
        self.stage = 2
        self.adamw: dict[str, Any] = {}

    def load(self, stage: int, captions: int, rows: int = 0, **setting: Any) -> dict[str, Any]:
        """rows: pairs of a micro-batch, all of them where 0."""
        self.stage, model = stage, self.model
        model.requires_grad_(False)
        trained = [model.language_projection]
        if stage == 2:
            trained += [model.qformer, model.vision_model.post_layernorm]
        for module in trained:
            module.requires_grad_(True)
        model.query_tokens.requires_grad_(stage == 2)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=WEIGHT_DECAY, **self.adamw)
        texts = make_captions(self.settings, captions)
        pixels = make_pixels(self.settings, len(texts))
        pairs = [(image, ids) for image, captions_of in enumerate(texts) for ids in captions_of]
        rows = rows or len(pairs)
        self.batches = [self._batch(pairs[at : at + rows], pixels) for at in range(0, len(pairs), rows)]
        self.targets = sum(len(ids) for _, ids in pairs)
        slots = sum(b["input_ids"].numel() for b in self.batches)
        used = sum(int(b["attention_mask"].sum()) for b in self.batches)
        self.train_mode()
        return {"pairs": len(pairs), "padding": 1 - used / slots}

    def _batch(self, pairs: list[tuple[int, list[int]]], pixels: Tensor) -> dict[str, Tensor]:
        """Rows `[visual][caption]`, padded on the right to the longest; the image is one of each row's own."""
        queries, pad = self.model.config.num_query_tokens, 0
        width = queries + max(len(ids) for _, ids in pairs)
        ids = torch.full((len(pairs), width), pad)
        labels = torch.full((len(pairs), width), -100)
        ids[:, :queries] = self.model.config.image_token_index
        for row, (_, text) in enumerate(pairs):
            ids[row, queries : queries + len(text)] = labels[row, queries : queries + len(text)] = torch.tensor(text)
        return {
            "input_ids": ids.to(self.device), "attention_mask": (ids != pad).long().to(self.device), "labels": labels.to(self.device),
            "pixel_values": pixels[[image for image, _ in pairs]],
        }  # fmt: skip

    def train_mode(self) -> None:
        self.model.eval()
        if self.stage == 2:
            self.model.qformer.train()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, num_items_in_batch=self.targets).loss

    def accumulate(self, source: str) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch in self.batches:
            with self.runtime.autocast():
                loss = self.loss(batch)
            loss.backward()
            total += loss.detach()
        return total

    def watched(self) -> dict[str, Tensor | None]:
        model = self.model
        return {
            "projector": model.language_projection.weight.grad, "query tokens": model.query_tokens.grad,
            "ln_vision": model.vision_model.post_layernorm.weight.grad, "Q-Former, first block": first_query(model.qformer).grad,
        }  # fmt: skip


class Reference(Transformers):
    """With the authors' habits."""

    kind = "reference"

    def train_mode(self) -> None:
        self.model.train()
        self.model.vision_model.eval()

    def accumulate(self, source: str) -> Tensor:
        total = 0.0
        for batch in self.batches:
            with self.runtime.autocast():
                loss = self.loss(batch)
            loss.backward()
            total += loss.item()
        return torch.tensor(total)


class Tuned(Transformers):
    """As a good engineer would set it up."""

    kind = "tuned"

    def __init__(self, settings: Settings, base: Blip2ForConditionalGeneration | None = None):
        super().__init__(settings, base)
        self.adamw = {"fused": True}
        encoder = self.model.vision_model.encoder
        encoder.forward = torch.no_grad()(encoder.forward)
        self.fused_loss = None
        if settings.device == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model.language_model)
            self.fused_loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        self.model.language_model.requires_grad_(False)

    def load(self, stage: int, captions: int, rows: int = 0, compiled: bool = False, **setting: Any) -> dict[str, Any]:
        """compiled: torch.compile on every block of ViT, Q-Former and language model."""
        decoder = self.model.language_model.base_model
        blocks = [
            *self.model.vision_model.encoder.layers, *self.model.qformer.encoder.layer, *getattr(decoder, "decoder", decoder).layers,
        ]  # fmt: skip
        for block in blocks:
            block._compiled_call_impl = None
            if compiled:
                block.compile(dynamic=False)
        if compiled:
            torch._dynamo.config.recompile_limit = 8 * len(
                blocks
            )  # blocks of all parts share one entry point, and its limit
        return super().load(stage, captions, rows, **setting)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.fused_loss is None:
            return super().loss(batch)
        model, ids = self.model, batch["input_ids"]
        prompts = model.get_image_features(batch["pixel_values"]).pooler_output
        words = model.get_input_embeddings()(ids)
        places = (ids == model.config.image_token_index).unsqueeze(-1)
        inputs = words.masked_scatter(places, prompts.to(words.dtype))
        hidden = model.language_model.base_model(
            inputs_embeds=inputs, attention_mask=batch["attention_mask"]
        ).last_hidden_state
        head = model.language_model.get_output_embeddings().weight
        states, labels = hidden[:, :-1].flatten(0, 1).to(head.dtype), batch["labels"][:, 1:].flatten()
        return self.fused_loss(head, states, labels) / self.targets


# The `kernels` section of each variant; without one what a recipe's `auto` gives.
VARIANTS = {
    "": Kernels(),
    "formed": Kernels(qformer_attention="torch"),
    "kernels": Kernels(**{name: "kernel" for name in Kernels.model_fields if name != "frozen_linear"}),
    "fp8": Kernels(**dict.fromkeys(Kernels.model_fields, "kernel")),
}


class Engine(Peer):
    """The engine's update, or a variant of it."""

    sources = ("live", "vision cache", "prompt cache")

    def __init__(self, settings: Settings, base: Blip2ForConditionalGeneration | None = None, variant: str = ""):
        super().__init__(settings)
        base = make_blip2(settings) if base is None else base
        self.tower, self.model = engine_of(base, settings)
        self.modules = self.model
        log = SimpleNamespace(say=lambda *_: None)
        choices = use_kernels(VARIANTS[variant], self.model, self.tower, self.runtime, log)
        self.fuses_adamw = any(c.name == "adamw_step" and c.on for c in choices)
        self.stage = 2

    def load(self, stage: int, captions: int, row_tokens: int = 512, rows: int = 8, **setting: Any) -> dict[str, Any]:
        self.stage, model = stage, self.model
        self.train_mode()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_adamw(trained.items(), Optimizer(weight_decay=WEIGHT_DECAY))
        texts = make_captions(self.settings, captions)
        self.pixels = make_pixels(self.settings, len(texts)).to(self.settings.dtype)
        groups = [Group(i, 0, tuple(range(captions))) for i in range(len(texts))]
        data = CaptionData("bench", [None] * len(texts), texts)
        packed = model.llm.pack(
            groups, data, model.queries, row_tokens=row_tokens, rows_per_batch=rows, fixed_shape=self.device.type == "cuda"
        )  # fmt: skip
        self.batches = [
            (b.to(self.device), torch.tensor([g.image for g in b.groups], device=self.device)) for b in packed
        ]
        self.targets = sum(b.target_count for b in packed)
        model.eval()
        with torch.no_grad():
            self.features = torch.cat([self._encode(self.pixels[images]) for images in self._images()])
            self.features = self.features[torch.argsort(torch.cat(self._images()))]
            self.prompts = torch.cat([self._generate(self.features[images]) for images in self._images()])
            self.prompts = self.prompts[torch.argsort(torch.cat(self._images()))]
        self.train_mode()
        slots = sum(b.ids.numel() for b in packed)
        used = sum(b.visual_slots.numel() for b in packed) + sum(len(t) for image in texts for t in image)
        return {"pairs": sum(map(len, texts)), "images": len(texts), "padding": 1 - used / slots}

    def _images(self) -> list[Tensor]:
        """Images of each micro-batch, those left out that were in one before."""
        seen: set[int] = set()
        found = []
        for _, images in self.batches:
            found.append(torch.tensor([i for i in images.tolist() if i not in seen], dtype=torch.long))
            seen |= set(images.tolist())
        return [images for images in found if len(images)]

    def _encode(self, pixels: Tensor) -> Tensor:
        with self.runtime.autocast():
            return self.tower.features(pixels)

    def _generate(self, features: Tensor) -> Tensor:
        with self.runtime.autocast(), torch.no_grad():
            return self.model.vpg(features)

    def train_mode(self) -> None:
        self.model.freeze_for(STAGES[self.stage], False)

    def loss_sum(self, batch: Any, images: Tensor, source: str) -> Tensor:
        if source == "prompt cache":
            return self.model.loss_sum(VPGOutput(self.prompts[images]), batch)
        features = self.tower.features(self.pixels[images]) if source == "live" else self.features[images]
        return self.model.loss_sum(features, batch)

    def accumulate(self, source: str) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch, images in self.batches:
            with self.runtime.autocast():
                loss = self.loss_sum(batch, images, source) / self.targets
            loss.backward()
            total += loss.detach()
        return total

    def update(self, loss: Tensor) -> None:
        adamw_step(self.optimizer, None, loss, impl=None if self.fuses_adamw else "reference")
        self.optimizer.zero_grad(set_to_none=True)

    def build(self, what: str) -> tuple[float, float]:
        """Seconds, as `step` has them, of what a cache of all images costs: encodings, and for the prompt cache soft prompts."""

        def run() -> None:
            for images in self._images():
                features = self._encode(self.pixels[images])
                if what == "prompt cache":
                    self._generate(features)

        self.model.eval()
        found = timed(run, self.settings)
        self.train_mode()
        return found

    def watched(self) -> dict[str, Tensor | None]:
        vpg = self.model.vpg
        return {
            "projector": self.model.projector.weight.grad, "query tokens": vpg.query_tokens.grad, "ln_vision": vpg.ln_vision.weight.grad,
            "Q-Former, first block": first_query(vpg.qformer).grad,
        }  # fmt: skip


def first_query(qformer: nn.Module) -> Tensor:
    return qformer.encoder.layer[0].attention.attention.query.weight


def share(model: nn.Module) -> Any:
    """A copy with modules of its own around the same frozen tensors; what can train is copied too."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        trains = name.startswith(("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm."))
        memo[id(parameter)] = nn.Parameter(parameter.data.clone() if trains else parameter.data, False)
    return copy.deepcopy(model, memo)


def engine_of(base: Blip2ForConditionalGeneration, settings: Settings) -> tuple[VisionTower, VisionLanguageModel]:
    """The engine's tower and model with the weights of transformers' model; frozen ones are shared."""
    config = base.config.vision_config
    with torch.device("meta"):
        module = eva_vit(copy.deepcopy(config))
    kept = {k: v for k, v in base.vision_model.state_dict().items() if "post_layernorm" not in k}
    module.model.load_state_dict(kept, assign=True)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    tower = VisionTower(module, config.hidden_size, tokens, config.image_size, CLIP_NORM, "bench")
    vpg = VPG(QFormerConfig(**settings.sizes.qformer), config.hidden_size).to(settings.device)
    vpg.qformer.load_state_dict(base.qformer.state_dict())
    vpg.ln_vision.load_state_dict(base.vision_model.post_layernorm.state_dict())
    vpg.query_tokens.data.copy_(base.query_tokens.data)
    llm = wrap(share(base.language_model), train_word_level(["a word"]), "bench")
    projector = nn.Linear(base.config.qformer_config.hidden_size, llm.hidden_width).to(settings.device)
    projector.load_state_dict(base.language_projection.state_dict())
    return tower, VisionLanguageModel(vpg, projector, llm)


PEERS: dict[str, Callable[..., Peer]] = {
    "transformers": Transformers,
    "tuned": Tuned,
    "reference": Reference,
    "engine": Engine,
}


def make_peer(name: str, settings: Settings, base: Blip2ForConditionalGeneration | None = None) -> Peer:
    """name: of PEERS, or "engine, " and one of VARIANTS."""
    kind, _, variant = name.partition(", ")
    return PEERS[kind](settings, base, variant) if variant else PEERS[kind](settings, base)


class Remote:
    """A peer in a process of its own, asked through a pipe; methods are the peer's."""

    def __init__(self, name: str, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings), daemon=True)
        self._process.start()
        self.name, self.kind = name, PEERS[name.partition(", ")[0]]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.kind.sources

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def ask(*arguments: Any, **named: Any) -> Any:
            self._pipe.send((method, arguments, named))
            try:
                ok, found = self._pipe.recv()
            except EOFError:
                raise RuntimeError(f"{self.name}: its process ended at {method}, perhaps out of memory") from None
            if not ok:
                raise RuntimeError(f"{self.name}: {found}")
            return found

        return ask

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Any, name: str, settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    peer = None
    while True:
        try:
            method, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            peer = peer or make_peer(name, settings)
            pipe.send((True, getattr(peer, method)(*arguments, **named)))
        except Exception:  # goes back to the process that asked
            pipe.send((False, traceback.format_exc()))
