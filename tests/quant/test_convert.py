"""llmopt.quantize on whole models: what is replaced, shared and kept, algorithms, and bad requests."""

from __future__ import annotations

import llmopt
import pytest
import torch
from llmopt.quant import flow
from llmopt.quant.calibration import call, samples_of
from llmopt.quant.evaluate import divergence
from llmopt.quant.layers import linears_of, twin_of
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.schemes import SCHEMES, scheme_of

from tests.quant import models

SAMPLES = [{"input_ids": models.tokens(seed=i)} for i in range(3)]


def quantized(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def logits(model: torch.nn.Module, seed: int = 9) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=models.tokens(seed=seed), use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tied_llama(name: str) -> None:
    model = models.llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = llmopt.quantize(model, name)
    layers = quantized(twin)
    assert len(layers) == 15
    assert {m.scheme.name for n, m in layers.items() if n != "lm_head"} == {name}
    assert layers["lm_head"].scheme.name == "w8a16"
    shared = twin.model.embed_tokens.weight, model.model.embed_tokens.weight
    assert len({p.data_ptr() for p in shared}) == 1
    assert model.config.tie_word_embeddings is twin.config.tie_word_embeddings is True
    assert "lm_head.weight" not in twin.all_tied_weights_keys
    assert "lm_head.weight" in model.all_tied_weights_keys
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    far = divergence(logits(model), logits(twin))
    assert 0 < far < (0.02 if name.startswith("w8") else 0.5)
    twin.tie_weights()  # what from_pretrained and resizing do must not undo it
    assert isinstance(twin.lm_head, QuantizedLinear)


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_weight_only_is_the_model_with_rounded_weights(name: str) -> None:
    model = models.gpt2()
    twin = llmopt.quantize(model, name)
    plain = twin_of(model)
    found = quantized(twin)
    assert len(found) == 9
    for place, linear in found.items():
        target = plain.get_submodule(place)
        weight = linear.weight if place == "lm_head" else linear.weight.T
        target.weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(logits(twin), logits(plain), rtol=1e-4, atol=1e-4)


def test_generate_runs_in_eager() -> None:
    twin = llmopt.quantize(models.llama(), "w8a8")
    prompt = models.tokens(1, 5)
    out = twin.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape == (1, 11)
    with torch.no_grad():
        best = twin(out[:, :-1]).logits.argmax(-1)
    assert torch.equal(best[:, 4:], out[:, 5:])


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert, models.mlp])
def test_moving_scales_changes_nothing(make) -> None:
    model = twin_of(make())
    sample = torch.randn(5, 64) if make is models.mlp else SAMPLES[0]
    want = call(model, sample)
    want = want[0] if isinstance(want, tuple | dict) else want
    feeds = flow.feeds_of(model, [sample], linears_of(model))
    modules = dict(model.named_modules())
    for feed in feeds:
        k = (
            modules[feed.targets[0]].in_features
            if hasattr(modules[feed.targets[0]], "in_features")
            else 64
        )
        flow.apply(feed, modules, torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5)
    got = call(model, sample)
    got = got[0] if isinstance(got, tuple | dict) else got
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    expected = {
        models.llama: ["input_layernorm", "post_attention_layernorm", "up_proj"] * 2 + ["norm"],
        models.gpt2: ["ln_1", "ln_2"] * 2,  # ln_f's output is viewed before the head reads it
        models.bert: [],  # its norms feed the residual too
        models.mlp: ["0"],
    }[make]
    assert sorted(f.source.rpartition(".")[2] for f in feeds) == sorted(expected)


def outliers() -> torch.nn.Module:
    """A Llama in which two channels of each norm's output are a hundred times the others."""
    model = models.llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p[[3, 40]] = 100.0
            if name.endswith(
                (
                    "q_proj.weight",
                    "k_proj.weight",
                    "v_proj.weight",
                    "gate_proj.weight",
                    "up_proj.weight",
                )
            ):
                p[:, [3, 40]] /= 100.0
    return model


def test_smoothquant_saves_what_outliers_spoil() -> None:
    model = outliers()
    want = logits(model)
    plain = llmopt.quantize(model, "w8a8")
    smooth = llmopt.quantize(model, "w8a8", SAMPLES)
    assert divergence(want, logits(smooth)) < 0.5 * divergence(want, logits(plain))


