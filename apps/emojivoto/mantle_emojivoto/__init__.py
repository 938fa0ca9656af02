"""emojivoto, the demo application: web (HTTP), emoji and voting (gRPC) and a bot that votes.

It knows nothing of Mantle: it is what an application looks like that is put into a mesh unchanged.
"""

from pathlib import Path


def directory() -> Path:
    """Where `emojivoto.yml` and `mantle.images.yml` lie: in the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package if (package / "emojivoto.yml").exists() else package.parent
