"""Adapters that requests choose from: each row its own, all others untouched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_slm
from edge_slm_runtime import SLM, Generation, Request, load, read_manifest, verify
from edge_slm_runtime.bundle import Manifest, file_entry
from edge_slm_runtime.deltas import Delta, Factors
from edge_slm_runtime.errors import (
    AdapterInvalid,
    BadSetting,
    BundleError,
    NotSupportedByEngine,
)
from edge_slm_runtime.selftest import golden_answers

TEXT = "a cosy cabin in the snow, warm light"


def delta_of(manifest: Manifest, name: str, task: str = "", rank: int = 4) -> Delta:
    """Of every matrix, large enough to change most tokens."""
    random, factors = np.random.default_rng(len(name) + rank), {}
    for matrix, (inputs, outputs) in manifest.model.matrices().items():
        a, b = (
            random.normal(0, 0.15, n).astype(np.float16) for n in ((inputs, rank), (rank, outputs))
        )
        factors[matrix] = Factors(a, b)
    return Delta(name, task, manifest.base, factors)


@pytest.fixture(scope="module")
def files(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the tiny bundle: for titles, for videos (of a larger rank), for no task."""
    folder, manifest = tmp_path_factory.mktemp("adapters"), read_manifest(tiny_bundle)
    found = {}
    for name, task, rank in (("titles", "title", 4), ("videos", "video", 20), ("other", "", 16)):
        found[name] = folder / f"{name}.safetensors"
        found[name].write_bytes(delta_of(manifest, name, task, rank).to_bytes())
    return found


@pytest.fixture(scope="module", params=["int8", "int4"])
def pair(
    request: pytest.FixtureRequest, tiny_bundle: Path, files: dict[str, Path]
) -> Iterator[tuple[SLM, SLM]]:
    """Without adapters, and with them."""
    with (
        load(tiny_bundle, "numba", request.param, threads=2) as plain,
        load(tiny_bundle, "numba", request.param, threads=2, adapters=files) as adapted,
    ):
        yield plain, adapted


def told(answers: Any) -> list[tuple[Any, ...]]:
    """Tokens, and the numbers that they were chosen by."""
    return [(a.text, a.token_ids, a.logprobs, a.seed) for a in answers]


def asked(**settings: Any) -> Request:
    return Request(TEXT, logprobs=True, max_new_tokens=12, **settings)


def test_they_change_the_answers(pair: tuple[SLM, SLM]) -> None:
    """One without effect fails."""
    plain, adapted = pair
    assert adapted.adapters == {"titles": "title", "videos": "video", "other": ""}
    answers = [adapted.generate(asked(adapter=name)) for name in ("", *adapted.adapters)]
    assert len({a.logprobs for a in answers}) == 4
    assert len({a.token_ids for a in answers}) == 4
    assert told(answers[:1]) == told([plain.generate(asked())])


def test_the_commanded_task_chooses(pair: tuple[SLM, SLM]) -> None:
    plain, adapted = pair
    for task, name in (("title", "titles"), ("video", "videos"), ("image", ""), (None, "")):
        by_task, by_name = adapted.generate(asked(task=task)), asked(task=task, adapter=name)
        assert told([by_task]) == told([adapted.generate(by_name)])
        same = told([by_task]) == told([plain.generate(asked(task=task))])
        assert same == (name == "")
    with pytest.raises(BadSetting, match="loaded: titles, videos, other"):
        adapted.check(asked(adapter="title"))
    with pytest.raises(BadSetting, match="adapter is 7"):
        adapted.check(asked(adapter=7))
    with pytest.raises(BadSetting, match="loaded: none"):
        plain.check(asked(adapter="titles"))


