"""The documentation holds: its example runs, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from llmopt.models import smollm2

from tests.e2e.tiny_gguf import tiny_llama, write_gguf

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_example_runs(tmp_path, capsys):
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, tokenizer = smollm2._convert(gguf)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    example, explaining, *_ = blocks(ROOT / "README.md", "python")
    example, count = re.subn(r'^name = ".*"$', f'name = "{tmp_path}/model"', example, flags=re.M)
    assert count == 1
    assert len(example.splitlines()) <= 11
    exec(compile(example + explaining, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "The sky is" in out
    assert "linear.cpu" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text()
    quoted = re.findall(r"`((?:csrc|pycompiler|tests|bench|docs)/[\w./-]+\.\w+)`", text)
    linked = re.findall(r"\]\(((?!http)[\w./-]+)\)", text)
    missing = [name for name in quoted if not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_the_table_marks_are_those_make_fills():
    makefile = (
        (ROOT / "Makefile").read_text().replace("\\\n", "").replace("$(PAGE)", "docs/benchmarks.md")
    )
    commands = re.findall(r"llmopt bench (\S+)(?: --dtype (\w+))?(.* --markdown (\S+).*)", makefile)
    assert len(commands) == makefile.count("--markdown")
    for model, dtype, rest, page in commands:
        quantised = re.search(r"llmopt-w\d|QUANTISED|ENCODERS", rest)
        name = (
            f"bench {model.removeprefix('bench/')} {'quantised' if quantised else dtype or 'fp32'}"
        )
        text = (ROOT / page).read_text()
        assert text.index(f"<!-- {name} -->") < text.index(f"<!-- end {name} -->")
