"""API keys: read from a file or refused in one line, found by an Authorization header or by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import BadConfig
from swarm.gateway.failures import ApiFailure
from swarm.gateway.keys import AskerLimits, find_key, read_keys

ANN, BOB = "sk-ann-0123456789abcdef", "sk-bob-0123456789abcdef"
GOOD = f"""
[ann]
key = "{ANN}"
["bob's laptop"]
key = "{BOB}"
requests_per_minute = 3
concurrent = 2
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "keys.toml"
    path.write_text(text)
    return path


def test_keys_have_names_and_limits_and_are_not_kept(tmp_path: Path) -> None:
    ann, bob = read_keys(write(tmp_path, GOOD), AskerLimits(requests_per_minute=60))
    assert (ann.name, ann.limits) == ("ann", AskerLimits(requests_per_minute=60))
    assert (bob.name, bob.limits) == ("bob's laptop", AskerLimits(requests_per_minute=3, concurrent=2))
    assert ANN not in repr((ann, bob))
    keys = (ann, bob)
    assert find_key(f"Bearer {ANN}", keys) is ann
    assert find_key(f"bearer  {BOB} ", keys) is bob


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        (f"Basic {ANN}", "missing_api_key"),
        (ANN, "missing_api_key"),
        (f"Bearer {ANN[:-1]}", "invalid_api_key"),
        (f"Bearer {ANN}x", "invalid_api_key"),
        (f"Bearer {ANN.upper()}", "invalid_api_key"),
        ("Bearer \x80\xff", "invalid_api_key"),
    ],
)
def test_nothing_but_a_key_is_let_in(tmp_path: Path, header: str | None, code: str) -> None:
    with pytest.raises(ApiFailure) as refused:
        find_key(header, read_keys(write(tmp_path, GOOD), AskerLimits()))
    assert (refused.value.status, refused.value.code) == (401, code)
    assert refused.value.headers() == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 keys"),
        ("[ann", "not valid TOML"),
        ("ann = 3", "has to be a table"),
        ("[ann]", "16 or more"),
        ('[ann]\nkey = "short"', "16 or more"),
        (f'[ann]\nkey = "{ANN}é"', "printable ASCII"),
        (f'[ann]\nkey = "{ANN}"\nlimit = 3', "has to be a table"),
        (f'[ann]\nkey = "{ANN}"\nconcurrent = 0', "concurrent of 'ann'"),
        (f'[ann]\nkey = "{ANN}"\nconcurrent = true', "concurrent of 'ann'"),
        (f'[ann]\nkey = "{ANN}"\nrequests_per_minute = 1.5', "requests_per_minute of 'ann'"),
        (f'[ann]\nkey = "{ANN}"\n[bob]\nkey = "{ANN}"', "the same key"),
        (f'[""]\nkey = "{ANN}"', "a name"),
        ("# " + "x" * (1 << 20), "larger than"),
        (f'[ann]\nkey = "{ANN}"\nconcurrent = ' + "9" * 5000, "not valid TOML"),
        ("ann = " + "[" * 5000, "not valid TOML"),
    ],
    ids=range(15),
)
def test_a_bad_file_is_refused_in_one_line_that_tells_no_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=words) as refused:
        read_keys(write(tmp_path, text), AskerLimits())
    assert "keys.toml" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ANN not in str(refused.value)


def test_a_file_saved_by_notepad_has_its_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_bytes(f'[ann]\r\nkey = "{ANN}"\r\n'.encode("utf-8-sig"))
    assert [key.name for key in read_keys(tmp_path / "keys.toml", AskerLimits())] == ["ann"]


def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(b"\xff\xfe")
    for bad in (path, tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadConfig, match="cannot be read"):
            read_keys(bad, AskerLimits())
