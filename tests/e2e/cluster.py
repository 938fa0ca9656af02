#!/usr/bin/env python3
"""A real one-node Kubernetes for end-to-end tests, made of Debian packages and Go modules only.

    cluster up [--api-only] [--nftables]   start it; builds what is missing, installs Debian packages, prints times
    cluster down                           stop it and remove every trace (the cache of binaries and images stays)
    cluster status                         what runs, and how much memory it takes
    cluster env                            shell lines: eval "$(cluster env)" gives KUBECONFIG and a matching kubectl
    cluster load-image ARCHIVE...          load docker-save or OCI archives
    cluster node CMD...                    run a command inside the node (ctr -n k8s.io c ls, iptables-save, ip a)
    cluster stop NAME...                   kill components (kube-apiserver, kube-controller-manager) and keep them away
    cluster start NAME...                  start them again, as they were started first
    cluster build                          build what is missing of Kubernetes and Helm, and start nothing
    cluster helm                           where Helm is; builds it if it is missing

`up` gives etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, containerd, CNI and
CoreDNS. It needs root, and there is one on a machine. `up --api-only` gives etcd, kube-apiserver and
kube-controller-manager on loopback, as any user, on ports from the kernel: objects, webhooks, tokens, EndpointSlices
and RBAC are real, but no pod runs. Several can be up side by side, each with its own MANTLE_E2E_STATE directory.

How it leaves no trace: the node is a network namespace plus one process (PID 1 of a PID namespace) with mount and UTS
namespaces of its own. Kill that process and the kernel ends every container, mount, iptables rule and sysctl with it.
Left to `down` are the namespace's name, its veth pair, the cgroups under /mantle-e2e, and the state directory.
"""

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request

sys.dont_write_bytecode = True
from common import (
    AWAY,
    CACHE,
    CGROUP,
    CONF,
    HERE,
    HOST_IP,
    LINK,
    LOG,
    NETNS,
    NODE_IP,
    PKI,
    POD_CIDR,
    ROOT,
    STATE,
    SVC_CIDR,
    die,
    run,
    say,
)
from config import commands, write_config
from parts import PACKAGES, bin_dir, helm_bin, install_packages, without, write_pause

# What kubelet insists on writing to kernel-wide settings. Shown to it as already set, so the host's stay untouched.
FAKE_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}


def dead():
    """The component that ended by itself; empty if none did."""
    with contextlib.suppress(FileNotFoundError):
        return (STATE / "dead").read_text()
    return ""


