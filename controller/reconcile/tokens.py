"""ArksTokens as the controller keeps them: ten thousand of them must cost little, and no secret stays.

`TokenView` holds the compiled fragment (a digest, no plain token) and the status as the bytes it came in.
`Holders` knows which tokens share a secret, wherever the secret is written: in the token or in a Secret.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import msgspec

from apis.fragments import SecretFragment, TokenFragment, fragment
from apis.resources import ArksToken
from controller.kube.client import decoder
from controller.kube.resource import Key
from controller.kube.store import Store


class _Meta(msgspec.Struct, rename="camel"):
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    deletion_timestamp: str | None = None
    finalizers: list[str] = []


class _Raw(msgspec.Struct):
    metadata: _Meta
    status: msgspec.Raw = msgspec.Raw(b"{}")


_raw = msgspec.json.Decoder(_Raw).decode
_status = msgspec.json.Decoder(dict[str, Any]).decode
_typed = decoder(ArksToken)


@functools.lru_cache(4096)
def _kept(value: Hashable) -> Any:
    """The first of equal values. Tokens differ in their secrets, seldom in what they allow and what is said of them."""
    return value


class TokenView(msgspec.Struct, frozen=True, gc=False):
    fragment: TokenFragment
    qos: tuple[tuple[str, str], ...]
    """(endpoint, quota or "") as the spec lists them, for messages that name the entry"""
    uid: str
    generation: int
    deleting: bool
    finalizers: tuple[str, ...]
    raw_status: bytes

    @property
    def status(self) -> dict[str, Any]:
        return _status(self.raw_status)


def decode_token(raw: bytes) -> TokenView:
    """Raises what pydantic raises; it names no value."""
    token, known = _typed(raw), _raw(raw)
    made = fragment(token)
    assert isinstance(made, TokenFragment)
    record = msgspec.structs.replace(made.record, grants=_kept(made.record.grants))
    return TokenView(
        msgspec.structs.replace(made, record=record),
        _kept(tuple((item.arks_endpoint.name, item.quota.name if item.quota else "") for item in token.spec.qos)),
        known.metadata.uid,
        known.metadata.generation,
        known.metadata.deletion_timestamp is not None,
        tuple(known.metadata.finalizers),
        _kept(bytes(known.status)),
    )


class Holders:
    """Tokens by the digest of their secret. `update` and `remove` return the tokens whose peers changed."""

    def __init__(self, secrets: Store[SecretFragment]) -> None:
        self._secrets = secrets
        self._digests: dict[Key, bytes] = {}
        self._holders: dict[bytes, set[Key]] = {}

    def peers(self, key: Key) -> list[Key]:
        """Other tokens with the same secret, in order."""
        digest = self._digests.get(key)
        return sorted(self._holders.get(digest, set()) - {key}) if digest is not None else []

    def update(self, key: Key, token: TokenView | None) -> set[Key]:
        digest = self.digest(token) if token is not None and not token.deleting else None
        known = self._digests.get(key)
        if digest == known:
            return set()
        touched: set[Key] = set()
        if known is not None:
            del self._digests[key]
            left = self._holders[known]
            left.discard(key)
            touched |= left
            if not left:
                del self._holders[known]
        if digest is not None:
            self._digests[key] = digest
            holders = self._holders.setdefault(digest, set())
            touched |= holders
            holders.add(key)
        return touched

    def digest(self, token: TokenView) -> bytes | None:
        """None while the Secret that holds the token, or its key, is not there."""
        made = token.fragment
        if made.secret is None:
            return made.record.digest
        found = self._secrets.get(Key(made.ident.namespace, made.secret[0]))
        return None if found is None else found.digests.get(made.secret[1])
