"""The kernels' machine code: kept for this user, and compiled anew whenever it is not sound."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from edge_slm_runtime import load
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.kernels import compiled

from .conftest import GPT2, IMAGES, needs_images
from .test_process import python

pytestmark = pytest.mark.slow

ANSWER = """
import sys, edge_slm_runtime
with edge_slm_runtime.load(sys.argv[1], "numba", "int8", threads=2) as slm:
    answer = slm.generate("a cosy cabin", max_new_tokens=9)
print(*{"numba", "llvmlite"} & set(sys.modules), "ids", *answer.token_ids)
"""


class Compiler:
    """Gives what was compiled before, and counts how often it is asked to."""

    def __init__(self, code: bytes) -> None:
        self.code, self.calls = code, 0

    def __call__(self, traits: Traits) -> bytes:
        self.calls += 1
        return self.code


@pytest.fixture
def compiler(code: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """With an empty cache folder, and nothing in memory."""
    found = Compiler(code)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_compile", found)
    compiled._kernels.cache_clear()
    yield found
    compiled._kernels.cache_clear()


def kept(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache/edge-slm").iterdir()
    return file


def load_anew() -> None:
    compiled._kernels.cache_clear()
    compiled.kernels(GPT2)


def replace(file: Path, content: bytes) -> None:
    """With another one: what this process has in memory must stay whole."""
    file.unlink()
    file.write_bytes(content)


def test_compiled_once_for_all_processes(
    compiler: Compiler, tiny_bundle: Path, tmp_path: Path
) -> None:
    compiled.kernels(GPT2)
    with load(tiny_bundle, "numba", "int8", threads=1) as slm:
        ids = [str(i) for i in slm.generate("a cosy cabin", max_new_tokens=9).token_ids]
    assert kept(tmp_path).suffix == (".image" if IMAGES else ".o")
    found = python(ANSWER, str(tiny_bundle), XDG_CACHE_HOME=str(tmp_path / "cache")).split()
    assert found == [*([] if IMAGES else ["llvmlite"]), "ids", *ids]
    assert compiler.calls == 1
    assert kept(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_only_this_user_may_read_and_write_it(compiler: Compiler, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        compiled.kernels(GPT2)
    finally:
        os.umask(old)
    assert stat.S_IMODE(kept(tmp_path).stat().st_mode) == 0o600
    assert stat.S_IMODE(kept(tmp_path).parent.stat().st_mode) == 0o700


def test_what_is_kept_is_loaded(compiler: Compiler, tmp_path: Path) -> None:
    for _ in range(3):
        load_anew()
    assert compiler.calls == 1
    content = kept(tmp_path).read_bytes()
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 5000, -1])
def test_a_cut_file_is_replaced(compiler: Compiler, tmp_path: Path, length: int) -> None:
    compiled.kernels(GPT2)
    whole = kept(tmp_path).read_bytes()
    replace(kept(tmp_path), whole[:length])
    load_anew()
    assert compiler.calls == 2
    assert kept(tmp_path).read_bytes() == whole


@pytest.mark.parametrize("place", [0, 31, 32, 4000, -1])
def test_an_altered_file_is_replaced(compiler: Compiler, tmp_path: Path, place: int) -> None:
    compiled.kernels(GPT2)
    whole = kept(tmp_path).read_bytes()
    altered = bytearray(whole)
    altered[place] ^= 1
    replace(kept(tmp_path), bytes(altered))
    load_anew()
    assert compiler.calls == 2
    assert kept(tmp_path).read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(
    compiler: Compiler, tmp_path: Path, tiny_bundle: Path
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    load_anew()
    load_anew()
    assert compiler.calls == 2
    with load(tiny_bundle, "numba", threads=1) as slm:
        assert slm.generate("a cat", max_new_tokens=3).token_ids


def test_something_else_in_its_place_is_no_error(compiler: Compiler, tmp_path: Path) -> None:
    for suffix in (".image", ".o"):
        (tmp_path / f"cache/edge-slm/{compiled._key(GPT2)}{suffix}/folder").mkdir(parents=True)
    load_anew()
    assert compiler.calls == 1
    assert len(list((tmp_path / "cache/edge-slm").iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no owners and modes")
@pytest.mark.parametrize("where", ["file", "folder", "link"])
def test_code_that_another_user_could_write_is_not_run(
    compiler: Compiler, tmp_path: Path, where: str
) -> None:
    compiled.kernels(GPT2)
    file = kept(tmp_path)
    if where == "file":
        file.chmod(0o666)
    elif where == "folder":
        file.parent.chmod(0o777)
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    load_anew()
    expected = 1 if where == "folder" else 2  # a file that only this user could write is sound
    assert compiler.calls == expected
    assert not kept(tmp_path).is_symlink()
    assert stat.S_IMODE(kept(tmp_path).stat().st_mode) == 0o600
    assert stat.S_IMODE(kept(tmp_path).parent.stat().st_mode) == 0o700
    load_anew()
    assert compiler.calls == expected


@pytest.mark.skipif(sys.platform == "win32", reason="has another folder")
def test_a_relative_cache_folder_is_ignored(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    compiled.kernels(GPT2)
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert len(list((tmp_path / "home/.cache/edge-slm").iterdir())) == 1


def test_simultaneous_first_loads_compile_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(traits: Traits) -> bytes:
        sleep(0.2)
        return compiler(traits)

    monkeypatch.setattr(compiled, "_compile", slow)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(compiled.kernels, [GPT2] * 4))
    assert len(set(map(id, entries))) == compiler.calls == 1


@needs_images
def test_another_process_waits_for_the_one_that_compiles(code: bytes, tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(code)
    script = """
