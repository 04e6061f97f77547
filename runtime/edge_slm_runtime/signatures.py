"""Who made a bundle: Ed25519 signatures of its manifest's digest, which covers every file.

`manifest.sig` holds {"signatures": [{"key": …, "signature": …}]}, in hex, so that a release may
be signed by an old and a new key while keys are changed. Needs the package `cryptography`
(RFC 8032 through OpenSSL).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_slm_runtime.bundle import SIGNATURES, Manifest
from edge_slm_runtime.errors import BadSetting, DependencyMissing, Untrusted
from edge_slm_runtime.files import reading, write_json

_LIMIT = 1 << 16  # bytes of a signature file
_PREFIX = b"edge_slm bundle 1\n"  # a signature of a bundle is one of nothing else


def new_key() -> tuple[str, str]:
    """(private key, public key) as 64 hex digits each."""
    ed25519 = _ed25519()
    private = ed25519.Ed25519PrivateKey.generate()
    return private.private_bytes_raw().hex(), private.public_key().public_bytes_raw().hex()


def check_key(key: str) -> None:
    """Raises BadSetting for what is no key."""
    _bytes(key)


def sign(folder: Path, manifest: Manifest, private_key: str) -> str:
    """Adds a signature to the bundle in `folder`, or renews that of the same key; returns the
    public key. Raises BadSetting for what is no key."""
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(_bytes(private_key))
    public = str(private.public_key().public_bytes_raw().hex())
    signature = private.sign(_message(manifest)).hex()
    others = [(key, text) for key, text in _read(folder) if key != public]
    rows = [{"key": key, "signature": text} for key, text in (*others, (public, signature))]
    write_json({"signatures": rows}, folder / SIGNATURES)
    return public


def check_trust(
    folder: Path,
    manifest: Manifest,
    trusted_keys: Sequence[str] = (),
    expected_digest: str | None = None,
) -> None:
    """Refuses a bundle that is not the expected one, or not signed by one of the keys.

    trusted_keys: public keys in hex; none asks for no signature. Raises Untrusted, BadSetting.
    """
    if expected_digest is not None and manifest.digest != expected_digest.lower():
        raise Untrusted(
            f"the bundle has the digest {manifest.digest}, not {expected_digest}",
            "get the expected bundle, or expect this digest",
        )
    if not trusted_keys:
        return
    trusted = {_bytes(key) for key in trusted_keys}
    found = _read(folder)
    if not any(_is_signed(manifest, key, text) for key, text in found if _raw(key) in trusted):
        signed = f"is signed by {', '.join(key for key, _ in found)}" if found else "is not signed"
        raise Untrusted(f"{folder} {signed}", f"trusted: {', '.join(sorted(trusted_keys))}")


def _is_signed(manifest: Manifest, key: str, signature: str) -> bool:
    from cryptography.exceptions import InvalidSignature

    public = _ed25519().Ed25519PublicKey.from_public_bytes(_bytes(key))
    try:
        public.verify(bytes.fromhex(signature), _message(manifest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(manifest: Manifest) -> bytes:
    return _PREFIX + manifest.digest.encode("ascii")


def _read(folder: Path) -> list[tuple[str, str]]:
    """(key, signature) pairs of the folder; none where there is no file. Raises Untrusted."""
    path = folder / SIGNATURES
    with reading(path):
        if not path.exists():
            return []
        raw = path.read_bytes() if path.stat().st_size <= _LIMIT else b""
    try:
        rows: Iterable[Any] = json.loads(raw.decode("utf-8"))["signatures"]
        pairs = [(row["key"], row["signature"]) for row in rows]
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise TypeError  # noqa: TRY301
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Untrusted(f"{path} is damaged", "get the bundle again") from None
    return pairs


def _raw(key: str) -> bytes | None:
    try:
        return bytes.fromhex(key)
    except ValueError:
        return None


def _bytes(key: str) -> bytes:
    if (raw := _raw(key)) is None or len(raw) != 32:
        raise BadSetting("a key is not an Ed25519 key", "give 64 hex digits")
    return raw


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise DependencyMissing(
            "signatures need cryptography", "pip install 'edge-slm[sign]'"
        ) from None
    return ed25519
