"""Packed weights never go stale: every way to change a parameter after compilation, and every way to share one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import llmopt
import pytest
import torch
from llmopt import executor
from llmopt.compiled import alive
from llmopt.watch import Watch
from llmopt.weights import STORE, PackedStore, PackedWeight
from torch import nn

from tests.e2e.blocks import Block, Tied, block_input, build
from tests.e2e.compare import assert_same_output


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def replace_parameter(module: Block) -> None:
    module.up.weight = nn.Parameter(module.up.weight * 2)


def swap_two_parameters(module: Block) -> None:
    module.norm1.weight, module.norm2.weight = module.norm2.weight, module.norm1.weight


def set_data(module: Block) -> None:
    module.up.weight.data = module.up.weight.data * 2


def edit_data_in_place(module: Block) -> None:
    module.up.weight.data.mul_(2)


def edit_through_a_view(module: Block) -> None:
    module.qkv.weight[5:9].zero_()


def load_other_weights(module: Block) -> None:
    module.load_state_dict(build(Block, seed=9).state_dict())


def assign_other_weights(module: Block) -> None:
    module.load_state_dict(build(Block, seed=9).state_dict(), assign=True)


def edit_every_bias(module: Block) -> None:
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.add_(0.5)


def optimizer_step(module: Block) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def fold_a_low_rank_update(module: Block) -> None:
    a, b = torch.randn(76, 2), torch.randn(2, 48)
    module.up.weight += a @ b


CHANGES = [
    replace_parameter,
    swap_two_parameters,
    set_data,
    edit_data_in_place,
    edit_through_a_view,
    load_other_weights,
    assign_other_weights,
    edit_every_bias,
    optimizer_step,
    fold_a_low_rank_update,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_noticed(change: Callable[[nn.Module], None], backend: str) -> None:
    module = build(Block)
    compiled = torch.compile(module, backend=backend)
    x = block_input()
    before = compiled(x)
    torch.manual_seed(3)
    change(module)
    want = module(x)
    assert (want - before).abs().max() > 1e-2
    assert_same_output(compiled(x), want)
    assert_same_output(compiled(x), want)


@pytest.mark.parametrize("change", [replace_parameter, edit_data_in_place, assign_other_weights])
def test_changed_weights_are_noticed_without_guards(
    change: Callable[[nn.Module], None], backend: str
) -> None:
    """Dynamo's guards of modules can be left out: what a graph reads is compared by itself."""
    module = build(Block)
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(module, backend=backend, options=options)
    x = block_input()
    before = compiled(x)
    torch.manual_seed(3)
    change(module)
    want = module(x)
    assert (want - before).abs().max() > 1e-2
    assert_same_output(compiled(x), want)


def test_a_new_graph_notices_an_edit_through_data(backend: str) -> None:
    """Another graph packed the weight before the edit, which neither version nor address shows."""
    module = build(Block)
    compiled = torch.compile(module, backend=backend, dynamic=False)
    compiled(block_input())
    module.up.weight.data.mul_(2)
    x = block_input(length=3)
    assert_same_output(compiled(x), module(x))


def edit_a_row(weight: nn.Parameter) -> None:
    weight.data[97].mul_(3)


def edit_an_element(weight: nn.Parameter) -> None:
    weight.detach().numpy()[100, 7] += 5


SMALL_EDITS = pytest.mark.parametrize("edit", [edit_a_row, edit_an_element], ids=lambda f: f.__name__)  # fmt: skip


