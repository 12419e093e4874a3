"""The word to pause, as one process leaves it and another reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.errors import BadConfig
from swarm.hosts import pause_file
from swarm.hosts.pause_file import PAUSE_NAME, PauseFile, is_hosting, mark_hosting, say_pause, say_resume
from tests.logged import logged_by


def test_a_word_is_read_until_it_is_taken_back(tmp_path: Path) -> None:
    read = PauseFile(tmp_path)
    assert not read.is_paused()
    say_pause(tmp_path)
    say_pause(tmp_path)
    assert read.is_paused()
    assert PauseFile(tmp_path).is_paused(), "one that is started again must still be paused"
    say_resume(tmp_path)
    say_resume(tmp_path)
    assert not read.is_paused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"paused": 1}', "whether to pause"),
        (b'{"paused": "true"}', "whether to pause"),
        (b"[true]", "whether to pause"),
        (b'{"paused": true, "x": "' + b"x" * 300 + b'"}', "more than 256 bytes"),
    ],
)
def test_hostile_content_is_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, words: str
) -> None:
    (tmp_path / PAUSE_NAME).write_bytes(content)
    read = PauseFile(tmp_path)
    assert not any(read.is_paused() for _ in range(3))
    (said,) = logged_by(pause_file, caplog)
    assert words in said
    assert "swarm resume" in said
    say_pause(tmp_path)
    assert read.is_paused()


def test_a_word_may_also_say_not_to_pause(tmp_path: Path) -> None:
    (tmp_path / PAUSE_NAME).write_text('{"paused": false}')
    assert not PauseFile(tmp_path).is_paused()


def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read, path, elsewhere = PauseFile(tmp_path), tmp_path / PAUSE_NAME, tmp_path / "elsewhere"
    elsewhere.write_text('{"paused": true}')
    path.symlink_to(elsewhere)
    assert not read.is_paused()
    path.unlink()
    os.mkfifo(path)
    assert not read.is_paused()
    path.unlink()
    path.mkdir()
    assert not read.is_paused()
    assert len(logged_by(pause_file, caplog)) == 3


def test_words_that_cannot_be_left_are_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(BadConfig, match="cannot be written"):
        say_pause(gone)
    (tmp_path / PAUSE_NAME).mkdir()
    with pytest.raises(BadConfig, match="cannot be written"):
        say_pause(tmp_path)
    with pytest.raises(BadConfig, match="cannot be removed"):
        say_resume(tmp_path)
    with pytest.raises(BadConfig, match="cannot be used"):
        mark_hosting(gone)


def test_a_peer_hosts_until_it_says_otherwise(tmp_path: Path) -> None:
    assert not is_hosting(tmp_path)
    with mark_hosting(tmp_path):
        assert is_hosting(tmp_path)
        assert is_hosting(tmp_path), "looking must not end it"
    assert not is_hosting(tmp_path)


def test_a_process_that_is_killed_hosts_no_more(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from swarm.hosts.pause_file import mark_hosting; "
        "held = mark_hosting(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert is_hosting(tmp_path)
    finally:
        child.kill()
        child.communicate(timeout=30)
    assert not is_hosting(tmp_path)
