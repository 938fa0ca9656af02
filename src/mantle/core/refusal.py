"""Why there is no certificate, as a value: `csr.py` and `ca.py` return it, `control/identity.py` tells it."""

from __future__ import annotations

from dataclasses import dataclass

from mantle.core.reasons import CertifyRefused


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no certificate: the reason, what was found, what was wanted, and the fix. `detail` refines the
    reason.
    """

    reason: CertifyRefused
    found: str
    wanted: str
    fix: str
    detail: str = ""

    def __str__(self) -> str:
        label = f"{self.reason} ({self.detail})" if self.detail else f"{self.reason}"
        return f"{label}: found {self.found}; wanted {self.wanted}; fix: {self.fix}"
