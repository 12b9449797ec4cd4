"""What tells one CPU from another: processors, caches and settings that are made up here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from llmopt.target import target
from llmopt.tune.environment import UNKNOWN, Environment, cpu_environment

from tests.tune.problems import database, entry

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 8

processor\t: 1
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 7
"""
FILES = {
    "proc/cpuinfo": CPUINFO,
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
    "sys/devices/system/cpu/cpu0/cache/index1/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index1/type": "Instruction\n",
    "sys/devices/system/cpu/cpu0/cache/index1/size": "32K\n",
    "sys/devices/system/cpu/cpu0/cache/index2/level": "2\n",
    "sys/devices/system/cpu/cpu0/cache/index2/type": "Unified\n",
    "sys/devices/system/cpu/cpu0/cache/index2/size": "2048K\n",
}
LACKS = {
    "proc/cpuinfo": {"cpu": UNKNOWN},
    "sys/kernel": {"huge_pages": UNKNOWN},
    "sys/devices/system/cpu/cpu0/cache": {"L1": None, "L2": None},
    "sys/devices/system/cpu/cpu0/cache/index2/type": {"L2": None},
}


def machine(folder: Path, lacking: str = "/", **changed: str) -> Path:
    """The root of a machine; lacking: what it does not have; changed: words in its files, by what stands there instead."""
    for name, content in FILES.items():
        if not name.startswith(lacking):
            for old, new in changed.items():
                content = content.replace(old, new)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return folder


def environment(root: Path) -> Environment:
    return cpu_environment(target(), 2, root)


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})


def test_every_fact_of_the_key_is_read(tmp_path):
    facts = dict(environment(machine(tmp_path)).facts)
    assert facts["cpu"] == "GenuineIntel family 6 model 143 stepping 8"
    assert facts["huge_pages"] == "madvise"
    assert (facts["cpus"], facts["threads"]) == (4, 2)
    assert (facts["L1"], facts["L2"]) == ("48K", "2048K")
    assert {"schema", "device", "kernels", "name", "tier"} <= set(facts)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("GenuineIntel", "AuthenticAMD", "cpu AuthenticAMD family 6 model 143 stepping 8 (here "),
        ("family\t: 6", "family\t: 25", "cpu GenuineIntel family 25 model 143 stepping 8 (here "),
        ("143", "207", "cpu GenuineIntel family 6 model 207 stepping 8 (here GenuineIntel "),
        ("stepping\t: 8", "stepping\t: 4", "cpu GenuineIntel family 6 model 143 stepping 4 (here "),
        ("[madvise] never", "madvise [never]", "huge_pages never (here madvise)"),
        ("[madvise] never", "broken", "huge_pages unknown (here madvise)"),
        ("2048K", "1024K", "L2 1024K (here 2048K)"),
    ],
)
def test_other_values_are_another_environment(tmp_path, old, new, words):
    here = environment(machine(tmp_path / "here"))
    other = environment(machine(tmp_path / "other", **{old: new}))
    assert other.digest != here.digest
    assert here.difference(other).startswith(words)


def test_fewer_cpus_to_run_on_are_another_environment(tmp_path, monkeypatch):
    root = machine(tmp_path)
    here = environment(root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert environment(root).difference(here) == "cpus 4 (here 2)"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 6, 7})
    assert environment(root) == here  # which ones is no difference


@pytest.mark.parametrize("lacking", LACKS)
def test_what_a_machine_does_not_tell_is_unknown(tmp_path, lacking):
    whole = dict(environment(machine(tmp_path / "whole")).facts)
    found = dict(environment(machine(tmp_path / "here", lacking)).facts)
    assert found == {n: v for n, v in {**whole, **LACKS[lacking]}.items() if v is not None}


def test_a_machine_that_tells_nothing_has_an_environment(tmp_path):
    facts = dict(environment(tmp_path).facts)
    assert (facts["cpu"], facts["huge_pages"]) == (UNKNOWN, UNKNOWN)


def test_a_processor_of_another_kind_has_what_it_tells(tmp_path):
    changed = {
        "vendor_id": "CPU implementer",
        "cpu family": "CPU architecture",
        "model": "CPU part",
    }
    facts = dict(environment(machine(tmp_path, **changed)).facts)
    assert facts["cpu"] == "stepping 8"


def test_what_was_measured_before_these_facts_is_a_miss_that_says_so(tmp_path):
    """An older llmopt knew neither the model of the CPU nor its affinity nor huge pages."""
    here = environment(machine(tmp_path / "here"))
    new = ("cpu", "cpus", "huge_pages")
    older = Environment.of({n: value for n, value in here.facts if n not in new})
    root = tmp_path / "tune"
    database(root, older).put(entry())
    found, reason = database(root, here).get(entry().key)
    assert found is None
    assert reason == (
        "nothing was measured in this environment; elsewhere: "
        "cpu unknown (here GenuineIntel family 6 model 143 stepping 8), cpus unknown (here 4), "
        "huge_pages unknown (here madvise)"
    )
    database(root, here).put(entry(us=3.0))
    assert database(root, here).get(entry().key)[0] == entry(us=3.0)
    assert database(root, older).get(entry().key)[0] == entry()
