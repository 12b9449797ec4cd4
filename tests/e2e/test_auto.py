"""precision="auto": what is chosen with made-up times, that it stays inside the budget, and that explain says why."""

from __future__ import annotations

import json

import llmopt
import pytest
import torch
from llmopt.auto import choose as auto
from llmopt.auto import timing
from llmopt.auto.plans import DECODE, PREFILL, LayerShape, candidates
from llmopt.compiled import alive
from llmopt.quant.evaluate import divergence
from llmopt.quant.schemes import SCHEMES
from torch import nn

from tests.quant.models import llama, mlp, tokens

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
        auto, "choose", lambda gm, inputs, budget: real(gm, inputs, budget, fake_seconds)
    )


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
    found = list(candidates(shapes, lambda s: s.bits == 8, lambda s: 0.001, fake_seconds))
    assert [plan.name for plan, _ in found] == [
        "exact",
        "w8a16",
        "w8a16 at decode, w8a8 at prefill",
    ]
    assert found[2][0].coarsest.name == "w8a8"
    assert found[2][1].seconds < found[1][1].seconds < found[0][1].seconds
    assert [
        len({(s.bits, s.group, s.symmetric) for _, s in plan.schemes if s}) for plan, _ in found
    ] == [0, 1, 1]


@pytest.mark.parametrize("scheme", [None, *SCHEMES.values()], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_kernels_are_timed_once(scheme, gated: bool) -> None:
    """The calls that are timed run, over weights of their own, and their results are numbers."""
    asked = []

    def bench(calls) -> float:
        asked.append(len(calls))
        for call in calls[:2]:
            call()
            assert call.tensors[4].isfinite().all()
        assert len({call.tensors[1].data_ptr() for call in calls}) == len(calls)
        return 1.5

    shape = LayerShape(3, 256, 128, torch.float32, gated)
    assert timing.layer_seconds(shape, scheme, bench) == 1.5
    assert timing.layer_seconds(shape, scheme, bench) == 1.5
    assert asked == [timing.MOST_COPIES]


def test_the_clock_gives_the_fastest_call() -> None:
    calls = []
    seconds = timing.fastest_of([lambda: calls.append(1)])
    assert 0 < seconds < timing.SECONDS
    assert len(calls) >= 2
