"""Certificates, configuration files and command lines of every component: the shape of the cluster, no process."""

import base64
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import API_VIP, CGROUP, CONF, CRI, DNS_IP, LOG, NODE_IP, PKI, POD_CIDR, STATE, SVC_CIDR, run
from free_ports import free_port


def cert(name, subject, ca=None, sans=""):
    """An EC key and a certificate; without `ca`, a CA certificate."""
    ext = (
        ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature")
        if not ca
        else (
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "extendedKeyUsage=serverAuth,clientAuth",
        )
    )
    argv = [
        "openssl",
        "req",
        "-x509",
        "-config",
        CONF / "openssl.cnf",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-noenc",
        "-days",
        "365",
        "-subj",
        subject,
        "-keyout",
        PKI / f"{name}.key",
        "-out",
        PKI / f"{name}.crt",
    ]
    argv += [a for e in ext + ((f"subjectAltName={sans}",) if sans else ()) for a in ("-addext", e)]
    run(*argv, *(["-CA", PKI / f"{ca}.crt", "-CAkey", PKI / f"{ca}.key"] if ca else []))


def kubeconfig(user, server):
    def b64(f):
        return base64.b64encode((PKI / f).read_bytes()).decode()

    def named(kind, value):
        return [{"name": "mantle-e2e", kind: value}]

    path = CONF / f"{user}.kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "mantle-e2e",
                "clusters": named("cluster", {"server": server, "certificate-authority-data": b64("ca.crt")}),
                "users": named(
                    "user", {"client-certificate-data": b64(f"{user}.crt"), "client-key-data": b64(f"{user}.key")}
                ),
                "contexts": named("context", {"cluster": "mantle-e2e", "user": "mantle-e2e"}),
            }
        )
    )
    path.chmod(0o600)


