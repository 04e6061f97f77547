"""Teachers: their few-shot texts, real models in-process and behind a server, and death."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.distill.chat import Chat, ChatRequest
from edge_slm.distill.recipe import TeacherRecipe
from edge_slm.distill.teachers import BATCH, Ask, make_teacher, teach
from edge_slm.distill.teachers.few_shot import (
    answer_messages,
    clean,
    completion,
    idea_messages,
    ideas,
    length,
    task_brief,
    usable,
)
from edge_slm.distill.teachers.local import LocalTeacher
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import BadSetting, DataError, TeacherError

from .chat_server import ChatServer

TASKS = ("image", "video", "lettering", "design", "scene", "tags", "title")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def quiet(stage: str, done: int, total: int, remark: str = "") -> None:
    pass


def recipe(kind: str, model: str = "", **settings: Any) -> TeacherRecipe:
    return TeacherRecipe.model_validate({"kind": kind, "model": model, **settings})


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def make_model(folder: Path, chat: bool) -> Path:
    """A Llama of random weights that ends an answer after about twenty tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [completion(answer_messages(Ask(task, ""), 9)) for task in TASKS]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8192,
        )
    )
    with torch.no_grad():  # all states lean one way, and so does the end token
        model.model.embed_tokens.weight += 1
        model.lm_head.weight[1] += 0.2
    model.generation_config = GenerationConfig(
        do_sample=True, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of a tiny model wait for each other more than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-chat", chat=True)


@pytest.mark.parametrize("task", [*TASKS, "default"])
def test_the_few_shot_texts_keep_their_own_rules(task: str) -> None:
    prompt = task_brief(task)
    assert 4 <= len(prompt.examples) <= 6
    assert len(set(prompt.ideas)) == len(prompt.ideas) >= 8
    assert not set(prompt.ideas) & {request for request, _ in prompt.examples}
    for _, response in prompt.examples:
        assert clean(response) == response
        assert 1 <= count_words(response) <= prompt.words[1]


def test_a_task_without_texts_is_served_too() -> None:
    messages = answer_messages(Ask("menu", "soup of the day"), 12)
    assert '"menu"' in messages[0][1]
    assert messages[-1] == ("user", "Request: soup of the day\nLength: 12 words")
    assert [role for role, _ in messages] == ["user", "assistant"] * 4 + ["user"]
    text = completion(messages)
    assert text.endswith("Length: 12 words\n")
    assert text.count("\n\n") == 1 + 4  # after the introduction and after each example


def test_lengths_are_drawn_by_seed_unless_asked() -> None:
    assert length(Ask("image", "a cat", words=17), 3) == 17
    drawn = [length(Ask("image", "a cat", seed=i), 0) for i in range(200)]
    assert drawn == [length(Ask("image", "a cat", seed=i), 0) for i in range(200)]
    assert min(drawn) >= 10
    assert max(drawn) <= 70
    assert len(set(drawn)) > 30


def test_themes_differ_by_seed() -> None:
    assert len({idea_messages("tags", seed) for seed in range(50)}) > 45


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A cat on a mat.", "A cat on a mat."),
        ('Here is a prompt:\n\n"A cat, on a mat"', "A cat, on a mat"),
        ("Sure! Here's your image prompt: A dog.", "A dog."),
        ("```text\nA cat\n```\nLet me know if you want more!", "A cat"),
        ('**Prompt:** A cat in "Paris" at night', 'A cat in "Paris" at night'),
        ('1. "one"', "one"),
        ("- snow\n- fox\n- dusk", "snow, fox, dusk"),
        ("A cat\nsits   down.", "A cat sits down."),
        ("<think>a cat?</think>\n“A cat”", "A cat"),
        ("<think>it never ended", ""),
        ('"Open" and "Closed" signs', '"Open" and "Closed" signs'),
        ("'It's a dog'", "It's a dog"),
        ('A sign: "Go"', 'A sign: "Go"'),
        ("A cat sits.\n\n(3 words)", "A cat sits."),
        ("Title: The Oak", "The Oak"),
        ("A cat.\n\nRequest: a dog\nLength: 9 words\nA dog.", "A cat."),
        ("", ""),
    ],
)
def test_answers_are_cleaned(answer: str, text: str) -> None:
    assert clean(answer) == text


