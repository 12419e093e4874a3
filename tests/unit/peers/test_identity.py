from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadIdentity
from peers.identity import Identity, hold, load_or_create, peer_id_of, verify


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return load_or_create(tmp_path_factory.mktemp("identity") / "peer.id")


def test_the_same_file_gives_the_same_peer(tmp_path: Path) -> None:
    first = load_or_create(tmp_path / "new" / "peer.id")
    second = load_or_create(tmp_path / "new" / "peer.id")
    assert first.peer == second.peer
    assert first.peer.startswith("Qm")
    assert (tmp_path / "new" / "peer.id").stat().st_mode & 0o777 == 0o400
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["peer.id"]


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    peers: list[str] = []
    threads = [threading.Thread(target=lambda: peers.append(load_or_create(tmp_path / "id").peer)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(peers) == 4
    assert len(set(peers)) == 1


def test_a_signature_is_good_only_for_its_peer_key_and_data(identity: Identity, tmp_path: Path) -> None:
    other = load_or_create(tmp_path / "other.id")
    signature = identity.sign(b"data")
    assert verify(identity.peer, identity.public_key, b"data", signature)
    assert not verify(identity.peer, identity.public_key, b"date", signature)
    assert not verify(other.peer, identity.public_key, b"data", signature)
    assert not verify(identity.peer, other.public_key, b"data", signature)
    assert not verify(other.peer, other.public_key, b"data", signature)


@given(st.binary(max_size=400), st.binary(max_size=300))
def test_rubbish_as_key_or_signature_is_just_false(identity: Identity, key: bytes, signature: bytes) -> None:
    assert not verify(peer_id_of(key), key, b"data", signature)
    assert not verify(identity.peer, identity.public_key, b"data", signature)


def test_a_short_key_is_not_trusted() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert not verify(peer_id_of(public), public, b"data", b"x" * 128)


@pytest.mark.parametrize("data", [b"", b"\x08\x00\x12\xff\xff\xff\xff", b"\x08\x00\x12\x03abc", b"x" * 20000])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "id"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(BadIdentity, match="move it away") as caught:
        load_or_create(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_held_identity_names_its_holder_and_is_free_after_release(tmp_path: Path) -> None:
    path = tmp_path / "id"
    program = (
        "import sys; from pathlib import Path; from peers.identity import hold\n"
        "lock = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(
            BadIdentity, match=f"in use by process {child.pid}; stop it or give this peer another --state"
        ):
            hold(path)
        child.kill()
        child.wait()
    with hold(path), pytest.raises(BadIdentity):
        hold(path)
    hold(path).release()
