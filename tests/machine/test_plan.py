"""Plans: images, environment, users, volumes and the sidecar, as values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mantle.core import inject
from mantle.core.proxy_env import Values
from mantle.platform.machine import applying, images, manifest, plan, together
from mantle.platform.machine.spec import Role

PROXY = images.Image(("sh",))
WEB = images.Image(("sh", "-c"), ("echo image",), "/tmp", {"PORT": "80", "WHO": "image"})


def machine(**more: object) -> plan.Machine:
    base = plan.Machine(
        state_dir="/state",
        node_name="box",
        dns_ip="10.203.0.1",
        rootless=False,
        default_user=plan.NOBODY,
        search=("/usr/bin", "/bin"),
        proxy_path="/usr/bin/sh",
        values=Values(version="1", trust_anchors="PEM", networks=("10.203.0.0/16",), inject_by_default=True),
        maps=({"acme/web:1": WEB}, {"mantle/proxy": PROXY}),
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def pod(spec: str, **extra: str) -> tuple[manifest.Object, dict[manifest.ObjectId, manifest.Object]]:
    text = (
        f"apiVersion: v1\n"
        f"kind: Pod\n"
        f"metadata: {{name: p, labels: {{app: p}}, annotations: {{note: 'a \"b\"'}}}}\n"
        f"spec:\n"
        f"{spec}"
    )
    for name, document in extra.items():
        text += f"---\napiVersion: v1\n{document.replace('NAME', name)}\n"
    parsed = manifest.read("p.yml", text)
    assert not parsed.mistakes, parsed.mistakes
    objects = {o.id: o for o in parsed.objects}
    assert together.check(parsed.objects, {}) == []
    return parsed.objects[0], objects


SERVICE_IPS = {"default/web-svc": "10.203.128.7"}


def built(spec: str, on: plan.Machine | None = None, **extra: str) -> plan.Planned:
    item, objects = pod(spec, **extra)
    on = on or machine()
    want = plan.wanted(item, None, on)
    assert isinstance(want, plan.Wanted), want
    return plan.build(want, on, objects, name="p", uid="u", ip="10.203.0.9", created=0.0, service_ips=SERVICE_IPS)


BOX = "  containers:\n  - name: c\n    image: acme/web:1\n"


@pytest.mark.parametrize(
    ("manifest_says", "argv"),
    [
        ("", ["/usr/bin/sh", "-c", "echo image"]),
        ("    args: [more]\n", ["/usr/bin/sh", "-c", "more"]),
        ("    command: [env]\n", ["/usr/bin/env"]),
        (
            "    command: [env]\n    args: [$(WHO), $$(WHO), $(NOBODY)]\n    env: [{name: WHO, value: me}]\n",
            ["/usr/bin/env", "me", "$(WHO)", "$(NOBODY)"],
        ),
    ],
)
def test_command_and_args_join_the_image_as_on_a_cluster(manifest_says: str, argv: list[str]) -> None:
    assert list(built(BOX + manifest_says).spec.containers[-1].argv) == argv


def test_the_sidecar_starts_before_the_application_and_only_it_keeps_a_capability() -> None:
    boxes = built(BOX).spec.containers
    assert [(b.name, b.role) for b in boxes] == [
        ("mantle-init", Role.INIT),
        ("mantle-proxy", Role.SIDECAR),
        ("c", Role.APP),
    ]
    assert [b.capabilities for b in boxes] == [("NET_ADMIN",), (), ()]
    assert [b.uid for b in boxes] == [65534, 2102, 65534]
    assert [b.own_user_namespace for b in boxes] == [False, False, True]


def test_a_manifest_with_the_sidecar_rendered_runs_like_one_without() -> None:
    item, _ = pod(BOX)
    other_mesh = Values(version="1", trust_anchors="OTHER", networks=(), inject_by_default=True)
    rendered = inject.inject_pod(item.doc, {}, other_mesh)
    assert isinstance(rendered, inject.Injected)
    parsed = manifest.read("p.yml", json.dumps({**item.doc, **rendered.pod}))
    assert not parsed.mistakes, parsed.mistakes
    plain, again = (plan.wanted(each, None, machine()) for each in (item, parsed.objects[0]))
    assert isinstance(plain, plan.Wanted) and isinstance(again, plan.Wanted), again
    assert again.pod["spec"] == plain.pod["spec"], "with this mesh's roots"


def test_an_image_that_the_user_mapped_never_keeps_capabilities() -> None:
    mine = machine(maps=({"acme/web:1": WEB, "mantle/proxy": dataclasses.replace(PROXY, file="m.yml", line=2)},))
    assert [b.capabilities for b in built(BOX, mine).spec.containers] == [(), (), ()]


def test_a_pod_that_says_disabled_is_left_alone_and_says_why() -> None:
    item, _ = pod(BOX)
    namespace = manifest.read(
        "n.yml",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, annotations: {mantle.dev/inject: disabled}}",
    ).objects[0]
    want = plan.wanted(item, namespace, machine())
    assert isinstance(want, plan.Wanted)
    assert not want.meshed and "mantle.dev/inject" in want.unmeshed_because


def test_environment_from_everywhere() -> None:
    env = (
        built(
            BOX
            + """\
    envFrom: [{configMapRef: {name: settings}, prefix: S_}]
    env:
    - {name: PORT, value: "$(S_COLOUR)-8080"}
    - {name: SELF, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: vault, key: password}}}
    - {name: MISSING, valueFrom: {secretKeyRef: {name: vault, key: nothing, optional: true}}}
    - {name: CPUS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
""",
            settings="kind: ConfigMap\nmetadata: {name: NAME}\ndata: {COLOUR: red}",
            vault="kind: Secret\nmetadata: {name: NAME}\ndata: {password: aHVudGVyMg==}",
        )
        .spec.containers[-1]
        .env
    )
    assert env["PORT"] == "red-8080" and env["WHO"] == "image" and env["SELF"] == "10.203.0.9" and env["APP"] == "p"
    assert env["PASSWORD"] == "hunter2" and "MISSING" not in env and env["CPUS"] == "1" and env["HOSTNAME"] == "p"


def test_services_are_named_in_the_environment_as_on_a_cluster() -> None:
    service = (
        "kind: Service\nmetadata: {name: NAME}\nspec: {selector: {app: p}, %s"
        "ports: [{name: http, port: 80}, {name: dns-udp, port: 53, protocol: UDP}]}"
    )
    services = {"web-svc": service % "", "headless": service % 'clusterIP: "None", '}
    env = built(BOX + "    env: [{name: URL, value: http://$(WEB_SVC_SERVICE_HOST)}]\n", **services).spec.containers
    application = next(c for c in env if c.name == "c").env
    assert (application["WEB_SVC_SERVICE_HOST"], application["WEB_SVC_SERVICE_PORT"]) == ("10.203.128.7", "80")
    assert application["WEB_SVC_PORT"] == application["WEB_SVC_PORT_80_TCP"] == "tcp://10.203.128.7:80"
    assert application["WEB_SVC_SERVICE_PORT_DNS_UDP"] == "53" and application["URL"] == "http://10.203.128.7"
    assert application["WEB_SVC_PORT_53_UDP"] == "udp://10.203.128.7:53"
    assert application["WEB_SVC_PORT_53_UDP_ADDR"] == "10.203.128.7"
    assert not [name for name in application if name.startswith("HEADLESS")]
    assert "WEB_SVC_PORT" not in next(c for c in env if c.name == "mantle-proxy").env
    alone = built("  enableServiceLinks: false\n" + BOX, **services).spec.containers
    assert "WEB_SVC_PORT" not in next(c for c in alone if c.name == "c").env


def test_volumes_become_files_tokens_and_mounts() -> None:
    planned = built(
        BOX
        + """\
    volumeMounts:
    - {name: all, mountPath: /etc/all}
    - {name: scratch, mountPath: /scratch, subPath: mine}
    - {name: scratch, mountPath: /literally, subPath: $(UP)}
    env: [{name: UP, value: ../../..}]
  volumes:
  - name: scratch
    emptyDir: {}
  - name: all
    projected:
      sources:
      - serviceAccountToken: {path: token, audience: someone, expirationSeconds: 700}
      - configMap: {name: settings, items: [{key: COLOUR, path: sub/colour}]}
      - downwardAPI: {items: [{path: notes, fieldRef: {fieldPath: metadata.annotations}}]}
""",
        settings="kind: ConfigMap\nmetadata: {name: NAME}\ndata: {COLOUR: red, OTHER: x}",
    )
    volumes = {v.name: v for v in planned.volumes}
    files = {f.path: f.data for f in volumes["all"].files}
    assert files["sub/colour"] == b"red" and b'note="a \\"b\\""' in files["notes"] and "OTHER" not in files
    assert [(t.path, t.audience, t.seconds) for t in volumes["all"].tokens] == [("token", "someone", 700)]
    mounts = {m.target: m for m in planned.spec.containers[-1].mounts}
    assert mounts["/etc/all"].read_only and not mounts["/scratch"].read_only
    assert (mounts["/scratch"].source, mounts["/scratch"].below) == ("/state/pods/u/volumes/scratch", "mine")
    assert planned.sub_paths == (("scratch", "mine"), ("scratch", "$(UP)")), "as on a cluster nothing in it is expanded"


def test_users_come_from_the_manifest_then_the_caller_never_host_root_by_itself() -> None:
    spec = "  securityContext: {runAsUser: 4000, fsGroup: 77}\n" + BOX
    boxes = built(
        spec + "  - {name: d, image: acme/web:1, securityContext: {runAsUser: 0, runAsGroup: 5}}\n"
    ).spec.containers
    assert (boxes[-2].uid, boxes[-2].gid, boxes[-2].groups) == (4000, 4000, (77,))
    assert (boxes[-1].uid, boxes[-1].gid, boxes[-1].capabilities) == (0, 5, ())
    sudo = machine(default_user=plan.User(1000, 1000, (27,), "/home/me"))
    assert (built(BOX, sudo).spec.containers[-1].uid, built(BOX, sudo).spec.containers[-1].groups) == (1000, (27,))


def test_everything_that_keeps_a_pod_from_running_is_said_at_once() -> None:
    item, _ = pod(
        "  containers:\n"
        "  - {name: a, image: acme/none:2}\n"
        "  - {name: b, image: acme/web:1, command: [no-such-program]}\n"
        "  - {name: c, image: acme/web:1, ports: [{containerPort: 4143}]}\n"
    )
    wrong = plan.wanted(item, None, machine())
    assert isinstance(wrong, list)
    text = {m.line: (m.message, m.fix) for m in wrong}
    assert "acme/none:2 is not mapped" in text[6][0] and "command: [none]" in text[6][1]
    assert "no-such-program is not on your PATH" in text[7][0]
    repaired, _ = pod("  containers:\n  - {name: c, image: acme/web:1, ports: [{containerPort: 4143}]}\n")
    again = plan.wanted(repaired, None, machine())
    assert isinstance(again, list) and "the mesh's proxy has it" in again[0].message


def test_the_hash_follows_the_template_and_the_map_but_not_the_pod() -> None:
    def hashed(spec: str, on: plan.Machine) -> str:
        want = plan.wanted(pod(spec)[0], None, on)
        assert isinstance(want, plan.Wanted)
        return want.hash

    other = machine(maps=({"acme/web": dataclasses.replace(WEB, args=("other",))}, {"mantle/proxy": PROXY}))
    assert hashed(BOX, machine()) == hashed(BOX, machine())
    assert len({hashed(BOX, machine()), hashed(BOX, other), hashed(BOX + "    args: [x]\n", machine())}) == 3


def test_resolver_and_hosts() -> None:
    planned = built(
        "  hostAliases: [{ip: 10.0.0.9, hostnames: [db]}]\n"
        "  dnsConfig: {searches: [corp], options: [{name: ndots, value: '2'}]}\n" + BOX
    ).spec
    assert planned.resolv_conf == (
        "nameserver 10.203.0.1\n"
        "search default.svc.cluster.local svc.cluster.local cluster.local corp\n"
        "options ndots:2\n"
    )
    assert "10.0.0.9\tdb" in planned.hosts and "10.203.0.9\tp" in planned.hosts


def test_a_wrong_entry_of_a_map_is_said_once_where_it_stands(tmp_path: Path) -> None:
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n" + BOX.replace("acme/web:1", "x")
    maps = (("m.yml", "images: {x: {command: [sh], directry: x}}", str(tmp_path)),)
    request = applying.Request({"a.yml": ("a.yml", text, maps)})
    wrong = applying.prepare(request, {}, machine(), frozenset())
    assert isinstance(wrong, list)
    assert [(m.file, m.message) for m in wrong] == [("m.yml", "image x: unknown field directry")]


def test_image_maps_report_every_mistake(tmp_path: Path) -> None:
    text = (
        "images:\n"
        "  a: {command: python3 -m web}\n"
        "  b: {comand: [x]}\n"
        "  c: {command: [x], directory: ./web, env: {PORT: 80}}\n"
        "other: 1\n"
    )
    made, wrong = images.read_map("m.yml", text, str(tmp_path))
    assert not any(image.command for image in made.values())
    assert any(m.line == 2 and "command: [python3, -m, web]" in m.fix for m in wrong)
    assert any(m.line == 3 and "write command" in m.fix for m in wrong)
    assert any(m.line == 4 and 'quote it: "80"' in m.fix for m in wrong)
    assert any("unknown field other" in m.message for m in wrong)
    good, none = images.read_map("m.yml", "images: {c: {command: [x], directory: ./web}}", str(tmp_path))
    assert none == [] and good["c"].directory == str(tmp_path / "web")


@pytest.mark.parametrize(
    ("image", "found"),
    [("a/b:1", "exact"), ("a/b:2", "any"), ("a/b@sha256:00", "any"), ("r:5000/b:1", "port"), ("x", None)],
)
def test_resolution_of_tags(image: str, found: str | None) -> None:
    maps = [{"a/b:1": images.Image(("exact",)), "a/b": images.Image(("any",)), "r:5000/b": images.Image(("port",))}]
    got = images.resolve(image, maps)
    assert (got.command[0] if got else None) == found


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("/", "a mesh's own state"),
        ("/run/mantle/m/issuer", "a mesh's own state"),
        ("/tmp", ""),
    ],
)
def test_host_paths(path: str, words: str) -> None:
    item, _ = pod(BOX + f"  volumes: [{{name: v, hostPath: {{path: {path}}}}}]\n")
    found = plan.wanted(item, None, machine(state_dir="/run/mantle/m"))
    assert (words in str(found[0])) if isinstance(found, list) else not words
