"""One sample: a load generator against a running variant, with everybody's CPU time taken before and after."""

import json
import math
import os
import re
import resource
import socket
import statistics
import subprocess
import time

from pairs import Running
from procs import BACKEND, children, cpu_of, end, machine, mem_of, quiet, spawn


def run_client(cmd, cpus, limit):
    """Run a load generator; (stdout, CPU seconds)."""
    p = spawn(cmd, cpus, subprocess.PIPE)
    try:
        out, _ = p.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        p.kill()
        out, _ = p.communicate()
    children.remove(p)
    return out.decode(errors="replace"), p.returncode


def to_us(s):
    n, u = re.fullmatch(r"([\d.]+)(us|ms|s)", s.strip()).groups()
    return float(n) * {"us": 1, "ms": 1e3, "s": 1e6}[u]


def parse_wrk(t):
    r = {
        "requests": int(re.search(r"(\d+) requests in", t)[1]),
        "rps": float(re.search(r"Requests/sec:\s+([\d.]+)", t)[1]),
    }
    for p, k in (("50", "p50_us"), ("99", "p99_us")):
        m = re.search(rf"^\s+{p}%\s+(\S+)", t, re.M)
        if m:
            r[k] = to_us(m[1])
    m = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", t)
    r["errors"] = sum(map(int, m.groups())) if m else 0
    m = re.search(r"Non-2xx or 3xx responses: (\d+)", t)
    r["errors"] += int(m[1]) if m else 0
    return r


