"""compose.yaml and the Dockerfile, by the schema of the Compose specification and hadolint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from server.settings import ENV_PREFIX, Settings
from tests.deploy.conftest import DEPLOY, ROOT

BIN = Path(sys.executable).parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def lint(tool: str, *arguments: str | Path) -> None:
    result = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_is_of_the_specification() -> None:
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    lint("hadolint", ROOT / "Dockerfile")


def test_yamllint_finds_nothing() -> None:
    lint("yamllint", "--strict", "deploy")


def test_the_keys_script_is_a_shell_script() -> None:
    subprocess.run(["sh", "-n", DEPLOY / "make-keys.sh"], check=True)


def test_every_variable_is_a_setting_with_a_value_that_it_takes() -> None:
    values = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in SERVICES["server"]["environment"].items()
        if name.startswith(ENV_PREFIX)
    }
    known = {name: value for name, value in values.items() if name in Settings.model_fields}
    assert set(values) <= set(known)
    Settings(**known)


def test_whoever_waits_waits_for_a_service_and_mounts_what_exists() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", ())) <= set(SERVICES), name
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), mount
            else:
                assert source in COMPOSE["volumes"], mount


def test_each_service_has_its_own_secret_and_no_other() -> None:
    secrets = {"server-keys", "scrape-key", "load-key", "database-password"}
    held = {
        name: {m.split(":")[0] for m in service.get("volumes", ())} & secrets
        for name, service in SERVICES.items()
        if name != "keys"
    }
    assert held == {
        "server": {"server-keys"},
        "prometheus": {"scrape-key"},
        "loadtest": {"load-key"},
        "postgres": {"database-password"},
        "grafana": set(),
    }


def test_nothing_is_reachable_from_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_of_a_version() -> None:
    for name, service in SERVICES.items():
        if service["image"] != "pilothouse":
            assert re.search(r":v?\d+", service["image"]), name


def test_the_volumes_of_keys_belong_to_the_user_of_the_image() -> None:
    """A new volume takes over the owner of what the image has at its place."""
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    mounted = [mount.split(":")[1] for mount in SERVICES["keys"]["volumes"][1:]]
    assert mounted
    for path in (*mounted, "/data"):
        assert re.search(rf"install -d -o pilothouse .*{path}\b", dockerfile), path


def test_the_image_runs_as_nobody_special_and_says_whether_it_is_ready() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    (user,) = re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert int(user) > 999
    assert "HEALTHCHECK" in dockerfile and "/ready" in dockerfile
    assert "slim" in dockerfile and "ARG TORCH_INDEX" in dockerfile


def test_what_the_image_copies_is_not_ignored() -> None:
    let_through = (ROOT / ".dockerignore").read_text("utf-8").split()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists() and f"!{path}" in let_through
