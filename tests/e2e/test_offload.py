"""weights="packed": the packed copy is the only one in memory, and the model stays whole."""

import resource
import subprocess
import sys
from pathlib import Path

import torch
from llmopt.offload import offload

MEMORY = """
import torch

def anonymous_mib():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def model(width, layers):
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).eval()

with torch.no_grad():
    # What compiling itself takes is there before anything is measured.
    torch.compile(model(8, 3), backend="llmopt")(torch.randn(3, 8))
    net, x = model(3072, 3), torch.randn(3, 3072)
    want, before = net(x), anonymous_mib()
    got = torch.compile(net, backend="llmopt", options={"weights": "packed"})(x)
    after = anonymous_mib()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(x), want)  # eager reads the file
megabytes = sum(p.numel() * 4 for p in net.parameters()) / 2**20
assert after - before < megabytes / 2, (before, after, megabytes)
"""


def test_memory_holds_one_copy_and_results_stay():
    # In a process of its own: what other tests freed and malloc kept would count as memory of this one.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def model(width: int, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).eval()


def test_edits_after_the_move_are_noticed():
    net, x = model(64, 2), torch.randn(3, 64)
    compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
    with torch.no_grad():
        compiled(x)
        net[0].weight.mul_(2)
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
        net.load_state_dict(model(64, 2).state_dict())
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


def test_tied_weights_stay_tied():
    table = torch.nn.Embedding(50, 64)
    head = torch.nn.Linear(64, 50, bias=False)
    head.weight = table.weight
    net = torch.nn.Sequential(table, head).eval()
    compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), net(ids), atol=1e-5, rtol=1e-5)
    assert head.weight is table.weight
    assert head.weight.data_ptr() == table.weight.data_ptr()


def test_an_unwritable_cache_directory_keeps_the_weights(monkeypatch, caplog):
    # Nobody can make a folder there, root neither.
    check_kept(Path("/proc/llmopt"), monkeypatch, caplog)


def test_a_full_disk_keeps_the_weights(tmp_path, monkeypatch, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))  # no file may be longer
    try:
        check_kept(tmp_path, monkeypatch, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_directory_that_is_a_file_keeps_the_weights(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    check_kept(tmp_path / "file", monkeypatch, caplog)


def check_kept(folder, monkeypatch, caplog):
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(folder))
    monkeypatch.setattr("llmopt.offload._failed", False)
    weight = torch.randn(8, 8)
    kept = weight.clone()
    assert not offload([weight])
    assert "stay in memory" in caplog.text
    assert torch.equal(weight, kept)
