"""llmopt.KVCache through compiled models: beside the same cache in eager, and codes beside caches of floats with kv_cache="int8"."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise
from typing import Any

import llmopt
import pytest
import torch
from llmopt import messages, mirrors
from llmopt.compiled import alive
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, StaticCache

from tests.e2e import zoo
from tests.e2e.test_generate import GREEDY, ONE, Counted, feed, padded, pieces_of

BOTH = pytest.mark.parametrize("name", ["llama", "mistral-window"])


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def assert_much_nearer(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """A value near the middle between two codes may round the other way: got is near want compared with what codes cost."""
    cost = rms(want - exact)
    assert cost > 1e-4 * rms(exact), "codes cost something"
    assert rms(got - want) <= 0.1 * cost


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_prefill_and_long_decode(name: str, dtype: torch.dtype, backend: str) -> None:
    eager, compiled = zoo.pair(name, backend, dtype, **ONE)
    ids = zoo.inputs(name, 180)["input_ids"]
    pieces = pieces_of(ids)
    logits, caches = [], []
    for model, cache in (
        (compiled, llmopt.KVCache(compiled)),
        (eager, llmopt.KVCache(eager)),
        (eager, DynamicCache(config=eager.config)),
    ):
        logits.append(torch.cat([feed(model, cache, piece) for piece in pieces], 1))
        caches.append(cache)
    if dtype == torch.float32:
        assert_much_nearer(*logits)
    else:  # half-precision eager rounds what it reads from the cache; the kernel does not
        assert rms(logits[0] - logits[2]) <= 1.5 * rms(logits[1] - logits[2])
    mine, theirs = caches[0].layers[0], caches[1].layers[0]
    for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
        assert a.shape == b.shape
        if dtype == torch.float32:
            assert (a[..., :-4] == b[..., :-4]).double().mean() > 0.999


@BOTH
def test_no_recompiles_after_warm_up(name: str, backend: str) -> None:
    model, counted = zoo.make(name, **ONE), Counted(backend)
    model.compile(backend=counted)

    def run(length: int, new: int) -> None:
        cache = llmopt.KVCache(model)
        model.generate(
            **zoo.inputs(name, length), max_new_tokens=new, past_key_values=cache, **GREEDY
        )
        assert cache.get_seq_length() == length + new - 1

    for length, new in ((9, 5), (14, 9), (15, 6)):
        run(length, new)
    graphs, calls = counted.graphs, counted.calls
    for length, new in ((11, 4), (30, 25), (8, 7)):
        run(length, new)
    assert counted.graphs == graphs, "new sizes recompiled"
    assert counted.calls - calls == 4 + 25 + 7, "every forward is one whole graph"


def test_padded_batch_and_beams(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = padded((13, 1, 7), "left")
    for how in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        got, want = (
            m.generate(**x, max_new_tokens=6, do_sample=False, past_key_values=llmopt.KVCache(m), **how)
            for m in (compiled, eager)
        )  # fmt: skip
        assert torch.equal(got, want)


def test_assisted_decoding_crops(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = zoo.inputs("llama", 12, batch=1)
    x["input_ids"][:, 6:] = x["input_ids"][:, :6]  # a repetition, for the lookup to find
    got, want = (
        m.generate(
            **x, do_sample=False, max_new_tokens=16, past_key_values=llmopt.KVCache(m), **how
        )
        for m, how in ((compiled, {"prompt_lookup_num_tokens": 3}), (eager, {}))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["rows", "arrays"])
def test_forked_cropped_and_reordered_caches(layout: str, backend: str) -> None:
    """One prefix goes on in several ways; no branch may write into what another one still reads."""
    eager, compiled = zoo.pair("llama", backend, **ONE)
    ids = zoo.inputs("llama", 40, batch=2)["input_ids"]
    prefix, left, right = ids[:, :10], ids[:, 10:16], ids[:, 20:26]

    def logits(model: Any, trunk: Any) -> torch.Tensor:
        feed(model, trunk, prefix)
        fork = copy.deepcopy(trunk)
        alias = copy.copy(trunk)  # shares the tensors themselves
        alias.layers = [copy.copy(layer) for layer in trunk.layers]
        out = []
        for step in range(6):
            for cache, branch in ((trunk, left), (fork, right), (alias, right)):
                out.append(feed(model, cache, branch[:, step : step + 1]))
        trunk.crop(-4)
        fork.reorder_cache(torch.tensor([1, 0]))
        alias.batch_select_indices(torch.tensor([1, 1]))
        for cache, branch in ((trunk, right), (fork, left), (alias, left)):
            out.extend(feed(model, cache, branch[:, step : step + 1]) for step in range(3))
        return torch.cat(out)

    exact = logits(eager, DynamicCache(config=eager.config))
    caches = (llmopt.KVCache(model, layout=layout) for model in (compiled, eager))
    assert_much_nearer(logits(compiled, next(caches)), logits(eager, next(caches)), exact)


@BOTH
def test_scales_beside_codes_are_those_behind_them(name: str) -> None:
    """In eager, whatever is done to a cache: the layouts hold the same numbers."""
    model = zoo.make(name, **ONE)
    ids = zoo.inputs(name, 60, batch=2)["input_ids"]
    caches = [llmopt.KVCache(model, layout=layout) for layout in ("rows", "arrays")]

    def same() -> bool:
        first, second = (cache.dequantized(0) for cache in caches)
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    logits = [[feed(model, c, piece) for piece in ids.split([40, 20], 1)] for c in caches]
    assert torch.equal(torch.cat(logits[0], 1), torch.cat(logits[1], 1))
    assert same()
    assert caches[1].layers[0].keys.shape[-1] == caches[0].layers[0].keys.shape[-1] - 4
    changes = [
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([2, 0])),
        lambda c: c.reset(),
    ]
    for change in changes:
        for cache in caches:
            change(cache)
        assert caches[1].get_seq_length() == caches[0].get_seq_length()
        assert caches[0].get_seq_length() == 0 or same()
    for cache in caches:
        feed(model, cache, ids[:, :5])
    assert same()


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no layout 'pages'; possible: rows, arrays"):
        llmopt.KVCache(zoo.make("llama", **ONE), layout="pages")


def test_nan_stays_visible(backend: str) -> None:
    """A token whose keys and values are NaN makes every later token NaN, and none before it."""
    _, compiled = zoo.pair("llama", backend, **ONE)
    embeds = torch.randn(1, 6, compiled.config.hidden_size)
    embeds[0, 3, 5] = torch.nan
    cache = llmopt.KVCache(compiled)
    with torch.no_grad():
        logits = compiled(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
    assert logits[0, :3].isfinite().all()
    assert logits[0, 3:].isnan().all()
    assert feed(compiled, cache, torch.tensor([[7]])).isnan().all()


def test_explain_shows_attention_over_codes(backend: str) -> None:
    _, compiled = zoo.pair("llama", backend, **ONE)
    report = llmopt.explain(
        compiled, **zoo.inputs("llama", 12), past_key_values=llmopt.KVCache(compiled)
    )
    details = [s.detail for s in report.steps if s.kernel == "attention.cpu"]
    assert details == ["append+rope_half+mask+int8_kv"]
    assert not [f for f in report.fallbacks if "kv" in f.operation]
    assert report.notes == ()


CACHES = {
    "dynamic": lambda m: DynamicCache(config=m.config),
    "static": lambda m: StaticCache(config=m.config, max_cache_len=256),
}
OPTION = {"kv_cache": "int8"}


def with_mirrors(name: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in eager, and compiled with kv_cache="int8"."""
    eager, compiled = zoo.make(name, dtype, **ONE), zoo.make(name, dtype, **ONE)
    compiled.compile(backend=backend, options=OPTION)
    return eager, compiled


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_read_codes_beside_floats(cache: str, dtype: torch.dtype, backend: str) -> None:
    """Prompts as exact as without the option; tokens as with llmopt.KVCache, whose prompts are rounded too."""
    eager, compiled = with_mirrors("llama", backend, dtype)
    ids = zoo.inputs("llama", 180)["input_ids"]
    caches = [CACHES[cache](compiled), CACHES[cache](eager), llmopt.KVCache(eager)]
    models = (compiled, eager, eager)
    logits = [
        [feed(m, c, piece) for piece in pieces_of(ids)] for m, c in zip(models, caches, strict=True)
    ]
    is_token = [piece.shape[1] == 1 for piece in pieces_of(ids)]
    got, want, codes = (
        torch.cat([x for x, t in zip(some, is_token, strict=True) if t], 1) for some in logits
    )
    assert 1e-5 * rms(want) < rms(got - want) <= 1.5 * rms(codes - want)
    if dtype == torch.float32:
        for x, y in (pair for *pair, t in zip(*logits[:2], is_token, strict=True) if not t):
            assert rms(x - y) <= 1e-5 * rms(y), "prompts read floats"
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.keys.dtype == dtype
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 5e-2)  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_edits_of_the_floats_are_noticed(cache: str, backend: str) -> None:
    eager, compiled = with_mirrors("llama", backend)
    ids = zoo.inputs("llama", 60)["input_ids"]

    def logits(model: Any) -> list[torch.Tensor]:
        held = CACHES[cache](model)
        out = [feed(model, held, piece) for piece in ids[:, :50].split([45, 1, 1, 1, 1, 1], 1)]
        held.layers[0].values[:, :, 3:40].mul_(-2)
        out += [feed(model, held, piece) for piece in ids[:, 50:].split(1, 1)]
        return out

    for got, want in zip(logits(compiled), logits(eager), strict=True):
        assert rms(got - want) <= 3e-2 * rms(want)


