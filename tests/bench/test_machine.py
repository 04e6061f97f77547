"""The machine record, of made machines and of this one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_slm_bench.machine import machine

Plant = Callable[[dict[str, object]], Path]
CPU = "sys/devices/system/cpu"

X86_CORE = "processor\t: {n}\nmodel name\t: Intel(R) Core(TM) Ultra 7\ncpu MHz\t\t: 1{n}00.5\n"
ARM_CORE = (
    "processor\t: {n}\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
)


def cores(core: str, *parts: str) -> str:
    return "\n".join(core.format(n=n, part=part) for n, part in enumerate(parts))


def policy(n: int, governor: str, *khz: int) -> dict[str, object]:
    folder = f"{CPU}/cpufreq/policy{n}"
    names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    freqs = {f"{folder}/{name}": value for name, value in zip(names, khz, strict=True)}
    return {f"{folder}/scaling_governor": governor, **freqs}


def test_x86(plant: Plant) -> None:
    flags = "flags\t\t: fpu sse2 avx2 avx_vnni fma\n"
    root = plant(
        {
            "proc/cpuinfo": cores(X86_CORE + flags, *"abcd"),
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"
            "HugePages_Total: 0\nSwapTotal: 2097152 kB\nSwapFree: 1048576 kB",
            "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-1,3",
            f"{CPU}/online": "0-3",
            f"{CPU}/cpu0/cache/index0/level": 1,
            f"{CPU}/cpu0/cache/index0/size": "48K",
            f"{CPU}/cpu0/cache/index2/level": 2,
            f"{CPU}/cpu0/cache/index2/size": "2048K",
            f"{CPU}/cpu0/cache/index3/level": 3,
            f"{CPU}/cpu0/cache/index3/size": "24576K",
            **policy(0, "powersave", 3400000, 400000, 4800000),
            **policy(1, "powersave", 900000, 400000, 4700000),
        }
    )
    record = machine(root)
    assert record.cpu == "Intel(R) Core(TM) Ultra 7"
    assert record.board is None
    assert record.isa == ("avx2", "fma", "avx_vnni")
    assert (record.cores, record.usable_cores, record.cpu_quota) == (4, 3, None)
    assert record.governor == "powersave"
    assert (record.mhz, record.min_mhz, record.max_mhz) == (3400, 400, 4800)
    assert (record.l2_kb, record.l3_kb) == (2048, 24576)
    assert (record.memory_mb, record.available_mb, record.swap_used_mb) == (16384, 8192, 1024)


def test_without_a_governor_x86_still_tells_its_frequency(plant: Plant) -> None:
    record = machine(plant({"proc/cpuinfo": cores(X86_CORE, "a", "b")}))
    assert record.mhz == round(1100.5)
    assert record.governor is None
    assert record.max_mhz is None


def test_jetson(plant: Plant) -> None:
    root = plant(
        {
            "proc/cpuinfo": cores(ARM_CORE, *["0xd42"] * 6),
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            f"{CPU}/online": "0-5",
            **policy(0, "schedutil", 1510400, 115200, 1510400),
            **policy(4, "performance", 1510400, 115200, 1510400),
        }
    )
    record = machine(root)
    assert record.cpu == "Cortex-A78AE"
    assert record.board == "NVIDIA Jetson Orin Nano Developer Kit"
    assert record.isa == ("asimd", "asimddp")
    assert record.cores == 6
    assert record.governor == "performance, schedutil"
    assert record.max_mhz == 1510
    assert record.l3_kb is None


def test_cores_of_several_kinds_and_of_an_unknown_one(plant: Plant) -> None:
    parts = ["0xd05"] * 4 + ["0xd0b"] * 3 + ["0xfff"]
    # A Raspberry Pi adds a block that is no core.
    content = cores(ARM_CORE, *parts) + "\n\nRevision\t: c04170\nModel\t\t: Raspberry Pi"
    record = machine(plant({"proc/cpuinfo": content}))
    assert record.cpu == "4× Cortex-A55, 3× Cortex-A76, 1× 0x41 0xfff"


def test_an_arm_core_with_a_model_name_of_no_use(plant: Plant) -> None:
    core = ARM_CORE + "model name\t: ARMv7 Processor rev 3 (v7l)\n"
    assert machine(plant({"proc/cpuinfo": cores(core, "0xd08")})).cpu == "Cortex-A72"


@pytest.mark.parametrize(
    ("files", "quota", "memory"),
    [
        ({"proc/self/cgroup": "0::/app/worker"}, None, None),
        (
            {
                "proc/self/cgroup": "0::/app/worker",
                "sys/fs/cgroup/app/worker/cpu.max": "max 100000",
                "sys/fs/cgroup/app/cpu.max": "150000 100000",
                "sys/fs/cgroup/app/worker/memory.max": 512 << 20,
                "sys/fs/cgroup/app/memory.max": "max",
            },
            1.5,
            512,
        ),
        (  # version 1; the path is the host's, the container sees the top
            {
                "proc/self/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:pids:/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 50000,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            },
            0.5,
            None,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            None,
            None,
        ),
    ],
)
def test_limits_of_the_control_group(
    plant: Plant, files: dict[str, Any], quota: float | None, memory: int | None
) -> None:
    record = machine(plant(files))
    assert (record.cpu_quota, record.memory_limit_mb) == (quota, memory)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    record = machine(tmp_path)
    assert record.cpu  # what Python knows
    assert record.cores >= record.usable_cores >= 1
    assert record.isa == ()
    known = {"cpu", "isa", "cores", "usable_cores", "load", "system", "python", "packages"}
    assert {k for k, v in record.as_dict().items() if v is not None} == known


def test_this_machine() -> None:
    record = machine()
    assert record.cpu
    assert 1 <= record.usable_cores <= record.cores
    assert record.packages["onnxruntime"]
    assert record.packages["edge-slm"]
    assert json.loads(json.dumps(record.as_dict()))["system"].startswith(os.uname().sysname)


def test_instruction_sets_of_llama_cpp() -> None:
    """Those of the peer's own build, or none where it is not installed."""
    from edge_slm_bench.runners.llama_cpp import instruction_sets

    pytest.importorskip("llama_cpp")
    assert "=" not in instruction_sets()
    assert instruction_sets().split()
