"""The texts that quantisation is calibrated on: answers of the float32 model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.goldens import REQUESTS, Asked
from edge_slm_runtime.command import Command
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, RequestError
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.records import Request

# The variety of the texts matters most: with 512 answers to REQUESTS alone, KL on held-out
# texts was a fifth higher than with 672 various ones.
SAMPLES = (64, 1024)  # at least, at most
# Texts × parameters^1.25. The time of a text grows with the parameters, and that of the steps
# which do not depend on texts grows faster; so a large model gets fewer texts.
SAMPLE_WORK = 677_000_000_000
SAMPLE_TOKENS, SAMPLE_ROWS, SAMPLE_ROUND = 96, 32, 128
LEAST_TOKENS = 16  # of an answer where the context is short
# Ends of an answer whose model judges it there: a single one among the tokens of an answer would
# count for little, and int4 then chose worse among answers than float32 by its confidence.
JUDGED_ENDS = 8
SAMPLE_WORDS = (4, 12, 24, 40, 72)
EXCERPT_WORDS = (4, 8, 16, 30)


def sampled_answers(
    slm: SLM, source: Checkpoint, step: Callable[[str, float], None] | None = None
) -> list[Scored]:
    """Answers drawn at temperature 1 to REQUESTS, then to pieces of these answers, then to
    pieces of the new answers: texts as various as the model gives, none of them from outside.

    Tasks, lengths and levels of a command vary, and everything random has a fixed seed. A
    larger model gives fewer texts: see `sample_count`. step: called before each round with
    a line and the share of the texts that the round makes.
    """
    tokens = min(SAMPLE_TOKENS, source.decoder.positions // 2)
    rng, count = Random(0), sample_count(source.decoder, source.parameters)
    schema = source.form.schema
    ends = source.codec.ends[:1] * (JUDGED_ENDS if schema and schema.confidence else 0)
    seed_texts, texts = list(REQUESTS), list[Scored]()
    for start in range(0, count, SAMPLE_ROUND):
        numbers = range(start, min(start + SAMPLE_ROUND, count))
        if step:
            step(f"sampling calibration texts {start + 1} to {numbers.stop}", len(numbers) / count)
        asked = [_drawn(source, seed_texts, i, tokens, rng) for i in numbers]
        requests = [
            Request.of(
                one.request,
                **one.command.as_dict(),
                temperature=1.0,
                no_repeat_ngram_size=0,
                no_repeat_words=False,
                seed=seed,
                max_new_tokens=min(tokens, source.decoder.positions - len(one.prompt) - len(ends)),
                keep_length=False,
            )
            for seed, one in zip(numbers, asked, strict=True)
        ]
        answers = list(slm.generate_batch(requests, SAMPLE_ROWS))
        texts += [
            Scored((*one.prompt, *answer.token_ids, *ends), len(one.prompt))
            for one, answer in zip(asked, answers, strict=True)
            if answer.token_ids
        ]
        seed_texts = [answer.text for answer in answers if answer.text.strip()] or seed_texts
    return texts


def sample_count(decoder: Decoder, parameters: int) -> int:
    """How many texts a model is calibrated on; a narrow one has fewer moments to learn."""
    return max(SAMPLES[0], min(SAMPLES[1], 3 * decoder.width, int(SAMPLE_WORK / parameters**1.25)))


def _drawn(
    source: Checkpoint, seed_texts: Sequence[str], number: int, tokens: int, rng: Random
) -> Asked:
    """A request for some successive words of one of `seed_texts`, its prompt short enough for
    an answer of `tokens`; else one of REQUESTS, whose answer may be as short as LEAST_TOKENS."""
    words, length = rng.choice(seed_texts).split(), rng.choice(EXCERPT_WORDS)
    first = rng.randrange(max(1, len(words) - length + 1))
    command = Command()
    if schema := source.form.schema:
        level = rng.choice((None, None, schema.levels - 1))
        task = schema.tasks[number % len(schema.tasks)]
        command = schema.check(Command(task, rng.choice(SAMPLE_WORDS), level)).commanded
    excerpt, least = " ".join(words[first : first + length]), min(tokens, LEAST_TOKENS)
    for request, room in ((excerpt, tokens), (REQUESTS[number % len(REQUESTS)], least)):
        try:
            prompt = tuple(source.codec.prompt(request, command))
        except RequestError:  # an untrained model writes anything
            continue
        if len(prompt) + room <= source.decoder.positions:
            return Asked(request, command, prompt)
    raise CheckpointError(
        f"a context of {source.decoder.positions} tokens is too short to calibrate the model in",
        f"a prompt and an answer of {least} must fit",
    )