@pytest.mark.parametrize("algorithm", ["awq", "gptq", "awq+gptq", "smoothquant+gptq"])
def test_calibration_beats_plain_4_bit_rounding(algorithm: str) -> None:
    model = models.llama()
    # inputs that are not all alike: some tokens' embeddings are much larger in some channels
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :8] *= 6
    samples = [{"input_ids": models.tokens(4, 32, seed=i)} for i in range(3)]
    want = logits(model)
    plain = divergence(want, logits(llmopt.quantize(model, "w4a16")))
    better = divergence(want, logits(llmopt.quantize(model, "w4a16", samples, algorithm=algorithm)))
    assert better < 0.9 * plain


def test_layers_by_name() -> None:
    model = models.llama()
    twin = llmopt.quantize(
        model, "w4a16", layers={"*.0.mlp.down_proj": "w8a8", "*.mlp.*": None, "lm_head": "w4a16"}
    )
    found = quantized(twin)
    assert found["model.layers.0.mlp.down_proj"].scheme.name == "w8a8"
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["lm_head"].scheme.bits == 4
    assert isinstance(twin.model.layers[1].mlp.up_proj, torch.nn.Linear)


def test_attention_modules_that_read_their_weight_are_left() -> None:
    model = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    twin = llmopt.quantize(model, "w8a16")
    assert sorted(quantized(twin)) == ["linear1", "linear2"]
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=0.05, atol=0.05)


def test_a_twin_of_another_dtype_leaves_the_model_alone() -> None:
    model = models.llama()
    want = logits(model)
    twin = llmopt.quantize(model, "w8a8").to(torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), want)
    assert logits(twin).dtype == torch.bfloat16
    assert twin.lm_head.weight.dtype == torch.bfloat16  # what models ask their layers for


def test_tied_parameters_stay_tied_in_a_twin() -> None:
    twin = llmopt.quantize(models.llama(), "w8a8", layers={"lm_head": None})
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_shared_linear_stays_shared() -> None:
    linear = torch.nn.Linear(64, 64)
    twin = llmopt.quantize(torch.nn.Sequential(linear, torch.nn.ReLU(), linear), "w8a8")
    assert twin[0] is twin[2]


def test_training_mode_is_kept() -> None:
    model = models.llama().train()
    twin = llmopt.quantize(model, "w8a8", SAMPLES)
    assert model.training
    assert all(m.training for m in twin.modules())


def test_random_tokens_find_outliers_too() -> None:
    model = outliers()
    plain, smooth = (llmopt.quantize(model, "w8a8", c) for c in (None, "random"))
    want = logits(model)
    assert divergence(want, logits(smooth)) < 0.5 * divergence(want, logits(plain))
    with pytest.raises(
        ValueError, match="'random' is for language models, and Sequential names no"
    ):
        llmopt.quantize(models.mlp(), "w8a8", "random", group=32)
    with pytest.raises(ValueError, match="calibration='text' does not exist"):
        llmopt.quantize(model, "w8a8", "text")


def test_bad_requests() -> None:
    model = models.llama()

    def refused(words: str, *args, **kwargs) -> None:
        with pytest.raises(ValueError, match=words):
            llmopt.quantize(model, *args, **kwargs)

    refused("'w2a2' does not exist; possible: w8a8", "w2a2")
    refused("group=7", "w8a8", group=7)
    refused(
        r"q_proj cannot be quantised to w8a8, groups of 128.*do not divide its 64 inputs",
        "w8a8",
        group=128,
    )
    refused("calibration holds no samples", "w8a8", [])
    refused("calibration holds no samples", "w8a8", iter(()))
    for nothing in ((), {}, [()], [{}]):
        refused("calibration sample 0 holds no inputs", "w8a8", nothing)
    refused("sample 0 holds an empty tensor", "w8a8", [torch.zeros(1, 0, dtype=torch.long)])
    refused("gptq needs calibration samples", "w4a16", algorithm="gptq")
    refused("'magic' does not exist; possible: round", "w4a16", SAMPLES, algorithm="magic")
    refused("alpha=2 is not between", "w8a8", SAMPLES, alpha=2)
    refused("alpha=0.5 is for smoothquant, which was not asked for", "w4a16", SAMPLES, alpha=0.5)
    refused(
        "no linear is named 'lm_tail'; the linears are model.layers.0.self_attn.q_proj",
        layers={"lm_tail": None},
    )
    refused("layers leave every one of the 15 linears as it is", layers={"*": None})
    with pytest.raises(ValueError, match="Tanh holds no linear layer"):
        llmopt.quantize(torch.nn.Tanh())
    for linear in (torch.nn.Linear(64, 8), llmopt.quantize(models.mlp(), "w4a16")[1]):
        with pytest.raises(ValueError, match=r"Linear is the model itself.*Sequential"):
            llmopt.quantize(linear)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    refused("layers.1.mlp.up_proj cannot be quantised .* 1 of its 8192 weights are NaN")


