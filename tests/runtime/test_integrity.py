"""What is loaded is what was checked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_slm_runtime import load, loading
from edge_slm_runtime.errors import FileAltered, SymlinkRefused


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("onnxruntime", "onnx-int8/model.data"),
        ("onnxruntime", "onnx-int8/model.onnx"),
        ("numba", "numba-int8/model.safetensors"),
        ("ctranslate2", "ctranslate2-int8/model.bin"),
        ("onnxruntime", "tokenizer.json"),
    ],
)
def test_a_file_that_is_swapped_between_check_and_loading(
    tiny_bundle: Path, tmp_path: Path, engine: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another one, by a link, by being written to, and for no longer than the loading."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    place, kept = bundle / file, tmp_path / "kept"

    def other() -> None:
        shutil.copy2(place, kept)
        kept.replace(place)

    def link() -> None:
        place.rename(kept)
        place.symlink_to(kept)

    def written() -> None:
        with place.open("rb+") as opened:
            first = opened.read(1)
            opened.seek(0)
            opened.write(first)

    real = loading.open_engine
    for swap, error in ((other, FileAltered), (written, FileAltered), (link, SymlinkRefused)):

        def swapped(*arguments: Any, swap: Any = swap) -> Any:
            swap()
            return real(*arguments)

        monkeypatch.setattr(loading, "open_engine", swapped)
        with pytest.raises(error, match=re.escape(file)):
            load(bundle, engine, "int8")

    kept.replace(place)

    def back(*arguments: Any) -> Any:
        link()
        try:
            return real(*arguments)
        finally:
            kept.replace(place)

    monkeypatch.setattr(loading, "open_engine", back)
    with pytest.raises(FileAltered, match="was changed while it was loaded"):
        load(bundle, engine, "int8")
