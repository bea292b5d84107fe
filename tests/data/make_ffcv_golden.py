"""Writes ffcv.beton.gz and ffcv.json beside it with FFCV's own writer: what it writes, for tests of our reader.

    pip install ffcv==1.0.2 Pillow      # needs libturbojpeg0-dev libopencv-dev pkg-config g++
    python tests/data/make_ffcv_golden.py

Two workers, one image a chunk: each has its own page, so the allocation table is not in the order of the samples. FFCV
deals chunks to workers as they come, so files of two runs may differ; the expected contents are written with each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField, TorchTensorField
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

FOLDER = Path(__file__).resolve().parent
FIELDS = {
    "image": RGBImageField(write_mode="jpg"), "label": IntField(), "captions": JSONField(), "pixels": RGBImageField(write_mode="raw"),
    "score": FloatField(), "blob": BytesField(), "vector": NDArrayField(np.dtype("<f4"), (3,)),
    "grid": TorchTensorField(torch.int64, (2, 2)),
}  # fmt: skip


class Samples:
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple:
        index = int(index)  # FFCV hands out NumPy integers, and hangs where a worker raises
        time.sleep(0.05)  # so that both workers get their share
        rows, columns = np.mgrid[0 : 24 + index, 0 : 32 - index]
        image = np.stack([rows * 8, columns * 7, (rows + columns) * 4 + index * 9], -1).clip(0, 255).astype(np.uint8)
        about = {
            "image_id": 100 + index,
            "captions": [f"caption {k} of image {index}" for k in range(index % 3 + 1)] + ["café"],
        }
        blob = np.arange(index + 1, dtype=np.uint8)
        vector = np.array([index, index / 4, -index], np.float32)
        return image, index - 3, about, image[: index + 1], index / 8, blob, vector, torch.full((2, 2), index)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ffcv.beton"
        DatasetWriter(str(path), FIELDS, page_size=1 << 21, num_workers=2).from_indexed_dataset(Samples(), chunksize=1)
        content = path.read_bytes()
        reader = Reader(str(path))
    sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
    order = reader.alloc_table["sample_id"].astype(int).tolist()
    assert order != sorted(order), "one worker wrote everything; run it again"
    names, samples, expected = list(FIELDS), Samples(), []
    for index in range(len(samples)):
        image, label, about, pixels, score, blob, vector, grid = samples[index]
        pointer = int(reader.metadata[index][names.index("image")]["data_ptr"])
        jpeg = content[pointer : pointer + sizes[pointer]]
        expected.append(
            {
                "image_sha256": hashlib.sha256(jpeg).hexdigest(), "size": [image.shape[1], image.shape[0]], "label": label,
                "captions": about, "pixels": pixels.tolist(), "score": score, "blob": blob.tolist(), "vector": vector.tolist(),
                "grid": grid.tolist(),
            }
        )  # fmt: skip
    (FOLDER / "ffcv.beton.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    (FOLDER / "ffcv.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
