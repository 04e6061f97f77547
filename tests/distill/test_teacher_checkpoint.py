"""A student that learns from another checkpoint, token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from edge_slm.distill import teacher_checkpoint
from edge_slm.distill.checkpoint import save_checkpoint
from edge_slm.distill.hindsight import build_schema, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.loop import distill
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import Learner, LogProbabilities, predictions, sparse_kl, tensors
from edge_slm.distill.packing import IGNORED, Encoded, Packer, encode_records
from edge_slm.distill.recipe import DistillationRecipe, Recipe
from edge_slm.distill.teacher_checkpoint import TeacherCheckpoint, projected
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm.distill.trainer import Stage, Trainer
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import CheckpointError, DataError

from .conftest import made_samples
from .test_model import LLAMA, save_foreign
from .test_trainer import changed

SAMPLES = made_samples(60)
REWARDS = np.random.default_rng(0).random(len(SAMPLES)).astype(np.float32)
RECORDS = relabel(SAMPLES, REWARDS, level_edges(SAMPLES, REWARDS))
SCHEMA = build_schema(["image", "tags"], RECORDS)
TOKENIZER = train_tokenizer([s.response for s in SAMPLES], SCHEMA, 400)
ENCODED, _ = encode_records(RECORDS, TOKENIZER, SCHEMA, 96)


@pytest.fixture(scope="module")
def student(recipe: Recipe) -> Recipe:
    """Of a student of width 32, with all of the vocabulary in a soft label."""
    distillation = DistillationRecipe(weight=0.9, top_k=TOKENIZER.get_vocab_size())
    explore = recipe.explore.model_copy(update={"rounds": 0})
    update = {"distillation": distillation, "explore": explore}
    return changed(recipe).model_copy(update=update)


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of width 48 that is sure of some tokens."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "checkpoint", recipe)


def save_teacher(
    target: Path, recipe: Recipe, seed: int = 5, schema: CommandSchema = SCHEMA
) -> Path:
    shape = {"architecture": "llama", "width": 48, "vocab_size": TOKENIZER.get_vocab_size()}
    model = fresh_model(recipe.model.model_copy(update=shape), seed)
    for parameter in model.parameters():
        parameter.data *= 4
    return save_checkpoint(model, TOKENIZER, schema, {}, target)


def taught(recipe: Recipe, folder: Path, cache: Path, records: Sequence[Encoded] = ENCODED) -> Any:
    teacher = TeacherCheckpoint.read(folder, recipe, cache)
    return teacher.soft_labels(recipe, records, SCHEMA, "cpu")


def log_p_of(folder: Path, record: Encoded) -> torch.Tensor:
    """[response tokens, vocabulary] of the record alone."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = record.prompt(SCHEMA)
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + record.response])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


# -- the loss -----------------------------------------------------------------


def distributions(vocabulary: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits of a student, log probabilities of a teacher, its likeliest tokens)."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(7, vocabulary, generator=generator) for _ in range(2))
    log_p = teacher.log_softmax(-1)
    return student, log_p, log_p.topk(top_k).indices


def test_log_probabilities_have_the_gradient_of_a_log_softmax() -> None:
    student, _, ids = distributions(30, 4)
    ids = torch.cat([ids[:, :1], ids], -1)  # a label is one of the likeliest, too
    weights = torch.linspace(-1, 2, ids.numel()).view(ids.shape)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    (weights * LogProbabilities.apply(found, ids)).sum().backward()
    (weights * expected.log_softmax(-1).gather(-1, ids)).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_with_the_whole_vocabulary_it_is_the_exact_kl() -> None:
    student, log_p, ids = distributions(30, 30)
    log_q = student.log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    found = sparse_kl(log_q.gather(-1, ids), log_p.gather(-1, ids))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_the_rest_of_the_vocabulary_is_one_more_token() -> None:
    student, log_p, ids = distributions(30, 4)
    log_q = student.log_softmax(-1)
    rest = torch.ones(7, 30, dtype=torch.bool).scatter(-1, ids, False)
    p, q = (
        torch.cat([x.gather(-1, ids), (x * rest).sum(-1, keepdim=True)], -1)
        for x in (log_p.exp(), log_q.exp())
    )
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close(sparse_kl(log_q.gather(-1, ids), log_p.gather(-1, ids)), exact)


