"""The one description of a model: all but the reader of its checkpoint uses this.

GPT-2 and the Llama family differ in four traits: how rows are normalised, how positions
enter, whether the feed-forward layer is gated, and how many key-value heads there are.
Writers, kernels, memory formulas and trainers read traits, never the name of an architecture.

Canonical tensors, float32, linear weights inputs first (D = width, Q = heads × head_width,
K = kv_heads × head_width):

    embedding [vocabulary, D]                     positions [positions, D], where learned
    layers.{i}.attention_norm.weight/.bias [D]    layers.{i}.mlp_norm.weight/.bias [D]
    layers.{i}.qkv.weight [D, Q + 2K], .bias      queries, keys, values side by side
    layers.{i}.out.weight [Q, D], .bias
    layers.{i}.up.weight [D, inner], .bias        gated: [D, 2 × inner], the gate first
    layers.{i}.down.weight [inner, D], .bias
    final_norm.weight/.bias [D]                   head.weight [vocabulary, D], where not tied

Biases of linear layers are always there, zeros where the model has none; RMS norms have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
Mlp = Literal["plain", "gated"]
LARGEST = 1 << 20  # size of anything in a model that is accepted
LARGEST_LAYERS = 1 << 12
LARGEST_TABLE = 1 << 26  # values of the table of rotary angles
MATRICES = ("qkv", "out", "up", "down")  # of a layer, in the order of computing
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "tanh")


class Traits(NamedTuple):
    """What decides which code computes a model; its sizes do not."""

    norm: Norm
    position: Position
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class Decoder:
    """Shape and traits of a decoder-only transformer.

    inner: width of the feed-forward layer. positions: the context in tokens. activation: one
    of ACTIVATIONS. attention_scale: per layer, what multiplies query·key products. rope_theta,
    rope_factors: see `rotary_frequencies`; 0 and () where positions are learned.
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocab_size: int
    positions: int
    norm: Norm
    norm_epsilon: float
    position: Position
    rope_theta: float
    mlp: Mlp
    activation: str
    attention_scale: tuple[float, ...]
    tied: bool
    rope_factors: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decoder:
        """From `to_json` of one. Raises TypeError, ValueError."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        decoder = cls(**fields)
        decoder.check()
        return decoder

    def to_json(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def check(self) -> None:
        """Raises ValueError or TypeError, naming the field, for values that do not fit."""
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= LARGEST:
                raise ValueError(f"{name} is {size!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        numbers = {
            "norm_epsilon": (self.norm_epsilon,),
            "rope_theta": (self.rope_theta,),
            "attention_scale": self.attention_scale,
            "rope_factors": self.rope_factors,
        }
        for name, values in numbers.items():
            if not all(type(x) in (int, float) and 0 <= x < math.inf for x in values):
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        rotary = self.position == "rotary"
        faults = {
            "layers": self.layers > LARGEST_LAYERS,
            "kv_heads": self.heads % self.kv_heads,
            "head_width": rotary and self.head_width % 2,
            "rope_theta": rotary and not self.rope_theta,
            "rope_factors": len(self.rope_factors) not in (0, self.head_width // 2),
            "positions": rotary and self.positions * self.head_width > LARGEST_TABLE,
            "attention_scale": len(self.attention_scale) != self.layers,
        }
        if found := [name for name, wrong in faults.items() if wrong]:
            raise ValueError(f"{found[0]} does not fit the other sizes")
        if not isinstance(self.architecture, str):
            raise TypeError(f"architecture is {self.architecture!r}")

    @property
    def traits(self) -> Traits:
        return Traits(self.norm, self.position, self.mlp)

    @property
    def attention_width(self) -> int:
        """Width of all query heads, and of the output of attention."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys (or of the values) of a position."""
        return self.kv_heads * self.head_width

    def cache_shape(self, rows: int, block: int = 1) -> tuple[int, int, int, int, int]:
        """[2 × layers, rows, kv_heads, positions, head_width]; a layer's keys come before its
        values. Positions are filled up to a multiple of `block`."""
        positions = -(-self.positions // block) * block
        return 2 * self.layers, rows, self.kv_heads, positions, self.head_width

    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of a layer, by their names in MATRICES."""
        up = self.inner * (2 if self.mlp == "gated" else 1)
        return {
            "qkv": (self.width, self.attention_width + 2 * self.kv_width),
            "out": (self.attention_width, self.width),
            "up": (self.width, up),
            "down": (self.inner, self.width),
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of all layers, by canonical name without
        `.weight`: layers.0.qkv, …"""
        shapes = self.layer_matrices()
        return {f"layers.{i}.{name}": shapes[name] for i in range(self.layers) for name in MATRICES}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor, in the order of computing."""
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, self.width)}
        if self.position == "learned":
            shapes["positions"] = (self.positions, self.width)
        for i in range(self.layers):
            for name, (inputs, outputs) in self.layer_matrices().items():
                if norm := {"qkv": "attention_norm", "up": "mlp_norm"}.get(name):
                    shapes |= self._norm_shapes(f"layers.{i}.{norm}")
                shapes[f"layers.{i}.{name}.weight"] = inputs, outputs
                shapes[f"layers.{i}.{name}.bias"] = (outputs,)
        shapes |= self._norm_shapes("final_norm")
        if not self.tied:
            shapes["head.weight"] = self.vocab_size, self.width
        return shapes

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if self.norm == "layer" else ("weight",)
        return {f"{name}.{part}": (self.width,) for part in parts}

    def rotary_frequencies(self) -> NDArray[np.float32]:
        """Radians per position of each pair of a head's dimensions (i, i + head_width / 2),
        [head_width / 2]: rope_theta^(−2i / head_width) / rope_factors[i] (Su et al., arXiv
        2104.09864; factors of 1 where there are none). In float32, as transformers has them.
        """
        exponents = np.arange(0, self.head_width, 2, dtype=np.float32) / self.head_width
        frequencies = 1 / np.float32(self.rope_theta) ** exponents
        factors = np.array(self.rope_factors or 1, np.float32)
        scaled: NDArray[np.float32] = (frequencies / factors).astype(np.float32)
        return scaled

    def rotary_table(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines of every position, each [positions, head_width / 2]."""
        positions = np.arange(self.positions, dtype=np.float32)
        angles = positions[:, None] * self.rotary_frequencies()
        return np.cos(angles), np.sin(angles)


_SIZES = tuple("layers width heads kv_heads head_width inner vocab_size positions".split())
_CHOICES: Mapping[str, Sequence[object]] = {
    "norm": get_args(Norm),
    "position": get_args(Position),
    "mlp": get_args(Mlp),
    "activation": ACTIVATIONS,
    "tied": (True, False),
}


def gpt2(
    *, layers: int, heads: int, width: int, vocab_size: int, positions: int, **others: object
) -> Decoder:
    """A GPT-2 of this shape, its other traits as usual unless given in `others`."""
    given: dict[str, object] = {
        "architecture": "gpt2",
        "kv_heads": heads,
        "head_width": width // heads,
        "inner": 4 * width,
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "position": "learned",
        "rope_theta": 0.0,
        "mlp": "plain",
        "activation": "gelu_tanh",
        "attention_scale": ((width // heads) ** -0.5,) * layers,
        "tied": True,
        **others,
    }
    return Decoder(
        layers=layers,
        heads=heads,
        width=width,
        vocab_size=vocab_size,
        positions=positions,
        **given,  # type: ignore[arg-type]
    )