def parse_h2load(t):
    m = re.search(r"requests: (\d+) total, (\d+) started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", t)
    ok = int(re.search(r"status codes: (\d+) 2xx", t)[1])
    return {
        "requests": int(m[3]),
        "rps": float(re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", t)[1]),
        "mean_us": to_us(re.search(r"time for request:\s+\S+\s+\S+\s+(\S+)", t)[1]),
        "errors": int(m[3]) - ok,
    }


def parse_olload(t):
    j = json.loads(t[t.index("{") :])
    r = {"requests": j["done"], "rps": j["achieved_rps"], "errors": j["bad"] + j["unfinished"]}
    r.update({f"{k}_us": v for k, v in j["latency_us"].items()})
    r.update({f"svc_{k}_us": v for k, v in j["service_us"].items()})
    return r


def wrk(v, o, conns, close=False, secs=None):
    c = v.client["h1"]
    cmd = ["wrk", "-t1", f"-c{conns}", f"-d{math.ceil(secs or o.secs)}s", "--latency"]  # whole seconds only
    cmd += ["-H", f"Host: {c['host']}"] if c["host"] else []
    cmd += ["-H", "Connection: close"] if close else []
    return cmd + [f"http://{c['ip']}:{c['port']}{c['path']}"], parse_wrk


def olload(v, o, lane, rate):
    c = v.client[lane]
    cmd = [f"{v.ctx.bin}/olload"] + (["-2", "-c", "4"] if lane == "h2" else ["-c", "16"])
    cmd += ["-r", str(rate), "-w", "0.5", "-d", f"{o.secs - 0.5:g}"] + (["-H", c["host"]] if c["host"] else [])
    cmd += ["-a", c["ip"]]
    return cmd + [str(c["port"]), c["path"]], parse_olload


def h2load(v, o):
    c = v.client["h2"]
    cmd = ["h2load", "-t1", "-c4", "-m8", "-D", f"{o.secs * 1000:.0f}ms"]
    cmd += ["-H", f":authority: {c['host']}"] if c["host"] else []
    return cmd + [f"http://{c['ip']}:{c['port']}{c['path']}"], parse_h2load


def iperf(v, o):
    def parse(t):
        j = json.loads(t)
        e = j["end"]
        return {
            "gbps": e["sum_received"]["bits_per_second"] / 1e9,
            "gbytes": e["sum_received"]["bytes"] / 1e9,
            "errors": 0,
        }

    c = v.client["tcp"]
    return ["iperf3", "-4", "-c", c["ip"], "-p", str(c["port"]), "-t", f"{o.secs:g}", "-J"], parse


# name -> (lane, how, headline metric, unit, larger is better)
TESTS = {
    "h1_max": ("h1", lambda v, o: wrk(v, o, 32), "rps", "req/s", True),
    "h1_c1": ("h1", lambda v, o: wrk(v, o, 1, secs=min(o.secs, 2)), "p50_us", "us", False),
    "h1_rate": ("h1", lambda v, o: olload(v, o, "h1", o.rate), "p50_us", "us", False),
    "h1_rate_hi": ("h1", lambda v, o: olload(v, o, "h1", o.rate_hi), "p50_us", "us", False),
    "h2_max": ("h2", h2load, "rps", "req/s", True),
    "h2_rate": ("h2", lambda v, o: olload(v, o, "h2", o.rate), "p50_us", "us", False),
    "h2_rate_hi": ("h2", lambda v, o: olload(v, o, "h2", o.rate_hi), "p50_us", "us", False),
    "newconn": ("h1", lambda v, o: wrk(v, o, 16, close=True), "rps", "conn/s", True),
    "tcp": ("tcp", iperf, "gbps", "Gbit/s", True),
}


def sample(v, test, o, backends):
    lane, how, *_ = TESTS[test]
    cmd, parse = how(v, o)
    ctx = v.ctx
    waited = quiet(o.quiet_wait)
    b = dict(backends)
    if lane == "tcp":  # a fresh one-shot server each time
        b["tcp"] = spawn(
            ["iperf3", "-4", "-s", "-1", "-B", ctx.bind, "-p", str(BACKEND["tcp"])],
            ctx.layout["backend"],
            subprocess.DEVNULL,
        )
        t_up = time.monotonic() + 3
        while time.monotonic() < t_up:  # no probe connection: it would use up the one shot
            with open("/proc/net/tcp") as f:
                if any(
                    line.split()[1].endswith(":%04X" % BACKEND["tcp"]) and line.split()[3] == "0A"
                    for line in f.readlines()[1:]
                ):
                    break
            time.sleep(0.02)
    groups = {"out": v.procs["out"], "in": v.procs["in"], "aux": v.procs["aux"], "backend": [b[lane]]}
    before = {g: cpu_of(p) for g, p in groups.items()}
    ru0, self0 = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    busy0, steal0, t0 = *machine(), time.monotonic()
    text, rc = run_client(cmd, ctx.layout["client"], o.secs + 12)
    if lane == "tcp":  # gone before the books are closed: its CPU is then in RUSAGE_CHILDREN
        try:
            b["tcp"].wait(1)
        except subprocess.TimeoutExpired:
            pass
        end([b["tcp"]], 1)
        groups["backend"] = []
    wall = time.monotonic() - t0
    busy1, steal1 = machine()
    ru1 = resource.getrusage(resource.RUSAGE_CHILDREN)
    after = {g: cpu_of(p) for g, p in groups.items()}
    client = ru1.ru_utime + ru1.ru_stime - ru0.ru_utime - ru0.ru_stime
    try:
        r = parse(text)
    except Exception:
        return {"error": (text[-400:] or "no output") + f" (exit {rc})"}
    d = {g: (after[g][0] - before[g][0], after[g][1] - before[g][1]) for g in groups if groups[g]}
    ours = sum(map(sum, d.values())) + client + time.process_time() - self0
    cpu = {g: round(sum(d.get(g, (0, 0))), 3) for g in ("out", "in", "aux", "backend")}
    cpu["client"] = round(client, 3)  # tcp: client and server
    pu, ps = (sum(d[g][i] for g in ("out", "in") if g in d) for i in (0, 1))
    r.update(
        {
            "wall": round(wall, 3),
            "cpu": cpu,
            "proxy_sys_share": round(ps / (pu + ps), 3) if pu + ps else None,
            "idle": round(1 - (busy1 - busy0) / wall / os.cpu_count(), 4),
            "steal": round((steal1 - steal0) / wall / os.cpu_count(), 4),
            "load_before": round(waited, 3),
            "interference": round(max(0.0, busy1 - busy0 - ours) / wall / os.cpu_count(), 4),
        }
    )
    n = r.get("requests")
    if n:
        for g in ("out", "in", "backend", "client", "aux"):
            r[f"cpu_{g}_per_1e5"] = round(cpu[g] / n * 1e5, 3)
        r["cpu_pair_per_1e5"] = round((cpu["out"] + cpu["in"]) / n * 1e5, 3)
    elif r.get("gbytes"):
        for g in ("out", "in"):
            r[f"cpu_{g}_per_gb"] = round(cpu[g] / r["gbytes"], 3)
        r["cpu_pair_per_gb"] = round((cpu["out"] + cpu["in"]) / r["gbytes"], 3)
    if test in ("h1_max", "h2_max"):
        r["mem_kib"] = {g: mem_of(v.procs[g]) for g in ("out", "in")}
    if not v.alive():
        r["error"] = "a process of the variant died"
    return r


def idle_memory(ctx, name, spec, slot, n=1000):
    """Fresh pair: resident memory at rest, then with n idle client connections that each did one request."""
    if not spec["procs"] or "h1" not in spec["lanes"]:
        return None
    v = Running(ctx, name, spec, slot)
    socks = []
    try:
        time.sleep(1.0)
        res = {"idle": {g: mem_of(v.procs[g]) for g in ("out", "in")}}
        c = v.client["h1"]
        req = f"GET {c['path']} HTTP/1.1\r\nHost: {c['host'] or '127.0.0.1'}\r\n\r\n".encode()
        ok, t0 = 0, time.monotonic()
        for i in range(0, n, 50):
            batch = [socket.create_connection((c["ip"], c["port"]), 5) for _ in range(min(50, n - i))]
            socks += batch
            for s in batch:
                s.sendall(req)
            for s in batch:
                s.settimeout(10)
                ok += s.recv(4096).startswith(b"HTTP/1.1 200")
        res["setup_s"] = round(time.monotonic() - t0, 2)
        time.sleep(1.0)
        res["conns"], res["ok"] = n, ok
        res["with_conns"] = {g: mem_of(v.procs[g]) for g in ("out", "in")}
        c0 = {g: sum(cpu_of(v.procs[g])) for g in ("out", "in")}
        time.sleep(2.0)
        res["idle_cpu_share"] = {g: round((sum(cpu_of(v.procs[g])) - c0[g]) / 2.0, 4) for g in ("out", "in")}
        return res
    finally:
        for s in socks:
            s.close()
        v.stop()


# --- physical limits ------------------------------------------------------------------------------------
def stats3(v):
    v = [x for x in v if x is not None]
    return {"median": statistics.median(v), "min": min(v), "max": max(v), "n": len(v)} if v else None


def limits(o):
    r = {}

    def speed(*a):
        out = subprocess.run(
            ["taskset", "-c", "1", "openssl", "speed", "-mr", "-seconds", "1", *a],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        return out

    quiet(o.quiet_wait)
    for alg in ("aes-128-gcm", "chacha20-poly1305"):
        for size in (1024, 16384):
            best = []
            for _ in range(o.rounds):
                m = re.search(r"^\+F:\d+:[^:]+:([\d.]+)", speed("-bytes", str(size), "-evp", alg), re.M)
                if m:
                    best.append(float(m[1]) / 1e9)
            r[f"{alg} {size} B, GB/s"] = stats3(best)
    for alg, tag in (("ecdsap256", "+F4"), ("ecdhx25519", "+F5")):
        sign, ver = [], []
        for _ in range(o.rounds):
            m = re.search(re.escape(tag) + r":\d+:\d+:(.*)", speed(alg))
            if m:
                f = [float(x) for x in m[1].split(":")]
                # seconds per operation or operations per second, by release: make them operations/s
                f = [1 / x if x < 1 else x for x in f if x > 0]
                sign.append(f[0])
                ver.append(f[1] if len(f) > 1 else f[0])
        if alg == "ecdsap256":
            r["ECDSA P-256 sign, /s"], r["ECDSA P-256 verify, /s"] = stats3(sign), stats3(ver)
        else:
            r["X25519 derive, /s"] = stats3(sign)
    for label, cc, sc in (
        ("iperf3 loopback 1 stream, two cores, Gbit/s", "0", "1"),
        ("iperf3 loopback 1 stream, one core, Gbit/s", "0", "0"),
    ):
        vals = []
        for _ in range(o.rounds):
            quiet(o.quiet_wait)
            s = spawn(
                ["taskset", "-c", sc, "iperf3", "-4", "-s", "-1", "-B", "127.0.0.1", "-p", "18089"],
                {0, 1},
                subprocess.DEVNULL,
            )
            time.sleep(0.3)
            t, _ = run_client(
                ["taskset", "-c", cc, "iperf3", "-4", "-c", "127.0.0.1", "-p", "18089", "-t", "2", "-J"], {0, 1}, 15
            )
            end([s])
            try:
                vals.append(json.loads(t)["end"]["sum_received"]["bits_per_second"] / 1e9)
            except (ValueError, KeyError):
                pass
        r[label] = stats3(vals)
    return r
