from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.distill.cuts import clause_cuts
from edge_slm.distill.recipe import HindsightRecipe, Recipe
from edge_slm.distill.samples import Sample, divide, load_samples, read_jsonl, read_samples
from edge_slm.distill.split import Reading, held_out
from edge_slm.distill.variants import fragment_request, vary
from edge_slm_runtime.errors import DataError


def test_the_split_depends_on_the_request_alone(data_file: Path, recipe: Recipe) -> None:
    train, held, _ = load_samples([data_file], recipe.data, seed=1)
    assert held
    assert train
    assert not {s.request for s in train} & {s.request for s in held}
    assert all(held_out(s.request, 10) for s in held)
    assert held_out("A Red  fox", 10) == held_out("a red fox", 10)
    assert sum(held_out(str(i), 4) for i in range(10_000)) == pytest.approx(400, abs=80)


def test_variants_are_what_they_say(data_file: Path, recipe: Recipe) -> None:
    train, _, lone = load_samples([data_file], recipe.data, seed=1)
    pool = vary(train, lone, recipe.hindsight, 10, seed=1)
    assert pool == vary(train, lone, recipe.hindsight, 10, seed=1)
    originals = {s.response for s in train} | {s.response for s in lone}
    pairs = {(s.request, s.response) for s in train}
    kinds = {s.kind for s in pool}
    assert kinds == {"pair", "cut", "fragment", "mismatch"}
    for sample in pool:
        assert not held_out(sample.request, 10)
        if sample.kind == "cut":
            assert any(text.startswith(sample.response) for text in originals)
            assert sample.words >= 3
        if sample.kind == "fragment":
            words = sample.request.lower().replace(",", "").split()
            assert all(word in sample.response.lower() for word in words)
        if sample.kind == "mismatch":
            assert (sample.request, sample.response) not in pairs
    share = sum(s.kind == "mismatch" for s in pool) / len(pool)
    assert 0.03 < share <= recipe.hindsight.mismatch_share + 0.01


def test_a_held_out_response_is_not_trained_on_under_another_request() -> None:
    requests = [f"request {i}" for i in range(100)]
    pairs = [Sample(request, f"a text of its own, {request}", "image") for request in requests]
    pairs += [Sample(request, "one text for all of them", "image") for request in requests]
    train, held = divide(pairs, 20)
    assert held
    assert not {s.response for s in train} & {s.response for s in held}
    assert len(train) + 2 * len(held) == len(pairs)


def test_cuts_end_at_clause_ends() -> None:
    text = "A fox, red and old; it sits. Snow falls"
    assert clause_cuts(text) == ["A fox", "A fox, red and old", "A fox, red and old; it sits."]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80), st.randoms())
def test_a_fragment_is_part_of_its_text(text: str, rng: object) -> None:
    request = fragment_request(text, rng)  # type: ignore[arg-type]
    if request is not None:
        folded = " ".join(text.split()).lower()
        assert len(request.split()) >= 2
        for phrase in request.lower().split(", "):
            assert set(phrase.split()) <= set(
                "".join(c if c not in ',;:.!?"()[]' else " " for c in folded).split()
            )


def test_a_swap_quotes_another_text_on_both_sides() -> None:
    requests = ["Fresh Bread Daily", "Danger Zone", "Mind the Gap"]
    pairs = [Sample(r, f'A wooden sign that reads "{r}".', "lettering") for r in requests]
    pairs.append(Sample("fox", 'A fox beside the word "fox".', "lettering"))  # named elsewhere too
    pairs.append(Sample("a red fox", 'A red fox by a sign, "Keep Out".', "lettering"))
    recipe = HindsightRecipe(swaps={"lettering": 2}, mismatch_share=0)
    swaps = [s for s in vary(pairs, [], recipe, 0, seed=1) if s.kind == "swap"]
    assert len(swaps) >= 3
    given = {sample.request for sample in pairs}
    for sample in swaps:
        assert sample.request in given
        assert sample.response == f'A wooden sign that reads "{sample.request}".'
        assert Sample(sample.request, sample.response, "lettering") not in pairs[3:]


def test_only_whole_requests_and_responses_are_read(tmp_path: Path) -> None:
    rows = [
        ("In the rain", "In the rain, a fox sits."),
        ("In the rain a fox", "A fox, seen in the rain."),
        ("a sign", 'A sign that says "Open. It is red.'),
        ("a fox", "A fox sits."),
    ]
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"request": r, "response": t, "task": "image"}) for r, t in rows]
    file.write_text("\n".join(lines))
    read = [sample.request for sample in read_samples([file], reading=Reading(whole=True))]
    assert read == ["In the rain a fox", "a fox"]
    assert len(list(read_samples([file]))) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"request": 1', "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b'{"request": "a", "task": "image"}', "'response' is missing"),
        (b'{"requst": "a", "response": "b", "task": "image"}', "'request' is missing"),
        (b'{"request": "a", "response": 5, "task": "image"}', "response is 5"),
        (b'{"request": 5, "response": "b", "task": "image"}', "request is 5"),
        (b'{"request": "a", "response": "b", "task": ["image"]}', "task is"),
        (b'{"request": "a", "response": "b", "task": "image", "quality": 2}', "quality is 2"),
        (b'{"request": "a", "response": "b", "task": "image", "quality": NaN}', "quality is nan"),
        (b'{"request": "a", "response": "b", "task": "image", "quality": "1"}', "quality is '1'"),
        (b'{"request": "a", "response": "b", "task": "image", "quality": true}', "quality is True"),
        (b'{"request": "a", "response": "b", "task": "image", "fault": "c"}', "fault is 'c'"),
        (b'{"request": "a", "response": "b", "task": "image", "fault": 1}', "fault is 1"),
        (
            b'{"request": "a", "response": "\\ud800", "task": "image"}',
            "response holds half a character",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"request": "a", "response": "b", "task": "image"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: {message}"):
        list(read_jsonl([file]))


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    row = {"request": "a\u2028b", "response": "c\x85d", "task": "image"}
    file = tmp_path / "good.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8-sig")
    assert list(read_jsonl([file])) == [("a\u2028b", "c\x85d", "image", 1.0, "")]
    with pytest.raises(DataError, match="cannot read"):
        list(read_jsonl([tmp_path / "none.jsonl"]))


def test_a_task_without_samples_is_named(data_file: Path, recipe: Recipe) -> None:
    wanted = recipe.data.model_copy(update={"tasks": ("image", "video")})
    with pytest.raises(DataError, match="no usable sample for task video"):
        load_samples([data_file], wanted, seed=1)
