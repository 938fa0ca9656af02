"""A real API server of a test session: what tests may ask of it, and how it is started and ended."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOL = Path(__file__).resolve().parent.parent / "e2e" / "cluster"


@dataclass(frozen=True)
class ApiServer:
    """What tests need of it. Tests share it: each works in namespaces of its own (`new_namespace`)."""

    kubeconfig: Path
    """Of the cluster's administrator."""
    url: str
    state: Path
    """The cluster's own directory: `pki/`, `conf/`, `log/`."""
    bins: Path
    restarted: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """API servers that a test killed and started again: the cluster tool does not know them."""

    def kubectl(self, *args: str, input: str | None = None) -> str:
        """What `kubectl ARGS` says. Fails the test, with its own words, if it does."""
        command = [str(self.bins / "kubectl"), f"--kubeconfig={self.kubeconfig}", *args]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=300, env=_environment())
        assert done.returncode == 0, f"kubectl {' '.join(args)}:\n{done.stderr}{done.stdout}"
        return done.stdout

    def new_namespace(self, prefix: str = "test") -> str:
        """A fresh namespace's name. It lives as long as the cluster: deleting one takes longer than many tests."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        # The controller-manager would make it, but after an API server's death it comes back half a minute later.
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
        self.kubectl("apply", "--server-side", "-f", "-", input=json.dumps(account))
        return name

    def token(self, namespace: str, service_account: str, *options: str) -> str:
        """A fresh token, as `kubectl create token OPTIONS` gives it."""
        return self.kubectl("-n", namespace, "create", "token", service_account, *options).strip()

    def kubeconfig_of(self, namespace: str, service_account: str) -> Path:
        """A kubeconfig that is a service account, not the administrator."""
        document = json.loads(self.kubeconfig.read_text())
        document["users"] = [{"name": "sa", "user": {"token": self.token(namespace, service_account)}}]
        document["contexts"][0]["context"]["user"] = "sa"
        path = self.state / f"{namespace}-{service_account}.kubeconfig"
        path.write_text(json.dumps(document))
        return path

    @contextmanager
    def without_api(self) -> Iterator[None]:
        """No API server, as after `kill -9`; it is started again, with the same data, when the block is left."""
        pid = self.restarted[-1].pid if self.restarted else self.process("kube-apiserver")
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        os.kill(pid, signal.SIGKILL)
        if self.restarted:
            self.restarted[-1].wait(60)
        try:
            yield
        except BaseException:
            self._start_again(argv[1:])
            self.wait_ready()  # a test that fails takes none of those after it along
            raise
        self._start_again(argv[1:])

    def _start_again(self, arguments: list[bytes]) -> None:
        with (self.state / "log" / "kube-apiserver.log").open("ab") as log:
            environment = _environment() | {"PATH": f"{self.bins}:{os.environ.get('PATH', '')}"}
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": self.state}
            command = [str(self.bins / "kube-apiserver").encode(), *arguments]
            self.restarted.append(subprocess.Popen(command, env=environment, **options))

    def wait_ready(self) -> None:
        """Returns when the API server says it is ready."""
        deadline = time.monotonic() + 180
        command = [str(self.bins / "kubectl"), f"--kubeconfig={self.kubeconfig}", "get", "--raw", "/readyz"]
        while subprocess.run(command, capture_output=True, timeout=60, env=_environment(), check=False).returncode:
            assert time.monotonic() < deadline, f"the API server is not ready; logs are in {self.state / 'log'}"
            time.sleep(0.1)

    def process(self, program: str) -> int:
        """The process id of one of the cluster's programs, such as `kube-apiserver`."""
        supervisor = int((self.state / "pid").read_text().split()[0])
        for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
            argv = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if Path(argv[0].decode()).name == program:
                return int(child)
        raise AssertionError(f"{program} does not run; logs are in {self.state / 'log'}")


@contextmanager
def running() -> Iterator[ApiServer]:
    """The API server; ends with the session, also when tests failed."""
    state = Path(tempfile.mkdtemp(prefix="mantle-api-"))
    environment = _environment() | {"MANTLE_E2E_STATE": str(state)}
    try:
        _tool(environment, "up", "--api-only", seconds=1800)  # the first time on a machine builds Kubernetes
        plan = json.loads((state / "conf" / "plan.json").read_text())
        server = ApiServer(state / "conf" / "admin.kubeconfig", plan["server"], state, Path(plan["bins"]))
        try:
            yield server
        finally:
            for process in server.restarted:
                process.kill()
                process.wait(60)
    finally:
        _tool(environment, "down", seconds=180)
        shutil.rmtree(state, ignore_errors=True)


def _tool(environment: dict[str, str], *args: str, seconds: float) -> None:
    """Runs tests/e2e/cluster. Its output goes to a file: the programs it leaves running would keep a pipe open."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(TOOL), *args], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            code = -1
        output.seek(0)
        assert code == 0, f"cluster {' '.join(args)} ended with {code}:\n{output.read().decode(errors='replace')}"


def _environment() -> dict[str, str]:
    """Ours, without what would send loopback through a proxy or name another cluster."""
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name != "KUBECONFIG"}
