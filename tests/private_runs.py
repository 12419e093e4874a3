"""An owner of a private run, and what it signs, for tests."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.network import PeerId
from peers.private.gate import MemberConfig
from peers.private.membership import Grant, Role, sign_grant
from peers.private.revocation import Revocations
from tests.fakes import RUN


@dataclass(frozen=True)
class Owner:
    """The owner of `run`."""

    run: str = RUN
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def grant(self, peer: str | None, role: Role = Role.HOST, **changes: object) -> Grant:
        """A grant that begins a minute ago and lasts for an hour."""
        now = int(time.time())
        grant = Grant(
            run=self.run,
            role=role,
            not_before=now - 60,
            expires_at=now + 3600,
            serial=secrets.token_bytes(8),
            peer=None if peer is None else PeerId(peer),
        )
        return replace(grant, **changes)  # type: ignore[arg-type]

    def sign(self, peer: str, role: Role = Role.HOST, **changes: object) -> bytes:
        return sign_grant(self.grant(peer, role, **changes), self.key)

    def members(self, membership: bytes, revoked: Revocations | None = None) -> MemberConfig:
        return MemberConfig(owner=self.public, membership=membership, revoked=revoked or Revocations(run=self.run))