@pytest.mark.parametrize("top_k", [4, 30])
def test_a_student_like_its_teacher_learns_nothing(top_k: int) -> None:
    _, log_p, ids = distributions(30, top_k)
    student = (log_p + 3).requires_grad_()
    loss = sparse_kl(LogProbabilities.apply(student, ids), log_p.gather(-1, ids))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5


def test_a_temperature_flattens_the_student_too(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    warm = DistillationRecipe(weight=1.0, top_k=TOKENIZER.get_vocab_size(), temperature=2.0)
    recipe = student.model_copy(update={"distillation": warm})
    batch = soft_batch(recipe, taught(recipe, folder, tmp_path))
    model = TeacherCheckpoint.read(folder, recipe, tmp_path).student(recipe)
    parts = Learner(model, distillation=warm)(batch)
    *_, logits = predictions(model, model.base_model, batch)
    log_p, ids = (x[batch["labels"] != IGNORED] for x in (batch["soft_log_p"], batch["soft_ids"]))
    log_q = (logits / 2).log_softmax(-1).gather(-1, ids)
    exact = 4 * (log_p.exp() * (log_p - log_q)).sum()
    assert parts["teacher_kl"].item() == pytest.approx(exact.item(), rel=0.01)
    assert parts["loss"].item() == parts["teacher_kl"].item()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_is_a_mix(
    student: Recipe,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # fast
    recipe = student.model_copy(update={"distillation": DistillationRecipe(weight=0.3, top_k=8)})
    batch = soft_batch(recipe, taught(recipe, folder, tmp_path))
    model = TeacherCheckpoint.read(folder, recipe, tmp_path).student(recipe)
    learner = Learner(model, distillation=recipe.distillation, compile=compiled)
    parts = {name: part.item() for name, part in learner(batch).items()}
    mixed = 0.7 * parts["cross_entropy"] + 0.3 * parts["teacher_kl"]
    assert parts["loss"] == pytest.approx(mixed, rel=1e-5)


def soft_batch(recipe: Recipe, labels: Any, dropout: float = 0.0) -> dict[str, torch.Tensor]:
    packer = Packer(ENCODED, SCHEMA, rows=4, length=96, dropout=dropout, seed=1, soft_labels=labels)
    return tensors(packer.batch(0, 0, packer.epoch(0)[0]), "cpu")


# -- soft labels --------------------------------------------------------------


def test_soft_labels_are_the_distributions_of_the_whole_record_alone(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    labels = taught(student, folder, tmp_path)
    for record in ENCODED[:3]:
        ids, log_p = labels[record.prompt(SCHEMA) + record.response]
        expected = log_p_of(folder, record).gather(-1, torch.tensor(ids.astype(np.int64)))
        torch.testing.assert_close(
            torch.tensor(log_p.astype(np.float32)), expected, atol=0.02, rtol=1e-3
        )
        assert (np.diff(log_p, axis=1) <= 0).all()  # the likeliest first


def test_command_dropout_leaves_soft_labels_as_they_are(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    labels = taught(student, folder, tmp_path)
    whole, dropped = (soft_batch(student, labels, dropout) for dropout in (0.0, 0.6))
    assert not torch.equal(whole["ids"], dropped["ids"])
    for name in ("labels", "soft_ids", "soft_log_p"):
        assert torch.equal(whole[name], dropped[name])
    likeliest = torch.zeros_like(whole["soft_log_p"]).scatter_(
        -1, whole["soft_ids"], whole["soft_log_p"]
    )
    labelled = whole["labels"] != IGNORED
    assert (likeliest[labelled].exp().sum(-1) - 1).abs().max() < 0.01
    assert not whole["soft_log_p"][~labelled].any()


def test_each_record_is_computed_once(
    student: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = teacher_checkpoint._computed

    def counting(*arguments: Any) -> Any:
        if len(computed) == 2 and stop:
            raise KeyboardInterrupt
        computed.append(len(arguments[2]))
        return real(*arguments)

    monkeypatch.setattr(teacher_checkpoint, "_computed", counting)
    monkeypatch.setattr(teacher_checkpoint, "_SHARD", 25)
    stop = True
    with pytest.raises(KeyboardInterrupt):  # the third shard
        taught(student, folder, tmp_path / "cut")
    stop = False
    interrupted = taught(student, folder, tmp_path / "cut", [*ENCODED, *ENCODED])
    assert sum(computed) == len(ENCODED)
    taught(student, folder, tmp_path / "cut")
    whole = taught(student, folder, tmp_path / "whole")
    assert sum(computed) == 2 * len(ENCODED)
    for record in ENCODED:
        tokens = record.prompt(SCHEMA) + record.response
        for one, two in zip(interrupted[tokens], whole[tokens], strict=True):
            np.testing.assert_array_equal(one, two)


def test_another_teacher_k_or_temperature_has_labels_of_its_own(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    few = ENCODED[:4]
    warm = student.distillation.model_copy(update={"temperature": 2.0})
    other = save_teacher(tmp_path / "other", student, seed=6)
    one = taught(student, folder, tmp_path, few)
    two = taught(student, other, tmp_path, few)
    three = taught(student.model_copy(update={"distillation": warm}), folder, tmp_path, few)
    assert len({labels.folder for labels in (one, two, three)}) == 3
    tokens = few[0].prompt(SCHEMA) + few[0].response
    assert not np.array_equal(one[tokens][1], two[tokens][1])
    assert (three[tokens][1][:, 0] < one[tokens][1][:, 0]).all()  # less sure


@pytest.mark.parametrize("name", ["keys.npy", "rows.npy"])
def test_a_damaged_shard_is_named(student: Recipe, folder: Path, tmp_path: Path, name: str) -> None:
    labels = taught(student, folder, tmp_path, ENCODED[:4])
    file = labels.folder / "00000" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"00000 is damaged \(remove it"):
        taught(student, folder, tmp_path, ENCODED[:4])
    shutil.rmtree(file.parent)
    taught(student, folder, tmp_path, ENCODED[:4])


# -- the student --------------------------------------------------------------


@pytest.mark.parametrize(("rank", "width"), [(12, 16), (24, 32)])
def test_a_projection_keeps_embeddings_of_few_dimensions(rank: int, width: int) -> None:
    """Exactly: all distances between tokens, but for one factor; 32 is wider than the teacher."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(50, rank, generator=generator) @ torch.randn(rank, 24, generator=generator)
    rows += 5
    found = projected(rows, width, seed=0)
    assert found.shape == (50, width)
    assert found.square().mean().sqrt().item() == pytest.approx(1)
    ratio = torch.pdist(found) / torch.pdist(rows)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    shares = found.square().mean(0)
    assert shares.max() < 4 * shares.mean()


def test_a_student_begins_with_its_teachers_embeddings(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    teacher = TeacherCheckpoint.read(folder, student, tmp_path)
    model = teacher.student(student)
    rows = model.get_input_embeddings().weight
    assert rows.shape == (TOKENIZER.get_vocab_size(), 32)
    assert rows.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.get_output_embeddings().weight is rows
    distances = torch.stack([torch.pdist(rows.detach()), torch.pdist(teacher.embedding)])
    assert torch.corrcoef(distances)[0, 1] > 0.5


def test_a_student_comes_nearer_to_its_teacher_than_by_the_texts_alone(
    student: Recipe, folder: Path, tmp_path: Path
) -> None:
    labels = taught(student, folder, tmp_path)
    distances = []
    for recipe in (student, student.model_copy(update={"distillation": DistillationRecipe()})):
        teacher = TeacherCheckpoint.read(folder, recipe, tmp_path)
        learner = Learner(teacher.student(recipe), distillation=recipe.distillation)
        soft = labels if recipe.distillation.weight else None
        stage = Stage("s", ENCODED, [], SCHEMA, 96 * 4 * 20, 3e-3, "data", soft_labels=soft)
        trainer = Trainer(recipe, stage, learner, accelerate.Accelerator(cpu=True), None)
        batches = trainer.batches()
        for _ in range(20):
            losses = trainer.step(next(batches))
        assert ("teacher_kl" in losses) == bool(soft)
        batch = soft_batch(student, labels)
        learner.eval()
        distances.append(learner(batch)["teacher_kl"].item() / (batch["labels"] >= 0).sum())
    assert distances[0] < 0.9 * distances[1]


@pytest.mark.slow
def test_a_run_learns_from_its_teacher(
    student: Recipe, folder: Path, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="give --teacher-checkpoint"):
        distill(student, [data_file], tmp_path, cache=cache)
    out = distill(student, [data_file], tmp_path, cache=cache, teacher_checkpoint=folder)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    lines = (tmp_path / "metrics-stage-1.jsonl").read_text("utf-8").splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["teacher_kl"] < first["teacher_kl"]
    assert last["valid_loss"] > 0
    facts = json.loads((out / "recipe.json").read_text("utf-8"))
    assert len(facts["teacher_checkpoint"]) == 64


@pytest.mark.slow
def test_a_run_of_another_teacher_is_not_continued(
    student: Recipe, folder: Path, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    without = student.model_copy(update={"distillation": DistillationRecipe()})
    other = save_teacher(tmp_path / "other", student, seed=6)
    run = {"cache": cache, "max_steps": 1}
    distill(without, [data_file], tmp_path / "run", teacher_checkpoint=folder, **run)
    with pytest.raises(DataError, match="another data"):
        distill(without, [data_file], tmp_path / "run", teacher_checkpoint=other, **run)


# -- what does not fit --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"tasks": ["tags", "image"]}}, r"data\.tasks is \['image', 'tags'\], the rec"),
        ({"hindsight": {"levels": 5}}, r"hindsight\.levels is 10, the recipe's 5"),
        ({"hindsight": {"position": "both"}}, r"hindsight\.position is bottom, the recipe's both"),
        ({"data": {"spaced": True}}, r"data\.spaced is False, the recipe's True"),
        ({"model": {"positions": 128}}, "it has 96 positions, the recipe 128"),
        ({"distillation": {"top_k": 999}}, r"distillation\.top_k is over its \d+ tokens"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit_is_named(
    student: Recipe,
    folder: Path,
    data_file: Path,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    message: str,
) -> None:
    update = {
        section: getattr(student, section).model_copy(update=values)
        for section, values in change.items()
    }
    with pytest.raises(DataError, match=message):
        TeacherCheckpoint.read(folder, student.model_copy(update=update), tmp_path)


def test_what_is_no_teacher_is_named(student: Recipe, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        TeacherCheckpoint.read(tmp_path / "none", student, tmp_path)
    (tmp_path / "foreign").mkdir()
    foreign = save_foreign(tmp_path / "foreign", LLAMA)
    with pytest.raises(DataError, match="it obeys no commands"):
        TeacherCheckpoint.read(foreign, student, tmp_path)
    teacher = TeacherCheckpoint.read(folder, student, tmp_path)
    teacher.check_vocabulary(TOKENIZER, "its copy")
    smaller = train_tokenizer([s.response for s in SAMPLES], SCHEMA, 380)
    with pytest.raises(DataError, match="its init has another vocabulary"):
        teacher.check_vocabulary(smaller, "its init")
