"""The entry of the control plane's containers: `python -m mantle.control_plane PROGRAM ARGS`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs one program until it is told to stop. Returns its exit code; 2 for usage."""
    match argv[:1]:
        case ["identity"]:
            from mantle.control.app import identity_main

            return identity_main(argv[1:])
        case ["destination"]:
            from mantle.control.app import destination_main

            return destination_main(argv[1:])
        case ["injector"]:
            from mantle.control.injector_app import injector_main

            return injector_main(argv[1:])
        case ["ca"]:
            from mantle.control.ca import main as ca_main

            return ca_main(argv[1:])
        case ["viz"]:
            from mantle.viz.app import main as viz_main

            viz_main(argv[1:])
            return 0
    usage = "usage: python -m mantle.control_plane identity|destination|viz|injector|ca ARGS (--help for each)"
    print(usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