@SMALL_EDITS
def test_small_edits_are_noticed_in_time(
    edit: Callable[[nn.Parameter], None], backend: str
) -> None:
    """Neither version nor address shows them; every call looks at another 32 KiB."""
    module = build(lambda: nn.Linear(64, 512))
    compiled = torch.compile(module, backend=backend)
    x = torch.randn(2, 64)
    compiled(x)
    edit(module.weight)
    for _ in range(module.weight.nbytes // 2**15 + 1):  # and one for the bias
        compiled(x)
    assert_same_output(compiled(x), module(x))


@SMALL_EDITS
def test_a_new_graph_notices_small_edits(
    edit: Callable[[nn.Parameter], None], backend: str
) -> None:
    module = build(lambda: nn.Linear(64, 512))
    compiled = torch.compile(module, backend=backend, dynamic=False)
    compiled(torch.randn(2, 64))
    edit(module.weight)
    x = torch.randn(3, 64)
    assert_same_output(compiled(x), module(x))


def test_another_graph_keeps_its_weights_while_one_packs_again(backend: str) -> None:
    """Both read the same memory, of weights and of biases, which must not become somebody else's."""
    module = build(lambda: nn.Linear(64, 4096))
    compiled = torch.compile(module, backend=backend, dynamic=False)
    x, other = torch.randn(2, 64), torch.randn(3, 64)
    compiled(x), compiled(other)
    edit_a_row(module.weight)
    module.bias.data[97] += 1
    for _ in range(module.weight.nbytes // 2**15 + 1):
        compiled(x)
    junk = [torch.full((4096,), 1e6) for _ in range(64)]
    assert_same_output(compiled(other), module(other))
    assert_same_output(compiled(x), module(x))
    assert len(junk) == 64


def test_an_edit_that_is_undone_behind_a_graphs_back(backend: str) -> None:
    """As an adapter that is merged, used in another graph, and taken out again: what the first graph sees has never changed."""
    module = build(Block)
    compiled = torch.compile(module, backend=backend, dynamic=False)
    x, other = block_input(), block_input(length=3)
    weight, kept = module.up.weight, module.up.weight.clone()
    for _ in range(2):
        assert_same_output(compiled(x), module(x))
        weight.data.mul_(2)
        assert_same_output(compiled(other), module(other))
        weight.data.copy_(kept)


def test_an_edit_sends_no_other_model_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    edited, other = build(Block), build(Block, seed=2)
    runs = [torch.compile(m, backend="llmopt", dynamic=False) for m in (edited, other)]
    x, longer = block_input(), block_input(length=9)  # each a graph of its own
    runs[0](x), runs[1](longer)
    asked = []
    get = PackedStore.get
    monkeypatch.setattr(PackedStore, "get", lambda *a, **k: asked.append(a) or get(*a, **k))
    edited.up.weight.data.mul_(2)
    assert_same_output(runs[0](x), edited(x))
    assert asked
    asked.clear()
    assert_same_output(runs[1](longer), other(longer))
    assert not asked


@pytest.mark.parametrize("source", ["qkv", "gate", "up"])
def test_an_edit_while_another_module_has_the_graph(source: str, backend: str) -> None:
    """Copies share one graph, which was called with the other's weights last. Gate and up are packed as one weight."""
    first = build(Gated)
    second = copy.deepcopy(first)
    compiled = [torch.compile(m, backend=backend) for m in (first, second)]
    x = block_input()
    for run in (*compiled, compiled[0]):
        run(x)
    getattr(second, source).weight.data.mul_(3)
    assert_same_output(compiled[1](x), second(x))
    assert_same_output(compiled[0](x), first(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.up, self.down = (
            nn.Linear(48, 96), nn.Linear(96, 128), nn.Linear(96, 128), nn.Linear(128, 48),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.qkv(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("most", [512, 2])
def test_layers_that_share_a_graph(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is called with the weights of each in turn, and remembers so many; all of a weight is compared where it is new only."""
    monkeypatch.setattr(executor, "_MOST_SETS", most)
    layers = [build(Block, seed) for seed in range(3)]
    compiled = [torch.compile(layer, backend="llmopt") for layer in layers]
    x = block_input()
    for run in compiled:
        run(x)
    assert len(alive()[-1].packed()) == 3 * 4  # linears of a block
    asked, looked = [], []
    get, known = PackedStore.get, PackedStore._is_unchanged

    def looking(entry: PackedWeight, reader: object) -> bool:
        looked.append(reader in entry.readers)
        return known(entry, reader)

    monkeypatch.setattr(PackedStore, "get", lambda *a, **k: asked.append(a) or get(*a, **k))
    monkeypatch.setattr(PackedStore, "_is_unchanged", staticmethod(looking))
    for _ in range(2):
        for run, layer in zip(compiled, layers, strict=True):
            assert_same_output(run(x), layer(x))
    assert bool(asked) == (most < len(layers))
    assert all(looked)
    layers[1].up.weight.data.mul_(2)
    for run, layer in zip(compiled, layers, strict=True):
        assert_same_output(run(x), layer(x))


@pytest.mark.parametrize("turn", [0, 1])
def test_a_segment_that_is_told_to_look_again_during_a_call(
    turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread refreshes while one compares: what that call found is not remembered."""
    layers = [build(Block, seed) for seed in range(2)]
    compiled = [torch.compile(layer, backend="llmopt") for layer in layers]
    x = block_input()
    for run in (*compiled, *compiled[: 2 - turn]):
        run(x)
    compares = Watch.same_content

    def told(watch: Watch) -> bool:
        monkeypatch.setattr(Watch, "same_content", compares)
        llmopt.refresh()
        return True

    monkeypatch.setattr(Watch, "same_content", told)
    compiled[turn](x)
    asked = []
    get = PackedStore.get
    monkeypatch.setattr(PackedStore, "get", lambda *a, **k: asked.append(a) or get(*a, **k))
    assert_same_output(compiled[turn](x), layers[turn](x))
    assert asked


@SMALL_EDITS
def test_refresh_packs_again_at_once(edit: Callable[[nn.Parameter], None], backend: str) -> None:
    module = build(lambda: nn.Linear(64, 512))
    compiled = torch.compile(module, backend=backend)
    x = torch.randn(2, 64)
    compiled(x)
    edit(module.weight)
    llmopt.refresh()
    assert_same_output(compiled(x), module(x))


def test_refresh_is_of_all_layers_that_share_a_graph() -> None:
    """Each packs again when its turn comes, whichever comes first; those that another graph packed meanwhile do not."""
    layers = [nn.Linear(64, 512) for _ in range(3)]
    compiled = [torch.compile(layer, backend="llmopt") for layer in layers]
    x, few = torch.randn(5, 64), torch.randn(1, 64)
    for run in compiled:
        run(x), run(few)
    for row in range(5, 50, 9):
        for layer in layers:
            layer.weight.data[row, 3] += 5.0
        llmopt.refresh()
        packed = STORE.packings
        for run, layer in zip(compiled, layers, strict=True):
            assert_same_output(run(x), layer(x))
            assert_same_output(run(few), layer(few))
        assert STORE.packings == packed + len(layers)


def test_an_edit_while_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that PyTorch counts, in a weight that was packed already, before all of them are: the next call sees it."""
    module = build(Block)
    compiled = torch.compile(module, backend="llmopt")
    get, asked, x = PackedStore.get, [], block_input()

    def editing(*arguments, **more) -> PackedWeight:
        packed = get(*arguments, **more)
        asked.append(packed)
        if len(asked) == 4:  # linears of a block
            module.qkv.weight[7].add_(1.0)
        return packed

    monkeypatch.setattr(PackedStore, "get", editing)
    compiled(x)
    assert len(asked) == 4
    assert_same_output(compiled(x), module(x))


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_dtype_and_back(first: torch.dtype, backend: str) -> None:
    """Every dtype in turn, and the first one again with weights that lost bits on the way."""
    module = build(Block)
    compiled = torch.compile(module, backend=backend)
    others = [
        d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64) if d != first
    ]
    for dtype in (first, *others, first):
        module.to(dtype)
        x = block_input().to(dtype)
        got = compiled(x)
        assert got.dtype == dtype
        if dtype in (torch.float32, torch.float64):
            assert_same_output(got, module(x))
        else:
            exact = copy.deepcopy(module).float()(x.float())
            ours, theirs = ((y.float() - exact).pow(2).mean() for y in (got, module(x)))
            assert ours <= theirs


def test_tied_weights_stay_tied(backend: str) -> None:
    module = build(Tied)
    compiled = torch.compile(module, backend=backend)
    ids = torch.arange(10).reshape(2, 5)
    assert_same_output(compiled(ids), module(ids))
    module.embed.weight.mul_(0.5)
    assert module.head.weight is module.embed.weight
    assert_same_output(compiled(ids), module(ids))
    module.head.weight = nn.Parameter(module.head.weight + 1.0)  # no longer tied
    assert_same_output(compiled(ids), module(ids))


def test_two_instances_of_one_class(backend: str) -> None:
    """Dynamo may run one instance's graph with the other's parameters: they come in as inputs."""
    first, second = build(Block, seed=1), build(Block, seed=2)
    one, two = (torch.compile(m, backend=backend) for m in (first, second))
    x = block_input()
    for _ in range(2):
        assert_same_output(one(x), first(x))
        assert_same_output(two(x), second(x))
    first.load_state_dict(second.state_dict())
    assert_same_output(one(x), two(x))


def test_one_function_over_many_modules(backend: str) -> None:
    """A function of the module, compiled once, as a training script or a layer loop does it."""
    modules = [build(Block, seed=s) for s in range(4)]
    run = torch.compile(lambda module, x: module(x) * 2, backend=backend)
    x = block_input()
    for module in (*modules, *reversed(modules)):
        assert_same_output(run(module, x), module(x) * 2)


def test_thirty_layers_share_one_compiled_block(backend: str) -> None:
    layers = [build(Block, seed=s) for s in range(30)]
    compiled = copy.deepcopy(layers)
    for layer in compiled:
        layer.compile(backend=backend)
    for length in (7, 5, 9):
        got = want = block_input(length)
        for ours, theirs in zip(compiled, layers, strict=True):
            got, want = ours(got) * 0.5, theirs(want) * 0.5
        assert_same_output(got, want)


def test_deepcopy_of_a_compiled_module(backend: str) -> None:
    compiled = torch.compile(build(Block), backend=backend)
    x = block_input()
    want = compiled(x)
    twin = copy.deepcopy(compiled)
    for p in twin.parameters():
        p.mul_(0.5)
    assert_same_output(compiled(x), want)
    halved = build(Block)
    for p in halved.parameters():
        p.mul_(0.5)
    assert_same_output(twin(x), halved(x))


def test_parametrized_weight_is_computed_every_call(backend: str) -> None:
    """Weight norm makes the weight from two parameters inside the graph."""
    module = build(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(48, 32)), nn.GELU())
    )
    compiled = torch.compile(module, backend=backend)
    x = block_input()
    assert_same_output(compiled(x), module(x))
    for p in module.parameters():
        p.mul_(1.5)
    assert_same_output(compiled(x), module(x))


def test_a_freed_weight_at_the_same_address_is_another_weight(backend: str) -> None:
    """New modules land in the memory of old ones: an address alone must not identify a packed weight."""
    run = torch.compile(lambda weight, x: torch.nn.functional.linear(x, weight), backend=backend)
    x = block_input()
    for seed in range(20):
        weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
        assert_same_output(run(weight, x), torch.nn.functional.linear(x, weight))
        del weight


def test_weights_made_in_inference_mode_count_no_edits(backend: str) -> None:
    """Their content shows an edit; a mixture with other parameters works too."""
    with torch.inference_mode():
        module = build(Block)
        module.down = nn.Linear(76, 48)
        with torch.inference_mode(False):
            module.out = nn.Linear(48, 48)
        compiled, x = torch.compile(module, backend=backend), block_input()
        assert_same_output(compiled(x), module(x))
        for edited in (module.up.weight, module.out.weight):
            edited.mul_(2)
            assert_same_output(compiled(x), module(x))
