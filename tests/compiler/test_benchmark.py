"""The benchmark's arithmetic: phases, work, medians, ratios, disturbed rounds, tables."""

from __future__ import annotations

import json

import pytest
import torch
from llmopt.benchmark import plot, rounds, systems
from llmopt.benchmark.phases import CAUSAL, Phase, phases_of, run_once, sample
from llmopt.benchmark.results import (
    Setting,
    json_lines,
    markdown,
    number,
    rows_of,
    write_markdown,
)
from llmopt.benchmark.rounds import Measurement, Run
from llmopt.benchmark.work import Work, weight_bytes, work_of
from llmopt.benchmark.worker import Job, WorkerError
from llmopt.models import LoadedModel, ModelError
from llmopt.native.probe import Probe
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, VOCAB = 32, 2, 128
SETTING = Setting("toy", "fp32", 2, "llmopt bench toy")
DECODE = Phase("decode", "tokens/s", tokens=4, new=2)


def llama(tied: bool) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LoadedModel("toy", LlamaForCausalLM(config).eval(), "causal")


# phases


def test_phases_are_chosen_by_kind_and_name():
    assert phases_of("causal") == CAUSAL
    assert [p.name for p in phases_of("causal", ["decode", "prefill"])] == ["decode", "prefill"]
    assert phases_of("encoder", ["3x17"]) == (Phase("3x17", "ms", batch=3, tokens=17),)
    assert [p.name for p in phases_of("encoder")] == ["8x128", "1x128"]
    assert phases_of("call")[0].name == "call"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("causal", "prefil"), ("encoder", "8"), ("encoder", "0x4"), ("encoder", "8x"), ("call", "x")],
)
def test_unknown_phases_are_errors(kind, name):
    with pytest.raises(ModelError, match="unknown phase"):
        phases_of(kind, [name])


def test_units():
    assert Phase("prefill", "tokens/s", tokens=100).value(0.5) == 200
    assert Phase("decode", "tokens/s", tokens=100, new=10).value(0.5) == 20
    assert Phase("first-token", "ms", tokens=100).value(0.5) == 500


def test_decode_is_greedy_generation():
    """The loop feeds each token it chose back, with a cache: the same tokens generate() gives."""
    loaded = llama(tied=False)
    fed = []

    class Recorder:
        def __init__(self, runner):
            self.runner = runner

        def step(self, ids, cache):
            fed.append(ids)
            return self.runner.step(ids, cache)

    with torch.inference_mode():
        run_once(Recorder(systems.SYSTEMS["eager"].build(loaded, [])), loaded, DECODE)
        model = loaded.model
        want = model.generate(fed[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(fed[1:], 1), want[:, 4:])


def test_samples_of_equal_systems_are_equal():
    loaded = llama(tied=True)
    runner = systems.SYSTEMS["eager"].build(loaded, [])
    with torch.inference_mode():
        first = sample(runner, loaded, DECODE)
        assert first.shape == (2, 1, VOCAB)
        assert torch.equal(first, sample(runner, loaded, DECODE))


# work


def test_weight_bytes_count_what_is_read():
    untied, tied = llama(False).model, llama(True).model
    table = VOCAB * HIDDEN * 4
    assert weight_bytes(untied) == 4 * sum(p.numel() for p in untied.parameters()) - table
    assert weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())


