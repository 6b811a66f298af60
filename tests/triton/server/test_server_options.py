"""What `trtdeploy serve` makes of its options, and which it refuses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trtdeploy.errors import RepositoryError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.options import ServerOptions

pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def repository(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "models"
    package(qdq_plan.path, folder, "plain")
    package_pipeline(qdq_plan.path, folder, "whole")
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"log_level": "verbose"}, ["--log-verbose=1"]),
        ({"log_level": "error"}, ["--log-info=false", "--log-warning=false"]),
        ({"http_max_input_size": 2**28}, ["--http-max-input-size=268435456"]),
        ({"explicit": True}, ["--model-control-mode=explicit", "--load-model=*"]),
        ({"explicit": True, "load": ["plain"]}, ["--model-control-mode=explicit", "--load-model=plain"]),
        (
            {"restrict": ["health,trace:key=value=x"]},
            ["--http-restricted-api=health,trace:key=value=x", "--grpc-restricted-protocol=health,trace:key=value=x"],
        ),
        (
            {"ensemble": True, "restrict": ["model-repository:key=value"]},
            [
                "--model-control-mode=explicit",
                "--load-model=whole_pipeline",
                "--http-restricted-api=model-repository:key=value",
                "--grpc-restricted-protocol=model-repository:key=value",
            ],
        ),
    ],
)
def test_arguments_of_the_server(options: dict[str, Any], expected: list[str], repository: Path) -> None:
    assert ServerOptions(**options).arguments(repository) == expected


def test_loading_is_sealed_where_only_ensembles_were_asked_for(repository: Path) -> None:
    sealed = [ServerOptions(ensemble=True).arguments(repository)[-1] for _ in range(2)]
    assert all(text.startswith("--grpc-restricted-protocol=model-repository:") for text in sealed)
    assert sealed[0] != sealed[1]


def test_a_client_certificate_is_asked_for_where_authorities_are_given(repository: Path, tmp_path: Path) -> None:
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run([*new, *files], check=True, capture_output=True)
    shutil.copy(tmp_path / "cert", tmp_path / "root")
    options = {f"grpc_tls_{name}": tmp_path / name for name in ("cert", "key", "root")}
    arguments = ServerOptions(**options).arguments(repository)
    assert "--grpc-use-ssl-mutual=true" in arguments
    assert f"--grpc-root-cert={tmp_path / 'root'}" in arguments
    (tmp_path / "key").write_text("garbage")
    with pytest.raises(UsageError, match="no certificate and its key"):
        ServerOptions(**options).arguments(repository)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"load": ["plain"]}, UsageError, "--explicit"),
        ({"load": ["absent"], "explicit": True}, RepositoryError, "no model absent"),
        ({"load": ["plain"], "explicit": True, "ensemble": True}, UsageError, "both choose"),
        ({"restrict": ["health"]}, UsageError, "APIS:KEY=VALUE"),
        ({"restrict": ["healthy:key=secret"]}, UsageError, "healthy"),
        ({"restrict": ["health:key="]}, UsageError, "APIS:KEY=VALUE"),
        ({"restrict": ["health:KEY=secret"]}, UsageError, "lower case"),
        ({"grpc_tls_cert": Path("absent")}, UsageError, "both a certificate and its key"),
        ({"grpc_tls_cert": Path("absent"), "grpc_tls_key": Path("absent")}, UsageError, "no file absent"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], kind: type[Exception], words: str, repository: Path
) -> None:
    with pytest.raises(kind, match=words) as caught:
        ServerOptions(**options).arguments(repository)
    assert "secret" not in str(caught.value)


def test_a_repository_without_ensembles_has_none_to_serve(qdq_plan: Plan, tmp_path: Path) -> None:
    package(qdq_plan.path, tmp_path / "models", "plain")
    with pytest.raises(RepositoryError, match="holds no ensemble"):
        ServerOptions(ensemble=True).arguments(tmp_path / "models")
