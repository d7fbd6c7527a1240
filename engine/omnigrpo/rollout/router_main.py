"""The router's process: ``python -m omnigrpo.rollout.router_main``, its settings as JSON in the first line of stdin.

It ends with the process that started it, whose end of the pipe closes then. SGLang's own launcher would import all of
SGLang where it is installed, only for a tracing option.
"""

import json
import os
import sys
import threading


def main() -> None:
    """Serve until stdin is closed."""
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Router.from_args(RouterArgs(**settings)).start()


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
