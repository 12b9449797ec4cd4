"""Calls that are not the usual one: gradients, modes, odd tensors, errors, threads, and a thousand of them."""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import llmopt
import pytest
import torch
from llmopt import messages
from llmopt.backend import _RECOMPILE_LIMITS as RECOMPILE_LIMITS  # before the fixtures change it
from llmopt.compiled import alive
from llmopt.weights import STORE
from torch import nn
from torch.nn import functional as F

from tests.e2e import zoo
from tests.e2e.blocks import Block, Tied, block_input, build
from tests.e2e.compare import assert_same_output
from tests.threads import threads_that_run


def twins(make: Callable[[], nn.Module], backend: str) -> tuple[nn.Module, nn.Module]:
    """The same module eager and compiled."""
    eager = build(make)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    return eager, compiled


def test_gradients_are_pytorchs(backend: str) -> None:
    eager, compiled = twins(Block, backend)
    with torch.no_grad():
        assert_same_output(
            compiled(block_input()), eager(block_input())
        )  # an inference graph exists already
    results = []
    for module in (eager, compiled):
        x = block_input().requires_grad_()
        y = module(x)
        y.pow(2).mean().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    assert all(g is not None for g in results[0])
    assert_same_output(results[1], results[0])


def test_gradients_are_said_once_to_cost_the_acceleration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_said", set())
    for length in (3, 4):
        twins(Block, "llmopt")[1](block_input(length))
    assert caplog.text.count("a graph runs as in PyTorch: gradients are needed (call under") == 1


def test_gradient_of_an_input_of_a_frozen_module(backend: str) -> None:
    eager, compiled = twins(Block, backend)
    grads = []
    for module in (eager, compiled):
        x = block_input().requires_grad_()
        module.requires_grad_(False)(x).sum().backward()
        grads.append(x.grad)
    assert_same_output(grads[1], grads[0])


def test_a_training_loop_between_inference_calls(backend: str) -> None:
    eager, compiled = twins(Tied, backend)
    ids = torch.arange(12).reshape(2, 6)
    for module in (eager, compiled):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            with torch.no_grad():
                module(ids)
    with torch.no_grad():
        want = eager(ids)
        assert_same_output(compiled(ids), want)
        assert (want - build(Tied)(ids)).abs().max() > 1e-2


def test_dropout_in_train_mode(backend: str) -> None:
    eager, compiled = twins(lambda: Block(dropout=0.5), backend)
    x = block_input()
    with torch.no_grad():
        for training in (False, True, False):
            results = []
            for module in (eager, compiled):
                torch.manual_seed(11)
                results.append(module.train(training)(x))
            assert_same_output(results[1], results[0])
        compiled.train()
        assert (compiled(x) - compiled(x)).abs().max() > 0.1


@torch.library.custom_op("llmopt_tests::noise", mutates_args=())
def noise_of_its_own(like: torch.Tensor) -> torch.Tensor:
    """An operator of somebody else's, of which PyTorch does not know that it draws."""
    return torch.randn(like.shape)


@noise_of_its_own.register_fake
def _(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like)


@pytest.mark.parametrize(
    "draws",
    [
        lambda h, x: (F.dropout(h, 0.3, True), torch.rand(4)),
        lambda h, x: (torch.normal(h, h.abs()), F.dropout(x, 0.3)),
        lambda h, x: (torch.bernoulli(h.sigmoid()), torch.randn_like(x)),
        lambda h, x: (F.dropout1d(h, 0.3, True), x.clone().uniform_()),
        lambda h, x: (noise_of_its_own(h), torch.randn(3)),
        lambda h, x: (F.rrelu(h, -0.5, 0.0, True), torch.rand(3)),
        lambda h, x: (torch.svd_lowrank(h, 2)[1], torch.rand(2)),
        lambda h, x: (F.scaled_dot_product_attention(h, h, h, dropout_p=0.3), torch.randperm(9)),
    ],
)
@torch.no_grad()
def test_random_numbers_are_drawn_in_the_models_order(draws: Callable, backend: str) -> None:
    """Where what reads a native result comes first, which the second need not wait for."""
    linear, x = torch.nn.Linear(16, 16), torch.randn(2, 3, 16)

    def function(x: torch.Tensor) -> tuple:
        return *draws(linear(x), x), linear(x)

    results = []
    for call in (function, torch.compile(function, backend=backend)):
        torch.manual_seed(5)
        results.append(call(x))
    assert_same_output(results[1], results[0])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(guard: Callable, backend: str) -> None:
    eager, compiled = twins(Block, backend)
    for other in (guard, torch.no_grad, torch.inference_mode, guard):
        with other():
            got, want = compiled(block_input()), eager(block_input())
            assert got.is_inference() == want.is_inference()
            assert not got.requires_grad
            assert_same_output(got, want)


