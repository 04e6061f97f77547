"""One stage of training.

The state of a stage is one file (weights, optimizer, position in the data), written aside
and renamed; random numbers depend on the seed and the step alone, so a killed run continues
to the same result as an undisturbed one. accelerate does devices, mixed precision and
several processes (`torchrun`).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_slm.distill.checkpoint import load_state, save_state
from edge_slm.distill.objective import Learner, tensors
from edge_slm.distill.packing import Batch, Encoded, Packer
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rounding import rounded
from edge_slm.distill.soft_labels import SoftLabels
from edge_slm.progress import StageProgress
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import DataError, OutOfMemory


@dataclass(frozen=True, slots=True)
class Stage:
    """Data and length of one stage."""

    name: str
    train: Sequence[Encoded]
    valid: Sequence[Encoded]
    schema: CommandSchema
    tokens: int
    learning_rate: float
    data_digest: str
    init_digest: str | None = None  # of the weights that the run began from
    kl: float = 0.0
    entropy: float = 0.0
    rounded: bool = False  # whether passes are computed with int4 weights
    soft_labels: SoftLabels | None = None  # of a teacher, for the records of `train`


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[list[int]]:
    """Defers SIGINT to the end of the step: it fills the list; a second one acts at once.

    Signals reach the main thread only; elsewhere the list stays empty.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def translate_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Turns a failed allocation into OutOfMemory, which names the setting to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        t = recipe.train
        now = t.micro_tokens or t.batch_tokens
        hint = f"halve train.micro_tokens (now {now})"
        if not t.gradient_checkpointing:
            hint += " or set train.gradient_checkpointing"
        raise OutOfMemory("a training step does not fit into the memory", hint) from error


