"""Makes `src/mantle/gen` from `proto/`: message classes (`*_pb2.py`) and their types (`*_pb2.pyi`).

Run as `python tools/gen.py` with the development dependencies installed (`make gen`). The result is checked in; a run
on unchanged `.proto` files must leave no diff. protoc writes imports from the top of its own tree (`from
io.linkerd.proxy import …`, and `io` is a module of the standard library), so they are moved below `mantle.gen`.
Service stubs are not made: servers answer with bytes from generic handlers, clients name the method's path.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GEN = ROOT / "src" / "mantle" / "gen"
HEADER = '"""Generated from proto/ by tools/gen.py: do not edit."""\n'


def compile_protos(out: Path) -> None:
    """Runs protoc with the message and the type plugin. Raises SystemExit if a file does not compile."""
    # protoc finds plugins on PATH; the one of this interpreter's environment is meant.
    plugin = Path(sys.executable).parent / "protoc-gen-mypy"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--plugin=protoc-gen-mypy={plugin}"]
    if protoc.main([*arguments, f"--python_out={out}", f"--mypy_out=quiet:{out}", *files]) != 0:
        raise SystemExit("protoc failed: see its messages above")


def below_mantle_gen(text: str) -> str:
    """Moves the imports of our own packages below `mantle.gen`."""
    text = re.sub(r"^from (io\.linkerd|mantle)(\.\S+)? import", r"from mantle.gen.\1\2 import", text, flags=re.M)
    return re.sub(r"^import (io\.linkerd|mantle)(\.\S+)? as", r"import mantle.gen.\1\2 as", text, flags=re.M)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        compile_protos(out)
        shutil.rmtree(GEN, ignore_errors=True)
        for source in sorted(path for path in out.rglob("*_pb2.py*") if path.suffix in (".py", ".pyi")):
            target = GEN / source.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(below_mantle_gen(source.read_text()))
    for directory_path in [GEN, *(path for path in GEN.rglob("*") if path.is_dir())]:
        (directory_path / "__init__.py").write_text(HEADER)


if __name__ == "__main__":
    main()
