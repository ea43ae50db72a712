"""Which names a pickle would import, found without running any of it."""

from __future__ import annotations

import contextlib
import io
import pickletools
import zipfile
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any

import torch

from weightferry.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

# A legacy torch file is five pickles (magic number, protocol, system, the object, keys of storages), then raw storages.
LEGACY_PICKLES = 5
# Ways to run a command; nothing that is only data has a use for them. torch never lets the first four pass.
_HOSTILE_MODULES = frozenset({"os", "posix", "nt", "sys", "subprocess", "pty", "runpy", "shutil", "socket"})
_HOSTILE_BUILTINS = frozenset({"eval", "exec", "compile", "open", "__import__", "getattr", "breakpoint"})
_SHOWN = 10


def unsafe_globals(stream: IO[bytes], pickles: int = 1) -> list[str]:
    """Name what the pickles in `stream` import beyond what torch allows.

    Parameters
    ----------
    stream
        Where the first pickle starts.
    pickles
        How many follow each other.

    Returns
    -------
    list[str]
        ``module.name`` each, sorted, without what `torch.serialization.add_safe_globals` has allowed. Where a pickle
        is damaged, what was found up to there.
    """
    found: set[tuple[str, str]] = set()
    try:
        for _ in range(pickles):
            found.update(_globals_of_one(stream))
    except Exception:  # noqa: BLE001, S110 - pickletools fails on damaged input in every way there is; keep what it saw
        pass
    plain = {(module, name) for module, name in found if _is_dotted(module) and _is_dotted(name)}
    odd = {f"{module}.{name}" for module, name in found - plain}
    return sorted({*_not_allowed(plain), *odd})


def explain(path: Path, wanted: list[str]) -> str:
    """Say why `path`, whose pickle imports `wanted`, is refused, and how to allow exactly that."""
    shown = ", ".join(wanted[:_SHOWN]) + (f" and {len(wanted) - _SHOWN} more" if len(wanted) > _SHOWN else "")
    refused = (
        f"{path} is refused, and nothing of it was run: its pickle wants {shown}, more than tensors and containers."
    )
    hostile = [name for name in wanted if _is_hostile(name)]
    if hostile:
        return f"{refused} Weights have no use for {', '.join(hostile)}, which can run anything: do not load this file."
    return (
        f"{refused} If you trust the file and know what these are, allow exactly them on every rank: "
        f"`LoadOptions(allow_globals={wanted[:_SHOWN]})` for this loadable, "
        f"or `WEIGHTFERRY_ALLOW_GLOBALS={','.join(wanted[:_SHOWN])}`."
    )


@contextlib.contextmanager
def allowed(names: Collection[str]) -> Iterator[None]:
    """Let torch's safe reading accept exactly these beside tensors and containers, until this context is left.

    Parameters
    ----------
    names
        ``module.name`` each; the modules are imported.

    Raises
    ------
    LoadError
        There is no such thing, or it is one that could run anything.
    """
    found = [_import(name) for name in names]
    with torch.serialization.safe_globals(found) if found else contextlib.nullcontext():
        yield


def _import(name: str) -> Any:
    if _is_hostile(name):
        raise LoadError(f"allow_globals: {name} can run anything; it is never allowed", subject=name)
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        with contextlib.suppress(AttributeError):
            for part in parts[cut:]:
                found = getattr(found, part)
            return found
    raise LoadError(f"allow_globals: there is no {name} to import here", subject=name)


def _globals_of_one(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import of one pickle; the stream then stands behind its STOP."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            # Its module and name are the last two strings pushed; what else could stand there is not written by pickle.
            module, name = ["?", "?", *strings][-2:]
            yield module, name
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            yield "copyreg", f"extension {argument}"
        elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
            memo[len(memo) if argument is None else int(argument)] = strings[-1] if strings else ""
        elif opcode.name.endswith("GET"):
            strings.append(memo.get(int(argument or 0), ""))
        elif isinstance(argument, str):
            strings.append(argument)


def _not_allowed(found: set[tuple[str, str]]) -> list[str]:
    """Ask torch which of these it does not allow.

    torch answers this for zip files only, and its list of allowed names is private. So a zip with a pickle that does
    nothing but name them is made in memory; torch disassembles it and does not run it either.
    """
    names = "".join(f"c{module}\n{name}\n" for module, name in sorted(found))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + names.encode() + b".")
        file.writestr("archive/version", "3\n")
    archive.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(archive)


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _is_hostile(name: str) -> bool:
    module, _, attribute = name.partition(".")
    return module in _HOSTILE_MODULES or (module in ("builtins", "__builtin__") and attribute in _HOSTILE_BUILTINS)
