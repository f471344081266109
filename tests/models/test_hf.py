import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from mics_models import BERTS, GPTS, BERTConfig, GPTConfig
from mics_models.hf import (
    config_from_hf,
    config_to_hf,
    from_hf,
    from_hf_lazily,
    load_safetensors,
    open_safetensors,
    save_safetensors,
    to_hf,
)
from shapes import GPT2, LATER, PAIRED, ROBERTA, build, lively, tokens_for

Config = GPTConfig | BERTConfig

CASES: dict[str, Config] = {
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tied=False, norm_eps=1e-3),
    "llama": LATER,
    "llama-tied": dataclasses.replace(LATER, tied=True, rotary_base=500.0, norm_eps=1e-3),
    "bert": PAIRED,
    "bert-without-sentences": dataclasses.replace(PAIRED, next_sentence=False, types=3),
    "roberta": ROBERTA,
}
each_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def their_model(config: Config, attention: str = "eager") -> nn.Module:
    """Theirs with random weights, large enough for every path through it to show."""
    content = config_to_hf(config)
    hf = transformers.AutoConfig.for_model(**content)
    hf._attn_implementation = attention
    (name,) = content["architectures"]
    model = getattr(transformers, name)(hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


@each_case
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_and_gradients_are_those_of_hugging_faces_model(config: Config, attention: str, training: bool) -> None:
    theirs, ours = their_model(config, attention).train(training), build(config).train(training)
    ours.load_state_dict(from_hf(theirs.state_dict(), config))
    tokens = torch.randint(2, config.vocab, (3, 24))  # RoBERTa's position of token 1, its padding, is another
    inputs: dict[str, Tensor] = {}
    if isinstance(config, BERTConfig) and config.types > 1:
        inputs = {"token_type_ids": torch.randint(config.types, tokens.shape)}
    wanted = theirs(tokens, **inputs)
    outputs = ours(tokens, types=inputs["token_type_ids"]) if inputs else ours(tokens)
    if isinstance(config, GPTConfig):
        pairs = [(outputs, wanted.logits)]
    elif config.next_sentence:
        pairs = [(outputs.tokens, wanted.prediction_logits), (outputs.follows, wanted.seq_relationship_logits)]
    else:
        pairs = [(outputs.tokens, wanted.logits)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weights = [torch.randn_like(got) / got[0].numel() for got, _ in pairs]
    for side in (0, 1):
        sum((pair[side] * weight).sum() for pair, weight in zip(pairs, weights, strict=True)).backward()
    got = to_hf({name: parameter.grad for name, parameter in ours.named_parameters()}, config)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 1e-4 or "key.bias" in name, name  # softmax undoes the keys' bias


@pytest.mark.parametrize("config", [PAIRED, ROBERTA], ids=["bert", "roberta"])
def test_padded_logits_are_those_of_hugging_faces_model(config: BERTConfig) -> None:
    theirs, ours = their_model(config), build(config)
    ours.load_state_dict(from_hf(theirs.state_dict(), config))
    mask = torch.arange(24) < torch.tensor([24, 15, 1])[:, None]
    tokens = torch.randint(2, config.vocab, (3, 24)).where(mask, 1)
    wanted = theirs(tokens, attention_mask=mask.long())
    got = ours(tokens, mask=mask)
    logits = wanted.prediction_logits if config.next_sentence else wanted.logits
    torch.testing.assert_close(got.tokens[mask], logits[mask], rtol=1e-5, atol=1e-5)
    if config.next_sentence:
        torch.testing.assert_close(got.follows, wanted.seq_relationship_logits, rtol=1e-5, atol=1e-5)


@each_case
def test_transformers_reads_what_is_saved_and_it_comes_back_bit_for_bit(config: Config, tmp_path: Path) -> None:
    model = lively(build(config))
    file = tmp_path / "model.safetensors"
    save_safetensors(model.state_dict(), file, config)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers 4 asks for it
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    again = load_safetensors(file, config_from_hf(json.loads((tmp_path / "config.json").read_text())))
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    (architecture,) = config_to_hf(config)["architectures"]
    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs.eval()
    tokens = tokens_for(config).clamp(min=2)
    wanted, got = theirs(tokens)[0], model(tokens)
    torch.testing.assert_close(got if isinstance(got, Tensor) else got.tokens, wanted, rtol=1e-4, atol=1e-4)


@each_case
def test_what_transformers_saves_is_read(config: Config, tmp_path: Path) -> None:
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    read = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert read == config
    state = load_safetensors(tmp_path / "model.safetensors", read)
    for name, tensor in to_hf(state, read).items():
        begin = 2 if isinstance(config, BERTConfig) and config == ROBERTA and "position" in name else 0
        assert torch.equal(tensor[begin:], theirs.state_dict()[name][begin:]), name


@each_case
@pytest.mark.parametrize("opened", ["file", "folder", "index", "folder of several"])
def test_what_transformers_saves_is_opened_and_made_tensor_by_tensor(
    config: Config, tmp_path: Path, opened: str
) -> None:
    theirs = their_model(config)
    several = opened in ("index", "folder of several")
    theirs.save_pretrained(tmp_path, max_shard_size=20_000 if several else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is several
    paths = {"file": tmp_path / "model.safetensors", "index": tmp_path / "model.safetensors.index.json"}
    found = open_safetensors(paths.get(opened, tmp_path), config)
    expected = from_hf(theirs.state_dict(), config)
    assert set(found) == expected.keys()
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        shape = found.meta(name)
        assert shape.is_meta
        assert (shape.shape, shape.dtype) == (tensor.shape, tensor.dtype)


def test_nothing_is_made_that_is_not_asked_for() -> None:
    made: list[str] = []

    class Theirs(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            made.append(name)
            return super().__getitem__(name)

    theirs = Theirs(to_hf(build(PAIRED).state_dict(), PAIRED))
    ours = from_hf_lazily(theirs, PAIRED)
    assert not made
    ours["blocks.1.attention.qkv.bias"]
    layer = "bert.encoder.layer.1.attention.self"
    assert made == [f"{layer}.query.bias", f"{layer}.key.bias", f"{layer}.value.bias"]
    with pytest.raises(KeyError):
        ours["blocks.1"]


@pytest.mark.parametrize("name", [*GPTS, *BERTS])
def test_every_named_config_comes_back_from_its_hugging_face_form(name: str) -> None:
    config = (GPTS | BERTS)[name]
    assert config_from_hf(config_to_hf(config)) == config


def test_published_config_files_are_understood() -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    assert config_from_hf(gpt2 | {"layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}) == GPTS["gpt2-124m"]
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    bert = {**shape, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
    heads = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    assert config_from_hf(bert | heads) == BERTS["bert-base"]
    roberta = {**shape, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
    read = config_from_hf(roberta | {"model_type": "roberta", "layer_norm_eps": 1e-5})
    assert (read.context, read.types, read.norm_eps) == (512, 1, 1e-5)
    llama = {**shape, "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048}
    read = config_from_hf(llama | {"rope_theta": 5e5, "num_key_value_heads": 4, "rope_scaling": None})
    assert (read.rotary_base, read.kv_heads, read.tied) == (5e5, 4, False)


@pytest.mark.parametrize("config", [GPT2, PAIRED, ROBERTA], ids=["gpt2", "bert", "roberta"])
def test_names_without_prefix_old_names_and_buffers_are_understood(config: Config) -> None:
    state = lively(build(config)).state_dict()
    renamed = {}
    for name, tensor in to_hf(state, config).items():
        plain = name.removeprefix("transformer.").removeprefix("bert.").removeprefix("roberta.")
        renamed[plain.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
            tensor
        )
    buffers = ("h.0.attn.bias", "h.1.attn.masked_bias", "embeddings.position_ids")
    again = from_hf(renamed | {name: torch.ones(1) for name in buffers}, config)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name


def test_conversion_copies_only_what_must_be_joined_or_moved() -> None:
    state = build(GPT2).state_dict()
    theirs = to_hf(state, GPT2)
    assert storages(theirs) == storages(state) == storages(from_hf(theirs, GPT2))
    state = build(PAIRED).state_dict()
    assert storages(to_hf(state, PAIRED)) == storages(state)
    copied = storages(from_hf(to_hf(state, PAIRED), PAIRED)) - storages(state)
    assert len(copied) == PAIRED.layers * 2  # the weight and the bias of qkv


def storages(state: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in state.values()}


def test_other_tensors_than_the_configs_are_named() -> None:
    theirs = to_hf(build(GPT2).state_dict(), GPT2)
    theirs["transformer.h.0.mlp.extra"] = theirs.pop("transformer.wpe.weight")
    with pytest.raises(ValueError, match=r"^from_hf: got h\.0\.mlp\.extra too many and wpe\.weight too few, expected "):
        from_hf(theirs, GPT2)
    ours = build(PAIRED).state_dict()
    with pytest.raises(ValueError, match=r"^to_hf: got none too many and norm\.bias too few, expected "):
        to_hf({name: tensor for name, tensor in ours.items() if name != "norm.bias"}, PAIRED)
    with pytest.raises(ValueError, match=r"too many and h\.1\..*, h\.1\.\S+ and 8 more too few"):
        from_hf({name: t for name, t in to_hf(build(GPT2).state_dict(), GPT2).items() if ".h.1." not in name}, GPT2)


def test_a_head_that_is_not_tied_is_no_tied_one() -> None:
    untied = dataclasses.replace(GPT2, tied=False)
    with pytest.raises(ValueError, match=r"^from_hf: lm_head\.weight differs from wte\.weight, expected the same"):
        from_hf(to_hf(build(untied).state_dict(), untied), GPT2)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GPT2, {"model_type": "t5"}, "model_type is 't5', expected one of gpt2, llama, bert, roberta: "),
        (GPT2, {"activation_function": "relu"}, "activation_function is 'relu', expected 'gelu_new' or 'gelu_pyt"),
        (GPT2, {"n_embd": None}, "'n_embd' is absent, expected a size: give the whole config.json"),
        (LATER, {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3', expected 'default'"),
        (LATER, {"head_dim": 16}, "head_dim is 16, expected 8 for 4 heads of a width of 32"),
        (PAIRED, {"architectures": [], "type_vocab_size": 1}, "type_vocab_size is 1 in a bert without sentence head"),
        (ROBERTA, {"pad_token_id": 0}, "pad_token_id is 0, expected 1 in a roberta: "),
    ],
    ids=str,
)
def test_a_model_that_ours_cannot_be_is_refused(config: Config, change: dict[str, Any], message: str) -> None:
    content = {key: value for key, value in (config_to_hf(config) | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^config_from_hf: {message}"):
        config_from_hf(content)


@pytest.mark.parametrize("change", [{"norm": "rms"}, {"kv_heads": 2}, {"bias": False}], ids=str)
def test_a_gpt_between_gpt2_and_llama_has_no_hugging_face_form(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^hf: got a GPTConfig with .* expected all of GPT-2's or all"):
        config_to_hf(dataclasses.replace(GPT2, **change))
