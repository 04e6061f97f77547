"""Our own engines as the teacher, and as the generator of exploration rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_slm.distill.engine import EngineGenerator
from edge_slm.distill.generate import Episode, EpisodeGenerator
from edge_slm.distill.recipe import Recipe, TeacherRecipe
from edge_slm.distill.rewards import Keywords
from edge_slm.distill.samples import read_requests
from edge_slm.distill.split import Reading, held_out
from edge_slm.distill.teachers import Ask, teach
from edge_slm.distill.teachers.bundle import BundleTeacher
from edge_slm.progress import silent
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import BadSetting, DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(willing_bundle: Path) -> BundleTeacher:
    return BundleTeacher(str(willing_bundle), 1.0)


def test_a_bundle_answers_under_its_own_commands(teacher: BundleTeacher) -> None:
    asks = [Ask("image", f"a cosy cabin {i}", seed=9 * i) for i in range(12)]
    answers = list(teacher.answer(asks, 3))
    assert [ask for ask, _ in answers] == asks
    assert all(len(texts) <= 3 for _, texts in answers)
    assert sum(len(texts) for _, texts in answers) > 6  # those that the model ended
    assert list(teacher.answer(asks, 3)) == answers  # by seed
    with pytest.raises(BadSetting, match="invents no requests"):
        teacher.invent("image", 3, 0)


def test_the_best_answers_are_kept(teacher: BundleTeacher, tmp_path: Path) -> None:
    recipe = TeacherRecipe(kind="bundle", model="x", source="data", candidates=4, temperature=1)
    given = {"image": [f"a cosy cabin {i}" for i in range(10)]}
    whole = teach(teacher, ["image"], recipe, tmp_path / "all", 1, silent, given, Keywords())
    best = recipe.model_copy(update={"keep": 1})
    few = teach(teacher, ["image"], best, tmp_path / "best", 1, silent, given, Keywords())
    every, kept = (
        [json.loads(line) for line in p.read_text("utf-8").splitlines()] for p in (whole, few)
    )
    assert len({row["request"] for row in every}) == len(kept)
    assert all(row in every for row in kept)


def test_requests_alone_are_for_a_teacher(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    rows = [{"request": f"a fox {i}", "response": None, "task": "image"} for i in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = read_requests([file], ["image", "tags"], Reading(10, dev_percent=10))
    assert requests["tags"] == []
    assert 200 < len(requests["image"]) < 280
    assert not any(held_out(request, 20) for request in requests["image"])


def test_a_bundle_that_would_invent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    teacher = '[teacher]\nkind = "bundle"\nmodel = "m"\n'
    path.write_text(f'[data]\ntasks = ["image"]\n{teacher}[[stages]]\ntokens = 10_000\n')
    with pytest.raises(DataError, match="a bundle invents no requests"):
        Recipe.read(path)


def test_our_engine_writes_as_torch_does(willing_checkpoint: Path) -> None:
    episodes = [Episode(f"a paper boat {i}", Command("image", 8, i % 10), i) for i in range(20)]
    ours = EngineGenerator(willing_checkpoint)(episodes, temperature=0)
    torchs = EpisodeGenerator(willing_checkpoint, device="cpu")(episodes, temperature=0)
    alike = [a.text[:8] == b.text[:8] for a, b in zip(ours, torchs, strict=True)]
    assert sum(alike) >= 10  # int8 beside fp32, of a random model
    again = EngineGenerator(willing_checkpoint)(episodes, temperature=1)
    assert len({outcome.text for outcome in again}) > 15
    assert any(outcome.ended for outcome in again)
