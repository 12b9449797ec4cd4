"""llmopt build: a pack of a small model for two makers' GPUs, and every way a pack is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from llmopt.cli import main
from llmopt.gpu import pack
from llmopt.gpu.pack import PackError
from llmopt.target import gpu_target

MODEL = """
import torch, transformers

def tiny():
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100
    )
    return transformers.BertModel(config), {"input_ids": torch.zeros(1, 80, dtype=torch.int64)}
"""
HOPPER = gpu_target("cuda:90")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    (folder / "model.py").write_text(MODEL)
    command = [
        "build",
        f"{folder}/model.py:tiny",
        "--target",
        "cuda:90,hip:gfx942",
        "-o",
        str(folder / "pack"),
    ]
    assert main(command) == 0
    return folder / "pack"


@pytest.fixture
def folder(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "pack"))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, **changes) -> None:
    """Changes the manifest as somebody would who knows its checksum."""
    body = {**manifest_of(folder), **changes}
    del body["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": pack._digest(body)}))


def test_a_pack_holds_every_kernel_and_says_what_it_is(built):
    manifest = manifest_of(built)
    assert set(manifest["targets"]) == {"cuda:sm_90", "hip:gfx942"}
    assert {"triton", "ptxas", "llmopt"} <= set(manifest["versions"])
    for target, entries in manifest["targets"].items():
        names = {e["report"]["kernel"] for e in entries}
        linear = "linear_f16_tma.triton" if target == "cuda:sm_90" else "linear_f16.triton"
        assert {linear, "attention.triton", "norm.triton"} <= names
        for entry in entries:
            assert entry["report"]["spills"] == 0
            assert entry["report"]["registers"] > 0
            content = (built / entry["file"]).read_bytes()
            assert content[:4] == b"\x7fELF"
        loaded = pack.load(built, HOPPER if target == "cuda:sm_90" else gpu_target("hip:gfx942"))
        assert len(loaded.binaries) == len(entries)


def test_another_gpu_is_refused(folder):
    with pytest.raises(PackError, match=r"for cuda:sm_90, hip:gfx942, not for cuda:sm_80"):
        pack.load(folder, gpu_target("cuda:80"))


def test_a_changed_binary_is_refused(folder):
    file = next((folder / "cuda_sm_90").glob("*.cubin"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(PackError, match=r"\.cubin is corrupt"):
        pack.load(folder, HOPPER)


def test_a_missing_binary_is_refused(folder):
    next((folder / "cuda_sm_90").iterdir()).unlink()
    with pytest.raises(PackError, match="cannot be read"):
        pack.load(folder, HOPPER)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_corrupt_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(PackError, match="corrupt"):
        pack.load(folder, HOPPER)


def test_an_edited_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"spills": 0', '"spills": 1'))
    with pytest.raises(PackError, match="corrupt"):
        pack.load(folder, HOPPER)


def test_other_versions_and_formats_are_refused(folder):
    rewrite(folder, versions={**manifest_of(folder)["versions"], "triton": "1.0"})
    with pytest.raises(PackError, match=r"triton 1\.0 \(here .*build it again"):
        pack.load(folder, HOPPER)
    rewrite(folder, format=99)
    with pytest.raises(PackError, match="format 99"):
        pack.load(folder, HOPPER)


def test_what_is_no_pack_is_neither_read_nor_overwritten(tmp_path):
    with pytest.raises(PackError, match=r"no manifest\.json"):
        pack.load(tmp_path, HOPPER)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(PackError, match="choose another folder"):
        pack.build(tmp_path, {}, "")


def test_an_unknown_target_is_an_error(capsys, tmp_path):
    assert main(["build", "minilm", "--target", "cuda:70", "-o", str(tmp_path)]) == 1
    assert "too old" in capsys.readouterr().err
