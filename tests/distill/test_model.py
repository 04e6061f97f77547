from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from edge_slm.distill.model import fresh_model, grown_model, with_control_tokens
from edge_slm.distill.recipe import ModelRecipe
from edge_slm_runtime.command import CommandSchema, default_axes
from edge_slm_runtime.errors import CheckpointError

SCHEMA = CommandSchema(default_axes(["image", "tags"]))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as the hub has it: bytes first, `<|endoftext|>` last, no control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the sea and the sky and the sand"] * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    shape = ModelRecipe(vocab_size=512, layers=2, width=32, heads=2, positions=128)
    model = fresh_model(shape, seed=1)
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_a_foreign_gpt2_keeps_what_it_knows(foreign: Path) -> None:
    model, tokenizer = grown_model(ModelRecipe(init=str(foreign), positions=64), SCHEMA, seed=3)
    control = SCHEMA.special_tokens()
    assert [tokenizer.token_to_id(token) for token in control] == list(range(len(control)))
    assert tokenizer.token_to_id("<|endoftext|>") is None
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.config.n_positions == 64
    from tokenizers import Tokenizer

    before = GPT2LMHeadModel.from_pretrained(foreign).eval()
    old = Tokenizer.from_file(str(foreign / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    text = "the sea and <|task:image|> naïve sand"
    with torch.no_grad():
        ids = [t.encode(text, add_special_tokens=False).ids for t in (old, tokenizer)]
        one = before(torch.tensor([ids[0]])).logits[0]
        two = model.eval()(torch.tensor([ids[1]])).logits[0]
    assert tokenizer.decode(ids[1]) == text
    shift = len(control)
    assert [i - shift for i in ids[1]] == ids[0]
    # The same logits for all that both can say.
    torch.testing.assert_close(two[:, shift:], one[:, : two.shape[1] - shift])


def test_new_tokens_are_drawn_from_the_embeddings(foreign: Path) -> None:
    model, _ = grown_model(ModelRecipe(init=str(foreign), positions=64), SCHEMA, seed=3)
    rows = model.transformer.wte.weight.data
    new, old = rows[: len(SCHEMA.special_tokens())], rows[len(SCHEMA.special_tokens()) :]
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.2)
    again, _ = grown_model(ModelRecipe(init=str(foreign), positions=64), SCHEMA, seed=3)
    assert torch.equal(rows, again.transformer.wte.weight.data)


def test_our_own_checkpoint_keeps_its_control_tokens(tiny_checkpoint: Path) -> None:
    wider = CommandSchema(default_axes(["image", "tags"], levels=12))
    model, _ = grown_model(ModelRecipe(init=str(tiny_checkpoint), positions=64), wider, seed=0)
    before = GPT2LMHeadModel.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    schema = CommandSchema.from_json(json.loads((tiny_checkpoint / "command.json").read_text()))
    old, new = schema.special_tokens(), wider.special_tokens()
    for token in ("<|end|>", "<|task:image|>", "<|words:13|>", "<|relevance:9|>"):
        one = before.transformer.wte.weight[old.index(token)]
        assert torch.equal(one, model.transformer.wte.weight[new.index(token)])


def test_what_cannot_be_grown_is_named(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot start from"):
        grown_model(ModelRecipe(init=str(tmp_path / "none")), SCHEMA, seed=0)
    with pytest.raises(CheckpointError, match="128 positions, the recipe 256"):
        grown_model(ModelRecipe(init=str(foreign), positions=256), SCHEMA, seed=0)
    with pytest.raises(CheckpointError, match="its tokenizer is WordPiece"):
        with_control_tokens({"model": {"type": "WordPiece"}, "added_tokens": []}, SCHEMA)
