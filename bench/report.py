"""Medians, ratios paired within a round, and the markdown of a run."""

from load import TESTS, stats3

METRICS = [
    "rps",
    "gbps",
    "p50_us",
    "p99_us",
    "p999_us",
    "mean_us",
    "cpu_pair_per_1e5",
    "cpu_out_per_1e5",
    "cpu_in_per_1e5",
    "cpu_client_per_1e5",
    "cpu_backend_per_1e5",
    "cpu_pair_per_gb",
    "cpu_out_per_gb",
    "cpu_in_per_gb",
    "proxy_sys_share",
    "interference",
    "steal",
    "idle",
]


def summarise(res):
    """Medians over rounds; ratios paired within a round, then the median of those."""
    by = {}
    for s in res["samples"]:
        if "error" not in s["r"]:
            by.setdefault((s["variant"], s["test"]), {})[s["round"]] = s["r"]
    out = {}
    for (v, t), rounds in by.items():
        e = out.setdefault(v, {}).setdefault(t, {})
        for m in METRICS:
            st = stats3([r.get(m) for r in rounds.values()])
            if st:
                e[m] = st
        e["errors"] = sum(r.get("errors", 0) for r in rounds.values())
        for base in res["meta"]["bases"]:
            for m in ("rps", "gbps", "p50_us", "p99_us", "cpu_pair_per_1e5", "cpu_pair_per_gb"):
                other = by.get((base, t), {})
                rat = [r[m] / other[k][m] for k, r in rounds.items() if m in r and k in other and other[k].get(m)]
                st = stats3(rat)
                if st:
                    e.setdefault("vs", {}).setdefault(base, {})[m] = st
    res["summary"] = out
    return res


def fmt(x, digits=3):
    if x is None:
        return "-"
    if x >= 1000:
        return f"{x:,.0f}"
    return f"{x:.{digits}g}"


def cell(st):
    return "-" if not st else f"{fmt(st['median'])} ({fmt(st['min'])}–{fmt(st['max'])})"


def rcell(st):
    return "-" if not st else f"{st['median']:.3g}×"


TITLES = {
    "h1_max": "HTTP/1.1 maximum: wrk, 32 keepalive connections",
    "h1_c1": "HTTP/1.1 one connection, one request at a time (unloaded latency)",
    "h1_rate": "HTTP/1.1 open loop, Poisson {rate}/s over 16 connections",
    "h1_rate_hi": "HTTP/1.1 open loop, Poisson {rate_hi}/s over 16 connections",
    "h2_max": "HTTP/2 (h2c) maximum: h2load, 4 connections x 8 streams",
    "h2_rate": "HTTP/2 (h2c) open loop, Poisson {rate}/s over 4 connections",
    "h2_rate_hi": "HTTP/2 (h2c) open loop, Poisson {rate_hi}/s over 4 connections",
    "newconn": "New connections: one request per client connection, 16 at a time",
    "tcp": "Opaque TCP bulk: iperf3, one stream",
}


