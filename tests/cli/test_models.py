"""Models as packages: made from a bundle, installed by pip, loaded by their names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from click.testing import CliRunner, Result

import edge_slm
from edge_slm.cli import main
from edge_slm.cli.options import default_bundle
from edge_slm_runtime import read_manifest, verify

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "models" / "prompts-115m"
PACKAGE = "edge_slm_model_tiny_one"


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["package", *map(str, arguments)])


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def install(folder: Path, scratch: Path) -> tuple[Path, Path]:
    """Builds the wheel of a copy of `folder` and installs it in a folder of its own: both."""
    source = shutil.copytree(
        folder, scratch / "source", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    offline = ("--quiet", "--no-deps", "--no-index")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", scratch / "wheels", source)
    (wheel,) = (scratch / "wheels").iterdir()
    pip("install", *offline, "--target", scratch / "site", wheel)
    return wheel, scratch / "site"


def python(site: Path, code: str, *arguments: object, folder: Path | None = None) -> str:
    """stdout of a fresh process that finds what is installed in `site`."""
    places = [str(site), *(entry for entry in sys.path if entry)]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        cwd=folder or site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packaged(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaged")
    (folder / "NOTICE").write_text("made by a test\n", "utf-8")
    (folder / "card.md").write_text("## Failures\n\nIts weights are random.\n", "utf-8")
    done = package(
        *(tiny_bundle, folder / "tiny-one", "--name", "tiny-one", "--version", "1.2"),
        *("--variants", "onnx-int8,onnx-fp32", "--card", folder / "card.md"),
        *("--license", "Apache-2.0", "--license-file", folder / "NOTICE"),
    )
    assert done.exit_code == 0, done.stderr
    return folder / "tiny-one"


@pytest.fixture(scope="module")
def installed(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return install(packaged, tmp_path_factory.mktemp("installed"))


def test_a_package_is_a_bundle_with_a_card(packaged: Path, tiny_bundle: Path) -> None:
    bundle = packaged / PACKAGE / "tiny-one"
    manifest, whole = verify(bundle), read_manifest(tiny_bundle)
    assert manifest.name == "tiny-one"
    assert [variant.name for variant in manifest.variants] == ["onnx-int8", "onnx-fp32"]
    places = {path.split("/")[0] for path in manifest.files}
    assert places == {"tokenizer.json", "onnx-int8", "onnx-fp32"}
    assert [g.request for g in manifest.goldens] == [g.request for g in whole.goldens]
    assert all(golden.ids.keys() == {"onnx-fp32", "onnx-int8"} for golden in manifest.goldens)
    card = (packaged / "README.md").read_text("utf-8")
    for said in ("# tiny-one", manifest.digest, "Apache-2.0", "onnx-int8", "## Failures"):
        assert said in card


@pytest.mark.slow
def test_the_wheel_holds_the_bundle_and_nothing_else(
    packaged: Path, installed: tuple[Path, Path]
) -> None:
    wheel, site = installed
    assert wheel.name == f"{PACKAGE}-1.2-py3-none-any.whl"
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = [name for name in archive.namelist() if ".dist-info/" in name]
    bundle = packaged / PACKAGE / "tiny-one"
    held = {path.relative_to(packaged).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert names == held | {f"{PACKAGE}/__init__.py"}
    assert any(name.endswith("licenses/NOTICE") for name in described)
    assert verify(site / PACKAGE / "tiny-one") == verify(bundle)


@pytest.mark.slow
def test_a_fresh_process_loads_it_by_its_name(installed: tuple[Path, Path]) -> None:
    _, site = installed
    code = """
import json, edge_slm
with edge_slm.load("tiny-one", engine="onnxruntime", threads=1) as slm:
    text = slm.generate("a cosy cabin", task="image", words=4).text
print(json.dumps([text, {n: str(p) for n, p in edge_slm.installed_models().items()}]))
"""
    text, models = json.loads(python(site, code))
    assert text
    assert models["tiny-one"] == str(site / PACKAGE / "tiny-one")


@pytest.mark.slow
def test_every_command_takes_the_name(installed: tuple[Path, Path]) -> None:
    _, site = installed
    code = """
import json, sys
from click.testing import CliRunner
from edge_slm.cli import main
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, arguments, input='{"id": 1, "request": "a", "task": null}')
    print(json.dumps([arguments[0], done.exit_code, done.stdout, done.stderr]))
"""
    limits = ["--max-new-tokens", "2", "--engine", "onnxruntime"]
    commands = [
        ["info"],
        ["info", "tiny-one"],
        ["verify", "tiny-one", "--goldens"],
        ["generate", "a", "--bundle", "tiny-one", *limits],
        ["batch", "-", "--bundle", "tiny-one", *limits],
        # These two find the bundle and measure nothing of it.
        ["profile", "tiny-one", "--variants", "nothing"],
        ["bench", "tiny-one", "--variants", "nothing"],
        ["info", "tiny"],
    ]
    *done, unknown = map(json.loads, python(site, code, json.dumps(commands)).splitlines())
    assert [exit_code for _, exit_code, _, _ in done] == [0, 0, 0, 0, 0, 5, 5], done
    assert "(shipped)" in done[0][2]
    assert "tiny-one" in done[0][2]
    assert "known: onnx-int8, onnx-fp32" in done[-1][3]
    assert unknown[1] == 4
    assert unknown[3].startswith("error[bundle_not_found]: there is no folder 'tiny'")
    assert "(installed: " in unknown[3]
    assert "tiny-one" in unknown[3]


@pytest.mark.slow
def test_what_exists_is_a_path(installed: tuple[Path, Path], tmp_path: Path) -> None:
    _, site = installed
    (tmp_path / "tiny-one").mkdir()
    code = """
