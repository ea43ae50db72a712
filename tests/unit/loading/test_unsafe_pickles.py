from __future__ import annotations

import io
import pickle
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.loading.malformed import RunsCommand
from weightferry.errors import Failure, LoadError, UnsafeFile
from weightferry.loading.load_object import load_object
from weightferry.loading.pickles import unsafe_globals
from weightferry.loading.readers import read_state


class Settings:
    """A harmless class; a pickle still may not create it."""

    rate = 0.1


def save_zip(obj: Any, path: Path, protocol: int) -> None:
    torch.save(obj, path, pickle_protocol=protocol)


def save_legacy(obj: Any, path: Path, protocol: int) -> None:
    torch.save(obj, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def save_tar(obj: Any, path: Path, protocol: int) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(obj, protocol)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def save_pickle(obj: Any, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(obj, protocol))


def save_first_of_legacy(obj: Any, path: Path, protocol: int) -> None:
    save_legacy({}, path, 2)
    path.write_bytes(path.read_bytes()[:15] + pickle.dumps(obj, protocol))


Save = Callable[[Any, Path, int], None]
SAVES = [save_zip, save_legacy, save_tar, save_pickle, save_first_of_legacy]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("nest", [lambda evil: evil, lambda evil: {"weight": torch.ones(2), "x": [evil]}])
def test_a_command_is_never_run(save: Save, protocol: int, nest: Callable[[Any], Any], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "model.ckpt"
    save(nest(RunsCommand(marker)), path, protocol)
    network = nn.Linear(1, 1)
    with pytest.raises(UnsafeFile) as caught:
        load_object("network", network, path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    if save is not save_tar:
        assert "posix.system" in str(caught.value)
        assert "add_safe_globals" not in str(caught.value), "the text must not suggest to allow a shell"


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_the_wanted_global_is_named_and_can_be_allowed(save: Save, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    save({"settings": Settings(), "weight": torch.ones(2)}, path, 2)
    wanted = f"{Settings.__module__}.Settings"
    with pytest.raises(UnsafeFile) as caught:
        read_state(path)
    assert f"LoadOptions(allow_globals=['{wanted}'])" in str(caught.value)
    assert isinstance(read_state(path, allow_globals=[wanted])["settings"], Settings)
    with torch.serialization.safe_globals([Settings]):
        assert isinstance(read_state(path)["settings"], Settings)
    with pytest.raises(UnsafeFile):
        read_state(path)


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "subprocess.Popen", "no.such.thing", "torch.nothing", "x"]
)
def test_names_that_cannot_be_allowed(name: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(LoadError, match="allow_globals"):
        read_state(tmp_path / "file", allow_globals=[name])


def test_no_advice_to_switch_the_check_off(tmp_path: Path) -> None:
    save_zip({"settings": Settings()}, tmp_path / "file", 2)
    with pytest.raises(UnsafeFile) as caught:
        read_state(tmp_path / "file")
    travelled = Failure.of(caught.value, rank=0, host="node", phase="load")
    assert "weights_only" not in travelled.message + travelled.traceback.replace("weights_only=True", "")


def test_a_whole_module_names_its_classes(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), tmp_path / "file")
    with pytest.raises(UnsafeFile, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_state(tmp_path / "file")


def test_many_globals_are_counted(tmp_path: Path) -> None:
    names = "".join(f"clab.module{number:02}\nThing\n0" for number in range(30))
    (tmp_path / "file").write_bytes(b"\x80\x02" + names.encode() + b"N.")
    with pytest.raises(UnsafeFile, match="and 20 more"):
        read_state(tmp_path / "file")


def dumped(obj: Any, protocol: int) -> io.BytesIO:
    return io.BytesIO(pickle.dumps(obj, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_globals_are_found_in_every_protocol(protocol: int) -> None:
    assert unsafe_globals(dumped([Settings(), Settings], protocol))[-1] == f"{Settings.__module__}.Settings"


@pytest.mark.parametrize("protocol", [2, 4])
def test_names_that_torch_allows_are_left_out(protocol: int) -> None:
    assert unsafe_globals(dumped(OrderedDict(a=Counter("aab"), b=torch.float16, c=torch.Size([1])), protocol)) == []


def test_names_that_are_not_identifiers() -> None:
    """A line break in a name must not add opcodes to the pickle that torch examines."""
    strings = b"\x8c\x07x\n.\nabc" + b"\x8c\x04evil"
    assert unsafe_globals(io.BytesIO(b"\x80\x04" + strings + b"\x93.")) == ["x\n.\nabc.evil"]


def test_names_before_the_damage_are_found() -> None:
    stream = io.BytesIO(dumped(RunsCommand(Path("x")), 2).getvalue()[:20])
    assert unsafe_globals(stream) == ["posix.system"]


def test_torch_does_not_run_the_names_that_it_examines(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert unsafe_globals(dumped(RunsCommand(marker), 2)) == ["posix.system"]
    assert not marker.exists()
