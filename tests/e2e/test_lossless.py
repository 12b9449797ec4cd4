"""Float32 weights that fewer bits hold as they are: stored so, the same results, and given up where a weight is not held, or no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmopt
import pytest
import torch
from llmopt import executor
from llmopt.auto import choose as auto
from llmopt.auto import timing
from llmopt.auto.plans import LayerShape
from llmopt.compiled import alive
from llmopt.lossless import look_at
from llmopt.passes import pipeline
from llmopt.quant.rounding import Codes
from llmopt.quant.schemes import W8A8, CodeForm, Scheme
from torch import fx, nn

from tests.e2e import zoo
from tests.e2e.blocks import Block, build
from tests.e2e.compare import assert_same_output

WIDTH = 64
Q4_0, Q4_1, Q8_0 = CodeForm(4, 32, True), CodeForm(4, 32, False), CodeForm(8, 32, True)
WORDS = {Q4_0: "4-bit", Q4_1: "4-bit", Q8_0: "8-bit", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def of_codes(n: int, k: int, form: CodeForm) -> torch.Tensor:
    """A weight [n,k] as a GGUF file's blocks become floats: scales in fp16, codes from end to end in every block."""
    scales = (torch.rand(n, k // 32) + 0.5).half().float() / k**0.5 / (60 if form.bits == 8 else 5)
    scales = scales.half().float()
    offsets = None if form.symmetric else (-8 * scales).half().float()
    if form.bits == 8:
        codes = torch.randint(-127, 128, (n, k)).to(torch.int8)
        codes[:, ::32] = 127
    else:
        codes = torch.randint(0, 256, (n, k // 2)).to(torch.uint8)
        codes[:, ::16] = 0xF0
    return Codes(codes, scales, offsets).weight(form.bits)


def hold(weight: torch.Tensor, form: CodeForm | torch.dtype) -> None:
    """Makes a weight one that a form holds."""
    if isinstance(form, torch.dtype):
        weight.copy_(weight.to(form).float())
    else:
        weight.copy_(of_codes(*weight.shape, form))


def block(form: CodeForm | torch.dtype) -> Block:
    module = build(lambda: Block(WIDTH, heads=2))
    module.down = nn.Linear(96, WIDTH)
    module.up = nn.Linear(WIDTH, 96)
    for p in module.parameters():
        if p.dim() == 2:
            hold(p, form)
    return module


def x_of(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(module, backend="llmopt", options=options)


def linears() -> list[str]:
    """The linears of the graph that was compiled last, in words."""
    plan = alive()[-1].plan
    assert plan is not None
    return [f"{r.kernel} {r.detail}" for r in plan.records() if "linear" in r.op]


def lossless() -> list[bool]:
    return ["lossless" in words for words in linears()]


def packed_bytes() -> int:
    return sum(weight.bytes for weight in alive()[-1].packed())


@pytest.mark.parametrize("form", WORDS, ids=str)
def test_held_weights_are_stored_in_fewer_bits(form: CodeForm | torch.dtype) -> None:
    module = block(form)
    other = compiled(module, storage="same")
    for tokens in (1, 7, 70):
        assert_same_output(other(x_of(tokens)), module(x_of(tokens)))
    assert lossless() == [False] * 4
    wide = packed_bytes()
    fast = compiled(module)
    for tokens in (1, 7, 70):
        assert_same_output(fast(x_of(tokens)), module(x_of(tokens)))
    assert all(f"{WORDS[form]}" in words and "lossless" in words for words in linears())
    slack = 4 * 8192
    assert (
        packed_bytes() - slack
        <= (wide - slack)
        * (form.itemsize if isinstance(form, torch.dtype) else form.bits / 8 + 0.125)
        / 4
        + 4 * 64 * WIDTH
    )


def test_other_weights_stay_as_they_are() -> None:
    module = build(lambda: Block(WIDTH, heads=2))
    assert_same_output(compiled(module)(x_of(5)), module(x_of(5)))
    assert lossless() == [False] * 4


def test_weights_side_by_side_share_what_holds_all_of_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x) * self.v(x)

    module = Attention().eval()
    for forms, words in (
        ((Q4_1, Q4_1, Q4_1), "4-bit"),
        ((torch.bfloat16, torch.bfloat16, torch.bfloat16), "bf16"),
        ((Q4_1, torch.bfloat16, Q8_0), ""),
    ):
        torch._dynamo.reset()
        for linear, form in zip((module.q, module.k, module.v), forms, strict=True):
            hold(linear.weight, form)
        assert_same_output(compiled(module)(x_of(5)), module(x_of(5)))
        found = linears()
        assert len(found) == 1, "the three are one product"
        assert words in found[0]
        assert ("lossless" in found[0]) == bool(words)


def nudge(module: Block) -> None:
    module.up.weight[50, 33] += 1e-3


def nudge_the_data(module: Block) -> None:
    module.up.weight.data.mul_(1.01)


def load(module: Block) -> None:
    other = build(lambda: Block(WIDTH, heads=2), seed=3)
    state = {k: v for k, v in other.state_dict().items() if "up." not in k and "down." not in k}
    module.load_state_dict(state, strict=False)


def assign(module: Block) -> None:
    module.up.weight = nn.Parameter(torch.randn(96, WIDTH))


def infinite(module: Block) -> None:
    module.down.weight[3, 3] = float("inf")


def not_a_number(module: Block) -> None:
    module.up.weight[3, 3] = float("nan")


@pytest.mark.parametrize("weights", ["keep", "packed"])
@pytest.mark.parametrize(
    "change",
    [nudge, nudge_the_data, load, assign, infinite, not_a_number],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("form", [Q4_1, Q8_0, torch.bfloat16], ids=str)
def test_an_edit_that_is_not_held(
    form: CodeForm | torch.dtype, change: Callable[[Block], None], weights: str
) -> None:
    """The next call is right, and packs what changed as it is."""
    module = block(form)
    fast = compiled(module, weights=weights)
    assert_same_output(fast(x_of(70)), module(x_of(70)))
    assert_same_output(fast(x_of(1)), module(x_of(1)))
    change(module)
    llmopt.refresh()
    for tokens in (1, 70, 1):
        assert_same_output(fast(x_of(tokens)), module(x_of(tokens)))
    if change is not assign:  # of which a new graph is made
        assert sum(lossless()) == (2 if change is load else 3)
    hold(module.qkv.weight, form)
    assert_same_output(fast(x_of(70, 2)), module(x_of(70, 2)))


def test_a_weight_whose_first_rows_alone_are_held() -> None:
    """What is looked at while the graph is compiled is not all."""
    module = block(Q4_1)
    module.up.weight[17] = torch.randn(WIDTH)
    module.qkv.weight[100, 60] += 1e-4
    fast = compiled(module)
    for tokens in (1, 70):
        assert_same_output(fast(x_of(tokens)), module(x_of(tokens)))
    assert sum(lossless()) == 2
    report = llmopt.explain(fast, x_of(70))
    assert sum("lossless" in str(step.detail) for step in report.steps) == 2


def test_models_that_share_a_graph_have_forms_of_their_own() -> None:
    """Dynamo compiles one forward once for modules alike; each call finds what its own weights are packed in."""
    forms = (None, Q4_1, torch.bfloat16, Q8_0)
    modules = [build(lambda: Block(WIDTH, heads=2)) if f is None else block(f) for f in forms]
    modules[0].up, modules[0].down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
    fast = [compiled(module) for module in modules]
    before = len(alive())
    for _ in range(3):
        for module, call, form in zip(modules, fast, forms, strict=True):
            assert_same_output(call(x_of(5)), module(x_of(5)))
            assert lossless() == [form is not None] * 4
            assert form is None or all(WORDS[form] in words for words in linears())
    assert len(alive()) == before + 1, "one graph for all"
    hold(modules[0].up.weight, Q4_1)
    assert_same_output(fast[0](x_of(5)), modules[0](x_of(5)))
    assert lossless() == [False, False, True, False], "back on a grid"


@pytest.mark.parametrize("form", [Q4_1, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_whatever_dtype_is_the_default(dtype: torch.dtype, form: CodeForm | torch.dtype) -> None:
    module, x = block(form), x_of(5)
    want = module(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert_same_output(compiled(module)(x), want)
    finally:
        torch.set_default_dtype(before)
    assert lossless() == [True] * 4


def test_zeros_are_where_training_begins() -> None:
    module = nn.Linear(WIDTH, WIDTH).eval()
    module.weight.zero_()
    fast = compiled(module)
    assert_same_output(fast(x_of(3)), module(x_of(3)))
    assert lossless() == [False]
    module.weight.normal_()
    assert_same_output(fast(x_of(3)), module(x_of(3)))
    assert lossless() == [False]


def test_gradients_between_calls() -> None:
    module = block(torch.bfloat16)
    fast = compiled(module)
    assert_same_output(fast(x_of(5)), module(x_of(5)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        with torch.enable_grad():
            fast(x_of(5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same_output(fast(x_of(5)), module(x_of(5)))


def test_segments_that_lose_one_after_the_other_run_once() -> None:
    """What the first segment wrote in place is not written twice because the second one cannot go on as it was."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = block(Q4_1), block(Q4_1)
            self.register_buffer("seen", torch.zeros(2, 3, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            self.seen += y
            return self.b(torch.special.i0(y).clamp(-1, 1)) + self.seen

    module, same = Counting().eval(), Counting().eval()
    same.load_state_dict(module.state_dict())
    fast = compiled(module)
    for step in range(4):
        if step == 2:
            for m in (module, same):
                m.b.up.weight[5, 5] += 1e-3
        assert_same_output(fast(x_of(3)), same(x_of(3)))
        assert_same_output(module.seen, same.seen)


def test_explain_names_what_each_call_ran() -> None:
    """Modules that share a graph and are stored in other forms, in one call."""
    modules = [nn.Linear(WIDTH, WIDTH, bias=False).eval() for _ in range(3)]
    for module in modules[:2]:
        hold(module.weight, torch.bfloat16)
    fast = {module: compiled(module) for module in modules}

    def chain(x: torch.Tensor) -> torch.Tensor:
        for module in modules:
            x = fast[module](x)
        return x

    for order in (modules, modules[::-1]):
        modules = order
        chain(x_of(3))
        steps = llmopt.explain(chain, x_of(3)).steps
        want = ["lossless" if m.weight.bfloat16().float().equal(m.weight) else "" for m in modules]
        assert ["lossless" if "lossless" in s.detail else "" for s in steps] == want
        sizes = [4096 * (2 if words else 4) for words in want]
        rows = 2 * 2 * 3 * WIDTH * 4  # in and out
        assert [s.bytes for s in steps] == [size + rows for size in sizes]


def test_an_edit_between_calls_of_another_model_is_not_forgotten() -> None:
    """Weights that another segment packs since an edit are never read as they were before it."""
    modules = [nn.Linear(WIDTH, WIDTH, bias=False).eval() for _ in range(2)]
    for module in modules:
        hold(module.weight, torch.bfloat16)
    fast = [compiled(module) for module in modules]
    for step in range(12):
        if step in (3, 7):
            modules[0].weight.data[0, step] += 1e-3  # in a row that is looked at
            fast[0](x_of(3))
            if step == 7:
                llmopt.refresh()
        if (
            step in (4, 5, 6)
        ):  # until the edit through .data has been seen, which the window does at once for so small a weight
            fast[0](x_of(3))
        for module, call in zip(modules, fast, strict=True):
            got = call(x_of(3))
            if step not in (3, 4, 5, 6):
                assert_same_output(got, module(x_of(3)))


def test_edits_without_end_make_no_segments_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_MOST_FORMS", 8)
    module = block(torch.bfloat16)
    fast = compiled(module)
    for step in range(30):
        which = [module.qkv, module.out, module.up, module.down]
        for i, linear in enumerate(which):  # another subset is held each time
            hold(linear.weight, torch.bfloat16)
            if step >> i & 1:
                linear.weight[2, 2] += 1e-3
        assert_same_output(fast(x_of(3)), module(x_of(3)))
        assert lossless() == [not step >> i & 1 for i in range(4)]
    (segment,) = alive()[-1].segments()
    assert len(segment._family.all()) == 8


def test_threads_that_meet_an_edit_together() -> None:
    module = block(Q4_1)
    fast = compiled(module)
    fast(x_of(5))
    for _ in range(5):
        hold(module.up.weight, Q4_1)
        module.up.weight[7, 7] += 1e-3
        want, got, start = module(x_of(5)), [], threading.Barrier(2)

        def call(start: threading.Barrier = start, got: list[torch.Tensor] = got) -> None:
            start.wait()
            with torch.no_grad():
                got.append(fast(x_of(5)))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert len(got) == 2
        for result in got:
            assert_same_output(result, want)


def test_layers_that_share_a_graph_and_are_held_by_different_forms() -> None:
    model, same = (zoo.make("llama", num_hidden_layers=4) for _ in range(2))
    for i, layer in enumerate(model.model.layers):
        for p in layer.parameters():
            if p.dim() == 2 and i != 2:
                p.copy_(p.bfloat16().float())
    same.load_state_dict(model.state_dict())
    assert llmopt.mark_layers(model) == 4
    model.compile(backend="llmopt")
    for length in (9, 5, 9):
        x = zoo.inputs("llama", length)
        assert_same_output(model(**x), same(**x))


def test_generate_from_weights_of_sixteen_bits() -> None:
    model, same = zoo.make("llama"), zoo.make("llama")
    for p in model.parameters():
        p.copy_(p.bfloat16().float())
    same.load_state_dict(model.state_dict())
    model.compile(backend="llmopt")
    x = zoo.inputs("llama", 9)
    want = same.generate(**x, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**x, max_new_tokens=6, do_sample=False), want)
    assert any(lossless())


@pytest.mark.parametrize("form", [Q4_1, Q8_0, torch.bfloat16, torch.float16], ids=str)
def test_experts(form: CodeForm | torch.dtype) -> None:
    """One weight after the other; one of an expert that is not held makes all of that product be packed as they are."""
    sizes = {"hidden_size": 96, "intermediate_size": 64}
    model, same = zoo.make("mixtral", **sizes), zoo.make("mixtral", **sizes)
    for name, p in model.named_parameters():
        if "experts" in name:
            for expert in p:
                hold(expert, form)
    same.load_state_dict(model.state_dict())
    model.compile(backend="llmopt")

    def check(products: int) -> None:
        for length in (24, 3):
            x = zoo.inputs("mixtral", length)
            assert_same_output(model(**x), same(**x))
        grouped = [words for words in linears() if "grouped" in words]
        assert sum("lossless" in words for words in grouped) == products, grouped

    layers = len(same.model.layers)
    check(2 * layers)
    for m in (model, same):
        m.model.layers[-1].mlp.experts.down_proj[-1, 5, 5] += 1e-3
    check(2 * layers - 1)


def test_max_autotune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    for form in (Q4_1, torch.bfloat16):
        module = block(form)
        fast = compiled(module, mode="max-autotune")
        for tokens in (1, 40, 130):
            assert_same_output(fast(x_of(tokens)), module(x_of(tokens)))
        assert lossless() == [True] * 4
        assert any(tmp_path.rglob("*.json"))


def test_auto_times_exact_layers_as_they_are_stored() -> None:
    """A scheme has to beat that."""
    seen: list[LayerShape] = []

    def seconds(shape: LayerShape, scheme: Scheme | None) -> float:
        seen.append(shape)
        return 1.0 if scheme is None else 2.0

    module = nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, WIDTH)).eval()
    hold(module[0].weight, torch.bfloat16)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for _, run in pipeline.passes(lambda _: None, ()):
            run(gm.graph)
        chosen = auto.choose(gm, inputs, seconds=seconds, lossless=look_at(gm, inputs))
        assert chosen is not None
        assert set(chosen.decision.choice.values()) == {"exact"}
        gm.recompile()
        return gm

    torch.compile(module, backend=backend)(x_of(3))
    assert {(s.k, s.stored) for s in seen} == {(WIDTH, torch.bfloat16), (96, None)}
    words = timing.problem_of(LayerShape(1, 64, 64, torch.float32, stored=torch.bfloat16), None)
    assert (words.x, words.w, words.exact) == ("f32", "bf16", False)
    shape = LayerShape(1, 64, 64, torch.float32, stored=Q4_1)
    codes = timing.problem_of(shape, None)
    assert (codes.w, codes.group, codes.offsets, codes.planes) == ("q4", 32, True, 3)
    assert codes.exact
    assert not timing.problem_of(shape, W8A8).exact


def test_storage_is_lossless_or_the_same() -> None:
    with pytest.raises(Exception, match="storage='half' does not exist; possible: lossless, same"):
        compiled(block(Q4_0), storage="half")(x_of(3))
