# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""SGLang in this process: its engine, the thread whose event loop talks to it, and its child processes.

SGLang's own ``Engine`` means to own the process it is in. What it would do, and what is done here instead:

- when a child fails it sends SIGQUIT and its handler kills this process and every child of it, ours included; here the
  signal does nothing, a thread watches the children, and what waits for them ends with ``RolloutError``;
- when its receiving task raises it kills this process; here that task is ours, and its end counts as a failure;
- ``shutdown`` (also at exit) kills every child of this process; here only those that it started are ended;
- it replaces the handlers of the root logger, asyncio's policy and multiprocessing's start method; here they are put
  back.
"""

import asyncio
import atexit
import concurrent.futures
import importlib
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.sglang_config import SGLANG_VERSION

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.2
_END_SECONDS = 10.0
_INSTALL = "run `make sglang` (its own environment, .venv-sglang), or `pip install 'omnigrpo[sglang]'`"


class SGLangHost:
    """Starts SGLang and runs coroutines on its event loop until it is closed."""

    def __init__(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str], *, start_timeout_seconds: float
    ) -> None:
        """Start it with these ``ServerArgs``, the children with these variables too.

        Raises ImportError without SGLang or with another release, RuntimeError outside the main thread, RolloutError
        when it does not start.
        """
        check_installed()
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "SGLang must be started in the main thread: only there can the signal be caught by which its processes "
                "end their parent when they fail"
            )
        self._failure: str | None = None
        self._closed = threading.Event()
        self._tasks: set[concurrent.futures.Future[Any]] = set()
        self._processes: tuple[BaseProcess, ...] = ()
        self._loop = asyncio.new_event_loop()
        self._previous_handler = signal.signal(signal.SIGQUIT, _leave_to_the_watch)
        self._thread = threading.Thread(target=self._serve, name="sglang-loop", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            self._engine = self._start(arguments, environment, start_timeout_seconds)
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._watch_processes, name="sglang-watch", daemon=True)
        self._watch.start()

    @property
    def manager(self) -> "TokenizerManager":
        """SGLang's side of this process, to be used on its event loop only."""
        assert self._engine.tokenizer_manager is not None
        return self._engine.tokenizer_manager

    @property
    def capacity_rows(self) -> int:
        """Rows of the KV cache."""
        return int(self._engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"])

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the scheduler (one per device) and the detokenizer."""
        return tuple(process.pid for process in self._processes if process.pid is not None)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Begin it on the event loop; it is cancelled when a process of SGLang ends. Raises RolloutError after that."""
        try:
            self.check()
        except RolloutError:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._tasks.add(future)
        future.add_done_callback(self._tasks.discard)
        if self._failure is not None:
            future.cancel()  # It failed between the check and the registration.
        return future

    def run(self, coroutine: Coroutine[Any, Any, T], *, what: str, timeout_seconds: float) -> T:
        """Wait for its result; RolloutError when SGLang ends meanwhile or does not answer in time."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout_seconds)
        except concurrent.futures.CancelledError:
            raise self.error() from None
        except TimeoutError:
            future.cancel()
            raise RolloutError(
                f"SGLang did not answer within {timeout_seconds} s to: {what}; raise sglang.timeout_seconds if it "
                "has that much to do, else look at its messages above"
            ) from None

    @property
    def is_running(self) -> bool:
        """Whether it can still be asked something."""
        return self._failure is None and not self._closed.is_set()

    def check(self) -> None:
        """Raise RolloutError unless SGLang is running."""
        if not self.is_running:
            raise self.error()

    def error(self) -> RolloutError:
        """Why nothing can be asked any more."""
        return RolloutError(self._failure or "this SGLang engine is closed; build a new one")

    def close(self) -> None:
        """End its processes and remove what they leave in /dev/shm and the temporary directory."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        for future in tuple(self._tasks):
            future.cancel()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_END_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_SECONDS)
        for owner in self.process_ids:  # Their libraries' semaphores too: a killed process removes nothing.
            _remove_shared_memory(f"sgl_shm_*_{owner}_*", f"sem.loky-{owner}-*")
        if hasattr(self, "_engine"):
            self._remove_remains()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, self._previous_handler)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        leftover = asyncio.all_tasks(self._loop)
        for task in leftover:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*leftover, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _start(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str], timeout_seconds: float
    ) -> "Engine":
        others = set(multiprocessing.active_children())
        with _everything_put_back(environment):
            future = asyncio.run_coroutine_threadsafe(self._build(arguments), self._loop)
            try:
                engine = future.result(timeout_seconds)
                self._processes = _children(engine.get_all_child_pids())
            except TimeoutError:
                self._processes = tuple(set(multiprocessing.active_children()) - others)
                raise RolloutError(
                    f"SGLang did not start within {timeout_seconds} s; raise sglang.start_timeout_seconds for a large "
                    "checkpoint, or set sglang.log_level=info to see how far it comes"
                ) from None
            except (RuntimeError, ValueError, OSError) as error:
                self._processes = tuple(set(multiprocessing.active_children()) - others)
                raise RolloutError(f"SGLang did not start: {error} (its own messages are above)") from error
        return engine

    async def _build(self, arguments: Mapping[str, Any]) -> "Engine":
        """On the loop's thread, which thereby is the one that its children must not outlive."""
        from sglang.srt.entrypoints.engine import Engine

        engine = Engine(**arguments)
        atexit.unregister(engine.shutdown)
        manager = engine.tokenizer_manager
        manager._subprocess_watchdog.stop()
        manager.event_loop = (
            self._loop
        )  # Else it would create its own task, which ends this process when it fails.
        receiving = self._loop.create_task(manager.handle_loop())
        receiving.add_done_callback(self._receiver_ended)
        self._receiving = receiving
        return engine

    def _receiver_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"SGLang's receiver failed: {error!r}")

    def _watch_processes(self) -> None:
        sentinels = {process.sentinel: process for process in self._processes}
        while not self._closed.is_set():
            ended = multiprocessing.connection.wait(list(sentinels), timeout=_POLL_SECONDS)
            if ended and not self._closed.is_set():
                process = sentinels[ended[0]]  # type: ignore[index] - sentinels are ints here
                process.join(_END_SECONDS)
                self._fail(
                    f"a process of SGLang (pid {process.pid}) ended with exit code {process.exitcode} while it was "
                    "needed; its messages, if any, are above (-9 is often the kernel, out of memory). Nothing more "
                    "can be generated: start a new engine, or resume the run from its last checkpoint"
                )
                return

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        for future in tuple(self._tasks):
            future.cancel()

    def _remove_remains(self) -> None:
        manager, ports = self._engine.tokenizer_manager, self._engine.port_args
        for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler, self._engine.send_to_rpc):
            socket.close(linger=0)
        manager.mm_processor.io_executor.shutdown(wait=False)
        manager.mm_processor.cpu_executor.shutdown(wait=False)
        names = (
            ports.tokenizer_ipc_name,
            ports.scheduler_input_ipc_name,
            ports.detokenizer_ipc_name,
            ports.rpc_ipc_name,
            ports.metrics_ipc_name,
        )
        for name in names:
            if name.startswith("ipc://"):
                Path(name.removeprefix("ipc://")).unlink(missing_ok=True)
        _remove_shared_memory(f"sgl_shm_*_{os.getpid()}_*", f"*{ports.instance_id}*")


