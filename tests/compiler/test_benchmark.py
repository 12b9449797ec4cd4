"""The benchmark's arithmetic: phases, work, medians, ratios, disturbed rounds, tables."""

from __future__ import annotations

import dataclasses
import json

import llmopt
import numpy as np
import pytest
import torch
from llmopt import cli
from llmopt.benchmark import accuracy, plot, rounds, systems
from llmopt.benchmark.phases import Phase, phases_of
from llmopt.benchmark.results import (
    Setting,
    json_lines,
    markdown,
    number,
    rows_of,
    write_markdown,
)
from llmopt.benchmark.rounds import Measurement, Run
from llmopt.benchmark.work import EXACT, Form, Work, form_of, form_stored, work_of
from llmopt.benchmark.worker import Job, WorkerError
from llmopt.models import LoadedModel, ModelError
from llmopt.models.text import documentation
from llmopt.native.probe import READ_BYTES, Probe
from llmopt.packing import code_bytes
from llmopt.quant.schemes import SCHEMES, CodeForm
from transformers import BertConfig, BertModel

from tests.compiler.toy import HIDDEN, LAYERS, VOCAB, llama

SETTING = Setting("toy", "fp32", 2, "llmopt bench toy")
DECODE = Phase("decode", "tokens/s", tokens=4, new=2)


# work


PREFILL = Phase("prefill", "tokens/s", tokens=16)


def test_work_counts_the_weights_that_are_read():
    for tied in (False, True):
        loaded = llama(tied)
        work = work_of(loaded, PREFILL)
        everything = sum(p.numel() for p in loaded.model.parameters())
        table = 0 if tied else VOCAB * HIDDEN  # an untied one is looked into only
        assert work.num_bytes() == 4 * (everything - table)
        assert work.head_weights == VOCAB * HIDDEN
        assert work.others == (2 * LAYERS + 1) * HIDDEN  # the norms


def test_work_is_in_the_models_dtype():
    loaded = llama(tied=True)
    loaded.model.to(torch.bfloat16)
    work = work_of(loaded, PREFILL)
    assert (work.dtype, work.num_bytes()) == ("bf16", work_of(llama(True), PREFILL).num_bytes() / 2)
    loaded.model.to(torch.float64)
    assert work_of(loaded, PREFILL) is None


def layer_flops(tokens: int) -> int:
    """Of the linears of all layers: q, k, v, o, then gate, up, down."""
    return LAYERS * 2 * tokens * HIDDEN * (HIDDEN + HIDDEN // 2 * 2 + HIDDEN + 3 * 64)


def attention_flops(queries: int, keys: int) -> int:
    return LAYERS * 4 * queries * keys * HIDDEN


def test_prefill_work_counts_live_scores_and_one_row_of_logits():
    loaded = llama(tied=False)
    work = work_of(loaded, PREFILL)
    logits = 2 * HIDDEN * VOCAB
    rotary = 2 * 16 * 8 // 2  # the matrix product that makes the angles, half of it discounted
    live = attention_flops(16, 16) * 17 / 32
    assert work.linear_flops == pytest.approx(layer_flops(16) + logits, abs=rotary)
    assert work.attention_flops == pytest.approx(live, abs=rotary)


def test_decode_work_counts_the_cache():
    loaded = llama(tied=False)
    work = work_of(loaded, DECODE)
    kv_per_token = LAYERS * 2 * (HIDDEN // 2) * 4
    once = work_of(loaded, PREFILL).num_bytes()
    assert work.num_bytes() == 2 * once + kv_per_token * (5 + 6)
    assert work.linear_flops == 2 * (layer_flops(1) + 2 * HIDDEN * VOCAB)
    assert work.attention_flops == pytest.approx(2 * attention_flops(1, 5), rel=0.02)


def test_encoder_work():
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    loaded = LoadedModel("bert", BertModel(config).eval(), "encoder")
    (phase,) = phases_of("encoder", ["2x16"])
    pooler = 2 * 2 * 32 * 32
    linears = 2 * 2 * 16 * (4 * 32 * 32 + 2 * 32 * 64)
    work = work_of(loaded, phase)
    assert work.linear_flops == linears + pooler
    assert work.attention_flops == 2 * 4 * 16 * 16 * 32
    assert (work.head_weights, work.kv) == (0, 0)


def test_models_without_a_bound():
    loaded = llama(tied=True)
    loaded.model.config.num_local_experts = 8
    assert work_of(loaded, DECODE) is None
    small = llmopt.quantize(llama(tied=True).model, "w8a8", group=32)
    assert work_of(LoadedModel("toy", small, "causal"), DECODE) is None


WORK = Work("f32", 6e3, 1e3, weights=100.0, head_weights=10.0, kv=8.0, others=1.0)
FAST_MEMORY = Probe(1e3, 3e3, 1e9, tile_flops=12e3, tile_ops=24e3)  # f32 by tiles: 12e3 / 6
FAST_CORES = Probe(1e9, 1e9, 100.0)


def test_the_form_of_weights_that_fewer_bits_hold():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)).eval()
    assert form_stored(model) == EXACT
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.bfloat16())
    mean = (64 * 64 * 2 + 64 * 32 * 4) / (64 * 64 + 64 * 32)
    assert form_stored(model) == Form("f32·bf16", 1, weight_bytes=mean)
    with torch.no_grad():
        for layer in model:
            codes = torch.randint(-126, 127, layer.weight.shape)
            codes[:, ::32] = 127
            layer.weight.copy_(codes / 1024)
    assert form_stored(model) == Form("s8", 3, weight_bytes=1 + 4 / 32)
    assert form_stored(model.double()) == EXACT


