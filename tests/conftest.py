"""What every test sees: the rule of the ``gpu`` marker."""

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("OMNIGRPO_REQUIRE_GPU") == "1":
        pytest.fail("OMNIGRPO_REQUIRE_GPU=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")
