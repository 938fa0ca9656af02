"""Where the files of meshes lie: in memory, whatever the machine is."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from mantle.cli import down
from mantle.cli.machine_client import node_lives
from mantle.platform.machine import places
from mantle.platform.machine.direct import process_start
from mantle.platform.machine.state import StateDir

MACHINE = "ext4 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\ntmpfs /run/user/1000 tmpfs rw 0 0\nproc /proc proc rw 0 0\n"
CONTAINER = "overlay / overlay rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n/dev/sda1 /run/user/1000 ext4 rw 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "directory", "in_memory"),
    [
        (MACHINE, "/run", True),
        (MACHINE, "/run/user/1000", True),
        (MACHINE, "/runner", False),
        (CONTAINER, "/run", False),
        (CONTAINER, "/run/user/1000", False),
        (CONTAINER, "/dev/shm", True),
        (MACHINE + "/dev/sda2 /run/user/1000 ext4 rw 0 0\n", "/run/user/1000", False),
    ],
)
def test_a_directory_in_memory(mounts: str, directory: str, in_memory: bool, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(mounts)
    assert places.in_memory(directory, str(tmp_path / "mounts")) is in_memory


@pytest.mark.parametrize(
    ("uid", "runtime", "memory", "found"),
    [
        (0, "", True, "/run/mantle"),
        (0, "", False, "/dev/shm/mantle-0"),
        (7, "/run/user/7", True, "/run/user/7/mantle"),
        (7, "/run/user/7", False, "/dev/shm/mantle-7"),
        (7, "", True, "/dev/shm/mantle-7"),
    ],
)
def test_the_root_of_all_meshes(
    uid: int, runtime: str, memory: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.os, "geteuid", lambda: uid)
    monkeypatch.setattr(places, "in_memory", lambda _: memory)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert str(places.state_root()) == found


@pytest.mark.parametrize("where", ["meshes", "meshes/m"])
def test_a_link_in_the_place_of_a_meshs_directory_is_not_followed(where: str, tmp_path: Path) -> None:
    """/dev/shm is everybody's: what a link there leads to may well be ours, and must not become a mesh's directory."""
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o755)
    link = tmp_path / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(ours)
    with pytest.raises(PermissionError, match="is no directory"):
        StateDir(tmp_path / "meshes" / "m").create()
    assert ours.stat().st_mode & 0o777 == 0o755
    assert list(ours.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    os.chown(tmp_path / "meshes", 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        StateDir(tmp_path / "meshes" / "m").create()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_process_that_somebody_else_names_is_not_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            directory = tmp_path / "m"
            directory.mkdir()
            named = {"node_pid": sleeper.pid, "node_start": process_start(sleeper.pid)}
            (directory / "mesh.json").write_text(json.dumps(named))
            os.chown(directory / "mesh.json", 12345, 12345)
            assert not node_lives(directory)
            down.clean_up(directory, False)
            assert sleeper.poll() is None
        finally:
            sleeper.kill()
