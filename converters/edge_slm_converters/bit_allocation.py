"""How many bits each matrix of an int4 model gets: a rule, measured for every checkpoint.

Some matrices lose far more in 4 bits than others. So each is rounded alone, the others left
in float32, and its cost is the KL to the float32 predictions. All start in the form
of fewest bytes; then the change that gains most KL for a byte is made, again and again,
as long as a step reads no more bytes than llama.cpp's Q4_0 of the same model would
(4.5 bits a weight, 8.5 in the head). Then they are quantised layer by layer, each on inputs
that come out of the quantised layers before it, and to the outputs of the float32 model:
matrices of 4 bits by GPTQ, and every bias takes up the mean of the remaining error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters import gguf_writer
from edge_slm_converters.arrays import Float32, Float64
from edge_slm_converters.blocks import Blocks, block_bytes, bytewise, nearest
from edge_slm_converters.calibration import ForwardPass, output, pieces
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.gptq import error_feedback_target, gptq
from edge_slm_converters.quantise import BYTE_BLOCK, Quantised
from edge_slm_runtime.decoder import Decoder

Costs = Mapping[str, Sequence[float]]  # matrix → mean KL in nats, in each of FORMS
Step = Callable[[str, float], None]  # a line, and the share of the work that follows it
# On how many texts the costs are measured: so many, as long as positions × parameters are below.
PROBE_TEXTS, PROBE_WORK = 12, 40_000_000_000
PROBING = 0.2  # the share of the time that this takes


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is stored: `block` inputs share a scale."""

    bits: int
    block: int

    def bytes(self, inputs: int, outputs: int) -> int:
        return block_bytes(inputs, outputs, self.bits, self.block)

    def rounded(self, weight: Float32) -> Float32:
        """The matrix [K,N] rounded to nearest, its scales plainly the largest values."""
        if self.bits == 8:
            return bytewise(weight, self.block).matrix()
        return nearest(weight, self.block, ranges=(np.float32(1),)).matrix()


FORMS = (Form(4, 128), Form(4, 64), Form(4, 32), Form(8, BYTE_BLOCK))
PROBED = Form(4, 64)  # the form in which KL is measured; the others' follows from it


def int4(
    checkpoint: Checkpoint, texts: Sequence[Scored], step: Step = lambda line, share: None
) -> tuple[Checkpoint, Quantised, dict[str, Any]]:
    """The int4 model of a checkpoint, calibrated on `texts`: the checkpoint with its biases
    fitted, how to store its matrices, and the choice made, as JSON.

    step: called before each step with a line and its share of the whole work.
    """
    decoder = checkpoint.decoder
    measured = costs(
        checkpoint,
        _probes(texts, checkpoint.parameters),
        lambda line, share: step(line, share * PROBING),
    )
    head = Quantised("int4").head_bytes(decoder.width, decoder.vocab_size)
    limit = gguf_writer.step_bytes(decoder, "Q4_0") - head
    forms = choose(measured, decoder, limit)
    fitted, blocks = quantised(
        checkpoint, texts, forms, lambda line, share: step(line, share * (1 - PROBING))
    )
    record = {
        "method": "gptq, corrected inputs and biases",
        "texts": len(texts),
        "positions": sum(len(text.ids) for text in texts),
        "byte_limit": limit,
        "matrices": {
            name: {
                "bits": form.bits,
                "block": form.block,
                "kl": float(f"{measured[name][FORMS.index(form)]:.3g}"),
            }
            for name, form in forms.items()
        },
    }
    return fitted, Quantised("int4", blocks), record


