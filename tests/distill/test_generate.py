from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import edge_slm
from edge_slm.distill.checkpoint import save_checkpoint
from edge_slm.distill.generate import Episode, EpisodeGenerator, Outcome
from edge_slm.distill.model import fresh_model
from edge_slm.distill.recipe import ModelRecipe
from edge_slm_runtime.command import Command, CommandSchema
from edge_slm_runtime.errors import CheckpointError, RequestTooLong, UnknownTask

REQUESTS = ("a cosy cabin in the snow", "neon street", "東京の夜景 🦊", "fisherman " * 12, "a")


def episodes(count: int) -> list[Episode]:
    rng = random.Random(5)
    return [
        Episode(
            rng.choice(REQUESTS),
            Command(
                rng.choice(("image", "video", "title", None)), rng.choice((3, 40, None)), i % 10
            ),
            seed=i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost a tiny model more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path) -> EpisodeGenerator:
    return EpisodeGenerator(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def willing(willing_checkpoint: Path) -> Path:
    return willing_checkpoint


def test_greedy_is_what_the_runtime_says(generator: EpisodeGenerator, tiny_bundle: Path) -> None:
    asked = [replace(e, command=replace(e.command, words=None)) for e in episodes(12)]
    with edge_slm.load(tiny_bundle, engine="onnxruntime", precision="fp32", threads=1) as slm:
        for episode, answer in zip(asked, generator(asked, temperature=0), strict=True):
            room = 128 - len(slm.check(edge_slm.Request(episode.request)).prompt)
            ids = slm.greedy_ids(episode.request, episode.command, room)
            assert answer.text == generator.codec.decode(ids).strip()
            assert answer.ended == (len(ids) < room)


def test_a_seed_gives_what_the_runtime_gives_for_it(willing: Path, tmp_path: Path) -> None:
    from edge_slm_converters import convert

    convert(willing, tmp_path / "bundle", ("onnx-fp32",), accept=True)
    asked = episodes(24)
    with edge_slm.load(tmp_path / "bundle", threads=1) as slm:
        answers = EpisodeGenerator(willing, device="cpu")(asked)
        for episode, answer in zip(asked, answers, strict=True):
            out = slm.generate(
                episode.request,
                **episode.command.as_dict(),
                temperature=1.0,
                no_repeat_ngram_size=0,
                no_repeat_words=False,
                seed=episode.seed,
                keep_length=False,
            )
            assert answer == Outcome(out.text, out.finish_reason == "stop")


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_row_does_not_depend_on_its_neighbours(willing: Path, batch: int) -> None:
    asked = episodes(18)
    whole = EpisodeGenerator(willing, device="cpu", batch=18)(asked)
    assert EpisodeGenerator(willing, device="cpu", batch=batch)(asked) == whole
    assert EpisodeGenerator(willing, device="cpu", batch=batch)(asked[::-1]) == whole[::-1]
    ended = [answer.ended for answer in whole]
    assert any(ended)  # rows left the batch while others went on
    assert len({len(answer.text) for answer in whole}) > 6


def test_seeds_make_answers_differ_and_repeat(generator: EpisodeGenerator) -> None:
    asked = [Episode("a paper boat", Command("image"), seed) for seed in range(8)]
    answers = generator(asked)
    assert len({answer.text for answer in answers}) == 8
    assert generator(asked) == answers
    assert generator(asked[3:4]) == answers[3:4]


def test_temperature_zero_ignores_seeds(generator: EpisodeGenerator) -> None:
    asked = [Episode("a paper boat", Command("image"), seed) for seed in range(3)]
    assert len(set(generator(asked, temperature=0))) == 1


def test_control_tokens_and_padding_ids_are_never_drawn(generator: EpisodeGenerator) -> None:
    logits = torch.zeros(2000, 417)
    logits[:, 1 : len(generator.codec.controls)] = 50.0
    logits[:, generator.codec.size :] = 50.0
    drawn = generator._pick(logits, torch.rand(2000, dtype=torch.float64), 1.0)
    assert set(drawn.tolist()) <= {0, *range(len(generator.codec.controls), generator.codec.size)}


def test_the_draw_follows_the_softmax(generator: EpisodeGenerator) -> None:
    first = len(generator.codec.controls)
    logits = torch.full((20_000, 417), -30.0)
    logits[:, first : first + 3] = torch.tensor([1.0, 0.0, 2.0])
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = generator._pick(logits, draws, 0.5)
    shares = (drawn - first).bincount(minlength=3) / 20_000
    expected = torch.tensor([2.0, 0.0, 4.0]).softmax(0)
    assert torch.allclose(shares, expected, atol=0.01)


def test_progress_and_nothing_to_do(generator: EpisodeGenerator, tiny_checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    EpisodeGenerator(tiny_checkpoint, device="cpu", batch=4)(
        episodes(10), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert generator([]) == []


def test_what_cannot_be_honoured_is_told(generator: EpisodeGenerator) -> None:
    with pytest.raises(RequestTooLong, match="128 positions"):
        generator([Episode("fisherman " * 200, Command("image"))])
    with pytest.raises(UnknownTask, match="poem"):
        generator([Episode("a fox", Command("poem"))])


def test_a_broken_checkpoint_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"command\.json"):
        EpisodeGenerator(tmp_path)
    folder = tmp_path / "without_weights"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="without_weights"):
        EpisodeGenerator(folder)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        EpisodeGenerator(folder)


@pytest.fixture(scope="module")
def llama(tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random Llama with grouped heads."""
    path = tmp_path_factory.mktemp("llama") / "checkpoint"
    shape = ModelRecipe(
        architecture="llama", vocab_size=512, layers=2, width=32, heads=4, kv_heads=2, positions=128
    )
    model = fresh_model(shape, seed=2)
    model.resize_token_embeddings(400, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # spread, so that answers differ
                parameter.mul_(10)
    schema = CommandSchema.from_json(json.loads((tiny_text_side / "command.json").read_text()))
    tokenizer = Tokenizer.from_file(str(tiny_text_side / "tokenizer.json"))
    return save_checkpoint(model, tokenizer, schema, {}, path)


def test_a_llama_greedily(llama: Path) -> None:
    generator = EpisodeGenerator(llama, device="cpu")
    asked = episodes(8)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    never = [i for i in generator.codec.controls if i]
    answers = generator(asked, temperature=0)
    assert len({answer.text for answer in answers}) > 4
    for episode, answer in zip(asked, answers, strict=True):
        ids = generator._prompt(episode)
        start = len(ids)
        with torch.no_grad():
            while len(ids) < 128 and (ids[-1] or len(ids) == start):
                logits = model(torch.tensor([ids])).logits[0, -1]
                logits[never] = -torch.inf
                ids.append(int(logits.argmax()))
        written = ids[start:-1] if ids[-1] == 0 else ids[start:]
        assert answer == Outcome(generator.codec.decode(written).strip(), ids[-1] == 0)


@pytest.mark.slow
def test_rows_of_a_llama_do_not_depend_on_their_neighbours(llama: Path) -> None:
    asked = episodes(12)
    whole = EpisodeGenerator(llama, device="cpu")(asked)
    assert EpisodeGenerator(llama, device="cpu", batch=1)(asked) == whole
