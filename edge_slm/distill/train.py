"""Training: GPT-2 on commanded records, response-only loss, exact resume.

The state of a run is one file (weights, optimizer, random generators, position
in the data), written aside and renamed; a killed run continues to the same
result as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_slm.distill.checkpoint import save_checkpoint
from edge_slm.distill.packing import IGNORED, Batch, Packer
from edge_slm.distill.prepare import Prepared, Report, prepare, silent
from edge_slm.distill.recipe import Recipe, TrainRecipe
from edge_slm_runtime.errors import DataError, DependencyMissing, TargetExists


def train(
    recipe: Recipe,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    cache: str | Path | None = None,
    report: Report = silent,
    max_steps: int | None = None,
) -> Path:
    """Trains to the end of the recipe (or `max_steps` more steps); returns the checkpoint.

    data: JSONL files or folders. out: the run's folder; a run found there is
    continued. cache: folder of the reward's embeddings (default: `out`/cache).
    Writes `out`/metrics.jsonl, `out`/state.pt and, at the end, `out`/checkpoint
    in the Hugging Face layout. Ctrl-C saves after the step under way. Raises DataError
    (what cannot be used, by name), TargetExists, DependencyMissing.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise DependencyMissing(
            "training needs torch and transformers", "pip install 'edge-slm[train]'"
        ) from None
    out = Path(out)
    if (out / "checkpoint").exists():
        raise TargetExists(f"{out} holds a finished run", "give another --out")
    out.mkdir(parents=True, exist_ok=True)
    prepared = prepare(recipe, data, Path(cache) if cache else out / "cache", report)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(recipe, prepared, out, device)
    run.resume()
    with _interrupts_deferred() as interrupted:
        run.loop(report, max_steps, interrupted)
    if interrupted:
        raise KeyboardInterrupt
    if run.step < run.total_steps:
        return out / "state.pt"
    return save_checkpoint(
        run.model, prepared, recipe, out / "checkpoint", {"steps": run.step, **run.last}
    )


def learning_rate(step: int, total: int, recipe: TrainRecipe) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def new_model(recipe: Recipe, seed: int) -> Any:
    """A `GPT2LMHeadModel` with fresh weights of the recipe's shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    m = recipe.model
    config = GPT2Config(
        vocab_size=m.vocab_size,
        n_positions=m.positions,
        n_embd=m.width,
        n_layer=m.layers,
        n_head=m.heads,
        resid_pdrop=m.dropout,
        embd_pdrop=m.dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of tearing a step apart; a second one does as ever.

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


class _Run:
    """One run: model, optimizer, data position."""

    def __init__(self, recipe: Recipe, prepared: Prepared, out: Path, device: Any) -> None:
        import torch

        self.recipe, self.prepared, self.out, self.device = recipe, prepared, out, device
        self.model = new_model(recipe, recipe.seed).to(device)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        t = recipe.train
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": t.weight_decay}, {"params": rest}],
            lr=t.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        body = self.model.transformer
        self.body = torch.compile(body) if t.compile else body
        length = recipe.model.positions
        rows = max(1, t.batch_tokens // length)
        self.packer, self.valid = (
            Packer(
                encoded,
                prepared.schema,
                rows=rows,
                length=length,
                dropout=dropout,
                seed=recipe.seed,
            )
            for encoded, dropout in (
                (prepared.train, recipe.hindsight.command_dropout),
                (prepared.valid, 0.0),
            )
        )
        self.tokens_per_step = rows * length
        self.total_steps = max(1, t.tokens // self.tokens_per_step)
        self.step, self.epoch, self.batch_number = 0, 0, 0
        self.last: dict[str, Any] = {}

    # -- the data ---------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Endless; continues at (epoch, batch_number)."""
        while True:
            plan = self.packer.epoch(self.epoch)
            if not plan:
                raise DataError(
                    "too few samples for one batch", "lower train.batch_tokens or add data"
                )
            while self.batch_number < len(plan):
                number = self.batch_number
                self.batch_number += 1
                yield self.packer.batch(self.epoch, number, plan[number])
            self.epoch, self.batch_number = self.epoch + 1, 0

    # -- one step ---------------------------------------------------------------

    def loss(self, batch: Batch) -> Any:
        """Mean cross-entropy over the response tokens of the batch, nats."""
        import torch

        ids, positions, labels, mask = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.ids, batch.positions, batch.labels, batch.mask())
        )
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            hidden = self.body(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            bearing = labels != IGNORED  # only these reach the LM head
            logits = self.model.lm_head(hidden[bearing])
        return torch.nn.functional.cross_entropy(logits.float(), labels[bearing])

    def loop(self, report: Report, max_steps: int | None, interrupted: list[int]) -> None:
        import torch

        t = self.recipe.train
        stop = min(self.total_steps, self.step + max_steps) if max_steps else self.total_steps
        batches = self.batches()
        started, first = time.perf_counter(), self.step
        while self.step < stop:
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.total_steps, t)
            loss = self.loss(next(batches))
            if not math.isfinite(loss.item()):
                raise DataError(
                    f"the loss is {loss.item()} at step {self.step + 1}",
                    "lower train.learning_rate; the last saved state is sound",
                )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            speed = (self.step - first) * self.tokens_per_step / (time.perf_counter() - started)
            self.last |= {"train_loss": round(loss.item(), 4), "tokens_per_second": round(speed)}
            if self.step % t.evaluate_every == 0 or self.step == self.total_steps:
                self.last |= self.evaluate()
            self.log({"epoch": self.epoch, "gradient_norm": round(float(norm), 3)})
            report("train", self.step, self.total_steps, self.remark())
            if interrupted:
                stop = self.step
            if self.step % t.save_every == 0 or self.step == stop:
                self.save()

    def evaluate(self) -> dict[str, float]:
        """`valid_loss`: nats per response token of the held-out samples, under the
        commands that they achieved. Empty when nothing is held out."""
        import torch

        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for i, rows in enumerate(self.valid.epoch(0, partial=True)):
                batch = self.valid.batch(0, i, rows)
                bearing = int((batch.labels != IGNORED).sum())
                total += self.loss(batch).item() * bearing
                count += bearing
        return {"valid_loss": round(total / count, 4)} if count else {}

    def remark(self) -> str:
        valid = f", held-out {self.last['valid_loss']}" if "valid_loss" in self.last else ""
        return f"loss {self.last['train_loss']}{valid}, {self.last['tokens_per_second']} tokens/s"

    # -- files ------------------------------------------------------------------

    def log(self, extra: dict[str, Any]) -> None:
        row = {"step": self.step, "tokens": self.step * self.tokens_per_step, **self.last, **extra}
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        import torch

        state = {
            "recipe": self.recipe.digest(),
            "data": self.prepared.facts["digest"],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "at": [self.step, self.epoch, self.batch_number],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "last": self.last,
        }
        aside = self.out / "state.pt.part"
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.out / "state.pt")

    def resume(self) -> None:
        """Continues from `out`/state.pt if there is one. Raises DataError for another recipe."""
        import torch

        path = self.out / "state.pt"
        if not path.exists():
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        now = {"recipe": self.recipe.digest(), "data": self.prepared.facts["digest"]}
        for what, digest in now.items():
            if state[what] != digest:
                raise DataError(
                    f"{path} belongs to another {what}",
                    f"give another --out or the {what} it began with",
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.batch_number = state["at"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        self.last = state["last"]
        # Lines after the saved step will be written again.
        metrics = self.out / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            lines = metrics.read_text("utf-8").splitlines()[: self.step]
            metrics.write_text("".join(line + "\n" for line in lines), "utf-8")
