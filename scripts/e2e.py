"""`make e2e`: tests that need a real Kubernetes, which this brings up and takes down again. Needs root, Go and Debian.

Those that need only its API (tests/cluster) run beside those that need pods (tests/e2e), with Mantle's images: the
former compute, the latter mostly wait. The last lines are those of `make test`. Arguments go to pytest, for
tests/e2e: `python scripts/e2e.py -k tap`.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from test import ROOT, python, summary

ENOUGH = "--maxfail=8"
"""Where a cluster is broken every play waits for it, minutes each: what the first ones say is enough."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() != 0:
        sys.exit("make e2e: pods need root; as another user, `pytest tests/cluster` runs what needs the API only")
    # Builds Kubernetes and Helm where that was not done yet: 7 to 19 minutes, once (`.ci/run` starts it early).
    subprocess.run([ROOT / "tests/e2e/cluster", "build"], check=True)
    began, arguments = time.monotonic(), sys.argv[1:]
    tiers = [("cluster", [ENOUGH, "tests/e2e", *arguments])]
    if not arguments:
        tiers.append(("api", ["-n", "2", "--dist", "loadfile", ENOUGH, "tests/cluster"]))
    with ThreadPoolExecutor() as side_by_side:
        steps = list(side_by_side.map(lambda tier: python(tier[1], tier[0]), tiers))
    summary(steps, time.monotonic() - began)


if __name__ == "__main__":
    main()
