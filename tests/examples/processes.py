"""Programs that run beside a test Hub, without this process's own settings of Hugging Face and weightferry."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightferry.testing.hub import HubServer


def run_to_end(
    command: Sequence[str], hub: HubServer, folder: Path, seconds: float, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, with its caches there too; it must end with exit code 0 within some seconds."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WEIGHTFERRY_"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "huggingface"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environ |= {"WEIGHTFERRY_CACHE_DIR": str(folder / "cache")}
    environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_PROXY": "*"}
    environ |= variables
    done = subprocess.run(
        command, env=environ, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