def write_config(api_only, nftables, bins):
    for d in (PKI, LOG, CONF):
        d.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o711)
    PKI.chmod(0o700)
    ip = "127.0.0.1" if api_only else NODE_IP
    ports = [free_port() for _ in range(3)] if api_only else [6443, 2379, 2380]
    plan = {
        "api_only": api_only,
        "ip": ip,
        "ports": ports,
        "bins": str(bins),
        "nftables": nftables,
        "server": f"https://{ip}:{ports[0]}",
    }
    (CONF / "openssl.cnf").write_text("[req]\ndistinguished_name=dn\n[dn]\n")
    cert("ca", "/CN=mantle-e2e")
    cert("front-proxy-ca", "/CN=mantle-e2e-front-proxy")
    cert("front-proxy", "/CN=front-proxy-client", "front-proxy-ca")
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    cert(
        "apiserver",
        "/CN=kube-apiserver",
        "ca",
        ",".join([f"DNS:{n}" for n in names] + [f"IP:{i}" for i in (API_VIP, ip, "127.0.0.1")]),
    )
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", PKI / "sa.key")
    run("openssl", "ec", "-in", PKI / "sa.key", "-pubout", "-out", PKI / "sa.pub")
    for user, subject in {
        "admin": "/O=system:masters/CN=admin",
        "kubelet-client": "/O=system:masters/CN=kube-apiserver",
        "controller-manager": "/CN=system:kube-controller-manager",
        "scheduler": "/CN=system:kube-scheduler",
        "node": "/O=system:nodes/CN=system:node:node",
        "proxy": "/CN=system:kube-proxy",
    }.items():
        cert(user, subject, "ca", f"DNS:node,IP:{ip}" if user == "node" else "")
        kubeconfig(user, plan["server"])
    (CONF / "resolv.conf").write_text("")
    (CONF / "cni").mkdir(exist_ok=True)
    (CONF / "cni/10-mantle.conflist").write_text(
        json.dumps(
            {
                "cniVersion": "0.4.0",
                "name": "mantle-e2e",
                "plugins": [
                    {
                        "type": "ptp",
                        "ipMasq": False,
                        "mtu": 1500,
                        "ipam": {
                            "type": "host-local",
                            "dataDir": "/run/cni-ipam",
                            "ranges": [[{"subnet": POD_CIDR}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                        },
                    },
                    {"type": "portmap", "capabilities": {"portMappings": True}},
                ],
            }
        )
    )
    (CONF / "containerd.toml").write_text(f"""version = 2
root = "{STATE}/containerd"
state = "/run/containerd"
[grpc]
  address = "{CRI}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "mantle.local/pause:1"
  restrict_oom_score_adj = true  # a root without CAP_SYS_RESOURCE may not lower it
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{CONF}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
""")
    (CONF / "kubelet.json").write_text(
        json.dumps(
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "cgroupDriver": "cgroupfs",
                "cgroupRoot": f"/{CGROUP}",
                "failCgroupV1": False,
                "failSwapOn": False,
                "containerRuntimeEndpoint": f"unix://{CRI}",
                "resolvConf": f"{CONF}/resolv.conf",
                "clusterDNS": [DNS_IP],
                "clusterDomain": "cluster.local",
                "podLogsDir": f"{STATE}/pod-logs",
                "volumePluginDir": f"{STATE}/volume-plugins",
                "maxPods": 200,
                "serializeImagePulls": False,
                "authentication": {
                    "anonymous": {"enabled": False},
                    "webhook": {"enabled": True},
                    "x509": {"clientCAFile": f"{PKI}/ca.crt"},
                },
                "authorization": {"mode": "Webhook"},
                "tlsCertFile": f"{PKI}/node.crt",
                "tlsPrivateKeyFile": f"{PKI}/node.key",
                "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
                "imageGCHighThresholdPercent": 100,
                "syncFrequency": "10s",
            }
        )
    )
    (CONF / "proxy.json").write_text(
        json.dumps(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "nftables" if nftables else "iptables",
                "clusterCIDR": POD_CIDR,
                "hostnameOverride": "node",
                "clientConnection": {"kubeconfig": f"{CONF}/proxy.kubeconfig"},
                "iptables": {"minSyncPeriod": "100ms"},
                "nftables": {"minSyncPeriod": "100ms"},
                # conntrack limits are the host's; 0 leaves them alone
                "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            }
        )
    )
    (CONF / "plan.json").write_text(json.dumps(plan))
    return plan


def commands(plan):
    ip, (api, etcd, peer), p = plan["ip"], plan["ports"], PKI

    def k(name):
        return f"--kubeconfig={CONF}/{name}.kubeconfig"

    yield (
        "etcd",
        [
            "etcd",
            f"--data-dir={STATE}/etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        ],
    )
    yield (
        "kube-apiserver",
        [
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            f"--advertise-address={ip}",
            f"--secure-port={api}",
            f"--bind-address={'127.0.0.1' if plan['api_only'] else '0.0.0.0'}",
            f"--service-cluster-ip-range={SVC_CIDR}",
            f"--client-ca-file={p}/ca.crt",
            f"--tls-cert-file={p}/apiserver.crt",
            f"--tls-private-key-file={p}/apiserver.key",
            f"--service-account-key-file={p}/sa.pub",
            f"--service-account-signing-key-file={p}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=" + ("none" if plan["api_only"] else "lease"),
            f"--kubelet-client-certificate={p}/kubelet-client.crt",
            f"--kubelet-client-key={p}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={p}/front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={p}/front-proxy.crt",
            f"--proxy-client-key-file={p}/front-proxy.key",
            "--enable-aggregator-routing=true",
            "--profiling=false",
        ],
    )
    if not plan["api_only"]:
        yield "containerd", ["/usr/bin/containerd", "--config", f"{CONF}/containerd.toml"]
    yield None, None  # the rest once the API answers
    yield (
        "kube-controller-manager",
        [
            "kube-controller-manager",
            k("controller-manager"),
            f"--root-ca-file={p}/ca.crt",
            "--bind-address=127.0.0.1",
            f"--service-account-private-key-file={p}/sa.key",
            "--use-service-account-credentials",
            "--leader-elect=false",
            f"--cluster-signing-cert-file={p}/ca.crt",
            f"--cluster-signing-key-file={p}/ca.key",
            "--allocate-node-cidrs",
            f"--cluster-cidr={POD_CIDR}",
            "--node-cidr-mask-size=24",
            f"--service-cluster-ip-range={SVC_CIDR}",
            "--authentication-skip-lookup",
            "--profiling=false",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            *(["--secure-port=0"] if plan["api_only"] else []),
        ],
    )
    if plan["api_only"]:
        return
    yield "kube-scheduler", ["kube-scheduler", k("scheduler"), "--leader-elect=false", "--bind-address=127.0.0.1"]
    yield (
        "kubelet",
        [
            "kubelet",
            k("node"),
            f"--config={CONF}/kubelet.json",
            f"--root-dir={STATE}/kubelet",
            f"--cert-dir={STATE}/kubelet/pki",
            "--hostname-override=node",
            f"--node-ip={ip}",
        ],
    )
    yield "kube-proxy", ["kube-proxy", f"--config={CONF}/proxy.json"]
