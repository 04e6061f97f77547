"""CTranslate2: runs its own loop; we listen, stop it, and start it again.

What it cannot do is declared: it has no per-request seed (its generator is
seeded once per thread), so sampling with a seed is refused. What falls back:

- end-of-text below the minimum length: the run is ended and started again from
  prompt + answer with end-of-text suppressed for one token (costs a prefill);
- the probability of end-of-text is not reported, so a cut at the maximum goes
  by punctuation and nearness alone;
- after such a start `no_repeat_ngram_size` knows only what came since, and with a
  repetition penalty it is off: the prompt is then part of the result (see `_run`),
  whose words may always come again;
- a batch runs one request after the other: its ragged batches leak prompt tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.engines.base import Engine, EngineOptions, Native, first_line
from edge_slm_runtime.errors import EngineError, ManifestInvalid, NotSupportedByEngine
from edge_slm_runtime.sampling import Logits, Sampling

_COMPUTE_TYPE = {"int8": "int8", "fp32": "float32"}
_POLL = 0.05  # seconds between looks for a native error while no token comes


class CTranslate2Engine(Engine):
    """Honours constraints and settings, but not the seed."""

    name = "ctranslate2"
    install = "pip install 'edge-slm[ctranslate2]'"
    main_file = "model.bin"
    seeds = batches = prefix_cache = False
    process_mb = 70.0
    resident: ClassVar = {"fp32": 1.0, "int8": 1.0}

    def __init__(self, folder: Path, decoder: Decoder, options: EngineOptions) -> None:
        import ctranslate2

        try:
            generator = ctranslate2.Generator(
                str(folder),
                device="cpu",
                compute_type=_COMPUTE_TYPE[options.precision],
                inter_threads=1,
                intra_threads=options.threads,
            )
            self._tokens: list[str] = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        except Exception as error:  # ctranslate2 raises bare RuntimeError
            raise EngineError(
                f"ctranslate2 cannot load {folder.name}: {first_line(error)}"
            ) from None
        if not isinstance(self._tokens, list) or len(self._tokens) != decoder.vocab_size:
            raise ManifestInvalid(f"{folder.name}/vocabulary.json has not the model's tokens")
        if len(set(map(str, self._tokens))) != len(self._tokens):
            # It looks tokens up by name and would silently take another id.
            raise EngineError(f"{folder.name}/vocabulary.json names a token twice")
        self.threads = options.threads
        self._native = Native(generator)

    def check(self, sampling: Sampling) -> None:
        self._native.get()
        if sampling.seed is not None and not sampling.greedy:
            raise NotSupportedByEngine(
                "ctranslate2 has no per-request seed",
                "leave the seed out, use temperature 0, or load engine onnxruntime",
            )

    def decode(self, answers: Iterable[Answer], batch_size: int) -> Iterator[Step]:
        for answer in answers:
            while not answer.finish:
                yield from self._run(answer)

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        try:
            every = self._native.get().forward_batch([list(ids)])
        except RuntimeError as error:
            raise EngineError(f"ctranslate2 failed: {first_line(error)}") from error
        yield from np.asarray(every, np.float32)[0]

    def close(self) -> None:
        self._native.close()

    def _run(self, answer: Answer) -> Iterator[Step]:
        """One native run: until the answer is finished or wants to end too early."""
        steps: SimpleQueue[Step | None] = SimpleQueue()
        fed = [*answer.plan.prompt, *answer.ids]
        # Only tokens inside its own result get its repetition penalty; so the
        # prompt is put there when it matters (then it is read token by token).
        replayed = len(fed) - 1 if answer.plan.sampling.repetition_penalty != 1 else 0
        abandoned = False

        def on_token(result: Any) -> bool:
            if abandoned:
                return True
            if result.step < replayed:
                return False
            if result.token_id in answer.ends and not answer.may_end():
                steps.put(None)
                return True
            step = answer.accept(result.token_id)
            steps.put(step)
            return step.done

        generator = self._native.get()
        try:
            (run,) = generator.generate_batch(
                [[self._tokens[i] for i in fed]],
                asynchronous=True,
                callback=on_token,
                max_length=replayed + answer.plan.budget - len(answer.ids),
                min_length=replayed + 1 if not answer.may_end() else 0,
                include_prompt_in_result=replayed > 0,
                end_token=[self._tokens[i] for i in answer.ends],
                suppress_sequences=[[self._tokens[i]] for i in answer.banned(len(self._tokens))],
                **_sampling_options(answer.plan.sampling, len(self._tokens)),
            )
        except Exception as error:
            raise EngineError(f"ctranslate2 failed: {first_line(error)}") from error
        try:
            while not run.done() or not steps.empty():
                self._native.get()
                with suppress(Empty):
                    step = steps.get(timeout=_POLL)
                    if step is None:
                        break
                    yield step
                    if step.done:
                        break
        finally:
            abandoned = True
            if not self._native.forked:
                _settle(run)


def _settle(run: Any) -> None:
    """Waits until the native loop has let go of the callback."""
    try:
        run.result()
    except Exception as error:
        raise EngineError(f"ctranslate2 failed: {first_line(error)}") from error


def _sampling_options(sampling: Sampling, vocab_size: int) -> dict[str, float]:
    penalty = sampling.repetition_penalty
    options: dict[str, float] = {
        "repetition_penalty": penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size if penalty == 1 else 0,
    }
    if sampling.greedy:
        return {**options, "sampling_topk": 1}
    return {
        **options,
        "sampling_topk": min(sampling.top_k, vocab_size),
        "sampling_topp": sampling.top_p,
        "sampling_temperature": sampling.temperature,
    }
