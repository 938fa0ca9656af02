"""Where things are, how the node is addressed, and how this tool speaks. Knows nothing of Kubernetes."""

import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = os.geteuid() == 0
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mantle-e2e"
STATE = pathlib.Path(os.environ.get("MANTLE_E2E_STATE") or ("/var/lib/mantle-e2e" if ROOT else CACHE / "state"))
PKI, LOG, CONF, AWAY = STATE / "pki", STATE / "log", STATE / "conf", STATE / "away"
VERSION = "1.33.13"  # keep in step with kube/go.mod
HELM_VERSION = "3.18.6"
COMPONENTS = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
    "kubectl",
]
NETNS = LINK = "mantle-e2e"  # LINK: the host's end of the veth pair; at most 15 characters
CGROUP = "mantle-e2e"
HOST_IP, NODE_IP = "10.86.0.1", "10.86.0.2"  # the host's and the node's end of the veth pair
POD_CIDR, SVC_CIDR, API_VIP, DNS_IP = "10.244.0.0/24", "10.96.0.0/16", "10.96.0.1", "10.96.0.10"
CRI = "/run/containerd/containerd.sock"  # inside the node's own /run
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:6.1f}s] {text}", file=sys.stderr, flush=True)


def die(text):
    sys.exit(f"cluster: {text}")


def run(*argv, check=True, **kw):
    """Run a command; on failure stop with its own words."""
    p = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    if check and p.returncode:
        die(f"`{' '.join(map(str, argv))}` failed ({p.returncode}):\n{p.stdout.strip()[-3000:]}")
    return p.stdout