def test_forked_and_cropped_caches_have_their_own(backend: str) -> None:
    eager, compiled = with_mirrors("llama", backend)
    ids = zoo.inputs("llama", 60, batch=2)["input_ids"]

    def logits(model: Any) -> torch.Tensor:
        trunk = DynamicCache(config=model.config)
        feed(model, trunk, ids[:, :30])
        fork = copy.deepcopy(trunk)
        out = []
        for step in range(5):
            out += [feed(model, trunk, ids[:, 30 + step, None]), feed(model, fork, ids[:, 40 + step, None])]  # fmt: skip
        trunk.crop(-4)
        fork.reorder_cache(torch.tensor([1, 0]))
        for step in range(5):
            out += [feed(model, trunk, ids[:, 50 + step, None]), feed(model, fork, ids[:, 55 - step, None])]  # fmt: skip
        return torch.cat(out)

    got, want = logits(compiled), logits(eager)
    assert 1e-5 * rms(want) < rms(got - want) <= 3e-2 * rms(want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_the_option(cache: str, backend: str) -> None:
    model, counted = zoo.make("llama", **ONE), Counted(backend, OPTION)
    model.compile(backend=counted)

    def run(length: int, new: int) -> None:
        how = {"cache_implementation": "static"} if cache == "static" else {}
        model.generate(**zoo.inputs("llama", length), max_new_tokens=new, **how, **GREEDY)

    for length, new in ((9, 5), (14, 9), (15, 6)):
        run(length, new)
    graphs = counted.graphs
    for length, new in ((11, 4), (30, 25), (8, 7)):
        run(length, new)
    assert cache == "static" or counted.graphs == graphs, "new sizes recompiled"


def test_windows_and_inference_mode(backend: str) -> None:
    """Layers with a window drop their oldest keys; caches that grow count edits under inference_mode too."""
    eager, compiled = with_mirrors("mistral-window", backend)
    ids = zoo.inputs("mistral-window", 180)["input_ids"]
    with torch.inference_mode():
        got, want = (
            torch.cat([feed(m, c, piece) for piece in pieces_of(ids)], 1)
            for m in (compiled, eager)
            for c in [DynamicCache(config=m.config)]
        )
    assert 1e-5 * rms(want) < rms(got - want) <= 3e-2 * rms(want)


def test_a_static_cache_of_inference_mode_is_read_as_it_is(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_said", set())
    eager, compiled = with_mirrors("llama", backend)
    ids = zoo.inputs("llama", 30)["input_ids"]
    with torch.inference_mode():
        got, want = (
            torch.cat([feed(m, c, piece) for piece in ids.split([25, 1, 1, 1, 1, 1], 1)], 1)
            for m in (compiled, eager)
            for c in [CACHES["static"](m)]
        )
    assert rms(got - want) <= 1e-5 * rms(want)
    assert "counts no edits" in "".join(r.getMessage() for r in caplog.records)


def test_a_mirror_goes_with_its_cache(backend: str) -> None:
    _, compiled = with_mirrors("llama", backend)
    ids = zoo.inputs("llama", 30)["input_ids"]
    cache = CACHES["static"](compiled)
    for piece in ids.split([25, 1, 1, 1, 1, 1], 1):
        feed(compiled, cache, piece)
    gc.collect()
    held = [
        weakref.ref(mirrors._mirrors[t]) for t in (cache.layers[0].keys, cache.layers[0].values)
    ]
    del cache
    gc.collect()
    assert not any(ref() for ref in held)


def test_a_cache_that_was_copied_grows_in_place_again(backend: str) -> None:
    """Out of its slab, and reordered: one copy, none for the tokens that follow."""
    _, compiled = with_mirrors("llama", backend)
    ids = zoo.inputs("llama", 200)["input_ids"]
    cache = DynamicCache(config=compiled.config)
    feed(compiled, cache, ids[:, :20])
    places = []
    for step in range(20, 180):
        if step == 150:
            cache.reorder_cache(torch.tensor([1, 0]))
        feed(compiled, cache, ids[:, step, None])
        places.append(cache.layers[0].keys.data_ptr())
    moves = sum(a != b for a, b in pairwise(places))
    assert 2 <= moves <= 4


def whole(at: torch.Tensor, new: torch.Tensor, cache: torch.Tensor) -> None:
    cache.index_copy_(2, at, new)


def window(at: torch.Tensor, new: torch.Tensor, cache: torch.Tensor) -> None:
    cache[:, :, 8:].index_copy_(2, at, new)


def window_twice(at: torch.Tensor, new: torch.Tensor, cache: torch.Tensor) -> None:
    window(at, new, cache)
    window(at, new, cache)


def assigned(at: torch.Tensor, new: torch.Tensor, cache: torch.Tensor) -> None:
    cache[:, :, at] = new


def products(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, keys)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), values)


