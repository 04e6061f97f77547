"""CTranslate2: runs its own loop; we listen, stop it, and start it again.

What it cannot do is declared: it has no per-request seed (its generator is
seeded once per thread), so sampling with a seed is refused, and so are banned words: it knows
sequences of tokens, and a word may be written in several. What falls back:

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
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, ClassVar

import numpy as np

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.engines.base import (
    Engine,
    EngineOptions,
    Native,
    first_line,
    native_error,
)
from edge_slm_runtime.engines.ct2_file import check_model
from edge_slm_runtime.errors import (
    EngineError,
    ManifestInvalid,
    NotSupportedByEngine,
    UsedAfterFork,
)
from edge_slm_runtime.sampling import Logits, Sampling, not_finite

_COMPUTE_TYPE = {"int8": "int8", "fp32": "float32"}
_POLL = 0.05  # seconds between looks for a native error while no token comes
_loaded_in: set[int] = set()  # this process, and those that it was forked from


class CTranslate2Engine(Engine):
    """Honours constraints and settings, but not the seed."""

    name = "ctranslate2"
    install = "pip install 'edge-slm[ctranslate2]'"
    main_file = "model.bin"
    seeds = constrains = batches = prefix_cache = False
    process_mb = 70.0
    thread_room_mb = 80  # a heap of its own
    resident: ClassVar = {"fp32": 1.0, "int8": 1.0}

    def __init__(self, folder: Path, decoder: Decoder, options: EngineOptions) -> None:
        if _loaded_in - {os.getpid()}:  # loading would wait for OpenMP's threads of the parent
            raise UsedAfterFork(
                "ctranslate2 had loaded a model before this process was forked",
                "start the process with spawn, or use another engine",
            )
        import ctranslate2

        _loaded_in.add(os.getpid())
        try:
            self._tokens = _vocabulary(folder, decoder)
            check_model(folder / self.main_file, decoder, options.precision)
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestInvalid(f"{folder.name} is not this model: {first_line(error)}") from None
        try:
            generator = ctranslate2.Generator(
                str(folder),
                device="cpu",
                compute_type=_COMPUTE_TYPE[options.precision],
                inter_threads=1,
                intra_threads=options.threads,
            )
        except Exception as error:  # ctranslate2 raises bare RuntimeError
            raise native_error(f"ctranslate2 cannot load {folder.name}", error) from None
        self.threads = options.threads
        self._native = Native(generator)
        self._worker = 0  # the native thread that hands tokens over

    def check(self, sampling: Sampling) -> None:
        self._native.get()
        if sampling.seed is not None and not sampling.greedy:
            raise NotSupportedByEngine(
                "ctranslate2 has no per-request seed",
                "leave the seed out, use temperature 0, or load engine onnxruntime",
            )

    def decode(self, answers: Iterable[Answer], batch_size: int) -> Iterator[Step]:
        for answer in answers:
            if answer.called_off:
                yield answer.end()
            while not answer.finish:
                yield from self._run(answer)

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        every = self._native.call(_forward, [list(ids)])
        yield from np.asarray(every, np.float32)[0]

    def close(self) -> None:
        self._native.close()

    def _run(self, answer: Answer) -> Iterator[Step]:
        """One native run: until the answer is finished or wants to end too early.

        When the reader leaves, the run ends with its next token. Nobody waits for that: this
        may be the garbage collector, called in the very thread that computes the run.
        """
        if get_ident() == self._worker:  # of a finaliser, which would wait for itself
            raise EngineError("a finaliser must not use ctranslate2")
        steps = _Mailbox()
        fed = [*answer.plan.prompt, *answer.ids]
        # Only tokens inside its own result get its repetition penalty; so the
        # prompt is put there when it matters (then it is read token by token).
        replayed = len(fed) - 1 if answer.plan.sampling.repetition_penalty != 1 else 0
        abandoned = False

        def on_token(result: Any) -> bool:
            self._worker = get_ident()
            if abandoned or self._native.closed:
                return True
            if result.step < replayed:
                return False
            if not isfinite(result.log_prob):
                steps.put(not_finite())
                return True
            if result.token_id in answer.ends and not answer.may_end():
                steps.put(None)
                return True
            step = answer.accept(result.token_id)
            steps.put(step)
            return step.done

        run = self._native.call(
            _start,
            [self._tokens[i] for i in fed],
            callback=on_token,
            max_length=replayed + answer.plan.budget - len(answer.ids),
            min_length=replayed + 1 if not answer.may_end() else 0,
            include_prompt_in_result=replayed > 0,
            end_token=[self._tokens[i] for i in answer.ends],
            suppress_sequences=[[self._tokens[i]] for i in answer.banned(len(self._tokens))],
            return_scores=True,
            **_sampling_options(answer.plan.sampling, len(self._tokens)),
        )
        came = len(answer.ids)
        try:
            while not run.done() or steps.items:
                self._native.get()
                if not steps.wait():
                    continue
                step = steps.items.popleft()
                if isinstance(step, EngineError):
                    raise step
                if step is None:
                    break
                yield step
                if step.done:
                    return
            else:
                _raise_failure(run)
        finally:
            abandoned = True
        if len(answer.ids) == came:
            raise EngineError("ctranslate2 gives no token", "verify the bundle")


class _Mailbox:
    """Steps from the engine's thread to the reader's. (Python's queues wait for ever, or for
    themselves, when a signal handler or a finaliser runs at the wrong moment.)"""

    def __init__(self) -> None:
        self.items: deque[Step | EngineError | None] = deque()
        self._none_yet = Lock()
        self._none_yet.acquire()

    def put(self, item: Step | EngineError | None) -> None:
        self.items.append(item)
        with suppress(RuntimeError):  # the reader has not looked since the last one
            self._none_yet.release()

    def wait(self) -> bool:
        """Whether something has come; waits for it a short time."""
        return bool(self.items) or (self._none_yet.acquire(timeout=_POLL) and bool(self.items))


def _vocabulary(folder: Path, decoder: Decoder) -> list[str]:
    """Raises ValueError, OSError."""
    tokens = json.loads((folder / "vocabulary.json").read_text("utf-8"))
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("vocabulary.json is not a list of tokens")
    if len(tokens) != decoder.vocab_size:
        raise ValueError(
            f"vocabulary.json has {len(tokens)} tokens, the model {decoder.vocab_size}"
        )
    if len(set(tokens)) != len(tokens):
        # It looks tokens up by name and would silently take another id.
        raise ValueError("vocabulary.json names a token twice")
    return tokens


def _start(generator: Any, tokens: Sequence[str], **options: Any) -> Any:
    try:
        (run,) = generator.generate_batch([tokens], asynchronous=True, **options)
    except Exception as error:
        raise native_error("ctranslate2 failed", error) from error
    return run


def _raise_failure(run: Any) -> None:
    """Of a run that is done."""
    try:
        run.result()
    except Exception as error:
        raise native_error("ctranslate2 failed", error) from error


def _forward(generator: Any, ids: Sequence[Sequence[int]]) -> Any:
    try:
        return generator.forward_batch(ids)
    except Exception as error:
        raise native_error("ctranslate2 failed", error) from error


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
