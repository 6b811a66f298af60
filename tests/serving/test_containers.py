"""The files in docker/: linted and checked against their schemas, offline; nothing here is built or run.

Kubernetes' own kinds are checked strictly against the API's schemas (kubernetes-validate), compose against the compose
specification (check-jsonschema), Dockerfiles by hadolint. The schemas of KServe and of the Prometheus operator are in
neither: of those two kinds, the keys at the top are held against the subset that is written below, and the parts that
are Kubernetes' own (container, volumes) are checked strictly as a Pod.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from trtdeploy.doctor.triton_releases import TENSORRT_OF_RELEASE

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
RESOURCES = [
    (path.name, resource)
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for resource in yaml.safe_load_all(path.read_text())
]
VERSION = "1.30"
HARDENED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}

# The subset that our two manifests use: KServe 0.15's and the Prometheus operator's documented fields.
OBJECT = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
CUSTOM = {
    "InferenceService": {
        "apiVersion": "serving.kserve.io/v1beta1",
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["predictor"],
            "properties": {
                "predictor": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["triton"],
                    "properties": {
                        "minReplicas": {"type": "integer", "minimum": 0},
                        "maxReplicas": {"type": "integer", "minimum": 1},
                        "triton": {
                            "type": "object",
                            "required": ["storageUri"],
                            "properties": {
                                "storageUri": {"type": "string", "pattern": "^[a-z0-9]+://"},
                                "protocolVersion": {"enum": ["v1", "v2"]},
                            },
                        },
                        "volumes": {"type": "array"},
                    },
                }
            },
        },
    },
    "ServiceMonitor": {
        "apiVersion": "monitoring.coreos.com/v1",
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "endpoints"],
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"], "additionalProperties": False,
                             "properties": {"matchLabels": {"type": "object"}}},
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    binary = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([binary, "--no-color", path], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    done = hadolint(path)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_the_linter_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILES[0].read_text().replace("slim-bookworm", "latest").replace("WORKDIR /work", "RUN cd /"))
    assert hadolint(bad).returncode != 0


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_image_runs_as_root(path: Path) -> None:
    users = [line for line in path.read_text().splitlines() if line.startswith("USER ")]
    assert users[-1] == "USER 1000:1000"


def test_what_dockerfiles_copy_is_there_and_not_ignored() -> None:
    root = DOCKER.parent
    admitted = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in DOCKERFILES:
        for line in path.read_text().splitlines():
            if line.startswith("COPY "):
                for source in line.split()[1:-1]:
                    assert (root / source).exists(), line
                    assert source in admitted, line


def test_compose_follows_its_specification_and_is_hardened() -> None:
    path = DOCKER / "compose.yaml"
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    services = yaml.safe_load(path.read_text())["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["user"] == "1000:1000"
        assert service["cap_drop"] == ["ALL"]
        assert service["mem_limit"]
        assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in services["server"]["ports"])


@pytest.mark.parametrize(
    ("name", "resource"), RESOURCES, ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_manifests_follow_their_schemas(name: str, resource: dict[str, Any]) -> None:
    if resource["kind"] not in CUSTOM:
        kubernetes_validate.validate(resource, VERSION, strict=True)
        return
    known = CUSTOM[resource["kind"]]
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == known["apiVersion"]
    jsonschema.validate(resource["metadata"], OBJECT)
    jsonschema.validate(resource["spec"], known["spec"])


def pods() -> dict[str, dict[str, Any]]:
    """The pods that the manifests make; KServe's, from the parts that are a pod's."""
    by_kind = {resource["kind"]: resource for _, resource in RESOURCES}
    predictor = by_kind["InferenceService"]["spec"]["predictor"]
    container = {
        key: value for key, value in predictor["triton"].items() if key not in ("storageUri", "protocolVersion")
    }
    kserve = {"containers": [{"name": "kserve-container", **container}], "volumes": predictor["volumes"]}
    return {"Deployment": by_kind["Deployment"]["spec"]["template"]["spec"], "InferenceService": kserve}


@pytest.mark.parametrize("kind", ["Deployment", "InferenceService"])
def test_pods_are_hardened_probed_and_limited(kind: str) -> None:
    spec = pods()[kind]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, VERSION, strict=True)
    (container,) = spec["containers"]
    context = {**spec.get("securityContext", {}), **container["securityContext"]}
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 1000
    assert {key: context[key] for key in HARDENED} == HARDENED
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert {"cpu", "memory", "nvidia.com/gpu"} <= set(container["resources"]["limits"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp", "/dev/shm"}


def test_a_wrong_manifest_is_refused() -> None:
    spec = {**pods()["Deployment"], "terminationGracePeriod": 3}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}, VERSION, strict=True
        )


def test_manifests_refer_to_each_other() -> None:
    by_kind = {resource["kind"]: resource for _, resource in RESOURCES}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == by_kind["Service"]["metadata"]["labels"]
    ports = {port["name"] for port in by_kind["Service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in by_kind["ServiceMonitor"]["spec"]["endpoints"]} <= ports
    scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]
    rules = yaml.safe_load(by_kind["ConfigMap"]["data"]["config.yaml"])["rules"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rules[0]["name"]["as"]
    assert by_kind["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 30 + 5


def test_the_list_of_images_agrees_with_what_the_preflight_knows() -> None:
    images = {
        entry["tag"].removesuffix("-py3"): entry for entry in yaml.safe_load((DOCKER / "images.yaml").read_text())
    }
    for release, carried in TENSORRT_OF_RELEASE.items():
        assert images[release]["tensorrt"] == carried
    assert all(entry["source"] for entry in images.values())
    default = next(
        line.partition("=")[2]
        for line in (DOCKER / "server.Dockerfile").read_text().splitlines()
        if line.startswith("ARG TRITON_RELEASE=")
    )
    assert default in images
