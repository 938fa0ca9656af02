#!/usr/bin/env python3
"""Side-by-side benchmark of sidecar pairs on one small machine.

    client -> outbound proxy -> (mutual TLS 1.3) -> inbound proxy -> server

    rig.py run --quick                     under 10 minutes, main variants
    rig.py run --full                      all variants, longer samples, more rounds
    rig.py run --variants direct,envoy-h2 --tests h1_max,h1_rate --rounds 3 --secs 3
    rig.py run --topology netns --variants direct,relay-plain,haproxy-h2,mantle      needs root; ours is transparent
    rig.py list
    rig.py report results.json [...]

See README.md. Standard library only (mantle's own control plane apart); loopback only; ends only what it started.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import certs as certs_mod
import variants as variants_mod
from load import TESTS, idle_memory, limits, sample
from pairs import HERE, Ctx, Running, start_backends
from procs import LAYOUTS, children, end, enter_netns
from report import fmt, markdown, summarise

BASES = "direct,relay-plain,haproxy-h2,envoy-h2"
WORK = "/var/tmp/mantle-bench"  # not in a home: the proxies run as other users


def unmet(spec, o):
    """What this variant lacks to run here."""
    lack = [f"${n}" for n in spec.get("needs", []) if not os.environ.get(n)]
    lack += ["--topology netns"] if spec.get("transparent") and o.topology != "netns" else []
    return ", ".join(lack)


def cmd_run(o):
    every = dict(variants_mod.VARIANTS)
    for f in o.extra or []:
        with open(f) as h:
            every.update(json.load(h))
    if o.variants:
        names = o.variants.split(",")
    else:
        names = [n for n, s in every.items() if (o.full or s.get("quick", True)) and not unmet(s, o)]
    tests = o.tests.split(",") if o.tests else [t for t in TESTS if o.full or not t.endswith("_hi")]
    bases = [b for b in o.base.split(",") if b in names]
    for n in names:
        if why := unmet(every[n], o):
            sys.exit(f"{n} needs {why}")
    if o.topology == "netns":
        enter_netns()
    ctx = Ctx(o)
    os.makedirs(ctx.bin, exist_ok=True)
    certs_mod.make(ctx.certs)
    for c in ("olload", "crelay"):
        subprocess.run(["cc", "-O2", "-o", f"{ctx.bin}/{c}", f"{HERE}/{c}.c", "-lm"], check=True)
    with open("/proc/cpuinfo") as f:
        cpu = re.search(r"model name\s*: (.*)", f.read())[1]
    res = {
        "meta": {
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "cpu": cpu,
            "cpus": os.cpu_count(),
            "kernel": os.uname().release,
            "layout": o.layout,
            "topology": o.topology,
            "rounds": o.rounds,
            "secs": o.secs,
            "rate": o.rate,
            "rate_hi": o.rate_hi,
            "variants": names,
            "tests": tests,
            "bases": bases,
            "labels": {n: every[n].get("label", "") for n in names},
            "noise_limit": o.noise,
            "versions": versions(ctx),
        },
        "samples": [],
        "memory": {},
        "verify": {},
    }
    t_start = time.monotonic()

    def say(*a):
        print(f"[{time.monotonic() - t_start:6.1f}]", *a, flush=True)

    def save():
        if res["samples"]:
            summarise(res)
            os.makedirs(os.path.dirname(os.path.abspath(o.out)), exist_ok=True)
            with open(o.out + ".json", "w") as f:
                json.dump(res, f, indent=1)
            with open(o.out + ".md", "w") as f:
                f.write(markdown(res))

    running, retries = {}, 0
    try:
        if o.limits:
            say("physical limits")
            res["limits"] = limits(o)
        backends = start_backends(ctx)
        if o.memory:
            for i, n in enumerate(names):
                if every[n].get("only"):
                    continue
                try:
                    res["memory"][n] = idle_memory(ctx, n, every[n], i)
                except (RuntimeError, OSError) as e:
                    say("memory", n, "FAILED", e)
                    continue
                if res["memory"][n]:
                    e = res["memory"][n]
                    say(
                        "memory",
                        n,
                        {g: (e["idle"][g]["rss"], e["with_conns"][g]["rss"]) for g in ("out", "in")},
                        "ok",
                        e["ok"],
                    )
        for i, n in enumerate(names):
            try:
                running[n] = Running(ctx, n, every[n], i + 40)
            except (RuntimeError, OSError) as e:
                say("LEFT OUT:", e)
                res["meta"].setdefault("left_out", {})[n] = str(e)
                continue
            res["verify"][n] = running[n].verify()
            bad = {k: x for k, x in res["verify"][n].items() if not (x == "ok" or (isinstance(x, dict) and x["ok"]))}
            say("started", n, "VERIFY FAILED " + str(bad) if bad else "verified")
        for rnd in range(o.rounds):
            for t in tests:
                order = names if rnd % 2 == 0 else names[::-1]  # A B C, C B A, ...: cancels drift
                for n in order:
                    if n not in running:
                        continue
                    v = running[n]
                    if TESTS[t][0] not in v.spec["lanes"] or ("only" in v.spec and t not in v.spec["only"]):
                        continue
                    best = None
                    if time.monotonic() - t_start > o.budget:
                        o.quiet_wait = 0.3
                    for attempt in range(1 + o.retries):
                        r = sample(v, t, o, backends)
                        if (
                            best is None
                            or (r.get("interference") or 0) < (best.get("interference") or 0)
                            or "error" in best
                        ):
                            best = r
                        if (
                            "error" not in r
                            and (r["interference"] or 0) <= o.noise
                            and r["steal"] <= o.noise
                            and r["load_before"] < 0.2
                        ):
                            break
                        if time.monotonic() - t_start > o.budget:
                            break
                        retries += attempt < o.retries
                    res["samples"].append({"variant": n, "test": t, "round": rnd, "r": best})
                    k = TESTS[t][2]
                    say(
                        f"r{rnd} {t:10} {n:18}",
                        best.get("error", "")[:200]
                        or f"{k} {fmt(best[k])} p99 {fmt(best.get('p99_us'))} cpu {best['cpu']} "
                        f"idle {best['idle']} noise {best['interference']} err {best['errors']}",
                    )
            res["meta"]["retries"] = retries
            save()
        res["meta"]["took_s"] = round(time.monotonic() - t_start)
    finally:
        for v in running.values():
            v.stop()
        end(list(children))
        save()
    say("wrote", o.out + ".json", o.out + ".md")


def versions(ctx):
    r = {}
    for k, c in {
        "envoy": [ctx.tools["envoy"], "--version"],
        "haproxy": [ctx.tools["haproxy"], "-v"],
        "nginx": ["nginx", "-v"],
        "wrk": ["wrk", "-v"],
        "h2load": ["h2load", "--version"],
        "iperf3": ["iperf3", "-v"],
        "openssl": ["openssl", "version"],
        "python": [ctx.tools["python"], "-VV"],
    }.items():
        try:
            p = subprocess.run(c, capture_output=True, text=True, timeout=10)
            r[k] = next((x.strip() for x in (p.stdout + p.stderr).splitlines() if x.strip()), "")
        except OSError:
            r[k] = None
    return r


def cmd_list(o):
    for n, s in variants_mod.VARIANTS.items():
        print(f"{n:18} {'quick' if s.get('quick', True) else 'full ':5} {','.join(s['lanes']):10} {s['label']}")
    print("tests:", ", ".join(TESTS))


def cmd_report(o):
    for f in o.files:
        with open(f) as h:
            res = json.load(h)
        if o.base:
            res["meta"]["bases"] = [b for b in o.base.split(",") if b in res["meta"]["variants"]]
        print(markdown(summarise(res)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="cmd", required=True)
    r = sub.add_parser("run")
    r.add_argument("--quick", action="store_true", help="the default: main variants, 3 rounds of 2 s")
    r.add_argument("--full", action="store_true", help="all variants and tests, 5 rounds of 5 s")
    r.add_argument("--variants")
    r.add_argument("--tests")
    r.add_argument("--rounds", type=int)
    r.add_argument("--secs", type=float)
    r.add_argument("--rate", type=int, default=2000)
    r.add_argument("--rate-hi", type=int, default=6000)
    r.add_argument("--layout", choices=LAYOUTS, default="nodes")
    r.add_argument(
        "--topology",
        choices=("loopback", "netns"),
        default="loopback",
        help="netns: in a private network namespace, with redirects for the variants that need them",
    )
    r.add_argument("--base", default=BASES, help="variants to give ratios against")
    r.add_argument("--extra", action="append", help="JSON file with more variants")
    r.add_argument("--noise", type=float, default=0.06, help="retry a sample when others used more of the machine")
    r.add_argument("--retries", type=int, default=2)
    r.add_argument("--quiet-wait", type=float, default=5.0)
    r.add_argument("--budget", type=float, help="seconds after which nothing is retried")
    r.add_argument("--no-limits", dest="limits", action="store_false")
    r.add_argument("--no-memory", dest="memory", action="store_false")
    r.add_argument("--work", default=f"{WORK}/work")
    r.add_argument("--envoy")
    r.add_argument("--python", default=sys.executable)
    r.add_argument("--out", default=f"{WORK}/results", help="writes OUT.json and OUT.md")
    r.set_defaults(fn=cmd_run)
    sub.add_parser("list").set_defaults(fn=cmd_list)
    q = sub.add_parser("report")
    q.add_argument("files", nargs="+")
    q.add_argument("--base", help="ratios against these instead")
    q.set_defaults(fn=cmd_report)
    o = p.parse_args()
    if o.cmd == "run":
        o.rounds = o.rounds or (5 if o.full else 3)
        o.secs = o.secs or (5.0 if o.full else 2.0)
        o.budget = o.budget or (3600 if o.full else 500)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    o.fn(o)


if __name__ == "__main__":
    main()
