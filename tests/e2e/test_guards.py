"""One guard in the place of Dynamo's many: what they would notice is noticed, and what they would let pass does not compile again."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from llmopt.guards import HeldWeights, ModuleCall
from torch import nn
from torch._dynamo.utils import counters

from tests.e2e.blocks import Tied, block_input, build
from tests.e2e.compare import assert_same_output


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Config:
    def __init__(self, shift: float) -> None:
        self.shift, self.bias = shift, None


class Reads(nn.Module):
    """Reads of itself what models read: numbers, names, parts, an object's attributes, what may not be there."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.scale, self.kind, self.flag = 0.5, "add", True
        self.config = Config(2.0)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.act = nn.GELU()
        self.register_buffer("offset", torch.ones(width))
        self.unread = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.act(self.first(x))) * self.scale + self.offset
        y = y + x if self.kind == "add" else y - x
        if self.flag and self.config.bias is None:
            y = y + self.config.shift
        return y * 3 if hasattr(self, "triple") else y


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def other_number(m: Reads) -> None:
    m.scale = 0.25


def other_type_of_number(m: Reads) -> None:
    m.flag = 0


def other_name(m: Reads) -> None:
    m.kind = "subtract"


def other_attribute_of_an_object(m: Reads) -> None:
    m.config.shift = 3.0


def other_object(m: Reads) -> None:
    m.config = Config(1.0)


def other_class_of_part(m: Reads) -> None:
    m.second = Louder(48, 48, bias=False)


def other_function_of_part(m: Reads) -> None:
    m.act = nn.SiLU()


def own_forward_of_part(m: Reads) -> None:
    m.act.forward = lambda x: x * 7


def another_attribute(m: Reads) -> None:
    m.triple = True


def bias_is_gone(m: Reads) -> None:
    m.first.bias = None


def other_form_of_weights(m: Reads) -> None:
    m.first, m.second = nn.Linear(48, 20), nn.Linear(20, 48, bias=False)


def weights_become_one(m: Reads) -> None:
    m.second.weight = m.first.weight


def other_strides(m: Reads) -> None:
    m.second.weight = nn.Parameter(torch.randn(48, 48).t())


def other_strides_in_place(m: Reads) -> None:
    m.second.weight.data = m.second.weight.data.t()


def called(make: type[nn.Module], backend: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A module, the same compiled and called once, and what it was called with."""
    module, x = build(make), block_input()
    compiled = torch.compile(module, backend=backend)
    compiled(x)
    return module, compiled, x


CHANGES = [
    other_number,
    other_type_of_number,
    other_name,
    other_attribute_of_an_object,
    other_object,
    other_class_of_part,
    other_function_of_part,
    own_forward_of_part,
    another_attribute,
    bias_is_gone,
    other_form_of_weights,
    weights_become_one,
    other_strides,
    other_strides_in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_model_read_is_noticed(change: Callable[[Reads], None], backend: str) -> None:
    module, compiled, x = called(Reads, backend)
    before = compiled(x)
    assert_same_output(compiled(x), before)
    torch.manual_seed(5)
    change(module)
    assert_same_output(compiled(x), module(x))
    assert_same_output(compiled(x), module(x))
    assert (module(x) - before).abs().max() > 1e-2


def test_another_dtype_in_place(backend: str) -> None:
    module, compiled, x = called(Reads, backend)
    module.first.weight.data = module.first.weight.data.double()
    with pytest.raises(RuntimeError, match="dtype"):
        compiled(x)


def weights_of_the_same_form(m: Reads) -> None:
    m.first.weight = nn.Parameter(torch.randn(48, 48))
    m.offset = torch.randn(48)


def part_of_the_same_class(m: Reads) -> None:
    m.second = nn.Linear(48, 48, bias=False)


def numbers_made_anew(m: Reads) -> None:
    m.scale, m.kind = float("0.5"), "".join(["a", "dd"])


def what_nobody_reads(m: Reads) -> None:
    m.unread += 1
    m.never = object()


def there_and_back(m: Reads) -> None:
    m.scale = 9.0
    m.scale = 0.5


SAME = [
    weights_of_the_same_form,
    part_of_the_same_class,
    numbers_made_anew,
    what_nobody_reads,
    there_and_back,
]


@pytest.mark.parametrize("change", SAME, ids=lambda f: f.__name__)
def test_what_makes_no_other_graph(change: Callable[[Reads], None], backend: str) -> None:
    module, compiled, x = called(Reads, backend)
    before = counters["stats"]["unique_graphs"]
    for seed in range(3):
        torch.manual_seed(seed)
        change(module)
        assert_same_output(compiled(x), module(x))
    assert counters["stats"]["unique_graphs"] == before


def held(module: object) -> list[HeldWeights]:
    """Those of compiled graphs that know a module."""
    return [h for h in gc.get_objects() if type(h) is HeldWeights and id(module) in h._known]


def test_weights_and_attributes_are_no_business_of_dynamo_any_more(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled graph gets the module, x and a buffer, and Dynamo looks at that and no further."""
    module, x = build(Reads), block_input()
    calls = []
    call = ModuleCall.__call__
    monkeypatch.setattr(
        ModuleCall, "__call__", lambda self, *given: calls.append(given) or call(self, *given)
    )
    torch.compile(module, backend=backend)(x)
    assert [[type(a) for a in given] for given in calls] == [[Reads, torch.Tensor, torch.Tensor]]
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Reads.forward.__code__)
    guards = str(entry.guard_manager)
    assert "holds what it held" in guards
    assert set(re.findall(r"source=L\['self'\]([^,]*),", guards)) == {
        "",
        ".__dict__",
        "._buffers",
        "._buffers['offset']",
    }


