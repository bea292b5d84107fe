"""`vpgtrans pretrain vpg`: BLIP-2's first step, before the Q-Former meets any language model (arXiv 2301.12597, section 3.2).

The Q-Former's query branch reads a frozen tower; a text branch shares its self-attention.  Three losses:

* contrastive: the query output most similar to the text's first token, against the other pairs of the batch;
* matching: does the text belong to the image?, with the hardest negatives of the batch;
* captioning: the text, token by token, where text sees the queries and queries do not see the text.

TFS, the baseline of the paper, starts from what this leaves.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.feature_cache import open_features
from ..data.features import FeatureSource
from ..data.packing import Group
from ..models.vision import load_tower
from ..models.vpg import VPG, save_parts
from ..recipe import VPGRecipe
from ..runlog import RunLog, console
from ..runtime import start
from .fit import fit
from .pairs import draw, load_pairs, pad_ids


class ImageTextQFormer(nn.Module):
    """A VPG with its text branch and the three heads; all but the VPG is dropped afterwards.

    Letters: B pairs, Q queries, T text tokens.
    """

    def __init__(self, recipe: VPGRecipe, image_width: int, vocabulary: int):
        super().__init__()
        width = recipe.qformer.hidden_size
        self.vpg = VPG(recipe.qformer, image_width, text_branch=True)
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(recipe.data.max_text_tokens + 2, width) * 0.02)
        self.image_head = nn.Linear(width, recipe.projection_size)
        self.text_head = nn.Linear(width, recipe.projection_size)
        self.match_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        nn.init.normal_(self.words.weight, std=0.02)
        self.losses = recipe.losses

    def forward(self, features: Tensor, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
        """features (B, N, W), ids and real (B, T), one caption an image -> the chosen losses, each a batch mean."""
        image = self.vpg.ln_vision(features)
        queries = self.vpg.query_tokens.expand(len(ids), -1, -1)
        text = self.words(ids) + self.places[: ids.shape[1]]
        similarity = self._similarity(queries, image, text, real)
        losses: dict[str, Tensor] = {}
        if "contrastive" in self.losses:
            labels = torch.arange(len(ids), device=ids.device)
            losses["contrastive"] = 0.5 * (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels))
        if "matching" in self.losses:
            losses["matching"] = self._matching(queries, image, text, real, similarity.detach())
        if "captioning" in self.losses:
            losses["captioning"] = self._captioning(queries, image, text, ids, real)
        return losses

    def _similarity(self, queries: Tensor, image: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """(images B, texts B): each text's first token against the best of each image's queries, over the temperature."""
        seen = F.normalize(self.image_head(self.vpg.qformer(queries, image)), dim=-1)
        read = self.vpg.qformer(None, None, text, real[:, None, None, :].expand(-1, 1, real.shape[1], -1))[:, 0]
        told = F.normalize(self.text_head(read), dim=-1)
        best = torch.einsum("iqd,td->itq", seen, told).amax(-1)
        return best / self.temperature.clamp(0.01, 0.5)

    def _joint_mask(self, real: Tensor, queries: int, causal: bool) -> Tensor:
        """(B, 1, Q+T, Q+T): text sees queries and real text; causal: text sees only the past, and queries do not see text."""
        total = queries + real.shape[1]
        mask = F.pad(real, (queries, 0), value=True)[:, None, :].expand(-1, total, -1).clone()
        if causal:
            mask[:, :queries, queries:] = False
            mask[:, queries:, queries:] &= torch.ones(
                real.shape[1], real.shape[1], dtype=torch.bool, device=real.device
            ).tril()
        return mask[:, None]

    def _captioning(self, queries: Tensor, image: Tensor, text: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        hidden = self.vpg.qformer(queries, image, text, self._joint_mask(real, queries.shape[1], causal=True))
        told = hidden[:, queries.shape[1] : -1][real[:, 1:]]
        return F.cross_entropy(F.linear(told, self.words.weight).float(), ids[:, 1:][real[:, 1:]])

    def _matching(self, queries: Tensor, image: Tensor, text: Tensor, real: Tensor, similarity: Tensor) -> Tensor:
        own = torch.eye(len(text), dtype=torch.bool, device=text.device)
        hard_text = similarity.masked_fill(own, -torch.inf).argmax(1)
        hard_image = similarity.T.masked_fill(own, -torch.inf).argmax(1)
        every = torch.arange(len(text), device=text.device)
        images, texts = torch.cat([every, every, hard_image]), torch.cat([every, hard_text, every])
        mask = self._joint_mask(real[texts], queries.shape[1], causal=False)
        hidden = self.vpg.qformer(queries[images], image[images], text[texts], mask)
        logits = self.match_head(hidden[:, : queries.shape[1]]).mean(1)
        labels = (torch.arange(3 * len(text), device=text.device) < len(text)).long()
        return F.cross_entropy(logits.float(), labels)


def main(recipe: VPGRecipe) -> dict[str, float]:
    """Train and save the VPG, without its text branch, at `output.folder`; returns the validation scores."""
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed)
    pairs = load_pairs(recipe)
    tower = load_tower(recipe.vision)
    tower.to(runtime.device)
    model = ImageTextQFormer(recipe, tower.width, len(pairs.tokenizer)).to(runtime.device)
    log = RunLog(recipe.output.folder, enabled=runtime.is_main, name="prepare.jsonl")
    cache = (recipe.output.cache or recipe.output.folder.parent / "cache") if recipe.data.vision_cache else None
    common = {"seed": recipe.seed, "runtime": runtime, "cache_root": cache, "log": log}
    features = open_features(pairs.train, tower, transform=recipe.data.transform, views=recipe.data.views, **common)
    val_features = open_features(pairs.val, tower, transform="eval", **common)
    log.close()
    count = sum(p.numel() for p in model.vpg.parameters())
    console.print(
        f"{recipe.name}: VPG of {count:,} parameters with its text branch, {len(pairs.train.records):,} images, {' + '.join(recipe.losses)}"
    )

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        images, captions = draw(pairs.train, rng, recipe.schedule.batch)
        view = int(rng.integers(2**31))
        return model(_read(features, images, view), *pad_ids(captions, pairs.special.pad, runtime.device))

    def evaluate() -> dict[str, float]:
        size = min(recipe.schedule.batch, len(pairs.val.ids))
        totals: dict[str, list[float]] = {}
        for at in range(0, len(pairs.val.ids) - size + 1, size):
            images = list(range(at, at + size))
            ids, real = pad_ids([pairs.val.ids[i][0] for i in images], pairs.special.pad, runtime.device)
            for name, value in model(_read(val_features, images, 0), ids, real).items():
                totals.setdefault(name, []).append(value.item())
        scores = {name: float(np.mean(values)) for name, values in totals.items()}
        return {"loss": sum(scores.values()), **scores}

    scores = fit(
        model, recipe.schedule, loss_of, evaluate, folder=recipe.output.folder, seed=recipe.seed, runtime=runtime, label=recipe.name,
        log_every=recipe.output.log_every_updates,
    )  # fmt: skip
    kept = VPG(recipe.qformer, tower.width)
    kept.load_state_dict({k: v for k, v in model.vpg.state_dict().items() if k in kept.state_dict()})
    config = {
        "recipe": recipe.name, "image_width": tower.width, "qformer": recipe.qformer.model_dump(), "llm": None,
        "vision": recipe.vision.model_dump(mode="json"), "pairs": recipe.schedule.steps * recipe.schedule.batch,
    }  # fmt: skip
    save_parts(recipe.output.folder / "model", {"vpg": kept}, config)
    console.print(f"{recipe.name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    return scores


def _read(features: FeatureSource, images: list[int], view: int) -> Tensor:
    return features([Group(i, view, ()) for i in images])
