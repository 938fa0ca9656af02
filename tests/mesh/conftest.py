"""The pods of a `mesh` by their usual names."""

import pytest

from .harness import Mesh, Pod


@pytest.fixture
def client(mesh: Mesh) -> Pod:
    return mesh.pods["client"]


@pytest.fixture
def web(mesh: Mesh) -> Pod:
    return mesh.pods["web"]


@pytest.fixture
def plain(mesh: Mesh) -> Pod:
    return mesh.pods["plain"]
