"""The parts of a miniature, trained for a few steps by their own commands, and usable by what comes after."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vpgtrans.engine.cli import main
from vpgtrans.engine.models.llm import load_language_model
from vpgtrans.engine.models.opening import read_vpg
from vpgtrans.engine.models.vision import load_tower
from vpgtrans.engine.pretrain.lm import SceneText, context_losses, document
from vpgtrans.engine.pretrain.vpg import ImageTextQFormer
from vpgtrans.engine.recipe import Vision, load_recipe

SCHEDULE = {"steps": 4, "batch": 4, "learning_rate": 1e-3, "warmup_steps": 1, "eval_every_steps": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def write(path: Path, world: Path, kind: str, **sections) -> Path:
    images = {"captions": str(world / "captions_train.json"), "images": str(world / "images")}
    data = {"train": [images], "val": {**images, "captions": str(world / "captions_val.json")}}
    values = {
        "kind": kind, "name": f"tiny_{kind}", "threads": 1, "device": "cpu", "output": {"folder": str(path.parent / kind)},
        "tokenizer": {"min_frequency": 1}, "data": data, "schedule": SCHEDULE, **sections,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def lm_recipe(tiny_world, tmp_path) -> Path:
    world = tiny_world / "world"
    text = {"captions": str(world / "captions_train.json"), "questions": str(world / "questions_train.json"),
            "answers": str(world / "answers_train.json"), "val_images": 8, "questions_per_document": [1, 2]}  # fmt: skip
    return write(tmp_path / "lm.yaml", world, "lm", model=LLAMA, data=text)


def test_lm_leaves_a_model_that_transfer_can_load(lm_recipe, tmp_path):
    assert main(["pretrain", "lm", str(lm_recipe)]) == 0
    llm = load_language_model(tmp_path / "lm")  # the adapter's contract is checked here
    assert llm.hidden_width == 16 and llm.special.newline != llm.special.eos
    summary = json.loads((tmp_path / "lm" / "summary.json").read_text())
    assert {"context_loss_0", "context_loss_1", "context_loss_3"} <= summary.keys() and summary["steps"] == 4


def test_vision_and_vpg_leave_what_transfer_can_load(tiny_world, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
             "initializer_range": 0.1}  # fmt: skip
    assert (
        main(
            [
                "pretrain",
                "vision",
                str(write(tmp_path / "v.yaml", tiny_world / "world", "vision", model=sizes, decoder_layers=1)),
            ]
        )
        == 0
    )
    tower = {"kind": "eva_vit", "path": str(tmp_path / "vision"), "image_size": 32}
    assert load_tower(Vision(**tower)).tokens == 5
    qformer = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_query_tokens": 3,
    }
    losses = ["contrastive", "matching", "captioning"]
    path = write(
        tmp_path / "q.yaml",
        tiny_world / "world",
        "vpg",
        vision=tower,
        qformer=qformer,
        losses=losses,
        projection_size=8,
    )
    assert main(["pretrain", "vpg", str(path)]) == 0
    vpg = read_vpg(tmp_path / "vpg", 16)[0]
    assert not any("intermediate.dense" in name for name in vpg.state_dict())  # the text branch is gone
    assert set(losses) <= json.loads((tmp_path / "vpg" / "summary.json").read_text()).keys()


def test_a_stopped_pretraining_resumes_to_the_same_weights(lm_recipe, tmp_path):
    """Two halves equal the whole: the second call finds the checkpoint of the first, whose last step was the second of four."""
    whole = load_recipe(lm_recipe)
    assert main(["pretrain", "lm", str(lm_recipe)]) == 0
    expected = load_file(tmp_path / "lm" / "model.safetensors")
    from vpgtrans.engine.pretrain import fit as loop

    real, calls = loop.save_checkpoint, []

    def stop_after_first(*arguments, **settings):
        calls.append(real(*arguments, **settings))
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            main(["pretrain", "lm", str(lm_recipe), f"output.folder={tmp_path / 'again'}"])
    assert main(["pretrain", "lm", str(lm_recipe), f"output.folder={tmp_path / 'again'}"]) == 0
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(expected[k], got[k]) for k in expected) and whole.schedule.steps == 4


def test_documents_tell_one_scene_several_times(lm_recipe, make_llm):
    special = make_llm("llama").special
    recipe = load_recipe(lm_recipe, ["data.captions_per_document=[2,3]", "data.bos_between_captions=0.0"])
    scene = SceneText([[10], [11], [12], [13]], [[20], [21]])
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = document(scene, special, recipe, rng)
        lines = " ".join(map(str, ids)).split(f" {special.newline}")
        told = [int(line.split()[-1]) for line in lines if line.strip()]
        captions = [t for t in told if t < 20]
        assert ids[0] == special.bos and ids.count(special.bos) == 1
        assert 2 <= len(captions) <= 3 and len(set(captions)) == len(captions) and len(told) > len(captions)


def test_context_loss_is_that_of_the_last_caption_alone(make_llm):
    """Against a plain forward a scene: only the last caption and its newline count, whatever stands before it."""
    llm = make_llm("llama")
    special = llm.special
    scenes = [SceneText([[9, 8], [7], [6, 5, 9], [8], [5, 6, 7]], []), SceneText([[5], [9, 9], [8], [7, 6], [6]], [])]
    scores = context_losses(llm.model, scenes, special, torch.device("cpu"))
    for count in (0, 1, 3):
        total, tokens = 0.0, 0
        for scene in scenes:
            context = [i for c in scene.captions[:count] for i in (special.bos, *c, special.newline)]
            target = [*scene.captions[-1], special.newline]
            ids = torch.tensor([[*context, special.bos, *target]])
            log_probabilities = llm.model(input_ids=ids).logits[0].log_softmax(-1)
            at = len(context)
            total -= sum(log_probabilities[at + i, t].item() for i, t in enumerate(target))
            tokens += len(target)
        assert scores[f"context_loss_{count}"] == pytest.approx(total / tokens, rel=1e-4)


def test_queries_do_not_see_the_caption(tiny_world, tmp_path):
    """In captioning, changing the text must leave the query outputs alone, and a token must not see what follows it."""
    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_query_tokens": 3,
               "dropout": 0.0, "initializer_range": 0.3}  # fmt: skip
    tower = {"kind": "eva_vit", "path": str(tiny_world / "tower"), "image_size": 32}
    recipe = load_recipe(
        write(tmp_path / "q.yaml", tiny_world / "world", "vpg", vision=tower, qformer=qformer, projection_size=8)
    )
    torch.manual_seed(0)
    model = ImageTextQFormer(recipe, 16, 40)
    image, real = torch.randn(2, 5, 16), torch.ones(2, 6, dtype=torch.bool)
    text = torch.randn(2, 6, 16)
    changed = text.clone()
    changed[:, 4] *= -1
    queries = model.vpg.query_tokens.expand(2, -1, -1)
    mask = model._joint_mask(real, 3, causal=True)
    a, b = (model.vpg.qformer(queries, image, t, mask) for t in (text, changed))
    assert torch.equal(a[:, :7], b[:, :7])  # queries and the first four tokens
    assert not torch.allclose(a[:, 7:], b[:, 7:])
    both = model._joint_mask(real, 3, causal=False)
    a, b = (model.vpg.qformer(queries, image, t, both) for t in (text, changed))
    assert not torch.allclose(a[:, :3], b[:, :3])  # in matching they do
