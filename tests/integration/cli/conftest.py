from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from swarm.cli.main import main
from tests.integration.swarm.small_swarm import save_tiny_model

SECONDS = 240.0  # for anything that another process does; a busy machine imports torch for ten, a slow one for thirty


class Process:
    """One `swarm ...` in a process and process group of its own, as a shell would start it."""

    def __init__(
        self,
        words: list[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        inside: Sequence[str] = (),
        program: Sequence[str] = ("-m", "swarm.cli.main"),
    ) -> None:
        """`inside` is what the command begins with to run in another place, `program` what Python runs."""
        self.log = log
        command = [*inside, sys.executable, *program, *words]
        with log.open("wb") as errors:
            self.popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, process_group=0
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def line(self) -> str:
        """The next line of its output; fails with its log when it ends instead."""
        line = self._lines.get(timeout=SECONDS)
        assert line is not None, f"it ended: {self.errors()}"
        return line

    def children(self) -> list[int]:
        """Its p2pd."""
        words = Path(f"/proc/{self.popen.pid}/task").glob("*/children")
        return [int(pid) for path in words for pid in path.read_text().split()]

    def send(self, number: int, *, group: bool = False) -> int:
        """Signal it, or its whole process group as a terminal does; gives its exit code."""
        if group:
            os.killpg(self.popen.pid, number)
        else:
            self.popen.send_signal(number)
        return self.popen.wait(SECONDS)

    def errors(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        """By force, with its p2pd; hosts that it has started leave by themselves."""
        if self.popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._reader.join(SECONDS)
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """A person's machine: a directory with everything that the commands keep, and a model."""

    path: Path
    model: Path
    environment: Mapping[str, str]
    started: list[Process]

    def start(self, *words: str, **where: Sequence[str]) -> Process:
        """`where` is as for Process."""
        process = Process(list(words), self.environment, self.path / f"log-{len(self.started)}.txt", **where)
        self.started.append(process)
        return process

    def init(self, name: str, **settings: str) -> Path:
        run = self.path / name
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        done(swarm("init", str(run), "--model", str(self.model), *flags))
        return run


def swarm(*words: str) -> Result:
    """A command in this process, which has torch already."""
    return CliRunner().invoke(main, list(words))


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def error_of(result: Result) -> str:
    """The one line of a command that failed as it should."""
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("Error: "), result.stderr
    assert not any("Traceback" in line or line.startswith("Error") for line in before), result.stderr
    return last


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("home")
    places = {"XDG_DATA_HOME": str(path / "data"), "XDG_CACHE_HOME": str(path / "cache")}
    # Signals that the test's own parent ignores would be ignored by children too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, value)
        found = Home(path=path, model=save_tiny_model(path / "model"), environment=os.environ | places, started=[])
        yield found
        for process in reversed(found.started):
            process.end()
    signal.signal(signal.SIGINT, before)
