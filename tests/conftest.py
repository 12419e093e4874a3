"""What holds for every test: few threads, no hub, repeatable examples."""

import os

# Before the first import of torch and of huggingface_hub, which read them once. Child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# A busy machine makes single examples slow, and a test that fails should fail again.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """One torch thread: two cores are shared by all processes that a test starts."""
    import torch

    torch.set_num_threads(1)
