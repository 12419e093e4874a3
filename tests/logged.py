"""What one module logged in a test: threads that other tests of the worker left behind log too, at any moment."""

from __future__ import annotations

from types import ModuleType

import pytest


def logged_by(module: ModuleType, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Its messages, in order."""
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]
