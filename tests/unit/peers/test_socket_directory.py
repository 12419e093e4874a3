"""The directory of a peer's sockets goes with its peer, at the latest when the next one starts."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

from peers.socket_directory import LOCK_NAME, PREFIX, SocketDirectory, sweep

OWNER = """
import sys
from pathlib import Path
from peers.socket_directory import SocketDirectory
made = SocketDirectory.create(Path(sys.argv[1]))
print(made.path, flush=True)
sys.stdin.read()
"""


def test_it_is_private_and_goes_when_it_is_removed(tmp_path: Path) -> None:
    made = SocketDirectory.create(tmp_path)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    (made.path / "p2pd.sock").touch()
    made.remove()
    made.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_peer_left_goes_when_the_next_starts_and_not_before(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        (left / "p2pd.sock").touch()
        sweep(tmp_path)
        assert left.is_dir()  # its owner lives
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert left.is_dir()
    mine = SocketDirectory.create(tmp_path)
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.remove()


def test_what_nobody_locked_and_what_is_not_a_directory_stay(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}other").mkdir()
    (tmp_path / f"{PREFIX}file").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_NAME).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 4
    assert (elsewhere / LOCK_NAME).exists()
