"""The kinds of Kubernetes objects that a machine plays, field by field: data for `schema.walk`, and nothing else."""

from __future__ import annotations

import re

from mantle.platform.machine.schema import (
    ABSOLUTE,
    BASE64,
    BOOL,
    ENV,
    KEY,
    LABEL_NAME,
    LABEL_VALUE,
    MODE,
    NAME,
    NUMBER,
    PORT,
    PORT_LABEL,
    PORT_OR_NAME,
    POSITIVE,
    QUANTITY,
    RELATIVE,
    TEXT,
    USER,
    Ignored,
    Map,
    Node,
    Obj,
    Refused,
    Scalar,
    Seq,
    enum,
)

_SILENT = Ignored()
_SCHEDULING = Ignored("scheduling has no meaning on one machine")
_LIMITS = Ignored("resource limits are not enforced on one machine")
_NO_HOOKS = Ignored("lifecycle hooks are not run on one machine")


def _silent(names: str) -> dict[str, Node]:
    return dict.fromkeys(names.split(), _SILENT)


def _not_here(what: str) -> Refused:
    return Refused(f"{what} is not possible on one machine", "remove it, or run this workload on a cluster")


META = Obj(
    {
        "name": NAME,
        "namespace": LABEL_NAME,
        "labels": Map(LABEL_VALUE),
        "annotations": Map(TEXT),
        "generateName": Refused("generateName makes a new object at every `up`", "write `name:` instead"),
        **_silent(
            "creationTimestamp uid resourceVersion generation managedFields selfLink finalizers "
            "ownerReferences deletionTimestamp deletionGracePeriodSeconds"
        ),
    },
    ("name",),
)
TEMPLATE_META = Obj(META.fields)

