"""Language models in GGUF files, asked through llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_slm.distill.evaluate import answers_of
from edge_slm.distill.samples import Sample
from edge_slm.distill.teachers import Ask
from edge_slm.distill.teachers.llama_cpp import LlamaCppTeacher
from edge_slm.progress import silent
from edge_slm_converters import read_checkpoint
from edge_slm_converters.gguf_writer import write_gguf
from edge_slm_converters.synthetic import random_checkpoint
from edge_slm_runtime.errors import BadSetting, CheckpointError, TeacherError

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed ([dev])")
pytestmark = pytest.mark.slow

ASKS = [Ask("image", "a fox in the snow", words=2), Ask("tags", "an owl", words=4)]


def random_file(folder: Path, like: Path, positions: int) -> Path:
    """A random model in a GGUF file, without a chat template."""
    model, file = folder / "model", folder / "model.gguf"
    shape = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 417, "positions": positions}
    random_checkpoint(model, **shape, like=like, std=0.2, seed=3)
    write_gguf(read_checkpoint(model), file, "F32")
    return file


def with_template(file: Path, template: str) -> Path:
    """The same model with a chat template."""
    import gguf

    out = file.with_name("chat.gguf")
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(out, "gpt2")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def file(tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("gguf"), tiny_text_side, 4096)


def test_a_file_without_a_template_continues_the_few_shot_prompt(file: Path) -> None:
    teacher = LlamaCppTeacher(file, 0, 1)
    first = list(teacher.answer(ASKS, 1))
    assert [ask for ask, _ in first] == ASKS
    assert list(teacher.answer(ASKS, 1)) == first  # greedy
    with pytest.raises(BadSetting, match="invents no requests"):
        teacher.invent("image", 3, 0)


def test_a_file_with_a_template_is_asked_in_chat(file: Path) -> None:
    # This template ignores the messages, so both requests get one answer.
    teacher = LlamaCppTeacher(with_template(file, "{{ 'a red fox' }}"), 0, 1)
    asks = [Ask(ask.task, ask.request, words=2) for ask in ASKS]
    one, other = (teacher._answer(ask, 0) for ask in asks)
    assert one == other
    plain = LlamaCppTeacher(file, 0, 1)
    assert plain._answer(asks[0], 0) != plain._answer(asks[1], 0)


def test_what_cannot_be_asked_is_said(tiny_text_side: Path, tmp_path: Path) -> None:
    samples = [Sample("a fox", "a fox in the snow", "image")]
    short = random_file(tmp_path, tiny_text_side, 128)
    with pytest.raises(TeacherError, match="exceeds the available context size"):
        answers_of("short", str(short), samples, silent, threads=1)
    (tmp_path / "torn.gguf").write_bytes(short.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        answers_of("torn", str(tmp_path / "torn.gguf"), samples, silent)
    (tmp_path / "half.gguf").write_bytes(short.read_bytes()[:-1000])
    with pytest.raises((CheckpointError, TeacherError)):
        answers_of("half", str(tmp_path / "half.gguf"), samples, silent)
