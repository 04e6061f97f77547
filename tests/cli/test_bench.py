"""`edge-slm bench`: reports, Ctrl-C, comparison; in real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

QUICK = ["--prompt-tokens", "16", "--new-tokens", "6", "--threads", "1", "--repetitions", "2"]


def edge_slm(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "edge_slm", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "report"
    variants = ["--variants", "onnx-int8, onnx-int4"]
    shown = edge_slm("bench", tiny_bundle, *QUICK, *variants, "--rounds", 3, "--out", out)
    assert "onnx-int8" in shown.stdout
    return out


def test_a_report_in_every_form(report: Path) -> None:
    assert {f.name for f in report.iterdir()} == {
        "report.json",
        "report.md",
        "report.csv",
        "report.html",
        "samples.jsonl",
    }
    data = json.loads((report / "report.json").read_text("utf-8"))
    assert data["command"].startswith("edge-slm bench ")
    assert {c["status"] for c in data["cells"]} <= {"ok", "flagged", "skipped"}
    assert "onnx-int8" in (report / "report.md").read_text("utf-8")
    assert len((report / "report.csv").read_text("utf-8").splitlines()) == 3
    assert "<svg" in (report / "report.html").read_text("utf-8")


def test_no_counter_is_unavailable_and_never_0(report: Path) -> None:
    data = json.loads((report / "report.json").read_text("utf-8"))
    for cell in data["cells"]:
        assert cell["figures"]["joules_per_token"] != 0


def test_nothing_is_overwritten(tiny_bundle: Path, report: Path) -> None:
    done = edge_slm("bench", tiny_bundle, *QUICK, "--out", report, code=9)
    assert done.stderr.startswith("error[target_exists]: ")


def test_an_unreadable_bundle_is_one_line(tmp_path: Path) -> None:
    done = edge_slm("bench", tmp_path / "nothing", *QUICK, "--out", tmp_path / "out", code=4)
    assert done.stderr.startswith("error[bundle_not_found]: ")
    assert not (tmp_path / "out").exists()


def test_numbers_that_make_no_sense(tiny_bundle: Path) -> None:
    for wrong in ("0", "a", "1,,2"):
        done = edge_slm("bench", tiny_bundle, "--threads", wrong, code=2)
        assert done.stderr.startswith("error[usage]: ")


def test_peers_must_have_the_same_weights(
    tiny_bundle: Path, tiny_text_side: Path, tmp_path: Path
) -> None:
    from edge_slm_converters import random_checkpoint

    shape = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 417, "positions": 128}
    other = random_checkpoint(tmp_path / "other", like=tiny_text_side, **shape)
    done = edge_slm("bench", tiny_bundle, *QUICK, "--peers", other, code=6)
    assert "none of the bundles was made from" in done.stderr


def test_comparing_a_report_with_itself_and_with_a_slower_one(report: Path, tmp_path: Path) -> None:
    same = report / "report.json"
    edge_slm("bench", "--compare", same, same)
    before, slower = tmp_path / "before.json", tmp_path / "slower.json"
    for file, factor in ((before, 1), (slower, 2)):
        data = json.loads(same.read_text("utf-8"))
        for cell in data["cells"]:
            # Whether this machine was busy is not what is tested.
            cell["status"] = {"flagged": "ok"}.get(cell["status"], cell["status"])
            for sample in cell["samples"]:
                sample["flags"] = []
                for timing in sample["timings"]:
                    timing["total_ms"], timing["ttft_ms"] = 40.0 * factor, 8.0 * factor
        file.write_text(json.dumps(data), encoding="utf-8")
    done = edge_slm("bench", "--compare", before, slower, code=11)
    assert done.stderr.startswith("error[bench_regression]: ")
    edge_slm("bench", "--compare", slower, before)
    edge_slm("bench", "--compare", before, slower, "--tolerance", 2.5)
    assert "cannot read" in edge_slm("bench", "--compare", same, tmp_path / "no", code=8).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_reports_what_was_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command = [sys.executable, "-m", "edge_slm", "bench", tiny_bundle, *QUICK]
    running = subprocess.Popen(
        [*map(str, command), "--rounds", "500", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 100
    while not (samples.exists() and samples.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    shown, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    data = json.loads((out / "report.json").read_text("utf-8"))
    assert data["interrupted"]
    assert any(cell["samples"] for cell in data["cells"])
    assert "onnx" in shown