import sys, time
from pathlib import Path
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.kernels import compiled
def slow(traits):
    print("compiles", flush=True)
    time.sleep(1)
    return Path(sys.argv[1]).read_bytes()
compiled._compile = slow
compiled.kernels(Traits("layer", "learned", "plain"))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "code")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(said) == [b"", b"", b"compiles\n"]


# -- where numba cannot be used ------------------------------------------------------


FAULTS = {
    "architecture": """
compiled.processor = lambda: "aarch64\\nFeatures: fp asimd asimddp"
""",
    "processor": """
compiled.processor = lambda: "x86_64\\nmodel name: old\\nflags: sse2 sse4_2"
""",
    "package": "",
    "setting": "",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_falls_back_and_says_so(fault: str, tiny_bundle: Path, tmp_path: Path) -> None:
    settings = {}
    if fault == "setting":
        settings["NUMBA_CPU_NAME"] = "generic"
    if fault == "package":
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba/__init__.py").write_text("raise ImportError('another numpy')")
    script = f"""
import logging, sys
import edge_slm_runtime
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.kernels import compiled
logging.basicConfig(stream=sys.stdout)
NumbaEngine.fast_here = classmethod(lambda _: True)
{FAULTS[fault]}
with edge_slm_runtime.load(sys.argv[1], threads=1) as slm:
    print(slm.variant.engine, len(slm.generate("a cat", max_new_tokens=3).token_ids))
try:
    edge_slm_runtime.load(sys.argv[1], "numba", threads=1)
except edge_slm_runtime.EdgeSlmError as error:
    print(error.code)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    cache = str(tmp_path / "cache")
    settings |= {"PYTHONPATH": path, "XDG_CACHE_HOME": cache}
    out = python(script, str(tiny_bundle), **settings).splitlines()
    why = "never tried on aarch64" if fault == "architecture" else "numba cannot be used"
    assert why in out[0]
    assert "using onnxruntime instead" in out[0]
    assert out[1:] == ["onnxruntime 3", "engine_not_installed"]


@pytest.mark.parametrize(
    "setting",
    [
        # Over the first ones LLVM ends the process.
        *("CPU_NAME=generic", "CPU_NAME=ivybridge", "ENABLE_AVX=0", "CPU_NAME=haswell"),
        *("CPU_FEATURES=-f16c", "DISABLE_JIT=1", "BOUNDSCHECK=1", "OPT=max", "OPT=0"),
        *("LOOP_VECTORIZE=0", "SLP_VECTORIZE=1", "LLVM_REFPRUNE_PASS=0"),
    ],
)
def test_numba_is_not_used_with_settings_that_change_its_code(setting: str, tmp_path: Path) -> None:
    script = """
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.errors import EngineNotInstalled
from edge_slm_runtime.kernels import compiled
try:
    compiled.kernels(Traits("layer", "learned", "plain"))
except EngineNotInstalled as error:
    print(error)
"""
    name, _, value = setting.partition("=")
    out = python(script, XDG_CACHE_HOME=str(tmp_path), **{f"NUMBA_{name}": value})
    assert out.startswith("numba cannot be used: ")
    assert f"NUMBA_{name}" in out.partition("(unset ")[2]


def test_settings_that_change_nothing_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm, _ = compiled._target()
    for name, value in {"CPU_NAME": llvm.get_host_cpu_name(), "BOUNDSCHECK": "0"}.items():
        monkeypatch.setenv(f"NUMBA_{name}", value)
    compiled._refuse_settings()


@needs_images
def test_where_no_file_may_be_run_the_object_is_kept(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is mounted so."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(mmap, "mmap", refused)
    for _ in range(3):
        load_anew()
    assert compiler.calls == 1
    files = sorted(path.suffix for path in (tmp_path / "cache/edge-slm").iterdir())
    assert ".o" in files


@pytest.mark.skipif(sys.platform == "win32", reason="has another folder")
def test_a_user_without_a_home_is_no_error(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under any number."""
    import pwd

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    compiled.kernels(GPT2)
    assert compiler.calls == 1


def test_every_source_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(compiled.__file__).parent.parent
    copy = tmp_path / "package"
    shutil.copytree(package / "kernels", copy / "kernels")
    for name in ("panels.py", "decoder.py"):
        shutil.copyfile(package / name, copy / name)
    key = compiled._key(GPT2)
    monkeypatch.setattr(compiled, "__file__", str(copy / "kernels/compiled.py"))
    assert compiled._key(GPT2) == key
    files = [f for f in copy.rglob("*.py") if f.name != "__init__.py"]
    assert len(files) > 7
    for file in files:
        text = file.read_bytes()
        file.write_bytes(text + b"#")
        assert compiled._key(GPT2) != key, file.name
        file.write_bytes(text)
    monkeypatch.setattr(compiled, "processor", lambda: "another one")
    assert compiled._key(GPT2) != key


def test_traits_are_in_the_key() -> None:
    assert compiled._key(GPT2) != compiled._key(GPT2._replace(norm="rms"))
