"""The vLLM variants: overlays over the plain resources, merged here as kustomize does."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.engine.vllm.options import VllmOptions
from server.settings import ENV_PREFIX, Settings
from tests.deploy.conftest import DEPLOY
from tests.deploy.test_kubernetes import RESOURCES, validate

Resource = dict[str, Any]
_KEYS = ("name", "mountPath", "containerPort", "key")
"""What tells the items of a list apart, in the order in which they are looked for; lists of other
things are replaced."""


def merge(base: Any, patch: Any) -> Any:
    """A strategic merge, as far as these files need one."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {k: merge(base[k], v) if k in base else v for k, v in patch.items()}
        return {k: v for k, v in {**base, **merged}.items() if v is not None}
    if isinstance(base, list) and isinstance(patch, list) and isinstance(patch[0], dict):
        key = next((k for k in _KEYS if k in patch[0]), None)
        assert key is not None, patch
        new = {item[key]: item for item in patch}
        kept = [merge(item, new.pop(item[key])) if item[key] in new else item for item in base]
        return kept + list(new.values())
    return patch


def load(path: Path) -> Resource:
    resource: Resource = yaml.safe_load(path.read_text("utf-8"))
    return resource


def built(folder: str) -> dict[tuple[str, str], Resource]:
    """The resources of an overlay by kind and name."""
    root = DEPLOY / folder
    kustomization = load(root / "kustomization.yaml")
    resources: dict[tuple[str, str], Resource] = {}
    named = set()
    for entry in kustomization["resources"]:
        if entry == "../kubernetes":
            resources |= {(r["kind"], r["metadata"]["name"]): r for r in RESOURCES.values()}
        elif entry.startswith("../"):
            resources |= built(entry.removeprefix("../"))
        else:
            named.add(entry)
            resource = load(root / entry)
            resources[resource["kind"], resource["metadata"]["name"]] = resource
    for entry in kustomization["patches"]:
        named.add(entry["path"])
        patch = load(root / entry["path"])
        target = patch["kind"], patch["metadata"]["name"]
        assert target in resources, f"{entry['path']} patches nothing"
        if patch.get("$patch") == "delete":
            del resources[target]
        else:
            resources[target] = merge(resources[target], patch)
    assert named == {path.name for path in root.glob("*.yaml")} - {"kustomization.yaml"}
    return resources


OVERLAYS = ("kubernetes-vllm", "kubernetes-vllm-ray")


def pod(resource: Resource) -> tuple[Resource, Resource]:
    """A workload's pod and its one container."""
    spec = resource["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def settings_of(container: Resource, monkeypatch: pytest.MonkeyPatch) -> Settings:
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    values = {
        variable["name"].removeprefix(ENV_PREFIX).lower(): variable["value"]
        for variable in container["env"]
        if variable["name"].startswith(ENV_PREFIX)
    }
    return Settings(**values)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_every_resource_of_an_overlay_is_of_the_schema(folder: str, tmp_path: Path) -> None:
    for (kind, name), resource in built(folder).items():
        if kind == "ServiceMonitor":
            continue  # its schema is the Prometheus operator's
        file = tmp_path / f"{kind}-{name}.yaml"
        file.write_text(yaml.safe_dump(resource))
        assert "passed" in validate(file)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_settings_are_ones_that_vllm_takes_and_fit_the_gpus(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = built(folder)
    spec, container = pod(resources["Deployment", "pilothouse"])
    settings = settings_of(container, monkeypatch)
    assert settings.engine == "vllm"
    VllmOptions(str(settings.model), engine_args=settings.vllm_args)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == container["resources"]["requests"]["nvidia.com/gpu"]
    assert int(gpus) == settings.tensor_parallel_size * settings.data_parallel_size
    assert spec["terminationGracePeriodSeconds"] > settings.shutdown_timeout + 5
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/dev/shm", "/models", "/keys", "/data", "/tmp"} <= mounted
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    claim = next(v for v in spec["volumes"] if "persistentVolumeClaim" in v)
    assert ("PersistentVolumeClaim", claim["persistentVolumeClaim"]["claimName"]) in resources
    assert str(settings.model).startswith("/models/")
    allowed = container["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and allowed["capabilities"] == {"drop": ["ALL"]}


def test_the_nodes_of_a_ray_cluster_are_as_many_and_as_large_as_the_head_expects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources = built("kubernetes-vllm-ray")
    head, nodes = resources["Deployment", "pilothouse"], resources["StatefulSet", "pilothouse-node"]
    head_pod, head_container = pod(head)
    node_pod, node_container = pod(nodes)
    settings = settings_of(head_container, monkeypatch)
    assert head["spec"]["replicas"] + nodes["spec"]["replicas"] == settings.pipeline_parallel_size
    assert settings.vllm_args["distributed_executor_backend"] == "ray"
    gpus = node_container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == head_container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--num-gpus={gpus} " in node_container["args"][0]
    assert node_container["image"] == head_container["image"]
    assert node_pod["securityContext"] == head_pod["securityContext"]
    assert node_container["securityContext"] == head_container["securityContext"]
    service = resources["Service", "pilothouse-ray"]["spec"]
    labels = head["spec"]["template"]["metadata"]["labels"].items()
    # kustomize adds the name's label to the plain resources, from their folder's kustomization.
    assert service["selector"].items() <= {("app.kubernetes.io/name", "pilothouse"), *labels}
    (port,) = service["ports"]
    assert f"--address=pilothouse-ray:{port['port']} " in node_container["args"][0]
    assert f"--port={port['port']} " in head_container["args"][0]
    assert not any(kind == "HorizontalPodAutoscaler" for kind, _ in resources)
    selector = nodes["spec"]["selector"]["matchLabels"].items()
    assert selector <= nodes["spec"]["template"]["metadata"]["labels"].items()
    served = RESOURCES["service"]["spec"]["selector"].items()
    assert not served <= nodes["spec"]["template"]["metadata"]["labels"].items()
