"""Whether DALI can run here: tests that need it skip without it, and fail where it is required."""

import os

import pytest

from omnigrpo.media.decode_dali import is_installed


def require_dali() -> None:
    """Skip the test where ``nvidia.dali`` is not installed; fail it when OMNIGRPO_REQUIRE_DALI=1.

    An installed DALI that does not import raises its own ImportError: a broken install never skips.
    """
    if is_installed():
        import nvidia.dali  # noqa: F401

        return
    if os.environ.get("OMNIGRPO_REQUIRE_DALI") == "1":
        pytest.fail("OMNIGRPO_REQUIRE_DALI=1, but nvidia.dali is not installed", pytrace=False)
    pytest.skip("needs DALI: pip install 'omnigrpo[dali]'")
