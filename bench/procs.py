"""Processes of a benchmark run: pinned, accounted for, and ended by id; the private network namespace they run in."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

TICK = os.sysconf("SC_CLK_TCK")
BACKEND = {"h1": 18080, "h2": 18082, "tcp": 18083}

# --- who runs where -------------------------------------------------------------------------------------
LAYOUTS = {
    # two "machines" of one core: client + its sidecar, server + its sidecar
    "nodes": {"client": {0}, "out": {0}, "in": {1}, "backend": {1}, "aux": {0, 1}},
    # the pair alone on a core: throughput = 1 / (CPU the pair needs)
    "split": {"client": {0}, "out": {1}, "in": {1}, "backend": {0}, "aux": {1}},
    # the scheduler decides
    "free": {r: {0, 1} for r in ("client", "out", "in", "backend", "aux")},
}

children = []  # Popen objects we started and have not ended

# --- topology netns: a private network namespace, for proxies that need a redirect ----------------------
# Everything, the rig too, moves into a fresh namespace that has only `lo`, so every hop of every variant is
# a loopback hop, as before, and every connection is tracked, whoever needs it.  A variant with `transparent`
# gets an address of its own on lo (SERVICE_NET + slot): what anyone sends there is redirected to its
# outbound proxy, and what its outbound proxy sends to a server's port there, to its inbound proxy.
SERVICE_NET, UID = "10.223.0.", {"out": 2102, "in": 2103}


def enter_netns():
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
        sys.exit(f"--topology netns: {os.strerror(ctypes.get_errno())} (needs root)")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    nft("add table ip bench", "add chain ip bench out { type nat hook output priority -100; }")


def nft(*lines):
    subprocess.run(["nft", "-f", "-"], check=True, input="\n".join(lines).encode())


def redirect(ip, out_port, in_port):
    subprocess.run(["ip", "addr", "replace", f"{ip}/32", "dev", "lo"], check=True)
    to = f"add rule ip bench out ip daddr {ip} meta skuid"
    nft(
        f"{to} {UID['in']} return",
        f"{to} {UID['out']} tcp dport {{ {', '.join(map(str, BACKEND.values()))} }} "
        + (f"redirect to :{in_port}" if in_port else "return"),
        f"{to} != {UID['out']} ip protocol tcp redirect to :{out_port}",
    )


def spawn(cmd, cpus, log, env=None, cwd=None, uid=None):
    def pre():
        os.sched_setaffinity(0, cpus)
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    who = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    p = subprocess.Popen(
        cmd,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=pre,
        start_new_session=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        **who,
    )
    children.append(p)
    return p


def end(procs, grace=3.0):
    """End processes we started, and their children, by id."""
    pids = [q for p in procs for q in tree(p.pid)]
    for p in procs:
        if p.poll() is None:
            p.terminate()
    t = time.monotonic() + grace
    for p in procs:
        try:
            p.wait(max(0.05, t - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
        if p in children:
            children.remove(p)
    for q in pids:  # grandchildren that outlived their parent
        if os.path.exists(f"/proc/{q}") and q not in [p.pid for p in procs]:
            try:
                os.kill(q, signal.SIGTERM)
            except OSError:
                pass


# --- reading /proc --------------------------------------------------------------------------------------
def tree(pid):
    out = [pid]
    try:
        for t in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{t}/children") as f:
                for c in f.read().split():
                    out += tree(int(c))
    except OSError:
        pass
    return out


def cpu_of(procs):
    """(user, system) CPU seconds of these processes and their children."""
    u = s = 0
    for p in procs:
        for pid in tree(p.pid):
            try:
                with open(f"/proc/{pid}/stat") as f:
                    v = f.read().rsplit(")", 1)[1].split()
                u += int(v[11])
                s += int(v[12])
            except OSError:
                pass
    return u / TICK, s / TICK


def mem_of(procs):
    """KiB: resident, resident anonymous, peak resident, proportional."""
    tot = {"rss": 0, "anon": 0, "hwm": 0, "pss": 0, "threads": 0}
    keys = {"VmRSS": "rss", "RssAnon": "anon", "VmHWM": "hwm", "Threads": "threads"}
    for p in procs:
        for pid in tree(p.pid):
            try:
                with open(f"/proc/{pid}/status") as f:
                    for line in f:
                        k, _, v = line.partition(":")
                        if k in keys:
                            tot[keys[k]] += int(v.split()[0])
                with open(f"/proc/{pid}/smaps_rollup") as f:
                    for line in f:
                        if line.startswith("Pss:"):
                            tot["pss"] += int(line.split()[1])
            except OSError:
                pass
    return tot


def machine():
    """(busy seconds over all CPUs, steal seconds)."""
    with open("/proc/stat") as f:
        v = list(map(int, f.readline().split()[1:9]))
    return (sum(v) - v[3] - v[4]) / TICK, v[7] / TICK


def quiet(limit, share=0.08, window=0.25):
    """Wait, at most `limit` seconds, for the rest of the machine to be idle."""
    t_end = time.monotonic() + limit
    while True:
        b0, t0 = machine()[0], time.monotonic()
        time.sleep(window)
        load = (machine()[0] - b0) / (time.monotonic() - t0) / os.cpu_count()
        if load < share or time.monotonic() > t_end:
            return load
