"""Images, services and frozen apps: what the Dockerfile runs in an empty environment, what the
systemd unit forbids, what PyInstaller collects."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from urllib.request import urlopen

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCKER = REPOSITORY / "integrations" / "docker"
BARE = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
LARGEST = 245e6  # bytes of /app, so that the image stays below 300 MB

pytestmark = pytest.mark.slow


def commands(stage: str) -> list[str]:
    """The RUN lines of a stage but that of apt, which brings pip."""
    joined = stage.replace("\\\n", "")
    return [line for line in re.findall(r"^RUN (.*)", joined, re.MULTILINE) if "apt-" not in line]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile copies; a copy, because building a wheel leaves a folder in the tree."""
    source = tmp_path_factory.mktemp("source")
    for line in (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines():
        if line.startswith("!"):
            place = REPOSITORY / line[1:]
            copy = shutil.copytree if place.is_dir() else shutil.copy
            (source / line[1:]).parent.mkdir(parents=True, exist_ok=True)
            copy(place, source / line[1:])
    return source


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Of an environment that has pip alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path / "venv" / "bin" / "python3"


@pytest.mark.timeout(1200)  # it downloads and installs
def test_the_image_answers_and_serves(source: Path, python: Path, tmp_path: Path) -> None:
    build, final = (DOCKER / "Dockerfile").read_text("utf-8").split("\nFROM ")[1:]
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)", build, re.MULTILINE)
    app = tmp_path / "app"
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = BARE | {"PATH": path, "EXTRAS": extras}
    for command in commands(build):
        here = command.replace("/app", str(app))
        subprocess.run(here, shell=True, check=True, cwd=source, env=environment)
    assert sum(f.lstat().st_size for f in app.rglob("*")) < LARGEST

    (entry,) = re.findall(r"^ENTRYPOINT (.*)", final, re.MULTILINE)
    assert entry.endswith('"-m", "edge_slm"]')
    edge_slm = [python, "-m", "edge_slm"]
    environment = {"PYTHONPATH": str(app), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    asked = ["a red fox", "--bundle", "prompts-115m", "--task", "image", "--words", "12"]
    answer = subprocess.check_output([*edge_slm, "generate", *asked], env=environment, text=True)
    assert "fox" in answer
    with subprocess.Popen(
        [*edge_slm, "serve", "prompts-115m", "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        with urlopen(f"{address}/health") as health:
            assert health.status == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


APP = """
import sys
import edge_slm

for name in (None, *edge_slm.installed_models()):
    with edge_slm.load(name, engine="onnxruntime", threads=1) as slm:
        print(name, slm.generate("a red fox in the snow", task="image", words=12).text)
print(edge_slm.__version__)
try:
    edge_slm.load(isolate=True).close()
except edge_slm.EdgeSlmError as error:
    print(error.code, file=sys.stderr)
"""


@pytest.mark.timeout(1200)  # it downloads, installs and collects
def test_a_frozen_app_answers(source: Path, python: Path, tmp_path: Path) -> None:
    install = [python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "pyinstaller"]
    subprocess.run([*install, ".", "./models/prompts-115m"], check=True, cwd=source, env=BARE)
    (tmp_path / "app.py").write_text(APP, "utf-8")
    freeze = [python, "-m", "PyInstaller", "--log-level", "ERROR", "app.py"]
    subprocess.run(freeze, check=True, cwd=tmp_path, env=BARE)
    as_script = subprocess.check_output([python, "app.py"], cwd=tmp_path, env=BARE, text=True)
    frozen = subprocess.run(
        [tmp_path / "dist" / "app" / "app"], check=True, env={}, capture_output=True, text=True
    )
    assert frozen.stdout == as_script
    assert re.match(r"None .*fox.*\nprompts-115m .*fox.*\n\d", frozen.stdout)
    assert frozen.stderr == "engine\n"


SEALED = """
import ctypes, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit("no such ban")
import edge_slm
with edge_slm.load(threads=1) as slm:
    print(slm.variant.engine, slm.generate("a red fox", task="image", words=8).text)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="systemd's")
def test_the_unit_forbids_nothing_that_is_needed(tmp_path: Path) -> None:
    """Memory that is written and run is forbidden; numba then cannot compile."""
    unit = (REPOSITORY / "integrations" / "systemd" / "edge-slm.service").read_text("utf-8")
    assert "MemoryDenyWriteExecute=yes" in unit
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SEALED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "no such ban" in done.stderr:
        pytest.skip("before Linux 6.3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("onnxruntime ")
    assert "fox" in done.stdout
