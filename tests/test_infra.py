"""What infra/ holds is checked by each file's own tool, as far as that runs without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
SECRETS = {"POSTGRES_PASSWORD": "a", "RAY_AUTH_TOKEN": "b", "STORAGE_USER": "c", "STORAGE_PASSWORD": "d"}


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_dockerfile_passes_hadolint():
    result = subprocess.run([tool("hadolint"), INFRA / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["workspace.yaml", "pipeline.yaml"])
def test_manifests_fit_the_kubernetes_schema(name):
    command = [tool("kubernetes-validate"), "--strict", INFRA / "kuberay" / name]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_raycluster_runs_the_locked_ray_and_valid_pods():
    cluster = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.M)[1]
    assert cluster["apiVersion"] == "ray.io/v1" and cluster["spec"]["rayVersion"] == locked
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        import kubernetes_validate

        kubernetes_validate.validate(pod, "1.37", strict=True)


def test_ray_cluster_file_passes_rays_own_validation():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())))


def test_compose_services_refer_to_each_other():
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services = compose["services"]
    assert {"database", "prefect-server", "pipeline", "ray-head", "ray-worker", "storage"} == set(services)
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "only loopback is published"
    needed = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    example = (INFRA / ".env.example").read_text().splitlines()
    assert needed == {line.partition("=")[0] for line in example if "=" in line}


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")
def test_compose_file_passes_its_own_tool():
    command = ["docker-compose", "-f", str(INFRA / "compose.yaml"), "config", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SECRETS})
    assert result.returncode == 0, result.stderr
