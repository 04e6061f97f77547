"""What the plain install costs: `python bench/plain_install.py` from a checkout.

Makes an empty virtual environment, runs `pip install .` (no extras), generates
from the shipped bundle in a fresh process, and prints installed size, import
time, load time and peak RSS. Fails when torch or transformers got in.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PROBE = """
import json, sys, time
start = time.perf_counter()
import edge_slm
imported = time.perf_counter()
slm = edge_slm.load(threads=2)
loaded = time.perf_counter()
out = slm.generate("a red fox in the snow", task="image", words=24)
print(json.dumps({
    "import_ms": (imported - start) * 1e3,
    "load_ms": (loaded - imported) * 1e3,
    "ttft_ms": out.stats.ttft_ms,
    "ms_per_token": out.stats.tpot_ms,
    "peak_rss_mb": out.stats.peak_rss_mb,
    "text": out.text,
    "training_stack": sorted({"torch", "transformers", "onnx", "safetensors"} & set(sys.modules)),
}))
"""


def megabytes(folder: Path) -> float:
    """Size of the files below `folder`, in 10⁶ bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edge-slm-plain-") as scratch:
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / "bin" / "python"
        packages = next((Path(scratch) / "lib").glob("python3*/site-packages"))
        before = megabytes(packages)
        # A copy, because building a wheel leaves a build folder in the tree.
        unneeded = shutil.ignore_patterns(".*", "runs", "models", "build", "*.egg-info")
        source = shutil.copytree(ROOT, Path(scratch) / "source", ignore=unneeded)
        install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", source]
        subprocess.run(install, check=True)
        added = megabytes(packages) - before
        runs = [
            json.loads(subprocess.check_output([python, "-c", PROBE], cwd=scratch, text=True))
            for _ in range(5)
        ]
        unwanted = [
            name for name in ("torch", "transformers", "onnx") if (packages / name).exists()
        ]
        sizes = sorted(
            ((megabytes(f), f.name) for f in packages.iterdir() if f.is_dir() and f.name != "pip"),
            reverse=True,
        )
    print(f"installed        {added:7.1f} MB (with .pyc files)")
    for size, name in sizes[:6]:
        print(f"  {name:22} {size:5.1f} MB")
    for key in ("import_ms", "load_ms", "ttft_ms", "ms_per_token", "peak_rss_mb"):
        print(
            f"{key:16} {median(run[key] for run in runs):7.1f}   (median of {len(runs)} processes)"
        )
    print(f"text             {runs[0]['text']}")
    if unwanted or runs[0]["training_stack"]:
        sys.exit(f"the plain install pulled in {unwanted + runs[0]['training_stack']}")


if __name__ == "__main__":
    main()
