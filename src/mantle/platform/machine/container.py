"""Starting a container's process, and joining one for `exec`: a chain of forks, each with one thing to do.

 supervisor ─fork─ (unshares mount and PID namespace) ─fork─ init (PID 1 of the container: builds the mount view,
 forwards signals, reaps, ends with the program's exit code) ─fork─ the program (gives up its rights, executes)

Init keeps its rights, so the program can neither trace nor kill it. Nothing here decides; a failure is told to the
supervisor on the channel as {"error": text}.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import stat
import termios
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.mounts import View
from mantle.platform.machine.privileges import drop_privileges
from mantle.platform.machine.spec import ContainerSpec, PodSpec

START_FAILED = 128
"""Exit code of a container whose program could not be started."""
_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_APP_ID = 1000
"""Without root, uid and gid of applications in their own user namespace."""
_FILES = ("resolv.conf", "hosts", "hostname", "nsswitch.conf")
_HIDDEN = ("/run/mantle", "/run/user", "/run/nscd", "/var/run/nscd", "/run/systemd/resolve")
"""State of every mesh, sockets of users' sessions, and the host's name caches (they do not know the cluster)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod runs."""

    pod: PodSpec
    directory: Path
    """The pod's state directory; `etc/` in it holds the files bound over the host's."""
    hidden: tuple[str, ...]
    rootless: bool


@dataclass(frozen=True, slots=True)
class Launched:
    """A container on its way. The channel brings {"app"} with a pidfd or {"error"}; its end means the program runs."""

    init: int
    channel: socket.socket
    stdout: int
    stderr: int


def launch(place: Place, spec: ContainerSpec) -> Launched:
    """Forks the chain. Raises OSError if not even the namespaces could be made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    out_r, out_w = os.pipe2(os.O_CLOEXEC)
    err_r, err_w = os.pipe2(os.O_CLOEXEC)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    middle = os.fork()
    if middle == 0:
        _in_child(lambda: _unshare_and_fork(place, spec, theirs, out_w, err_w), theirs)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    os.close(out_w)
    os.close(err_w)
    status = os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1])
    first = json.loads(ours.recv(1 << 16) or b'{"error": "the process that makes namespaces ended early"}')
    if status != 0 or "error" in first:
        for fd in (out_r, err_r):
            os.close(fd)
        ours.close()
        raise OSError(first.get("error", "the namespaces could not be made"))
    ours.setblocking(False)
    return Launched(first["init"], ours, out_r, err_r)