@pytest.mark.parametrize(
    ("form", "num_bytes", "compute"),
    [
        (Form(), 4 * 119, 6 / 2 + 1 / 2),
        (Form("s8", weight_bytes=1.0), 110 + 4 * 9, 6 / 24 + 1 / 2),
        (Form("s8", 3, 0.5, 1.0), 50 + 10 + 4 * 9, 6 / 8 + 1 / 2),
        (Form("s8", 24, 0.5), 55 + 4 * 9, 6 / 2 + 1 / 2),  # f32 would be faster than 24 products
        (Form("f16", weight_bytes=2.0, kv_bytes=2.0), 220 + 16 + 4, 6 / 4 + 1 / 2),
        (Form("s8", weight_bytes=1.0, attention="bf16"), 110 + 4 * 9, 6 / 24 + 1 / 12),
    ],
    ids=str,
)
def test_a_form_has_a_roofline_of_its_own(form, num_bytes, compute):
    assert WORK.num_bytes(form) == num_bytes
    assert WORK.least_seconds(form, FAST_CORES) == num_bytes / 100
    assert WORK.least_seconds(form, FAST_MEMORY) == pytest.approx(compute)


def test_bytes_of_a_scheme_are_those_of_packed_weights():
    """As the kernels lay them out, but for padding and for the slack behind."""
    for scheme in SCHEMES.values():
        form = CodeForm(scheme.bits, scheme.group, scheme.symmetric)
        n, k = 1 << 14, 1 << 12
        packed = code_bytes(n, k // scheme.group, form, 32) / (n * k)
        assert form_of(scheme).weight_bytes == pytest.approx(packed, rel=0.01)
        assert form_of(scheme).head_bytes == 1 + 4 / scheme.group


def test_attention_of_a_scheme_is_bounded_as_it_is_computed():
    assert [name for name, s in SCHEMES.items() if form_of(s).attention == "bf16"] == [
        "w8a8",
        "w4a8",
    ]
    assert form_of(SCHEMES["w8a16"]).attention is None


# accuracy


def test_outputs_of_a_causal_model_are_its_predictions(monkeypatch):
    """A prompt and then a token a step: the logits that one call over the whole text gives."""
    monkeypatch.setattr(accuracy, "WINDOWS", 2)
    loaded = llama(tied=False)
    fed = accuracy._text_ids(loaded, 2, DECODE.tokens + accuracy.NEW_TOKENS)
    with torch.inference_mode():
        got = accuracy.outputs(systems.SYSTEMS["eager"].build(loaded, []), loaded, [DECODE])
        want = loaded.model(input_ids=fed).logits[:, DECODE.tokens - 1 :].flatten(0, 1)
    assert got.shape == (2 * (accuracy.NEW_TOKENS + 1), VOCAB)
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-5)


