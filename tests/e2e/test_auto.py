"""precision="auto": what is chosen with made-up times, that it stays inside the budget, and that explain says why."""

from __future__ import annotations

import json

import llmopt
import pytest
import torch
from llmopt.auto import choose as auto
from llmopt.auto import module, timing
from llmopt.auto.comparison import STATES, WORST, half_squared_error
from llmopt.auto.plans import DECODE, PREFILL, LayerShape, timed_plans, worth_trying
from llmopt.compiled import alive
from llmopt.passes import pipeline
from llmopt.quant.evaluate import divergence
from llmopt.quant.module import QuantizedExperts, QuantizedLinear
from llmopt.quant.schemes import SCHEMES, W4A8, W8A8
from llmopt.tune.measure import LinearBench
from llmopt.types import LinearConfig, LinearProblem
from torch import nn

from tests.e2e import zoo
from tests.quant.models import bert, llama, mlp, tokens

COST = {"exact": 4.0, "w8a16": 3.0, "w8a8": 2.0, "w4a16": 1.5, "w4a8": 1.0}


@pytest.fixture(autouse=True)
def only_llmopt(backend: str) -> None:
    if backend != "llmopt":
        pytest.skip("about llmopt's own kernels")


def fake_seconds(shape: LayerShape, scheme) -> float:
    """Fewer bits are faster; at decode rounding activations does not pay."""
    name = "exact" if scheme is None else scheme.name
    if shape.m == DECODE.m and name.endswith("a8"):
        return 1e-9 * shape.n * shape.k * (COST[name.replace("a8", "a16")] + 0.1)
    return 1e-9 * shape.n * shape.k * shape.m * COST[name]


@pytest.fixture(autouse=True)
def made_up_times(monkeypatch) -> None:
    real = auto.choose
    monkeypatch.setattr(
        auto,
        "choose",
        lambda *given, lossless: real(*given, fake_seconds, lossless=lossless),
    )


@pytest.fixture
def made_up_module_times(monkeypatch) -> None:
    monkeypatch.setattr(module, "LayerClock", lambda: fake_seconds)


def compiled(model: nn.Module, **options):
    return torch.compile(model, backend="llmopt", options={"precision": "auto", **options})


def schemes_of(graph) -> list[str]:
    """The scheme of every linear step."""
    details = [r.detail for r in graph.plan.records() if r.op.startswith("linear")]
    return [next((s for s in SCHEMES if f" {s} " in f"{d} "), "exact") for d in details]


@pytest.mark.parametrize("budget", [1e-4, 0.01, 10.0])
@torch.no_grad()
def test_the_choice_stays_inside_the_budget(budget: float) -> None:
    model = llama()
    ids = tokens(2, 40)
    want = model(ids, use_cache=False).logits
    got = compiled(model, accuracy_budget=budget)(ids, use_cache=False).logits
    assert divergence(want, got) <= 1.05 * budget  # kernels and references differ by a code or two
    decision = alive()[-1].decision
    assert decision.budget == budget
    assert set(decision.choice.values()) != {"exact"}
    if budget == 10.0:  # everything fits: the fastest of all
        assert set(schemes_of(alive()[-1])) == {"w4a8"}
    if budget == 1e-4:
        assert "w4a8" not in schemes_of(alive()[-1])


@torch.no_grad()
def test_a_budget_that_nothing_meets_leaves_the_model_exact(caplog) -> None:
    model, ids = llama(), tokens(1, 12)
    with caplog.at_level("WARNING", "llmopt"):
        got = compiled(model, accuracy_budget=0.0)(ids, use_cache=False).logits
    assert (
        "every layer stays exact: no faster scheme stays inside the accuracy budget of 0"
        in caplog.text
    )
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert set(schemes_of(alive()[-1])) == {"exact"}


@torch.no_grad()
def test_prefill_and_decode_read_the_same_codes() -> None:
    """One packed weight per layer: decode reads it with activations as they are, where that is faster."""
    model = llama()
    prompt = tokens(1, 9)
    model.compile(backend="llmopt", options={"precision": "auto", "accuracy_budget": 10.0})
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    prefill, *_, decode = [g for g in alive() if g.decision is alive()[-1].decision]
    assert set(prefill.decision.choice.values()) == {"w4a16 at decode, w4a8 at prefill"}
    assert schemes_of(prefill) == ["w4a8"] * 8 + ["w4a16"]  # generate asks for one row of logits
    assert set(schemes_of(decode)) == {"w4a16"}


