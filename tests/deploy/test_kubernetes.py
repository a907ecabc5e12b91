"""The Kubernetes resources, by the schemas of Kubernetes and by each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import Metrics
from server.settings import ENV_PREFIX, Settings
from tests.deploy.conftest import DEPLOY

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
RESOURCES: dict[str, dict[str, Any]] = {
    name.removesuffix(".yaml"): yaml.safe_load((FOLDER / name).read_text("utf-8"))
    for name in KUSTOMIZATION["resources"]
}
POD = RESOURCES["deployment"]["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]


def test_every_file_is_a_resource() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def validate(path: Path) -> str:
    tool = Path(sys.executable).parent / "kubernetes-validate"
    result = subprocess.run([tool, "--strict", path], capture_output=True, text=True)
    text = result.stdout + result.stderr
    assert result.returncode == 0, text
    return text


@pytest.mark.parametrize("name", sorted(set(RESOURCES) - {"servicemonitor"}))
def test_a_resource_is_of_the_schema(name: str) -> None:
    """Not the ServiceMonitor, whose schema is the Prometheus operator's."""
    assert "passed" in validate(FOLDER / f"{name}.yaml")


def test_the_schemas_refuse_a_misspelt_field(tmp_path: Path) -> None:
    broken = tmp_path / "pdb.yaml"
    text = (FOLDER / "pdb.yaml").read_text("utf-8").replace("maxUnavailable", "maxUnavailible")
    broken.write_text(text)
    with pytest.raises(AssertionError):
        validate(broken)


def test_kustomize_builds_it(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (its kustomize is not in Debian, PyPI or npm)")
    built = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (tmp_path / "all.yaml").write_text(built.stdout)
    assert validate(tmp_path / "all.yaml").count("passed") == len(RESOURCES) - 1


def test_all_select_the_pods_of_the_deployment() -> None:
    labels = POD["metadata"]["labels"].items()
    for selector in (
        RESOURCES["deployment"]["spec"]["selector"]["matchLabels"],
        RESOURCES["service"]["spec"]["selector"],
        RESOURCES["pdb"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    monitor = RESOURCES["servicemonitor"]["spec"]
    assert (
        monitor["selector"]["matchLabels"].items()
        <= RESOURCES["service"]["metadata"]["labels"].items()
    )
    ports = {port["name"] for port in RESOURCES["service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= ports
    target = RESOURCES["hpa"]["spec"]["scaleTargetRef"]
    assert target["name"] == RESOURCES["deployment"]["metadata"]["name"]
    assert "replicas" not in RESOURCES["deployment"]["spec"]  # they are the HPA's


def test_it_scales_on_a_metric_that_exists() -> None:
    (metric,) = RESOURCES["hpa"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in Metrics([]).names


def test_probes_ask_endpoints_of_the_server() -> None:
    from server.app import create_app
    from tests.server.fakes import make_host

    paths = create_app(make_host()).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"]["path"] in paths
    assert SERVER["livenessProbe"]["httpGet"]["path"] == "/health"
    assert SERVER["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_servers_settings_are_ones_and_leave_time_to_finish() -> None:
    values = {
        variable["name"].removeprefix(ENV_PREFIX).lower(): variable["value"]
        for variable in SERVER["env"]
        if variable["name"].startswith(ENV_PREFIX)
    }
    settings = Settings(**values)
    assert POD["spec"]["terminationGracePeriodSeconds"] > settings.shutdown_timeout + 5


def test_the_pod_may_do_little() -> None:
    assert POD["spec"]["securityContext"]["runAsNonRoot"]
    allowed = SERVER["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and not allowed["allowPrivilegeEscalation"]
    assert allowed["capabilities"] == {"drop": ["ALL"]}