def layer_flops(tokens: int) -> int:
    """Of the linears of all layers: q, k, v, o, then gate, up, down."""
    return LAYERS * 2 * tokens * HIDDEN * (HIDDEN + HIDDEN // 2 * 2 + HIDDEN + 3 * 64)


def attention_flops(queries: int, keys: int) -> int:
    return LAYERS * 4 * queries * keys * HIDDEN


def test_prefill_work_counts_live_scores_and_one_row_of_logits():
    loaded = llama(tied=False)
    work = work_of(loaded, Phase("prefill", "tokens/s", tokens=16))
    logits = 2 * HIDDEN * VOCAB
    rotary = 2 * 16 * 8 // 2  # the matrix product that makes the angles, half of it discounted
    live = attention_flops(16, 16) * 17 / 32
    assert work.flops == pytest.approx(layer_flops(16) + logits + live, abs=2 * rotary)
    assert work.num_bytes == weight_bytes(loaded.model)


def test_decode_work_counts_the_cache():
    loaded = llama(tied=False)
    work = work_of(loaded, DECODE)
    kv_per_token = LAYERS * 2 * (HIDDEN // 2) * 4
    assert work.num_bytes == 2 * weight_bytes(loaded.model) + kv_per_token * (5 + 6)
    assert work.flops == pytest.approx(
        2 * (layer_flops(1) + attention_flops(1, 5) + 2 * HIDDEN * VOCAB), rel=0.01
    )


def test_encoder_work():
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    loaded = LoadedModel("bert", BertModel(config).eval(), "encoder")
    (phase,) = phases_of("encoder", ["2x16"])
    pooler = 2 * 2 * 32 * 32
    linears = 2 * 2 * 16 * (4 * 32 * 32 + 2 * 32 * 64)
    assert work_of(loaded, phase).flops == linears + pooler + 2 * 4 * 16 * 16 * 32


def test_mixtures_of_experts_have_no_bound():
    loaded = llama(tied=True)
    loaded.model.config.num_local_experts = 8
    assert work_of(loaded, DECODE) is None


def test_the_roofline_is_the_larger_of_two_times():
    assert Work(flops=100.0, num_bytes=10.0).seconds(fma_flops=50.0, read_bytes=100.0) == 2.0
    assert Work(flops=100.0, num_bytes=10.0).seconds(fma_flops=500.0, read_bytes=1.0) == 10.0


# rounds


class FakeWorker:
    """Answers like a worker; a command listed in `broken` fails."""

    broken: tuple[str, ...] = ()
    seconds = 1.0

    def __init__(self, job, phases):
        self.job = job
        self.stopped = False

    def ask(self, command, phase=None):
        if command in self.broken and self.job.system == "inductor":
            raise WorkerError(f"{command} went wrong")
        answers = {
            "work": Work(flops=1.0, num_bytes=1.0),
            "start": 5.0,
            "sample": torch.tensor([1.0, -2.0]) * (1.5 if self.job.system == "llmopt" else 1.0),
            "measure": self.seconds,
            "peak_mib": 10.0,
        }
        return answers[command]

    def stop(self):
        self.stopped = True


def run_fake(monkeypatch, probes, names=("llmopt", "eager", "inductor"), number=2, broken=()):
    probe = iter(probes)
    monkeypatch.setattr(rounds, "Worker", type("W", (FakeWorker,), {"broken": broken}))
    monkeypatch.setattr(rounds, "measure", lambda threads: Probe(next(probe), 0.0, 1.0))
    said = []
    chosen = [systems.SYSTEMS[name] for name in names]
    jobs = {name: Job(name, "toy", "fp32", 1, False) for name in names}
    return rounds.run(chosen, [DECODE], jobs.__getitem__, number, said.append), said


def calm():
    while True:
        yield 1.0


def test_every_system_is_measured_every_round(monkeypatch):
    result, said = run_fake(monkeypatch, calm())
    assert result.systems == ["llmopt", "eager", "inductor"]
    assert {key: len(found) for key, found in result.measurements.items()} == {
        (name, "decode"): 2 for name in result.systems
    }
    order = [text.rsplit(", ", 1)[1] for text in said if text.startswith("round")]
    assert order == ["llmopt", "eager", "inductor"] * 2
    assert set(result.compile_seconds) == {"llmopt", "inductor"}
    assert result.difference == {"llmopt": 0.5, "eager": 0.0, "inductor": 0.0}


def test_a_disturbed_measurement_is_repeated(monkeypatch):
    result, _ = run_fake(monkeypatch, [1.0, 0.5, 1.0, 0.95], names=("llmopt",), number=1)
    (found,) = result.measurements["llmopt", "decode"]
    assert (found.steady, found.fma_flops) == (True, pytest.approx(0.975))


def test_a_machine_that_never_calms_is_marked(monkeypatch):
    probes = [1.0, 0.5] * rounds.TRIES
    result, _ = run_fake(monkeypatch, probes, names=("llmopt",), number=1)
    (found,) = result.measurements["llmopt", "decode"]
    assert not found.steady


@pytest.mark.parametrize("command", ["start", "measure"])
def test_a_system_that_fails_does_not_stop_the_others(monkeypatch, command):
    result, _ = run_fake(monkeypatch, calm(), broken=(command,))
    assert result.systems == ["llmopt", "eager"]
    assert f"{command} went wrong" in result.failures["inductor"]
    assert "inductor" not in {row.system for row in rows_of(result, [DECODE])}


# results


def measured(*seconds: float, unsteady: tuple[float, ...] = ()) -> list[Measurement]:
    steady = [Measurement(s, 1e11, 1e10, True) for s in seconds]
    return steady + [Measurement(s, 1e11, 1e10, False) for s in unsteady]


@pytest.fixture
def a_run() -> Run:
    return Run(
        systems=["llmopt", "eager"],
        work={"decode": Work(flops=1.0, num_bytes=1e10)},  # one second at the measured bandwidth
        compile_seconds={"llmopt": 1.5},
        peak_mib={"llmopt": 900.0, "eager": 800.0},
        measurements={
            ("llmopt", "decode"): measured(1.25, 1.2, 1.3, unsteady=(9.0, 9.0, 9.0)),
            ("eager", "decode"): measured(2.5),
        },
    )


def test_rows_are_medians_of_steady_rounds(a_run):
    ours, eager, compiling, *memory = rows_of(a_run, [DECODE])
    assert (ours.system, ours.value, ours.ratio) == ("llmopt", 2 / 1.25, 2.0)
    assert ours.of_bound == pytest.approx(0.8)
    assert (ours.rounds, ours.steady) == (6, 3)
    assert (eager.ratio, eager.of_bound) == (1.0, pytest.approx(0.4))
    assert (compiling.phase, compiling.value) == ("compile", 1.5)
    assert [row.value for row in memory] == [900.0, 800.0]


def test_json_lines_have_the_agreed_keys(a_run):
    lines = [json.loads(x) for x in json_lines(rows_of(a_run, [DECODE]), SETTING).splitlines()]
    keys = {"system", "model", "dtype", "phase", "value", "unit", "probe"}
    assert all(keys <= set(line) for line in lines)
    assert lines[0]["probe"] == {"fma_flops": 1e11, "read_bytes": 1e10}
    assert len(lines) == 5


def test_markdown_table(a_run):
    table = markdown(rows_of(a_run, [DECODE]), SETTING)
    assert "| toy fp32 | llmopt | eager |" in table
    assert "| decode of 2 after 4, tokens/s | 1.60 (2.00×, 80%) | 0.80 (40%) |" in table
    assert "| compile, cold, s | 1.50 | – |" in table


def test_markdown_goes_between_its_marks_only(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "above\n<!-- bench toy fp32 -->\nold\n<!-- end bench toy fp32 -->\n"
        "<!-- bench toy fp16 -->\nkept\n<!-- end bench toy fp16 -->\nbelow\n"
    )
    for _ in range(2):
        write_markdown(path, "new\n", SETTING)
        assert path.read_text() == (
            "above\n<!-- bench toy fp32 -->\nnew\n<!-- end bench toy fp32 -->\n"
            "<!-- bench toy fp16 -->\nkept\n<!-- end bench toy fp16 -->\nbelow\n"
        )
    with pytest.raises(ModelError, match="has no place for the table"):
        write_markdown(path, "new\n", Setting("other", "fp32", 2, ""))
    write_markdown(tmp_path / "new.md", "new\n", SETTING)
    assert "new" in (tmp_path / "new.md").read_text()


def test_numbers_keep_three_digits():
    assert [number(x) for x in (0.1234, 9.87, 45.678, 1234.5)] == ["0.12", "9.87", "45.7", "1,234"]


def test_plot_is_a_picture(a_run, tmp_path):
    plot.plot(tmp_path / "x.png", rows_of(a_run, [DECODE]), SETTING)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# systems


def test_unknown_and_missing_systems_are_errors(monkeypatch):
    assert [s.name for s in systems.systems_of(["eager", "llmopt"])] == ["llmopt", "eager"]
    with pytest.raises(ModelError, match=r"unknown system 'tvm': expected some of llmopt, .*eager"):
        systems.systems_of(["tvm"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ModelError, match=r"inductor cannot run here: .*install g\+\+"):
        systems.systems_of(["inductor"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install onnx onnxruntime onnxscript"):
        systems.systems_of(["onnxruntime"])
