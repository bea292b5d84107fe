"""What every result file says about how it was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json

import pytest

from vpgtrans.engine.scoring.record import result_record


def test_result_record_of_a_file_and_of_a_folder(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "config.json").write_text("{}")
    digests = {
        name: hashlib.sha256(data).hexdigest() for name, data in (("a.safetensors", b"one"), ("b.safetensors", b"two"))
    }
    settings = {"generation": {"num_beams": 5}, "prompt": None, "transform": {"name": "eval", "pixels": 224}}
    record = result_record(**settings, checkpoint=tmp_path)
    assert json.loads(json.dumps(record)) == record
    assert {name: record[name] for name in settings} == settings
    assert record["checkpoint"] == {"path": str(tmp_path), "sha256": digests}
    versions = {name: importlib.metadata.version(name) for name in ("vpgtrans", "torch", "transformers")}
    assert record["versions"] == versions
    one = result_record(**settings, checkpoint=tmp_path / "a.safetensors")
    assert one["checkpoint"]["sha256"] == {"a.safetensors": digests["a.safetensors"]}


@pytest.mark.parametrize("name", ["", "none.safetensors"])
def test_result_record_refuses_a_checkpoint_that_is_not_there(tmp_path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a model file, or a folder with \.safetensors files"):
        result_record(generation=None, prompt=None, transform="eval", checkpoint=tmp_path / name)
