"""Export, as a user has it: transformers loads the folder, gives the same loss and captions, and the folder is a source again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vpgtrans.engine.checkpoint import CheckpointError, write_json
from vpgtrans.engine.cli import main
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.export.folder import export
from vpgtrans.engine.models.llm import ModelError, load_language_model
from vpgtrans.engine.models.opening import open_model
from vpgtrans.engine.models.sources import describe_source, read_source
from vpgtrans.engine.models.vpg import VPG, save_parts
from vpgtrans.engine.recipe import Generation, QFormerConfig

WORDS = [
    w
    for c in ("a small red circle left of a blue star", "large green square ring right above below on", "question what")
    for w in c.split()
]
WORDS = sorted(set(WORDS))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
ROWS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**SIZES, **ROWS, "ffn_dim": 64, "dropout": 0.0}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """kind: plain, bytes (with <0x00>, as LLaMA's), no_bos (as Qwen's)."""
    unused = ["<0x00>", "<0x01>"] if kind == "bytes" else []
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *unused, "\n", *("▁" + w for w in WORDS)]
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<s>", "</s>", "<unk>")])
    raw.add_tokens(["\n"])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names, **({} if kind == "no_bos" else {"bos_token": "<s>"}))


def language_model(family: str, rows: int):
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**OPT, vocab_size=rows, word_embed_proj_dim=32))
    if family == "opt-350m":
        return OPTForCausalLM(OPTConfig(**OPT, vocab_size=rows, word_embed_proj_dim=16, do_layer_norm_before=False))
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**SIZES, **ROWS, intermediate_size=64, num_key_value_heads=2, vocab_size=rows)
        )
    if family == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(
                **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, vocab_size=rows, eos_token_id=2, bos_token_id=None
            )
        )  # fmt: skip
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=rows, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=2, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


@torch.no_grad()
def never_predict_pad(model) -> None:
    """As training leaves a pad token: improbable everywhere.  Here by a channel that is constant and that only its logit reads."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[0] = 0.0
    model.lm_head.weight[0, 0] = -60.0


