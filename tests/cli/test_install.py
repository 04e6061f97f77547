"""Models on a device: packed, signed, fetched, installed, rolled back by the command line."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_slm.archive import pack, unpack
from edge_slm.cli import main
from edge_slm.sources import fetched
from edge_slm_converters.distribution import write_reduced
from edge_slm_runtime import read_manifest, verify
from edge_slm_runtime.errors import BundleError, DownloadFailed, EdgeSlmError
from edge_slm_runtime.store import Store


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reduced(tiny_bundle, tmp_path_factory.mktemp("one") / "tiny", ["onnx-int8"])


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("EDGE_SLM_HOME", str(tmp_path / "store"))
    return Store()


class Server:
    """Files of a folder with ETag and Range; answers end after `most` bytes, if that is set."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.most: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Range")))
                file = folder / self.path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                content, tag = file.read_bytes(), f'"{file.stat().st_mtime_ns}"'
                start = 0
                if self.headers.get("If-Range") == tag:
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(content[start:][: outer.most])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.close()


# -- one file ---------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".zip", ".tar.zst"])
def test_a_bundle_is_one_file_and_back(bundle: Path, tmp_path: Path, ending: str) -> None:
    one, two = tmp_path / f"one{ending}", tmp_path / f"two{ending}"
    assert pack(bundle, one).digest == read_manifest(bundle).digest
    pack(bundle, two)
    assert one.read_bytes() == two.read_bytes()
    (tmp_path / "out").mkdir()
    unpack(one, tmp_path / "out")
    assert verify(tmp_path / "out").digest == read_manifest(bundle).digest
    one.write_bytes(two.read_bytes()[:-200])
    (tmp_path / "cut").mkdir()
    with pytest.raises(BundleError, match="cannot be unpacked"):
        unpack(one, tmp_path / "cut")


