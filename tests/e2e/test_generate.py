"""`generate()` and hand-written decoding on a Llama and on a Mistral whose window is shorter than the prompt."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.cache_utils import DynamicCache, StaticCache

from tests.e2e import zoo
from tests.e2e.architectures import VOCAB
from tests.e2e.compare import assert_same_generation, assert_same_output

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
ONE = {"num_hidden_layers": 1}  # caches are one per layer: the zoo generates with two of them
BOTH = pytest.mark.parametrize("name", ["llama", "mistral-window"])


def padded(lengths: tuple[int, ...], side: str) -> dict[str, torch.Tensor]:
    """One prompt per length, filled up on one side."""
    ids = zoo.inputs("llama", max(lengths), batch=len(lengths))["input_ids"]
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        mask[i, slice(-n, None) if side == "left" else slice(None, n)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


class Counted:
    """A backend that counts the graphs it compiles and the calls they get."""

    def __init__(self, name: str, options: dict[str, Any] | None = None) -> None:
        self.backend = torch._dynamo.lookup_backend(name)
        self.options = {} if options is None else {"options": options}
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        compiled = self.backend(graph, example_inputs, **self.options)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return counted


@BOTH
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_no_recompiles_after_warm_up(name: str, cache: str, backend: str) -> None:
    model, eager, counted = zoo.make(name, **ONE), zoo.make(name, **ONE), Counted(backend)
    model.compile(backend=counted)
    how = GREEDY | {"cache_implementation": cache}
    for length, new in ((9, 5), (14, 9), (15, 6)):
        model.generate(**zoo.inputs(name, length), max_new_tokens=new, **how)
    graphs, calls = counted.graphs, counted.calls
    for length, new in ((11, 4), (30, 25), (8, 7)):
        x = zoo.inputs(name, length)
        got = model.generate(**x, max_new_tokens=new, **how)
        assert_same_generation(got, eager.generate(**x, max_new_tokens=new, **how))
    assert counted.graphs == graphs, "new sizes recompiled"
    assert counted.calls - calls == 4 + 25 + 7, "every forward is one whole graph"


@pytest.mark.parametrize("length", [1, 9])
def test_decoding_compiles_one_graph(length: int, backend: str) -> None:
    """The first call with a cache is compiled for every length; one with a cache of one position is not: Dynamo takes 1 for a constant."""
    model, eager, counted = zoo.make("llama", **ONE), zoo.make("llama", **ONE), Counted(backend)
    model.compile(backend=counted)
    x = zoo.inputs("llama", length)
    got = model.generate(**x, max_new_tokens=6, **GREEDY)
    assert_same_generation(got, eager.generate(**x, max_new_tokens=6, **GREEDY))
    assert counted.graphs == (2 if length > 1 else 3), "the prompt, and one token after any length"


def test_caches_are_copied_and_saved_as_any_tensor(backend: str, tmp_path: Path) -> None:
    model = zoo.make("llama", **ONE)
    model.compile(backend=backend)
    with torch.no_grad():
        keys = model(**zoo.inputs("llama", 9), use_cache=True).past_key_values.layers[0].keys
    torch.save(keys, tmp_path / "keys.pt")
    for same in (copy.deepcopy(keys), torch.load(tmp_path / "keys.pt", weights_only=True)):
        torch.testing.assert_close(same, keys)


BATCHES = {
    "llama-left": ("llama", "left", ((13, 1, 7), (5, 12, 12, 2, 9, 1, 3, 11), (10,))),
    "llama-right": ("llama", "right", ((13, 1, 7),)),
    "mistral-left": ("mistral-window", "left", ((13, 1, 7), (3, 9))),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_with_padding(case: str, backend: str) -> None:
    name, side, batches = BATCHES[case]
    eager, compiled = zoo.pair(name, backend, **ONE)
    for lengths in batches:
        x = padded(lengths, side)
        want = eager.generate(**x, max_new_tokens=4, **GREEDY)
        assert_same_generation(compiled.generate(**x, max_new_tokens=4, **GREEDY), want)


def test_right_padding_does_not_reach_the_rows_beside_it(backend: str) -> None:
    """In a padded batch each prompt gets the logits that it gets alone."""
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = padded((13, 1, 7), "right")
    with torch.no_grad():
        together = compiled(**x).logits
        for i, n in enumerate((13, 1, 7)):
            alone = eager(input_ids=x["input_ids"][i : i + 1, :n]).logits[0]
            assert_same_output(together[i, :n], alone)


def test_inputs_embeds(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = zoo.inputs("llama", 11)
    x["inputs_embeds"] = eager.get_input_embeddings()(x.pop("input_ids")).detach() * 1.25
    want = eager.generate(**x, max_new_tokens=6, **GREEDY)
    assert_same_generation(compiled.generate(**x, max_new_tokens=6, **GREEDY), want)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_hidden_states_and_attentions(name: str, backend: str) -> None:
    eager, compiled = zoo.make(name), zoo.make(name)
    for model in (eager, compiled):
        model.set_attn_implementation("eager")
    compiled.compile(backend=backend)
    x = padded((13, 4), "left")
    with torch.no_grad():
        want = eager(**x, output_hidden_states=True, output_attentions=True)
        got = compiled(**x, output_hidden_states=True, output_attentions=True)
    assert len(want.hidden_states) == 3
    assert len(want.attentions) == 2
    assert_same_output(got, want)


def test_explicit_position_ids(backend: str) -> None:
    """Shifted, and two sequences packed into one row."""
    eager, compiled = zoo.pair("llama", backend, **ONE)
    ids = zoo.inputs("llama", 12)["input_ids"]
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        for positions in (torch.arange(40, 52).expand(2, -1), packed):
            want = eager(ids, position_ids=positions)
            assert_same_output(compiled(ids, position_ids=positions), want)
        assert (want.logits - eager(ids).logits).abs().max() > 0.1


def test_beam_search(backend: str) -> None:
    eager, compiled = zoo.pair("mistral-window", backend, **ONE)
    x = padded((11, 6), "left")
    how = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 7,
           "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    got, want = compiled.generate(**x, **how), eager.generate(**x, **how)
    assert torch.equal(got.sequences, want.sequences)
    assert_same_output(got.sequences_scores, want.sequences_scores)


def test_sampling_with_a_seed(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = zoo.inputs("llama", 9, batch=3)
    texts = []
    for model in (eager, compiled):
        torch.manual_seed(7)
        texts.append(
            model.generate(**x, do_sample=True, top_k=20, temperature=0.8, max_new_tokens=16)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("assistant", ["model", "prompt-lookup"])
def test_assisted_decoding(assistant: str, backend: str) -> None:
    """The cache is cropped after every rejected guess; the text must stay the greedy one."""
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = zoo.inputs("llama", 12, batch=1)
    x["input_ids"][:, 6:] = x["input_ids"][:, :6]  # a repetition, for the lookup to find
    if assistant == "model":
        guesses = {"assistant_model": zoo.make("llama", seed=1, **ONE)}
        guesses["assistant_model"].compile(backend=backend)
    else:
        guesses = {"prompt_lookup_num_tokens": 3}
    got = compiled.generate(**x, do_sample=False, max_new_tokens=16, **guesses)
    assert torch.equal(got, eager.generate(**x, do_sample=False, max_new_tokens=16))


def test_text_pipeline(backend: str) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left"
    )
    prompts = ["w5 w9 w33 w101", "w7", "w100 w3 w8 w64 w65 w66"]
    texts = [
        pipeline("text-generation", model=model, tokenizer=fast, batch_size=3)(
            prompts, max_new_tokens=6, do_sample=False
        )
        for model in zoo.pair("llama", backend, **ONE)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0][1][0]["generated_text"].split("w")) == 1 + 1 + 6


def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """One forward over new tokens; the logits of all of them."""
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def pieces_of(ids: torch.Tensor) -> list[torch.Tensor]:
    """Two prefills, tokens one by one past the capacity that the first left, a prefill past what that became, more tokens."""
    sizes = [23, 17, *[1] * 60, ids.shape[1] - 105, *[1] * 5]
    return list(ids.split(sizes, dim=1))


@BOTH
def test_chunked_prefill_and_long_decode(name: str, backend: str) -> None:
    eager, compiled = zoo.pair(name, backend, **ONE)
    ids = zoo.inputs(name, 340)["input_ids"]
    want = feed(eager, DynamicCache(config=eager.config), ids)
    cache = DynamicCache(config=compiled.config)
    got = torch.cat([feed(compiled, cache, piece) for piece in pieces_of(ids)], dim=1)
    assert_same_output(got, want)


def test_generate_with_prefill_chunks(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    x = zoo.inputs("llama", 20)
    want = eager.generate(**x, max_new_tokens=5, **GREEDY)
    assert_same_generation(
        compiled.generate(**x, max_new_tokens=5, prefill_chunk_size=8, **GREEDY), want
    )


def test_forked_cropped_and_reordered_caches(backend: str) -> None:
    """One prefix goes on in several ways; no branch may write into what another one still reads."""
    eager, compiled = zoo.pair("llama", backend, **ONE)
    ids = zoo.inputs("llama", 40, batch=2)["input_ids"]
    prefix, left, right = ids[:, :10], ids[:, 10:16], ids[:, 20:26]

    def logits(model: Any) -> list[torch.Tensor]:
        trunk = DynamicCache(config=model.config)
        feed(model, trunk, prefix)
        fork = copy.deepcopy(trunk)
        alias = DynamicCache(config=model.config)  # shares the tensors themselves
        for layer, source in enumerate(trunk.layers):
            alias.update(source.keys, source.values, layer)
        shared = DynamicCache(config=model.config)
        for mine, source in zip(shared.layers, trunk.layers, strict=True):
            mine.lazy_initialization(source.keys, source.values)
            mine.keys, mine.values = source.keys, source.values
        out = []
        for step in range(6):
            for cache, branch in ((trunk, left), (fork, right), (alias, left), (shared, right)):
                out.append(feed(model, cache, branch[:, step : step + 1]))
        trunk.crop(-4)
        fork.reorder_cache(torch.tensor([1, 0]))
        shared.reorder_cache(torch.tensor([1, 1]))
        for cache, branch in ((trunk, right), (fork, left), (shared, left), (alias, right)):
            out.extend(feed(model, cache, branch[:, step : step + 1]) for step in range(3))
        return out

    assert_same_output(logits(compiled), logits(eager))


def test_each_cache_begins_its_own_storage(backend: str) -> None:
    """Offsets that differ by layer would be arguments of the compiled code; one cache alone keeps its memory."""
    model, x = zoo.make("llama", **ONE), zoo.inputs("llama", 9, batch=1)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        cache = compiled(**x, use_cache=True).past_key_values
        tokens = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(3):
            cache = compiled(tokens, past_key_values=cache).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert all(t.storage_offset() == 0 and t.shape[2] == 12 for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    kept, content = tensors[-1], tensors[-1].clone()
    del cache, tensors
    gc.collect()
    with torch.no_grad():  # takes new memory, not that of the cache which is left
        compiled(**x, use_cache=True)
    assert torch.equal(kept, content)


def test_static_cache_reset_and_reuse(backend: str) -> None:
    eager, compiled = zoo.pair("llama", backend, **ONE)
    cache = StaticCache(config=compiled.config, max_cache_len=48)
    for length in (12, 19, 5):
        cache.reset()
        x = zoo.inputs("llama", length)
        want = eager.generate(**x, max_new_tokens=6, **GREEDY)
        assert_same_generation(
            compiled.generate(**x, past_key_values=cache, max_new_tokens=6, **GREEDY), want
        )
        assert cache.get_seq_length() == length + 5


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_static_caches_that_slide(name: str, backend: str) -> None:
    """Prompts shorter and longer than the window, turns of several tokens behind a full one: one segment each."""
    eager, compiled = zoo.pair(name, backend)
    known = set(alive())
    for lengths in ((9, 1, 1, 4, 1), (3, 2, 5, 1)):
        caches = [StaticCache(config=m.config, max_cache_len=32) for m in (eager, compiled)]
        for i, length in enumerate(lengths):
            ids = zoo.inputs(name, length, batch=2, seed=i)["input_ids"]
            want, got = (feed(m, c, ids) for m, c in zip((eager, compiled), caches, strict=True))
            assert_same_output(got, want)
        for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert_same_output([ours.keys, ours.values], [theirs.keys, theirs.values])
    graphs = [g for g in alive() if g not in known]
    assert any("slide" in str(g.plan) for g in graphs)
    assert {len(g.plan.segments) for g in graphs} == {1}


def test_two_models_and_two_conversations_interleaved(backend: str) -> None:
    """Each conversation has its own model or its own cache; turns alternate token by token."""
    pairs = [zoo.pair("llama", backend, **ONE), zoo.pair("mistral-window", backend, **ONE)]
    talks = [(pairs[0], 3), (pairs[0], 5), (pairs[1], 4), (pairs[1], 6)]
    prompts = [zoo.inputs("llama", 9, seed=seed)["input_ids"] for _, seed in talks]
    caches = [[DynamicCache(config=model.config) for model in pair] for pair, _ in talks]
    for _turn in range(7):
        for i, (pair, _) in enumerate(talks):
            want, got = (feed(m, c, prompts[i]) for m, c in zip(pair, caches[i], strict=True))
            assert_same_output(got, want)
            prompts[i] = want[:, -1:].argmax(-1)
