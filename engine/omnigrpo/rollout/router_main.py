# pyright: reportMissingImports=false
# sglang-router comes with the extra "servers".
"""The router's process: ``python -m omnigrpo.rollout.router_main``, its settings as JSON in the first line of stdin.

It ends with the process that started it: the kernel kills it then (Linux), for the router's loop lets no other Python
thread run. SGLang's own launcher would import all of SGLang where it is installed, only for a tracing option.
"""

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until it is killed."""
    settings = json.loads(sys.stdin.readline())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings.pop("parent"):
        return  # It had ended before.
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    Router.from_args(RouterArgs(**settings)).start()


if __name__ == "__main__":
    main()