@given(st.text())
def test_cleaning_takes_anything(answer: str) -> None:
    text = clean(answer)
    assert "\n" not in text
    assert text == text.strip()


@given(st.lists(st.from_regex(r"[a-z]{1,9}[,.]?", fullmatch=True), min_size=1))
def test_plain_text_is_left_alone(words: list[str]) -> None:
    text = "A " + " ".join(words)
    assert clean(text) == text


def test_a_cut_answer_ends_at_a_clause() -> None:
    answers = [
        ("A cat, asleep, in the su", True),
        ("A ca", True),
        ("A dog", False),
        ("A dog", False),
    ]
    assert usable(answers) == ["A cat, asleep", "A dog"]


def test_ideas_are_the_lines_that_can_be_requests() -> None:
    text = 'Here are more:\n\n1. a cat\n2) "two dogs"\n- **a fox**\n\n```\n' + "word " * 60 + "\n"
    assert ideas(text) == ["a cat", "two dogs", "a fox"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_in_this_process(chat: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny", chat)
    teacher = LocalTeacher(str(folder), 1.0)
    asks = [Ask("title", f"oil on canvas; {i}", seed=7 * i) for i in range(BATCH + 2)]
    answers = list(teacher.answer(asks, 2))
    assert [ask for ask, _ in answers] == asks
    assert all(len(texts) <= 2 for _, texts in answers)
    assert len({text for _, texts in answers for text in texts}) > BATCH
    assert list(teacher.answer(asks, 2)) == answers  # by seed
    assert teacher.name == "transformers:tiny"


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="cannot load teacher"):
        make_teacher(recipe("transformers", str(tmp_path)), server=None, journal=None)


def test_a_context_that_is_too_short_is_one_clear_line(model: Path) -> None:
    teacher = LocalTeacher(str(model), 1.0)
    with pytest.raises(TeacherError, match="exceed the 8192 positions"):
        list(teacher.answer([Ask("title", "an oak " * 9000)], 1))


def test_a_stopped_local_run_ends_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    settings = recipe("transformers", str(model), requests=2 * BATCH + 3, candidates=2)
    given = {"title": [f"bronze; horse, {i}" for i in range(2 * BATCH + 3)]}
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    teach(LocalTeacher(str(model), 1.0), ["title"], settings, whole, 5, quiet, given)

    def stop(stage: str, done: int, total: int, remark: str) -> None:
        if done == BATCH + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(LocalTeacher(str(model), 1.0), ["title"], settings, stopped, 5, stop, given)
    assert not stopped.exists()
    with pytest.raises(DataError, match="begun with another seed"):
        teach(LocalTeacher(str(model), 1.0), ["title"], settings, stopped, 6, quiet, given)
    teach(LocalTeacher(str(model), 1.0), ["title"], settings, stopped, 5, quiet, given)
    assert stopped.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "stopped.jsonl"}


