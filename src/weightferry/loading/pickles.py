"""Find the names that a pickle would import, without running any of it."""

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

# A legacy torch file is five pickles (magic number, protocol, system, the object, storage keys), then raw storages.
LEGACY_PICKLES = 5
# These can run a command, and data never needs them. torch itself never allows the first four modules.
_DANGEROUS_MODULES = frozenset({"os", "posix", "nt", "sys", "subprocess", "pty", "runpy", "shutil", "socket"})
_DANGEROUS_BUILTINS = frozenset({"eval", "exec", "compile", "open", "__import__", "getattr", "breakpoint"})
_MAX_NAMES_SHOWN = 10


def unsafe_globals(stream: IO[bytes], pickles: int = 1) -> list[str]:
    """Return the names that the pickles in `stream` import beyond those that torch allows.

    Parameters
    ----------
    stream
        Positioned at the first pickle.
    pickles
        The number of pickles that follow each other.

    Returns
    -------
    list[str]
        ``module.name`` each, sorted, without the names that `torch.serialization.add_safe_globals` has allowed. If a
        pickle is damaged: the names before the damage.
    """
    found: set[tuple[str, str]] = set()
    try:
        for _ in range(pickles):
            found.update(_globals_of_pickle(stream))
    except Exception:  # noqa: BLE001, S110 - pickletools raises any class on damaged input; keep the names found so far
        pass
    plain = {(module, name) for module, name in found if _is_dotted(module) and _is_dotted(name)}
    odd = {f"{module}.{name}" for module, name in found - plain}
    return sorted({*_not_allowed_by_torch(plain), *odd})


def refusal_text(path: Path, names: list[str]) -> str:
    """Return the error text for a file whose pickle imports `names`; it says how to allow exactly these names."""
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    if len(names) > _MAX_NAMES_SHOWN:
        shown += f" and {len(names) - _MAX_NAMES_SHOWN} more"
    refused = (
        f"refused to load {path}: its pickle imports {shown}, and only tensors and containers are allowed. "
        "Nothing from the file was run."
    )
    dangerous = [name for name in names if _is_dangerous(name)]
    if dangerous:
        return f"{refused} Weights never need {', '.join(dangerous)}, which can run any command: do not load this file."
    return (
        f"{refused} If you trust the file and know these names, allow exactly them on every rank: "
        f"`LoadOptions(allow_globals={names[:_MAX_NAMES_SHOWN]})` for this loadable, "
        f"or `WEIGHTFERRY_ALLOW_GLOBALS={','.join(names[:_MAX_NAMES_SHOWN])}`."
    )


@contextlib.contextmanager
def allow_globals_in_torch(names: Collection[str]) -> Iterator[None]:
    """Within this context, let torch's safe unpickler accept these names in addition to tensors and containers.

    Parameters
    ----------
    names
        ``module.name`` each; the modules are imported.

    Raises
    ------
    LoadError
        A name cannot be imported, or can run any command.
    """
    found = [_import(name) for name in names]
    with torch.serialization.safe_globals(found) if found else contextlib.nullcontext():
        yield


def _import(name: str) -> Any:
    if _is_dangerous(name):
        raise LoadError(
            f"allow_globals: {name} can run any command and is never allowed; remove it from the list", subject=name
        )
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
    raise LoadError(
        f"allow_globals: cannot import {name}; install its package, or correct the name (module.name)", subject=name
    )


def _globals_of_pickle(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import of one pickle; the stream is then at the byte after its STOP opcode."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            # pickle always pushes the module and the name as the last two strings.
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


def _not_allowed_by_torch(found: set[tuple[str, str]]) -> list[str]:
    """Ask torch which of these names it does not allow.

    torch answers this only for zip files, and its list of allowed names is private. So this function makes a zip in
    memory with a pickle that only names them. torch disassembles this pickle and does not run it.
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


def _is_dangerous(name: str) -> bool:
    module, _, attribute = name.partition(".")
    return module in _DANGEROUS_MODULES or (module in ("builtins", "__builtin__") and attribute in _DANGEROUS_BUILTINS)
