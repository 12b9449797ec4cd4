"""The option `precision`, and models that hold codes already: results, plans, repacking, bad weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llmopt
import pytest
import torch
import torch.nn.functional as F
from llmopt import messages
from llmopt.compiled import alive
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import SCHEMES
from llmopt.target import target
from torch import Tensor, nn

from tests.e2e import zoo
from tests.e2e.blocks import Tied, build, continued
from tests.quant.models import llama

# scheme → how far random weights may be from the float result
ERRORS = {"w8a8": 0.02, "w8a16": 0.01, "w4a16": 0.12, "w4a8": 0.12}

# scheme → rows from which its activations are bf16 on AMX instead of codes (least_term_rows of csrc/cpu/linear_quantized/terms.h)
BF16_ROWS = {"w8a8": 64, "w4a8": 40}


class Mlp(nn.Module):
    """Norm, gate and up, down with residual, and a layer whose 30 inputs no group divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down, self.odd, self.head = nn.Linear(128, 64), nn.Linear(64, 30), nn.Linear(30, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(F.relu(self.odd(x)))


@pytest.fixture(autouse=True)
def only_llmopt(backend: str) -> None:
    if backend != "llmopt":
        pytest.skip("about llmopt's own kernels")


def compiled(module: nn.Module, precision: str):
    return torch.compile(module, backend="llmopt", options={"precision": precision})


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ERRORS)
@torch.no_grad()
def test_results_are_near(precision: str, dtype: torch.dtype) -> None:
    module = Mlp().to(dtype)
    run = compiled(module, precision)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 64).to(dtype)
        limit = ERRORS[precision] + (0.02 if dtype == torch.bfloat16 else 0.0)
        assert 1e-5 < relative(run(x), module(x)) < limit


@torch.no_grad()
def test_the_plan_says_what_is_quantised_and_what_is_not() -> None:
    compiled(Mlp(), "w4a8")(torch.randn(3, 64))
    details = [r.detail for r in alive()[-1].plan.records()]
    assert [d.split(" groups")[0] for d in details[:3]] == [
        "256x64 w4a8",
        "64x128 w4a8",
        "30x64 w4a8",
    ]
    assert "rms_norm+silu+gated" in details[0]
    assert "groups of 32 do not divide its 30 inputs" in details[3]


@torch.no_grad()
def test_the_option_group_is_that_of_quantize() -> None:
    model, ids, results = llama(True), torch.arange(3, 93)[None], []
    for group, inputs in ((None, 64), (32, 32), ("channel", 128)):
        options = {"precision": "w8a8"} | ({} if group is None else {"group": group})
        for module, how in ((model, options), (llmopt.quantize(model, "w8a8", group=group), {})):
            torch._dynamo.reset()
            results.append(torch.compile(module, backend="llmopt", options=how)(ids).logits)
            linears = [r for r in alive()[-1].plan.records() if r.op == "linear_quantized"]
            assert len(linears) == 9
            assert f"64x128 w8a8 groups of {inputs} " in linears[3].detail
        assert torch.equal(results[-1], results[-2])
    assert len({r.sum().item() for r in results}) == 3


@torch.no_grad()
def test_what_stays_exact_is_no_secret(caplog, monkeypatch) -> None:
    monkeypatch.setattr(messages, "_said", set())
    with caplog.at_level("WARNING", "llmopt"):
        run = compiled(Mlp(), "w4a8")
        for rows in (3, 5):  # a graph each
            run(torch.randn(rows, 64))
        reason = "leaves exact: head.weight: groups of 32 do not divide its 30 inputs"
        assert caplog.text.count(reason) == 1
        caplog.clear()
        module = Mlp().double()
        x = torch.randn(3, 64).double()
        torch.testing.assert_close(compiled(module, "w8a8")(x), module(x))
    assert "gate.weight: weights of torch.float64: f32, f16 and bf16 can be rounded" in caplog.text
    assert "and 4 more: LLMOPT_DEBUG=1" in caplog.text


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_llama_generates(precision: str, tied: bool) -> None:
    """The compile option gives the tokens of llmopt.quantize with the same scheme, through prefill and decode."""
    model = llama(tied)
    wanted = llmopt.quantize(model, precision)
    prompt = torch.arange(1, 8)[None]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    arguments |= {"return_dict_in_generate": True, "output_logits": True, "logits_to_keep": 0}
    want = wanted.generate(prompt, **arguments)
    model.compile(backend="llmopt", options={"precision": precision, "attention": "exact"})
    prompts: list[Tensor] = []
    zoo.after_first_call(model, lambda output: prompts.append(output.logits))
    got = model.generate(prompt, **arguments)
    assert torch.equal(got.sequences, want.sequences)
    assert relative(prompts[0], wanted(prompt).logits) < 5e-3
    assert relative(torch.cat(got.logits), torch.cat(want.logits)) < 5e-3
    for graph in alive()[-2:]:  # the prompt's and the next tokens'
        details = [r.detail for r in graph.plan.records() if r.op.startswith("linear")]
        assert len(details) == 9  # qkv, o, gate and up, down, twice; the head
        assert all(precision in d for d in details[:-1])
        assert "160x64 w8a16" in details[-1]


