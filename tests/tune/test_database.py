"""What was measured survives: killed writers, several writers, damaged and foreign files, full and read-only disks."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from llmopt.tune import environment
from llmopt.tune.database import Database, Entry, encode
from llmopt.tune.environment import Environment
from llmopt.types import LinearConfig

from tests.tune.problems import (
    FACTS,
    HERE,
    database,
    die_while_writing,
    entry,
    local,
    problem,
    write_again_and_again,
)

# Its server imports torch once; the processes are forks of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.tune.problems"])


def one_file(root: Path) -> tuple[Entry, Path]:
    """A database with one entry on disk."""
    kept = entry()
    assert database(root).put(kept)
    return kept, database(root).path_of(kept.key)


def get(root: Path, environment: Environment = HERE) -> tuple[Entry | None, str]:
    return database(root, environment).get(entry().key)


def test_what_is_put_is_there_in_another_process(tmp_path):
    kept, path = one_file(tmp_path)
    assert get(tmp_path) == (kept, "")
    assert json.loads(path.read_text())["key"] == kept.key
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "environment.json"])


def test_an_entry_without_samples_and_probe_is_one(tmp_path):
    """As older versions wrote them, and as predictions are; without them its file is the same as then."""
    kept, path = one_file(tmp_path)
    assert not {"samples", "probe"} & set(json.loads(path.read_text())["entry"])
    whole = dataclasses.replace(kept, samples=[9.0, 10.0, 11.0], probe={"read_bytes": 2e10})
    database(tmp_path).put(whole)
    assert get(tmp_path) == (whole, "")
    assert json.loads(path.read_text())["entry"]["samples"] == [9.0, 10.0, 11.0]


def test_a_later_result_replaces_the_one_before(tmp_path):
    one_file(tmp_path)
    better = entry(us=5.0)
    database(tmp_path).put(better)
    assert get(tmp_path) == (better, "")


def test_every_fact_of_a_problem_is_in_its_key():
    base = problem()
    changed = {
        "op": "linear_quantized", "m": 8, "n": 97, "k": 65, "x": "f16", "w": "q8", "y": "bf16", "gated": True, "norm": "rms",
        "act": "silu", "bias": True, "residual": True, "group": 32, "offsets": True, "planes": 1,
        "exact": True,
    }  # fmt: skip
    assert {*changed, "hint"} == {f.name for f in dataclasses.fields(base)}
    others = [dataclasses.replace(base, **{name: value}) for name, value in changed.items()]
    assert len({entry(p).key for p in (base, *others)}) == len(others) + 1


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_of_an_environment_separates(tmp_path, name):
    one_file(tmp_path)
    other = Environment.of({**FACTS, name: "other"})
    found, reason = get(tmp_path, other)
    assert found is None
    assert f"{name} {FACTS[name]} (here other)" in reason


def test_facts_of_a_gpu_are_an_environment_like_any_other(tmp_path):
    gpu = Environment.of(
        {"schema": 1, "device": "cuda", "name": "H100", "sm_count": 132, "driver": "580.1"}
    )
    kept = entry()
    database(tmp_path, gpu).put(kept)
    assert database(tmp_path, gpu).get(kept.key) == (kept, "")
    assert get(tmp_path)[0] is None


def test_this_machine_in_facts():
    facts = dict(local(3).facts)
    assert set(facts) >= {"schema", "device", "kernels", "name", "cpu", "tier", "threads", "cpus", "huge_pages"}  # fmt: skip
    assert facts["threads"] == 3
    assert local(3).digest != local(2).digest
    assert set(environment.caches()) <= set(facts)


def test_an_empty_database_says_so(tmp_path):
    assert "nothing was measured on this machine" in get(tmp_path)[1]


def test_another_problem_is_not_measured(tmp_path):
    one_file(tmp_path)
    found, reason = database(tmp_path).get(entry(problem(m=8)).key)
    assert (found, reason) == (None, "not measured on this machine")


def damaged(content: bytes) -> dict[str, tuple[bytes, str]]:
    """Ways a file can be wrong: its content, and words of the reason."""
    given = json.loads(content)
    body = given["entry"]

    def but(**change) -> bytes:
        return json.dumps({**given, **change}).encode()

    strange = dataclasses.replace(entry(), reason=7)  # its checksum is right
    worded = dataclasses.replace(entry(), samples=["fast"])  # type: ignore[list-item]
    return {
        "empty": (b"", "damaged"),
        "half": (content[: len(content) // 2], "damaged"),
        "all but the last byte": (content[:-1], "damaged"),
        "zeros": (bytes(len(content)), "damaged"),
        "not text": (b"\xff\xfe" + content, "damaged"),
        "a list": (b"[]", "damaged"),
        "no schema": (but(schema=None), "damaged"),
        "a newer schema": (but(schema=99), "a newer llmopt wrote it: schema 99, this one reads 1"),
        "an older schema": (but(schema=0), "an older llmopt"),
        "another environment": (but(environment="0" * 16), "another environment"),
        "a changed config": (but(entry={**body, "config": {"span": 3}}), "checksum"),
        "a changed key": (but(key="op=linear m=1"), "damaged: its key"),
        "no entry": (but(entry=None), "checksum"),
        "an entry of other types": (encode(strange, HERE.digest), "wrong type"),
        "samples of other types": (encode(worded, HERE.digest), "wrong type"),
    }


@pytest.mark.parametrize("name", damaged(encode(entry(), HERE.digest)))
def test_a_file_that_is_wrong_is_a_miss_with_a_reason(tmp_path, name):
    kept, path = one_file(tmp_path)
    content, words = damaged(path.read_bytes())[name]
    path.write_bytes(content)
    found, reason = get(tmp_path)
    assert found is None
    assert words in reason
    assert database(tmp_path).entries() == []
    database(tmp_path).put(kept)  # and it can be measured again
    assert get(tmp_path) == (kept, "")


def test_every_length_a_file_can_be_cut_to_is_a_miss(tmp_path):
    _, path = one_file(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert get(tmp_path)[0] is None


def test_a_file_under_the_name_of_another_problem_is_a_miss(tmp_path):
    _, path = one_file(tmp_path)
    other = entry(problem(m=8))
    path.rename(database(tmp_path).path_of(other.key))
    found, reason = database(tmp_path).get(other.key)
    assert found is None
    assert "of another problem" in reason


def test_a_directory_in_place_of_a_file_is_a_miss(tmp_path):
    _, path = one_file(tmp_path)
    path.unlink()
    path.mkdir()
    assert "cannot be read" in get(tmp_path)[1]


def writer(root: Path, count: int) -> BaseProcess:
    """A process that writes the same five problems `count` times, already at it."""
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=write_again_and_again, args=(root, count, ready))
    process.start()
    assert ready.wait(60)
    return process


def assert_whole(root: Path) -> list[Entry]:
    """Every file under the root is an entry; returns them."""
    files = list(database(root).files())
    assert [reason for _, reason in files if isinstance(reason, str)] == []
    return [e for _, e in files if isinstance(e, Entry)]


def test_a_writer_that_is_killed_leaves_whole_files(tmp_path):
    """kill -9 at moments spread over its writing; partial files are nobody's entries."""
    for i in range(6):
        process = writer(tmp_path, 1_000_000)
        time.sleep(0.02 * i + 0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_whole(tmp_path)
    kept = entry(us=3.0)
    assert database(tmp_path).put(kept)
    assert get(tmp_path) == (kept, "")


def test_a_write_that_is_killed_between_its_steps_keeps_the_entry_before(tmp_path):
    """The moment a process dies in cannot be chosen from outside: here it dies before each call of the system in turn."""
    kept, path = one_file(tmp_path)
    for step in ("fsync", "replace"):
        process = PROCESSES.Process(target=die_while_writing, args=(tmp_path, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert get(tmp_path) == (kept, "")
        assert list(path.parent.glob(".*.partial")), "it died in the middle of the write"
    assert database(tmp_path).entries() == [kept]


def test_what_killed_writers_left_goes_after_a_while(tmp_path):
    _, path = one_file(tmp_path)
    old, young = (path.with_name(f".{path.name}.{n}.1.partial") for n in (1, 2))
    for partial in (old, young):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    database(tmp_path).put(entry(problem(m=8)))
    assert (old.exists(), young.exists()) == (False, True)


def test_three_writers_leave_whole_files(tmp_path):
    """Processes that write the same five problems again and again, while one reads."""
    writers = [writer(tmp_path, 150) for _ in range(3)]
    while any(process.is_alive() for process in writers):
        assert_whole(tmp_path)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    assert sorted(e.problem["m"] for e in assert_whole(tmp_path)) == [1, 2, 3, 4, 5]
    assert {e.us for e in assert_whole(tmp_path)} == {145.0, 146.0, 147.0, 148.0, 149.0}
    assert list(tmp_path.rglob("*.partial")) == []


def check_in_memory(known: Database, caplog) -> None:
    """Nothing can be written: entries last as long as the process, and one line says so."""
    kept, other = entry(), entry(problem(m=8))
    assert not known.put(kept)
    assert not known.put(other)
    assert known.get(kept.key) == (kept, "")
    assert known.entries() == [kept, other]
    assert caplog.text.count("they last as long as this process") == 1


def test_a_full_disk_keeps_results_in_memory(tmp_path, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))  # no file may be longer
    try:
        check_in_memory(database(tmp_path), caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_disk_that_fills_up_keeps_what_was_there(tmp_path, caplog):
    kept, path = one_file(tmp_path)
    content = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
    try:
        assert not database(tmp_path).put(entry(us=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == content
    assert get(tmp_path) == (kept, "")


def test_a_read_only_place_keeps_results_in_memory(caplog):
    # Nobody can make a folder there, root neither.
    check_in_memory(database(Path("/proc/llmopt")), caplog)


def test_a_database_on_a_read_only_disk_is_read(tmp_path, monkeypatch, caplog):
    """Permission bits do not stop root: here the system refuses every file that is opened to be written."""
    kept, path = one_file(tmp_path)
    content = {p: p.read_bytes() for p in path.parent.iterdir()}
    real = Path.open

    def refusing(self: Path, mode: str = "r", *options, **named):
        if not set(mode) & set("wax+"):
            return real(self, mode, *options, **named)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "open", refusing)
    known, other, better = database(tmp_path), entry(problem(m=8)), entry(us=1.0)
    assert known.get(kept.key) == (kept, "")
    assert not known.put(better)
    assert not known.put(other)
    assert caplog.text.count("they last as long as this process") == 1
    assert f"cannot keep tuning results in {path.parent} " in caplog.text
    assert "Read-only file system" in caplog.text
    assert [known.get(e.key) for e in (other, better)] == [(other, ""), (better, "")]
    assert sorted(e.us for e in known.entries()) == [better.us, other.us]
    assert get(tmp_path) == (kept, "")
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == content


def test_a_root_that_is_a_file_keeps_results_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check_in_memory(database(tmp_path / "file"), caplog)


def test_what_is_only_remembered_is_not_written(tmp_path):
    known = database(tmp_path)
    known.remember(entry())
    assert known.get(entry().key)[0] == entry()
    assert get(tmp_path)[0] is None


def test_a_miss_is_looked_up_once(tmp_path):
    known = database(tmp_path)
    assert known.get(entry().key)[0] is None
    one_file(tmp_path)
    assert known.get(entry().key)[0] is None  # plans of one process agree
    known.put(entry(us=1.0))
    assert known.get(entry().key)[0] == entry(us=1.0)


@pytest.mark.parametrize(
    "given",
    [{"speed": 3}, {"family": "gpu"}, {"rows": -1}, {"rows": "8"}, {"span": True}, {"tiles": 1.5}],
    ids=str,
)
def test_configs_from_files_are_checked(given):
    with pytest.raises((ValueError, TypeError)):
        LinearConfig.of(given)
