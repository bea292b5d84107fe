"""What a model is worth: validation loss per token, captions with CIDEr, answers with VQA accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .data.coco import QuestionRecord
from .data.dealing import evened
from .data.features import FeatureSource
from .data.packing import Batch, Group, TokenisedCaptions
from .data.prompts import vqa_prompt
from .data.scenes import attributes_right
from .models.vlm import VisionLanguageModel
from .recipe import Evaluation, Generation, TransferData
from .runtime import Runtime
from .scoring.cider import cider
from .scoring.vqa import vqa_accuracy

ANSWERS = Generation(num_beams=5, max_new_tokens=10, min_new_tokens=0, length_penalty=-1.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is back in its own mode (parts of one model train while others are frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class Validator:
    """Scores a model on one validation set; rows are packed once."""

    data: TokenisedCaptions
    features: FeatureSource
    settings: Evaluation
    runtime: Runtime
    questions: list[QuestionRecord]
    _batches: list[Batch] = field(default_factory=list)

    def pack(self, model: VisionLanguageModel, layout: TransferData) -> None:
        """All captions of the first `loss_images` validation images, grouped and packed."""
        groups = [
            Group(i, 0, tuple(range(len(ids)))) for i, ids in enumerate(self.data.ids[: self.settings.loss_images])
        ]
        self._batches = list(model.pack(groups, self.data, layout))

    @torch.no_grad()
    def loss(self, model: VisionLanguageModel) -> float:
        """Cross-entropy per target token over all packed captions, every rank its share of the micro-batches."""
        total = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        with evaluating(model):
            for batch in self._own_batches():
                with self.runtime.autocast():
                    summed = model.loss_sum(self.features(batch.groups), batch.to(self.runtime.device))
                total += torch.stack(
                    [
                        summed.double(),
                        torch.tensor(float(batch.target_count), dtype=torch.float64, device=self.runtime.device),
                    ]
                )
        self.runtime.sum_(total)
        return (total[0] / total[1]).item()

    def _own_batches(self) -> list[Batch]:
        """This rank's micro-batches, as many as any other rank's: a gather inside a forward pass needs all ranks."""
        ranks = range(self.runtime.world_size)
        shares = [self._batches[rank :: self.runtime.world_size] for rank in ranks]
        first = self._batches[0]
        return evened(shares, lambda: first.without({g.image for g in first.groups}))[self.runtime.rank]

    def captions(self, model: VisionLanguageModel) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Generate for the first `generate_images` images: (scores, [{image_id, caption}] in the official format)."""
        count = min(self.settings.generate_images, len(self.data.records))
        texts = self._answer(model, list(range(count)), [""] * count, self.settings.generate)
        records = self.data.records[:count]
        references = {r.image_id: r.captions for r in records}
        candidates = {r.image_id: text for r, text in zip(records, texts, strict=True)}
        scores = {"cider": cider(references, candidates)[0], "distinct_captions": len(set(texts)) / max(1, count)}
        if self.settings.attributes:
            right = sum(attributes_right(candidates[r.image_id], r.captions) for r in records)
            scores["attributes_right"] = right / count
        return scores, [{"image_id": key, "caption": text} for key, text in candidates.items()]

    def answers(self, model: VisionLanguageModel) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Answer the questions about the first `generate_images` images: (scores, [{question_id, answer}] in the official format)."""
        place = {r.image_id: i for i, r in enumerate(self.data.records[: self.settings.generate_images])}
        asked = [q for q in self.questions if q.image_id in place]
        if not asked:
            return {}, []
        template = self.settings.question_prompt or vqa_prompt("{}", model.llm.is_encoder_decoder)
        prompts = [template.replace("{}", q.question) for q in asked]
        texts = self._answer(model, [place[q.image_id] for q in asked], prompts, ANSWERS)
        predictions = [{"question_id": q.question_id, "answer": text} for q, text in zip(asked, texts, strict=True)]
        annotations = [{"question_id": q.question_id, "answers": [{"answer": a} for a in q.answers]} for q in asked]
        return {"vqa_accuracy": vqa_accuracy(annotations, predictions)["overall"]}, predictions

    def _answer(
        self, model: VisionLanguageModel, images: list[int], prompts: list[str], settings: Generation
    ) -> list[str]:
        texts: list[str] = []
        for at in range(0, len(images), self.settings.batch_images):
            chosen = [Group(i, 0, ()) for i in images[at : at + self.settings.batch_images]]
            with evaluating(model), torch.no_grad(), self.runtime.autocast():
                texts += model.generate(self.features(chosen), prompts[at : at + len(chosen)], settings)
        return texts
