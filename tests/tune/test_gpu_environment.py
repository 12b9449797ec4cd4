"""Which measurements of GPUs are one environment's, and whose may be lent."""

from __future__ import annotations

import itertools

import pytest
import torch
from llmopt.gpu.tune import environment as gpu
from llmopt.gpus import PARTS, part_named, part_of, stand_in
from llmopt.target import GPUS

from tests.tune.gpu import DEVICES, environment, properties, target

SMI = "1980 MHz, 2619 MHz, 700.00 W, Disabled, 580.65.06\n"


def here(monkeypatch, name: str, printed: str = SMI):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties(name))
    asked = []

    def run(command):
        asked.append(list(command))
        return printed

    return gpu.gpu_environment(target(name), torch.device("cuda", 0), run), asked


def test_every_fact_of_the_key_is_read(monkeypatch):
    found, asked = here(monkeypatch, "H100")
    facts = dict(found.facts)
    assert facts["name"] == "NVIDIA H100 80GB HBM3"
    assert (facts["capability"], facts["sms"], facts["memory_gib"]) == ("9.0", 132, 80)
    assert (facts["clock_sm"], facts["power_limit"]) == ("1980 MHz", "700.00 W")
    assert (facts["mig"], facts["driver"]) == ("Disabled", "580.65.06")
    assert {"smem_optin", "triton", "torch", "runtime", "assembler", "fp_fusion", "measured"} <= set(facts)  # fmt: skip
    assert asked[0][:2] == ["nvidia-smi", "--id=0"]


def test_another_driver_clock_or_mig_profile_is_another_environment(monkeypatch):
    plain, _ = here(monkeypatch, "H100")
    for old, new in (
        ("580", "590"),
        ("700.00", "500.00"),
        ("1980", "1700"),
        ("Disabled", "Enabled"),
    ):
        other, _ = here(monkeypatch, "H100", SMI.replace(old, new, 1))
        assert other.digest != plain.digest


@pytest.mark.parametrize("printed", ["", "No devices were found", "a, b"])
def test_without_the_drivers_tool_facts_are_unknown(monkeypatch, printed):
    facts = dict(here(monkeypatch, "L4", printed)[0].facts)
    assert facts["clock_sm"] == facts["driver"] == gpu.UNKNOWN


def test_gpus_of_one_generation_never_share():
    digests = {name: environment(name).digest for name in DEVICES}
    assert len(set(digests.values())) == len(DEVICES)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("L4", "RTX4090", False),
        ("H100", "H200", False),
        ("H100", "H20", False),
        ("H200", "H20", False),
        ("H100", "H100 NVL", False),
        ("H100", "L4", False),
        ("H100", "H800", True),
    ],
)
def test_who_lends_to_whom(one, other, alike):
    assert gpu.is_alike(environment(one), environment(other)) is alike
    assert gpu.is_alike(environment(other), environment(one)) is alike


def test_the_same_gpu_with_another_driver_lends():
    assert gpu.is_alike(environment("L4"), environment("L4", driver="590.0"))
    assert not gpu.is_alike(environment("L4"), environment("L4", measured="warm L2"))


def test_predictions_are_nobodys_measurements():
    part = part_named("H100")
    predicted = gpu.predicted_environment(part)
    assert dict(predicted.facts)["measured"].startswith("never: predicted")
    assert not gpu.is_alike(predicted, environment("H100"))
    assert not gpu.is_alike(environment("H100"), predicted)


def test_every_generation_has_a_part_and_names_are_given_once():
    for row in GPUS:
        part = part_of(row)
        assert part is not None
        assert part.target.tier == row.tier
    names = [n for p in PARTS for n in (p.name, *p.seen_as)]
    assert len(set(names)) == len(names)


def test_parts_are_found_by_every_name():
    assert part_named("rtx 4090") is part_named("NVIDIA GeForce RTX 4090")
    assert part_of(target("H200")) is part_named("H200")
    assert part_of(target("H800")) is None
    with pytest.raises(ValueError, match=r"nothing is known about a GPU 'V100'; possible: A100"):
        part_named("V100")


def test_an_unknown_gpu_is_ranked_by_its_own_multiprocessors():
    part = stand_in(target("H800"))
    assert part.target.gpu.sms == 132
    assert part.clock == part_named("H100").clock


def test_peaks_are_clocks_times_multiprocessors():
    """A typing error in the table would show: operations of an SM in a clock are a power of two, within a tenth."""
    for part in PARTS:
        facts = part.target.gpu
        for peak in (facts.f16_flops, facts.int8_ops):
            each = peak / facts.sms / part.clock
            powers = [2**i for i in range(8, 16)]
            assert part.name == "H20" or min(abs(each / p - 1) for p in powers) < 0.1, part.name


def test_differences_are_named():
    words = environment("H100").difference(environment("H200"))
    assert "NVIDIA H200 (here NVIDIA H100 80GB HBM3)" in words
    for one, other in itertools.permutations(("L4", "RTX4090"), 2):
        assert "sms" in environment(one).difference(environment(other))
