"""By which names a gateway may be asked: a web page must not reach it by a name of its own that leads here.

A browser lets a page read whatever comes from the page's own name, and whoever has the name says where it leads: to
this machine, once the page is loaded. Addresses cannot be turned so. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address

from swarm.errors import SwarmError

ANY_NAME = "*"
LOCAL_NAMES = frozenset({"localhost"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[^\s:\[\]/@]{1,255})(:[0-9]{0,5})?")


class ForeignName(SwarmError):
    """A gateway was asked by a name that is not its own."""


def check_names(hosts: Iterable[str], allowed: frozenset[str]) -> None:
    """Whether a request with these Host headers may pass: addresses, and the names that are `allowed`; ANY_NAME: all.

    None at all is what old programs send, and no browser.

    Raises:
        ForeignName: it may not.
    """
    if ANY_NAME in allowed:
        return
    for host in hosts:
        found = _HOST.fullmatch(host)
        name = "" if found is None else found[1].rstrip(".").lower()
        if not _is_address(name.strip("[]")) and name not in allowed:
            shown = "".join(char if char.isascii() and char.isprintable() else "?" for char in (name or host)[:100])
            raise ForeignName(f"'{shown}' is no name of this gateway; if it is yours, start it with --allow-host NAME")


def clean_name(name: str) -> str:
    """A name as it is compared."""
    return name.strip().rstrip(".").lower()


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine alone."""
    return clean_name(host) in LOCAL_NAMES or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
