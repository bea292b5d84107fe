"""`vpgtrans pretrain lm`: a small causal language model that has learned to use context.

Trained on single captions, a small model cannot be steered by any soft prompt.  So it is trained on documents that tell one scene
several times (captions, then questions): copying from context is what lets a visual prompt take the place of that context.  The yardstick
is measured here: loss per token of a caption after k other true captions of the same image, k = 0, 1, 3 (`context_loss_k`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import readable
from ..data.coco import read_captions, read_questions
from ..models.llm import ModelError, SpecialTokens, special_tokens
from ..recipe import LMRecipe, TrainTokenizer
from ..runlog import console
from ..runtime import start
from .fit import fit
from .pairs import pad_ids
from .tokenizer import train_word_level
from .vocabulary import load_tokenizer, trim_tokenizer

CONTEXT_COUNTS = (0, 1, 3)


@dataclass(frozen=True)
class SceneText:
    """One image's captions and questions as token ids, without BOS or newline."""

    captions: list[list[int]]
    questions: list[list[int]]


def main(recipe: LMRecipe) -> dict[str, float]:
    """Train and save a Hugging Face model and tokenizer folder at `output.folder`; returns the validation scores.

    A folder that already holds this recipe's finished model is left as it is.
    """
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed)
    texts, questions = _read_texts(recipe)
    tokenizer = _tokenizer(
        recipe, [c for captions in texts for c in captions] + [q for asked in questions for q in asked]
    )
    caption_ids, question_ids = iter(_all_ids(tokenizer, texts)), iter(_all_ids(tokenizer, questions))
    scenes = [
        SceneText(
            [next(caption_ids)[: recipe.data.max_text_tokens] for _ in captions], [next(question_ids) for _ in asked]
        )
        for captions, asked in zip(texts, questions, strict=True)
    ]
    special = special_tokens(tokenizer)
    model = build_model(recipe.model, tokenizer, special).to(runtime.device)
    count = sum(p.numel() for p in model.parameters())
    held_out, train = scenes[: recipe.data.val_images], scenes[recipe.data.val_images :]
    console.print(
        f"{recipe.name}: {recipe.model['model_type']} of {count:,} parameters, {len(train):,} scenes, {len(tokenizer):,} tokens"
    )

    def loss_of(rng: np.random.Generator) -> dict[str, Tensor]:
        picks = rng.integers(len(train), size=recipe.schedule.batch)
        documents = [document(train[int(i)], special, recipe, rng) for i in picks]
        return {"loss": causal_loss(model, documents, special.pad, runtime.device)}

    scores = fit(
        model, recipe.schedule, loss_of, lambda: context_losses(model, held_out, special, runtime.device),
        folder=recipe.output.folder, seed=recipe.seed, runtime=runtime, label=recipe.name, log_every=recipe.output.log_every_updates,
    )  # fmt: skip
    model.generation_config.eos_token_id = special.newline
    model.save_pretrained(recipe.output.folder)
    tokenizer.save_pretrained(recipe.output.folder)
    readable(*recipe.output.folder.glob("*.safetensors"))
    gain = scores["context_loss_0"] - scores["context_loss_3"]
    console.print(
        f"{recipe.name}: loss per token alone {scores['context_loss_0']:.3f}, after three other captions {scores['context_loss_3']:.3f}"
    )
    if gain < 0.05:
        console.print(
            f"warning weak_context_use: the gain is {gain:.3f}; a visual prompt can hardly steer this model; train longer",
            style="yellow",
        )
    return scores