def test_logits_are_compared_by_divergence_and_best_token():
    wanted = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    got = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    found = accuracy.compare("causal", wanted, got)
    want = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert found.divergence == pytest.approx(want, rel=1e-5)
    assert (found.samples, found.top1) == (2, 0.5)


def test_embeddings_are_compared_by_cosine():
    wanted, got = np.eye(2, dtype=np.float32), np.array([[2, 0], [1, 1]], np.float32)
    found = accuracy.compare("encoder", wanted, got)
    assert found.mean_cosine == pytest.approx((1 + 2**-0.5) / 2)
    assert found.lowest_cosine == pytest.approx(2**-0.5)


def test_calibration_is_not_on_the_text_that_is_measured():
    loaded = LoadedModel("bytes", llama(tied=True).model, "causal", tokenizer=ByteTokenizer())
    measured = accuracy._text_ids(loaded, 3, 50)
    assert bytes(measured.flatten().tolist()) == documentation().content.encode()[:150]
    assert not torch.equal(measured, accuracy.calibration_ids(loaded, 3, 50))


class ByteTokenizer:
    def __call__(self, content, add_special_tokens, verbose):
        return {"input_ids": list(content.encode())}


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
            "work": WORK,
            "build": None,
            "start": 5.0,
            "outputs": ("encoder", np.eye(2, dtype=np.float32)),
            "sample": torch.tensor([1.0, -2.0]) * (1.5 if self.job.system == "llmopt" else 1.0),
            "measure": self.seconds,
            "peak_mib": 10.0,
            "form": self.form(),
        }
        return answers[command]

    def form(self):
        form = systems.SYSTEMS[self.job.system].form
        return EXACT if callable(form) else form

    def stop(self):
        self.stopped = True


def run_fake(monkeypatch, probes, names=("llmopt", "eager", "inductor"), number=2, broken=()):
    probe = iter(probes)
    monkeypatch.setattr(rounds, "Worker", type("W", (FakeWorker,), {"broken": broken}))
    monkeypatch.setattr(rounds, "measure", lambda threads, read_bytes: Probe(next(probe), 0.0, 1.0))
    said = []
    chosen = [systems.SYSTEMS[name] for name in names]
    jobs = {name: Job(name, "toy", "fp32", 1, False) for name in {*names, "eager"}}
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
    assert {name: found.mean_cosine for name, found in result.accuracy.items()} == {
        "llmopt": 1.0,
        "eager": 1.0,
        "inductor": 1.0,
    }


def test_a_disturbed_measurement_is_repeated(monkeypatch):
    result, _ = run_fake(monkeypatch, [1.0, 0.5, 1.0, 0.95], names=("llmopt",), number=1)
    (found,) = result.measurements["llmopt", "decode"]
    assert (found.steady, found.probe.fma_flops) == (True, pytest.approx(0.975))


def test_probes_read_as_much_as_a_call_of_the_system(monkeypatch):
    asked = []
    monkeypatch.setattr(rounds, "Worker", FakeWorker)
    monkeypatch.setattr(
        rounds, "measure", lambda threads, read_bytes: asked.append(read_bytes) or PROBE
    )
    chosen = [systems.SYSTEMS[name] for name in ("llmopt", "llmopt-w8a8", "llmopt-auto")]
    rounds.run(chosen, [DECODE], lambda name: Job(name, "toy", "fp32", 1, False), 1, lambda _: None)
    forms = [EXACT, chosen[1].form]
    assert asked[::2] == [*(WORK.num_bytes(form) / DECODE.new for form in forms), READ_BYTES]
    assert asked[1::2] == asked[::2]


def test_a_machine_that_never_calms_is_marked(monkeypatch):
    probes = [1.0, 0.5] * rounds.TRIES
    result, _ = run_fake(monkeypatch, probes, names=("llmopt",), number=1)
    (found,) = result.measurements["llmopt", "decode"]
    assert not found.steady


@pytest.mark.parametrize("command", ["start", "outputs", "measure"])
def test_a_system_that_fails_does_not_stop_the_others(monkeypatch, command):
    result, _ = run_fake(monkeypatch, calm(), broken=(command,))
    assert result.systems == ["llmopt", "eager"]
    assert f"{command} went wrong" in result.failures["inductor"]
    assert "inductor" not in {row.system for row in rows_of(result, [DECODE])}


