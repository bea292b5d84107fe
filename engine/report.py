"""`vpgtrans report`: one HTML page for one training run or for several side by side.

    vpgtrans report runs/tfs runs/vpgtrans --out report.html --reference tfs

The page is self-contained (style, script and thumbnails are in it) and says first what came out: how many fewer pairs
and how much less time an arm needs to be as good as the reference ever gets (arXiv 2305.01278, Table 3).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report_page import build_page
from .report_runs import ReportError, Run, find_reference, group_runs, load_run, speedup, summarise
from .report_text import COLUMNS, arm_name, headline, shown_columns

__all__ = ["ReportError", "Run", "load_run", "main", "print_table", "speedup", "summarise", "write_report"]


def write_report(
    run_dirs: Sequence[str | Path],
    out_html: str | Path,
    reference: str | None = None,
    title: str = "VPGTrans training report",
) -> dict[str, Any]:
    """Draw the page and write it, in one step (an old page stays whole until the new one is there).

    Args:
        run_dirs: run folders, in the order in which the arms shall appear.
        out_html: file to write; its folder is made where needed.
        reference: arm, run name or folder to compare with; None: `tfs` where present, else the first arm.

    Returns:
        `path`, `bytes` (size of the page), `runs`, `reference`, `headline`, `summary` (as of `summarise`), `notes`.

    Raises:
        ReportError: a folder cannot be read, the page cannot be written, or there is no such reference.
    """
    runs = [load_run(folder) for folder in run_dirs]
    summary = summarise(runs, reference)
    groups = group_runs(runs)
    page = build_page(title, groups, summary).encode("utf-8", errors="replace")
    out = Path(out_html)
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page)
        partial.replace(out)
    except OSError as error:
        raise ReportError(
            f"{out}: the page cannot be written ({error.strerror}); choose another place with --out"
        ) from error
    return {
        "path": str(out),
        "bytes": len(page),
        "runs": len(runs),
        "reference": find_reference(groups, reference),
        "headline": headline(summary),
        "summary": summary,
        "notes": [f"{run.name}: {note}" for run in runs for note in run.notes],
    }


def print_table(summary: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """Print a summary of `summarise` with rich, the headline first; a dash: not reached, or not measured."""
    console = console or Console()
    console.print(headline(summary), markup=False, highlight=False)
    reference = next(arm_name(arm) for arm, entry in summary.items() if entry["is_reference"])
    several = any(len(entry["seeds"]) > 1 for entry in summary.values())
    table = Table(caption="medians over the seeds" if several else None)
    table.add_column("")
    for arm in summary:
        table.add_column(escape(arm_name(arm)), justify="right", overflow="fold")
    if several:
        table.add_row("seeds", *(str(len(entry["seeds"])) for entry in summary.values()))
    for key in shown_columns(summary):
        title, show = COLUMNS[key]
        cells = [show(entry[key]) if entry[key] is not None else "–" for entry in summary.values()]
        table.add_row(escape(title.format(reference)), *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (2 for a folder or a reference that cannot be used)."""
    parser = argparse.ArgumentParser(prog="vpgtrans report", description="One HTML page for one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run (it holds log.jsonl)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (%(default)s)")
    parser.add_argument("--reference", help="arm to compare with (tfs where present, else the first)")
    parser.add_argument("--title", default="VPGTrans training report")
    options = parser.parse_args(arguments)
    runs = [run for run in options.runs if (run / "log.jsonl").is_file()]
    others = [str(run) for run in options.runs if run not in runs]
    if runs and others:  # runs/demo/*, say, which holds logs/ and the report as well
        print(f"note: passed over, because they hold no log.jsonl: {', '.join(others)}")
    try:
        written = write_report(runs or options.runs, options.out, options.reference, options.title)
    except ReportError as error:
        print(f"vpgtrans report: {error}", file=sys.stderr)
        return 2
    print_table(written["summary"])
    for note in written["notes"]:
        print(f"note: {note}")
    print(f"wrote {written['path']} ({written['bytes'] / 1024:.0f} KiB)")
    return 0