class Trainer:
    """A learner, its optimizer and the data of one stage.

    accelerator: one `accelerate.Accelerator` for all stages of a process. out: folder of the
    run, or None to keep no files.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, learner: Learner, accelerator: Any, out: Path | None
    ) -> None:
        t, length = recipe.train, recipe.model.positions
        self.recipe, self.stage, self.accelerator, self.out = recipe, stage, accelerator, out
        self.plain = learner.to(accelerator.device)
        with self.weights():
            learner.begin_stage(kl=stage.kl, entropy=stage.entropy)
        decayed = [p for p in learner.parameters() if p.dim() >= 2]
        rest = [p for p in learner.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": t.weight_decay}, {"params": rest}],
            lr=stage.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self.learner, self.optimizer = accelerator.prepare(learner, optimizer)
        self.rows = max(1, t.batch_tokens // length)
        processes = accelerator.num_processes
        if self.rows % processes:
            raise DataError(
                f"{self.rows} rows a step cannot be shared by {processes} processes",
                f"make train.batch_tokens a multiple of {processes} × model.positions",
            )
        self.micro = max(1, t.micro_tokens // length) if t.micro_tokens else self.rows
        h, valid = recipe.hindsight, stage.valid
        if t.evaluate_rows:
            step = max(1, len(valid) // t.evaluate_rows)
            valid = valid[::step]
        self.packer, self.valid = (
            Packer(
                encoded,
                stage.schema,
                rows=self.rows,
                length=length,
                dropout=h.command_dropout * learning,
                bare=h.bare_share * learning,
                judged=learning and learner.confidence > 0,
                paired=learning and learner.preference > 0,
                seed=recipe.seed,
                soft_labels=stage.soft_labels if learning else None,
            )
            for encoded, learning in ((stage.train, True), (valid, False))
        )
        self.tokens_per_step = self.rows * length
        self.total_steps = max(1, stage.tokens // self.tokens_per_step)
        self.at, self.epoch, self.batch_number = 0, 0, 0
        self.last: dict[str, Any] = {}
        self.best: dict[str, float] = {}  # the step of the lowest `valid_loss`, and that
        self._board: Any = None  # opened with the first line

    # -- the data ---------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Endless, from (epoch, batch_number) on. The next batch is made in the background."""
        plan = self.packer.epoch(self.epoch)
        if not plan:
            raise DataError("too few samples for one batch", "lower train.batch_tokens or add data")
        with ThreadPoolExecutor(1) as ahead:

            def order(epoch: int, number: int) -> Any:
                return ahead.submit(self.packer.batch, epoch, number, plan[number])

            pending = (
                order(self.epoch, self.batch_number) if self.batch_number < len(plan) else None
            )
            while True:
                if pending is None:
                    self.epoch, self.batch_number = self.epoch + 1, 0
                    plan = self.packer.epoch(self.epoch)
                    pending = order(self.epoch, 0)
                batch = pending.result()
                self.batch_number += 1
                more = self.batch_number < len(plan)
                pending = order(self.epoch, self.batch_number) if more else None
                yield batch

    # -- one step ---------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; returns the losses per token to imitate (of the preference: per pair,
        and the share of pairs whose margin is above 0) and the `gradient_norm`.

        This process computes its share of the rows, `micro` rows at a time. Raises
        OutOfMemory, and DataError when the loss is not finite.
        """
        a, t = self.accelerator, self.recipe.train
        self.learner.train()
        # Dropout depends on seed, step and process, so no state of it needs saving.
        drawn = f"{self.recipe.seed}/{self.stage.name}/{self.at}/{a.process_index}"
        torch.manual_seed(zlib.crc32(drawn.encode()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.at,
                self.total_steps,
                self.stage.learning_rate,
                min(t.warmup_steps, self.total_steps // 10),
            )
        tokens = max(1, batch.loss_tokens)
        mine = batch.rows(slice(a.process_index, None, a.num_processes))
        sums: dict[str, torch.Tensor] = {}
        starts = range(0, len(mine.ids), self.micro)
        with translate_out_of_memory(self.recipe), self.weights():
            for start in starts:
                last = start == starts[-1]
                with contextlib.nullcontext() if last else a.no_sync(self.learner):
                    parts = self.forward(self.learner, mine.rows(slice(start, start + self.micro)))
                    # Gradients are averaged over processes; this makes it their sum.
                    a.backward(parts.pop("loss") * (a.num_processes / tokens))
                for name, part in parts.items():
                    sums[name] = sums.get(name, torch.zeros_like(part)) + part
            norm = a.clip_grad_norm_(self.learner.parameters(), t.clip)
        if a.num_processes > 1:
            sums = a.reduce(sums, "sum")
        pairs = max(1.0, sums.pop("pairs").item()) if "pairs" in sums else 1.0
        per = {"preference": pairs, "pairs_right": pairs}
        losses = {name: value.item() / per.get(name, tokens) for name, value in sums.items()}
        if not math.isfinite(losses["cross_entropy"]):
            raise DataError(
                f"the loss is {losses['cross_entropy']} at step {self.at + 1}",
                "lower the stage's learning_rate; the last saved state is intact",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at += 1
        return {**losses, "gradient_norm": float(norm)}

    def weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that passes of the stage are computed with."""
        return rounded(self.plain.lm) if self.stage.rounded else contextlib.nullcontext()

    def forward(self, learner: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a batch in the precision of the recipe."""
        device = self.accelerator.device
        bf16 = use_bf16(self.recipe.train.precision)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            parts: dict[str, torch.Tensor] = learner(tensors(batch, device))
        return parts

    def run(self, report: StageProgress, max_steps: int | None, interrupted: list[int]) -> bool:
        """Trains to the end of the stage (True), or until it is stopped; saves the state.

        max_steps: None trains to the end. interrupted: not empty stops after the step.
        """
        t, name = self.recipe.train, f"train {self.stage.name}"
        left = self.total_steps if max_steps is None else max_steps
        stop = min(self.total_steps, self.at + left)
        batches = self.batches()
        started, first = time.perf_counter(), self.at
        while self.at < stop:
            losses = self.step(next(batches))
            speed = (self.at - first) * self.tokens_per_step / (time.perf_counter() - started)
            self.last |= {k: round(v, 4) for k, v in losses.items()}
            self.last["tokens_per_second"] = round(speed)
            if self.at % t.evaluate_every == 0 or self.at == self.total_steps:
                self.last |= self.evaluate()
                self.note_best()
            self.log()
            report(name, self.at, self.total_steps, self.remark())
            if interrupted:
                stop = self.at
            if self.at % t.save_every == 0 or self.at == stop:
                self.save()
        batches.close()  # type: ignore[attr-defined]  # a generator
        if self._board is not None:
            self._board.close()
        finished = self.at >= self.total_steps
        if finished:
            self.return_to_best()
        return finished

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def evaluate(self) -> dict[str, float]:
        """`valid_loss`: nats per response token of the held-out samples, each with the command
        that it achieved. Empty when there are none."""
        self.plain.eval()
        total, count = 0.0, 0
        with self.weights():
            for i, rows in enumerate(self.valid.epoch(0, partial=True)):
                batch = self.valid.batch(0, i, rows)
                total += self.forward(self.plain, batch)["cross_entropy"].item()
                count += batch.loss_tokens
        return {"valid_loss": round(total / count, 4)} if count else {}

    def note_best(self) -> None:
        """Keeps the weights in `out`/best.pt if no earlier ones had a lower `valid_loss`. Not where
        a preference is learnt, which raises the loss of some of the held-out responses."""
        loss = self.last.get("valid_loss") if not self.plain.preference else None
        if loss is None or loss >= self.best.get("valid_loss", math.inf):
            return
        self.best = {"step": self.at, "valid_loss": loss}
        if self.out is not None and self.accelerator.is_main_process:
            save_state({**self.best, "model": self.plain.state_dict()}, self.out / "best.pt")

    def return_to_best(self) -> None:
        """Takes the weights of the lowest `valid_loss`, which need not be the last ones."""
        if self.out is None or not self.best:
            return
        self.accelerator.wait_for_everyone()
        if self.best["step"] != self.at:
            self.plain.load_state_dict(load_state(self.out / "best.pt")["model"])
            self.last |= {"valid_loss": self.best["valid_loss"], "best_step": self.best["step"]}

    def remark(self) -> str:
        """The last figures, for the progress bar."""
        last = self.last
        teacher = f", teacher KL {last['teacher_kl']}" if "teacher_kl" in last else ""
        valid = f", held-out {last['valid_loss']}" if "valid_loss" in last else ""
        return f"loss {last['cross_entropy']}{teacher}{valid}, {last['tokens_per_second']} tokens/s"

    # -- files ------------------------------------------------------------------

    def log(self) -> None:
        """Appends the last figures to metrics-*.jsonl and to TensorBoard."""
        if self.out is None or not self.accelerator.is_main_process:
            return
        row = {"step": self.at, "tokens": self.at * self.tokens_per_step, "epoch": self.epoch}
        with (self.out / f"metrics-{self.stage.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self.last}) + "\n")
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.out / "tensorboard" / self.stage.name), purge_step=self.at
            )
        for name, value in self.last.items():
            self._board.add_scalar(name, value, self.at)

    def save(self) -> None:
        """Writes `out`/state.pt, from which `resume` continues."""
        if self.out is None or not self.accelerator.is_main_process:
            return
        state = {
            **self._digests(),
            "stage": self.stage.name,
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "at": [self.at, self.epoch, self.batch_number],
            "last": self.last,
            "best": self.best,
        }
        save_state(state, self.out / "state.pt")

    def _digests(self) -> dict[str, str | None]:
        return {
            "recipe": self.recipe.digest(),
            "data": self.stage.data_digest,
            "init": self.stage.init_digest,
        }

    def resume(self) -> None:
        """Continues from `out`/state.pt if it is of this stage.

        Raises DataError when it is of another recipe, other data or from other weights.
        """
        assert self.out is not None
        path = self.out / "state.pt"
        metrics = self.out / f"metrics-{self.stage.name}.jsonl"
        state = load_state(path) if path.exists() else None
        if state is None or state["stage"] != self.stage.name:
            metrics.unlink(missing_ok=True)
            return
        for what, digest in self._digests().items():
            if state[what] != digest:
                raise DataError(
                    f"{path} belongs to another {what}",
                    f"give another --out or the {what} it began with",
                )
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.epoch, self.batch_number = state["at"]
        self.last, self.best = state["last"], state["best"]
        # Lines after the saved step will be written again.
        with contextlib.suppress(FileNotFoundError):
            lines = metrics.read_text("utf-8").splitlines()[: self.at]
            metrics.write_text("".join(line + "\n" for line in lines), "utf-8")
