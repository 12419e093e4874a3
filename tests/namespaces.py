"""Network namespaces with one public machine and others behind NAT: these can dial it, and nobody can dial them.

Linux, `ip` and root are needed; `why_not()` says what is missing. Nothing outside the namespaces is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

PUBLIC = "10.213.0.1"  # of the public machine, as all the others know it
_SECONDS = 20.0


class Namespaces:
    """A context manager; `inside(name)` is what a command begins with to run there. "public" is one of the names.

    A machine behind NAT has a link to the public one alone, which forwards nothing: as through a router's NAT, what it
    did not ask for does not reach it, and two of them do not see each other.
    """

    def __init__(self, *behind_nat: str) -> None:
        self._behind_nat = behind_nat

    def inside(self, name: str) -> list[str]:
        """Put before a command."""
        return ["ip", "netns", "exec", self._of(name)]

    def listening(self, name: str) -> list[str]:
        """The kernel's lines of sockets there that accept connections over a network."""
        tables = _run(*self.inside(name), "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
        return [line for line in tables if line.split()[3] == "0A"]

    def __enter__(self) -> Namespaces:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        public = self._of("public")
        for name in ("public", *self._behind_nat):
            _run("ip", "netns", "add", self._of(name))
            _run("ip", "-n", self._of(name), "link", "set", "lo", "up")
        _run("ip", "-n", public, "addr", "add", f"{PUBLIC}/32", "dev", "lo")
        _run(*self.inside("public"), "sysctl", "-qw", "net.ipv4.ip_forward=0")
        for index, name in enumerate(self._behind_nat, start=1):
            near, far, link = self._of(name), f"10.213.{index}.1", f"to{index}"
            _run("ip", "link", "add", link, "netns", public, "type", "veth", "peer", "name", "out", "netns", near)
            _run("ip", "-n", public, "addr", "add", f"{far}/30", "dev", link)
            _run("ip", "-n", public, "link", "set", link, "up")
            _run("ip", "-n", near, "addr", "add", f"10.213.{index}.2/30", "dev", "out")
            _run("ip", "-n", near, "link", "set", "out", "up")
            _run("ip", "-n", near, "route", "add", "default", "via", far)

    def _remove(self) -> None:
        for name in ("public", *self._behind_nat):
            # A veth pair goes with either of its ends. A namespace that was never made is no reason to stop.
            subprocess.run(
                ["ip", "netns", "delete", self._of(name)], capture_output=True, timeout=_SECONDS, check=False
            )

    def _of(self, name: str) -> str:
        return f"swarmtune-{os.getpid()}-{name}"


def why_not() -> str:
    """Why no namespace can be made here; empty where it can."""
    if shutil.which("ip") is None:
        return "there is no command `ip` (iproute2)"
    try:
        with Namespaces("probe"):
            return ""
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}".strip()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
