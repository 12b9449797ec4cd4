"""Any pass can be left out, and a pass that breaks its graph is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from llmopt import backend, ops
from llmopt.compiled import CompiledGraph
from llmopt.ops.norm import normalized
from llmopt.passes import pipeline
from llmopt.passes.verify import BrokenGraph
from torch import fx, nn
from torch.nn import functional as F
from transformers.integrations import moe

from tests.e2e.compare import assert_same_output

# pass → what the plan of Step holds only where it ran
EFFECTS = {
    "functionalize": "norm.cpu rms",
    "assignments": "copy.cpu in place",
    "torch_layers": "[1,2,1,16]f32",  # the heads of an nn.MultiheadAttention
    "einsums": "linear.cpu 12x8",
    "simplify": "norm.cpu rms",
    "norms": "norm.cpu layer",
    "rotary": "rope_half",
    "rotary_tables": "rotary_table.cpu",
    "attentions": "attention.cpu",
    "kv_cache": "attention.cpu append",
    "activations": "gelu_tanh",
    "sliding_caches": "slide.cpu",
    "masks": "pytorch: full\n",  # and no indices that count
    "convolutions": "vm.cpu mul+mul+add+mul",
    "shifts": "[1,1,3]f32",
    "linears": "  linear.cpu",
    "routers": "limit_groups.cpu",
    "experts": "grouped_linear.cpu",
    "products": "matmul.cpu",
    "repeats": "[1,1,32,2]f32",
    "embeddings": "embedding.cpu",
    "simplify_again": "gated",
    "share": "vm.cpu add+exp+mul",
    "fuse_linear": "residual",
    "fuse_pointwise": "vm.cpu",
    "layouts": "copy.cpu  ",
    "quantize": "linear_quantized.cpu",
}


class Step(nn.Module):
    """One token through one layer, written so that every pass has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.norm, self.scale = nn.LayerNorm(32), nn.Parameter(torch.ones(32))
        self.pool = nn.MultiheadAttention(32, 2, batch_first=True)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.look_back = nn.Conv1d(32, 32, 3, groups=32, padding=2)
        self.mix = nn.Parameter(torch.randn(12, 8) / 60)
        self.experts = nn.Parameter(torch.randn(2, 32, 32) / 60)
        self.register_buffer("kept", torch.zeros(1, 4, 5, 8))
        self.register_buffer("seen", torch.tensor([[True, True, False, True, True, True]]))
        self.register_buffer("ends", torch.tensor([0, 1], dtype=torch.int32))

    def forward(
        self,
        ids: torch.Tensor,
        frequencies: torch.Tensor,
        position: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        window: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        x = self.embed(ids) * 4.0
        x = x + self.pool(x, x, x, need_weights=False)[0]
        x = x + self.norm(x).roll(3, -1) + self.look_back(self.norm(x).mT)[..., :1].mT
        angles = frequencies * position[..., None]
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        q, k, v = (
            f(self.norm(x)).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        moved = window.roll(-1, 2)
        moved[:, :, -1:] = v
        window.copy_(moved)
        self.kept[:, :, 1:2] = v
        k, v = (torch.cat((old, new), 2) for old, new in zip(cache, (k, v), strict=True))
        batch, keys = torch.arange(1)[:, None, None, None], torch.arange(6)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen[batch, keys])
        y = y + window[:, :, -1:] + torch.einsum("bhsd,ed->bhse", y, self.mix)[..., :8]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = F.layer_norm(cache[0][:, 0].mT, (5,)).sum() + self.norm(x)
        x = x + self.down(gelu(self.gate(h)) * self.up(h))
        x = x + self.limited(x[0]) + x @ self.norm(x).mT @ x
        x = x + torch.stack((self.norm(x), x), -1)[..., 1]
        x = x + moe._grouped_mm(x[0], self.experts.mT, self.ends)
        mean = x.pow(2).contiguous().mean(-1, keepdim=True)
        mean += 1e-5
        x = x * torch.rsqrt(mean) * self.scale
        return (x + 1) * (x + 1).exp(), k, v

    def limited(self, scores: torch.Tensor) -> torch.Tensor:
        best = scores.view(-1, 4, 8).topk(2)[0].sum(-1)
        mask = torch.zeros_like(best)
        mask.scatter_(1, best.topk(2)[1], 1)
        kept = mask.unsqueeze(-1).expand(-1, 4, 8).reshape(-1, 32)
        return scores.masked_fill(~kept.bool(), 0.0)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


Captured = tuple[fx.GraphModule, Sequence[Any]]


@pytest.fixture(scope="module")
def captured() -> Captured:
    """Dynamo's graph of Step and its inputs: traced once, compiled by every test."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    found: list[Captured] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        found.append((gm, inputs))
        return gm.forward

    cache = (torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8))
    window = torch.randn(1, 4, 5, 8)
    arguments = (torch.tensor([[3]]), torch.rand(4), torch.tensor([[5.0]]), cache, window)
    step = Step().eval()
    with torch.no_grad():
        torch.compile(step, backend=keep, fullgraph=True)(*arguments)
        step.kept.zero_()
    return found[0]


def compiled(captured: Captured, **options: Any) -> CompiledGraph:
    """A copy of the graph, compiled: passes change theirs."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured[0].graph, {}))
    with torch.no_grad():
        return backend.llmopt(fx.GraphModule(captured[0], graph), captured[1], options=options)


def call(function: Callable, inputs: Sequence[Any]) -> Any:
    """Its result for copies of the inputs: caches grow in place."""
    with torch.no_grad():
        return function(*(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs))


@pytest.mark.parametrize("name", pipeline.NAMES)
def test_any_pass_can_be_left_out(
    name: str, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan lacks what the pass does, and the result stays that of eager."""
    options = {"precision": "w8a8"} if name == "quantize" else {}
    whole = compiled(captured, **options)
    monkeypatch.setenv("LLMOPT_DISABLE", name)
    without = compiled(captured, **options)
    assert EFFECTS[name] in str(whole.plan)
    assert EFFECTS[name] not in str(without.plan)
    assert set(whole.compile_seconds) - set(without.compile_seconds) == {name}
    gm, inputs = captured
    assert_same_output(call(without, inputs), call(gm, inputs))


def test_all_passes_can_be_left_out(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_DISABLE", ", ".join(pipeline.NAMES))
    without = compiled(captured)
    assert not without.plan.segments
    assert not set(without.compile_seconds) & set(pipeline.NAMES)
    gm, inputs = captured
    assert_same_output(call(without, inputs), call(gm, inputs))


def reads_a_later_node(graph: fx.Graph) -> None:
    first, *_, last = graph.find_nodes(op="call_function", target=ops.linear)
    first.prepend(last)


def reads_what_is_gone(graph: fx.Graph) -> None:
    graph.find_nodes(op="call_function", target=ops.norm)[0]._remove_from_list()


def calls_no_op(graph: fx.Graph) -> None:
    graph.find_nodes(op="call_function", target=ops.norm)[0].target = normalized


def has_no_example(graph: fx.Graph) -> None:
    del graph.find_nodes(op="call_function", target=ops.norm)[0].meta["example_value"]


def computes_another_value(graph: fx.Graph) -> None:
    graph.find_nodes(op="call_function", target=ops.embedding)[0].update_arg(2, 4.1)  # of 4.0


def returns_less(graph: fx.Graph) -> None:
    node = graph.output_node()
    node.args = (node.args[0][:-1],)


def returns_another_shape(graph: fx.Graph) -> None:
    node = graph.output_node()
    node.args = (node.args[0][::-1],)


def writes_nothing(graph: fx.Graph) -> None:
    graph.erase_node(graph.find_nodes(op="call_function", target=ops.slide_)[0])


def writes_something_else(graph: fx.Graph) -> None:
    slide = graph.find_nodes(op="call_function", target=ops.slide_)[0]
    with graph.inserting_before(graph.output_node()):  # no result reads it
        graph.call_method("neg_", slide.args[:1])


FORMS = {
    reads_a_later_node: "was used before it has been defined",
    reads_what_is_gone: "was used before it has been defined",
    calls_no_op: "normalized .* is not an op",
    has_no_example: "has no example value",
}


def lacks_an_argument(graph: fx.Graph) -> None:
    node = graph.find_nodes(op="call_function", target=ops.linear)[0]
    node.args = node.args[:1]


VALUES = {
    lacks_an_argument: "the graph no longer runs: TypeError",
    computes_another_value: r"result \d differs by",
    returns_less: "2 results instead of 3",
    writes_nothing: r"inputs \[\d+\] are written",
    writes_something_else: r"input \d+, written in place, differs by",
    returns_another_shape: r"result 0 is .* instead of",
}


@pytest.mark.parametrize("breaks", [*FORMS, *VALUES], ids=lambda f: f.__name__)
def test_a_pass_that_breaks_the_graph_is_named(
    breaks: Callable, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a malformed graph is is always seen, what it computes with LLMOPT_VERIFY=1."""
    broken = tuple((n, breaks if n == "share" else run) for n, run in pipeline.PIPELINE)
    monkeypatch.setattr(pipeline, "PIPELINE", broken)
    monkeypatch.setenv("LLMOPT_VERIFY", str(int(breaks in VALUES)))
    with pytest.raises(BrokenGraph, match=f"pass share: .*{(FORMS | VALUES)[breaks]}"):
        compiled(captured)


def test_every_pass_is_verified(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before the first and once after each: the graphs that are right are let through."""
    seen = []
    monkeypatch.setattr(backend, "check_values", lambda before, after, name: seen.append(name))
    assert "verify" not in compiled(captured).compile_seconds
    assert seen == []
    monkeypatch.setenv("LLMOPT_VERIFY", "1")
    assert "verify" in compiled(captured, precision="w8a8").compile_seconds
    assert seen == list(pipeline.NAMES)
