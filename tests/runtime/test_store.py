from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_slm_runtime
from edge_slm_converters.bundle_writer import set_version
from edge_slm_converters.distribution import write_reduced
from edge_slm_runtime import installed_models, load, read_manifest, verify
from edge_slm_runtime.bundle import MANIFEST
from edge_slm_runtime.errors import (
    BadSetting,
    BundleError,
    BundleNotFound,
    DowngradeRefused,
    EdgeSlmError,
    SelfTestFailed,
    Untrusted,
)
from edge_slm_runtime.signatures import new_key, sign
from edge_slm_runtime.store import ATTEMPTS, Store, store_root

VARIANT = "onnx-int8"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reduced(tiny_bundle, tmp_path_factory.mktemp("one") / "tiny", [VARIANT])


def release(bundle: Path, folder: Path, version: int) -> Path:
    """A copy of the bundle with that version."""
    shutil.copytree(bundle, folder)
    set_version(folder, verify(folder), version)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("EDGE_SLM_HOME", str(tmp_path / "store"))
    return Store()


def spoil(folder: Path) -> None:
    """Other goldens under a right digest: what a damaged model looks like on a device."""
    data = read_manifest(folder).to_json()
    for golden in data["goldens"]:
        golden["ids"] = {name: [1, 2, 3] for name in golden["ids"]}
    data["digest"] = edge_slm_runtime.bundle.manifest_digest(data)
    (folder / MANIFEST).write_text(json.dumps(data), "utf-8")


def test_a_model_is_installed_tested_and_loaded_by_its_name(bundle: Path, store: Store) -> None:
    installed, (test,) = store.install(bundle, "tiny-one")
    assert test.variant == VARIANT
    assert test.matched == test.goldens > 0
    assert test.ms_per_token > 0
    assert not installed.current.confirmed
    with load("tiny-one", threads=1) as slm:
        assert slm.manifest.digest == installed.current.digest
    assert store.get("tiny-one").current.confirmed  # type: ignore[union-attr]
    assert installed_models()["tiny-one"] == store.folder(installed.current)
    with pytest.raises(BundleNotFound, match=r"installed: .*tiny-one"):
        load("tiny-two")


def test_the_next_release_replaces_it_and_is_rolled_back(
    bundle: Path, store: Store, tmp_path: Path
) -> None:
    first, _ = store.install(release(bundle, tmp_path / "1", 1), "m")
    second, _ = store.install(release(bundle, tmp_path / "2", 2), "m")
    assert second.current.version == 2
    assert second.previous == first.current
    assert store.prune() == []
    assert store.rollback("m").current == first.current
    with pytest.raises(BundleNotFound, match="no previous release"):
        store.rollback("m")
    assert store.prune() == [second.current.digest]
    store.remove("m")
    assert store.prune() == [first.current.digest]
    assert store.installed() == {}


def test_an_older_release_is_refused(bundle: Path, store: Store, tmp_path: Path) -> None:
    store.install(release(bundle, tmp_path / "2", 2), "m")
    old = release(bundle, tmp_path / "1", 1)
    with pytest.raises(DowngradeRefused, match="version 1 of m is older than the installed 2"):
        store.install(old, "m")
    assert store.install(old, "m", allow_downgrade=True)[0].current.version == 1


def test_what_fails_its_self_test_never_becomes_current(
    bundle: Path, store: Store, tmp_path: Path
) -> None:
    good, _ = store.install(bundle, "m")
    bad = release(bundle, tmp_path / "bad", 2)
    spoil(bad)
    with pytest.raises(SelfTestFailed, match=f"{VARIANT} gives other tokens for"):
        store.install(bad, "m")
    with pytest.raises(SelfTestFailed, match="ms a token, not 1e-06"):
        store.install(release(bundle, tmp_path / "slow", 3), "m", max_ms_per_token=1e-6)
    with pytest.raises(SelfTestFailed, match="MiB, not 1"):
        store.install(release(bundle, tmp_path / "big", 4), "m", max_memory_mb=1)
    assert store.get("m") == good


def test_a_release_that_does_not_load_is_given_up(
    bundle: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, _ = store.install(release(bundle, tmp_path / "1", 1), "m")
    load("m").close()
    bad, _ = store.install(release(bundle, tmp_path / "2", 2), "m")
    tokenizer = store.folder(bad.current) / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-1])  # as a failing flash would leave it
    for _ in range(ATTEMPTS):
        with pytest.raises(BundleError):
            load("m")
    with load("m") as slm:
        assert slm.manifest.digest == good.current.digest
    assert "m failed to load 3 times; back to release" in caplog.text


def test_mistakes_of_the_caller_do_not_count_against_a_release(bundle: Path, store: Store) -> None:
    store.install(bundle, "m")
    for _ in range(ATTEMPTS + 1):
        with pytest.raises(EdgeSlmError):
            load("m", max_memory_mb=1)
    assert store.get("m").current.attempts == 0  # type: ignore[union-attr]