_FIELD_PATHS = re.compile(
    r"(metadata\.(name|namespace|uid|labels|annotations|(labels|annotations)\['[^']+'\])|spec\.(nodeName|serviceAccountName)"
    r"|status\.(podIP|podIPs|hostIP|hostIPs))\Z"
)
_FIELD_PATH = Scalar(
    "a field of the pod",
    (str,),
    lambda v: "" if _FIELD_PATHS.match(v) else f"{v!r} is not a field that a pod can be told",
    "metadata.name, .namespace, .uid, .labels['KEY'], .annotations['KEY'], spec.nodeName, spec.serviceAccountName, "
    "status.podIP, status.hostIP",
)
_RESOURCE = enum(
    *(f"{side}.{what}" for side in ("limits", "requests") for what in ("cpu", "memory", "ephemeral-storage"))
)
_FIELD_REF = Obj({"fieldPath": _FIELD_PATH, "apiVersion": _SILENT}, ("fieldPath",))
_RESOURCE_REF = Obj({"resource": _RESOURCE, "containerName": TEXT, "divisor": QUANTITY}, ("resource",))
_KEY_REF = Obj({"name": NAME, "key": KEY, "optional": BOOL}, ("name", "key"))
_SOURCE_REF = Obj({"name": NAME, "optional": BOOL}, ("name",))
_ENV_FROM = Obj(
    {"prefix": TEXT, "configMapRef": _SOURCE_REF, "secretRef": _SOURCE_REF}, one_of=("configMapRef", "secretRef")
)
_VALUE_FROM = Obj(
    {"fieldRef": _FIELD_REF, "resourceFieldRef": _RESOURCE_REF, "configMapKeyRef": _KEY_REF, "secretKeyRef": _KEY_REF},
    one_of=("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef"),
)
_NO_PROBE_HOST = Refused("a probe of another host says nothing about this pod", "remove `host:`", (None, ""))
PROBE = Obj(
    {
        "httpGet": Obj(
            {
                "path": TEXT,
                "port": PORT_OR_NAME,
                "scheme": enum("HTTP", "HTTPS"),
                "host": _NO_PROBE_HOST,
                "httpHeaders": Seq(Obj({"name": TEXT, "value": TEXT}, ("name",))),
            },
            ("port",),
        ),
        "tcpSocket": Obj({"port": PORT_OR_NAME, "host": _NO_PROBE_HOST}, ("port",)),
        "exec": Obj({"command": Seq(TEXT)}, ("command",)),
        "grpc": Obj({"port": PORT, "service": TEXT}, ("port",)),
        "initialDelaySeconds": NUMBER,
        "periodSeconds": POSITIVE,
        "timeoutSeconds": POSITIVE,
        "successThreshold": POSITIVE,
        "failureThreshold": POSITIVE,
        "terminationGracePeriodSeconds": _SILENT,
    },
    one_of=("httpGet", "tcpSocket", "grpc", "exec"),
)
CONTAINER = Obj(
    {
        "name": LABEL_NAME,
        "image": TEXT,
        "command": Seq(TEXT),
        "args": Seq(TEXT),
        "workingDir": ABSOLUTE,
        "ports": Seq(
            Obj(
                {
                    "containerPort": PORT,
                    "name": PORT_LABEL,
                    "protocol": enum("TCP", "UDP", "SCTP"),
                    "hostPort": Ignored("hostPort is not opened: use `mantle port-forward`"),
                    "hostIP": _SILENT,
                },
                ("containerPort",),
            )
        ),
        "env": Seq(Obj({"name": ENV, "value": TEXT, "valueFrom": _VALUE_FROM}, ("name",))),
        "envFrom": Seq(_ENV_FROM),
        "resources": _LIMITS,
        "resizePolicy": _LIMITS,
        "restartPolicy": enum("Always"),
        "volumeMounts": Seq(
            Obj(
                {
                    "name": TEXT,
                    "mountPath": ABSOLUTE,
                    "readOnly": BOOL,
                    "subPath": RELATIVE,
                    "subPathExpr": _not_here("subPathExpr"),
                    **_silent("mountPropagation recursiveReadOnly"),
                },
                ("name", "mountPath"),
            )
        ),
        "volumeDevices": _not_here("a block device"),
        "livenessProbe": PROBE,
        "readinessProbe": PROBE,
        "startupProbe": PROBE,
        "lifecycle": _NO_HOOKS,
        "securityContext": Obj(
            {
                "runAsUser": USER,
                "runAsGroup": USER,
                "runAsNonRoot": BOOL,
                "privileged": Refused("applications run without any privilege on one machine", "remove `privileged:`"),
                **_silent(
                    "capabilities readOnlyRootFilesystem allowPrivilegeEscalation seccompProfile "
                    "seLinuxOptions procMount windowsOptions appArmorProfile"
                ),
            }
        ),
        **_silent("imagePullPolicy terminationMessagePath terminationMessagePolicy stdin stdinOnce tty"),
    },
    ("name", "image"),
)

_ITEMS = Seq(Obj({"key": KEY, "path": RELATIVE, "mode": MODE}, ("key", "path")))
_DOWNWARD = Seq(
    Obj(
        {"path": RELATIVE, "fieldRef": _FIELD_REF, "resourceFieldRef": _RESOURCE_REF, "mode": MODE},
        ("path",),
        one_of=("fieldRef", "resourceFieldRef"),
    )
)
_NAMED_ITEMS = Obj({"name": NAME, "items": _ITEMS, "optional": BOOL}, ("name",))
_VOLUME_SOURCES: dict[str, Node] = {
    "emptyDir": Obj({"medium": enum("", "Memory"), "sizeLimit": _LIMITS}),
    "configMap": Obj({"name": NAME, "items": _ITEMS, "optional": BOOL, "defaultMode": MODE}, ("name",)),
    "secret": Obj({"secretName": NAME, "items": _ITEMS, "optional": BOOL, "defaultMode": MODE}, ("secretName",)),
    "downwardAPI": Obj({"items": _DOWNWARD, "defaultMode": MODE}),
    "projected": Obj(
        {
            "defaultMode": MODE,
            "sources": Seq(
                Obj(
                    {
                        "serviceAccountToken": Obj(
                            {
                                "path": RELATIVE,
                                "audience": TEXT,
                                "expirationSeconds": Scalar(
                                    "seconds, 600 or more",
                                    (int,),
                                    lambda v: "" if v >= 600 else f"{v} is less than 600 seconds",
                                ),
                            },
                            ("path",),
                        ),
                        "configMap": _NAMED_ITEMS,
                        "secret": _NAMED_ITEMS,
                        "downwardAPI": Obj({"items": _DOWNWARD}),
                    },
                    one_of=("serviceAccountToken", "configMap", "secret", "downwardAPI"),
                )
            ),
        },
        ("sources",),
    ),
    "hostPath": Obj(
        {"path": ABSOLUTE, "type": enum("", "Directory", "File", "DirectoryOrCreate", "FileOrCreate")}, ("path",)
    ),
}
_NO_VOLUMES: dict[str, Node] = {
    name: Refused(
        f"a {name} volume is not possible on one machine",
        "use emptyDir, or hostPath for files of this machine",
        (None,),
    )
    for name in (
        "persistentVolumeClaim",
        "nfs",
        "csi",
        "ephemeral",
        "iscsi",
        "awsElasticBlockStore",
        "gcePersistentDisk",
        "azureDisk",
        "azureFile",
        "cephfs",
        "fc",
        "flexVolume",
        "glusterfs",
        "rbd",
        "image",
        "local",
        "cinder",
    )
}

