"""Random well-formed files of the numba engine, with every piece of memory that the kernels read
or write at the edge of a page that may not be touched: `python guard_pages.py FOLDER COUNT SEED
FIRST`.

A read or write beyond ends the process by a signal, and so does a file that takes a minute; the
last line on stderr says of which model, and stdout has a line for each file before it.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.engines import kv_cache, numba_engine, thread_team, weights
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.errors import EngineError, ManifestInvalid
from edge_slm_runtime.panels import LANES, STRIP, UNIT, file_metadata, stored_name

PAGE = mmap.PAGESIZE
Tensors = dict[str, tuple[str, list[int], bytes]]  # name → (type, shape, data)
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept: list[Any] = []


def guarded(size: int) -> Any:
    """`size` bytes of zeros whose end is the end of what may be touched."""
    pages = mmap.mmap(-1, -(-size // PAGE) * PAGE + 2 * PAGE)
    kept.append(pages)
    start = np.frombuffer(pages, np.uint8).ctypes.data
    for guard in (start, start + len(pages) - PAGE):
        assert libc.mprotect(guard, PAGE, 0) == 0
    return np.frombuffer(pages, np.uint8)[len(pages) - PAGE - size : len(pages) - PAGE]


class GuardedNumpy:
    """numpy, but for the memory of `zeros`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def zeros(shape: Any, dtype: Any = float) -> Any:
        size = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        return guarded(size).view(dtype).reshape(shape) if size else np.zeros(shape, dtype)


def install() -> None:
    for module in (numba_engine, weights, thread_team):
        module.np = GuardedNumpy()  # type: ignore[attr-defined]
    kv_cache._pages = lambda shape, dtype: (
        guarded(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    )
    real = weights.Weights._tensor

    def tensor(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        copy = guarded(found.nbytes).view(found.dtype).reshape(found.shape)
        copy[...] = found
        kept.append(copy)
        return copy

    weights.Weights._tensor = tensor  # type: ignore[method-assign]


def padded(size: int, unit: int = UNIT) -> int:
    return -(-size // unit) * unit


def made(choice: random.Random) -> tuple[Decoder, Tensors]:
    """A model of either family, and tensors of sizes that may or may not fit it."""
    llama = choice.random() < 0.5
    kv_heads = choice.choice([1, 1, 2, 3])
    heads = kv_heads * choice.choice([1, 1, 2, 3])
    head_width = choice.choice([2, 8, 16, 32, 64, 66, 128] if llama else [1, 3, 7, 16, 63, 65, 80])
    heads, kv_heads = (heads, kv_heads) if llama else (heads, heads)
    decoder = Decoder(
        architecture="llama" if llama else "gpt2",
        layers=choice.choice([1, 2]),
        width=choice.choice([1, 31, 64, 100, 192]) if llama else heads * head_width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        inner=choice.choice([1, 16, 64, 100, 512]),
        vocab_size=choice.choice([1, 2, 15, 16, 17, 63, 64, 65, 127, 400]),
        positions=choice.choice([1, 2, 5, 16, 33, 64, 130]),
        norm="rms" if llama else "layer",
        norm_epsilon=1e-5,
        position="rotary" if llama else "learned",
        rope_theta=1e4 if llama else 0.0,
        mlp="gated" if llama else "plain",
        activation=choice.choice(["gelu", "gelu_tanh", "relu", "silu", "tanh"]),
        attention_scale=(head_width**-0.5,) * 2,
        tied=choice.random() < 0.7,
    )
    random_numbers = np.random.default_rng(choice.getrandbits(32))
    tensors: Tensors = {}

    def vector(name: str, count: int) -> None:
        values = random_numbers.standard_normal(padded(count)).astype(np.float32)
        tensors[stored_name(name)] = "F32", [values.size], values.tobytes()

    def matrix(name: str, inputs: int, outputs: int, bits: int, *, bias: bool = True) -> None:
        size = STRIP * choice.choice([1, 1, 2, 3, 4])
        blocks = max(1, (inputs - choice.choice([0, 0, 0, 1, UNIT - 1]) + size - 1) // size)
        blocks += choice.random() < 0.05
        panels, name = padded(outputs) // LANES, stored_name(name)
        levels = random_numbers.integers(0, 256, (panels, blocks, size * LANES * bits // 8))
        tensors[f"{name}.levels"] = "U8", [*levels.shape], levels.astype(np.uint8).tobytes()
        lines = [panels, blocks, LANES]
        scale = random_numbers.standard_normal(lines).astype(np.float16) / 100
        tensors[f"{name}.scale"] = "F16", lines, scale.astype(np.float16).tobytes()
        if bits == 4:
            tensors[f"{name}.zero"] = "U8", lines, bytes(math.prod(lines))
        if bias:
            values = random_numbers.standard_normal(panels * LANES).astype(np.float32)
            tensors[f"{name}.bias"] = "F32", [panels * LANES], values.tobytes()

    parts = ("weight",) if llama else ("weight", "bias")
    for part in parts:
        vector(f"final_norm.{part}", decoder.width)
    if not llama:
        vector("positions", decoder.positions * decoder.width)
    matrix("embedding", decoder.width, decoder.vocab_size, 8, bias=False)
    if not decoder.tied:
        matrix("head", decoder.width, decoder.vocab_size, choice.choice([4, 8]), bias=False)
    inner = padded(decoder.inner)
    shapes = decoder.layer_matrices() | {"up": (decoder.width, inner * (2 if llama else 1))}
    shapes["down"] = inner, decoder.width
    for i in range(decoder.layers):
        for norm in ("attention_norm", "mlp_norm"):
            for part in parts:
                vector(f"layers.{i}.{norm}.{part}", decoder.width)
        for name, (inputs, outputs) in shapes.items():
            matrix(f"layers.{i}.{name}", inputs, outputs, choice.choice([4, 8]))
    return decoder, tensors


def write(file: Path, decoder: Decoder, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": file_metadata(decoder)}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content + bytes(-len(content) % 64)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def compute(folder: Path, decoder: Decoder, threads: int) -> None:
    """A whole prompt, rows at their own positions, prompts of other lengths."""
    engine = numba_engine.NumbaEngine(folder, decoder, EngineOptions(threads=threads))
    last, positions = decoder.vocab_size - 1, decoder.positions
    ids = [last - i % decoder.vocab_size for i in range(positions)]
    cache = engine.new_cache(3).array
    engine.new_pass(cache[:, :1], positions, positions).run([ids], [0])
    step = engine.new_pass(cache, 1, 1)
    for place in range(positions):
        step.run([[ids[place]], [last], [0]], [place, positions - 1 - place, place])
    engine._pass(cache[:, :2], [positions, 1], 1).run([ids, [0]], [0, positions - 1])
    engine.close()


def main(folder: Path, count: int, seed: str, first: int) -> None:
    install()
    for number in range(first, count):
        signal.alarm(60)
        decoder, tensors = made(random.Random(f"{seed}/{number}"))
        write(folder / "model.safetensors", decoder, tensors)
        print(number, decoder, file=sys.stderr, flush=True)
        try:
            compute(folder, decoder, 1 + number % 3)
            print("read", flush=True)
        except (EngineError, ManifestInvalid):
            print("refused", flush=True)
        kept.clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
