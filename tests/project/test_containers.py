"""The files in docker/: linted and checked against their schemas, offline; nothing here is built or run.

Kubernetes' own kinds are checked strictly against the API's schemas (kubernetes-validate), compose against the compose
specification (check-jsonschema), Dockerfiles by hadolint. The schemas of KServe and of the Prometheus operator are in
neither: those two kinds are held against the models that are published of them (see ``published_models``), where
`make test` has fetched these, and always against the subset that is written below; the parts that are Kubernetes' own
(container, volumes) are checked strictly as a Pod.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from tests.project import published_models
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

# The subset that our two manifests use, after the API references of KServe (serving.kserve.io/v1beta1: PredictorSpec,
# TritonSpec) and of the Prometheus operator (monitoring.coreos.com/v1: ServiceMonitorSpec, Endpoint, Duration).
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
                             "properties": {"matchLabels": {"type": "object",
                                                            "additionalProperties": {"type": "string"}}}},
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d|w|y))+$"},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    binary = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([binary, "--no-color", path], capture_output=True, text=True, timeout=300, check=False)


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
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=300, check=False)
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
    check_custom(resource)


def check_custom(resource: dict[str, Any]) -> None:
    """Raise jsonschema's error, or an AssertionError, for what is not in the subset."""
    known = CUSTOM[resource["kind"]]
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == known["apiVersion"]
    jsonschema.validate(resource["metadata"], OBJECT)
    jsonschema.validate(resource["spec"], known["spec"])


def published_errors(resource: dict[str, Any]) -> list[str]:
    """Return what is wrong by the models that are published; skip without them, or fail in continuous integration."""
    try:
        if resource["kind"] == "InferenceService":
            return published_models.kserve_errors(resource)
        published_models.service_monitor().model_validate(resource)
    except published_models.Missing as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"this must run in continuous integration: {reason}")
        pytest.skip(str(reason))
    except pydantic.ValidationError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("kind", list(CUSTOM))
def test_custom_resources_are_what_their_makers_have_published(kind: str) -> None:
    (resource,) = [resource for _, resource in RESOURCES if resource["kind"] == kind]
    assert published_errors(resource) == []


MISTAKES: dict[str, tuple[str, Callable[[Any], object], bool]] = {
    "predictor": ("InferenceService", lambda spec: spec.update(predictors=spec.pop("predictor")), True),
    "replicas": ("InferenceService", lambda spec: spec["predictor"].update(minReplica=1), True),
    "type": ("InferenceService", lambda spec: spec["predictor"].update(maxReplicas="4"), True),
    "boolean": ("InferenceService", lambda spec: spec["predictor"].update(minReplicas=True), True),
    "storage": ("InferenceService", lambda spec: spec["predictor"]["triton"].update(storageUri=3), True),
    "no-storage": ("InferenceService", lambda spec: spec["predictor"]["triton"].pop("storageUri"), False),
    "no-url": ("InferenceService", lambda spec: spec["predictor"]["triton"].update(storageUri="models"), False),
    "protocol": ("InferenceService", lambda spec: spec["predictor"]["triton"].update(protocolVersion="v3"), False),
    "endpoint": ("ServiceMonitor", lambda spec: spec.update(endpoint=[]), True),
    "no-selector": ("ServiceMonitor", lambda spec: spec.pop("selector"), True),
    "selector": ("ServiceMonitor", lambda spec: spec["selector"].update(matchLabel={}), True),
    "label": ("ServiceMonitor", lambda spec: spec["selector"]["matchLabels"].update(tier=1), True),
    "interval": ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(interval="15 seconds"), True),
    "port": ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(port=8002), True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_custom_resources_are_found(mistake: str) -> None:
    kind, change, published = MISTAKES[mistake]
    (resource,) = [copy.deepcopy(resource) for _, resource in RESOURCES if resource["kind"] == kind]
    change(resource["spec"])
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_custom(resource)
    if published:  # the others are allowed there, and make no sense here
        assert published_errors(resource) != []


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
    predictor = by_kind["InferenceService"]["spec"]["predictor"]
    assert predictor["minReplicas"] <= predictor["maxReplicas"]
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
