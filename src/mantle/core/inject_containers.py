"""The containers and volumes that injection adds to a pod: redirect, guard of the redirect, proxy, debug container.

Settings and the mesh's `Values` in, the YAML of a container out, and where each stands. Whether a pod is injected at
all is not decided here (`inject.py`). Pure.
"""

from __future__ import annotations

from typing import Any

from mantle.core.annotations import Config
from mantle.core.proxy_env import Values

Object = dict[str, Any]

PROXY = "mantle-proxy"
INIT = "mantle-init"
GUARD = "mantle-guard"
DEBUG = "mantle-debug"
PROGRAM = "/usr/bin/mantle-proxy"
"""Where the proxy's image has it."""
OURS = (INIT, GUARD, PROXY, DEBUG)
TOKEN_VOLUME = "mantle-identity-token"
END_ENTITY_VOLUME = "mantle-identity-end-entity"
TOKEN_DIRECTORY = "/var/run/secrets/mantle.dev/identity"
END_ENTITY_DIRECTORY = "/var/run/mantle/identity/end-entity"


def redirect(config: Config, values: Values, beside: str) -> list[Object]:
    """The container that installs the redirect, and the one that keeps it there for as long as the pod lives.

    `beside`: networks that are not redirected. NET_ADMIN is what both need, and all they have.
    """
    rules = _rules(config, values, beside)

    def container(name: str, verb: str) -> Object:
        made = {
            "name": name,
            **_image(config, values),
            "args": ["redirect", verb, *rules],
            "securityContext": {**_confined(65534, ["NET_ADMIN"]), "runAsGroup": 65534},
            "terminationMessagePolicy": "FallbackToLogsOnError",
        }
        if resources := _resources(config):  # where a quota asks for them, it asks of every container
            small = {bound: {key: _GUARD[key] for key in amounts} for bound, amounts in resources.items()}
            made["resources"] = resources if name == INIT else small
        return made

    guarded = values.guard and config.get("redirect-guard", True)
    return [container(INIT, "install"), *([container(GUARD, "guard")] if guarded else [])]


_GUARD = {"cpu": "10m", "memory": "16Mi", "ephemeral-storage": "1Mi"}
"""What the guard asks for and may have, of each kind that the proxy is given bounds for. The first container is gone
before the others run, and costs nothing beside them.
"""


def _rules(config: Config, values: Values, beside: str) -> list[str]:
    admin, control = config.get("admin-port", 4191), config.get("control-port", 4190)
    skip_in = ",".join(filter(None, (f"{control},{admin}", config.get("skip-inbound-ports"))))
    args = ["--inbound-port", str(config.get("inbound-port", 4143))]
    args += ["--outbound-port", str(config.get("outbound-port", 4140))]
    if values.mark is None:
        args += ["--proxy-uid", str(config.get("proxy-uid", values.proxy_uid))]
    else:
        args += ["--proxy-mark", hex(values.mark)]
    args += ["--skip-inbound-ports", skip_in]
    if skip_out := config.get("skip-outbound-ports"):
        args += ["--skip-outbound-ports", skip_out]
    if subnets := ",".join(filter(None, (beside, config.get("skip-subnets")))):
        args += ["--skip-subnets", subnets]
    return args


def sidecar(config: Config, values: Values, env: list[Object]) -> Object:
    admin = config.get("admin-port", 4191)

    def probe(path: str, **times: int) -> Object:
        return {"httpGet": {"path": path, "port": admin}, **times}

    container: Object = {
        "name": PROXY,
        **_image(config, values),
        "env": env,
        "ports": [
            {"name": PROXY, "containerPort": config.get("inbound-port", 4143)},
            {"name": "mantle-admin", "containerPort": admin},
        ],
        "readinessProbe": probe("/ready", initialDelaySeconds=2),
        # A minute of silence: a node that is busy must not lose its proxies for being slow.
        "livenessProbe": probe("/live", initialDelaySeconds=10, timeoutSeconds=5, failureThreshold=6),
        "securityContext": _confined(
            config.get("proxy-uid", values.proxy_uid), [] if values.mark is None else ["NET_ADMIN"]
        ),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": END_ENTITY_VOLUME, "mountPath": END_ENTITY_DIRECTORY},
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_DIRECTORY, "readOnly": True},
        ],
    }
    if (gid := config.get("proxy-gid")) is not None:
        container["securityContext"]["runAsGroup"] = gid
    if resources := _resources(config):
        container["resources"] = resources
    if seconds := config.get("proxy-wait-before-exit-seconds"):
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": seconds}}}
    if config.get("proxy-await", True):
        container["startupProbe"] = probe("/ready", periodSeconds=1, failureThreshold=120)
    return container


def add_containers(spec: Object, first: list[Object], proxy: Object, config: Config, component: str) -> None:
    """Order is meaning: redirect, guard, proxy, then everything of the application, its init containers included.

    Identity is the exception: its application starts before its proxy, which asks it for a certificate over loopback.
    """
    install, *guard = first
    before, own = list(spec.get("initContainers") or []), list(spec.get("containers") or [])
    native = config.get("proxy-enable-native-sidecar", True)
    staying = [{**container, "restartPolicy": "Always"} for container in guard] if native else []
    if component == "identity":
        proxy.pop("startupProbe", None)
        spec["initContainers"] = [install, *staying, *before]
        spec["containers"] = [*own, *([] if native else guard), proxy]
    elif native:
        spec["initContainers"] = [install, *staying, {**proxy, "restartPolicy": "Always"}, *before]
    else:
        if config.get("proxy-await", True):  # the kubelet holds the containers after it until this hook is done
            command = [PROGRAM, "await", "--port", str(config.get("admin-port", 4191))]
            proxy["lifecycle"] = {**proxy.get("lifecycle", {}), "postStart": {"exec": {"command": command}}}
        spec["initContainers"] = [install, *before]
        spec["containers"] = [proxy, *guard, *own]


def debug_container(config: Config, values: Values) -> Object:
    """Tools to look at the pod's traffic. Capturing takes root with NET_RAW, whatever the pod says of its users."""
    image = config.get("debug-image", "mantle/debug")
    return {
        "name": DEBUG,
        "image": f"{image}:{config.get('debug-image-version', values.version)}",
        "imagePullPolicy": config.get("debug-image-pull-policy", "IfNotPresent"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
            "runAsGroup": 0,
            "runAsNonRoot": False,
            "runAsUser": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _image(config: Config, values: Values) -> Object:
    image, tag = config.get("proxy-image", values.proxy_image), config.get("proxy-version", values.version)
    return {"image": f"{image}:{tag}", "imagePullPolicy": config.get("image-pull-policy", "IfNotPresent")}


def _confined(uid: int, capabilities: list[str]) -> Object:
    allowed: Object = {"drop": ["ALL"]}
    if capabilities:
        allowed["add"] = capabilities
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": allowed,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": uid,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _resources(config: Config) -> Object:
    resources: Object = {}
    for bound in ("request", "limit"):
        for name, key in (("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "ephemeral-storage")):
            if (amount := config.get(f"proxy-{name}-{bound}")) is not None:
                resources.setdefault(f"{bound}s", {})[key] = amount
    return resources


def volumes(values: Values) -> list[Object]:
    token = {"audience": values.token_audience, "expirationSeconds": 3600, "path": TOKEN_VOLUME}
    return [
        {"name": END_ENTITY_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]
