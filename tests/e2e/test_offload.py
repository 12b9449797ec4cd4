"""weights="packed": the packed copy is the only one in memory, and the model stays whole."""

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmopt import offload as module
from llmopt.compiled import alive
from llmopt.offload import offload
from torch import multiprocessing

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
    weight = check_kept(Path("/proc/llmopt"), monkeypatch, caplog)
    assert offload([weight]), "what failed once may be tried again"


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
    weight = torch.randn(8, 8)
    kept = weight.clone()
    with monkeypatch.context() as patch:
        patch.setenv("LLMOPT_CACHE_DIR", str(folder))
        assert not offload([weight])
    assert "stay in memory" in caplog.text
    assert torch.equal(weight, kept)
    return weight


def test_a_failure_after_the_first_weight(monkeypatch, caplog):
    net, x = model(64, 3), torch.randn(3, 64)
    files = iter((mmap.mmap,))

    def one_file(*arguments, **named):
        make = next(files, None)
        if make is None:
            raise OSError("no more files")
        return make(*arguments, **named)

    monkeypatch.setattr(module.mmap, "mmap", one_file)
    with torch.no_grad():
        want, before = net(x), [layer.weight.data_ptr() for layer in net]
        compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
        torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-5)
        moved = [a != layer.weight.data_ptr() for a, layer in zip(before, net, strict=True)]
        assert sum(moved) == 1
        assert caplog.text.count("no more files") == 1
        torch.testing.assert_close(net(x), want)
        net[1].weight.mul_(2)
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


def test_weights_moved_in_inference_mode_can_be_trained():
    net, x = model(64, 2), torch.randn(3, 64)
    twin = model(64, 2)
    compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
    address = net[0].weight.data_ptr()
    with torch.inference_mode():
        compiled(x)
    assert net[0].weight.data_ptr() != address
    for each in (net, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(x).pow(2).sum().backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x))
        torch.testing.assert_close(compiled(x), twin(x), atol=1e-5, rtol=1e-5)


def test_weights_made_in_inference_mode_stay(caplog):
    with torch.inference_mode():
        net, x = model(64, 2), torch.randn(3, 64)
        address = net[0].weight.data_ptr()
        compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
    assert net[0].weight.data_ptr() == address


def test_parts_and_shared_memory_stay(monkeypatch, caplog):
    """What moves would be cut off from the tensors that share its memory."""
    monkeypatch.setattr(module, "_kept", set())
    whole = torch.randn(4, 8)
    rows, twin, other = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    alias = twin.view(8, 4)
    shared = torch.randn(4, 8).share_memory_()
    places = [t.data_ptr() for t in (rows, twin, shared)]
    assert offload([whole, rows[1:3], twin, other, shared])
    assert places == [t.data_ptr() for t in (rows, twin, shared)]
    twin.zero_()
    assert not alias.any()
    assert all(reason in caplog.text for reason in ("a part of", "other tensors", "processes"))
    assert not offload([rows[1:3], twin, shared])
    assert caplog.text.count("other tensors") == 1


def test_tensors_that_are_all_given_move_together():
    weight = torch.randn(4, 8)
    alias, values, place = weight.view(8, 4), weight.clone(), weight.data_ptr()
    assert offload([weight, alias])
    assert weight.data_ptr() == alias.data_ptr() != place
    alias[0, 0] = 7
    assert weight[0, 0] == 7
    assert torch.equal(weight.flatten()[1:], values.flatten()[1:])


@torch.no_grad()
def test_a_default_device_is_not_asked():
    weight = torch.randn(4, 8)
    values = weight.clone()
    with torch.device("meta"):
        assert offload([weight])
    assert weight.device.type == "cpu"
    assert torch.equal(weight, values)


def test_what_is_gone_is_forgotten():
    weight = torch.randn(4, 8)
    assert offload([weight])
    address = weight.data_ptr()
    assert address in module._mapped
    del weight
    assert not offload([])
    assert address not in module._mapped


@torch.no_grad()
def test_of_moved_weights_only_lines_are_looked_at():
    """Also once they were packed again, and by another graph: looking at all would bring the file into memory."""
    net, x = torch.nn.Linear(512, 512), torch.randn(3, 512)
    windows = []
    for precision in ("exact", "w8a8"):
        options = {"weights": "packed", "precision": precision}
        compiled = torch.compile(net, backend="llmopt", options=options)
        compiled(x)
        net.weight.mul_(2)
        compiled(x)
        (weight,) = alive()[-1].packed()
        windows.append(weight.held.content.windows)
    assert windows == [16 + 1, 16 + 1], "lines of the weight, and the bias that stays where it is"


@torch.no_grad()
def read_and_edit(net, x, want):
    torch.set_num_threads(1)  # OpenMP's threads stay behind in a fork, and PyTorch waits for them
    torch.testing.assert_close(net(x), want)
    net[0].weight.zero_()
    net[1].bias.zero_()


@pytest.mark.parametrize("how", ["fork", "spawn"])
@torch.no_grad()
def test_another_process(how):
    """A forked process edits its own copy; a spawned one is given shared memory, as PyTorch does with any tensor."""
    net, x = model(64, 2), torch.randn(3, 64)
    compiled = torch.compile(net, backend="llmopt", options={"weights": "packed"})
    torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
    net[0].weight.mul_(2)  # an edit of the mapped memory, which the file never sees
    want = net(x)
    process = multiprocessing.get_context(how).Process(target=read_and_edit, args=(net, x, want))
    process.start()
    process.join()
    assert process.exitcode == 0
    if how == "fork":
        torch.testing.assert_close(net(x), want)
    assert net[0].weight.any() == (how == "fork")
    torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
