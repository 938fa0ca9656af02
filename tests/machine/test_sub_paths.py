"""`subPath` in a volume that the application may write to: links that it puts there lead nowhere.

The daemon, and the init of a container, have rights that the application has not. Whatever they make, open or change in
such a volume must be the volume's own.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machine_play import python

from mantle.platform.machine.container import keep_what_is_ours
from mantle.platform.machine.podfiles import write_volumes
from mantle.platform.machine.spec import MountSpec, Restart
from mantle.platform.machine.volumes import Volume

SCRATCH = Volume("scratch", writable=True)


def written(root: Path, *subs: str) -> None:
    write_volumes(root, [SCRATCH], {}, [("scratch", sub) for sub in subs], chown=False)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_what_a_mount_needs_is_made_for_everybody_and_once(tmp_path: Path) -> None:
    written(tmp_path, "a/b")
    assert mode(tmp_path / "scratch" / "a" / "b") == 0o777
    (tmp_path / "scratch" / "a" / "b").chmod(0o700)  # the application's own decision
    written(tmp_path, "a/b")
    assert mode(tmp_path / "scratch" / "a" / "b") == 0o700


@pytest.mark.parametrize("sub", ["mine", "mine/deep", "mine/deep/deeper"])
def test_a_link_in_place_of_it_changes_nothing_elsewhere(tmp_path: Path, sub: str) -> None:
    elsewhere = tmp_path / "host"
    (elsewhere / "deep").mkdir(parents=True)
    for directory in (elsewhere, elsewhere / "deep"):
        directory.chmod(0o750)
    written(tmp_path / "pod")
    (tmp_path / "pod" / "scratch" / "mine").symlink_to(elsewhere)
    written(tmp_path / "pod", sub)  # a changed ConfigMap: the volumes of running pods are written again
    assert (mode(elsewhere), mode(elsewhere / "deep")) == (0o750, 0o750)
    assert [path.name for path in elsewhere.rglob("*")] == ["deep"]


@pytest.mark.root
@pytest.mark.mesh
def test_an_application_cannot_lead_its_next_start_to_another_pods_files(host: Any) -> None:
    code = """
import os, sys
print("sees", sorted(os.listdir("/srv/part")))
if not os.path.islink("/srv/all/part"):
    os.rename("/srv/all/part", "/srv/all/before")
    os.symlink(sys.argv[1], "/srv/all/part")
sys.exit(1)
"""

    async def scene() -> None:
        async with host.mesh() as mesh:
            other = mesh.dir("b") / "volumes"
            other.mkdir(parents=True)
            (other / "token").write_text("another pod's")
            volumes = mesh.dir("a") / "volumes"
            written(volumes, "part")
            scratch = str(volumes / "scratch")
            mounts = (MountSpec(scratch, "/srv/all"), MountSpec(scratch, "/srv/part", below="part"))
            app = python("app", code, mounts=mounts)
            app = replace(app, argv=(*app.argv, str(other)))
            await mesh.start("a", "10.203.0.5", app, restart=Restart.ON_FAILURE)
            status = await mesh.until("a", lambda s: "no directory or file of the volume" in s.containers[0].message)
            assert status.containers[0].message.startswith(f"{scratch}/part: "), status
            assert mesh.log("a", "app") == ["sees []"]

    host.play(scene)


@pytest.mark.root
@pytest.mark.mesh
def test_a_host_path_that_leads_to_a_meshs_state_by_now_is_not_shown(host: Any) -> None:
    """It was looked at when the manifest was read. Another pod, or its user, may have put a link there since."""
    code = """
import os
try: print("sees", os.listdir("/srv/part"))
except OSError as error: print("sees nothing", error)
"""

    async def scene() -> None:
        async with host.mesh() as mesh:
            other = mesh.dir("b") / "volumes"
            other.mkdir(parents=True)
            link, fine = mesh.state.parent.parent / "data", mesh.state.parent.parent / "fine"
            link.symlink_to(other)
            fine.mkdir()
            (mesh.state.parent.parent / "good").symlink_to(fine)
            for source, uid in ((link, "a"), (mesh.state.parent.parent / "good", "c")):
                app = python("app", code, mounts=(MountSpec(str(source), "/srv/part"),))
                await mesh.start(uid, f"10.203.0.{ord(uid)}", app, restart=Restart.NEVER)
                status = await mesh.ended(uid)
                if source == link:
                    assert "which no pod may see" in status.containers[0].message, status
                    assert mesh.log(uid, "app") == []
                else:
                    assert mesh.log(uid, "app") == ["sees []"]

    host.play(scene)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("mode", "kept"), [(0o755, 1), (0o744, 1), (0o700, 0), (0o711, 0)])
def test_a_script_is_handed_on_to_who_may_read_it(mode: int, kept: int, tmp_path: Path) -> None:
    """Opened as root, through directories that its user cannot enter, maybe by a link that was there for a moment."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(mode)
    opened = os.open(script, os.O_RDONLY)
    os.set_inheritable(opened, True)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(12345, 12345, 12345)
            os.setresuid(12345, 12345, 12345)
            keep_what_is_ours(opened)
            os._exit(int(os.get_inheritable(opened)))
        finally:
            os._exit(9)
    os.close(opened)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == kept