def test_nan_in_calibration_names_the_layer() -> None:
    model = models.mlp()
    with pytest.raises(ValueError, match="NaN or infinite inputs of 1"):
        llmopt.quantize(model, "w8a8", torch.full((2, 64), float("nan")), group=32)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_inputs_too_large_for_second_moments_name_the_layer(algorithm: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    with pytest.raises(ValueError, match=r"inputs of \d up to 1.*e\+25, whose squares"):
        llmopt.quantize(model, "w4a16", torch.full((2, 64), 1e25), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", [None, "awq", "smoothquant+gptq"])
def test_scales_that_cannot_move_are_no_secret(algorithm: str | None, caplog) -> None:
    with caplog.at_level("WARNING", "llmopt"):
        llmopt.quantize(models.bert(), "w8a8", SAMPLES, algorithm=algorithm)
    wanted = f"{(algorithm or 'smoothquant').split('+')[0]} moves nothing in BertModel"
    assert wanted in caplog.text


@pytest.mark.parametrize(("algorithm", "passes"), [("smoothquant", 3), ("awq", 3), ("gptq", 1)])
def test_samples_run_once_per_purpose(algorithm: str, passes: int) -> None:
    """One pass to learn the inputs, and two of the first sample to learn which layer feeds which and to see that it does."""
    model, calls = models.llama(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    llmopt.quantize(model, "w4a16", models.tokens(1, 16), algorithm=algorithm)
    assert len(calls) == passes


def test_the_head_keeps_the_groups_that_were_asked_for() -> None:
    layers = quantized(llmopt.quantize(models.llama(), "w4a8", group=64, symmetric=False))
    assert layers["lm_head"].scheme == scheme_of("w8a16", 64, False)


def test_samples_in_every_form() -> None:
    x = torch.randn(4, 64)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    twins = [
        llmopt.quantize(model, "w4a16", calibration)
        for calibration in (x, (x,), [x], [(x,)], {"input": x}, [{"input": x}], iter([x]))
    ]
    assert len(samples_of(x)) == 1
    assert all(torch.equal(t[0].codes, twins[0][0].codes) for t in twins)


class WithoutAName(torch.nn.Module):
    """A language model that says nothing about its heads, which come first among its parts; it has as many positions as hidden values."""

    def __init__(self, tied: bool = False, heads: int = 2, width: int = 64) -> None:
        super().__init__()
        self.table, self.positions = torch.nn.Embedding(160, width), torch.nn.Embedding(96, width)
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(width, 160, bias=False) for _ in range(heads)
        )
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.Linear(width, 96), torch.nn.Linear(96, width)
        )
        self.value = torch.nn.Linear(width, 1)
        for head in self.heads if tied else ():
            head.weight = self.table.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [0, 1, 2])
def test_heads_are_found_by_their_weights(heads: int, tied: bool) -> None:
    twin = llmopt.quantize(torch.nn.Sequential(WithoutAName(tied, heads)), "w4a16")[0]
    assert [head.scheme.name for head in twin.heads] == ["w8a16"] * heads
    assert {layer.scheme.name for layer in (*twin.layers, twin.value)} == {"w4a16"}


def test_a_hidden_layer_as_wide_as_the_table_is_no_head() -> None:
    """The last one is; where the embedding has no more rows than columns, nothing says which is."""
    model = torch.nn.Sequential(torch.nn.Embedding(160, 64), torch.nn.Linear(64, 160))
    model.extend([torch.nn.ReLU(), torch.nn.Linear(160, 64), torch.nn.Linear(64, 160)])
    names = {n: m.scheme.name for n, m in quantized(llmopt.quantize(model, "w4a16")).items()}
    assert names == {"1": "w4a16", "3": "w4a16", "4": "w8a16"}
    square = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64))
    assert quantized(llmopt.quantize(square, "w4a16"))["1"].scheme.name == "w4a16"