def normed(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    weights = (q @ keys.mT).square()
    return weights / weights.sum(-1, keepdim=True) @ values


def behind_a_sort(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q = torch.sort(F.layer_norm(q, (16,)), -1).values
    return F.scaled_dot_product_attention(q, keys, values)


ATTENTION = F.scaled_dot_product_attention
HANDMADE: dict[str, tuple[Any, Any, str]] = {
    "a kernel writes and the next reads": (whole, ATTENTION, ""),
    "through a window": (window, ATTENTION, "through a view of them"),
    "twice": (window_twice, ATTENTION, "otherwise than by one index_copy_"),
    "by assignment": (assigned, products, ""),
    "without a softmax": (
        assigned,
        normed,
        "2 tensor(s) like a cache's get to no attention kernel",
    ),
    "in another segment": (whole, behind_a_sort, "outside of the segment that reads them"),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_caches_that_a_model_writes_by_itself(name: str, backend: str) -> None:
    """Rows are kept where a kernel knows the positions, counted from the cache's first slot; a note says why others are read as floats."""
    write, attend, why = HANDMADE[name]

    def step(q: torch.Tensor, new: torch.Tensor, at: torch.Tensor, *caches: torch.Tensor) -> Any:
        new = F.layer_norm(new, (16,))
        for cache in caches:
            write(at, new, cache)
        return F.layer_norm(attend(q, *caches), (16,))

    compiled = torch.compile(step, backend=backend, options=OPTION)
    ours = [torch.randn(1, 2, 24, 16) for _ in range(2)]
    theirs = [cache.clone() for cache in ours]
    for at in (0, 3, 15, 3):
        q, new = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
        with torch.no_grad():
            got, want = (f(q, new, torch.tensor([at]), *c) for f, c in ((compiled, ours), (step, theirs)))  # fmt: skip
        error = rms(got - want) / rms(want)
        assert error < 1e-5 if why else 1e-4 < error < 5e-2
        torch.testing.assert_close(ours, theirs)
    plan = alive()[-1].plan
    assert any("int8_mirror" in record.detail for record in plan.records()) is not bool(why)
    assert len(plan.notes) == bool(why)
    assert why in "".join(plan.notes)


@pytest.mark.parametrize("cache", [*CACHES, "ours", "slides", "latent"])
def test_what_explain_says_of_the_option(
    cache: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_said", set())
    name = {"slides": "mistral-window", "latent": "deepseek-v3"}.get(cache, "llama")
    _, compiled = with_mirrors(name, backend)
    x = zoo.inputs(name, 12)["input_ids"]
    make = {**CACHES, "ours": llmopt.KVCache, "slides": CACHES["static"], "latent": CACHES["dynamic"]}[cache]  # fmt: skip
    held = make(compiled)
    feed(compiled, held, x)
    report = llmopt.explain(compiled, input_ids=x[:, :1], past_key_values=held)
    details = [s.detail for s in report.steps if s.kernel == "attention.cpu"]
    assert len(details) == 1
    assert details[0].endswith("+int8_mirror") == (cache in CACHES)
    if cache not in ("slides", "latent"):
        assert report.notes == ()
        assert not caplog.records
        return
    (note,) = report.notes
    assert f"llmopt: {note}" in [r.getMessage() for r in caplog.records]
    why = "no attention kernel" if cache == "latent" else "otherwise than by one index_copy_"
    assert why in note
    assert "past_key_values=llmopt.KVCache(model)" in note
