"""The report on run folders made here: numbers checked by hand, the page read back with an HTML parser."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from vpgtrans.engine.report import ReportError, load_run, main, print_table, speedup, summarise, write_report
from vpgtrans.engine.report_chart import interpolate, median_curve, nice_ticks, smooth, tick_text, value_range
from vpgtrans.engine.report_page import flatten, thumbnail
from vpgtrans.engine.report_text import headline, seconds_text

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = """<script>alert("x")</script> ' onmouseover="y" & </title>"""
TFS = {0: 3.0, 1000: 1.0, 2000: 0.8, 3000: 0.6, 4000: 0.65}
TRANSFER = {0: 2.0, 1000: 0.6, 2000: 0.5, 3000: 0.45, 4000: 0.5}


def make_run(
    folder: Path,
    arm: str,
    losses: dict[int, float],
    *,
    seed: int = 0,
    seconds_per_pair: float = 0.01,
    cider: dict[int, float] | None = None,
    stage_two_at: int | None = None,
    **more: Any,
) -> Path:
    """A run folder with one evaluation for each entry of `losses` (pairs -> loss) and a training event before each."""
    folder.mkdir(parents=True)
    name = more.get("name", folder.name)
    events: list[dict[str, Any]] = [{"event": "start", "name": name, "arm": arm, "device": "cpu", "time": 1.75e9}]
    boundary = stage_two_at or 0
    events.append({"event": "stage", "stage": "first", "index": 0, "step": 0, "pairs": 0, "trainable_parameters": 10})
    if stage_two_at:
        events.append({"event": "stage", "stage": "second", "index": 1, "step": 9, "pairs": boundary})
    for pairs, loss in losses.items():
        common = {"stage": "first" if pairs <= boundary else "second", "step": pairs // 10, "pairs": pairs}
        common["seconds"] = pairs * seconds_per_pair
        events.append({"event": "train", **common, "loss": loss, "gpu_hours": 0.5})
        events.append({"event": "eval", **common, "val_loss": loss})
        if cider and pairs in cider:
            events[-1]["cider"] = cider[pairs]
    events += more.get("events", [])
    events.append({"event": "end"})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    summary = {"name": name, "arm": arm, "seed": seed, "device": "cpu", "pairs": max(losses), **more.get("summary", {})}
    (folder / "summary.json").write_text(json.dumps(summary))
    recipe = {"name": name, "seed": seed, "stages": [{"name": "tune", "learning_rate": more.get("rate", 1e-4)}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def add_samples(folder: Path, captions: list[str], size: tuple[int, int] = (320, 200)) -> None:
    """`samples.json` and its photographs beside it; image ids are 100, 101, …"""
    samples = []
    for i, caption in enumerate(captions):
        Image.new("RGB", size, (10 * i, 80, 120)).save(folder / f"image{i}.jpg")
        references = [f"human words {i}", NASTY]
        samples.append({"image_id": 100 + i, "file": f"image{i}.jpg", "references": references, "caption": caption})
    (folder / "samples.json").write_text(json.dumps(samples))


class Page(HTMLParser):
    """Reads a page and fails on tags that are not closed in order; keeps tags with attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is there twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.tags if name == tag and all(a.get(k) == v for k, v in wanted.items())]

    def words(self) -> str:
        return " ".join(self.text)


def classed(page: Page, tag: str, *classes: str) -> list[dict[str, str | None]]:
    return [a for a in page.all(tag) if set(classes) <= set((a.get("class") or "").split())]


def test_speedup_is_the_papers_ratio(tmp_path: Path) -> None:
    tfs = load_run(make_run(tmp_path / "a", "tfs", TFS))
    transfer = load_run(make_run(tmp_path / "b", "vpgtrans", TRANSFER, seconds_per_pair=0.02))
    # equal counts as reached: 0.6 at 1000 pairs against 0.6 at 3000; twice the time a pair
    assert speedup(tfs, transfer) == {
        "pairs_to_tfs_best": 1000,
        "seconds_to_tfs_best": 20.0,
        "speedup_pairs": 3.0,
        "speedup_seconds": 1.5,
    }
    itself = speedup(tfs, tfs)
    assert (itself["pairs_to_tfs_best"], itself["speedup_pairs"], itself["speedup_seconds"]) == (3000, 1.0, 1.0)
    # the other way round, TFS never gets there
    assert set(speedup(transfer, tfs).values()) == {None}


def test_speedup_by_cider_takes_the_larger_as_better(tmp_path: Path) -> None:
    tfs = load_run(make_run(tmp_path / "a", "tfs", TFS, cider={2000: 0.5, 3000: 0.9, 4000: 0.9}))
    transfer = load_run(make_run(tmp_path / "b", "vpgtrans", TRANSFER, cider={1000: 0.89, 2000: 0.95}))
    assert speedup(tfs, transfer, "cider")["speedup_pairs"] == 1.5
    summary = summarise([tfs, transfer], "tfs")
    assert summary["vpgtrans"]["pairs_to_tfs_best_cider"] == 2000
    assert summary["vpgtrans"]["cider"] == 0.95
    with pytest.raises(ReportError, match=r"metric: expected one of val_loss, cider.*got 'bleu'"):
        speedup(tfs, transfer, "bleu")


def test_reached_before_the_first_pair_gives_no_ratio(tmp_path: Path) -> None:
    tfs = load_run(make_run(tmp_path / "a", "tfs", TFS))
    ready = load_run(make_run(tmp_path / "b", "vpgtrans", {0: 0.3, 1000: 0.2}))
    assert speedup(tfs, ready)["pairs_to_tfs_best"] == 0
    assert speedup(tfs, ready)["speedup_pairs"] is None
    assert "VPGTrans reaches the best validation loss of TFS (0.600) before it is trained" in headline(
        summarise([tfs, ready])
    )


def test_median_over_seeds_uses_the_reference_of_the_same_seed(tmp_path: Path) -> None:
    runs = []
    for seed, best_at in enumerate((2000, 4000, 6000)):
        runs.append(make_run(tmp_path / f"t{seed}", "tfs", {1000: 0.9, best_at: 0.6 - 0.1 * seed}, seed=seed))
    # reached at 1000, at 2000, never (seed 2 needs 0.4)
    for seed, losses in enumerate(({1000: 0.55}, {1000: 0.55, 2000: 0.5}, {1000: 0.55})):
        runs.append(make_run(tmp_path / f"v{seed}", "vpgtrans", losses, seed=seed))
    summary = summarise([load_run(run) for run in runs], "tfs")
    entry = summary["vpgtrans"]
    assert entry["seeds"] == [0, 1, 2]
    assert (entry["seeds_compared"], entry["seeds_reached"]) == (3, 2)
    # 2, 2, never: the one that never gets there counts as slowest
    assert (entry["pairs_to_tfs_best"], entry["speedup_pairs"]) == (2000, 2.0)
    assert (entry["min"]["pairs_to_tfs_best"], entry["max"]["pairs_to_tfs_best"]) == (1000, 2000)
    assert summary["tfs"]["pairs_to_tfs_best"] == 4000
    assert summary["tfs"]["best_val_loss"] == pytest.approx(0.5)
    json.dumps(summary, allow_nan=False)
    # two of three never: the median is never
    make_run(tmp_path / "v1b", "slow", {1000: 0.55}, seed=1)
    make_run(tmp_path / "v2b", "slow", {1000: 0.55}, seed=2)
    make_run(tmp_path / "v0b", "slow", {1000: 0.55}, seed=0)
    slow = [load_run(tmp_path / name) for name in ("v0b", "v1b", "v2b")]
    assert summarise([load_run(run) for run in runs[:3]] + slow)["slow"]["speedup_pairs"] is None


def test_seed_without_partner_is_left_out_and_said(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"t{seed}", "tfs", TFS, seed=seed) for seed in (0, 1)]
    folders.append(make_run(tmp_path / "v", "vpgtrans", TRANSFER, seed=7))
    entry = summarise([load_run(folder) for folder in folders])["vpgtrans"]
    assert entry["seeds_compared"] == 0 and entry["speedup_pairs"] is None
    assert "seed 7 has no reference run of the same seed" in entry["notes"][0]
    # with one reference there is no choice; the difference is said
    entry = summarise([load_run(folder) for folder in folders[1:]])["vpgtrans"]
    assert entry["speedup_pairs"] == 3.0 and "reference run, which has seed 1" in entry["notes"][0]


def test_runs_that_repeat_arm_and_seed_are_told_apart(tmp_path: Path) -> None:
    low = load_run(make_run(tmp_path / "lr_low", "tfs", TFS))
    high = load_run(make_run(tmp_path / "lr_high", "tfs", TRANSFER))
    assert list(summarise([low, high])) == ["lr_low", "lr_high"]
    assert summarise([low, high], "lr_high")["lr_low"]["speedup_pairs"] is None
    with pytest.raises(ReportError, match="reference: 'tfs' fits 2 of the runs; expected one of lr_low, lr_high"):
        summarise([low, high], "tfs")
    with pytest.raises(ReportError, match="reference: 'nobody' is not among the runs"):
        summarise([low, high], "nobody")
    with pytest.raises(ReportError, match="expected each folder once"):
        summarise([low, load_run(tmp_path / "lr_low")])


def test_cut_last_line_is_skipped_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "tfs", TFS)
    log = folder / "log.jsonl"
    whole = log.read_bytes()
    lines = whole.count(b"\n")
    log.write_bytes(whole + '{"event": "eval", "val_loss": 0.1, "name": "é'.encode()[:-1])
    run = load_run(folder)
    assert len(run.evals) == 5
    assert f"the last line of log.jsonl (line {lines + 1}) is cut off" in run.notes[0]
    write_report([folder], tmp_path / "r.html")
    assert "is cut off and was skipped" in Page(tmp_path / "r.html").words()
    # in the middle, where a resumed run went on writing
    log.write_bytes(b'{"event": "tr' + b"\n[1]\n" + whole)
    assert "2 unreadable line(s) of log.jsonl were skipped: 1, 2" in load_run(folder).notes


def test_resumed_run_counts_each_place_once(tmp_path: Path) -> None:
    again = [{"event": "start", "name": "a"}]
    again += [
        {"event": "eval", "stage": "second", "pairs": p, "seconds": 1.0 * p, "val_loss": 0.7} for p in (3000, 5000)
    ]
    again.append({"event": "eval", "stage": "second", "pairs": 5000, "seconds": 5000.0, "cider": 0.4})
    run = load_run(make_run(tmp_path / "a", "tfs", TFS, events=again))
    assert [point[0] for point in run.curve("val_loss")] == [0, 1000, 2000, 3000, 5000]
    assert run.curve("val_loss")[3][2] == 0.7
    # loss and score of one evaluation in two events
    assert run.curve("cider") == [(5000, 5000.0, 0.4)]
    assert run.starts == 2


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "a", "tfs", TFS | {3500: float("nan"), 5000: float("-inf"), 6000: 10**400}))
    assert run.result("best_val_loss") == 0.6
    assert any("3 evaluation(s) with a validation loss that is not finite" in note for note in run.notes)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"run folder .*nowhere: expected a folder written by training"):
        load_run(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ReportError, match=r"run folder .*empty: expected a log\.jsonl in it"):
        load_run(empty)
    (empty / "log.jsonl").write_text('{"event": "st')
    with pytest.raises(ReportError, match=r"run folder .*empty: log\.jsonl holds no event"):
        load_run(empty)
    folder = make_run(tmp_path / "a", "tfs", TFS)
    with pytest.raises(ReportError, match=r"r\.html: the page cannot be written \(.*choose another place"):
        write_report([folder], folder / "log.jsonl" / "r.html")
    (folder / "samples.json").write_text("{}")
    with pytest.raises(ReportError, match=r"samples\.json: expected a list, found dict"):
        load_run(folder)
    (folder / "samples.json").unlink()
    (folder / "recipe.yaml").write_text("a: [1")
    with pytest.raises(ReportError, match=r"recipe\.yaml: expected YAML"):
        load_run(folder)
    (folder / "recipe.yaml").unlink()
    (folder / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"summary\.json: expected JSON"):
        load_run(folder)
    (folder / "summary.json").unlink()
    run = load_run(folder)
    assert [note.split(":")[0] for note in run.notes] == ["no summary.json", "no samples.json", "no recipe.yaml"]
    assert (run.arm, run.result("final_val_loss"), run.result("pairs"), run.result("gpu_hours")) == (
        "tfs",
        0.65,
        4000,
        0.5,
    )


def test_page_of_several_arms_and_seeds(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        shift = 0.01 * seed
        losses = ({k: v + shift for k, v in curve.items()} for curve in (TFS, TRANSFER))
        for arm, curve in zip(("tfs", "vpgtrans"), losses, strict=True):
            at = 1000 if arm == "vpgtrans" else None
            scores = {2000: 0.5 - shift, 4000: 0.7}
            folder = tmp_path / f"{arm}{seed}"
            folders.append(
                make_run(folder, arm, curve, seed=seed, cider=scores, stage_two_at=at, rate=1e-4 + (at or 0))
            )
            add_samples(folder, [f"{arm} says {i}" for i in range(14)])
    written = write_report(folders, tmp_path / "deep" / "r.html", "tfs", title="A race")
    page = Page(tmp_path / "deep" / "r.html")
    assert written["bytes"] == (tmp_path / "deep" / "r.html").stat().st_size < 400_000
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "r.html"]
    assert written["headline"] in page.words()
    assert written["headline"] == (
        "VPGTrans reaches the best validation loss of TFS (0.610, median of 3 seeds) "
        "with 3.0× fewer pairs and in 3.0× less time."
    )
    # loss, CIDEr and training loss, each over pairs and over seconds
    assert len(classed(page, "svg", "chart")) == 6
    # 2 medians and 6 seeds a chart; one stage boundary a chart on the line of the one arm that has it
    assert len(classed(page, "path", "line", "bold")) - len(classed(page, "svg", "swatch")) + 4 == 12
    assert len(classed(page, "path", "line", "thin")) == 36
    ticks = classed(page, "path", "tick")
    assert {tick["data-label"] for tick in ticks} == {"VPGTrans, median"}
    assert {tick["data-mark"] for tick in ticks} == {"stage second begins"}
    images = page.all("img")
    assert len(images) == 12
    with Image.open(io.BytesIO(base64.b64decode(images[3]["src"].split(",")[1]))) as thumb:
        assert thumb.format == "JPEG" and thumb.size == (160, 100)
    assert "12 of 14 images" in page.words() and "tfs says 11" in page.words() and "tfs says 12" not in page.words()
    # the rate differs, the seeds do not
    assert "stages.tune.learning_rate" in page.text and "1000.0001" in page.text and "seed" in page.text
    assert "stages.tune.name" not in page.text
    clip_paths = [a["id"] for a in page.all("clippath")]
    assert len(set(clip_paths)) == 6


def test_page_loads_nothing_and_escapes_everything(tmp_path: Path) -> None:
    warning = {"event": "warning", "name": NASTY, "message": NASTY, "value": NASTY, "step": NASTY}
    start = {"versions": {NASTY: NASTY}, "context": {"url": "https://example.org/x.js"}}
    folders = []
    for arm in ("tfs", NASTY):
        folder = make_run(tmp_path / f"r{len(folders)}", arm, TRANSFER, events=[warning], summary=start, name=NASTY)
        add_samples(folder, [NASTY, f'"{NASTY}'])
        samples = json.loads((folder / "samples.json").read_text())
        samples += [{"image_id": NASTY, "file": NASTY}, samples[0] | {"image_id": NASTY + "2", "references": []}]
        (folder / "samples.json").write_text(json.dumps(samples))
        with (folder / "log.jsonl").open("a") as log:
            log.write('{"event": "ev')  # the note about it carries the run's name
        (folder / "recipe.yaml").write_text(yaml.safe_dump({NASTY: arm}))
        folders.append(folder)
    write_report(folders, tmp_path / "r.html", title=NASTY)
    page = Page(tmp_path / "r.html")
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1 and len(page.all("title")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "use", "image")
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    # whole in the text: title, heading, caption, reference, warning, key and arm
    assert page.text.count(NASTY) >= 8
    assert NASTY not in page.source
    assert NASTY in {a.get("alt") for a in page.all("img")} | {
        a["data-label"] for a in classed(page, "path", "line") if "data-label" in a
    }
    assert page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].startswith("default-src 'none'")


def test_one_run_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "vpgtrans", TRANSFER)
    written = write_report([folder], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert written["headline"] == "VPGTrans is at its best validation loss (0.450) after 3,000 pairs."
    assert "speed-up" not in page.words().lower()
    assert not classed(page, "path", "level") and not page.all("img")
    assert "no images and captions to show" in page.words()
    assert len(classed(page, "svg", "chart")) == 4


def test_never_reached_is_a_dash(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", "tfs", TFS), make_run(tmp_path / "b", "vpg_inherit", {1000: 0.9, 2000: 0.7})]
    written = write_report(folders, tmp_path / "r.html")
    assert written["headline"] == (
        "No other arm reaches the best validation loss of TFS (0.600); the closest is VPGInherit with 0.700."
    )
    page = Page(tmp_path / "r.html")
    row = page.text.index("speed-up in pairs")
    assert page.text[row + 1 : row + 3] == ["1.0×", "–"]


def test_run_without_evaluations_still_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "tfs", {1000: 1.0})
    (folder / "log.jsonl").write_text('{"event": "start", "name": "a", "arm": "tfs"}\n')
    written = write_report([folder, make_run(tmp_path / "b", "vpgtrans", TRANSFER)], tmp_path / "r.html")
    assert written["headline"] == "TFS has no validation loss yet, so there is nothing to compare with."
    assert "log.jsonl holds no evaluation" in Page(tmp_path / "r.html").words()


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "tfs", TFS)
    add_samples(folder, ["one", "two", "three", ""])
    (folder / "image0.jpg").unlink()
    (folder / "image1.jpg").write_bytes(b"\xff\xd8 no image")
    turned = Image.new("CMYK", (300, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "image2.jpg", exif=exif)
    write_report([folder], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "image0.jpg: not found" in page.text and "image1.jpg: not readable" in page.text
    assert "(empty)" in page.text
    assert [(a["width"], a["height"]) for a in page.all("img")] == [("53", "160"), ("160", "100")]
    assert thumbnail(folder / "image2.jpg")[1:] == (53, 160)


def test_table_on_the_screen(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / "a", "tfs", TFS)), load_run(make_run(tmp_path / "b", "[bold]x", TRANSFER))]
    console = Console(file=io.StringIO(), width=80)
    print_table(summarise(runs, "tfs"), console)
    shown = console.file.getvalue()
    assert "[bold]x reaches the best validation loss of TFS (0.600) with 3.0× fewer pairs" in shown.replace("\n", "")
    row = next(line for line in shown.splitlines() if "speed-up in pairs" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["speed-up in pairs", "1.0×", "3.0×"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a", "tfs", TFS)
    assert main([str(folder), "--out", str(tmp_path / "r.html"), "--reference", "TFS"]) == 0
    assert "KiB)" in capsys.readouterr().out
    assert main([str(tmp_path), "--out", str(tmp_path / "no.html")]) == 2
    assert "expected a log.jsonl in it" in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()


def test_median_curve() -> None:
    same = [[(0, 0.0, 3.0), (10, t, v)] for t, v in ((1.0, 5.0), (2.0, 7.0), (9.0, 6.0))]
    assert median_curve(same) == [(0, 0.0, 3.0), (10, 2.0, 6.0)]
    # no place in common: interpolated where both have values
    merged = median_curve([[(0, 0.0, 0.0), (10, 1.0, 10.0)], [(2, None, 4.0), (8, None, 4.0)]])
    assert merged == [(2, None, 3.0), (8, None, 6.0)]
    assert interpolate([(0, 1.0), (2, 5.0)], 0.5) == 2.0
    assert interpolate([(0, 1.0), (2, 5.0)], 2.5) is None


def test_smoothing_keeps_ends_and_mean() -> None:
    noisy = [(float(i), float(i), 5.0 + (-1) ** i) for i in range(1000)]
    drawn = smooth(noisy)
    assert len(drawn) < 130 and drawn[0] == noisy[0] and drawn[-1] == noisy[-1]
    assert all(abs(value - 5.0) < 0.1 for _, _, value in drawn[2:-2])
    assert smooth([]) == [] and smooth(noisy[:1]) == noisy[:1]


def test_axes() -> None:
    assert nice_ticks(0, 64000) == [0, 20000, 40000, 60000]
    assert [tick_text(x, 20000) for x in (0, 20000, 60000)] == ["0", "20k", "60k"]
    assert [tick_text(x, 0.25) for x in (0.25, 0.5)] == ["0.25", "0.50"]
    assert tick_text(2.5, 2.5) == "2.5" and tick_text(1_500_000, 500_000) == "1.5M"
    assert value_range([1.0, 1.0], False)[0] < 1.0 < value_range([1.0, 1.0], False)[1]
    low, high, cut = value_range([9.0, 1.2, 1.1, 1.0, 1.0, 1.0], True)
    assert cut and low < 1.0 and 1.2 < high < 2.0
    assert value_range([1.5, 1.2, 1.1, 1.0, 1.0, 0.9], True)[2] is False
    assert [seconds_text(s) for s in (95.0, 738.0, 12240.0)] == ["95.0 s", "12.3 min", "3.4 h"]


def test_flatten_goes_by_stage_names() -> None:
    assert flatten({"a": {"b": [1, 2], "c": None}, "s": [{"name": "x", "r": 1}, {"name": "y"}]}) == {
        "a.b": "1, 2",
        "a.c": "not set",
        "s.x.name": "x",
        "s.x.r": "1",
        "s.y.name": "y",
    }
    assert flatten([{"r": 1}], "s") == {"s.0.r": "1"}