@torch.no_grad()
def test_attention_rounds_where_linears_do() -> None:
    """Products in bf16 are the default beside activations of 8 bits, through both doors, and nowhere else."""

    def attentions(model: nn.Module, options: dict[str, str]) -> set[bool]:
        torch._dynamo.reset()
        torch.compile(model, backend="llmopt", options=options)(torch.arange(3, 43)[None])
        records = [r for r in alive()[-1].plan.records() if r.op == "attention"]
        return {"+bf16_allowed" in r.detail for r in records}

    model = llama(True, layers=1)
    for precision in ("w8a8", "w4a8"):
        assert attentions(model, {"precision": precision}) == {True}
        assert attentions(llmopt.quantize(model, precision), {}) == {True}
        assert attentions(model, {"precision": precision, "attention": "exact"}) == {False}
    for precision in ("exact", "w8a16", "w4a16"):
        assert attentions(model, {"precision": precision}) == {False}
        assert attentions(model, {"precision": precision, "attention": "bf16"}) == {True}
    assert attentions(llmopt.quantize(model, "w8a8"), {"precision": "auto"}) == {False}


@torch.no_grad()
def test_what_rounding_in_attention_changes() -> None:
    model, ids = llama(True), torch.arange(3, 73)[None]
    got = {}
    for attention in ("exact", "bf16"):
        torch._dynamo.reset()
        options = {"precision": "w8a8", "attention": attention}
        got[attention] = torch.compile(model, backend="llmopt", options=options)(ids).logits
    torch._dynamo.reset()
    assert torch.equal(compiled(model, "w8a8")(ids).logits, got["bf16"])
    want = model(ids).logits
    assert relative(got["bf16"], want) < 1.2 * relative(got["exact"], want)
    rounds = target().tier in ("amx", "avx512_vnni")
    assert torch.equal(got["bf16"], got["exact"]) == (not rounds)


@torch.no_grad()
def test_a_layout_for_gpus_runs_as_in_pytorch() -> None:
    """Linears that round their inputs, beside a cache whose attention the CPU has no kernel for."""
    model, ids = llama(True), torch.arange(3, 43)[None]
    rows, arrays = (llmopt.KVCache(model, layout=layout) for layout in ("rows", "arrays"))
    want, fast = model(ids).logits, compiled(model, "w8a8")
    native = relative(fast(ids, past_key_values=rows).logits, want)
    assert relative(fast(ids, past_key_values=arrays).logits, want) < 1.2 * native


@torch.no_grad()
def test_the_head_keeps_eight_bits() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(100, 64), nn.Linear(64, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.body(self.table(ids)), self.table.weight)

    compiled(Tied(), "w4a16")(torch.arange(5))
    details = [r.detail for r in alive()[-1].plan.records()]
    assert any("64x64 w4a16" in d for d in details)
    assert any("100x64 w8a16" in d for d in details)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_head_is_the_same_for_tokens_and_for_their_embeddings(tied: bool) -> None:
    model, ids = llama(tied), torch.arange(3, 9)[None]
    fast = compiled(model, "w4a16")
    embeds = model.get_input_embeddings()(ids)
    assert relative(fast(inputs_embeds=embeds).logits, fast(ids).logits) < 1e-5
    (head,) = [
        r.detail for r in alive()[-1].plan.records() if f"{model.config.vocab_size}x" in r.detail
    ]
    assert "w8a16" in head


