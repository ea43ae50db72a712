"""What the hosts see as their file system: the machine's, which so is the shared one, and some folders of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .layout import LOCAL, Layout
from .spec import Host, Spec
from .tools import tool


def build_root(layout: Layout) -> None:
    """Give this mount namespace, and those made from it, a root in which `/local` exists.

    A mount needs a folder to be mounted on. To make `/local` in the machine's own root would leave it there when the
    testbed is killed, so the root is a small tmpfs that has it, and everything else of the machine bound into it.
    """
    root = layout.root
    tool("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root)
    # Otherwise the folder that holds `root` would be bound together with what is bound so far.
    tool("mount", "--make-unbindable", root)
    for entry in sorted(Path("/").iterdir()):
        if entry != LOCAL:
            _bind_into(root, entry)
    (root / LOCAL.name).mkdir()
    _change_root(root)


def _bind_into(root: Path, entry: Path) -> None:
    place = root / entry.name
    if entry.is_symlink():
        place.symlink_to(entry.readlink())
    elif entry.is_dir():
        place.mkdir()
        tool("mount", "--rbind", entry, place)
    else:
        place.touch()
        tool("mount", "--bind", entry, place)


def _change_root(root: Path) -> None:
    before = root / ".before"
    before.mkdir()
    tool("pivot_root", root, before)
    os.chdir("/")
    tool("umount", "--lazy", "/.before")
    Path("/.before").rmdir()
    tool("mount", "--make-private", "/")


def furnish(spec: Spec, host: Host, layout: Layout) -> None:
    """Mount what `host` has to itself; called on it, in its own mount and network namespaces."""
    size = "" if spec.disk_mb is None else f",size={spec.disk_mb * 10**6}"
    tool("mount", "-t", "tmpfs", "-o", f"mode=755{size}", "tmpfs", LOCAL)
    tool("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")  # noqa: S108
    # A sysfs shows the interfaces of the network namespace that mounted it.
    tool("mount", "-t", "sysfs", "sysfs", "/sys")
    tool("mount", "--bind", layout.hosts(host.name), "/etc/hosts")
    if Path("/etc/slurm").is_dir():  # for whoever runs without SLURM_CONF
        tool("mount", "--bind", layout.etc, "/etc/slurm")
    sacct = shutil.which("sacct")
    if spec.accounting and sacct:
        tool("mount", "--bind", layout.sacct, sacct)