def wait(what, probe, seconds):
    """Poll `probe` until it is true; watch for a component that ended meanwhile."""
    end = time.monotonic() + seconds
    while not probe():
        if name := dead():
            tail = (LOG / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
            die(f"{name} ended while waiting for {what}; the end of {LOG / name}.log:\n" + "\n".join(tail))
        if time.monotonic() > end:
            die(f"{what}: not after {seconds} s; logs are in {LOG}")
        time.sleep(0.1)


# ---- the supervisor: PID 1 of the node, or a plain process for --api-only -------------------------------------------


def api_ready(plan):
    context = ssl.create_default_context(cafile=PKI / "ca.crt")
    context.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")
    with contextlib.suppress(OSError, http.client.HTTPException):
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        return opener.open(plan["server"] + "/readyz", timeout=10).status == 200
    return False


def enter_node():
    """Make the inside of the node: runs as PID 1, in namespaces of its own."""

    def mount(*a):
        return run("mount", *a)

    mount("--make-rshared", "/")  # kubelet wants its root shared; outside this namespace nothing is
    for d in ("/run", "/var/log"):
        mount("-t", "tmpfs", "tmpfs", d)
    os.makedirs("/run/netns")
    os.makedirs("/run/lock")
    for name, value in FAKE_SYSCTLS.items():
        f = CONF / ("sysctl-" + name.replace("/", "-"))
        f.write_text(f"{value}\n")
        mount("--bind", f, f"/proc/sys/{name}")
    socket.sethostname("node")
    for name in ("net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet"):
        pathlib.Path("/proc/sys", name).write_text("1")


def supervise():
    plan = json.loads((CONF / "plan.json").read_text())
    if not plan["api_only"]:
        enter_node()
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env.update(PATH=f"{plan['bins']}:{env['PATH']}", GOGC="100")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started, known = {}, {}
    AWAY.mkdir(exist_ok=True)

    def launch(name):
        with open(LOG / f"{name}.log", "ab") as log:
            p = subprocess.Popen(known[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=STATE, env=env)
        p.returncode = 0  # reaped by us, with the orphans of PID 1
        started[p.pid] = name

    def reap():
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid in started and not (AWAY / (name := started.pop(pid))).exists():
                    (STATE / "dead").write_text(name)

    for name, argv in commands(plan):
        if name is None:
            while not api_ready(plan):
                reap()
                time.sleep(0.1)
            if not plan["api_only"]:
                while subprocess.run(
                    ["ctr", "-n", "k8s.io", "images", "import", f"{STATE}/pause.tar"], capture_output=True
                ).returncode:
                    time.sleep(0.1)
            continue
        known[name] = argv
        launch(name)
    while True:  # a file in AWAY keeps the component of that name away, and says when it has ended
        for pid, name in started.items():
            if (AWAY / name).exists():
                os.kill(pid, signal.SIGKILL)
        reap()
        for name in known.keys() - started.values() - {dead()}:
            try:
                with open(AWAY / name, "r+") as file:
                    file.write("ended")
            except FileNotFoundError:
                launch(name)
        time.sleep(0.2)


# ---- up, down and the rest ------------------------------------------------------------------------------------------


def alive():
    """PID of the supervisor, or None. The start time guards against a PID used again by another process."""
    with contextlib.suppress(OSError, ValueError):
        pid, started = (STATE / "pid").read_text().split()
        if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] == started:
            return int(pid)
    return None


def kubectl(*argv, **kw):
    plan = json.loads((CONF / "plan.json").read_text())
    return run(f"{plan['bins']}/kubectl", f"--kubeconfig={CONF}/admin.kubeconfig", *argv, **kw)


def node_argv(*argv):
    pid = alive() or die("the cluster is not up")
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        init = f.read().split()[0]
    return ["nsenter", "--target", init, "--mount", "--pid", "--net", "--uts", *map(str, argv)]


def up(args):
    if alive() and (STATE / "ready").exists() and not dead():
        if json.loads((CONF / "plan.json").read_text())["api_only"] == args.api_only:
            return say("already up")
        die("it is up in the other mode; `cluster down` first")
    if not args.api_only and not ROOT:
        die("pods need root; as another user, only `up --api-only` works")
    down(args, quiet=True)  # what a crash or a failed start may have left
    install_packages({"openssl"} if args.api_only else set(PACKAGES))
    bins = bin_dir()
    begin = time.monotonic()
    plan = write_config(args.api_only, args.nftables, bins)
    argv = [sys.executable, __file__, "_supervise"]
    if not args.api_only:
        write_pause(STATE / "pause.tar", bins / "pause")
        for d in cgroup_dirs():
            d.mkdir(exist_ok=True)

        def ns(*a):
            return run("ip", "-n", NETNS, *a)

        run("ip", "netns", "add", NETNS)
        run("ip", "link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NETNS)
        run("ip", "address", "add", f"{HOST_IP}/30", "dev", LINK)
        run("ip", "link", "set", LINK, "up")
        ns("link", "set", "lo", "up")
        ns("address", "add", f"{NODE_IP}/30", "dev", "eth0")
        ns("link", "set", "eth0", "up")
        ns("route", "add", "unreachable", "default")  # nothing leaves: outside names and addresses fail at once
        for cidr in (POD_CIDR, SVC_CIDR):  # the host reaches pods and services
            run("ip", "route", "add", cidr, "via", NODE_IP, "dev", LINK)
        argv = [
            "nsenter",
            f"--net=/run/netns/{NETNS}",
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--uts",
            "--mount-proc",
            "--propagation",
            "private",
            *argv,
        ]
    with open(LOG / "supervisor.log", "ab") as log:
        p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=STATE)
    stat = pathlib.Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split()
    (STATE / "pid").write_text(f"{p.pid} {stat[19]}")

    def supervised(probe):
        if p.poll() is not None:
            die("the supervisor ended:\n" + (LOG / "supervisor.log").read_text(errors="replace")[-3000:])
        return probe()

    def took():
        return f"{time.monotonic() - begin:.1f} s after the start"

    wait("the API server", lambda: supervised(lambda: api_ready(plan)), 300)
    say(f"API ready, {took()}")
    wait(
        "the default service account",
        lambda: kubectl("get", "-n", "default", "sa", "default", "-o", "name", check=False).startswith(
            "serviceaccount/"
        ),
        300,
    )
    if not args.api_only:
        kubectl("apply", "-f", "-", input=(HERE / "coredns.yaml").read_text().replace("@BIN@", str(bins)))
        ready = '{.status.conditions[?(@.type=="Ready")].status}'
        wait("the node", lambda: kubectl("get", "node", "node", "-o", f"jsonpath={ready}", check=False) == "True", 300)
        say(f"node Ready, {took()}")
        wait(
            "CoreDNS",
            lambda: (
                kubectl(
                    "-n",
                    "kube-system",
                    "get",
                    "deploy",
                    "coredns",
                    "-o",
                    "jsonpath={.status.readyReplicas}",
                    check=False,
                )
                == "1"
            ),
            300,
        )
    (STATE / "ready").touch()
    say(f'up, {took()}; now: eval "$({pathlib.Path(__file__).name} env)"')
    return None


def stop(args):
    for name in args.rest:
        if name not in dict(commands(json.loads((CONF / "plan.json").read_text()))):
            die(f"{name} is no component of this cluster")
        (AWAY / name).touch()
    wait("the end of " + " and ".join(args.rest), lambda: all((AWAY / n).read_text() for n in args.rest), 60)


def start(args):
    """Returns when the API server answers; when the others do is theirs to say."""
    for name in args.rest:
        (AWAY / name).unlink(missing_ok=True)
    plan = json.loads((CONF / "plan.json").read_text())
    wait("the API server", lambda: api_ready(plan), 120)


def cgroup_dirs():
    roots = [pathlib.Path(l.split()[1]) for l in open("/proc/mounts") if l.split()[2] in ("cgroup", "cgroup2")]
    return [r / CGROUP for r in dict.fromkeys(roots)]


def down(args, quiet=False):
    plan = CONF / "plan.json"
    api_only = json.loads(plan.read_text())["api_only"] if plan.exists() else getattr(args, "api_only", False)
    if pid := alive():
        os.killpg(pid, signal.SIGKILL)  # PID 1 of the node dies with it, and so every process in the node
        for _ in range(600):
            if zombie(pid):
                break
            time.sleep(0.1)
        else:
            die(f"process {pid} does not end")
    if ROOT and not api_only and (plan.exists() or "MANTLE_E2E_STATE" not in os.environ):
        if os.path.exists(f"/run/netns/{NETNS}"):
            run("ip", "netns", "delete", NETNS)
        run("ip", "link", "delete", LINK, check=False)
        for top in cgroup_dirs():
            for d in [*sorted(top.rglob("*/"), key=lambda d: -len(d.parts)), top] if top.exists() else []:
                for _ in range(300):  # processes that just died still hold their cgroup for a moment
                    with contextlib.suppress(FileNotFoundError, OSError):
                        d.rmdir()
                    if not d.exists():
                        break
                    time.sleep(0.1)
                else:
                    die(f"cannot remove cgroup {d}; processes in it: {(d / 'cgroup.procs').read_text().split()}")
    for _ in range(300):
        shutil.rmtree(STATE, ignore_errors=True)
        if not STATE.exists():
            break
        time.sleep(0.1)
    else:
        die(f"cannot remove {STATE}")
    if not quiet:
        say("down; no trace left but the cache in " + str(CACHE))


def zombie(pid):
    """Whether the process has ended, be it that its parent (or we) did not collect it yet."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def status(args):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    pid = alive()
    if not pid:
        print("down")
        sys.exit(3)
    print(f"up (pid {pid}), logs in {LOG}" + (f"; ENDED: {dead()}" if dead() else ""))
    ours, total = {pid}, 0
    table = {int(p.name): p for p in pathlib.Path("/proc").iterdir() if p.name.isdigit()}
    for n, p in sorted(table.items()):
        with contextlib.suppress(OSError, IndexError):
            fields = dict(l.split(":\t", 1) for l in (p / "status").read_text().splitlines() if ":\t" in l)
            if n in ours or int(fields["PPid"]) in ours:
                ours.add(n)
                pss = (
                    int((p / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) / 1024
                )  # shared pages divided
                total += pss
                argv = (p / "cmdline").read_bytes().decode(errors="replace").split("\0")
                print(f"{n:8} {pss:8.1f} MiB  {' '.join(argv)[:90]}")
    print(f"{'total':>8} {total:8.1f} MiB")


def env(args):
    plan = json.loads((CONF / "plan.json").read_text()) if alive() else die("the cluster is not up")
    print(
        f'export KUBECONFIG={CONF}/admin.kubeconfig\nexport PATH={plan["bins"]}:"$PATH"\n'
        f"export MANTLE_E2E_SERVER={plan['server']}"
    )


def load(*archives):
    """Streams archives into the runtime, without what it has."""
    for a in archives:
        known = set(run(*node_argv("ctr", "-n", "k8s.io", "content", "ls", "-q")).replace("sha256:", "").split())
        argv = node_argv("ctr", "-n", "k8s.io", "images", "import", "-")
        p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with p.stdin:
            without(a, known, p.stdin)
        said = p.stdout.read().decode(errors="replace")
        if p.wait():
            die(f"{a} cannot be loaded: {said.strip()[-1000:]}")
        say(f"{a} loaded")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("up", "down", "status", "env", "load-image", "node", "stop", "start", "build", "helm"):
        s = sub.add_parser(name)
        if name == "up":
            s.add_argument(
                "--api-only", action="store_true", help="etcd, kube-apiserver, kube-controller-manager; no root"
            )
            s.add_argument("--nftables", action="store_true", help="kube-proxy in nftables mode (default: iptables)")
        elif name in ("load-image", "node", "stop", "start"):
            s.add_argument("rest", nargs=argparse.REMAINDER)
    if sys.argv[1:] == ["_supervise"]:
        return supervise()
    args = parser.parse_args()
    if args.command == "load-image":
        return load(*args.rest)
    if args.command == "node":
        os.execvp("nsenter", node_argv(*args.rest))
    if args.command == "build":
        return say(f"{bin_dir()}, {helm_bin()}")
    if args.command == "helm":
        return print(helm_bin())
    if args.command == "down" or (args.command == "up" and not args.api_only):  # one at a time; ends with this process
        CACHE.mkdir(parents=True, exist_ok=True)
        lock = open(CACHE / "cluster.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    {"up": up, "down": down, "status": status, "env": env, "stop": stop, "start": start}[args.command](args)
    return None


if __name__ == "__main__":
    main()
