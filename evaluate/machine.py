"""What a measurement must say about where it was made."""

import datetime
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Whose versions decide a measurement, as far as they are installed.
_PACKAGES = (
    *("torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt_rtx_cu13_libs", "tensorrt", "tomesd", "DeepCache"),
)


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, library versions and the date."""
    import torch

    description: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            description[package] = version(package)
    return description


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