def build_model(config: dict, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> PreTrainedModel:
    """A randomly initialised causal language model from a transformers config, its vocabulary and special ids filled in."""
    try:
        settings = AutoConfig.for_model(**config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"model: expected a transformers config with a known model_type, got {config!r}: {error}"
        ) from error
    settings.vocab_size = len(tokenizer)
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = special.bos, special.eos, special.pad
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")


def document(scene: SceneText, special: SpecialTokens, recipe: LMRecipe, rng: np.random.Generator) -> list[int]:
    """`[bos] caption \\n [bos]? caption \\n ... question answer \\n ...` of one scene in random order."""
    low, high = recipe.data.captions_per_document
    chosen = list(rng.permutation(len(scene.captions))[: int(rng.integers(low, high + 1))])
    for position in range(1, len(chosen)):
        if rng.random() < recipe.data.repeat_captions:
            chosen[position] = chosen[int(rng.integers(position))]
    ids: list[int] = []
    for position, index in enumerate(chosen):
        if position == 0 or rng.random() < recipe.data.bos_between_captions:
            ids.append(special.bos)
        ids += [*scene.captions[int(index)], special.newline]
    low, high = recipe.data.questions_per_document
    for index in rng.permutation(len(scene.questions))[: int(rng.integers(low, high + 1))]:
        if rng.random() < recipe.data.bos_between_captions:
            ids.append(special.bos)
        ids += [*scene.questions[int(index)], special.newline]
    return ids


def causal_loss(model: PreTrainedModel, documents: list[list[int]], pad: int, device: torch.device) -> Tensor:
    """Token-mean cross-entropy of right-padded documents."""
    ids, real = pad_ids(documents, pad, device)
    hidden = model.base_model(
        input_ids=ids, use_cache=False
    ).last_hidden_state  # padding is on the right, so causal needs no mask
    logits = model.get_output_embeddings()(hidden[:, :-1][real[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][real[:, 1:]])


@torch.no_grad()
def context_losses(
    model: PreTrainedModel, scenes: list[SceneText], special: SpecialTokens, device: torch.device
) -> dict[str, float]:
    """Loss per token (newline included) of each scene's last caption after k of its others; `loss` is the one with most context."""
    scores: dict[str, float] = {}
    for count in CONTEXT_COUNTS:
        rows, starts = [], []
        for scene in scenes:
            if len(scene.captions) <= max(CONTEXT_COUNTS):
                continue
            ids = []
            for caption in scene.captions[:count]:
                ids += [special.bos, *caption, special.newline]
            starts.append(len(ids))
            rows.append([*ids, special.bos, *scene.captions[-1], special.newline])
        if not rows:
            return {"loss": float("nan"), **{f"context_loss_{k}": float("nan") for k in CONTEXT_COUNTS}}
        total = tokens = 0.0
        for at in range(0, len(rows), 64):
            ids, real = pad_ids(rows[at : at + 64], special.pad, device)
            after = torch.tensor(starts[at : at + 64], device=device)[:, None]
            told = real[:, 1:] & (torch.arange(1, ids.shape[1], device=device)[None] > after)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, :-1][told])
            total += F.cross_entropy(logits.float(), ids[:, 1:][told], reduction="sum").item()
            tokens += int(told.sum())
        scores[f"context_loss_{count}"] = total / tokens
    return {"loss": scores[f"context_loss_{CONTEXT_COUNTS[-1]}"], **scores}


def _read_texts(recipe: LMRecipe) -> tuple[list[list[str]], list[list[str]]]:
    captions = read_captions(recipe.data.captions, images_root=None)
    questions: dict[int | str, list[str]] = {}
    if recipe.data.questions is not None:
        for record in read_questions(recipe.data.questions, recipe.data.answers).records:
            questions.setdefault(record.image_id, []).append(f"question: {record.question} answer: {record.answers[0]}")
    return [r.captions for r in captions.records], [questions.get(r.image_id, []) for r in captions.records]


def _tokenizer(recipe: LMRecipe, corpus: list[str]) -> PreTrainedTokenizerBase:
    if isinstance(recipe.tokenizer, TrainTokenizer):
        return train_word_level(corpus, recipe.tokenizer.min_frequency, recipe.tokenizer.max_words)
    tokenizer = load_tokenizer(recipe.tokenizer)
    if not recipe.trim_vocabulary:
        return tokenizer
    trimmed, kept = trim_tokenizer(tokenizer, corpus, recipe.trim_vocabulary)
    recipe.output.folder.mkdir(parents=True, exist_ok=True)
    (recipe.output.folder / "real_ids.json").write_text(json.dumps(kept))
    return trimmed


def _all_ids(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> list[list[int]]:
    """Ids of every text, in order, tokenised in one call."""
    flat = [text for several in texts for text in several]
    return tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
