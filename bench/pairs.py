"""A variant with its processes started, proved to be what it says, and the servers behind it."""

import os
import re
import shutil
import socket
import ssl
import string
import subprocess
import sys
import time
import urllib.request

from procs import BACKEND, LAYOUTS, SERVICE_NET, UID, end, redirect, spawn

HERE = os.path.dirname(os.path.abspath(__file__))
BODY = "0123456789" * 10
PATHS = {"h1": "/", "h2": "/index.html"}


class Ctx:
    def __init__(self, a):
        self.work = a.work
        self.layout = LAYOUTS[a.layout]
        self.bin = f"{a.work}/bin"
        self.certs = f"{a.work}/certs"
        self.tools = {
            "envoy": a.envoy or find_envoy(),
            "haproxy": shutil.which("haproxy") or "haproxy",
            "python": a.python,
        }
        self.netns = a.topology == "netns"
        self.bind = "0.0.0.0" if self.netns else "127.0.0.1"  # the servers': also at the service addresses
        self.mine = []  # (role, Popen) of everything long-lived


def find_envoy():
    if p := shutil.which("envoy"):
        return p
    try:
        import envoy

        return os.path.join(os.path.dirname(envoy.__file__), "_bin", "envoy")
    except ImportError:
        return "envoy"


def subst(x, m):
    if isinstance(x, str):
        return string.Template(x).substitute(m)
    if isinstance(x, dict):
        return {k: subst(v, m) for k, v in x.items()}
    if isinstance(x, list):
        return [subst(v, m) for v in x]
    return x


def wait_port(port, proc=None, limit=15.0, ip="127.0.0.1"):
    t = time.monotonic() + limit
    while time.monotonic() < t:
        if proc is not None and proc.poll() is not None:
            return False
        try:
            socket.create_connection((ip, port), 1).close()
            return True
        except OSError:
            time.sleep(0.05)
    return False


class Running:
    """A variant with its processes started."""

    def __init__(self, ctx, name, spec, slot):
        self.name, self.ctx = name, ctx
        base = 20000 + 32 * slot
        run = f"{ctx.work}/run/{name}"
        shutil.rmtree(run, ignore_errors=True)
        os.makedirs(run)
        m = {
            "run": run,
            "certs": ctx.certs,
            "bin": ctx.bin,
            "here": HERE,
            **ctx.tools,
            "admin_out": base + 20,
            "admin_in": base + 21,
        }
        for i, ln in enumerate(("h1", "h2", "tcp")):
            m[f"{ln}_client"], m[f"{ln}_mid"], m[f"{ln}_backend"] = base + 2 * i, base + 2 * i + 1, BACKEND[ln]
        for i in range(1, 7):
            m[f"aux{i}"] = base + 21 + i
        m["svc_ip"] = SERVICE_NET + str(1 + slot)
        m = {**os.environ, **{k: str(v) for k, v in m.items()}}
        self.map, self.run = m, run
        self.spec = s = subst(spec, m)
        through = s.get("transparent")
        if through:
            redirect(m["svc_ip"], through["out"], through["in"])
        for f, text in s.get("files", {}).items():
            with open(f"{run}/{f}", "w") as h:
                h.write(text)
        self.client = {}
        for ln in s["lanes"]:
            c = s.get("client", {}).get(ln, {})
            port = BACKEND[ln] if through else m[f"{ln}_client"]
            self.client[ln] = {
                "port": int(c.get("port", port)),
                "host": c.get("host"),
                "ip": m["svc_ip"] if through else "127.0.0.1",
                "path": c.get("path", PATHS.get(ln, "/")),
            }
        for cmd in s.get("setup", []):
            subprocess.run(cmd, check=True, cwd=run)
        self.procs = {"out": [], "in": [], "aux": []}
        try:
            for i, p in enumerate(s["procs"]):
                role = p.get("role", "aux")
                cpus = ctx.layout["out"] | ctx.layout["in"] if role == "pair" else None
                role = "out" if role == "pair" else role if role in self.procs else "aux"
                log = open(f"{run}/proc{i}-{role}.log", "wb")
                self.procs[role].append(
                    spawn(
                        p["cmd"], cpus or ctx.layout[role], log, p.get("env"), run, UID.get(role) if through else None
                    )
                )
                log.close()
                if p.get("wait_port"):
                    wait_port(int(p["wait_port"]))
            last = self.all()[-1] if self.all() else None
            ports = [(ln, self.client[ln]["port"], self.client[ln]["ip"]) for ln in s["lanes"]] if last else []
            ports += [(f"{ln} mid", int(m[f"{ln}_mid"]), "127.0.0.1") for ln in s.get("mtls", {})]
            for what, port, ip in ports:
                if not wait_port(port, last, ip=ip):
                    raise RuntimeError(f"{name}: port {port} ({what}) not up; see {run}")
        except Exception:
            end(self.all())
            raise

    def all(self):
        return self.procs["aux"] + self.procs["in"] + self.procs["out"]

    def alive(self):
        return all(p.poll() is None for p in self.all())

    def stop(self):
        for k, url in self.spec.get("stats", {}).items():
            try:
                with urllib.request.urlopen(url, timeout=3) as r, open(f"{self.run}/stats-{k}.txt", "wb") as f:
                    f.write(r.read())
            except OSError:
                pass
        end(self.all())
        for f in os.listdir(self.run):
            if f.endswith("access.log"):
                os.unlink(f"{self.run}/{f}")

    # does it work at all, and is the hop between the proxies what we say it is?
    def verify(self):
        out = {}
        for ln in self.spec["lanes"]:
            if ln == "h1":
                c, t = self.client[ln], time.monotonic() + 10
                while not (r := http_get(c["port"], c["host"], c["path"], ip=c["ip"])).startswith(b"HTTP/1.1 200"):
                    if time.monotonic() > t:
                        break
                    time.sleep(0.2)
                out[ln] = "ok" if r.startswith(b"HTTP/1.1 200") else repr(r[:60])
        hold = socket.create_server(("127.0.0.1", BACKEND["tcp"]))  # the tcp lane has no server between samples
        for ln, alpn in self.spec.get("mtls", {}).items():
            port = int(self.map[f"{ln}_mid"])
            good = tls_probe(port, self.ctx.certs, True, alpn)
            bad = tls_probe(port, self.ctx.certs, False, alpn)
            plain = http_get(port, None, "/")[:12]
            out[f"{ln}_mtls"] = {
                "with_cert": good,
                "without_cert": bad,
                "plaintext": plain.decode("latin1"),
                "ok": good.startswith("TLSv1.3") and bad.startswith("refused") and b"200" not in plain,
            }
        hold.close()
        for name, p in self.spec.get("proof", {}).items():
            with urllib.request.urlopen(p["url"], timeout=5) as r:
                text = r.read().decode()
            missing = [x for x in p["has"] if not re.search(x, text)]
            out[f"{name}_proof"] = {"ok": not missing, "missing": missing}
        return out


