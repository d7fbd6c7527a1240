"""`omnigrpo info`: what is installed, what device there is, which kernels run and why others do not."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from omnigrpo_kernels.extension import kernel_status

PACKAGES = (
    "omnigrpo",
    "torch",
    "triton",
    "transformers",
    "av",
    "numpy",
    "safetensors",
    "sglang",
    "liger-kernel",
    "flash-attn",
    "nvidia-dali-cuda130",
)


def print_info() -> None:
    """Print three tables."""
    console = Console()
    versions = Table("package", "version", title="Versions")
    versions.add_row("python", platform.python_version())
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)

    devices = Table("device", "what", title="Devices")
    devices.add_row(
        "cpu",
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    for index in range(torch.cuda.device_count()):
        devices.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        devices.add_row("cuda", f"none: torch {torch.__version__} finds no device")
    console.print(devices)

    kernels = Table("op", "device", "runs", "why not its own kernel", title="Kernels")
    for status in kernel_status():
        kernels.add_row(status.op, status.device, status.implementation, status.reason or "")
    console.print(kernels)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
