"""Does this host's own firewall drop what pods send into the world? Read from nf_tables; nothing is changed.

Docker and ufw give the FORWARD chain the policy `drop` and list what may pass: a mesh's link is not on their lists.
(They write into nf_tables, as `iptables` does on every current distribution.)
"""

from __future__ import annotations

import struct

from mantle.platform.machine.netlink import DUMP, NETLINK_NETFILTER, Netlink, NetlinkError, attributes
from mantle.platform.machine.nft import DROP

_GETCHAIN, _GETRULE = 10 << 8 | 4, 10 << 8 | 7
_FORWARD = 2
_FAMILIES = {1: "inet", 2: "ip"}


def dropping() -> list[str]:
    """`chain FORWARD of table ip filter` for each chain that drops what is forwarded by policy, unless a rule of its
    table names the links of meshes. Empty where nf_tables cannot be read.
    """
    try:
        asked = Netlink(NETLINK_NETFILTER)
    except OSError:
        return []
    try:
        chains, rules = (_dump(asked, kind) for kind in (_GETCHAIN, _GETRULE))
    except (NetlinkError, OSError):
        return []
    finally:
        asked.close()
    aware = {(family, _text(found[1])) for family, found in rules if b"mantle" in b"".join(found.values())}
    names = []
    for family, chain in chains:
        hook = dict(attributes(chain.get(4, b"")))
        number, policy = hook.get(1), chain.get(5)
        if family not in _FAMILIES or number is None or policy is None:
            continue
        table = _text(chain[1])
        if _u32(number) == _FORWARD and _u32(policy) == DROP and (family, table) not in aware:
            names.append(f"chain {_text(chain[3])} of table {_FAMILIES[family]} {table}")
    return names


def _dump(asked: Netlink, kind: int) -> list[tuple[int, dict[int, bytes]]]:
    """(family, attributes) of everything of a kind."""
    data = asked.message(kind, DUMP, bytes(4))
    answers = asked.exchange(data, asked.sequence, asked.sequence)
    return [(body[0], dict(attributes(body[4:]))) for _, body in answers]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


def _u32(data: bytes) -> int:
    return int(struct.unpack(">I", data)[0])