def http_get(port, host, path, timeout=5, ip="127.0.0.1"):
    try:
        with socket.create_connection((ip, port), timeout) as s:
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: {host or '127.0.0.1'}\r\nConnection: close\r\n\r\n".encode())
            b = b""
            while True:
                d = s.recv(65536)
                if not d:
                    return b
                b += d
    except OSError as e:
        return f"({e})".encode()


def tls_probe(port, certs, with_cert, alpn):
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ctx.check_hostname = False
    ctx.load_verify_locations(f"{certs}/ca.crt")
    if with_cert:
        ctx.load_cert_chain(f"{certs}/out.crt", f"{certs}/out.key")
    if alpn:
        ctx.set_alpn_protocols([alpn])
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as raw, ctx.wrap_socket(raw) as s:
            s.settimeout(1.0)
            # in TLS 1.3 a server's refusal of the client arrives after our side of the handshake
            s.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
                if alpn == "h2"
                else b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            try:
                d = s.recv(100)
                what = f"{len(d)} bytes" if d else "closed"
            except TimeoutError:
                what = "silent"
            if what == "closed" and not with_cert:
                return "refused (closed)"
            return f"{s.version()} {s.cipher()[0]} {what}"
    except (ssl.SSLError, OSError) as e:
        return f"refused ({getattr(e, 'reason', None) or e})"


def start_backends(ctx):
    d = f"{ctx.work}/backend"
    os.makedirs(f"{d}/doc", exist_ok=True)
    with open(f"{d}/doc/index.html", "w") as f:
        f.write(BODY)
    os.makedirs(f"{d}/tmp", exist_ok=True)
    with open(f"{d}/nginx.conf", "w") as f:
        f.write(
            string.Template(open(f"{HERE}/nginx.conf.in").read()).substitute(
                d=d, bind=ctx.bind, port=BACKEND["h1"], body=BODY
            )
        )
    log = open(f"{d}/log", "wb")
    cpus = ctx.layout["backend"]
    for port in BACKEND.values():  # fixed ports: a second rig in this namespace would measure the first one's servers
        try:
            socket.create_server((ctx.bind, port)).close()
        except OSError as e:
            sys.exit(f"port {port}: {e} (is another rig running?)")
    b = {
        "h1": spawn(["nginx", "-p", d, "-c", f"{d}/nginx.conf"], cpus, log),
        "h2": spawn(
            ["nghttpd", "--no-tls", "-n1", f"--address={ctx.bind}", "-d", f"{d}/doc", str(BACKEND["h2"])], cpus, log
        ),
    }
    for ln, p in b.items():
        if not wait_port(BACKEND[ln], p):
            raise RuntimeError(f"backend {ln} did not start, see {d}/log")
    return b