def check_installed() -> None:
    """Raise ImportError unless the release of SGLang is there that this code was written for."""
    if importlib.util.find_spec("sglang") is None:
        raise ImportError(f"rollout.engine is sglang, but SGLang is not installed: {_INSTALL}")
    found = importlib.metadata.version("sglang")
    if found != SGLANG_VERSION:
        raise ImportError(
            f"SGLang {found} is installed, but this engine uses internals of {SGLANG_VERSION}: {_INSTALL}"
        )


def _remove_shared_memory(*patterns: str) -> None:
    for pattern in patterns:
        for segment in _SHARED_MEMORY.glob(pattern):
            segment.unlink(missing_ok=True)


def _children(process_ids: list[int]) -> tuple[BaseProcess, ...]:
    wanted = set(process_ids)
    return tuple(process for process in multiprocessing.active_children() if process.pid in wanted)


def _leave_to_the_watch(number: int, frame: FrameType | None) -> None:
    """SIGQUIT of a failing child: it ends right after, and the watch says so."""


@contextmanager
def _everything_put_back(environment: Mapping[str, str]) -> Iterator[None]:
    """Undo what importing and starting SGLang changes in this process; the variables are for its children."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # SGLang closes those that it finds.
    method = multiprocessing.get_start_method(allow_none=True)
    policy = asyncio.get_event_loop_policy()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        asyncio.set_event_loop_policy(policy)
        multiprocessing.set_start_method(method, force=True)
        root.handlers[:] = handlers
        root.setLevel(level)