@pytest.fixture(scope="module")
def transformers_serve(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve`, the real thing, with the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--force_model", str(model)]
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        # Requests that arrive together while it still loads the model fail in it.
        list(Chat(f"http://127.0.0.1:{port}/v1", "tiny").ask([ChatRequest((("user", "hello"),))]))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_real_server(transformers_serve: str, tmp_path: Path) -> None:
    settings = recipe("server", "tiny", requests=6, candidates=4, temperature=1.0)
    journal = tmp_path / "answers.jsonl"

    def run(name: str) -> Path:
        teacher = make_teacher(settings, server=transformers_serve, journal=journal)
        given = {"title": ["bronze; horse", "etching; oak"]}
        return teach(teacher, ["scene", "title"], settings, tmp_path / name, 3, quiet, given)

    samples = rows(run("first.jsonl"))
    assert Counter(s["task"] for s in samples).keys() == {"scene", "title"}
    assert {s["source"] for s in samples} == {"server:tiny"}
    titled = {s["request"] for s in samples if s["task"] == "title"}
    assert titled <= {"bronze; horse", "etching; oak"}  # a random model may say nothing
    assert all(s["response"] for s in samples)
    kept = journal.read_bytes()
    assert run("second.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    assert journal.read_bytes() == kept  # all came from the journal


TEACH = """
import sys
from pathlib import Path
from edge_slm.distill.chat import Chat, ChatRequest
from edge_slm.distill.recipe import TeacherRecipe
from edge_slm.distill.teachers import make_teacher, teach
folder = Path(sys.argv[2])
recipe = TeacherRecipe(kind="server", model="m", requests=40, candidates=2)
teacher = make_teacher(recipe, server=sys.argv[1], journal=folder / "answers.jsonl")
given = {"image": [f"a fox, number {i}" for i in range(40)]}
report = lambda *step: None
teach(teacher, ["tags", "image"], recipe, folder / "out.jsonl", 1, report, given)
"""


def teach_in_a_child(server: ChatServer, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", TEACH, server.url, str(folder)])


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_kill_9_costs_nothing_that_was_answered(tmp_path: Path) -> None:
    with ChatServer(delay=0.02) as server:
        folder, calm = tmp_path / "killed", tmp_path / "calm"
        for share in (3, 60):  # while inventing and while answering
            child = teach_in_a_child(server, folder)
            while len(lines_of(folder / "answers.jsonl")) < share:
                assert child.poll() is None
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not (folder / "out.jsonl").exists()
        assert teach_in_a_child(server, folder).wait() == 0
        asked = Counter(server.questions())
        keys = [json.loads(line)["key"] for line in lines_of(folder / "answers.jsonl")]
        assert len(keys) == len(set(keys))
        # What was under way at a kill was never answered: at most 8 connections each time.
        assert asked.total() - len(asked) <= 2 * 8
        assert teach_in_a_child(server, calm).wait() == 0
    assert (folder / "out.jsonl").read_bytes() == (calm / "out.jsonl").read_bytes()
    assert len(rows(folder / "out.jsonl")) > 120


def test_a_complete_file_is_kept_without_a_question(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("whole\n", "utf-8")
    with ChatServer() as server:
        settings = recipe("server", "m")
        teacher = make_teacher(settings, server=server.url, journal=None)
        assert teach(teacher, ["image"], settings, out, 0, quiet) == out
        assert not server.seen
    assert out.read_text("utf-8") == "whole\n"


def test_given_requests_are_drawn_down_to_the_recipe(tmp_path: Path) -> None:
    with ChatServer() as server:
        settings = recipe("server", "m", requests=5, candidates=1)
        teacher = make_teacher(settings, server=server.url, journal=None)
        given = {"image": [f"fox {i % 30}" for i in range(60)]}
        samples = rows(teach(teacher, ["image"], settings, tmp_path / "o", 0, quiet, given))
    assert len(samples) == len({s["request"] for s in samples}) == 5


def test_a_teacher_without_a_word_is_an_error(tmp_path: Path) -> None:
    with ChatServer() as server:
        settings = recipe("server", "m", requests=1, candidates=1)
        teacher = make_teacher(settings, server=server.url, journal=None)
        with pytest.raises(TeacherError, match="wrote nothing usable for task image"):
            teach(teacher, ["image"], settings, tmp_path / "o", 0, quiet, {"image": []})


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [("server", "m", "needs the server's address"), ("server", "", "needs teacher.model")],
)
def test_what_a_teacher_needs(kind: str, name: str, problem: str) -> None:
    with pytest.raises(BadSetting, match=problem):
        make_teacher(recipe(kind, name), server=None, journal=None)
