"""Helm itself, built from its own source, renders the chart to what `mantle install` prints."""

import json
import subprocess
from pathlib import Path

import pytest
from chart_play import VALUES, expected, given, yaml

from mantle.manifests.helm import chart
from mantle.manifests.render import identify


@pytest.mark.parametrize("name", VALUES)
def test_helm_renders_the_chart_to_what_install_prints(name: str, helm: Path, tmp_path: Path) -> None:
    values = VALUES[name]
    for path, text in chart(values).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "given.json").write_text(json.dumps(given(values)))
    command = [str(helm), "template", "m", str(tmp_path), "-n", "mantle", "--kube-version", "1.33"]
    command += ["-f", str(tmp_path / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(yaml(done.stdout), key=identify) == expected(values)
    unknown = subprocess.run([*command, "--set", "ha=true"], capture_output=True, text=True, timeout=60)
    assert unknown.returncode != 0 and "ha" in unknown.stderr
    without = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60)
    assert "give identity.trustAnchorsPEM" in without.stderr