@torch.no_grad()
def test_an_edited_weight_is_rounded_again() -> None:
    module = Mlp()
    run = compiled(module, "w8a8")
    x = torch.randn(3, 64)
    before = run(x)
    module.down.weight.mul_(2)
    assert relative(run(x), module(x)) < 0.02
    assert relative(before, module(x)) > 0.1


class Spectrum(nn.Module):
    """A fixed basis, which is a buffer, in front of what is learnt."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(64)[:, None] * torch.arange(64) * 2 * torch.pi / 64
        self.register_buffer("basis", angles.cos())
        self.last = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        power = (x @ self.basis.T).square()
        return power, self.last((power + 1e-6).log())


@pytest.mark.parametrize("precision", ["w8a8", "w4a16", "auto"])
@torch.no_grad()
def test_buffers_are_not_rounded(precision: str, caplog) -> None:
    torch.manual_seed(0)
    model, x = Spectrum().eval(), (torch.arange(64) * 0.3).sin()[None] + torch.zeros(3, 1)
    run = torch.compile(model, backend="llmopt", options={"precision": precision})
    got, want = run(x), model(x)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert precision == "auto" or "basis: a buffer" in caplog.text


@pytest.mark.parametrize("precision", ["w8a8", "w4a16", "w4a8"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_a_linear_without_outputs_beside_another(precision: str) -> None:
    none, some = nn.Linear(64, 0), nn.Linear(64, 64)
    x = torch.randn(2, 9, 64)
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: torch.cat([none(x), some(x)], -1),
        backend="llmopt",
        options={"precision": precision},
    )
    assert (run(x) - some(x)).norm() < 0.15 * some(x).norm()


@torch.no_grad()
def test_bad_weights_are_an_error() -> None:
    module = Mlp()
    module.down.weight[3, 5] = float("nan")
    words = r"cannot round down.weight to w8a8, groups of 64, symmetric: 1 of its 8192 weights are NaN or infinite"
    with pytest.raises(ValueError, match=words):
        compiled(module, "w8a8")(torch.randn(3, 64))


@pytest.mark.parametrize("precision", ERRORS)
@torch.no_grad()
def test_a_nan_in_a_token_spoils_that_token_alone(precision: str) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = float("nan")
    y = compiled(Mlp(), precision)(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("precision", ERRORS)
@torch.no_grad()
def test_modules_that_hold_codes(precision: str) -> None:
    """They compile to the same fused steps and compute what they compute in eager."""
    scheme = SCHEMES[precision]
    module = Mlp()
    for name in ("gate", "up", "down", "odd"):
        linear = getattr(module, name)
        if scheme.reject(linear.in_features):
            continue
        codes = round_weight(linear.weight, scheme)
        setattr(module, name, QuantizedLinear(codes, linear.bias, scheme))
    run = torch.compile(module, backend="llmopt")
    for rows in (1, 23, 40, 90):
        x = torch.randn(rows, 64)
        in_bf16 = target().tier == "amx" and rows >= BF16_ROWS.get(precision, rows + 1)
        # A rounded activation may differ by a code.
        assert relative(run(x), module(x)) < (1e-2 if in_bf16 else 2e-3)
    details = [r.detail for r in alive()[-1].plan.records()]
    assert "rms_norm+silu+gated" in details[0]
    assert precision in details[0]


NEW_PROCESS = """
import json, sys, llmopt, torch
from llmopt.compiled import alive
from tests.e2e.blocks import Tied, continued
model = torch.compile(llmopt.load_quantized(sys.argv[1], Tied), backend="llmopt")
print(json.dumps([*continued(model), [r.kernel for r in alive()[0].plan.records()]]))
"""


def test_a_saved_model_compiled_in_a_new_process_gives_the_same_tokens(tmp_path: Path) -> None:
    """Those of the model that was saved, in eager; in the new process the codes' own kernels give them."""
    model = llmopt.quantize(build(Tied), "w8a8", group="channel")
    llmopt.save_quantized(model, tmp_path)
    call = [sys.executable, "-c", NEW_PROCESS, str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, logits, kernels = json.loads(done.stdout)
    wanted, last = continued(model)
    assert tokens == wanted
    assert relative(torch.tensor(logits), torch.tensor(last)) < 5e-3
    assert kernels.count("linear_quantized.cpu") == 5