def test_switched_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build(Reads), block_input()
    monkeypatch.setenv("LLMOPT_DISABLE", "guards")
    assert_same_output(torch.compile(module, backend=backend)(x), module(x))
    assert held(module) == []


def test_a_module_that_is_gone_is_forgotten(backend: str) -> None:
    module, x = build(Tied), torch.arange(5)[None]
    compiled = torch.compile(module, backend=backend)
    compiled(x)
    (graph,) = held(module)
    gone = weakref.ref(module.block.up.weight)
    del module, compiled
    gc.collect()
    assert gone() is None
    assert graph.modules() == 0


@pytest.mark.parametrize("replace", [True, False])
def test_calls_whose_guards_are_not_asked(replace: bool, backend: str) -> None:
    """PyTorch has a stance in which it asks no guard that does not tell graphs apart. New weights are taken, others are an error."""
    module, compiled, x = called(Reads, backend)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for seed in range(3):
            torch.manual_seed(seed)
            if replace:
                weights_of_the_same_form(module)
            else:
                module.first.weight.mul_(0.5)
            assert_same_output(compiled(x), module(x))
        module.scale = 0.125
        with pytest.raises(RuntimeError, match=r"is not what it was when|Recompilation triggered"):
            compiled(x)


@pytest.mark.parametrize("skipping", [True, False])
def test_a_guard_that_was_asked_for_another_call(skipping: bool, backend: str) -> None:
    """What a guard has found holds for the call that follows it, also where another guard then chose another graph."""
    module = build(Reads)
    compiled = torch.compile(module, backend=backend, dynamic=False)
    inputs = [block_input(length) for length in (5, 7, 5)]
    for x in inputs:
        compiled(x)
    before = list(module.parameters())
    weights_of_the_same_form(module)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=skipping):
        assert_same_output(compiled(inputs[0]), module(inputs[0]))
    assert before[0] is not module.first.weight


@pytest.mark.parametrize("back", [True, False])
def test_weights_that_need_gradients_again(back: bool, backend: str) -> None:
    module, x = build(Reads).requires_grad_(back), block_input()
    compiled = torch.compile(module, backend=backend)
    with torch.enable_grad():
        assert compiled(x).requires_grad is back
        module.requires_grad_(False)
        assert not compiled(x).requires_grad
        module.second.weight.requires_grad_()
        compiled(x).sum().backward()
    assert module.second.weight.grad is not None
    assert module.first.weight.grad is None


