"""GGUF's own codes: every weight is bit for bit what the file says, in Hugging Face's order of rows."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from llmopt.models import smollm2
from llmopt.quant.gguf import TYPES, codes_of, quantize_from_blocks, read_blocks, scheme_for
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import W8A16

from tests.quant import models

KINDS = {name: getattr(gguf.GGMLQuantizationType, name) for name in TYPES}


def blocks(name: str, n: int = 7, k: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A random weight's bytes, and the values they stand for."""
    w = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    data = gguf.quants.quantize(w, KINDS[name])
    return data, gguf.quants.dequantize(data, KINDS[name])


@pytest.mark.parametrize("name", TYPES)
def test_values_are_exact(name: str) -> None:
    data, values = blocks(name)
    codes = codes_of(data, name, 7, 96)
    scheme = scheme_for(name, "same")
    assert codes.codes.shape == (7, 96 * scheme.bits // 8)
    assert codes.scales.shape == (7, 3)
    assert torch.equal(codes.weight(scheme.bits), torch.from_numpy(values))


def test_what_has_no_codes() -> None:
    data, _ = blocks("Q4_1")
    with pytest.raises(ValueError, match="GGUF type Q6_K has no codes; possible: Q4_0, Q4_1, Q8_0"):
        codes_of(data, "Q6_K", 7, 96)
    with pytest.raises(ValueError, match="are no Q4_0 tensor of 7 × 96"):
        codes_of(data, "Q4_0", 7, 96)
    data = data.copy()
    data[0, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    with pytest.raises(ValueError, match="scales are NaN"):
        codes_of(data, "Q4_1", 7, 96)
    data = blocks("Q8_0")[0].copy()
    data[0, 2] = 0x80
    with pytest.raises(ValueError, match="code −128"):
        codes_of(data, "Q8_0", 7, 96)


def test_a_file_with_the_lowest_code_is_rounded_there(caplog) -> None:
    data = blocks("Q8_0")[0].copy()
    tensor = SimpleNamespace(name="t", tensor_type=KINDS["Q8_0"], shape=(96, 7), data=data)
    codes, name = read_blocks(tensor)
    assert (name, codes.codes.shape) == ("Q8_0", (7, 96))
    data[0, 2] = 0x80
    with caplog.at_level("WARNING", "llmopt"):
        assert read_blocks(tensor) is None
    assert "t holds the code −128" in caplog.text


def test_blocks_for_another_model() -> None:
    model = models.mlp()
    codes = round_weight(torch.randn(8, 64), W8A16)
    with pytest.raises(ValueError, match="the model has no linear 7"):
        quantize_from_blocks(model, {"7": (codes, "Q8_0")})
    with pytest.raises(ValueError, match=r"1 is \(96, 64\) in the model and \(8, 64\) in the file"):
        quantize_from_blocks(model, {"1": (codes, "Q8_0")})


@pytest.mark.parametrize("name", TYPES)
def test_a_llama_file(name: str, tmp_path, monkeypatch) -> None:
    from tests.e2e.tiny_gguf import tiny_llama, write_gguf

    add = gguf.GGUFWriter.add_tensor

    def add_quantized(writer, tensor_name, tensor):
        if tensor.ndim == 1:
            return add(writer, tensor_name, tensor)
        kind = KINDS["Q8_0" if tensor_name == "token_embd.weight" else name]
        return add(writer, tensor_name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_quantized)
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    plain, _ = smollm2.load_gguf(path, torch.float32)
    model, _ = smollm2.load_gguf_quantized(path)
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(found) == 15
    for place, linear in found.items():
        assert torch.equal(linear.weight, plain.get_submodule(place).weight), place
        assert linear.scheme.bits == (8 if place == "lm_head" else TYPES[name][0])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain.eval()(ids).logits)
    rounded, _ = smollm2.load_gguf_quantized(path, "int8")
    assert rounded.lm_head.scheme.activations == "int8"