# family, tokenizer, spare rows of the embedding, where the image token ends up
CASES = {
    "opt": ("opt", "plain", 7, "spare row"),
    "opt-350m": ("opt-350m", "plain", 7, "spare row"),
    "llama": ("llama", "bytes", 0, "<0x00>"),
    "qwen3": ("qwen3", "no_bos", 5, "spare row"),
    "t5": ("t5", "plain", 3, "spare row"),
    "full": ("llama", "plain", 0, "new row"),
}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, tiny_world):
    """make_run(case) -> the folder of a finished run with random weights, its pixels from the tiny world's tower."""

    def make(case: str, tower: str = "eva_vit", **more):
        family, kind, spare, _ = CASES[case]
        root = tmp_path_factory.mktemp(case)
        torch.manual_seed(len(case))
        words = tokenizer(kind)
        model = language_model(family, len(words) + spare)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
                elif "norm" not in name:
                    parameter.normal_(std=0.1)
            model.tie_weights()
            if case == "full":
                never_predict_pad(model)
        model.save_pretrained(root / "llm")
        words.save_pretrained(root / "llm")
        qformer = QFormerConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_query_tokens=4, dropout=0.1, initializer_range=0.3
        )  # fmt: skip
        vision = {"kind": "eva_vit", "path": str(tiny_world / "tower"), "image_size": 32, **more}
        if tower != "eva_vit":
            vision = {"kind": "mobilenet_v2", "path": str(tower)}
        vpg = VPG(qformer, 16 if tower == "eva_vit" else 1280)
        torch.nn.init.normal_(vpg.ln_vision.bias, std=0.3)
        config = {
            "recipe": f"tiny_{family}", "image_width": vpg.image_width, "qformer": qformer.model_dump(), "llm": str(root / "llm"),
            "vision": vision, "pairs": 10,
        }  # fmt: skip
        projector = torch.nn.Linear(24, 32)
        with torch.no_grad():
            projector.weight[0], projector.bias[0] = 0.0, 1.0
        save_parts(root / "run" / "model", {"vpg": vpg, "projector": projector}, config)
        write_json(
            root / "run" / "summary.json",
            {
                "cider": 1.25, "final_val_loss": 0.5, "pairs": 1234, "updates": 12, "gpu_hours": 0.125, "device": "cpu",
                "generation": Generation(num_beams=3, max_new_tokens=7, min_new_tokens=1).model_dump(),
            },
        )  # fmt: skip
        return root / "run"

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """50 pictures of odd sizes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for n in range(50):
        size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
        pixels = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{n:02}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_same(case, make_run, photos, tmp_path):
    """Loss to 1e-5 and the same token ids for 50 images, through the processor, with and without a prompt."""
    run = make_run(case)
    made = export(run, tmp_path / "out")
    assert CASES[case][3] in made["image_token"]
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert theirs.config.image_token_index == made["image_token_id"] < theirs.get_input_embeddings().num_embeddings
    assert theirs.config.text_config.architectures
    ours = open_model(run)
    images = [Image.open(p).convert("RGB") for p in photos]
    prompts = ours.soft_prompts(photos)
    for kinds in (
        [""],
        ["", "question what", "a red"],
    ):  # alike, and ragged: padded on the left, masked for an encoder-decoder
        texts = [kinds[n % len(kinds)] for n in range(len(images))]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        got = theirs.generate(**inputs, num_beams=3, max_new_tokens=7, min_new_tokens=1)
        width = 1 if ours.model.llm.is_encoder_decoder else inputs["input_ids"].shape[1]
        settings = Generation(num_beams=3, max_new_tokens=7, min_new_tokens=1)
        expected = ours.model.llm.generate_ids(prompts, texts, settings)
        assert got[:, width:].tolist() == expected.tolist()
        assert len({tuple(row) for row in expected.tolist()}) > 3
    assert abs(loss_of(theirs, processor, ours, images) - loss_of_ours(ours, prompts)) < 1e-5


CAPTION = "a small red circle left of a blue star"


def loss_of(theirs, processor, ours, images) -> float:
    """Mean over the tokens of one caption for every image, as transformers counts it."""
    llm = ours.model.llm
    ids = llm.caption_ids(CAPTION, 32)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    image = [theirs.config.image_token_index] * ours.model.queries
    if llm.is_encoder_decoder:
        seen, labels = [*image, llm.special.eos], [*ids, llm.special.eos]
    else:
        seen, labels = image + ids, [-100] * len(image) + ids
    many = {"input_ids": torch.tensor([seen] * len(images)), "labels": torch.tensor([labels] * len(images))}
    with torch.no_grad():
        return theirs(pixel_values=pixels, **many).loss.item()


@torch.no_grad()
def loss_of_ours(ours, prompts) -> float:
    llm = ours.model.llm
    data = CaptionData("test", [None] * len(prompts), [[llm.caption_ids(CAPTION, 32)]] * len(prompts))
    groups = [Group(i, 0, (0,)) for i in range(len(prompts))]
    batches = llm.pack(groups, data, ours.model.queries, row_tokens=64, rows_per_batch=8)
    total = sum(llm.loss_sum(prompts[[g.image for g in b.groups]], b) for b in batches)
    return total.item() / sum(b.target_count for b in batches)


def test_an_export_is_a_model_and_a_source_again(make_run, photos, tmp_path, capsys):
    run = make_run("opt")
    export(run, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again, first = open_model(tmp_path / "out"), open_model(run)
    settings = Generation(num_beams=2, max_new_tokens=6, min_new_tokens=0)
    ids = [m.model.llm.generate_ids(m.soft_prompts(photos[:8]), [""] * 8, settings).tolist() for m in (again, first)]
    assert ids[0] == ids[1]
    for place in (tmp_path / "out", run):
        arguments = [
            "caption",
            str(place),
            str(photos[0]),
            str(photos[1]),
            "--num-beams",
            "2",
            "--max-new-tokens",
            "6",
            "--min-new-tokens",
            "0",
        ]
        assert main([*arguments, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert [len(c["token_ids"]) > 0 for c in shown["captions"]] == [True, True]
        assert [c["token_ids"] for c in shown["captions"]] == [trimmed(i, first.model.llm.ends) for i in ids[0][:2]]
    info = describe_source(tmp_path / "out")
    assert info.llm_inside and info.projector_shape == (32, 24)
    parts, _ = read_source(tmp_path / "out")
    assert torch.equal(parts["projector"]["weight"], first.model.projector.weight)
    assert torch.equal(parts["vpg"]["ln_vision.bias"], first.model.vpg.ln_vision.bias)


def trimmed(ids, ends):
    return ids[: next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))]


def test_without_the_language_model(make_run, photos, tmp_path):
    run = make_run("llama")
    assert main(["export", str(run), str(tmp_path / "out"), "--without-llm"]) == 0
    stored = {n for f in (tmp_path / "out").glob("*.safetensors") for n in keys(f)}
    assert stored and not any(n.startswith("language_model") for n in stored)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "vpgtrans caption" in card and "from_pretrained" not in card
    )  # which would fill the language model with random numbers
    opened = open_model(tmp_path / "out")
    assert opened.model.llm.path == str(run.parent / "llm")
    settings = Generation(num_beams=2, max_new_tokens=6, min_new_tokens=0)
    ids = [
        m.model.llm.generate_ids(m.soft_prompts(photos[:4]), [""] * 4, settings).tolist()
        for m in (opened, open_model(run))
    ]
    assert ids[0] == ids[1]


def keys(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_card_is_written_from_the_run(make_run, tmp_path):
    run = make_run("opt")
    (run / "recipe.yaml").write_text(
        "arm: vpgtrans\nsource: {vlm: /somewhere/blip2-opt}\nstages:\n- {name: warm_up, trains: projector, learning_rate: 0.0005}\n"
        "data: {train: [{name: coco}, {name: sbu}]}\n"
    )
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "1,234",
        "0.125",
        "1.25",
        "vpgtrans",
        "blip2-opt",
        "coco, sbu",
        "num_beams 3",
        "warm_up",
        "0.0005",
        "arXiv 2305.01278",
    ):
        assert words in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    llm = load_language_model(run.parent / "llm")
    assert generation["eos_token_id"] == sorted({llm.special.eos, llm.special.newline}) and generation["num_beams"] == 3


def test_what_cannot_be_exported(make_run, tmp_path, measuring_data, capsys):
    run = make_run("opt", tower=measuring_data / "mobilenetv2_imagenet")
    with pytest.raises(ModelError, match="eva_vit"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        export(make_run("opt"), tmp_path / "full")
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "o")]) == 2
    assert "nothing there" in capsys.readouterr().err


def test_a_bad_image_among_good_ones_is_named_and_the_others_captioned(make_run, photos, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(photos[1].read_bytes()[:60])
    settings = [
        "--num-beams",
        "1",
        "--max-new-tokens",
        "3",
        "--json",
    ]  # a shortest length above the longest is lowered, not warned of
    assert main(["caption", str(make_run("opt")), str(photos[0]), str(tmp_path / "cut.png"), *settings]) == 1
    shown = capsys.readouterr()
    assert [c["image"] for c in json.loads(shown.out)["captions"]] == [str(photos[0])]
    assert "cut.png" in shown.err and "Unfeasible" not in shown.err


def test_an_export_is_readable_by_others(make_run, tmp_path):
    """safetensors leaves 0600."""
    export(make_run("opt"), tmp_path / "out")
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


@pytest.mark.parametrize("name", ["gone.jpg", "broken.jpg"])
def test_a_bad_image_is_said_before_the_model_is_loaded(name, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    assert main(["caption", str(tmp_path / "no_model"), str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


def test_training_goes_on_from_an_export_as_from_its_run(tiny_recipe, tiny_world, tmp_path):
    """A transfer from the export gives the losses of a transfer from the run: same converter, same start, same order."""
    export(tiny_world / "source", tmp_path / "exported")
    losses = []
    for name, source in (("from_run", tiny_world / "source"), ("from_export", tmp_path / "exported")):
        settings = ["stages.0.pairs=33", "stages.1.pairs=44", "evaluation.generate_images=0", f"source.vlm={source}"]
        assert main(["train", str(tiny_recipe), *settings, f"output.folder={tmp_path / name}"]) == 0
        events = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append([e["loss"] for e in events if e["event"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) > 3


def test_eval_of_run_and_export(tiny_recipe, tiny_world, tmp_path, capsys):
    """The same scores from a finished run, by its own summary, by `eval`, and by `eval` of its export; `score` agrees on the predictions."""
    run, out, world = tmp_path / "run", tmp_path / "out", tiny_world / "world"
    assert main(["train", str(tiny_recipe), "stages.0.pairs=22", "stages.1.pairs=22", f"output.folder={run}"]) == 0
    export(run, out)
    common = [
        "--images",
        str(world / "images"),
        "--num-beams",
        "2",
        "--max-new-tokens",
        "4",
        "--min-new-tokens",
        "0",
        "--json",
    ]
    questions = ["--questions", str(world / "questions_val.json")]
    tasks = {
        "caption": [str(world / "captions_val.json"), "--limit", "4"],
        "vqa": [
            str(world / "answers_val.json"), *questions, "--prompt", "question: {} answer:"
        ],
    }  # fmt: skip
    capsys.readouterr()
    metrics = {}
    for place in (run, out):
        for task, references in tasks.items():
            assert (
                main(
                    [
                        "eval",
                        str(place),
                        "--task",
                        task,
                        "--out",
                        str(place / task),
                        *common,
                        "--references",
                        *references,
                    ]
                )
                == 0
            )
            result = json.loads(capsys.readouterr().out)
            metrics[place, task] = result["metrics"]
            assert (
                result["generation"]["num_beams"] == 2
                and len(next(iter(result["checkpoint"]["sha256"].values()))) == 64
            )
            assert result["transform"]["image_size"] == 32 and result["versions"]["transformers"]
    assert all(metrics[run, task] == metrics[out, task] for task in tasks)
    summary = json.loads((run / "summary.json").read_text())
    assert metrics[run, "caption"]["cider"] == pytest.approx(summary["cider"])
    scored = [
        "score",
        "--task",
        "vqa",
        "--references",
        str(world / "answers_val.json"),
        "--predictions",
        str(run / "vqa" / "predictions.json"),
    ]
    assert main([*scored, *questions, "--json"]) == 0
    percent = json.loads(capsys.readouterr().out)["metrics"]["accuracy_percent"]
    assert percent == pytest.approx(metrics[run, "vqa"]["accuracy_percent"])


def test_an_export_keeps_the_pixel_norm(make_run, photos, tmp_path):
    run = make_run("opt", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    export(run, tmp_path / "out")
    again, first = open_model(tmp_path / "out"), open_model(run)
    assert again.tower.norm == first.tower.norm and first.tower.norm.mean == (0.5, 0.4, 0.3)
    assert torch.allclose(again.soft_prompts(photos[:3]), first.soft_prompts(photos[:3]), atol=1e-4)


def test_a_model_in_its_stored_precision(make_run, photos, tmp_path):
    """A bfloat16 language model is exported as bfloat16, and opened in float32 or bfloat16 as asked."""
    run = make_run("llama")
    llm = LlamaForCausalLM.from_pretrained(run.parent / "llm").to(torch.bfloat16)
    llm.save_pretrained(run.parent / "llm")
    export(run, tmp_path / "out")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {k.split(".")[0]: t.dtype for k, t in stored.items() if k.endswith("proj.weight") or "query" in k}
    assert kinds["language_model"] == torch.bfloat16 and kinds["query_tokens"] == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        opened = open_model(tmp_path / "out", dtype=dtype)
        assert next(opened.model.llm.parameters()).dtype == dtype and opened.soft_prompts(photos[:2]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "vqa", "--prompt", "Question: Answer:"], "--prompt"),
        (["--task", "caption", "--out", "{file}"], "--out"),
        (["--task", "okvqa", "--lemmatise"], "spaCy"),
        (["--task", "caption", "--max-new-tokens", "4000"], "128 positions"),
        (["--task", "caption", "--device", "cuda"], "no"),
    ],
)
def test_eval_refuses_before_it_predicts(arguments, words, make_run, tiny_world, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    world, run = tiny_world / "world", make_run("llama")
    (tmp_path / "file").write_text("mine")
    task = arguments[1]
    references = (
        ["captions_val.json"]
        if task == "caption"
        else ["answers_val.json", "--questions", str(world / "questions_val.json")]
    )
    given = [a.format(file=tmp_path / "file") for a in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert (
        main(
            [
                "eval",
                str(run),
                "--images",
                str(world / "images"),
                *given,
                *out,
                "--references",
                str(world / references[0]),
                *references[1:],
            ]
        )
        == 2
    )
    assert words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out" / "predictions.json").exists()
