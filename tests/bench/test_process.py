"""Fresh processes: their figures, and every way in which they can die."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest

from edge_slm_bench.pagecache import evict, resident_share
from edge_slm_bench.process import launch, rss_mb
from edge_slm_bench.runners.edge_slm import spec_of
from edge_slm_runtime import read_manifest
from edge_slm_runtime.errors import (
    BundleNotFound,
    DependencyMissing,
    EngineError,
    OutOfMemory,
    UnknownTask,
)


def spec(bundle: Path, variant: str = "onnx-int8") -> dict[str, Any]:
    (found,) = [v for v in read_manifest(bundle).variants if v.name == variant]
    return spec_of(bundle, found).as_dict()


def answers(bundle: Path, **extra: Any) -> dict[str, Any]:
    request = {"request": "a fox", "task": "image", "words": 3}
    return {
        "kind": "answers",
        "spec": spec(bundle),
        "threads": 1,
        "requests": [request],
        **extra,
    }


def test_a_process_answers_and_tells_its_own_peak(tiny_bundle: Path) -> None:
    found = launch(answers(tiny_bundle, repetitions=2))
    assert [[g["asked"]["words"] for g in turn] for turn in found["answers"]] == [[3], [3]]
    assert found["load_ms"] > 0
    # A fresh interpreter with an engine, not this one with torch's neighbours.
    assert 20 < found["peak_rss_mb"] < 400


def test_imports_are_part_of_the_load() -> None:
    """So nothing that is loaded is imported before the clock runs."""
    code = "import sys, edge_slm_bench.cell; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "tokenizers", "onnxruntime", "edge_slm_runtime"} & set(done.stdout.split())


def test_errors_of_the_child_are_those_of_the_parent(tiny_bundle: Path, tmp_path: Path) -> None:
    missing = {**spec(tiny_bundle), "path": str(tmp_path / "nowhere")}
    with pytest.raises(BundleNotFound):
        launch(answers(tiny_bundle, spec=missing))
    with pytest.raises(UnknownTask, match="poem"):
        launch(answers(tiny_bundle, requests=[{"request": "a", "task": "poem"}]))


def test_a_peer_that_is_not_installed_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('gone')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = {**spec(tiny_bundle), "runner": "openvino", "variant": "openvino-fp32"}
    with pytest.raises(DependencyMissing, match=r"edge-slm\[peers\]"):
        launch(answers(tiny_bundle, spec=peer))


def test_a_process_beyond_its_memory_limit_is_killed(tiny_bundle: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"killed at its memory limit: .* allowed 8 MB"):
        launch(answers(tiny_bundle), memory_limit_mb=8)


def test_a_process_that_takes_too_long_is_killed(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"more than 0\.05 s"):
        launch(answers(tiny_bundle), timeout_s=0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_that_the_system_kills_is_named(tiny_bundle: Path) -> None:
    def shoot() -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL)

    timer = Timer(0.2, shoot)
    timer.start()
    with pytest.raises(EngineError, match=r"killed by SIGKILL; the system's memory killer"):
        launch(answers(tiny_bundle, repetitions=1_000_000))
    timer.join()


def test_resident_memory_of_others_and_of_nobody() -> None:
    assert (rss_mb() or 0) > 10
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert rss_mb(gone.pid) is None


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\1" * 4_000_000)
    assert resident_share(file) > 0.9
    for _ in range(5):  # the kernel may still be writing
        if evict(tmp_path):
            break
        time.sleep(0.2)
    else:
        pytest.skip("this file system keeps its pages")
    assert resident_share(file) < 0.05
    assert file.read_bytes() == b"\1" * 4_000_000