def test_without_eager_in_fp32_a_worker_is_asked_for_it_alone(monkeypatch):
    asked = []

    class Recorder(FakeWorker):
        def __init__(self, job, phases):
            super().__init__(job, phases)
            asked.append((job.system, job.dtype))

    monkeypatch.setattr(rounds, "Worker", Recorder)
    monkeypatch.setattr(rounds, "measure", lambda threads, read_bytes: PROBE)
    chosen = [systems.SYSTEMS["llmopt"], systems.SYSTEMS["eager"]]
    result = rounds.run(
        chosen, [DECODE], lambda name: Job(name, "toy", "bf16", 1, False), 1, lambda text: None
    )
    assert asked == [("llmopt", "bf16"), ("eager", "bf16"), ("eager", "fp32")]
    assert set(result.accuracy) == {"llmopt", "eager"}


# results

PROBE = Probe(1e11, 0.0, 1e10)


def measured(*seconds: float, unsteady: tuple[float, ...] = ()) -> list[Measurement]:
    steady = [Measurement(s, PROBE, True) for s in seconds]
    return steady + [Measurement(s, PROBE, False) for s in unsteady]


@pytest.fixture
def a_run() -> Run:
    return Run(
        systems=["llmopt", "eager"],
        work={"decode": Work("f32", 1.0, 0.0, 2.5e9, 0.0, 0.0, 0.0)},  # one second of reading
        forms={"llmopt": EXACT, "eager": EXACT},
        compile_seconds={"llmopt": 1.5},
        peak_mib={"llmopt": 900.0, "eager": 800.0},
        accuracy={"llmopt": accuracy.Accuracy(1040, divergence=0.0123, top1=0.956)},
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
    assert lines[0]["probe"] == dataclasses.asdict(PROBE)
    assert (lines[0]["accuracy"]["divergence"], lines[0]["accuracy"]["top1"]) == (0.0123, 0.956)
    assert len(lines) == 5


def test_markdown_table(a_run):
    table = markdown(rows_of(a_run, [DECODE]), SETTING)
    assert "| toy fp32 | decode of 2 after 4, tokens/s | compile, cold, s |" in table
    assert "| llmopt | 1.60 (2.00×, 80%) | 1.50 | 900 | 0.0123 | 95.6% |" in table
    assert "| eager | 0.80 (40%) | – | 800 | – | – |" in table
    assert "on 1,040 positions of Python's documentation" in table


def test_systems_have_roofs_of_their_own(a_run):
    a_run.systems = ["llmopt-w8a16", "llmopt-auto"]
    a_run.measurements = {(name, "decode"): measured(1.0) for name in a_run.systems}
    a_run.compile_seconds, a_run.peak_mib = {}, {}
    a_run.forms = {name: systems.SYSTEMS[name].form for name in a_run.systems}
    eight, auto = rows_of(a_run, [DECODE])
    assert eight.of_bound == pytest.approx((1 + 4 / 32) / 4)
    assert auto.of_bound is None  # what it reads is not known before


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
    with pytest.raises(ModelError, match="<!-- bench toy quantised -->"):
        write_markdown(path, "new\n", dataclasses.replace(SETTING, quantised=True))
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
    for name, packages in (
        ("onnxruntime", "onnx onnxruntime onnxscript"),
        ("onnxruntime-int8", "onnx onnxruntime onnxscript"),
        ("openvino", "openvino"),
        ("openvino-int8", "openvino nncf"),
        ("torchao", "torchao"),
        ("torchao-w8a16", "torchao"),
        ("llama.cpp", r"llama-cpp-python gguf \(it builds llama.cpp"),
    ):
        with pytest.raises(ModelError, match=f"{name} cannot run here: pip install {packages}"):
            systems.systems_of([name])


def test_every_system_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert [name for name in systems.SYSTEMS if name not in text] == []


def test_llama_cpp_runs_the_models_that_are_gguf_files():
    with pytest.raises(ModelError, match="only smollm2 comes as one"):
        systems.SYSTEMS["llama.cpp"].build(llama(tied=True), [DECODE])


def test_quantisers_want_fp32():
    loaded = llama(tied=True)
    loaded.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="use --dtype fp32"):
        systems.SYSTEMS["onnxruntime-int8"].build(loaded, [DECODE])
