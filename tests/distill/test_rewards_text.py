"""Keyword coverage, fluency guards, and how rewards are weighted together."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm.distill.recipe import RewardRecipe
from edge_slm.distill.rewards import Fluency, Keywords, Relevance, Weighted, make_reward
from edge_slm.distill.rewards.__main__ import main, variants
from edge_slm.distill.rewards.fluency import guards, once
from edge_slm.distill.samples import Sample, read_samples
from edge_slm_runtime.errors import BadSetting
from edge_slm_runtime.keywords import content_stems, coverage, stem

GOOD = [
    Sample("a red fox in the snow", "A red fox in the snow, soft light, film grain", "image"),
    Sample("sea, town, island", "Old town and sea on the island.", "scene"),
    Sample("graphite on paper; castle, south, hill", "The Castle, from the South", "title"),
    Sample("Town on Cliffs (graphite on paper)", "sailing, cliff, harbour, distant", "tags"),
    Sample(
        "an orange and a clock",
        "A vibrant orange sits on a rustic table. Beside it, an antique clock ticks softly.",
        "video",
    ),
]
PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "prompts"
# Words of a small world, so that random texts repeat, echo and break off by chance.
TEXTS = st.lists(
    st.sampled_from('a red fox in the snow, light. and café ( " ! 東京 !!!! \ufffd Ünder'.split()),
    max_size=30,
).map(" ".join)
REQUESTS = st.lists(
    st.sampled_from("a red, fox in the café, snow Ünder 東京".split()), min_size=3
).map(" ".join)
ANY_TEXT = st.one_of(TEXTS, st.text(max_size=60))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cities", "city"), ("running", "runs"), ("children", "child"), ("fox's", "fox"),
        ("flies", "fly"), ("housing", "house"), ("stopped", "stop"), ("boxes", "box"),
        ("glowing", "glow"), ("danced", "dancing"), ("women", "woman"), ("trees", "tree"),
    ],
)  # fmt: skip
def test_inflections_meet(one: str, other: str) -> None:
    assert stem(one) == stem(other)


@pytest.mark.parametrize(("one", "other"), [("sing", "s"), ("red", "r"), ("glass", "gla")])
def test_short_words_stay_whole(one: str, other: str) -> None:
    assert stem(one) != stem(other)


def test_coverage_counts_content_words_in_any_inflection() -> None:
    assert coverage("two foxes running in the snow", "A fox runs through snow, two of them") == 1
    assert coverage("a red fox in the snow", "a red barn") == pytest.approx(1 / 3)
    assert coverage("please create the", "anything") == 1  # nothing to keep
    assert coverage("café", "a cafe at night") == 1
    assert coverage("東京", "夜の東京、雨") == 1
    assert content_stems("Create a picture of THE old Old mill") == ["pictur", "old", "mill"]


@pytest.mark.parametrize("sample", GOOD, ids=lambda sample: sample.task)
def test_good_texts_of_every_kind_are_fluent(sample: Sample) -> None:
    assert Fluency().score([sample]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("guard", "response"),
    [
        ("repetition", "a fox, soft light" + ", soft light" * 6),
        ("repetition", "a fox in deep deep deep deep deep snow, by night"),
        ("repetition", "A fox walks by the sea. " * 3),
        ("truncation", "a fox in deep snow, walking towards the"),
        ("truncation", "a fox in deep snow,"),
        ("truncation", 'a fox and a sign that reads "do not'),
        ("truncation", "A fox. It runs. It leaps. The camera pans over white hills"),
        ("echo", "a red fox in the snow"),
        ("echo", "A red fox in the snow."),
        ("echo", "a red fox in the snow, a red fox in the snow"),
        ("gibberish", "a fox \ufffd\ufffd in \ufffd deep snow"),
        ("gibberish", "a fox aaaaaaaaaaaaaaaaaaaa by night"),
        ("gibberish", "xkcdqpf fox wrtplkh snow bcdfghj"),
        ("gibberish", "#@$ fox %^& snow *()_ +=| night"),
    ],
)
def test_one_guard_finds_each_fault(guard: str, response: str) -> None:
    found = guards("a red fox in the snow", response)
    assert getattr(found, guard) <= 0.5
    assert found.fluency <= 0.5


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_scores_are_in_range_and_deterministic(request_: str, response: str) -> None:
    sample = Sample(request_, response, "image")
    for reward in (Keywords(), Fluency()):
        (first,) = reward.score([sample])
        assert 0 <= first <= 1
        assert list(reward.score([sample, sample])) == [first, first]


@settings(deadline=None)
@given(ANY_TEXT)
def test_an_echo_has_no_fluency(request_: str) -> None:
    echo = Sample(request_, request_, "image")
    twice = Sample(request_, f"{request_}, {request_}", "image")
    assert list(Fluency().score([echo, twice])) == [0, 0]


@settings(deadline=None)
@given(REQUESTS, TEXTS, st.sampled_from([" ", ", ", ". "]))
def test_naming_the_request_again_never_pays(request_: str, rest: str, joint: str) -> None:
    before = Sample(request_, f"{request_} {rest}{joint}", "image")
    after = replace(before, response=before.response + request_)
    for reward in (Keywords(), Fluency()):
        less, more = reward.score([after, before])
        assert less <= more


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["a" * 20000, "ab " * 5000, " ".join(map(str, range(5000)))])
def test_long_texts_take_no_time(text: str) -> None:
    assert 0 <= guards("a red fox", text).fluency <= 1


def test_once_leaves_one_mention() -> None:
    request = "a red fox"
    assert once(request, "A red fox, a Red  fox at night, A RED FOX") == "A red fox,  at night,"
    assert once(request, "a red fox at night") == "a red fox at night"
    assert once("fox", "the fox sees a fox") == "the fox sees a fox"  # too short to tell


def test_repeating_the_request_does_not_raise_the_cosine(cache: Path) -> None:
    sample = GOOD[0]
    again = replace(sample, response=f"{sample.response} {sample.request} {sample.request}")
    first, second = Relevance(cache).score([sample, again])
    assert second == pytest.approx(first, abs=1e-6)


def test_an_echo_earns_less_than_a_good_answer(cache: Path) -> None:
    reward = make_reward(
        RewardRecipe(relevance=1, keywords=0.5, fluency=1.5), cache, bf16=False, server=None
    )
    good = reward.score(GOOD)
    echo = reward.score([replace(sample, response=sample.request) for sample in GOOD])
    twice = reward.score([replace(s, response=f"{s.request}. {s.request}") for s in GOOD])
    assert (echo < good).all()
    assert (twice < good).all()


def test_the_weighted_mean_and_its_components() -> None:
    reward = Weighted([(1.0, Keywords()), (3.0, Fluency())])
    assert reward.name == "1 keywords + 3 fluency"
    samples = [*GOOD, Sample("a red fox", "a blue", "image")]
    parts = reward.components(samples)
    assert set(parts) == {"keywords", "fluency"}
    expected = (parts["keywords"] + 3 * parts["fluency"]) / 4
    assert reward.score(samples) == pytest.approx(expected)
    assert reward.score(samples).dtype == np.float32
    assert len(reward.score([])) == 0


def test_make_reward_takes_the_parts_of_the_recipe(tmp_path: Path) -> None:
    assert isinstance(make_reward(RewardRecipe(), None, bf16=False, server=None), Relevance)
    recipe = RewardRecipe(relevance=0, keywords=1, fluency=2, judge=1, judge_model="m")
    reward = make_reward(recipe, tmp_path, bf16=False, server="http://127.0.0.1:1/v1")
    assert reward.name == "1 keywords + 2 fluency + 1 judge"
    with pytest.raises(BadSetting, match="address"):
        make_reward(recipe, tmp_path, bf16=False, server=None)


@pytest.mark.skipif(not PROMPTS.is_dir(), reason="the prompt collection is not here")
@pytest.mark.parametrize("task", "image video lettering design scene tags title".split())
def test_fluency_is_calibrated_on_what_people_wrote(task: str) -> None:
    rows = [s for s in read_samples([PROMPTS / f"{task}.jsonl"]) if s.request]
    rows = random.Random(0).sample(rows, 300)
    means = {name: Fluency().score(found).mean() for name, found in variants(rows)}
    assert min(means["as written"], means["another's"]) > 0.93
    assert max(means["echo"], means["echo twice"]) == 0
    assert means["loop"] < 0.1
    assert means["cut"] < 0.25


def test_the_table_of_spoilt_copies(data_file: Path, cache: Path) -> None:
    arguments = [str(data_file), "--rows", "5", "--cache", str(cache)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "| task | rows | as written | another's | echo | " in result.output
    rows = [line.split(" | ") for line in result.output.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["| image", "5"], ["| tags", "5"]]
    assert [row[4] for row in rows] == ["1.00 1.00 0.00"] * 2
    bad = data_file.with_name("bad.jsonl")
    bad.write_text("{}\n", "utf-8")
    result = CliRunner().invoke(main, [str(bad)])
    assert result.exit_code == 1
    assert "bad.jsonl:1" in result.output
