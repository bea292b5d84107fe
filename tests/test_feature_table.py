"""The table of a cache: rows with checksums that several processes may fill at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import zlib

import pytest
import torch

from vpgtrans.engine.data import feature_table
from vpgtrans.engine.data.feature_table import FeatureTable, Layout
from vpgtrans.engine.data.reading import DataError

LAYOUT = Layout(2, 50, 3, 10, torch.float32)
ABOUT = {"key": "k", "made_of": {}}


def values(*rows: int) -> torch.Tensor:
    """What row n holds: depends on n alone."""
    return torch.stack([torch.arange(30.0).view(3, 10) + 100 * n for n in rows])


def opened(tmp_path, layout: Layout = LAYOUT) -> FeatureTable:
    return FeatureTable(tmp_path / "table", layout, ABOUT)


def test_rows_come_back_from_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_table, "SHARD_BYTES", 7 * LAYOUT.row_bytes)
    table = opened(tmp_path)
    assert len(list(table.folder.glob("shard-*.bin"))) == 15
    assert table.read([3]) is None
    table.write([99, 3, 7], LAYOUT.encode(values(99, 3, 7)))
    assert table.read([3, 4]) is None and table.missing() == 97
    again = opened(tmp_path)
    assert torch.equal(LAYOUT.decode(again.read([7, 99, 3, 7])), values(7, 99, 3, 7))
    assert sum(p.stat().st_blocks for p in table.folder.glob("shard-*.bin")) * 512 < table.layout.bytes  # sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["compute", "fp8"])
def test_what_is_stored_is_what_is_read(dtype, precision):
    layout = Layout(1, 4, 5, 7, dtype, precision)  # of odd sizes, so that rows are padded
    given = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype) * 50
    given[2, 1] = 0
    raw = layout.encode(given)
    assert raw.shape == (4, layout.row_bytes) and layout.row_bytes % 64 == 0
    read = layout.decode(raw)
    assert read.dtype == dtype and read.is_contiguous()
    if precision == "compute":
        assert torch.equal(read, given)
    else:
        assert torch.allclose(read.float(), given.float(), rtol=1 / 16 + 2**-8, atol=50 * 4 / 448 / 2**6)
        assert torch.equal(read[2, 1], given[2, 1])
        assert torch.equal(layout.encode(read), raw) or dtype != torch.float32


def test_a_row_that_is_there_stays(tmp_path):
    table = opened(tmp_path)
    table.write([5], LAYOUT.encode(values(5)))
    table.write([5, 6], LAYOUT.encode(values(1, 6)))
    assert torch.equal(LAYOUT.decode(table.read([5, 6])), values(5, 6))


def test_a_row_without_its_checksum_is_absent_and_a_torn_one_is_replaced(tmp_path):
    table = opened(tmp_path)
    table.write([0, 1, 2], LAYOUT.encode(values(0, 1, 2)))
    shard = table.folder / "shard-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[LAYOUT.row_bytes + 3] ^= 0x40
    shard.write_bytes(raw)
    again = opened(tmp_path)
    assert again.read([0, 1]) is None and again.damaged == {1}
    again.write([0, 1], LAYOUT.encode(values(0, 1)))
    assert torch.equal(LAYOUT.decode(again.read([0, 1, 2])), values(0, 1, 2))
    shard.write_bytes(raw)
    third = opened(tmp_path)
    assert third.verify() == 1 and third.missing() == 98 and third.holds([0, 2])


def test_ranks_that_have_read_other_rows_check_all_of_them(tmp_path):
    opened(tmp_path).write([3, 5], LAYOUT.encode(values(3, 5)))
    ranks = [opened(tmp_path) for _ in range(2)]
    ranks[1].read([3])
    shard = ranks[0].folder / "shard-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[5 * LAYOUT.row_bytes] ^= 1
    shard.write_bytes(raw)
    assert sum(table.verify(rank, 2) for rank, table in enumerate(ranks)) == 1


def test_each_row_is_checked_once_a_process(tmp_path, monkeypatch):
    opened(tmp_path).write([0, 1], LAYOUT.encode(values(0, 1)))
    table, checked, crc32 = opened(tmp_path), [], zlib.crc32

    def counting(data):
        checked.append(1)
        return crc32(data)

    monkeypatch.setattr(feature_table.zlib, "crc32", counting)
    for _ in range(3):
        table.read([0, 1])
    assert len(checked) == 2


def test_unusable_images_are_told(tmp_path):
    opened(tmp_path).write([4, 9], LAYOUT.encode(values(4, 9)), {9: "truncated"})
    table = opened(tmp_path)
    assert table.unusable() == table.unusable([4, 9]) == {9: "truncated"} and table.unusable([4]) == {}
    (table.folder / "unusable.jsonl").write_text('{"row": 9, "wh')  # cut off by a kill
    assert opened(tmp_path).unusable() == {9: "unknown reason"}


def test_a_full_disk_is_an_error_and_leaves_the_row_absent(tmp_path, monkeypatch):
    table = opened(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_table, "_write_at", full)
    with pytest.raises(OSError, match="No space left"):
        table.write([0], LAYOUT.encode(values(0)))
    assert opened(tmp_path).missing() == 100


def fill(folder, start, seed):
    table = FeatureTable(folder, LAYOUT, ABOUT)
    start.wait()
    written = 0
    for row in torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist():
        with table.claim(row, 1) as is_ours:
            if is_ours and not table.holds([row]):
                written += 1
                table.write([row], LAYOUT.encode(values(row)))
    return written


def test_processes_fill_one_table_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(3) as pool:
        start = manager.Barrier(3)
        written = pool.starmap(fill, [(tmp_path / "table", start, seed) for seed in range(3)])
    table = opened(tmp_path)
    assert sum(written) == 100 and table.missing() == 0 and table.verify() == 0
    assert torch.equal(LAYOUT.decode(table.read(range(100))), values(*range(100)))


def test_another_layout_is_foreign(tmp_path):
    opened(tmp_path)
    with pytest.raises(DataError, match=r"layout: expected .*, found .*a foreign cache"):
        opened(tmp_path, Layout(2, 50, 3, 10, torch.bfloat16))
