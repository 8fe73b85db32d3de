"""What our own tests share. The plugin comes from the installed distribution."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread_per_worker(request):
    """Workers side by side must not each take every core."""
    if hasattr(request.config, "workerinput"):
        import torch

        torch.set_num_threads(1)
