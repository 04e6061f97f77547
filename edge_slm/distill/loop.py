"""Upside-down reinforcement learning from samples to a checkpoint.

Every step leaves a complete file in the folder of the run, so a run that was stopped or
killed continues after its last step, and within a training stage after its last saved
state:

    teacher.jsonl        samples of the teacher
    stage-1.pt …         weights after each stage of the recipe
    round-1.jsonl …      episodes of each exploration round, with their rewards
    round-1.pt …         weights after each round
    base/                the result before its adapters, where the recipe has some
    adapter-*.pt         weights of each adapter
    state.pt, best.pt    state of the current stage; its weights of the lowest held-out loss
    metrics-*.jsonl, tensorboard/
    checkpoint/          the result, in the Hugging Face layout; its adapters in deltas/
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_slm.distill.checkpoint import load_state, save_checkpoint, save_state
from edge_slm.distill.explore import explore
from edge_slm.distill.model import fresh_model, grown_model, weights_digest
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.prepare import (
    Labelled,
    Prepared,
    bare_schema,
    label,
    new_tokenizer,
    prepare,
    read_text,
    text_records,
    with_own,
)
from edge_slm.distill.recipe import Recipe, StageRecipe
from edge_slm.distill.rewards import Reward, make_reward
from edge_slm.distill.samples import read_requests
from edge_slm.distill.teachers import make_teacher, teach
from edge_slm.progress import StageProgress, silent
from edge_slm_converters.sums import check_sums
from edge_slm_runtime.errors import CheckpointError, DataError, DependencyMissing, TargetExists
from edge_slm_runtime.files import locked_folder, write_aside

if TYPE_CHECKING:
    from edge_slm.distill.packing import Encoded
    from edge_slm.distill.soft_labels import SoftLabels
    from edge_slm.distill.teacher_checkpoint import TeacherCheckpoint


def distill(
    recipe: Recipe,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    text: Sequence[str | Path] = (),
    cache: str | Path | None = None,
    server: str | None = None,
    teacher_checkpoint: str | Path | None = None,
    report: StageProgress = silent,
    max_steps: int | None = None,
) -> Path:
    """Runs the recipe; returns the checkpoint (or state.pt, when stopped before the end).

    data: JSONL files or folders of samples; may be empty when the recipe has a teacher.
    text: general text, for stages of kind "text". out: folder of the run; a run in it is
    continued, and the checkpoint of a finished one returned. cache: folder of the rewards'
    caches and of soft labels (default: `out`/cache). server: address of the OpenAI-compatible
    server of teacher and judge. teacher_checkpoint: of a run with the same commands, for its
    vocabulary, embeddings and, by the recipe's `distillation`, next-token distributions.
    max_steps: training steps until it stops. Ctrl-C saves the state after the current step.
    Raises DataError, TargetExists, DependencyMissing, CheckpointError (`model.init`, or the
    teacher's), TeacherError, OutOfMemory.
    """
    accelerate = _accelerate()
    out = Path(out)
    if (finished := out / "checkpoint").exists():
        if _recipe_digest(finished) != recipe.digest():
            raise TargetExists(f"{out} holds a run of another recipe", "give another --out")
        return finished
    if any(stage.kind == "text" for stage in recipe.stages) and not text:
        raise DataError("the recipe has a stage of general text", "give --text")
    if not data and recipe.teacher is None:
        raise DataError("no samples and no teacher", "give --data, or a [teacher] in the recipe")
    if recipe.distillation.weight and teacher_checkpoint is None:
        raise DataError("the recipe has distillation.weight", "give --teacher-checkpoint")
    cache, teacher = Path(cache) if cache else out / "cache", None
    if teacher_checkpoint is not None:
        from edge_slm.distill.teacher_checkpoint import TeacherCheckpoint

        teacher = TeacherCheckpoint.read(teacher_checkpoint, recipe, cache)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = _accelerator(accelerate)
    with locked_folder(out) if accelerator.is_main_process else nullcontext():
        if not accelerator.is_main_process:
            report = silent
        with accelerator.main_process_first():
            reward = make_reward(
                recipe.reward, cache, bf16=use_bf16(recipe.train.precision), server=server
            )
            if recipe.teacher:
                data = [*data, _taught(recipe, data, reward, out, server, report)]
            prepared = prepare(recipe, data, reward, report)
        general = read_text(text) if text else ""
        training = _Training(
            recipe, prepared, general, reward, teacher, out, accelerator, report, max_steps
        )
        return training.run()


def _recipe_digest(checkpoint: Path) -> str:
    """Of the recipe that a finished run was made by. Raises DataError when what it left cannot
    be read, or differs from its sums."""
    from safetensors import SafetensorError, safe_open

    try:
        check_sums(checkpoint)
        with safe_open(checkpoint / "model.safetensors", "np"):  # its header tells its size
            return str(json.loads((checkpoint / "recipe.json").read_text("utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckpointError):
        raise DataError(f"{checkpoint} is damaged", "remove it: it is written again") from None


def _accelerate() -> Any:
    """The package. Raises DependencyMissing for all that training imports."""
    try:
        import accelerate
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise DependencyMissing(
            "training needs torch, transformers and accelerate", "pip install 'edge-slm[train]'"
        ) from None
    return accelerate


def _accelerator(accelerate: Any) -> Any:
    """One for all stages of this process."""
    # Other processes wait for the first while it writes samples or scores them.
    patience = accelerate.InitProcessGroupKwargs(timeout=timedelta(days=2))
    accelerator = accelerate.Accelerator(kwargs_handlers=[patience])
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise DataError(
            "torchrun started several processes, but there is no GPU for them",
            "set ACCELERATE_USE_CPU=true to train on the CPU together",
        )
    return accelerator


def _taught(
    recipe: Recipe,
    data: Sequence[str | Path],
    reward: Reward,
    out: Path,
    server: str | None,
    report: StageProgress,
) -> Path:
    """The samples of the teacher, which answers requests of its own or those of the data."""
    assert recipe.teacher is not None
    tasks, requests = recipe.data.tasks, None
    if recipe.teacher.source == "data":
        requests = read_requests(data, tasks, recipe.data.reading())
    teacher = make_teacher(recipe.teacher, server=server, journal=out / "teacher.journal.jsonl")
    target = out / "teacher.jsonl"
    return teach(teacher, tasks, recipe.teacher, target, recipe.seed, report, requests, reward)


class _Training:
    """Stages, exploration rounds, checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        general: str,
        reward: Reward,
        teacher: TeacherCheckpoint | None,
        out: Path,
        accelerator: Any,
        report: StageProgress,
        max_steps: int | None,
    ) -> None:
        from edge_slm.distill.objective import Learner

        self.recipe, self.prepared, self.reward, self.teacher = recipe, prepared, reward, teacher
        self.out, self.accelerator, self.report = out, accelerator, report
        self.steps_left = max_steps
        self.init_digest = weights_digest(recipe.model.init) if recipe.model.init else None
        if recipe.model.init:
            texts = [text for s in prepared.pairs for text in (f" {s.request}", s.response)]
            model, self.tokenizer = grown_model(
                recipe.model, bare_schema(recipe), recipe.seed, texts
            )
            if teacher:
                teacher.check_vocabulary(self.tokenizer, recipe.model.init)
        elif teacher:
            model, self.tokenizer = teacher.student(recipe), teacher.tokenizer
        else:
            model = fresh_model(recipe.model, recipe.seed)
            self.tokenizer = new_tokenizer(prepared, general)
        if recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        levels = bare_schema(recipe).axis("relevance").tokens()[1:]
        self.learner = Learner(
            model,
            countdown=recipe.train.countdown,
            confidence=recipe.train.confidence,
            preference=recipe.train.preference,
            levels=[self.tokenizer.token_to_id(token) for token in levels],
            distillation=recipe.distillation,
            compile=recipe.train.compile,
        )
        self.general = general
        self.labelled = label(prepared, self.tokenizer)
        self.history: list[dict[str, Any]] = []  # of stages and rounds, for the model card

    def run(self) -> Path:
        for i, stage in enumerate(self.recipe.stages, 1):
            if not self.trained(f"stage-{i}", stage):
                return self.out / "state.pt"
        e = self.recipe.explore
        for number in range(1, e.rounds + 1):
            name = f"round-{number}"
            episodes = self.out / f"{name}.jsonl"
            with self.accelerator.main_process_first():
                start = self.out / f"{name}.start"
                if not episodes.exists() and not start.exists():
                    self.save(start)
                achieved = explore(
                    self.prepared,
                    self.labelled.edges,
                    number,
                    start,
                    self.reward,
                    episodes,
                    self.report,
                )
                shutil.rmtree(start, ignore_errors=True)
            self.labelled = label(self.prepared, self.tokenizer)
            stage = StageRecipe(tokens=e.tokens, learning_rate=e.learning_rate, rounded=e.rounded)
            self.labelled = with_own(self.labelled, e.own_share, f"{self.recipe.seed}/{number}")
            if not self.trained(name, stage, kl=e.kl, entropy=e.entropy, achieved=achieved):
                return self.out / "state.pt"
        self.accelerator.wait_for_everyone()
        checkpoint = self.out / "checkpoint"
        if not self.recipe.adapters.tokens:
            self.save(checkpoint)
        elif not self.adapted(self.out / "base", checkpoint):
            return self.out / "state.pt"
        (self.out / "state.pt").unlink(missing_ok=True)
        return checkpoint

    def adapted(self, base: Path, checkpoint: Path) -> bool:
        """Trains an adapter of each task on the frozen weights of the checkpoint that it writes to
        `base` first, which becomes `checkpoint` with all of them. False: stopped before."""
        from edge_slm.distill.adapters import Adapted
        from edge_slm.distill.objective import Learner

        a = self.recipe.adapters
        if not base.exists():
            self.save(base)
        self.accelerator.wait_for_everyone()
        for number, task in enumerate(self.recipe.data.tasks):
            model = Adapted(base, a, self.recipe.seed + number)
            if self.recipe.train.gradient_checkpointing:
                model.lm.gradient_checkpointing_enable({"use_reentrant": False})
            self.learner = Learner(
                model.lm,
                distillation=self.recipe.distillation,
                compile=self.recipe.train.compile,
            )
            stage = StageRecipe(tokens=a.tokens, learning_rate=a.learning_rate, tasks=(task,))
            if not self.trained(f"adapter-{task}", stage):
                return False
            if self.accelerator.is_main_process:
                delta = model.delta(task)
                with write_aside(base / delta.path) as aside:
                    aside.write_bytes(delta.to_bytes())
        if self.accelerator.is_main_process:
            base.rename(checkpoint)
        return True

    def trained(
        self, name: str, stage: StageRecipe, achieved: Mapping[str, Any] | None = None, **extra: Any
    ) -> bool:
        """Trains a stage, or loads the weights of a finished one. False: stopped before its end."""
        from edge_slm.distill.trainer import Stage, Trainer, interrupts_deferred

        done = self.out / f"{name}.pt"
        if done.exists():
            state = load_state(done)
            if state["recipe"] != self.recipe.digest():
                raise DataError(f"{done} belongs to another recipe", "give another --out")
            self.learner.load_state_dict(state["model"])
            self.history.append(state["history"])
            return True
        if stage.kind == "text":
            length = self.recipe.model.positions
            train, valid = text_records(self.general, self.tokenizer, length)
        else:
            train, valid = self.of_tasks(self.labelled, stage.tasks)
            extra["soft_labels"] = self.soft_labels(train)
        trainer = Trainer(
            self.recipe,
            Stage(
                name,
                train,
                valid,
                self.labelled.schema,
                stage.tokens,
                stage.learning_rate,
                self.data_digest(),
                self.init_digest,
                rounded=stage.rounded,
                **extra,
            ),
            self.learner,
            self.accelerator,
            self.out,
        )
        trainer.resume()
        before = trainer.at
        with interrupts_deferred() as interrupted:
            finished = trainer.run(self.report, self.steps_left, interrupted)
        if interrupted:
            raise KeyboardInterrupt
        if self.steps_left is not None:
            self.steps_left -= trainer.at - before
        if not finished:
            return False
        history = {"stage": name, "steps": trainer.at, **(achieved or {}), **trainer.last}
        self.history.append(history)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "recipe": self.recipe.digest(),
                "model": self.learner.state_dict(),
                "history": history,
            }
            save_state(state, done)
            (self.out / "best.pt").unlink(missing_ok=True)
        self.accelerator.free_memory()
        return True

    def soft_labels(self, records: Sequence[Encoded]) -> SoftLabels | None:
        """Of the teacher checkpoint, if the recipe learns from them."""
        if self.teacher is None or not self.recipe.distillation.weight:
            return None
        with self.accelerator.main_process_first():
            device = self.accelerator.device
            schema = self.labelled.schema
            return self.teacher.soft_labels(self.recipe, records, schema, device, self.report)

    def data_digest(self) -> str:
        """Of all that a run learns from."""
        digest = str(self.prepared.facts["digest"])
        return f"{digest} {self.teacher.digest}" if self.teacher else digest

    @staticmethod
    def of_tasks(labelled: Labelled, tasks: Sequence[str]) -> tuple[list[Any], list[Any]]:
        if not tasks:
            return labelled.train, labelled.valid
        return (
            [e for e in labelled.train if e.record and e.record.command.task in tasks],
            [e for e in labelled.valid if e.record and e.record.command.task in tasks],
        )

    def save(self, target: Path) -> Path:
        """A checkpoint of the present weights, with a record of how they were made."""
        if not self.accelerator.is_main_process:
            return target
        recipe, facts = self.recipe, dict(self.prepared.facts)
        facts["relevance_level_edges"] = {
            task: levels.to_json() for task, levels in self.labelled.edges.items()
        }
        facts["samples_too_long"] = self.labelled.too_long
        origin: dict[str, Any] = {}
        if recipe.model.init:
            before = Path(recipe.model.init) / "recipe.json"
            origin["init"] = {
                "weights_sha256": self.init_digest,
                "made_by": json.loads(before.read_text("utf-8")) if before.is_file() else None,
            }
        if self.teacher:
            origin["teacher_checkpoint"] = self.teacher.digest
        about = {
            "digest": recipe.digest(),
            "recipe": recipe.as_dict(),
            "data": facts,
            **origin,
            "history": self.history,
        }
        schema, lexicon = self.labelled.schema, self.prepared.lexicon
        return save_checkpoint(self.learner.lm, self.tokenizer, schema, about, target, lexicon)
