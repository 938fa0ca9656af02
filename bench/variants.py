"""The variants: what may stand between the client and the server.

Each is a plain dict, so one can also come from a JSON file (rig.py --extra
FILE, an object of name -> dict).  In every string, ${...} is filled in:

  ${h1_client} ${h2_client} ${tcp_client}     port the load generator connects to
  ${h1_mid} ${h2_mid} ${tcp_mid}              port of the mTLS hop, for the inbound proxy to bind
  ${h1_backend} ${h2_backend} ${tcp_backend}  port of the real server
  ${admin_out} ${admin_in} ${aux1}..${aux6}   spare ports
  ${run}      scratch folder of this variant   ${certs}  ca.crt, out.{crt,key}, in.{crt,key}
  ${bin}      folder with crelay, olload       ${here}   this folder
  ${python} ${envoy} ${haproxy}               tools; also every environment variable
  ${svc_ip}   with transparent: the address that stands for the server

Keys (only procs is needed, and lanes):
  label    a line for the report
  lanes    which of h1, h2, tcp it carries
  only     tests to run it in (default: all that its lanes allow)
  files    {name: text}, written to ${run}/name before the start
  procs    [{role, cmd, env}], in start order; role out = the client's sidecar, in = the
           server's, pair = one process that is both (booked under out), anything else (control
           plane, ...) is counted as aux
  client   {lane: {port, host, path}} where the load generator's target differs
  mtls     {lane: ALPN or ""}: check that the hop on ${lane_mid} is mutual TLS 1.3
  stats    {name: URL}, fetched into the run folder before stopping
  setup    commands to run to their end before the procs, in ${run}
  transparent {out: port, in: port}: only in --topology netns.  The load goes to ${svc_ip} and the server's own
           port; a redirect brings it to the out process (run as uid 2102), and what that sends there to the in
           process (uid 2103), whose own connections are left alone; in 0: no second redirect
  proof    {name: {url, has: [regex]}}: what a proxy must say of itself after the first request
  needs    names of environment variables without which the variant is left out
  quick    false: left out of --quick unless named
"""

import os

import envoy_conf

ENVOY_CMD = [
    "${envoy}",
    "-c",
    "${run}/SIDE.json",
    "--concurrency",
    "1",
    "--disable-hot-restart",
    "-l",
    "error",
    "--log-path",
    "${run}/SIDE.log",
]


def envoy(label, mode, lanes, **kw):
    extra = {k: kw.pop(k) for k in list(kw) if k in ("only", "quick")}
    mtls = kw.get("mtls", True)
    ports = {ln: tuple("${%s_%s}" % (ln, p) for p in ("client", "mid", "backend")) for ln in lanes}
    files = {}
    for side in ("out", "in"):
        # ports are filled in later: keep the template valid JSON by giving numbers as markers
        fake = {ln: tuple(90000 + 10 * i + j for j in range(3)) for i, ln in enumerate(lanes)}
        text = envoy_conf.bootstrap(side, mode, fake, "${certs}", 99999, "${run}", **kw)
        for i, ln in enumerate(lanes):
            for j in range(3):
                text = text.replace(str(90000 + 10 * i + j), ports[ln][j])
        files[f"{side}.json"] = text.replace("99999", "${admin_%s}" % side)
    alpn = {"h2": "h2", "hbone": "h2", "h1": "http/1.1", "tcp": ""}[mode]
    return {
        "label": label,
        "lanes": list(lanes),
        "files": files,
        "procs": [{"role": s, "cmd": [c.replace("SIDE", s) for c in ENVOY_CMD]} for s in ("in", "out")],
        "mtls": dict.fromkeys(lanes, alpn) if mtls else {},
        "stats": {
            f"{s}-ssl": "http://127.0.0.1:${admin_%s}/stats?filter=ssl|cx_total|cx_http|rq_total" % s
            for s in ("out", "in")
        },
        **extra,
    }


HAPROXY_HEAD = """global
  nbthread 1
  maxconn 8000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-options ssl-min-ver TLSv1.3
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode MODE
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  backlog 4096
"""