def _tell(channel: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    with contextlib.suppress(OSError):
        socket.send_fds(channel, [json.dumps(message).encode()], fds)


def _in_child(work: Callable[[], NoReturn], complaints: socket.socket | int) -> NoReturn:
    """Runs `work` in a forked child, which never returns into the code of its parent. Errors go to the supervisor's
    channel, or as text to a descriptor."""
    try:
        signal.set_wakeup_fd(-1)
        # All of them: a shell's background job hands on SIGINT and SIGQUIT as ignored.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        work()
    except BaseException as error:  # whatever it is, the supervisor is told and this process ends
        text = explained(error)
        if isinstance(complaints, int):
            os.write(complaints, f"mantle: {text}\n".encode())
        else:
            _tell(complaints, {"error": text})
    finally:
        os._exit(START_FAILED)


def explained(error: BaseException) -> str:
    """An error in the words of a shell: `/nope: No such file or directory`."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _unshare_and_fork(place: Place, spec: ContainerSpec, channel: socket.socket, out: int, err: int) -> NoReturn:
    ns.unshare(ns.NEWNS | ns.NEWPID)
    # Init waits for this, so that its pid is the first thing the supervisor hears.
    go_r, go_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(go_w)
        os.read(go_r, 1)
        _in_child(lambda: _init(place, spec, channel, out, err), channel)
    _tell(channel, {"init": pid})
    os._exit(0)


def _init(place: Place, spec: ContainerSpec, channel: socket.socket, out: int, err: int) -> NoReturn:
    ns.name_process("mantle-init")
    ns.close_other_fds((channel.fileno(), out, err))
    os.setsid()
    program = build_view(place, spec)
    app = os.fork()
    if app == 0:
        _in_child(lambda: _become(place, spec, program, out, err), channel)
    pidfd = os.pidfd_open(app)
    _tell(channel, {"app": True}, [pidfd])
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    ns.close_other_fds(())
    attend(app, lambda number: os.kill(app, number))


def build_view(place: Place, spec: ContainerSpec) -> int:
    """Makes the mounts of a container in this, its own, mount namespace. Returns a descriptor of its program."""
    ns.mount(None, "/", None, ns.MS_REC | ns.MS_PRIVATE)
    # Refused where a container runtime has masked parts of /proc: the pod's own then stays.
    with contextlib.suppress(OSError):
        ns.mount("proc", "/proc", "proc", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC)
    view = View()
    view.make_root_ours(m.target for m in spec.mounts)
    volumes = [(m, view.open_below(m.source, m.below)) for m in spec.mounts]
    for item, fd in volumes:
        _refuse_disguised(item.source, os.readlink(f"/proc/self/fd/{fd}"), (*_HIDDEN, *place.hidden))
    files = [(name, view.open(str(path))) for name in _FILES if (path := place.directory / "etc" / name).exists()]
    program = _open_program(spec.argv[0])
    of_tmp = _named_in_tmp(spec)
    exposed = [(path, view.open(path)) for path in sorted({*place.pod.expose, *(of_tmp or ())})]
    if of_tmp is not None:
        view.scratch("/tmp")
    view.scratch("/dev/shm")
    uid, gids = (0, [0]) if place.rootless else (spec.uid, [spec.gid, *spec.groups])
    view.expose(exposed, uid, gids)
    for directory in dict.fromkeys((*_HIDDEN, *place.hidden)):
        view.hide(directory)
    for name, fd in files:
        view.bind(fd, f"/etc/{name}")
    for item, fd in sorted(volumes, key=lambda pair: pair[0].target.count("/")):
        view.bind(fd, item.target, read_only=item.read_only)
    view.seal()
    return program


def _refuse_disguised(named: str, real: str, hidden: Sequence[str]) -> None:
    """Raises OSError for a path of the manifest that leads to what every pod is kept from: it led elsewhere when the
    manifest was read, and whoever may write beside it has changed that since.
    """
    for directory in hidden:
        if Path(real).is_relative_to(directory) and not Path(named).is_relative_to(directory):
            raise OSError(f"{named} leads to {real} by now, which no pod may see")


def _named_in_tmp(spec: ContainerSpec) -> set[str] | None:
    """/tmp is a container's own, but what its program, arguments, environment or directory name there is brought back,
    whole entries of /tmp each: a checkout may lie there. None if /tmp itself is one of them and must stay the host's.
    """
    program = Path(spec.argv[0])
    if spec.cwd == "/tmp" or program.parent == Path("/tmp"):
        return None
    first = b""
    with contextlib.suppress(OSError), program.open("rb") as file:
        first = file.readline(4096)
    named = [*spec.argv, spec.cwd, *spec.env.values(), first[2:].decode(errors="replace") if first[:2] == b"#!" else ""]
    found = {match for text in named for match in re.findall(r"(?<![^\s:=,;\"'])/tmp/[^/\s:,;\"']+", text)}
    return {path for path in found if os.path.lexists(path)}


def _open_program(path: str) -> int:
    """Opened while we may still enter every directory. A script's descriptor must outlive `exec`: its interpreter
    reads it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # may be executed but not read: then it is no script
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(f"{path}: a directory, not a program")
    if os.pread(fd, 2, 0) == b"#!":
        os.set_inheritable(fd, True)
    return fd


def _become(place: Place, spec: ContainerSpec, program: int, out: int, err: int) -> NoReturn:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    give_up_rights(place, spec)
    keep_what_is_ours(program)
    os.chdir(spec.cwd)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    env = dict(spec.env)
    try:
        os.execve(spec.argv[0], spec.argv, env)
    except (PermissionError, FileNotFoundError, NotADirectoryError) as by_path:
        try:
            os.execve(program, spec.argv, env)
        except OSError:
            if os.get_inheritable(program):
                raise OSError(f"{by_path.strerror}: {spec.argv[0]}, or the interpreter it names") from None
            raise by_path from None
    os._exit(START_FAILED)


def keep_what_is_ours(program: int) -> None:
    """A descriptor outlives `exec` only for a script that its user may read. It was opened with all rights: whoever may
    write beside the program could have led us to another file for that moment.
    """
    if os.get_inheritable(program) and not os.access(f"/proc/self/fd/{program}", os.R_OK):
        os.set_inheritable(program, False)


def give_up_rights(place: Place, spec: ContainerSpec) -> None:
    """What an application is left with. Descriptors above 2 are closed by `exec` (all are close-on-exec)."""
    if place.rootless and spec.own_user_namespace:
        ns.enter_user_namespace(_APP_ID, _APP_ID)
    _settle(place, spec)


def _settle(place: Place, spec: ContainerSpec) -> None:
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    drop_privileges(spec.uid, spec.gid, spec.groups, spec.capabilities, change_ids=not place.rootless)


def attend(main: int, forward: Callable[[int], None]) -> NoReturn:
    """Reaps and passes signals on until process `main` ends; then ends with its exit code. All signals are blocked."""
    while True:
        number = signal.sigwaitinfo(_ALL_SIGNALS).si_signo
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                forward(number)
            continue
        for pid, code in reap():
            if pid == main:
                os._exit(code)


def reap() -> list[tuple[int, int]]:
    """Every child that has ended: (pid, exit code as a shell shows it)."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended.append((pid, code if code >= 0 else 128 - code))


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute in a running container."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    tty: bool


def execute(place: Place, spec: ContainerSpec, app: int, command: Command, stdio: Sequence[int]) -> int:
    """Forks a process that joins the container of pidfd `app` and executes `command` there. Returns the pid to wait
    for.

    It ends with the command's exit code; SIGUSR1 to it kills the command's process group, other signals are passed on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: _join(place, spec, app, command, stdio), stdio[2])
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _join(place: Place, spec: ContainerSpec, app: int, command: Command, stdio: Sequence[int]) -> NoReturn:
    ns.name_process("mantle-exec")
    nested = place.rootless and spec.own_user_namespace
    ns.setns(app, ns.NEWNS | ns.NEWPID | (ns.NEWUSER if nested else 0))
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            if command.tty:
                fcntl.ioctl(stdio[0], termios.TIOCSCTTY, 0)
            for fd, source in enumerate(stdio):
                os.dup2(source, fd)
            ns.close_other_fds(())
            _settle(place, spec)
            os.chdir(command.cwd)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvpe(command.argv[0], command.argv, command.env)
        except OSError as error:
            name, why = command.argv[0], error.strerror or str(error)
            path = command.env.get("PATH", os.defpath).split(":")
            if "/" not in name and not any(os.access(f"{directory}/{name}", os.X_OK) for directory in path):
                why = "no such program on the container's PATH"  # a directory it may not enter would say otherwise
            os.write(2, f"mantle: cannot execute {name}: {why}\n".encode())
        finally:
            os._exit(127)
    ns.close_other_fds(())

    def forward(number: int) -> None:
        number = signal.SIGKILL if number == signal.SIGUSR1 else number
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it leads no group of its own yet
            os.kill(pid, number)

    attend(pid, forward)
