"""Every peer that is installed, on one tiny checkpoint: the same weights, the same tokens."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edge_slm_bench.process import launch
from edge_slm_bench.runners import Prompt, Runner, Spec, open_runner
from edge_slm_converters import peers
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_converters.peers import PEERS, prepare
from edge_slm_runtime.errors import EngineError

from .greedy import greedy_ids

pytestmark = pytest.mark.slow

PROMPT = Prompt("", 0, tuple(range(70, 86)))
OTHERS = (PROMPT, Prompt("", 0, tuple(range(100, 116))), Prompt("", 0, tuple(range(300, 316))))
NEW_TOKENS = 12


@dataclass
class Peers:
    """Prepares each peer when it is first asked for: exporters take their time."""

    checkpoint: Path
    folder: Path
    expected: tuple[int, ...]
    specs: dict[str, Spec] = field(default_factory=dict)

    def spec(self, name: str) -> Spec:
        if name not in self.specs:
            told: list[str] = []
            with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as in a process of its own
                if not name.startswith("optimum"):  # a start for each exporter takes its time
                    patched.setattr(peers, "_in_own_process", peers.make)
                specs, missing = prepare(self.checkpoint, self.folder / "new", [name], told.append)
            assert told == [name]
            if missing:
                assert "not installed" in missing[name], missing[name]
                pytest.skip(missing[name])
            (self.specs[name],) = specs
        return self.specs[name]


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    folder = tmp_path_factory.mktemp("peers")
    source = read_checkpoint(tiny_checkpoint)
    expected = greedy_ids(source, folder / "onnx", PROMPT.ids, NEW_TOKENS)
    return Peers(tiny_checkpoint, folder, expected)


@pytest.fixture(scope="module", params=PEERS)
def opened(request: pytest.FixtureRequest, prepared: Peers) -> Iterator[tuple[str, Runner]]:
    runner = open_runner(prepared.spec(request.param), 2)
    yield request.param, runner
    runner.close()


def exact(name: str) -> bool:
    return PEERS[name].precision in ("fp32", "f16")


def test_single_gives_our_tokens(opened: tuple[str, Runner], prepared: Peers) -> None:
    name, runner = opened
    first, again = (runner.single(PROMPT, NEW_TOKENS) for _ in range(2))
    assert first.ids == again.ids
    assert len(first.ids) == NEW_TOKENS
    if exact(name):
        assert first.ids == prepared.expected
    if PEERS[name].runner == "ctranslate2":  # first and last, from two runs
        assert len(first.seconds) == 2
    else:
        assert len(first.seconds) == NEW_TOKENS
        assert list(first.seconds) == sorted(first.seconds)


def test_batch_gives_the_tokens_of_each_alone(opened: tuple[str, Runner]) -> None:
    name, runner = opened
    rows = runner.batch(OTHERS, NEW_TOKENS)
    assert [len(row) for row in rows] == [NEW_TOKENS] * len(OTHERS)
    if exact(name):
        assert rows == [runner.single(prompt, NEW_TOKENS).ids for prompt in OTHERS]


def test_logits_are_those_of_every_position(opened: tuple[str, Runner], prepared: Peers) -> None:
    name, runner = opened
    ids = [*PROMPT.ids, *prepared.expected]
    logits = runner.logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids), 417)
    assert np.isfinite(logits).all()
    agreement = (logits[len(PROMPT.ids) - 1 : -1].argmax(-1) == prepared.expected).mean()
    assert agreement == 1 if exact(name) else agreement > 0.5


@pytest.mark.parametrize("name", PEERS)
def test_specs_say_what_is_read(name: str, prepared: Peers) -> None:
    spec, peer = prepared.spec(name), PEERS[name]
    assert Spec.of(json.loads(json.dumps(spec.as_dict()))) == spec
    assert (spec.runner, spec.variant, spec.engine) == (peer.runner, name, peer.engine)
    assert spec.precision == peer.precision
    assert spec.peer
    matrices = 2 * 12 * 64 * 64 + 417 * 64
    size = {"fp32": 4, "f16": 2, "int8": 1, "int4": 0.5}[spec.precision]
    assert size * matrices <= spec.step_bytes < 1.35 * size * matrices
    if peer.runner == "transformers":
        assert Path(spec.path) == prepared.checkpoint
    else:
        assert spec.disk_bytes >= spec.step_bytes


def test_a_fresh_process_opens_what_was_prepared(prepared: Peers) -> None:
    spec = prepared.spec("ct2-int8")
    job = {
        "kind": "speed",
        "scenario": "single-stream",
        "spec": spec.as_dict(),
        "threads": 1,
        "prompts": [asdict(PROMPT)],
        "new_tokens": 4,
        "repetitions": 2,
    }
    assert len(launch(job)["timings"]) == 2


def test_what_is_not_installed_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = peers.Peer("openvino", "openvino", "fp32", ("openvino", "edge-slm-no-such-package"))
    monkeypatch.setattr(peers, "PEERS", {"absent": absent})
    specs, missing = prepare(tiny_checkpoint, tmp_path, ["absent"])
    assert not specs
    assert "edge-slm-no-such-package" in missing["absent"]
    assert "pip install 'edge-slm[peers]'" in missing["absent"]


def test_an_export_that_fails_is_a_reason_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    specs, missing = prepare(broken, tmp_path / "out", ["ct2-fp32"])
    assert not specs
    assert "not a safetensors file" in missing["ct2-fp32"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", PEERS)
def test_a_model_that_is_not_one_is_an_engine_error(
    name: str, prepared: Peers, tmp_path: Path
) -> None:
    data = {**prepared.spec(name).as_dict(), "path": str(tmp_path)}
    with pytest.raises(EngineError):
        open_runner(Spec.of(data), 1)