def test_a_damaged_copy_is_replaced(bundle: Path, store: Store) -> None:
    one, _ = store.install(bundle, "m")
    (store.folder(one.current) / "tokenizer.json").write_bytes(b"{}")
    again, _ = store.install(bundle, "m")
    assert again.current.digest == one.current.digest
    assert verify(store.folder(again.current))


@pytest.mark.parametrize("name", ["", "../m", "a/b", "M", ".m", "m.", "x" * 300 + "/"])
def test_a_name_is_no_path(bundle: Path, store: Store, name: str) -> None:
    with pytest.raises(BundleError, match="is no name of a model"):
        store.install(bundle, name)
    assert store.get(name) is None


def test_a_damaged_state_is_one_line(bundle: Path, store: Store) -> None:
    store.install(bundle, "m")
    (store.root / "models" / "m.json").write_text("{}")
    with pytest.raises(BundleError, match=r"m\.json is damaged"):
        load("m")


def test_the_place_of_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_SLM_HOME", str(tmp_path))
    assert store_root() == tmp_path
    monkeypatch.delenv("EDGE_SLM_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert store_root() == Path.home() / ".local" / "share" / "edge-slm"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store_root() == tmp_path / "edge-slm"


# -- signatures -----------------------------------------------------------------


def test_only_what_a_trusted_key_signed_is_taken(
    bundle: Path, store: Store, tmp_path: Path
) -> None:
    (old, old_public), (new, new_public), (_, other) = (new_key() for _ in range(3))
    signed = release(bundle, tmp_path / "signed", 1)
    with pytest.raises(Untrusted, match="is not signed"):
        store.install(signed, "m", trusted_keys=[old_public])
    sign(signed, verify(signed), old)
    sign(signed, verify(signed), new)  # while keys are changed
    store.trust([new_public])
    store.install(signed, "m")
    for keys in ([old_public], [new_public], [other, new_public]):
        load("m", trusted_keys=keys).close()
    with pytest.raises(Untrusted, match=f"is signed by {old_public}"):
        load("m", trusted_keys=[other])
    with pytest.raises(BadSetting, match="64 hex digits"):
        load("m", trusted_keys=["abc"])
    set_version(signed, verify(signed), 2)  # the signature was of version 1
    with pytest.raises(Untrusted, match="is not signed"):
        store.install(signed, "m")


def test_a_signature_of_another_bundle_is_none(bundle: Path, tmp_path: Path) -> None:
    private, public = new_key()
    one, two = (release(bundle, tmp_path / str(v), v) for v in (1, 2))
    sign(one, verify(one), private)
    shutil.copy(one / "manifest.sig", two)
    with pytest.raises(Untrusted):
        load(two, trusted_keys=[public])
    (two / "manifest.sig").write_text('{"signatures": [{"key": 1}]}')
    with pytest.raises(Untrusted, match=r"manifest\.sig is damaged"):
        load(two, trusted_keys=[public])
    load(two).close()  # no trusted keys, no check


def test_the_expected_digest_is_the_only_one(bundle: Path) -> None:
    digest = read_manifest(bundle).digest
    load(bundle, expected_digest=digest.upper()).close()
    with pytest.raises(Untrusted, match=f"has the digest {digest}"):
        load(bundle, expected_digest="0" * 64)


# -- interrupted at any step ------------------------------------------------------

# Installs a second release in forked children, each of which is stopped at another one of
# the operations on files of the store that Python reports to audit hooks.
DRIVER = """
import os, signal, sys
from pathlib import Path
import edge_slm_runtime.selftest
from edge_slm_runtime import verify
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.store import Store

edge_slm_runtime.selftest.self_test = lambda *a, **k: []  # this is about files
how, root, first, second = sys.argv[1], *map(Path, sys.argv[2:])
stopped = 0
for step in range(10_000):
    store = Store(root / str(step))
    one, _ = store.install(first, "m")
    child = os.fork()
    if not child:
        seen = 0

        def hook(event, arguments):
            global seen
            if event in EVENTS and str(store.root) in str(arguments[0]):
                seen += 1
                if seen == step + 1:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(28, "No space left on device")

        EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
        sys.addaudithook(hook)
        try:
            store.install(second, "m")
        except EdgeSlmError:
            pass
        except Exception:
            os._exit(9)
        os._exit(seen > step)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1, -signal.SIGKILL), step
    now = store.get("m")
    assert now.current.digest == one.current.digest or now.previous == one.current, step
    for release in (now.current, now.previous):
        if release:
            verify(store.folder(release))
    after, _ = store.install(second, "m")  # nothing is in the way of the next attempt
    assert after.current.version == 2
    verify(store.folder(after.current))
    store.prune()
    left = sorted(path.name for path in (store.root / "bundles").iterdir())
    assert left == sorted({after.current.digest, after.previous.digest}), (step, left)
    if status == 0:
        break
    stopped += 1
print(stopped)
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("how", ["kill", "disk full"])
def test_the_old_or_the_new_model_is_there_whenever_it_stops(
    bundle: Path, tmp_path: Path, how: str
) -> None:
    releases = [release(bundle, tmp_path / f"release-{v}", v) for v in (1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, how, tmp_path / "stores", *releases],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
