"""As many threads as there are cores to run on, and no more than the quota pays for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_slm_runtime.cores import cpu_quota, default_threads


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 6), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)],
)
def test_a_quota_bounds_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    root = plant(
        tmp_path, {"proc/self/cgroup": "0::/app/job", "sys/fs/cgroup/app/cpu.max": f"{quota}\n"}
    )
    assert default_threads(root) == threads


def test_the_smallest_quota_above_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/a/b\n1:pids:/\n0::/",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(plant(tmp_path, files)) == 1.5


def test_without_control_groups_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_quota(tmp_path) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(30)), raising=False)
    assert default_threads(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads(tmp_path) == 1