def mixed(count: int = 12) -> list[Request]:
    """All adapters and none, prompts of several lengths, greedy and drawn."""
    names = ["", "titles", "videos", "other", None]
    return [
        Request(
            TEXT[: 9 + 7 * (i % 5)],
            task=["title", "image", "video"][i % 3],
            adapter=names[i % 5],
            temperature=[0.0, 1.2][i % 2],
            seed=i,
            logprobs=True,
            max_new_tokens=3 + i % 7,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("rows", [2, 5, 12])
def test_a_row_of_a_mixed_batch_has_the_bits_it_has_alone(
    pair: tuple[SLM, SLM], tiny_bundle: Path, files: dict[str, Path], rows: int
) -> None:
    _, adapted = pair
    precision = adapted.variant.precision
    alone = []
    for one in mixed():
        adapted.trim_memory()
        alone += told([adapted.generate(one)])
    assert told(adapted.generate_batch(mixed(), rows)) == alone
    assert told(adapted.generate_batch(mixed()[::-1], rows)) == alone[::-1]
    with adapted.session(rows) as session:
        assert told([s.result for s in [session.submit(one) for one in mixed()]]) == alone
    how: list[dict[str, Any]] = [{"prefill_tokens": 5}, {"threads": 1}, {"speculate": True}]
    for options in how:
        with load(tiny_bundle, "numba", precision, adapters=files, **options) as other:
            assert told(other.generate_batch(mixed(), rows)) == alone


def test_another_adapter_leaves_the_answers_as_they_are(
    tiny_bundle: Path, files: dict[str, Path]
) -> None:
    """Those of the other tasks, and of the other adapters, to the last bit."""
    requests = [asked(task=task) for task in ("title", "image", None)]
    with load(tiny_bundle, "numba", adapters={"titles": files["titles"]}) as slm:
        before = told(slm.generate_batch(requests))
        slm.add_adapter(files["videos"])
        assert told(slm.generate_batch(requests)) == before
        slm.remove_adapter("videos")
        assert told(slm.generate_batch(requests)) == before
        assert slm.adapters == {"titles": "title"}
        with pytest.raises(BadSetting, match="there is no adapter 'videos'"):
            slm.remove_adapter("videos")


def test_running_answers_keep_what_they_began_with(
    tiny_bundle: Path, files: dict[str, Path]
) -> None:
    with load(tiny_bundle, "numba", adapters={"titles": files["titles"]}) as slm:
        request = Request(TEXT, task="title", max_new_tokens=30, keep_length=False)
        for change in ("replace", "remove"):
            whole = slm.generate(request)
            stream = slm.stream(request)
            pieces = [next(stream)]
            if change == "replace":
                slm.add_adapter(files["videos"], "titles", "title")
            else:
                slm.remove_adapter("titles")
            other = slm.generate(request)
            pieces += list(stream)
            assert "".join(pieces) == whole.text
            assert other.token_ids != whole.token_ids
        assert slm.adapters == {}


def test_the_one_added_last_is_that_of_its_task(tiny_bundle: Path, files: dict[str, Path]) -> None:
    with load(tiny_bundle, "numba") as slm:
        slm.add_adapter(files["other"], "a", "title")
        first = slm.generate(asked(task="title"))
        slm.add_adapter(files["titles"], "b")
        assert told([slm.generate(asked(task="title"))]) == told(
            [slm.generate(asked(task="title", adapter="b"))]
        )
        assert told([slm.generate(asked(task="title", adapter="a"))]) == told([first])
        slm.remove_adapter("b")
        assert told([slm.generate(asked(task="title"))]) == told([first])


def test_prompts_are_not_shared_by_adapters(pair: tuple[SLM, SLM]) -> None:
    _, adapted = pair
    adapted.trim_memory()
    names = ("", "titles", "videos")
    fresh = [adapted.generate(asked(adapter=name)) for name in names]
    assert [a.stats.cached_tokens for a in fresh] == [0, 0, 0]
    again = [adapted.generate(asked(adapter=name)) for name in names]
    assert all(a.stats.cached_tokens > 0 for a in again)
    assert told(again) == told(fresh)
    together = list(adapted.generate_batch([asked(adapter=name) for name in names * 2], 6))
    assert told(together) == told(fresh * 2)
    with pytest.raises(BadSetting, match="without NUL"):
        adapted.check(asked(cache_key="x\0"))


@pytest.mark.parametrize("engine", ["onnxruntime", "ctranslate2"])
def test_other_engines_refuse(tiny_bundle: Path, files: dict[str, Path], engine: str) -> None:
    pytest.importorskip(engine)
    with pytest.raises(NotSupportedByEngine, match=r"merge it: edge-slm convert --adapter"):
        load(tiny_bundle, engine, adapters=files)


# -- in a bundle -------------------------------------------------------------------


def with_deltas(bundle: Path, target: Path, *deltas: Delta) -> Path:
    """A copy of the bundle, and these kept in it, as `convert` writes them."""
    from edge_slm_converters.bundle_writer import save_manifest

    shutil.copytree(bundle, target)
    manifest = read_manifest(target)
    (target / "deltas").mkdir()
    files = dict(manifest.files)
    for delta in deltas:
        (target / delta.path).write_bytes(delta.to_bytes())
        files[delta.path] = file_entry(target / delta.path)
    save_manifest(replace(manifest, files=files), target)
    return target


def test_in_a_bundle(tiny_bundle: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    deltas = [Delta.read(files[name]) for name in ("titles", "videos")]
    bundle = with_deltas(tiny_bundle, tmp_path / "b", *deltas)
    assert verify(bundle).deltas == ["deltas/titles.safetensors", "deltas/videos.safetensors"]
    with load(bundle, "numba") as slm, load(tiny_bundle, "numba", adapters=files) as other:
        assert slm.adapters == {"titles": "title", "videos": "video"}
        assert told(slm.generate_batch(mixed(3))) == told(other.generate_batch(mixed(3)))
        for golden, ids in golden_answers(slm):  # of the weights alone
            assert ids == golden.ids[slm.variant.name]
    with (
        load(bundle, "onnxruntime", "int8") as slm,
        load(tiny_bundle, "onnxruntime", "int8") as base,
    ):
        with pytest.raises(NotSupportedByEngine, match="cannot answer with adapter titles"):
            slm.generate(asked(task="title"))
        for settings in ({"task": "image"}, {"task": "title", "adapter": ""}):
            assert told([slm.generate(asked(**settings))]) == told(
                [base.generate(asked(**settings))]
            )


def test_a_model_in_its_own_process_has_them(tiny_bundle: Path, files: dict[str, Path]) -> None:
    with load(tiny_bundle, "numba", adapters=files) as slm:
        here: Generation = slm.generate(asked(task="title"))
    options: dict[str, Any] = {"engine": "numba", "adapters": files}
    with edge_slm.load(tiny_bundle, isolate=True, **options) as apart:
        assert told([apart.generate(asked(task="title"))]) == told([here])


def test_damaged_and_foreign_ones_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    good = delta_of(manifest, "x")
    wrong = {
        "was made for other weights": replace(good, base="0" * 64),
        "is for task 'poem'": replace(good, task="poem"),
        "which the model has not": replace(
            good, factors={"layers.0.out": good.factors["layers.0.qkv"]}
        ),
    }
    for i, (what, delta) in enumerate(wrong.items()):
        bundle = with_deltas(tiny_bundle, tmp_path / f"b{i}", delta)
        with pytest.raises(AdapterInvalid, match=what):
            verify(bundle)
        with pytest.raises(AdapterInvalid, match=what):
            load(bundle, "numba")
        (file := tmp_path / "x.safetensors").write_bytes(delta.to_bytes())
        with pytest.raises(AdapterInvalid, match=what):
            load(tiny_bundle, "numba", adapters={"x": file})
    bundle = with_deltas(tiny_bundle, tmp_path / "named", good)
    renamed = with_deltas(tiny_bundle, tmp_path / "renamed", replace(good, name="y"))
    shutil.copyfile(renamed / "deltas/y.safetensors", bundle / good.path)
    with pytest.raises(BundleError, match=r"x\.safetensors"):
        load(bundle, "numba")
    save_as(bundle, good.path)
    with pytest.raises(AdapterInvalid, match="has the adapter y"):
        verify(bundle)
    (bundle / good.path).write_bytes(b"")
    save_as(bundle, good.path)
    with pytest.raises(AdapterInvalid, match="is not an adapter"):
        load(bundle, "numba")


def save_as(bundle: Path, path: str) -> None:
    """With the digest of what is there."""
    from edge_slm_converters.bundle_writer import save_manifest

    manifest = read_manifest(bundle)
    save_manifest(
        replace(manifest, files={**manifest.files, path: file_entry(bundle / path)}), bundle
    )
