"""Two and four real processes against one: losses, weights, checkpoints and memory, replicated and sharded, and layouts that do not fit.

Runs are in float64 unless a name says otherwise, without dropout, which each rank draws for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

SHARDED = ("distribution.frozen=sharded", "distribution.optimizer=sharded")
LLM_BLOCKS, TOWER_BLOCKS = 2, 1


def write_recipe(world: Path, folder: Path, pairs: tuple[int, int]) -> Path:
    """Two stages without dropout, updates of 11 pairs of 4 captions an image, in micro-batches of a row: ragged on 2 ranks and on 4."""
    from vpgtrans.engine.tiny_world import tiny_recipe

    values = tiny_recipe(world, folder / "run")
    values["data"] |= {"row_tokens": 64, "rows_per_micro_batch": 1}
    values["evaluation"]["generate_images"] = 2
    values["qformer"] = {"hidden_size": 16, "num_attention_heads": 2, "dropout": 0.0}
    for stage, count in zip(values["stages"], pairs, strict=True):
        stage["pairs"] = count
    values["output"] |= {"log_every_updates": 1, "keep_checkpoints": 100, "checkpoint_every_pairs": 11}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_t5(world: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(world / "lm_target")
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Jobs:
    """Collects runs and makes them all in one go."""

    def __init__(self, world: Path, folder: Path, pairs: tuple[int, int]):
        self.folder, self.jobs = folder, []
        self.recipe = write_recipe(world, folder, pairs)
        self.t5 = (f"target.llm={write_t5(world, folder / 't5')}",)

    def add(self, name: str, ranks: int, *settings: str, **more) -> None:
        arguments = [str(self.recipe), f"output.folder={self.folder / name}", *settings]
        self.jobs.append({"ranks": ranks, "double": True, "arguments": arguments, **more})

    def run(self) -> str:
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(self.jobs))
        script = Path(__file__).with_name("run_ranks.py")
        done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-4000:]
        return output


@pytest.fixture(scope="module")
def ends(tiny_world, tmp_path_factory) -> Path:
    """Folder of all short runs, by name; `output.txt` is what they printed."""
    jobs = Jobs(tiny_world, tmp_path_factory.mktemp("ranks"), (22, 33))
    no_captions = "evaluation.generate_images=0"
    jobs.add("one", 1)
    jobs.add("two", 2, count=str(jobs.folder / "replicated.jsonl"))
    jobs.add("two-sharded", 2, *SHARDED, count=str(jobs.folder / "sharded.jsonl"))
    jobs.add("t5-one", 1, *jobs.t5)
    jobs.add("t5-two-sharded", 2, *jobs.t5, *SHARDED)
    jobs.add("single-one", 1, no_captions, double=False)
    jobs.add("single-two", 2, no_captions, double=False)
    fp8 = (no_captions, "kernels.frozen_linear=kernel")
    jobs.add("fp8-one", 1, *fp8, double=False, fp8=True)
    jobs.add("fp8-two-sharded", 2, *fp8, *SHARDED, double=False, fp8=True)
    jobs.add("misfit", 3, "distribution.shard_over=node", local_ranks=2, code=2)
    # What two ranks with spread moments saved in the second stage goes on on one, and the other way round.
    jobs.add("two-sharded", 1, forget=[str(jobs.folder / "two-sharded"), 3])
    jobs.add("one", 2, *SHARDED, forget=[str(jobs.folder / "one"), 3])
    keep_first(jobs, "two-sharded", "one")
    (jobs.folder / "output.txt").write_text(jobs.run())
    return jobs.folder


def keep_first(jobs: Jobs, *names: str) -> None:
    """Runs that go on do so on a copy, so that the first end can be looked at too."""
    for job in jobs.jobs[-len(names) :]:
        job["copy"] = [job["forget"][0], job["forget"][0] + "-resumed"]
        job["forget"][0] += "-resumed"
        job["arguments"][1] += "-resumed"


def events(folder: Path, *kinds: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] in kinds]


def worst_loss(one: Path, many: Path) -> float:
    """The largest relative difference of all training and validation losses."""
    ours, theirs = (
        [e.get("loss", e.get("val_loss")) for e in events(folder, "train", "eval")] for folder in (one, many)
    )
    assert len(ours) == len(theirs) > 7
    return max(abs(a - b) / a for a, b in zip(ours, theirs, strict=True))


def worst_weight(one: Path, many: Path) -> float:
    """The largest difference in a tensor over the largest value there.

    Biases of keys are left out: softmax does not see them, so that their gradient is rounding, which AdamW makes as large as any other.
    """
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (one, many))
    names = [name for name in ours if not name.endswith("key.bias")]
    assert len(names) > 40 and ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()).item() for n in names)


@pytest.mark.parametrize(
    ("one", "many"),
    [("one", "two"), ("one", "two-sharded"), ("t5-one", "t5-two-sharded")],
)
def test_two_ranks_end_like_one(one, many, ends):
    assert worst_loss(ends / one, ends / many) < 1e-9
    assert worst_weight(ends / one, ends / many) < 1e-9


def test_two_ranks_end_like_one_in_single_precision(ends):
    assert worst_loss(ends / "single-one", ends / "single-two") < 1e-5


def test_fp8_linears_in_pieces_follow_whole_ones(ends):
    """The same values forwards; backwards one copy in place of two, rounded elsewhere."""
    one, many = ends / "fp8-one", ends / "fp8-two-sharded"
    first, sharded_first = (events(folder, "eval")[0]["val_loss"] for folder in (one, many))
    assert first == pytest.approx(sharded_first, rel=1e-6)
    assert first != pytest.approx(events(ends / "single-one", "eval")[0]["val_loss"], rel=1e-5)
    assert worst_loss(one, many) < 0.02
    for part in ("language model", "tower"):
        sizes = [
            e["block_bytes"] for f in (many, ends / "two-sharded") for e in events(f, "sharded") if e["part"] == part
        ]
        assert (
            sizes[0] < 0.37 * sizes[1] / 2
        )  # the other run is in float64; of so small blocks a third are norms and biases


def test_sharding_changes_no_bit(ends):
    """Weights and AdamW's moments of two ranks, whole on each or spread: one file format and the same numbers.

    Not so of T5, where autograd adds the decoder blocks' gradients of the encoder's states in another order: see the test above.
    """
    whole, spread = ends / "two", ends / "two-sharded"
    for file in ("last/model.safetensors", "checkpoints/step-00000005/optimizer.safetensors"):
        ours, theirs = load_file(whole / file), load_file(spread / file)
        assert ours.keys() == theirs.keys() and len(ours) > 40
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("kind", ["", "t5-"])
def test_captions_and_answers_under_sharding(kind, ends):
    for file in ("captions.json", "answers.json"):
        assert (ends / f"{kind}two-sharded" / file).read_text() == (ends / f"{kind}one" / file).read_text()


def test_moments_saved_by_two_ranks_go_on_on_one_and_the_other_way_round(ends):
    for name in ("two-sharded", "one"):
        resumed = ends / f"{name}-resumed"
        said = (ends / "output.txt").read_text().replace("\n", "")
        assert f"{resumed}/checkpoints/step-00000003" in said
        assert worst_loss(ends / "one", resumed) < 1e-9
        assert worst_weight(ends / "one", resumed) < 1e-9


def test_collectives_of_an_update(ends):
    """One sum; with shards a gather for each block and pass, of the tower forwards alone; nothing is reduced and scattered."""
    for name, gathers in (("replicated", 0), ("sharded", 2 * LLM_BLOCKS + TOWER_BLOCKS)):
        updates = [json.loads(line) for line in (ends / f"{name}.jsonl").read_text().splitlines()]
        assert len(updates) == 5 and max(u["micro_batches"] for u in updates) > 1
        for update in updates:
            assert update["all_reduce"] == 1
            assert update.get("all_gather", 0) == gathers * update["micro_batches"]
            assert update.keys() <= {"all_reduce", "all_gather", "micro_batches"}


def check_memory(folder: Path, ranks: int) -> None:
    parts = {e["part"]: e for e in events(folder, "sharded")}
    assert parts.keys() == {"language model", "tower"}
    for part in parts.values():
        assert part["ranks"] == ranks and len(part["rank_bytes"]) == ranks
        # Each tensor is cut along its first side into equal pieces: all sizes of the tiny world divide but the tower's.
        assert all(size == pytest.approx(part["block_bytes"] / ranks, rel=0.02) for size in part["rank_bytes"])


def test_a_rank_keeps_its_part_of_the_frozen_blocks(ends):
    check_memory(ends / "two-sharded", 2)
    assert not events(ends / "two", "sharded")


def test_a_world_that_does_not_divide_into_nodes_stops_all_ranks(ends):
    output = (ends / "output.txt").read_text()
    wanted = "recipe error: distribution.shard_over: 'node' needs nodes with equally many ranks, got a world of 3 ranks and nodes of 2"
    assert output.count(wanted) == 1
    assert not (ends / "misfit" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "t5-"])
def test_four_ranks_over_50_updates(kind, tiny_world, tmp_path):
    """Replicated, sharded over all, and over pairs as if on two nodes; frozen memory falls with the ranks that share it."""
    jobs = Jobs(tiny_world, tmp_path, (11 * 17, 11 * 33))
    llm = jobs.t5 if kind else ()
    common = (*llm, "evaluation.generate_images=0", "output.checkpoint_every_pairs=null")
    jobs.add("one", 1, *common)
    jobs.add("single-one", 1, *common, double=False)
    for ranks in (2, 4):
        jobs.add(f"{ranks}", ranks, *common)
        jobs.add(f"{ranks}-sharded", ranks, *common, *SHARDED)
        jobs.add(f"single-{ranks}", ranks, *common, double=False)
    jobs.add("4-node", 4, *common, *SHARDED, "distribution.shard_over=node", local_ranks=2)
    jobs.add("4-offloaded", 4, *common, *SHARDED, "distribution.cpu_offload=true", "distribution.prefetch_blocks=0")
    jobs.run()
    for many in ("2", "2-sharded", "4", "4-sharded", "4-node", "4-offloaded"):
        found = worst_loss(tmp_path / "one", tmp_path / many), worst_weight(tmp_path / "one", tmp_path / many)
        print(f"{kind}{many}: losses {found[0]:.1e}, weights {found[1]:.1e}")
        assert max(found) < 1e-9
    for ranks in (2, 4):
        difference = worst_loss(tmp_path / "single-one", tmp_path / f"single-{ranks}")
        print(f"{kind}{ranks}: losses {difference:.1e} in float32")
        assert difference < 1e-5
        check_memory(tmp_path / f"{ranks}-sharded", ranks)
    check_node(tmp_path / "4-node")


def check_node(folder: Path) -> None:
    for part in events(folder, "sharded"):
        assert part["ranks"] == 2 and len(part["rank_bytes"]) == 4
        assert sum(part["rank_bytes"]) == pytest.approx(2 * part["block_bytes"], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["distribution.cpu_offload=true"], ["distribution: cpu_offload", "frozen is sharded", "auto"]),
        (
            ["distribution.optimizer=sharded", "kernels.adamw_step=kernel"],
            ["kernels.adamw_step, distribution.optimizer"],
        ),
        (["distribution.frozen=split"], ["distribution.frozen", "'sharded'"]),
    ],
)
def test_settings_that_exclude_each_other(settings, words, tiny_recipe):
    from vpgtrans.engine.recipe import RecipeError, load_recipe

    with pytest.raises(RecipeError) as raised:
        load_recipe(tiny_recipe, settings)
    assert all(word in str(raised.value) for word in words), raised.value