@torch.no_grad()
def test_autocast(backend: str) -> None:
    eager, compiled = twins(Block, backend)
    x = block_input(33)
    exact = eager(x)
    assert_same_output(compiled(x), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = eager(x), compiled(x)
    assert got.dtype == want.dtype
    ours, theirs = ((y.float() - exact).pow(2).mean().sqrt() for y in (got, want))
    assert 0 < ours <= theirs
    assert_same_output(compiled(x), exact)


@torch.no_grad()
def test_float64(backend: str) -> None:
    """No kernel computes in it: PyTorch does, and explain says so of every operation."""
    eager, compiled = (m.double() for m in twins(Block, backend))
    x = block_input().double()
    assert_same_output(compiled(x), eager(x))
    if backend == "llmopt":
        report = llmopt.explain(compiled, x)
        assert report.steps == ()
        operations = [f.operation for f in report.fallbacks]
        assert operations.count("linear") == 4
        assert {"layer_norm", "scaled_dot_product_attention", "gelu", "add"} <= set(operations)
        assert all(f.reason and f.source for f in report.fallbacks)
        reasons = {f.operation: f.reason for f in report.fallbacks}
        assert reasons["linear"] == "no kernel for linear in float64"


class HalfFeedForward(nn.Module):
    """fp32 with a feed-forward held in fp16, and the casts that eager needs between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.up, self.down = nn.Linear(48, 64, dtype=torch.float16), nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(self.norm(x).half())).float())


@torch.no_grad()
def test_mixed_dtypes(backend: str) -> None:
    eager, compiled = twins(HalfFeedForward, backend)
    x = block_input()
    got, want = compiled(x), eager(x)
    assert got.dtype == want.dtype == torch.float32
    exact = copy.deepcopy(eager)
    exact.up, exact.norm = exact.up.float(), exact.norm
    widened = x + exact.down(F.silu(exact.up(exact.norm(x))))
    assert (got - widened).pow(2).mean() <= 1.5 * (want - widened).pow(2).mean()


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every-other-column": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "flipped-strides": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_any_memory_layout(layout: str, backend: str) -> None:
    """Twice, as a graph compiled for one layout must not serve another."""
    eager, compiled = twins(Block, backend)
    for x in (block_input(), LAYOUTS[layout](block_input()), block_input()):
        before = x.clone()
        assert_same_output(compiled(x), eager(x))
        assert torch.equal(x, before), "the input was written to"


@pytest.mark.parametrize("shape", [(0, 7, 48), (2, 0, 48), (1, 1, 48), (5, 129, 48)], ids=str)
@torch.no_grad()
def test_sizes_at_the_edge(shape: tuple[int, ...], backend: str) -> None:
    eager, compiled = twins(Block, backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert_same_output(compiled(x), eager(x))
    assert_same_output(compiled(block_input()), eager(block_input()))


@torch.no_grad()
def test_outputs_of_two_calls_are_separate_memory(backend: str) -> None:
    """The arena is reused; what was returned must never change under its owner."""
    _, compiled = twins(Block, backend)
    first = compiled(block_input(seed=1))
    kept = first.clone()
    for seed in range(2, 6):
        compiled(block_input(seed=seed))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(compiled(block_input(seed=1)), kept)


@torch.no_grad()
def test_errors_of_the_model_itself(backend: str) -> None:
    """Same exception, and the compiled module still works afterwards."""
    eager, compiled = twins(Tied, backend)
    good = torch.arange(12).reshape(2, 6)
    for bad in (good + 45, good - 1):
        for module in (eager, compiled):
            module(good)
            with pytest.raises(IndexError):
                module(bad)
        assert_same_output(compiled(good), eager(good))


@torch.no_grad()
def test_wrong_shapes_are_errors(backend: str) -> None:
    eager, compiled = twins(Block, backend)
    compiled(block_input())
    for module in (eager, compiled):
        with pytest.raises(RuntimeError):
            module(block_input()[..., :40])
    assert_same_output(compiled(block_input()), eager(block_input()))


@torch.no_grad()
def test_infinities_and_nans_pass_through(backend: str) -> None:
    """A bad token spoils every token that attends to it, and hides from none of them.

    Tokens before it cannot see it. PyTorch's own kernel multiplies it by zero there, which is NaN
    too; leaving it out is allowed, and then they have the values of the text without it.
    """
    eager, compiled = twins(Block, backend)
    x = block_input()
    x[0, 3] = float("inf")
    x[1, 2, 5] = float("nan")
    got, want = compiled(x), eager(x)
    for row, bad in ((0, 3), (1, 2)):
        assert torch.isnan(want[row, bad:]).all()
        assert torch.isnan(got[row, bad:]).all()
        before = got[row, :bad]
        if not torch.isnan(before).all():
            assert_same_output(before, eager(x[row : row + 1, :bad])[0])
    assert_same_output(compiled(block_input()), eager(block_input()))


@torch.no_grad()
def test_number_of_threads(backend: str) -> None:
    """The same numbers (to rounding) on one thread and on two, that many run, and the setting is left alone."""
    eager, compiled = twins(Block, backend)
    x, before = block_input(65, batch=4), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert_same_output(compiled(x), eager(x))
            assert torch.get_num_threads() == threads
            if backend == "llmopt":
                assert threads_that_run(lambda: compiled(x)) == threads
    finally:
        torch.set_num_threads(before)


def test_two_threads_call_one_compiled_model(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend)
    prompts = [[zoo.inputs("llama", 9, seed=10 * t + i) for i in range(6)] for t in range(3)]
    how = {"max_new_tokens": 4, "do_sample": False}
    compiled.generate(**zoo.inputs("llama", 9), **how)
    serial = [[compiled.generate(**x, **how) for x in mine] for mine in prompts]
    results: list[list[torch.Tensor]] = [[] for _ in prompts]
    start = threading.Barrier(len(prompts))

    def run(t: int) -> None:
        start.wait()
        results[t].extend(compiled.generate(**x, **how) for x in prompts[t])

    workers = [threading.Thread(target=run, args=(t,)) for t in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for got, want, mine in zip(results, serial, prompts, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert torch.equal(want[0], eager.generate(**mine[0], **how))


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely keeps for later is no leak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def tensors_alive() -> int:
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def held_by_us() -> dict[str, int]:
    """What lives of the objects that hold a model's memory; independent of the allocator."""
    gc.collect()
    names = ("CompiledGraph", "Segment", "Plan", "PackedWeight", "SegmentBuilder")
    counts = dict.fromkeys(names, 0)
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("llmopt.") and kind.__name__ in counts:
            counts[kind.__name__] += 1
    packed = sum(entry.bytes for entry in STORE._entries.values())
    return counts | {"graphs": len(alive()), "packed bytes": packed}


@torch.no_grad()
def test_a_thousand_calls_leak_nothing(backend: str) -> None:
    """Every call returns 50 KB: keeping them all would cost 50 MB."""
    _, compiled = twins(Block, backend)
    xs = [block_input(n, batch=8) for n in (32, 30, 35)]
    for i in range(30):
        compiled(xs[i % 3])
    memory, tensors = resident_bytes(), tensors_alive()
    for i in range(1000):
        compiled(xs[i % 3])
    assert resident_bytes() - memory < 8 << 20
    assert tensors_alive() <= tensors


@torch.no_grad()
def test_decoding_leaks_nothing(backend: str) -> None:
    """Every conversation has its own growing cache, which goes when the conversation goes."""
    _, compiled = zoo.pair("llama", backend)
    x = zoo.inputs("llama", 12)

    def talk() -> None:
        compiled.generate(**x, max_new_tokens=30, do_sample=False)

    for _ in range(3):
        talk()
    before = resident_bytes()
    for _ in range(12):
        talk()
    assert resident_bytes() - before < 16 << 20


@torch.no_grad()
def test_forgotten_models_give_their_weights_back(backend: str) -> None:
    """Compiled, used and dropped models leave neither packed weights nor plans behind."""

    def use(look: bool = False) -> None:
        module = build(
            lambda: nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024))
        )
        torch.compile(module, backend=backend)(torch.randn(4, 1024))
        if look and backend == "llmopt":
            assert all(held_by_us().values()), "what is counted must exist while the model does"
        del module
        torch._dynamo.reset()

    for _ in range(2):
        use(look=True)
    before, ours = resident_bytes(), held_by_us()
    for _ in range(6):  # 16 MiB of weights each
        use()
    gc.collect()
    assert held_by_us() == ours
    assert resident_bytes() - before < 48 << 20


@pytest.mark.parametrize(("given", "expected"), [(8, 64), (16, 16)])
def test_a_forward_may_have_many_graphs(
    backend: str, given: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's default of 8 is raised, a limit that somebody set is not."""
    monkeypatch.setattr("llmopt.backend._RECOMPILE_LIMITS", RECOMPILE_LIMITS)
    if backend != "llmopt":
        pytest.skip("about llmopt's own setting")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=given), torch.no_grad():
        eager, compiled = twins(Block, backend)
        assert_same_output(compiled(block_input()), eager(block_input()))
        assert torch._dynamo.config.recompile_limit == expected
