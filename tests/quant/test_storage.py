"""A quantised model saved and loaded: the same numbers, in a new process too, and folders that cannot be trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llmopt
import pytest
import torch
from llmopt.models import ModelError, load
from llmopt.quant import storage
from safetensors.torch import load_file, save_file

from tests.quant import models

NEW_PROCESS = """
import json, sys, torch, llmopt
prompt = torch.tensor([[5, 17, 99, 3]])
how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
print(json.dumps([llmopt.load_quantized(folder).generate(prompt, **how).tolist() for folder in sys.argv[1:]]))
"""


def generated(model: torch.nn.Module) -> list:
    prompt = torch.tensor([[5, 17, 99, 3]])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    ).tolist()


def facts(folder: Path) -> dict:
    return json.loads((folder / storage.MANIFEST).read_text())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llmopt.save_quantized(llmopt.quantize(models.llama(), "w4a16"), tmp_path / "m")
    return tmp_path / "m"


def test_the_same_tokens_in_a_new_process(tmp_path: Path) -> None:
    """Codes of 8 and of 4 bits, loaded by one process: starting one takes seconds."""
    small = {name: llmopt.quantize(models.llama(), name) for name in ("w8a8", "w4a16")}
    for name, model in small.items():
        llmopt.save_quantized(model, tmp_path / name)
    folders = [str(tmp_path / name) for name in small]
    run = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, *folders], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [generated(model) for model in small.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert, models.mlp])
def test_every_tensor_comes_back(make, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llmopt.quantize(make().to(dtype), "w8a16", group=32)
    llmopt.save_quantized(model, tmp_path)
    again = llmopt.load_quantized(tmp_path, None if hasattr(model, "config") else make)
    for kind in ("named_parameters", "named_buffers"):
        want, got = dict(getattr(model, kind)()), dict(getattr(again, kind)())
        assert want.keys() == got.keys()
        for key in want:
            assert want[key].dtype == got[key].dtype, key
            assert torch.equal(want[key], got[key]), key
    assert not again.training


def test_a_state_dict_goes_through_safetensors(tmp_path: Path) -> None:
    """Without our own folder: the state_dict alone, into a model quantised with any weights."""
    model = llmopt.quantize(models.llama(), "w4a8")
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    torch.manual_seed(1)
    other = llmopt.quantize(type(model)(models.llama().config), "w4a8")
    other.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert generated(other) == generated(model)


def test_every_way_to_name_the_architecture(saved: Path) -> None:
    want = generated(llmopt.load_quantized(saved))
    module = models.llama()
    for given in (models.llama, module, module.config):
        assert generated(llmopt.load_quantized(saved, given)) == want
    assert isinstance(module.lm_head, torch.nn.Linear)


def test_models_are_loaded_by_folder_too(saved: Path) -> None:
    loaded = load(str(saved))
    assert loaded.kind == "causal"
    assert generated(loaded.model) == generated(llmopt.load_quantized(saved))
    (file,) = saved.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="bytes instead of"):
        load(str(saved))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = llmopt.quantize(models.llama(), "w8a8", layers={"lm_head": None})
    llmopt.save_quantized(model, tmp_path)
    assert facts(tmp_path)["same"] == {"lm_head.weight": "model.embed_tokens.weight"}
    again = llmopt.load_quantized(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert generated(again) == generated(model)


def test_saving_again_replaces_the_model_and_nothing_else(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (before,) = saved.glob("*.safetensors")
    model = llmopt.quantize(models.llama(), "w8a8")
    llmopt.save_quantized(model, saved)
    assert not before.exists()
    assert (saved / "notes.txt").read_text() == "mine"
    assert generated(llmopt.load_quantized(saved)) == generated(model)
    assert sorted(p.suffix for p in saved.iterdir()) == [".json", ".safetensors", ".txt"]


def test_a_save_that_breaks_leaves_the_old_model(saved: Path, monkeypatch) -> None:
    want = generated(llmopt.load_quantized(saved))
    files = sorted(p.name for p in saved.iterdir())
    model = llmopt.quantize(models.llama(), "w8a8")
    real = storage.publish

    def no_space(source: Path, target: Path) -> None:
        if target.name == storage.MANIFEST:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(storage, "publish", no_space)
    with pytest.raises(OSError, match="No space left"):
        llmopt.save_quantized(model, saved)
    assert generated(llmopt.load_quantized(saved)) == want
    left = {p.name for p in saved.iterdir()} - set(files)
    assert all(name.endswith(".safetensors") for name in left)


def refused(folder: Path, words: str, model=None) -> None:
    with pytest.raises(storage.StorageError, match=words):
        llmopt.load_quantized(folder, model)


def test_no_quantised_model(tmp_path: Path) -> None:
    refused(
        tmp_path, "holds no llmopt_quant.json: expected a folder written by llmopt.save_quantized"
    )
    with pytest.raises(ValueError, match="no quantised layer"):
        llmopt.save_quantized(models.llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_truncated_tensors(saved: Path, size: int) -> None:
    (file,) = saved.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:size])
    refused(saved, rf"has {len(data[:size])} bytes instead of {len(data)}")


def test_changed_tensors(saved: Path) -> None:
    (file,) = saved.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    refused(saved, "does not have the bytes that were written")
    file.unlink()
    refused(saved, "lacks model-")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', "\udcff"])
def test_broken_manifests(saved: Path, text: str) -> None:
    (saved / storage.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    refused(saved, "llmopt_quant.json")


def test_a_newer_format(saved: Path) -> None:
    (saved / storage.MANIFEST).write_text(json.dumps({**facts(saved), "format": 99}))
    refused(saved, "format 99, and this llmopt reads 2: install a newer llmopt")


def test_missing_and_wrong_facts(saved: Path) -> None:
    whole = facts(saved)
    (saved / storage.MANIFEST).write_text(json.dumps({k: whole[k] for k in ("format", "model")}))
    refused(saved, "lacks configs, layers, tensors, same: save the model again")
    layers = {**whole["layers"], "lm_head": {"n": 160}}
    (saved / storage.MANIFEST).write_text(json.dumps({**whole, "layers": layers}))
    refused(saved, "lm_head is described wrongly")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("format",), 1, "format 1, and this llmopt reads 2: quantise the model again"),
        (("layers",), [], "wrong kind for layers"),
        (("model",), None, "wrong kind for model"),
        (("model",), "NoSuchModel", "needs a NoSuchModel, which transformers"),
        (("same",), "x", "wrong kind for same"),
        (("same",), {"a": 3}, "names no tensors under same"),
        (("same",), {"a": "b"}, "a is b, which model-.* lacks"),
        (("tensors", "bytes"), "9", "does not say the bytes of its tensors"),
        (("tensors", "file"), None, "does not say the file of its tensors"),
        (("configs", "config"), 3, "a config is described wrongly"),
        (("layers", "lm_head"), 3, "lm_head is described wrongly"),
        (("layers", "lm_head", "dtype"), "float31", "lm_head is described wrongly"),
        (("layers", "lm_head", "k"), 63, "lm_head is described wrongly .*do not divide"),
        (("layers", "lm_head", "n"), "many", "lm_head is described wrongly"),
        (("layers", "lm_head", "scheme", "bits"), 3, "lm_head is described wrongly .bits 3"),
        (("layers", "lm_head", "scheme", "activations"), "fp8", "activations 'fp8'"),
    ],
)
def test_every_fact_is_checked(saved: Path, place: tuple, value: object, words: str) -> None:
    manifest = facts(saved)
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (saved / storage.MANIFEST).write_text(json.dumps(manifest))
    refused(saved, words)


def test_a_compiled_model_is_saved_as_what_was_compiled(tmp_path: Path) -> None:
    model = llmopt.quantize(torch.compile(models.llama()), "w8a8")
    assert type(model).__name__ == "LlamaForCausalLM"
    llmopt.save_quantized(torch.compile(model), tmp_path)
    assert facts(tmp_path)["model"] == "LlamaForCausalLM"
    assert generated(llmopt.load_quantized(tmp_path)) == generated(model)


class Table(torch.nn.Module):
    """A module with a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = torch.nn.Linear(64, 8), torch.ones(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.table


def test_a_model_without_values_is_filled(saved: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty, table = models.llama(), Table()
    assert generated(llmopt.load_quantized(saved, empty)) == generated(llmopt.load_quantized(saved))
    llmopt.save_quantized(llmopt.quantize(Table(), "w4a16"), tmp_path)
    refused(tmp_path, "table of the model given is on the meta device", table)
    assert llmopt.load_quantized(tmp_path, Table)(torch.ones(1, 64)).shape == (1, 8)


def test_nothing_is_initialised_that_is_loaded(saved: Path, monkeypatch) -> None:
    made = []
    real = torch.nn.Linear.__init__

    def counting(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", counting)
    llmopt.load_quantized(saved)
    assert set(made) == {"meta"}


def test_files_of_another_model(saved: Path) -> None:
    refused(saved, "holds a quantised LlamaForCausalLM, not a GPT2LMHeadModel", models.gpt2)
    config = models.llama().config
    config.num_hidden_layers = 1
    refused(saved, "is of another model: this one has no layer model.layers.1", config)
    config.num_hidden_layers = 3
    refused(saved, "is of another model: it lacks model.layers.2", config)
    config.num_hidden_layers, config.vocab_size = 2, 161
    refused(saved, "model.embed_tokens.weight is .160, 64. there and .161, 64. here", config)


def test_a_plain_module_needs_its_function(tmp_path: Path) -> None:
    llmopt.save_quantized(llmopt.quantize(models.mlp(), "w8a8", group=32), tmp_path)
    refused(tmp_path, "holds no config: give load_quantized a function")
    with pytest.raises(TypeError, match="returned a int"):
        llmopt.load_quantized(tmp_path, lambda: 3)


def test_one_module_under_two_names(tmp_path) -> None:
    def twins() -> torch.nn.Module:
        shared, norm = torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)
        return torch.nn.ModuleDict(
            {"a": shared, "m": norm, "b": shared, "n": norm, "c": torch.nn.Linear(64, 8)}
        )

    small = llmopt.quantize(twins(), "w8a16")
    llmopt.save_quantized(small, tmp_path)
    loaded = llmopt.load_quantized(tmp_path, twins)
    x = torch.randn(3, 64)
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["b"](loaded["n"](x)), small["b"](small["n"](x)))