class ReadsTensors(nn.Module):
    """Reads of its tensors more than numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 48)
        self.register_buffer("a", torch.ones(48))
        self.register_buffer("b", torch.ones(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x) * self.a + self.b
        if self.a is self.b:
            y = y * 2
        return y * 3 if self.up.weight.requires_grad else y


class Scaled(nn.Parameter):
    pass


def two_become_one(m: ReadsTensors) -> None:
    m.b = m.a


def needs_no_gradient(m: ReadsTensors) -> None:
    m.up.weight.requires_grad_(False)


def another_class_in_place(m: ReadsTensors) -> None:
    m.up.weight.__class__ = Scaled


@pytest.mark.parametrize("change", [two_become_one, needs_no_gradient, another_class_in_place])
def test_what_tensors_are(change: Callable[[ReadsTensors], None], backend: str) -> None:
    module, compiled, x = called(ReadsTensors, backend)
    change(module)
    assert_same_output(compiled(x), module(x))


@pytest.mark.parametrize(
    "chosen", ["keep_tensor_guards_unsafe", "skip_guard_on_all_nn_modules_unsafe", "skip_all_guards_unsafe"]
)  # fmt: skip
def test_guards_that_somebody_chooses_stay_dynamos(chosen: str, backend: str) -> None:
    module, x = build(Reads), block_input()
    filters = {"guard_filter_fn": getattr(torch.compiler, chosen)}
    compiled = torch.compile(module, backend=backend, options=filters)
    want = compiled(x)
    module.scale = 0.125  # which nobody looks at then
    assert_same_output(compiled(x), want)
    assert held(module) == []


def test_sizes_that_get_graphs_of_their_own(backend: str) -> None:
    """Dynamo calls the backend again for these, with the arguments of a call."""
    module = build(Reads)
    compiled = torch.compile(module, backend=backend)
    for batch in (3, 2, 3):
        x = block_input(batch=batch)
        torch._dynamo.decorators.mark_dynamic(x, 0, specialize_on=[lambda size: size == 2])
        assert_same_output(compiled(x), module(x))


def test_parameters_of_other_dtypes(backend: str) -> None:
    """Some that no exchange functions know."""

    class Bits(Reads):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.empty(4, dtype=torch.bits8)
            self.codes = nn.Parameter(codes, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.codes.view(torch.uint8).numel()

    torch.manual_seed(0)
    module, x = Bits().eval(), block_input()
    assert_same_output(torch.compile(module, backend=backend)(x), module(x))


def test_threads_with_modules_of_their_own(backend: str) -> None:
    """One graph, several modules, some of which get new weights all the time."""
    run = torch.compile(lambda module, x: module(x), backend=backend)
    modules, x = [build(Reads, seed=s) for s in range(4)], block_input()
    run(modules[0], x)
    wrong: list[object] = []

    @torch.no_grad()
    def work(module: Reads) -> None:
        for step in range(20):
            if step % 3 == 0:
                module.second.weight = nn.Parameter(module.second.weight * -1)
            try:
                assert_same_output(run(module, x), module(x))
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=work, args=(m,)) for m in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_modules_in_closures_and_globals_stay_dynamos(backend: str) -> None:
    module, x = build(Reads), block_input()
    run = torch.compile(lambda x: module(x), backend=backend)
    for scale in (0.5, 0.75):
        module.scale = scale
        assert_same_output(run(x), module(x))


def test_a_class_that_answers_for_an_attribute(backend: str) -> None:
    """What a property returns is not what the object's dictionary holds under its name."""

    class Hidden(Reads):
        @property
        def scale(self) -> float:
            return self.other

        @scale.setter
        def scale(self, value: float) -> None:
            self.other = value

    module, x = build(Hidden), block_input()
    vars(module)["scale"] = 100.0
    compiled = torch.compile(module, backend=backend)
    for other in (0.5, 0.75):
        module.other = other
        assert_same_output(compiled(x), module(x))
