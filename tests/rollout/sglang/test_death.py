"""SGLang's processes are killed; this process and its other children are not."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sglang_rig import group, open_rig

from omnigrpo.rollout.interface import RolloutError


def test_a_killed_scheduler_is_an_error_and_nothing_else(base):
    handler = signal.getsignal(signal.SIGQUIT)
    segments = set(Path("/dev/shm").iterdir())
    rig = open_rig(base, torch.float32)
    own_child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    names = {Path(f"/proc/{pid}/cmdline").read_text(): pid for pid in rig.engine.process_ids}
    scheduler = next(pid for name, pid in names.items() if "scheduler" in name)
    stream = rig.engine.generate(
        [group(rig.prefix(f"killed {i}"), 4) for i in range(4)],
        rig.sampling(max_new_tokens=400, stop_token_ids=()),
    )
    time.sleep(1.0)

    os.kill(scheduler, signal.SIGKILL)

    begun = time.monotonic()
    with pytest.raises(RolloutError, match=rf"pid {scheduler}\) ended with exit code -9"):
        list(stream)
    assert time.monotonic() - begun < 20
    with pytest.raises(RolloutError, match="ended with exit code -9"):
        rig.engine.generate([group(rig.prefix("afterwards"))], rig.sampling())
    with pytest.raises(RolloutError, match="ended with exit code -9"):
        rig.publish()
    rig.engine.close()
    rig.engine.close()
    assert own_child.poll() is None
    own_child.kill()
    own_child.wait()
    assert not any(Path(f"/proc/{pid}").exists() for pid in rig.engine.process_ids)
    owners = (os.getpid(), *rig.engine.process_ids)
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - segments}
    assert [name for name in left if any(str(owner) in name for owner in owners)] == []
    assert signal.getsignal(signal.SIGQUIT) is handler
    with pytest.raises(RolloutError):
        rig.engine.generate([group(rig.prefix("closed"))], rig.sampling())


def test_a_checkpoint_that_sglang_cannot_load_is_an_error(base, tmp_path):
    from omnigrpo.rollout.sglang_engine import SGLangEngine

    for path in base.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).symlink_to(path)
    children = set(multiprocessing.active_children())
    with pytest.raises(RolloutError, match="SGLang did not start"):
        SGLangEngine(tmp_path, device="cpu", dtype=torch.float32)
    assert set(multiprocessing.active_children()) <= children
