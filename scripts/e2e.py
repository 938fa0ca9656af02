"""`make e2e`: tests that need a real Kubernetes, which this brings up and takes down again. Needs root, Go and Debian.

First those that need only its API (tests/cluster), then those that need pods (tests/e2e), with Mantle's images. The
last lines are those of `make test`. Arguments go to pytest, for tests/e2e: `python scripts/e2e.py -k tap`.
"""

import os
import signal
import subprocess
import sys

from test import ROOT, python, summary

ENOUGH = "--maxfail=8"
"""Where a cluster is broken every play waits for it, minutes each: what the first ones say is enough."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() != 0:
        sys.exit("make e2e: pods need root; as another user, `pytest tests/cluster` runs what needs the API only")
    # Builds Kubernetes and Helm where that was not done yet: 7 to 19 minutes, once (`.ci/run` starts it early).
    subprocess.run([ROOT / "tests/e2e/cluster", "build"], check=True)
    arguments = sys.argv[1:]
    api = [] if arguments else [python(["-n", "2", "--dist", "loadfile", ENOUGH, "tests/cluster"], "api")]
    summary([*api, python([ENOUGH, "tests/e2e", *arguments], "cluster")])


if __name__ == "__main__":
    main()