def test_nothing_is_unpacked_that_the_manifest_does_not_list(bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("early.txt", "before the manifest")
        file.write(bundle / "manifest.json", "manifest.json")
        file.writestr("../outside.txt", "x")
        file.writestr("more.txt", "x")
        file.writestr("tokenizer.json", "x" * 5_000_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="larger than its manifest says"):
        unpack(archive, tmp_path / "out")
    names = {path.name for path in tmp_path.rglob("*.txt")}
    assert names == set()
    (tmp_path / "no.zip").write_bytes(b"PK")
    with pytest.raises(BundleError, match="cannot be unpacked"):
        unpack(tmp_path / "no.zip", tmp_path / "out")


def test_fewer_variants_are_another_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.zip"
    done = call("pack", tiny_bundle, out, "--variants", "onnx-fp32", "--json")
    assert done.exit_code == 0, done.output
    (tmp_path / "out").mkdir()
    unpack(out, tmp_path / "out")
    manifest = verify(tmp_path / "out")
    assert [variant.name for variant in manifest.variants] == ["onnx-fp32"]
    assert manifest.digest == json.loads(done.stdout)["digest"]
    assert call("pack", tiny_bundle, tmp_path / "x.rar").exit_code == 3
    assert call("pack", tiny_bundle, out).exit_code == 9


# -- from elsewhere -----------------------------------------------------------------


def contents(source: str, downloads: Path) -> str:
    with fetched(source, downloads) as folder:
        return verify(folder).digest


def test_an_address_of_a_folder_a_file_or_the_hub(
    bundle: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, served = read_manifest(bundle).digest, tmp_path / "served"
    shutil.copytree(bundle, served / "owner" / "model" / "resolve" / "main")
    pack(bundle, served / "m.zip")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    hub = f"{server.address}/owner/model/resolve/main/"
    for source in (str(bundle), str(served / "m.zip"), f"{server.address}/m.zip", hub):
        assert contents(source, tmp_path / "downloads") == digest
    assert contents("owner/model", tmp_path / "downloads") == digest
    assert list((tmp_path / "downloads").iterdir()) == []
    with pytest.raises(DownloadFailed, match="the server answers 404"):
        contents("owner/other", tmp_path / "downloads")
    with pytest.raises(DownloadFailed):
        contents("http://127.0.0.1:9/m.zip", tmp_path / "downloads")


@pytest.mark.parametrize("source", ["m.zip", "m/"])
def test_a_download_continues_where_it_stopped(
    bundle: Path, tmp_path: Path, server: Server, source: str
) -> None:
    served = tmp_path / "served"
    pack(bundle, served / "m.zip")
    shutil.copytree(bundle, served / "m")
    server.most = 40_000
    for _ in range(100):
        try:
            digest = contents(f"{server.address}/{source}", tmp_path / "downloads")
            break
        except DownloadFailed as error:
            assert "the connection ended after" in str(error)  # noqa: PT017
    assert digest == read_manifest(bundle).digest
    assert any(asked for _, asked in server.asked)


def test_a_file_that_changed_meanwhile_is_fetched_again(
    bundle: Path, tmp_path: Path, server: Server
) -> None:
    served = tmp_path / "served" / "m.zip"
    pack(bundle, served)
    content = served.read_bytes()
    served.write_bytes(bytes(len(content)))
    server.most = 30_000
    with pytest.raises(DownloadFailed):
        contents(f"{server.address}/m.zip", tmp_path / "downloads")
    served.write_bytes(content)
    server.most = None
    assert contents(f"{server.address}/m.zip", tmp_path / "downloads")


def test_a_server_that_sends_another_file_is_refused(
    bundle: Path, tmp_path: Path, server: Server
) -> None:
    served = tmp_path / "served" / "m"
    shutil.copytree(bundle, served)
    tokenizer = served / "tokenizer.json"
    tokenizer.write_bytes(bytes(tokenizer.stat().st_size))
    with pytest.raises(DownloadFailed, match="is not the file that the manifest lists"):
        contents(f"{server.address}/m", tmp_path / "downloads")
    tokenizer.write_bytes(bytes(tokenizer.stat().st_size + 1))
    with pytest.raises(DownloadFailed, match="is longer than the manifest lists"):
        contents(f"{server.address}/m", tmp_path / "downloads")


# -- the command line -----------------------------------------------------------------


def test_from_signing_to_rolling_back(bundle: Path, tmp_path: Path, store: Store) -> None:
    key = tmp_path / "release.key"
    public = call("sign", "--new-key", "--key", key).stdout.strip()
    assert key.stat().st_mode & 0o077 == 0
    assert call("sign", "--new-key", "--key", key).exit_code == 9
    assert call("trust", public).exit_code == 0
    refused = call("install", bundle, "--name", "m")
    assert refused.exit_code == 4
    assert "error[untrusted]" in refused.stderr
    files = []
    for version in (1, 2):
        copy = tmp_path / f"v{version}"
        shutil.copytree(bundle, copy)
        signed = call("sign", copy, "--key", key, "--version", version, "--json")
        assert json.loads(signed.stdout)["public_key"] == public
        files.append(tmp_path / f"v{version}.zip")
        assert call("pack", copy, files[-1]).exit_code == 0
    for file in files:
        done = call("install", file, "--name", "m", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["tests"][0]["variant"] == "onnx-int8"
    assert call("install", files[0], "--name", "m").exit_code == 4
    answer = call("generate", "a fox", "--bundle", "m", "--words", "4", "--json")
    assert answer.exit_code == 0, answer.output
    listed: list[dict[str, Any]] = json.loads(call("info", "--json").stdout)
    assert "m" in [model["name"] for model in listed]
    rolled = json.loads(call("rollback", "m", "--json").stdout)
    assert rolled["current"]["version"] == 1
    assert call("rollback", "m").exit_code == 4
    assert json.loads(call("prune", "--remove", "m", "--json").stdout)["removed"]
    assert store.installed() == {}


def test_what_cannot_be_done_is_one_line(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "no.key").write_text("no key")
    for arguments in (
        ("sign", "--key", tmp_path / "no.key"),
        ("sign", bundle, "--key", tmp_path / "none.key"),
        ("trust", "abc"),
    ):
        done = call(*arguments)
        assert done.exit_code == 3, done.output
        assert done.stderr.count("\n") == 1
    assert call("install", tmp_path / "nothing").exit_code == 4
    assert call("install", bundle, "--digest", "0" * 64).exit_code == 4
    with pytest.raises(EdgeSlmError):
        Store().rollback("m")
