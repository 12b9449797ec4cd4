"""The command line as a user meets it: output, exit codes, one-line errors, files written."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from llmopt import cli, models
from llmopt.cli.progress import working
from llmopt.models import smollm2

COMMANDS = ("info", "demo", "bench", "eval", "explain", "tune", "build")

MODULE_FILE = """
import torch

def call():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 8)]
    return torch.nn.Sequential(*layers), {"input": torch.randn(5, 16)}

def llama():  # imports what the other functions' processes would wait for
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2))

def fails():
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("the model's own complaint")
    return Fails(), {"x": torch.zeros(1)}
"""


@pytest.fixture(autouse=True)
def no_dynamo_state():
    torch._dynamo.reset()
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def module_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODULE_FILE)
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """A command's exit code, stdout and stderr; argparse's own exits count as exit codes."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# info and usage


def test_info_names_the_machine_and_every_setting(capsys, monkeypatch):
    from llmopt import _C, settings

    monkeypatch.setenv("LLMOPT_DEBUG", "0")
    code, out, _ = run(capsys, "info")
    assert code == 0
    for part in (*_C.tiers(), "torch", "GFLOP/s", "GB/s", *settings.variables()):
        assert part in out
    assert "'0'" in out  # the value that is set


def test_info_as_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "nowhere"))
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["cache"] == f"{tmp_path / 'nowhere'} (not there yet)"
    assert facts["target"].startswith("cpu:")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_everywhere(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: llmopt {command}".rstrip())


def test_help_lists_every_command(capsys):
    _, out, _ = run(capsys, "--help")
    assert tuple(re.findall(r"^    (\w+) ", out, re.M)) == COMMANDS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("bench",), "required: MODEL"),
        (("bench", "minilm", "--dtype", "fp8"), "invalid choice: 'fp8' (choose from"),
        (("bench", "minilm", "--repeat", "0"), "'0' is not a whole number of at least 1"),
        (("demo", "--max-new-tokens", "many"), "'many' is not a whole number"),
        (("info", "--no-such-option"), "unrecognized arguments"),
    ],
)
def test_wrong_usage_exits_2(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("bench", "gpt5"), "unknown model 'gpt5': expected smollm2, minilm, path.py:function"),
        (("explain", "gpt5"), "unknown model 'gpt5'"),
        (("bench", "no/such.py:f"), "there is no file no/such.py"),
        (("bench", "minilm", "--against", "tvm"), "unknown system 'tvm': expected some of llmopt"),
        (("bench", "smollm2", "--phases", "encode"), "unknown phase 'encode'"),
        (("bench", "minilm", "--phases", "8by128"), "batch x tokens, such as 8x128"),
        (("bench", "minilm", "--plot", "x.jpg"), "the picture is a .png"),
        (("bench", "minilm", "--json", "/no/such/folder/x"), "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_be_done_exits_1_with_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    (line,) = [x for x in err.splitlines() if x.startswith("llmopt: error: ")]
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LLMOPT_DEBUG", "9", "LLMOPT_DEBUG='9': expected one of 0, 1, 2, 3, 4"),
        ("LLMOPT_CPU_ISA", "bogus", "LLMOPT_CPU_ISA='bogus': this CPU runs"),
    ],
)
def test_wrong_settings(capsys, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    code, _, err = run(capsys, "info")
    assert code == 1
    assert message in err


@pytest.mark.parametrize(("model", "command"), [("smollm2", "demo"), ("minilm", "bench")])
def test_a_missing_model_package_names_the_way_out(capsys, monkeypatch, model, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    argv = ("demo",) if command == "demo" else ("explain", model)
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert models.PACKAGED[model].install_hint() in err
    assert "--random-weights" in err


def test_tracebacks_on_request(capsys, monkeypatch, module_file):
    code, _, err = run(capsys, "explain", f"{module_file}:fails")
    assert code == 1
    assert "the model's own complaint" in err
    assert "LLMOPT_DEBUG=1 shows where" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    code, _, err = run(capsys, "explain", f"{module_file}:fails")
    assert code == 1
    assert "Traceback" in err


def test_the_command_runs_as_a_program():
    call = [sys.executable, "-m", "llmopt.cli", "bench", "gpt5"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1
    assert "llmopt: error: unknown model 'gpt5'" in done.stderr


# commands that compile


def test_demo_with_random_weights(capsys, monkeypatch):
    monkeypatch.setitem(smollm2.ARCHITECTURE, "num_hidden_layers", 1)
    code, out, _ = run(
        capsys, "demo", "--random-weights", "--max-new-tokens", 3, "--prompts", "one", "two"
    )
    assert code == 0
    assert out.count("the same 3 tokens") == 2
    assert out.index("prompt: one") < out.index("prompt: two") < out.index("tokens/s")
    assert out.count("token ids") == 4
    assert_times_and_summary(out[out.index("fp32 ") :])


def assert_times_and_summary(out: str) -> None:
    """Both systems' rates and first tokens, what compiling took, and the short form of explain."""
    heading, eager, ours, factor, _, *summary = out.splitlines()
    assert re.fullmatch(r"fp32 +tokens/s +first token +compile", heading)
    assert re.fullmatch(r"eager +\d+\.\d +[1-9]\d* ms +–", eager)
    compiling = re.fullmatch(r"llmopt +\d+\.\d +[1-9]\d* ms +(\d+\.\d) s", ours)
    assert compiling
    assert float(compiling[1]) > 0
    assert re.fullmatch(r"\d+\.\d\d× eager's tokens/s", factor)
    assert re.match(r"cpu:\w+ \(.*\), \d+ threads; probe: \d+ GFLOP/s, \d+\.\d GB/s", summary[0])
    assert re.match(r"call \d+\.\d\d ms, of which .* native steps of 1 graph", summary[1])
    assert re.fullmatch(r"compiled in \d+\.\d\d s beyond Dynamo", summary[2])
    assert re.search(r"ms +\d+ x linear\.cpu ", "\n".join(summary[3:]))


def test_demo_says_where_texts_part(capsys, monkeypatch):
    from llmopt.cli import demo

    eager = demo.Generation([5, 6, 7], 0.1, 0.2)
    ours = demo.Generation([5, 6, 8], 0.1, 0.2)
    loaded = models.LoadedModel("toy", None, "causal")
    assert not demo._print_pair(loaded, "text", eager, ours)
    assert "DIFFERENT from token 3 on" in capsys.readouterr().out
    monkeypatch.setattr(
        demo, "_generate_all", lambda system, *_: [{"eager": eager}.get(system, ours)]
    )
    monkeypatch.setattr(demo, "_generate", lambda *_: eager)
    monkeypatch.setattr(demo, "load", lambda *_: tiny_demo_model())
    code, _, _ = run(capsys, "demo", "--prompts", "x")
    assert code == 1  # fp32 with real weights must agree


def tiny_demo_model() -> models.LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    return models.LoadedModel("toy", LlamaForCausalLM(config).eval(), "causal")


def test_explain_writes_its_files(capsys, module_file, tmp_path):
    html, data = tmp_path / "x.html", tmp_path / "x.json"
    argv = ("explain", f"{module_file}:call", "--html", html, "--json", data)
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "linear" in out
    assert html.read_text().lstrip().startswith("<!")
    assert json.loads(data.read_text())


def test_explain_a_path_that_looks_like_markup(capsys, module_file, tmp_path):
    folder = tmp_path / "x[/red]"
    folder.mkdir(parents=True)
    path = folder / "a:three.py"
    path.write_text(module_file.read_text())
    code, _, err = run(capsys, "explain", f"{path}:call")
    assert code == 0, err
    assert f"{path}:call: loading" in err.replace("\n", "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("{file}",), "my_model.py names no function: give"),
        (("nothing",), "a folder written by save_pretrained or save_quantized"),
        (("{file}:call", "--json", "{folder}"), "is a folder: a file is written there"),
        (("{file}:call", "--html", "{folder}/none/x.html"), "there is no folder"),
    ],
)
def test_explain_says_what_it_wants(capsys, module_file, tmp_path, argv, words):
    given = [a.format(file=module_file, folder=tmp_path) for a in argv]
    code, _, err = run(capsys, "explain", *given)
    assert code == 1
    assert words in err


def test_explain_a_precision(capsys, module_file):
    argv = ("explain", f"{module_file}:call", "--precision", "w8a8", "--group", "channel")
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "48x16 w8a8 groups of 16" in out
    code, _, err = run(capsys, "explain", f"{module_file}:call", "--group", 32)
    assert code == 1
    assert "group is for precision=" in err


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_explain_a_causal_model(capsys, module_file, phase):
    code, out, _ = run(capsys, "explain", f"{module_file}:llama", "--phase", phase)
    assert code == 0
    assert "attention" in out


@pytest.fixture
def encoder(tmp_path):
    """A folder with a small BERT and a tokenizer of letters."""
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=64, intermediate_size=64,
                        num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    return tmp_path / "bert"


def test_eval_of_an_encoder(capsys, encoder, tmp_path):
    """Cosines of its embeddings: exact ones are one, and 8 bits lose less than 4."""
    data = tmp_path / "x.json"
    argv = ("eval", encoder, "--scheme", "w8a8,w4a16", "--precision", "exact", "--tokens", 512)
    code, out, err = run(capsys, *argv, "--json", data)
    assert code == 0, err
    found = json.loads(data.read_text())
    rows = found["results"]
    assert list(rows) == ["w8a8 round", "w4a16 round", "compiled exact"]
    assert found["model"] == "bert"
    assert {row["texts"] for row in rows.values()} == {512 // 64}
    cosines = [rows[name]["mean_cosine"] for name in rows]
    assert 0.9 < cosines[1] < cosines[0] < cosines[2]
    assert rows["compiled exact"]["lowest_cosine"] == pytest.approx(1, abs=1e-5)
    for part in (*rows, "mean cosine", "lowest cosine", f"{cosines[1]:.4f}", "bert beside itself"):
        assert part in out


def test_bench_writes_what_was_asked_for(capsys, module_file, tmp_path):
    data, picture, page = tmp_path / "x.jsonl", tmp_path / "x.png", tmp_path / "x.md"
    argv = ("bench", f"{module_file}:call", "--repeat", 1, "--threads", 1)
    files = ("--json", data, "--plot", picture, "--markdown", page)
    code, out, err = run(capsys, *argv, *files)
    assert code == 0, err
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    found = {(line["system"], line["phase"]) for line in lines}
    assert {("llmopt", "call"), ("eager", "call"), ("llmopt", "compile")} <= found
    assert all(line["value"] > 0 for line in lines if line["phase"] == "call")
    assert all(line["probe"]["fma_flops"] > 1e8 for line in lines if line["phase"] == "call")
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = page.read_text()
    assert "| my_model.py:call fp32 | one call, ms |" in table
    assert {"llmopt", "eager"} <= {line.split(" | ")[0].strip("| ") for line in table.splitlines()}
    assert str(tmp_path) not in table
    assert "--repeat 1` on" in table
    assert "one call" in out
    outputs = out[out.index("Outputs") :].splitlines()
    (difference,) = [x.split("│")[-2] for x in outputs if x.startswith("│ llmopt")]
    assert float(difference) < 1e-5


def test_bench_tells_which_system_failed(capsys, module_file):
    argv = ("bench", f"{module_file}:fails", "--repeat", 1, "--threads", 1)
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "llmopt: eager failed: RuntimeError: the model's own complaint" in err
    assert "Traceback" not in err


def test_what_the_library_says_of_long_work_is_said_once(caplog, capsys):
    """Also where a caller's own logging shows everything; warnings still go there."""
    log = logging.getLogger("llmopt")
    with caplog.at_level("INFO"), working("counting"):
        log.info("one of two")
        log.warning("two is missing")
    assert capsys.readouterr().err.splitlines() == ["counting", "one of two"]
    assert [r.getMessage() for r in caplog.records] == ["two is missing"]
    assert log.propagate
