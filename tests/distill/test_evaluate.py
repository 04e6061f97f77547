from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_slm
from edge_slm.cli.console import stdout_console
from edge_slm.distill.evaluate import evaluate, show, write_html
from edge_slm.distill.evaluate.figures import added_words
from edge_slm.distill.evaluate.grid import build_grid, generate
from edge_slm.distill.evaluate.scorers import Cosine, StaticCosine, TaskClassifier, UniversalCosine
from edge_slm.distill.evaluate.trivial import nearest
from edge_slm.distill.rewards import Fluency, Relevance, Weighted
from edge_slm.distill.samples import Sample, held_out_samples
from edge_slm.distill.split import Reading, held_out
from edge_slm.progress import silent
from edge_slm_runtime import SLM
from edge_slm_runtime.errors import DataError, UnknownTask
from edge_slm_runtime.length import tolerance

from .conftest import made_samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slm() -> Iterator[SLM]:
    with edge_slm.load(threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    chosen = {s.request: s for s in made_samples(60) if s.task == "image" and s.words < 20}
    return [*list(chosen.values())[:5], Sample("cats", "cat, kitten, pet, animal", "tags")]


@pytest.fixture(scope="module")
def reward() -> Relevance:
    return Relevance()


@pytest.fixture(scope="module")
def result(slm: SLM, samples: list[Sample], reward: Relevance) -> dict[str, Any]:
    return evaluate(
        slm,
        samples,
        train_samples=made_samples(200, seed=1),
        answers={
            "parrot": {s.request: f"{s.request}, {s.request}" for s in samples[:3]},
            "nobody": {},
        },
        baselines={"same": slm},
        best_of=2,
        reward=reward,
        lengths=(8, 20),
    )


def test_held_out_samples_are_held_out_and_shared_among_tasks(tmp_path: Path) -> None:
    data = tmp_path / "samples.jsonl"
    rows = [
        {"request": f"{task} {i}", "response": f"text {i} of {task}, long", "task": task}
        for task, count in (("image", 300), ("video", 30))
        for i in range(count)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    samples = held_out_samples([data], ["image", "video"], 40, Reading(30))
    assert all(held_out(s.request, 30) for s in samples)
    assert len(samples) == 40
    few = sum(s.task == "video" for s in samples)
    assert 0 < few < 20  # all that there are; the rest are of the other task
    assert len(held_out_samples([data], ["image", "video"], 4, Reading(30))) == 4


def test_length_of_the_shipped_model(result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    alone, kept = result["length"]["model alone"], result["length"]["with the promise"]
    # The tags of training are never 20 words long, so that is not asked of them.
    assert alone["by_task"]["tags"]["generations"] == 1
    assert alone["all"]["generations"] == 11
    assert kept["all"]["hit_rate"]["value"] == 1.0 >= alone["all"]["hit_rate"]["value"]
    assert set(kept["by_length"]) == {"8", "20"}
    assert kept["by_length"]["20"]["hit_rate"]["n"] == 5
    assert kept["all"]["hit_rate"]["n"] == 6  # requests, not generations
    assert np.sum(result["length"]["confusion"]["counts"]) == 11
    assert sum(count for _, _, count in result["length"]["points"]) == 11


def test_relevance_of_the_shipped_model(slm: SLM, result: dict[str, Any]) -> None:
    part = result["relevance"]
    assert [row["level"] for row in part["rows"]] == [*range(slm.schema.levels), None]
    low, high = (part["rows"][i]["scores"] for i in (0, slm.schema.levels - 1))
    for scorer in ("relevance", "wordllama"):
        assert low[scorer]["value"] < high[scorer]["value"]
        assert part["monotonicity"][scorer]["value"] > 0.5
    shuffled = part["shuffled"]["monotonicity"]
    assert shuffled["low"] < 0.5 < shuffled["high"]
    assert shuffled["value"] == pytest.approx(0.5, abs=0.05)
    assert np.sum(part["confusion"]["counts"]) == 6 * slm.schema.levels


def test_scorers_say_whether_they_had_part_in_training(result: dict[str, Any]) -> None:
    assert {s["name"]: s["training"] for s in result["scorers"]} == {
        "relevance": True,
        "wordllama": False,
        "use": False,
        "keywords": False,
    }


def test_the_model_beside_baselines_references_and_others(result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["answers"]}
    assert list(rows) == [
        "level 9",
        "own command",
        "shuffled command",
        "no command",
        "best of 2, any level",
        "request with a fixed ending",
        "nearest training response",
        "same",
        "references",
        "parrot",
        "nobody",
    ]
    own, references, parrot = rows["level 9"], rows["references"], rows["parrot"]
    assert own["model_ratio"]["relevance"]["value"] == 1
    found = references["model_ratio"]["wordllama"]["value"]
    means = [row["scores"]["wordllama"]["value"] for row in (own, references)]
    assert found == pytest.approx(means[0] / means[1])
    assert references["obedience"]["words_hit_rate"]["value"] == 1
    assert parrot["n"] == 3
    assert parrot["echo"]["value"] == 1
    assert parrot["model_ratio"]["relevance"]["n"] == 3
    assert rows["nobody"] == {"name": "nobody", "kind": "answers", "n": 0, "by_task": {}}


def test_trivial_baselines(samples: list[Sample], result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["answers"]}
    echo, near = rows["request with a fixed ending"], rows["nearest training response"]
    assert echo["scores"]["keywords"]["value"] == 1
    assert echo["n"] == 6
    train = [*made_samples(200, seed=1), Sample("cats", "cat, tom", "tags")]
    found = nearest(samples, train, StaticCosine())
    for sample, text in zip(samples, found, strict=True):
        # The request itself is among those of training, and its response of that length wins.
        low, high = tolerance(sample.words)
        assert text in {s.response for s in train if s.task == sample.task}
        assert text is not None
        assert low <= len(text.split()) <= high
    assert found[-1] == "cat, tom"
    assert nearest(samples, train[:-1][:0], StaticCosine()) == [None] * 6
    assert near["by_task"]["image"]["words_hit_rate"]["value"] > 0.5


def test_every_row_task_by_task(samples: list[Sample], result: dict[str, Any]) -> None:
    rows = {row["name"]: row["by_task"] for row in result["answers"]}
    references, echo, parrot = (
        rows[name] for name in ("references", "request with a fixed ending", "parrot")
    )
    assert set(references) == {"image", "tags"}
    assert set(parrot) == {"image"}  # it answered none of the tags
    image = references["image"]
    assert image["n"] == 5
    assert image["words_hit_rate"]["value"] == 1
    assert {ratio["value"] for ratio in image["reference_ratio"].values()} == {1}
    assert image["kept_short"]["value"] == 1  # these references begin with their request
    assert parrot["image"]["reference_ratio"]["added"]["value"] == 0
    assert echo["image"]["reference_ratio"]["wordllama"]["value"] > 0.5
    assert parrot["image"]["faults"]["unfinished"]["value"] == 1
    by_level = result["relevance"]["by_task"]
    assert by_level["image"]["monotonicity"]["value"] > 0.5


def test_added_words() -> None:
    assert added_words("a red fox", "Red foxes in deep snow, deep deep snow") == 2  # deep, snow
    assert added_words("a red fox", "a red fox") == 0


def test_best_of_n_is_the_best_under_the_training_reward(
    slm: SLM, samples: list[Sample], result: dict[str, Any], reward: Relevance
) -> None:
    more = evaluate(slm, samples, best_of=3, lengths=(8,), reward=reward)
    of_three, of_two = (
        next(row for row in found["answers"] if row["name"].startswith("best of"))
        for found in (more, result)  # whose two candidates are among the three
    )
    scores = [row["scores"]["relevance"]["value"] for row in (of_three, of_two)]
    assert scores[0] >= scores[1]


def test_task_axis_and_cross_talk(result: dict[str, Any]) -> None:
    part = result["task"]
    assert part["confusion"]["labels"] == ["image", "tags"]
    assert np.sum(part["confusion"]["counts"]) == 12  # every request as every task
    assert part["references_accuracy"]["n"] == 6
    talk = result["cross_talk"]
    assert len(talk["words_by_level"]["rows"]) == 10
    assert [row["words"] for row in talk["reward_by_length"]["rows"]] == [8, 20]
    assert sum(row["shift"]["value"] for row in talk["reward_by_length"]["rows"]) == pytest.approx(
        0, abs=1e-6
    )


def test_the_parts_of_a_weighted_reward_are_all_reported(
    slm: SLM, samples: list[Sample], reward: Relevance
) -> None:
    both = Weighted([(1.0, reward), (0.5, Fluency())])
    found = evaluate(slm, samples[:2], best_of=0, lengths=(8,), reward=both)
    training = [s["name"] for s in found["scorers"] if s["training"]]
    assert training == [both.name, "relevance", "fluency"]
    scores = found["answers"][0]["scores"]
    mean = (scores["relevance"]["value"] + 0.5 * scores["fluency"]["value"]) / 1.5
    assert scores[both.name]["value"] == pytest.approx(mean)
    assert found["task"] is None  # nothing to learn a classifier from
    assert not any(row["name"].startswith("best of") for row in found["answers"])


def test_what_two_figures_need_is_generated_once(slm: SLM, samples: list[Sample]) -> None:
    settings: dict[str, Any] = {"lengths": (8,), "task_words": {}, "best_of": 0}
    grid = build_grid(slm, samples, own_levels=[3] * len(samples), **settings)
    asked = [r for block in grid.blocks.values() for row in block for r in row if r]
    outs = generate(slm, asked, "generate", silent)
    assert len(outs) < len(asked)  # "own" stands in "levels" too
    row = grid.blocks["own"][0][0]
    assert row is not None
    assert outs[row].text == slm.generate(**_settings(row)).text


def _settings(request: Any) -> dict[str, Any]:
    names = ("request", "task", "words", "relevance", "keep_length")
    return {name: getattr(request, name) for name in names}


def test_a_shuffled_command_is_anothers_of_the_same_task(slm: SLM, samples: list[Sample]) -> None:
    grid = build_grid(slm, samples, own_levels=range(6), lengths=(8,), task_words={}, best_of=0)
    for i, (request,) in enumerate(grid.blocks["shuffled"][:5]):
        assert request is not None
        assert request.relevance != i
        assert samples[request.relevance or 0].task == samples[i].task
        assert request.words == samples[request.relevance or 0].words


def test_requests_without_room_are_counted(
    slm: SLM, samples: list[Sample], reward: Relevance
) -> None:
    long = replace(samples[0], request="very " * 300 + "long")
    found = evaluate(slm, [*samples[:2], long], best_of=0, lengths=(8,), reward=reward)
    assert (found["requests"], found["too_long"]) == (2, 1)
    with pytest.raises(DataError, match="1 held-out requests are too few"):
        evaluate(slm, [samples[0], long], reward=reward)


def test_what_cannot_be_evaluated_is_said(
    slm: SLM, tiny_bundle: Path, samples: list[Sample]
) -> None:
    with pytest.raises(UnknownTask, match="poem"):
        evaluate(slm, [replace(s, task="poem") for s in samples])
    with (
        edge_slm.load(tiny_bundle, engine="onnxruntime", threads=1) as untrained,
        pytest.raises(DataError, match="does not say where the relevance levels"),
    ):
        evaluate(untrained, samples[:2])


def test_the_classifier_tells_captions_from_tags() -> None:
    classifier = TaskClassifier(made_samples(300), ["image", "tags", "absent"])
    assert classifier.tasks == ["image", "tags"]
    fresh = made_samples(60, seed=5)
    said = classifier.predict([s.response for s in fresh])
    assert np.mean([classifier.tasks[i] == s.task for i, s in zip(said, fresh, strict=True)]) > 0.95


@pytest.mark.parametrize("encoder", [StaticCosine, UniversalCosine])
def test_independent_encoders_know_what_belongs_together(encoder: type[Cosine]) -> None:
    import logging

    before = logging.getLogger().level, list(logging.getLogger().handlers)
    scorer = encoder()
    assert (logging.getLogger().level, logging.getLogger().handlers) == before
    near, far, same = scorer.score(
        [
            Sample("a red fox in the snow", "a fox with red fur on a white winter field", "image"),
            Sample("a red fox in the snow", "quarterly report on interest rates", "image"),
            Sample("a red fox in the snow", "a red fox in the snow", "image"),
        ]
    )
    assert far < near < same
    assert far < 0.2  # what does not belong together scores near 0, so ratios mean something
    assert same == pytest.approx(1, abs=1e-5)
    one, of_many = scorer.embed(["an owl"]), scorer.embed(["", "a fox", "an owl"])
    assert np.allclose(one[0], of_many[2], atol=1e-5)
    assert np.allclose(np.linalg.norm(of_many, axis=1), 1, atol=1e-5)


def test_tables_and_page(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(result, stdout_console())
    printed = capsys.readouterr().out
    for said in (
        "with the promise",
        "references",
        "parrot",
        "Cross-talk",
        "image: 5 requests",
        "P(higher gives more)",
        "bootstrap over requests",
    ):
        assert said in printed
    write_html(json.loads(json.dumps(result)), tmp_path / "page.html")  # as read from --json
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == page.count("</svg>") >= 9
    assert result["texts"][0]["request"] in page
    assert not list(tmp_path.glob("*.part"))
