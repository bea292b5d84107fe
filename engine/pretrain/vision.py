"""`vpgtrans pretrain vision`: a small ViT that learns to see by captioning (CapPa, arXiv 2306.07915).

A transformer decoder reads the ViT's tokens by cross-attention and writes the caption; what it needs, the tokens must hold, and where.  The
decoder is dropped, the ViT is saved in the layout of BLIP-2's vision model.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2VisionConfig

from ..checkpoint import readable
from ..data.images import CLIP_MEAN, CLIP_STD, load_pixels, normalise, sample_rng
from ..models.llm import ModelError
from ..models.vision import eva_vit
from ..recipe import VisionRecipe
from ..runlog import console
from ..runtime import start
from .fit import fit
from .pairs import draw, load_pairs, pad_ids


class CaptioningViT(nn.Module):
    """The tower under training and the decoder that teaches it."""

    def __init__(self, config: Blip2VisionConfig, vocabulary: int, max_tokens: int, layers: int):
        super().__init__()
        width = config.hidden_size
        self.tower = eva_vit(config)
        # As large as the patches' own embeddings: at the config's deviation (0.06) no position was told apart in 600 steps.
        nn.init.normal_(self.tower.model.embeddings.position_embedding, std=1.0)
        self.norm = nn.LayerNorm(width)
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(max_tokens, width) * 0.02)
        layer = nn.TransformerDecoderLayer(
            width,
            config.num_attention_heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, images: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """images (B, 3, side, side), ids and real (B, T) -> token-mean cross-entropy of ids[:, 1:]."""
        memory = self.norm(self.tower(images))
        length = ids.shape[1] - 1
        inputs = self.words(ids[:, :-1]) + self.places[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        hidden = self.decoder(inputs, memory, tgt_mask=causal, tgt_is_causal=True)
        logits = F.linear(hidden[real[:, 1:]], self.words.weight)
        return F.cross_entropy(logits.float(), ids[:, 1:][real[:, 1:]])


def main(recipe: VisionRecipe) -> dict[str, float]:
    """Train and save `config.json` and `model.safetensors` at `output.folder`; returns the validation scores."""
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed)
    pairs = load_pairs(recipe)
    try:
        config = Blip2VisionConfig(**recipe.model)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model: expected sizes of a Blip2VisionConfig, got {recipe.model!r}: {error}") from error
    model = CaptioningViT(config, len(pairs.tokenizer), recipe.data.max_text_tokens + 2, recipe.decoder_layers).to(
        runtime.device
    )
    count = sum(p.numel() for p in model.tower.parameters())
    console.print(f"{recipe.name}: ViT of {count:,} parameters, {len(pairs.train.records):,} images")
    augmented = recipe.data.transform == "train"
    # The eval transform is deterministic, so pixels are decoded once; random ones are decoded as they come.
    stored = None if augmented else torch.stack([load_pixels(r.path, config.image_size) for r in pairs.train.records])
    val_pixels = torch.stack([load_pixels(r.path, config.image_size) for r in pairs.val.records])

    def images_of(pixels: Tensor) -> Tensor:
        return normalise(pixels.to(runtime.device), CLIP_MEAN, CLIP_STD)

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        images, captions = draw(pairs.train, rng, recipe.schedule.batch)
        if stored is None:
            view = int(rng.integers(2**31))
            records = [pairs.train.records[i] for i in images]
            pixels = torch.stack(
                [load_pixels(r.path, config.image_size, sample_rng(recipe.seed, view, r.image_id)) for r in records]
            )
        else:
            pixels = stored[torch.tensor(images)]
        return {"loss": model(images_of(pixels), *pad_ids(captions, pairs.special.pad, runtime.device))}

    def evaluate() -> dict[str, float]:
        losses = []
        for at in range(0, len(val_pixels), 64):
            captions = [ids[0] for ids in pairs.val.ids[at : at + 64]]
            losses.append(
                model(images_of(val_pixels[at : at + 64]), *pad_ids(captions, pairs.special.pad, runtime.device)).item()
            )
        return {"loss": float(np.mean(losses))}

    scores = fit(
        model, recipe.schedule, loss_of, evaluate, folder=recipe.output.folder, seed=recipe.seed, runtime=runtime, label=recipe.name,
        log_every=recipe.output.log_every_updates,
    )  # fmt: skip
    tower = {k: v.detach().cpu().contiguous() for k, v in model.tower.model.state_dict().items()}
    save_file(tower, recipe.output.folder / "model.safetensors")
    readable(recipe.output.folder / "model.safetensors")
    (recipe.output.folder / "config.json").write_text(
        json.dumps({**recipe.model, "image_size": config.image_size}, indent=1)
    )
    console.print(f"{recipe.name}: captioning loss per token {scores['loss']:.3f} on held-out images")
    return scores