def haproxy(label, mode, lanes, reuse=True, **extra):
    files = {}
    for side in ("out", "in"):
        t = HAPROXY_HEAD.replace("MODE", "http" if mode == "h2" else "tcp")
        if mode == "h2":
            t += "  http-reuse always\n"
        for ln in lanes:
            listen, dial = (f"{ln}_client", f"{ln}_mid") if side == "out" else (f"{ln}_mid", f"{ln}_backend")
            bind = server = ""
            if side == "out":
                server = " ssl crt ${certs}/out.pem ca-file ${certs}/ca.crt verify required"
                server += "" if reuse else " no-ssl-reuse"
                server += " alpn h2" if mode == "h2" else ""
                bind = " proto h2" if mode == "h2" and ln == "h2" else ""
            else:
                bind = " ssl crt ${certs}/in.pem ca-file ${certs}/ca.crt verify required"
                bind += " alpn h2" if mode == "h2" else ""
                server = " proto h2" if mode == "h2" and ln == "h2" else ""
            t += "listen %s\n  bind 127.0.0.1:${%s}%s\n  server s 127.0.0.1:${%s}%s\n" % (
                ln,
                listen,
                bind,
                dial,
                server,
            )
        files[f"{side}.cfg"] = t
    return {
        "label": label,
        "lanes": list(lanes),
        "files": files,
        "procs": [{"role": s, "cmd": ["${haproxy}", "-db", "-f", "${run}/%s.cfg" % s]} for s in ("in", "out")],
        "mtls": dict.fromkeys(lanes, "h2" if mode == "h2" else ""),
        **extra,
    }


def pair(label, cmd, lanes=("h1", "h2", "tcp"), mtls=True, env=None, **extra):
    """Two processes of one program, given its listen:connect lanes on the command line."""

    def args(side):
        a, b = ("client", "mid") if side == "out" else ("mid", "backend")
        return ["${%s_%s}:${%s_%s}" % (ln, a, ln, b) for ln in lanes]

    return {
        "label": label,
        "lanes": list(lanes),
        "procs": [
            {"role": s, "cmd": [c.replace("SIDE", s) for c in cmd] + args(s), "env": env or {}} for s in ("in", "out")
        ],
        "mtls": dict.fromkeys(lanes, "") if mtls else {},
        **extra,
    }


def mantle(label, lanes, **extra):
    """A mantle-proxy pair under Mantle's own control plane (plane.py), which is aux: everything at its defaults.

    Transparent: the load goes to the service address, the redirect brings it to the outbound proxy, whose mux link
    goes to the same address's inbound port. Policy, metrics and tap checks are on, as in production.
    """
    ids = {s: f"{s}.mantle.serviceaccount.identity.mantle.cluster.local" for s in ("out", "in")}
    procs = [
        {
            "role": "plane",
            "wait_port": "${aux4}",
            "cmd": [
                "${python}",
                "${here}/plane.py",
                "--run",
                "${run}",
                "--service-ip",
                "${svc_ip}",
                "--identity-in-port",
                "${aux1}",
                "--identity-out-port",
                "${h2_mid}",
                "--destination-port",
                "${aux2}",
                "--policy-port",
                "${aux3}",
                "--ready-port",
                "${aux4}",
                "--inbound-port",
                "${h1_mid}",
                "--ports",
                "18080,18082,18083",
            ],
        }
    ]
    for side in ("in", "out"):
        env = {
            "IDENTITY_LOCAL_NAME": ids[side],
            "IDENTITY_TOKEN_FILE": "${run}/" + side + ".token",
            "IDENTITY_SVC_ADDR": "127.0.0.1:" + ("${aux1}" if side == "in" else "${h2_mid}"),
            "DESTINATION_SVC_ADDR": "127.0.0.1:${aux2}",
            "POLICY_SVC_ADDR": "127.0.0.1:${aux3}",
            "DESTINATION_PROFILE_NETWORKS": "10.223.0.0/16",
            "POLICY_CLUSTER_NETWORKS": "10.223.0.0/16",
            "POLICY_WORKLOAD": '{"ns":"mantle","pod":"' + side + '"}',
            "DESTINATION_CONTEXT": '{"ns":"mantle","nodeName":"bench","pod":"' + side + '"}',
            "INBOUND_IPS": "${svc_ip}" if side == "in" else "127.0.0.2",
            "INBOUND_PORTS": "18080-18083" if side == "in" else "1",
            "LOG": "warn",
            "ADMIN_LISTEN_ADDR": "127.0.0.1:${admin_%s}" % side,
            "CONTROL_LISTEN_ADDR": "127.0.0.1:" + ("${aux5}" if side == "in" else "${aux6}"),
            "OUTBOUND_LISTEN_ADDR": "127.0.0.1:" + ("${h1_client}" if side == "out" else "${tcp_client}"),
            "INBOUND_LISTEN_ADDR": "0.0.0.0:" + ("${h1_mid}" if side == "in" else "${tcp_mid}"),
        }
        procs.append(
            {
                "role": side,
                "env": {f"MANTLE_PROXY_{k}": v for k, v in env.items()},
                "cmd": [
                    "sh",
                    "-c",
                    'MANTLE_PROXY_IDENTITY_TRUST_ANCHORS="$$(cat trust-roots.pem)" exec "$$MANTLE_PROXY_BIN"',
                ],
                "wait_port": "${admin_%s}" % side,
            }
        )
    tls = r'tls="true"[^\n]*'
    return {
        "label": label,
        "lanes": list(lanes),
        "procs": procs,
        "needs": ["MANTLE_PROXY_BIN"],
        "transparent": {"out": "${h1_client}", "in": "${h1_mid}"},
        "proof": {
            "out": {
                "url": "http://127.0.0.1:${admin_out}/metrics",
                "has": [r'tcp_open_total\{direction="outbound",peer="dst"[^\n]*' + tls + f'server_id="{ids["in"]}"'],
            },
            "in": {
                "url": "http://127.0.0.1:${admin_in}/metrics",
                "has": [r'tcp_open_total\{direction="inbound",peer="src"[^\n]*' + tls + f'client_id="{ids["out"]}"'],
            },
        },
        "stats": {s: "http://127.0.0.1:${admin_%s}/metrics" % s for s in ("out", "in")},
        **extra,
    }