def _probes(texts: Sequence[Scored], parameters: int) -> Sequence[Scored]:
    positions = np.cumsum([len(text.ids) for text in texts[:PROBE_TEXTS]])
    return texts[: max(1, int((positions <= PROBE_WORK // parameters).sum()))]


def quantised(
    checkpoint: Checkpoint,
    texts: Sequence[Scored],
    forms: Mapping[str, Form],
    step: Step = lambda line, share: None,
) -> tuple[Checkpoint, dict[str, Blocks]]:
    """The checkpoint with its biases fitted, and its matrices in the given forms."""
    decoder, blocks, tensors = checkpoint.decoder, {}, dict(checkpoint.tensors)
    original = ForwardPass(decoder, checkpoint.tensors, texts)
    table = bytewise(tensors["embedding"].T, BYTE_BLOCK).matrix().T
    model = ForwardPass(decoder, tensors | {"embedding": table}, texts)
    wanted: dict[str, Float32] = {}  # the outputs of the float32 model, of one layer

    def remember(name: str, x: Float32, residual: Float32 | None) -> Float32:
        wanted[name] = original.linear(name, x, residual)
        return wanted[name]

    def quantise(name: str, x: Float32, residual: Float32 | None) -> Float32:
        form, count = forms[name], np.float32(len(x))
        goal = wanted.pop(name) if residual is None else wanted.pop(name) - residual
        moment, mean, goal_mean = x.T @ x / count, x.mean(0), goal.mean(0)
        weight = tensors[f"{name}.weight"]
        # The covariance of the inputs and the error of the outputs, without computing the latter.
        error = x.T @ goal / count - np.outer(mean, goal_mean)
        error -= (moment - np.outer(mean, mean)) @ weight
        weight = error_feedback_target(weight, error, moment)
        if form.bits == 8:
            blocks[name] = bytewise(weight, form.block)
        else:
            blocks[name] = gptq(weight, moment, form.block)
        matrix = blocks[name].matrix()
        tensors[f"{name}.bias"] = goal_mean - mean @ matrix
        return output(x, matrix, tensors[f"{name}.bias"], residual)

    x, y = original.embedded(), model.embedded()
    for i in range(decoder.layers):
        step(f"quantising layer {i + 1} of {decoder.layers}", 1 / decoder.layers)
        x = original.layer(i, x, remember)
        y = model.layer(i, y, quantise)
    return replace(checkpoint, tensors=tensors), blocks


def costs(
    checkpoint: Checkpoint, texts: Sequence[Scored], step: Step = lambda line, share: None
) -> Costs:
    """The KL that each matrix costs, rounded to nearest, in each of FORMS.

    Measured in one form, and in the others proportional to the squared error of the
    rounding, each input weighted by its mean square.
    """
    decoder, tensors = checkpoint.decoder, checkpoint.tensors
    model = ForwardPass(decoder, tensors, texts)
    before, mean_square = [model.embedded()], {}

    def watched(name: str, x: Float32, residual: Float32 | None) -> Float32:
        mean_square[name] = np.square(x).mean(0)[:, None]
        return model.linear(name, x, residual)

    for i in range(decoder.layers):
        before.append(model.layer(i, before[-1], watched))
    expected = Predictions(model.logits(before[-1], checkpoint.head))

    def kl(name: str, matrix: Float32) -> float:
        first = int(name.split(".")[1])
        changed = ForwardPass(decoder, {**tensors, f"{name}.weight": matrix}, texts)
        x = before[first]
        for i in range(first, decoder.layers):
            x = changed.layer(i, x)
        return expected.kl(model.logits(x, checkpoint.head))

    kl_by_matrix = {}
    for name in (matrices := decoder.matrices()):
        step(f"measuring what 4 bits cost in {name}", 1 / len(matrices))
        weight = tensors[f"{name}.weight"]
        rounded = [form.rounded(weight) for form in FORMS]
        errors = [float((np.square(r - weight) * mean_square[name]).sum()) for r in rounded]
        probed = FORMS.index(PROBED)
        rate = kl(name, rounded[probed]) / errors[probed] if errors[probed] else 0.0
        kl_by_matrix[name] = [rate * error for error in errors]
    return kl_by_matrix


class Predictions:
    """The distributions [T,V] of the float32 model, for the KL of others to them.

    Computed in float32 with sums in float64: exact to about 1e-7 nats.
    """

    def __init__(self, logits: Float32) -> None:
        log_share = logits - _log_sums(logits).astype(np.float32)[:, None]
        self._share = np.exp(log_share)
        self._negative_entropy = _dot(self._share, log_share)

    def kl(self, logits: Float32) -> float:
        """The mean over positions of Σ p (log p − log q), q the distribution of `logits`."""
        cross = _dot(self._share, logits) - _log_sums(logits)
        return float((self._negative_entropy - cross).mean())


def _log_sums(logits: Float32) -> Float64:
    """log Σ exp(logits) of each row."""
    sums_of_rows = np.empty(len(logits))
    for rows in pieces(len(logits)):
        largest = logits[rows].max(-1)
        sums = np.exp(logits[rows] - largest[:, None]).sum(-1, dtype=np.float64)
        sums_of_rows[rows] = largest + np.log(sums)
    return sums_of_rows


def _dot(a: Float32, b: Float32) -> Float64:
    """Σ a · b of each row."""
    products = np.empty(len(a))
    for rows in pieces(len(a)):
        products[rows] = (a[rows] * b[rows]).sum(-1, dtype=np.float64)
    return products


def choose(costs: Costs, decoder: Decoder, limit: int) -> dict[str, Form]:
    """The form of each matrix, `limit` bytes together if there are forms so small."""
    sizes = {
        name: [form.bytes(*shape) for form in FORMS] for name, shape in decoder.matrices().items()
    }
    chosen = {name: int(np.argmin(size)) for name, size in sizes.items()}
    left = limit - sum(sizes[name][form] for name, form in chosen.items())
    while True:
        changes = [
            ((costs[name][now] - costs[name][new]) / more, name, new)
            for name, now in chosen.items()
            for new in range(len(FORMS))
            if 0 < (more := sizes[name][new] - sizes[name][now]) <= left
        ]
        gain, name, new = max(changes, default=(0.0, "", 0))
        if gain <= 0:
            return {name: FORMS[form] for name, form in chosen.items()}
        left -= sizes[name][new] - sizes[name][chosen[name]]
        chosen[name] = new
