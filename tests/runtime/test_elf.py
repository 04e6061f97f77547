"""Images of the kernels' object files, which run wherever they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_slm_runtime import read_manifest
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.kernels import compiled
from edge_slm_runtime.kernels.elf import flat_image

from .conftest import needs_images

pytestmark = [pytest.mark.slow, needs_images]


def test_an_image_computes_what_the_object_does(
    code: bytes, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Wherever in memory it lies."""
    for name in ("one", "other"):
        compiled._write(tmp_path / name, flat_image(code, "entry"))
    entries = [compiled._linked(code), *(compiled._mapped(tmp_path / n) for n in ("one", "other"))]
    found = []
    for entry in entries:
        facts = read_manifest(tiny_bundle).model
        engine = NumbaEngine(tiny_bundle / "numba-int4", facts, EngineOptions(threads=2))
        engine.team._entry = entry
        step = engine.new_pass(engine.new_cache(1).array, 50, 50)
        found.append(step.run([range(70, 120)], [0]).copy())
        engine.close()
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def emitted(text: str) -> bytes:
    """The object file of LLVM's assembly."""
    llvm, target = compiled._target()
    return bytes(target.emit_object(llvm.parse_assembly(text)))


OUTSIDE = """
declare i32 @puts(i8*)
define i32 @entry(i8* %x) {
  %y = call i32 @puts(i8* %x)
  ret i32 %y
}"""
VARIABLE = """
@count = internal global i64 7
define i64 @entry() {
  %x = load volatile i64, i64* @count
  store volatile i64 8, i64* @count
  ret i64 %x
}"""
ZEROS = VARIABLE.replace("7", "0")
ADDRESS = """
@table = internal constant [2 x i8*] [i8* null, i8* bitcast (i64 ()* @entry to i8*)]
define i64 @entry() {
  %x = load volatile i8*, i8** getelementptr ([2 x i8*], [2 x i8*]* @table, i64 0, i64 1)
  %y = ptrtoint i8* %x to i64
  ret i64 %y
}"""


@pytest.mark.parametrize("text", [OUTSIDE, VARIABLE, ZEROS, ADDRESS])
def test_code_that_is_not_alone_is_no_image(text: str) -> None:
    with pytest.raises(ValueError, match="code "):
        flat_image(emitted(text), "entry")


@pytest.mark.parametrize(
    "change",
    [
        lambda code: b"",
        lambda code: code[:40],
        lambda code: b"MZ" + code[2:],
        lambda code: code[:4] + b"\x01" + code[5:],  # of 32 bits
        lambda code: code[:18] + b"\xb7\0" + code[20:],  # for AArch64
    ],
)
def test_another_format_is_no_image(code: bytes, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match=r"not a 64-bit ELF file|code for machine"):
        flat_image(change(code), "entry")