ALL = ("h1", "h2", "tcp")

VARIANTS = {
    "direct": {
        "label": "no proxy",
        "lanes": list(ALL),
        "procs": [],
        "client": {ln: {"port": "${%s_backend}" % ln} for ln in ALL},
    },
    "relay-plain": pair("floor: pair of minimal C relays, plaintext", ["${bin}/crelay"], mtls=False),
    "envoy-h2": envoy("Envoy pair, HTTP; HTTP/2 over mTLS between proxies", "h2", ("h1", "h2")),
    "envoy-h1": envoy("Envoy pair, HTTP; HTTP/1.1 over mTLS between proxies", "h1", ("h1",)),
    "envoy-tcp": envoy("Envoy pair, TCP over mTLS, resumption on", "tcp", ALL),
    "envoy-tcp-nores": envoy(
        "Envoy pair, TCP over mTLS, resumption off", "tcp", ("h1",), session_keys=0, only=["newconn"]
    ),
    "envoy-tcp-nores-x25519": envoy(
        "same, X25519 only (Envoy's default group is X25519MLKEM768)",
        "tcp",
        ("h1",),
        session_keys=0,
        curves=["X25519"],
        only=["newconn"],
        quick=False,
    ),
    "envoy-hbone": envoy("Envoy pair, TCP in HTTP/2 CONNECT over mTLS", "hbone", ALL, quick=False),
    "envoy-tcp-plain": envoy("Envoy pair, TCP, no TLS", "tcp", ALL, mtls=False, quick=False),
    "envoy-h1-plain": envoy("Envoy pair, HTTP/1.1, no TLS", "h1", ("h1",), mtls=False, quick=False),
    "envoy-h2-plain": envoy("Envoy pair, HTTP/2 between proxies, no TLS", "h2", ("h1", "h2"), mtls=False, quick=False),
    "envoy-h2-policy": envoy(
        "envoy-h2 + RBAC by peer identity + JSON access log on both", "h2", ("h1", "h2"), policy=True, quick=False
    ),
    "haproxy-tcp": haproxy("HAProxy pair, TCP over mTLS, resumption on", "tcp", ALL, quick=False),
    "haproxy-tcp-nores": haproxy(
        "HAProxy pair, TCP over mTLS, resumption off", "tcp", ("h1",), reuse=False, only=["newconn"], quick=False
    ),
    "haproxy-h2": haproxy("HAProxy pair, HTTP; HTTP/2 over mTLS between proxies", "h2", ("h1", "h2"), quick=False),
    "mantle": mantle("Mantle pair, transparent, mux links", ALL),
}

HERE = os.path.dirname(os.path.abspath(__file__))