import edge_slm
try: edge_slm.load("tiny-one")
except edge_slm.EdgeSlmError as error: print(error)
"""
    assert "tiny-one has no manifest.json" in python(site, code, folder=tmp_path)


def test_a_path_is_not_looked_up(tiny_bundle: Path, tmp_path: Path) -> None:
    code = """
import sys, edge_slm_runtime
for path in (sys.argv[1], "no/such", edge_slm_runtime.installed.Path("no-such")):
    try: edge_slm_runtime.read_manifest(path)
    except edge_slm_runtime.EdgeSlmError as error: print(error)
assert "importlib.metadata" not in sys.modules
"""
    assert python(tmp_path, code, tiny_bundle).count("no bundle folder at") == 2


def test_a_package_that_cannot_be_imported(tmp_path: Path) -> None:
    described = tmp_path / "gone-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[edge_slm.models]\ngone = gone_away:BUNDLE\n")
    code = """
import edge_slm
assert "gone" not in edge_slm.installed_models()
try: edge_slm.load("gone")
except edge_slm.EdgeSlmError as error: print(error.code, error)
"""
    said = python(tmp_path, code)
    assert said.startswith("bundle_not_found the installed model 'gone' cannot be found: ")
    assert "gone_away" in said


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--name", "Tiny One"], 3, "'Tiny One' is no name"),
        (["--name", "../tiny"], 3, "is no name"),
        (["--version", "new"], 3, "version is 'new'"),
        (["--license", 'MIT"'], 3, "license is"),
        (["--license-file", "{}/README.md"], 3, "licence files are named README.md"),
        (["--license-file", "{}/nothing"], 2, "does not exist"),
        (["--card", "{}/latin-1.md"], 8, "not valid UTF-8 at byte 3"),
        (["--variants", "onnx-int2"], 5, "no variant 'onnx-int2' (it has"),
    ],
)
def test_what_cannot_be_packaged(
    arguments: list[str], exit_code: int, said: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("")
    (tmp_path / "latin-1.md").write_bytes("Café".encode("latin-1"))
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    done = package(tiny_bundle, tmp_path / "out", "--license", "Apache-2.0", *given)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_packaging_overwrites_nothing(tiny_bundle: Path, packaged: Path) -> None:
    before = (packaged / "pyproject.toml").read_bytes()
    done = package(tiny_bundle, packaged, "--license", "Apache-2.0")
    assert (done.exit_code, "exists already" in done.stderr) == (9, True)
    assert (packaged / "pyproject.toml").read_bytes() == before


def test_the_one_installed_model_is_the_default(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Path] = {}
    monkeypatch.setattr(edge_slm, "installed_models", lambda: found)
    assert default_bundle() == edge_slm.shipped_bundle()
    found["broken"] = tiny_bundle / "tokenizer.json"
    found["one"] = tiny_bundle
    assert default_bundle() == tiny_bundle
    found["two"] = tiny_bundle
    assert default_bundle() == edge_slm.shipped_bundle()


@pytest.mark.slow
def test_demo_shows_the_installed_model(installed: tuple[Path, Path], tmp_path: Path) -> None:
    """Without a checkpoint beside it, as it is where edge-slm was installed from a wheel. A
    model of the repository may be installed too."""
    _, site = installed
    code = """
import sys
from pathlib import Path
from edge_slm.cli import main
sys.modules["edge_slm.cli.demo"].REFERENCE = Path("nothing")
main(["demo", "--threads", "1"])
"""
    shown = python(site, code)
    assert "tiny-one (onnx-int8) answers\n" in shown
    assert "edge-slm-reference (" not in shown
    table = shown[shown.index("words asked→got") :]
    assert table.index("tiny-one") < table.index("edge-slm-reference")


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED.is_dir(), reason="models/prompts-115m is not in this checkout")
def test_the_model_of_the_repository(tmp_path: Path) -> None:
    """Its goldens, of which another processor may give a few other tokens, and its lengths."""
    _, site = install(SHIPPED, tmp_path)
    code = """
import json, edge_slm
agree = total = 0
with edge_slm.load("prompts-115m", threads=1) as slm:
    for golden in slm.manifest.goldens:
        got = slm.greedy_ids(golden.request, golden.command, golden.max_new_tokens)
        want = golden.ids[slm.variant.name]
        agree += sum(a == b for a, b in zip(got, want))
        total += len(want)
    task = slm.schema.tasks[0]
    kept = [slm.generate("a red fox in the snow", task=task, words=n) for n in (12, 24, 48)]
print(json.dumps([agree / total, [[out.words, out.in_tolerance, out.text] for out in kept]]))
"""
    agreement, kept = json.loads(python(site, code))
    assert agreement > 0.6
    for words, in_tolerance, text in kept:
        assert in_tolerance
        assert words == len(text.split())
        assert "fox" in text
