"""The file system of the hosts: the shared file system of the machine, and private folders of each host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .layout import LOCAL, Layout
from .spec import Host, Spec
from .tools import run_tool


def build_root(layout: Layout) -> None:
    """Give this mount namespace, and the namespaces created from it, a root with the folder `/local`.

    A mount needs a mount point. A folder `/local` in the root of the machine would stay there when the testbed is
    killed. So the new root is a small tmpfs with `/local`, and with bind mounts of all other entries of the old root.
    """
    root = layout.root
    run_tool("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root)
    # Otherwise the bind mount of the folder that contains `root` would contain the earlier bind mounts too.
    run_tool("mount", "--make-unbindable", root)
    for entry in sorted(Path("/").iterdir()):
        if entry != LOCAL:
            _bind_into(root, entry)
    (root / LOCAL.name).mkdir()
    _change_root(root)


def _bind_into(root: Path, entry: Path) -> None:
    target = root / entry.name
    if entry.is_symlink():
        target.symlink_to(entry.readlink())
    elif entry.is_dir():
        target.mkdir()
        run_tool("mount", "--rbind", entry, target)
    else:
        target.touch()
        run_tool("mount", "--bind", entry, target)


def _change_root(root: Path) -> None:
    old_root = root / ".before"
    old_root.mkdir()
    run_tool("pivot_root", root, old_root)
    os.chdir("/")
    run_tool("umount", "--lazy", "/.before")
    Path("/.before").rmdir()
    run_tool("mount", "--make-private", "/")


def mount_private_folders(spec: Spec, host: Host, layout: Layout) -> None:
    """Mount the private folders of `host`; call it in the mount and network namespaces of the host."""
    size = "" if spec.disk_mb is None else f",size={spec.disk_mb * 10**6}"
    run_tool("mount", "-t", "tmpfs", "-o", f"mode=755{size}", "tmpfs", LOCAL)
    run_tool("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")  # noqa: S108
    # sysfs shows the interfaces of the network namespace that mounts it.
    run_tool("mount", "-t", "sysfs", "sysfs", "/sys")
    run_tool("mount", "--bind", layout.hosts(host.name), "/etc/hosts")
    if Path("/etc/slurm").is_dir():  # for commands without SLURM_CONF
        run_tool("mount", "--bind", layout.etc, "/etc/slurm")
    sacct = shutil.which("sacct")
    if spec.accounting and sacct:
        run_tool("mount", "--bind", layout.sacct, sacct)