POD_SPEC = Obj(
    {
        "containers": Seq(CONTAINER),
        "initContainers": Seq(CONTAINER),
        "ephemeralContainers": _not_here("an ephemeral container"),
        "volumes": Seq(
            Obj({"name": LABEL_NAME, **_VOLUME_SOURCES, **_NO_VOLUMES}, ("name",), one_of=tuple(_VOLUME_SOURCES))
        ),
        "restartPolicy": enum("Always", "OnFailure", "Never"),
        "terminationGracePeriodSeconds": NUMBER,
        "dnsPolicy": enum("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
        "dnsConfig": Obj(
            {
                "nameservers": Seq(TEXT),
                "searches": Seq(TEXT),
                "options": Seq(Obj({"name": TEXT, "value": TEXT}, ("name",))),
            }
        ),
        "hostAliases": Seq(Obj({"ip": TEXT, "hostnames": Seq(TEXT)}, ("ip",))),
        "hostname": LABEL_NAME,
        "subdomain": LABEL_NAME,
        "serviceAccountName": NAME,
        "serviceAccount": NAME,
        "automountServiceAccountToken": BOOL,
        "enableServiceLinks": BOOL,
        "securityContext": Obj(
            {
                "runAsUser": USER,
                "runAsGroup": USER,
                "runAsNonRoot": BOOL,
                "supplementalGroups": Seq(USER),
                "fsGroup": USER,
                **_silent(
                    "seccompProfile seLinuxOptions sysctls fsGroupChangePolicy windowsOptions appArmorProfile "
                    "supplementalGroupsPolicy seLinuxChangePolicy"
                ),
            }
        ),
        "hostNetwork": Refused(
            "hostNetwork would put the pod outside the mesh", "remove it: `mantle port-forward` reaches the pod"
        ),
        "hostPID": _not_here("hostPID"),
        "hostIPC": _not_here("hostIPC"),
        "activeDeadlineSeconds": Ignored("activeDeadlineSeconds is not enforced on one machine"),
        **dict.fromkeys(
            ("nodeSelector", "affinity", "tolerations", "nodeName", "topologySpreadConstraints"), _SCHEDULING
        ),
        **_silent(
            "schedulerName priorityClassName priority preemptionPolicy runtimeClassName overhead os "
            "imagePullSecrets shareProcessNamespace setHostnameAsFQDN hostUsers "
            "readinessGates resourceClaims resources"
        ),
        "schedulingGates": _not_here("a scheduling gate"),
    },
    ("containers",),
)
TEMPLATE = Obj({"metadata": TEMPLATE_META, "spec": POD_SPEC}, ("spec",))
SELECTOR = Obj(
    {
        "matchLabels": Map(LABEL_VALUE),
        "matchExpressions": Refused("matchExpressions are not evaluated on one machine", "use matchLabels", (None, [])),
    },
)

_SERVICE = Obj(
    {
        "selector": Map(LABEL_VALUE),
        "ports": Seq(
            Obj(
                {
                    "name": PORT_LABEL,
                    "port": PORT,
                    "targetPort": PORT_OR_NAME,
                    "protocol": enum("TCP", "UDP", "SCTP"),
                    "appProtocol": TEXT,
                    "nodePort": Ignored("nodePort is not opened: use `mantle port-forward`"),
                },
                ("port",),
            )
        ),
        "clusterIP": TEXT,
        "clusterIPs": _SILENT,
        "type": Scalar(
            "ClusterIP, NodePort or LoadBalancer",
            (str,),
            lambda v: (
                ""
                if v in ("ClusterIP", "NodePort", "LoadBalancer")
                else f"{v!r} is not a kind of Service for one machine"
            ),
            "use ClusterIP; an ExternalName is a name that the application can use directly",
        ),
        "publishNotReadyAddresses": BOOL,
        "sessionAffinity": Ignored("sessionAffinity is not honoured on one machine"),
        **_silent(
            "sessionAffinityConfig ipFamilies ipFamilyPolicy internalTrafficPolicy "
            "externalTrafficPolicy trafficDistribution allocateLoadBalancerNodePorts loadBalancerIP "
            "loadBalancerClass loadBalancerSourceRanges healthCheckNodePort externalIPs externalName"
        ),
    },
    ("ports",),
)


def _kind(**fields: Node) -> Obj:
    required = ("metadata", "spec") if "spec" in fields and not isinstance(fields["spec"], Ignored) else ("metadata",)
    return Obj({"apiVersion": TEXT, "kind": TEXT, "metadata": META, "status": _SILENT, **fields}, required)


KINDS: dict[str, tuple[str, Obj]] = {
    "Namespace": ("v1", _kind(spec=_SILENT)),
    "ServiceAccount": ("v1", _kind(automountServiceAccountToken=BOOL, secrets=_SILENT, imagePullSecrets=_SILENT)),
    "Service": ("v1", _kind(spec=_SERVICE)),
    "ConfigMap": ("v1", _kind(data=Map(TEXT), binaryData=Map(BASE64), immutable=BOOL)),
    "Secret": ("v1", _kind(data=Map(BASE64), stringData=Map(TEXT), type=TEXT, immutable=BOOL)),
    "Pod": ("v1", _kind(spec=POD_SPEC)),
    "Deployment": (
        "apps/v1",
        _kind(
            spec=Obj(
                {
                    "replicas": NUMBER,
                    "selector": SELECTOR,
                    "template": TEMPLATE,
                    **_silent("strategy minReadySeconds revisionHistoryLimit paused progressDeadlineSeconds"),
                },
                ("selector", "template"),
            )
        ),
    ),
    "Job": (
        "batch/v1",
        _kind(
            spec=Obj(
                {
                    "template": TEMPLATE,
                    "backoffLimit": NUMBER,
                    "parallelism": NUMBER,
                    "completions": NUMBER,
                    "completionMode": enum("NonIndexed"),
                    "suspend": Refused("a suspended Job never starts", "remove `suspend:`"),
                    "activeDeadlineSeconds": Ignored("activeDeadlineSeconds is not enforced on one machine"),
                    **_silent(
                        "selector manualSelector ttlSecondsAfterFinished podFailurePolicy podReplacementPolicy "
                        "successPolicy backoffLimitPerIndex maxFailedIndexes managedBy"
                    ),
                },
                ("template",),
            )
        ),
    ),
}
"""kind -> (apiVersion, table)."""

NOT_WORKLOADS_HERE: dict[str, str] = {
    "StatefulSet": "write a Deployment with a headless Service; its pods get no stable names or volumes here",
    "DaemonSet": "write a Deployment: one machine has one node",
    "CronJob": "write a Job, or run it from the machine's cron with `mantle up`",
    "ReplicaSet": "write a Deployment",
    "ReplicationController": "write a Deployment",
}
"""Workloads that a machine does not play: skipping them in silence would start half an application."""