@torch.no_grad()
def test_explain_says_what_was_chosen_and_why_not_the_others(tmp_path) -> None:
    model, ids = llama(), tokens(1, 40)
    report = llmopt.explain(compiled(model, accuracy_budget=0.01), ids, use_cache=False)
    (decision,) = report.decisions
    text = str(report)
    assert f"precision='auto': {decision.summary()}" in report.summary()
    layer = "model.layers.0.mlp.down_proj"
    rows = [line for line in text.splitlines() if line.startswith(f"{layer} ")]
    assert [r.split()[1] for r in rows] == ["exact", "w8a16", "w8a8", "w4a16", "w4a8"]
    assert sum("chosen" in r for r in rows) == 1
    assert all("chosen" in r or "refused: " in r for r in rows)
    assert all("prefill" in r and "µs" in r and "KL" in r for r in rows)
    report.to_json(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["decisions"][0]["budget"] == 0.01


def last(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(mlp(), *layers)


class Plus(nn.Module):
    """x + linear(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class SoftCap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 30.0) * 30.0


class Normalized(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("model", "measure"),
    [
        (mlp(), "KL"),
        (last(SoftCap()), "KL"),
        (last(nn.Unflatten(-1, (2, 4)), nn.Flatten(-2)), "KL"),
        (last(nn.Linear(8, 1)), "error²/2"),
        (last(nn.ReLU()), "error²/2"),
        (last(nn.LayerNorm(8)), "error²/2"),
        (last(Normalized()), "error²/2"),
        (Plus(), "error²/2"),
    ],
    ids=["linear", "soft-cap", "views", "one-feature", "relu", "norm", "unit-length", "residual"],
)
@torch.no_grad()
def test_only_what_a_linear_gives_is_compared_as_logits(model: nn.Module, measure: str) -> None:
    compiled(model)(torch.randn(40, 64))
    assert alive()[-1].decision.measure == measure


@pytest.mark.parametrize("door", ["compile", "quantize"])
@torch.no_grad()
def test_states_of_an_encoder_stay_inside_the_budget(door, made_up_module_times) -> None:
    """A softmax of states would let everything pass; their error does not."""
    model, ids, budget = bert(), tokens(4, 24), 1e-3
    want = model(ids).last_hidden_state
    rough = llmopt.quantize(model, "w4a8")(ids).last_hidden_state
    assert divergence(want, rough) > 0
    assert half_squared_error(want, rough) > budget
    if door == "compile":
        got = compiled(model, accuracy_budget=budget)(ids).last_hidden_state
        decision = alive()[-1].decision
    else:
        small = llmopt.quantize(model, "auto", ids, accuracy_budget=budget)
        got, decision = small(ids).last_hidden_state, small.llmopt_decision
    assert decision.measure == "error²/2"
    assert "w8a8" in decision.choice.values()
    assert half_squared_error(want, got) <= 1.05 * budget
    assert f"error²/2 {decision.divergence:.5f} of at most 0.001" in decision.summary()


def test_half_the_squared_error_is_one_minus_the_cosine() -> None:
    a = torch.randn(700, 32)
    b = a + 0.05 * torch.randn(700, 32)
    b *= a.norm() / b.norm()
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert half_squared_error(a, b) == pytest.approx(1 - float(cosine), rel=1e-3)
    assert half_squared_error(a, a) == 0
    assert half_squared_error(torch.zeros(3, 4), torch.zeros(3, 4)) == 0
    assert STATES(torch.zeros(3, 4), torch.ones(3, 4)) == WORST
    assert STATES(torch.ones(3, 4), torch.full((3, 4), float("nan"))) == WORST


@torch.no_grad()
def test_weights_that_have_no_codes_stay_exact() -> None:
    model = mlp()
    model[1].weight[3, 4] = float("nan")
    x = torch.randn(40, 64)
    compiled(model, accuracy_budget=10.0)(x)
    decision = alive()[-1].decision
    assert decision.choice["1"] == "exact"
    reasons = {(layer, scheme): why for layer, scheme, why in decision.impossible}
    assert "1 of its 6144 weights are NaN" in reasons["1", "w8a16"]


@pytest.mark.parametrize(
    ("change", "rows", "words"),
    [
        (lambda y: y.argmax(-1), 40, "results cannot be compared: there is no float tensor"),
        (lambda y: y.square().mean(), 40, "results cannot be compared: there is no float tensor"),
        (lambda y: y, 0, "results cannot be compared: they have no elements"),
    ],
)
@torch.no_grad()
def test_results_that_cannot_be_compared_leave_the_graph_exact(
    change, rows: int, words: str, caplog
) -> None:
    model, x = mlp(), torch.randn(rows, 64)
    torch._dynamo.reset()
    options = {"precision": "auto"}
    got = torch.compile(lambda x: change(model(x)), backend="llmopt", options=options)(x)
    torch.testing.assert_close(got, change(model(x)))
    assert words in caplog.text
    assert set(alive()[-1].decision.choice.values()) == {"exact"}


@torch.no_grad()
def test_layers_that_no_scheme_fits_say_so(caplog) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    torch._dynamo.reset()
    compiled(model)(torch.randn(40, 24))
    assert "no scheme is possible: 0: groups of 64 do not divide its 24 inputs" in caplog.text
    assert {scheme for _, scheme, _ in alive()[-1].decision.impossible} == set(COST) - {"exact"}


@torch.no_grad()
def test_a_changed_budget_is_a_new_decision() -> None:
    model, ids = llama(), tokens(1, 40)
    for budget, least in ((10.0, "w4a8"), (0.0, "exact")):
        torch._dynamo.reset()
        compiled(model, accuracy_budget=budget)(ids, use_cache=False)
        assert set(schemes_of(alive()[-1])) == {least}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accuracy_budget": -1}, "accuracy_budget=-1 is not a number ≥ 0"),
        ({"accuracy_budget": "x"}, "accuracy_budget='x' is not a number"),
        ({"accuracy_budget": 0.1, "precision": "w8a8"}, "accuracy_budget is for precision='auto'"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(Exception, match=words), torch.no_grad():
        compiled(mlp(), **options)(torch.randn(3, 64))


def test_plans_have_one_form_each() -> None:
    shapes = [(b, LayerShape(b.m, 64, 64, torch.float32)) for b in (DECODE, PREFILL)]
    found = timed_plans(shapes, [W8A8], fake_seconds)
    assert [timed.plan.name for timed in found] == [
        "exact",
        "w8a16",
        "w8a16 at decode, w8a8 at prefill",
        "w8a8",
    ]
    assert found[2].plan.coarsest.name == "w8a8"
    assert found[2].seconds < found[1].seconds < found[0].seconds
    assert [
        len({(s.bits, s.group, s.symmetric) for _, s in timed.plan.schemes if s}) for timed in found
    ] == [0, 1, 1, 1]
    kept, ((slow, why),) = worth_trying(found)
    assert [kept, slow] == [found[:3], found[3]]
    assert "is not faster than w8a16 at decode, w8a8 at prefill with decode" in why
    alike = timed_plans(shapes, [W8A8], fake_seconds, mixed=False)
    assert [timed.plan.name for timed in alike] == ["exact", "w8a16", "w8a8"]


def test_slow_plans_are_not_tried() -> None:
    """Their weights are not even rounded; the table has their times."""
    shapes = [(PREFILL, LayerShape(PREFILL.m, 64, 64, torch.float32))]
    slow = {"exact": 4.0, "w8a16": 5.0, "w8a8": 2.0, "w4a16": 4.5, "w4a8": 2.1}
    plans = timed_plans(
        shapes, [W8A8, W4A8], lambda shape, s: 1e-6 * slow["exact" if s is None else s.name]
    )
    kept, refused = worth_trying(plans)
    assert [timed.plan.name for timed in kept] == ["exact", "w8a8"]
    reasons = {timed.plan.name: why for timed, why in refused}
    assert "prefill 5.0 µs is not faster than exact with prefill 4.0 µs" in reasons["w8a16"]
    assert "not faster than w8a8 with prefill 2.0 µs; it was not tried" in reasons["w4a8"]


@pytest.mark.parametrize("scheme", [None, *SCHEMES.values()], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes_are_timed_once(scheme, gated: bool) -> None:
    asked = []

    def bench_of(problem: LinearProblem, _: LinearConfig) -> timing.Bench:
        asked.append(problem)
        return lambda: 1.5

    clock = timing.LayerClock(bench_of=bench_of, known={})
    shape = LayerShape(3, 256, 128, torch.float32, gated)
    assert clock(shape, scheme) == clock(shape, scheme) == 1.5e-6
    assert clock(shape, None) == 1.5e-6
    assert len(asked) == len(set(asked))
    (problem,) = (p for p in asked if p == timing.problem_of(shape, scheme))
    assert (problem.m, problem.n, problem.k, problem.gated) == (3, 256, 128, gated)
    assert problem.w == ("f32" if scheme is None else f"q{scheme.bits}")


def test_schemes_are_timed_in_turns() -> None:
    calls = []
    times = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0, *[5.0] * 20])

    def bench(name: str) -> timing.Bench:
        return lambda: (calls.append(name), next(times))[1]

    found = timing.fastest_in_turns([bench("a"), bench("b")], [1e-6, 5e-6])
    assert found == pytest.approx([1e-6, 5e-6])
    assert calls == ["a", "b"] * timing.ROUNDS


def test_calls_that_are_all_interrupted_run_again() -> None:
    """As on a machine with other work, where a thread that lost its core lets the others wait; not for ever."""
    stalled = iter([12_000.0] * 7)
    times = timing.fastest_in_turns([lambda: next(stalled, 20.0), lambda: 30.0], [10e-6, 10e-6])
    assert times == pytest.approx([20e-6, 30e-6])
    calls = []
    times = timing.fastest_in_turns([lambda: calls.append(1) or 12_000.0], [10e-6])
    assert times == pytest.approx([12e-3])
    assert len(calls) == timing.PATIENCE // 12e-3 + 1


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("scheme", [None, W8A8, W4A8], ids=str)
def test_the_clock_runs_the_kernels(scheme, gated: bool, monkeypatch) -> None:
    """Their results are numbers, and the fastest call counts."""
    taken = []

    class Watched(LinearBench):
        def __call__(self, config: LinearConfig) -> float:
            us = super().__call__(config)
            assert self._y.isfinite().all()
            assert self._y.any()
            taken.append((self._problem, us * 1e-6))
            return us

    monkeypatch.setattr(timing, "LinearBench", Watched)
    shape = LayerShape(3, 256, 128, torch.float32, gated)
    seconds = timing.LayerClock(known={})(shape, scheme)
    own = [us for problem, us in taken if problem == timing.problem_of(shape, scheme)]
    assert 0 < seconds == min(own)


SAMPLES = [{"input_ids": tokens(2, 24, seed), "use_cache": False} for seed in range(3)]


@pytest.mark.parametrize("budget", [1e-3, 10.0])
@torch.no_grad()
def test_a_module_inside_the_budget(budget: float, made_up_module_times, tmp_path) -> None:
    """quantize(…, "auto"): measured on every sample, saved and loaded, run by our kernels, explained."""
    model = llama()
    small = llmopt.quantize(model, "auto", SAMPLES, accuracy_budget=budget)
    pairs = [(model(**s).logits, small(**s).logits) for s in SAMPLES]
    measured = sum(divergence(a, b) for a, b in pairs) / len(SAMPLES)
    assert measured <= budget
    schemes = {m.scheme.name for m in small.modules() if isinstance(m, QuantizedLinear)}
    assert schemes == {"w4a8"} if budget == 10.0 else schemes and "w4a8" not in schemes
    llmopt.save_quantized(small, tmp_path)
    again = llmopt.load_quantized(tmp_path)
    assert torch.equal(again(**SAMPLES[0]).logits, small(**SAMPLES[0]).logits)
    report = llmopt.explain(torch.compile(small, backend="llmopt"), **SAMPLES[0])
    (decision,) = report.decisions
    assert decision.divergence == pytest.approx(measured, rel=1e-3)
    assert "refused: " in str(decision)


@torch.no_grad()
def test_a_module_whose_budget_nothing_meets(made_up_module_times, caplog) -> None:
    model = llama()
    small = llmopt.quantize(model, "auto", SAMPLES, accuracy_budget=0.0)
    assert "every layer stays exact: no faster scheme stays inside" in caplog.text
    assert torch.equal(small(**SAMPLES[0]).logits, model(**SAMPLES[0]).logits)
    assert not any(isinstance(m, QuantizedLinear) for m in small.modules())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give calibration="),
        ({"scheme": "w2a2"}, "'w2a2' does not exist; possible: w8a8, w8a16, w4a16, w4a8, auto"),
        ({"calibration": []}, "calibration holds no samples"),
        ({"calibration": SAMPLES, "group": 32}, "scheme 'auto' chooses group itself"),
        ({"calibration": SAMPLES, "alpha": 0.5}, "scheme 'auto' chooses alpha itself"),
        ({"calibration": SAMPLES, "accuracy_budget": -1}, "accuracy_budget=-1 is not a number"),
        ({"scheme": "w8a8", "accuracy_budget": 0.1}, "accuracy_budget is for scheme 'auto'"),
    ],
)
def test_bad_module_requests(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llmopt.quantize(llama(), **{"scheme": "auto", **arguments})


DIVIDES = {"hidden_size": 192, "intermediate_size": 128, "vocab_size": 131}


@pytest.mark.parametrize("budget", [1e-3, 10.0])
@torch.no_grad()
def test_experts_are_layers_and_routers_are_not(budget: float) -> None:
    model, inputs = zoo.make("mixtral", **DIVIDES), zoo.inputs("mixtral", 24)
    want = model(**inputs).logits
    torch._dynamo.reset()
    got = compiled(model, accuracy_budget=budget)(**inputs, use_cache=False).logits
    assert divergence(want, got) <= 1.1 * budget
    decision = alive()[-1].decision
    projections = [n for n in decision.choice if "experts" in n]
    assert len(projections) == 2 * model.config.num_hidden_layers
    assert not any(n.endswith("mlp.gate") for n in decision.choice)
    names = {r.op for r in alive()[-1].plan.records() if r.op.startswith("grouped_linear")}
    if budget == 10.0:
        assert {decision.choice[n] for n in projections} == {"w4a8"}
        assert names == {"grouped_linear_quantized"}


@torch.no_grad()
def test_a_module_of_experts_is_quantised_as_chosen(made_up_module_times) -> None:
    model, inputs = zoo.make("mixtral", **DIVIDES), zoo.inputs("mixtral", 24)
    twin = llmopt.quantize(model, "auto", [inputs], accuracy_budget=10.0)
    schemes = {m.scheme.name for m in twin.modules() if isinstance(m, QuantizedExperts)}
    assert schemes == {"w4a8"}
    assert (twin(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3


def test_experts_count_as_often_as_they_run() -> None:
    """One token reads the weights of those it goes to, a prompt all of them, with its share of rows each."""
    seen: list[LayerShape] = []

    def seconds(shape: LayerShape, scheme) -> float:
        seen.append(shape)
        return fake_seconds(shape, scheme)

    model, inputs = zoo.make("mixtral", **DIVIDES), zoo.inputs("mixtral", 24)
    decided = []

    def backend(gm, example_inputs):
        for _, run in pipeline.passes(lambda _: None, ()):
            run(gm.graph)
        gm.recompile()
        problem = auto.problem_of(gm, example_inputs)
        decided.append(auto.decide_for(problem, 10.0, seconds))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs, use_cache=True)
    config = model.config
    experts, top = config.num_local_experts, config.num_experts_per_tok
    of_experts = {(s.m, s.experts) for s in seen if s.n == 2 * config.intermediate_size}
    assert (1, top) in of_experts
    assert (-(-PREFILL.m * top // experts), experts) in of_experts
