"""Ways of decoding: they agree, they are what they are called, and a difference is counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_slm_bench import consistency
from edge_slm_bench.runners.edge_slm import spec_of
from edge_slm_runtime import read_manifest

REQUESTS = [
    {"request": f"a cabin {where}", "words": 5, "keep_length": False, "max_new_tokens": 8}
    for where in ("in the snow", "by the sea at dawn", "behind seven hills")
]
STEPPED = {"batch 8", "batch 32", "prefix cache", "chunks of 8"}
KNOWN = {
    "onnx-fp32": STEPPED,
    "numba-int8": STEPPED | {"speculation"},
    "numba-int4": STEPPED | {"speculation"},
    "ctranslate2-int8": {"batch 8", "batch 32"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_all_agree_and_a_difference_is_counted(name: str, tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    (variant,) = (v for v in manifest.variants if v.name == name)
    spec = spec_of(tiny_bundle, variant)
    plain = consistency.plain_answers(spec, REQUESTS, 1)
    assert len({tuple(answer["token_ids"]) for answer in plain}) == 3
    found = consistency.count_mismatches(manifest.prompt, spec, REQUESTS, plain, 1)
    assert found == dict.fromkeys(KNOWN[name], 0)
    plain[1]["token_ids"][-1] += 1
    found = consistency.count_mismatches(manifest.prompt, spec, REQUESTS, plain, 1)
    assert found == dict.fromkeys(KNOWN[name], 1)


def test_each_way_is_taken(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Mapping[str, Any]] = []
    taken: list[list[Mapping[str, Any]]] = []

    def launch(job: Mapping[str, Any]) -> dict[str, Any]:
        found = real(job)
        jobs.append(job)
        taken.append([answer["stats"] for answer in found["answers"][0]])
        return found

    real = consistency.launch
    monkeypatch.setattr(consistency, "launch", launch)
    manifest = read_manifest(tiny_bundle)
    (variant,) = (v for v in manifest.variants if v.name == "numba-int8")
    spec = spec_of(tiny_bundle, variant)
    again = [REQUESTS[0], REQUESTS[0], REQUESTS[1]]  # so that there is something to guess
    consistency.count_mismatches(
        manifest.prompt, spec, again, consistency.plain_answers(spec, again, 1), 1
    )
    plain, eight, many, kept, _, guessing = taken
    assert [job.get("batch") for job in jobs] == [None, 8, 32, None, None, None]
    assert [job["spec"]["options"].get("prefill_tokens") for job in jobs] == [
        None,
        None,
        None,
        None,
        8,
        None,
    ]
    assert not any(stats["cached_tokens"] for stats in plain + guessing)
    assert all(stats["cached_tokens"] > 4 for stats in kept[1::2])
    assert sum(stats["guessed_tokens"] for stats in guessing) > 0
    assert not any(stats["guessed_tokens"] for stats in plain + eight + many + kept)
