"""The default number of threads: what was remembered of this model on this device."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edge_slm_runtime import load, read_manifest
from edge_slm_runtime import thread_choice as choice
from edge_slm_runtime.bundle import Manifest


@pytest.fixture
def manifest(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Of a bundle that was never measured, on a device of 4 cores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "default_threads", lambda: 4)
    return read_manifest(tiny_bundle)


def test_it_is_of_a_variant_a_model_and_a_device(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = manifest.variants
    choice.remember_threads(manifest, first, 2)
    assert choice.threads_for(manifest, first) == 2
    assert choice.threads_for(manifest, second) == 4
    assert choice.threads_for(replace(manifest, name="another"), first) == 4
    choice.remember_threads(manifest, first, 3)
    assert choice.threads_for(manifest, first) == 3
    with monkeypatch.context() as other:
        other.setattr(choice, "processor", lambda: "another one")
        assert choice.threads_for(manifest, first) == 4
    monkeypatch.setattr(choice, "default_threads", lambda: 2)  # as in a container of fewer cores
    assert choice.threads_for(manifest, first) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_the_folder_is_of_this_user_alone(manifest: Manifest, tmp_path: Path) -> None:
    """Compiled code lies there too, and is not run where others can write."""
    old = os.umask(0)
    try:
        choice.remember_threads(manifest, manifest.variants[0], 2)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "edge-slm").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"", b"x", b"-3", b"0", b"2.5", b"9" * 50, b"\xff"])
def test_whatever_is_in_its_place_the_number_is_sound(
    content: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    variant = manifest.variants[0]
    choice.remember_threads(manifest, variant, 2)
    (file,) = tmp_path.rglob("*.threads")
    file.write_bytes(content)
    assert 1 <= choice.threads_for(manifest, variant) <= 4
    file.unlink()
    file.mkdir()
    assert choice.threads_for(manifest, variant) == 4


def test_load_takes_it_unless_told(manifest: Manifest, tiny_bundle: Path) -> None:
    for variant in manifest.variants:
        choice.remember_threads(manifest, variant, 2)
    for threads, taken in ((None, 2), (1, 1), (3, 3)):
        with load(tiny_bundle, "onnxruntime", "int8", threads=threads) as slm:
            assert slm.threads == taken