def markdown(res):
    m, S = res["meta"], res["summary"]
    o = [
        f"# Sidecar pair benchmark, layout `{m['layout']}`",
        "",
        f"{m['when']}, {m['cpus']} x {m['cpu']}, Linux {m['kernel']}; topology {m.get('topology', 'loopback')}; "
        f"{m['rounds']} rounds interleaved, "
        f"{m['secs']:g} s per sample. Cells are the median (min–max) over rounds; ratios are taken within "
        "each round, then the median.",
        "",
    ]
    for t, title in TITLES.items():
        rows = [v for v in m["variants"] if t in S.get(v, {})]
        if not rows:
            continue
        lat = "rate" in t or t == "h1_c1"
        head = ["variant"]
        if t == "tcp":
            head += ["Gbit/s", "CPU s per GB: pair", "out", "in"]
        elif lat:
            head += ["p50 us", "p99 us", "CPU s per 1e5: pair", "got/s"]
        else:
            head += [
                TESTS[t][3],
                "p50 us" if t != "h2_max" else "mean us",
                "p99 us",
                "CPU s per 1e5: pair",
                "out",
                "in",
                "client",
                "server",
            ]
        keys = ("p50_us", "p99_us") if lat else (TESTS[t][2],)
        bases = [b for b in m["bases"] if t in S.get(b, {})]
        for b in bases:
            head += [f"{'p50' if k == 'p50_us' else 'p99' if k == 'p99_us' else 'speed'} / {b}" for k in keys]
            if b != "direct":
                head += [f"CPU / {b}"]
        o += [f"## {title.format(**m)}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for v in rows:
            e = S[v][t]
            g = e.get
            if t == "tcp":
                c = [cell(g("gbps")), cell(g("cpu_pair_per_gb")), cell(g("cpu_out_per_gb")), cell(g("cpu_in_per_gb"))]
            elif lat:
                c = [cell(g("p50_us")), cell(g("p99_us")), cell(g("cpu_pair_per_1e5")), cell(g("rps"))]
            else:
                c = [
                    cell(g("rps")),
                    cell(g("p50_us") if t != "h2_max" else g("mean_us")),
                    cell(g("p99_us")),
                    cell(g("cpu_pair_per_1e5")),
                ]
                c += [fmt(g(f"cpu_{x}_per_1e5", {}).get("median")) for x in ("out", "in", "client", "backend")]
            for b in bases:
                r = e.get("vs", {}).get(b, {})
                c += [rcell(r.get(k)) for k in keys]
                if b != "direct":
                    c += [rcell(r.get("cpu_pair_per_gb" if t == "tcp" else "cpu_pair_per_1e5"))]
            name = v + (f" ({e['errors']} errors)" if e["errors"] else "")
            o.append("| " + " | ".join([name] + c) + " |")
        o.append("")
    if res.get("memory"):
        o += [
            "## Memory, MiB resident (anonymous part in brackets)",
            "",
            "| variant | out idle | in idle | out, 1000 idle conns | in, 1000 idle conns | KiB per conn out / in | "
            "out under load (peak) | in under load (peak) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for v, e in res["memory"].items():
            if not e:
                continue
            f = lambda x: f"{x['rss'] / 1024:.1f} ({x['anon'] / 1024:.1f})"  # noqa: E731
            per = [(e["with_conns"][g]["anon"] - e["idle"][g]["anon"]) / e["conns"] for g in ("out", "in")]
            last = [s["r"]["mem_kib"] for s in res["samples"] if s["variant"] == v and "mem_kib" in s["r"]]
            load = [
                f"{max(x[g]['rss'] for x in last) / 1024:.1f} ({max(x[g]['hwm'] for x in last) / 1024:.1f})"
                if last
                else "-"
                for g in ("out", "in")
            ]
            o.append(
                f"| {v} | {f(e['idle']['out'])} | {f(e['idle']['in'])} | {f(e['with_conns']['out'])} | "
                f"{f(e['with_conns']['in'])} | {per[0]:.1f} / {per[1]:.1f} | {load[0]} | {load[1]} |"
            )
        o.append("")
    if res.get("limits"):
        o += ["## Physical limits, one core", "", "| what | median (min–max) |", "|---|---|"]
        o += [f"| {k} | {cell(x)} |" for k, x in res["limits"].items()]
        o.append("")
    if res.get("verify"):
        o += [
            "## Is the middle hop mutual TLS 1.3?",
            "",
            "| variant | lane | with certificate | without | plaintext |",
            "|---|---|---|---|---|",
        ]
        for v, e in res["verify"].items():
            for ln, x in e.items():
                if ln.endswith("_mtls"):
                    o.append(
                        f"| {v} | {ln[:-5]} | {x['with_cert']} | {x['without_cert']} | "
                        f"{x['plaintext'].strip() or 'closed'} |"
                    )
        o.append("")
    noisy = [s for s in res["samples"] if (s["r"].get("interference") or 0) > m["noise_limit"]]
    o += [
        f"{len(res['samples'])} samples; {len(noisy)} kept with more than {m['noise_limit']:.0%} of the machine used "
        f"by others; {m.get('retries', 0)} retried for that reason; left out: {m.get('left_out', 'none')}; errors: "
        f"{[(s['variant'], s['test'], s['r']['error'][:80]) for s in res['samples'] if 'error' in s['r']] or 'none'}.",
        "",
    ]
    return "\n".join(o)
