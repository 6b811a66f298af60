"""How a server is run, apart from its ports: which models, for whom, and how it speaks."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.errors import RepositoryError, UsageError
from trtdeploy.triton.client.connection.options import ConnectionOptions
from trtdeploy.triton.client.connection.tls import ssl_context
from trtdeploy.triton.repository.layout import model_names, read_config

APIS = ("health", "metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics", "trace",
        "logging")  # fmt: skip
"""The groups of endpoints that Triton can restrict (its user guide, customization_guide/deploy.md)."""
_RESTRICTION = re.compile(r"([a-z,-]+):([a-z0-9_-]+)=(\S+)")
LogLevel = Literal["error", "warning", "info", "verbose"]


class ServerOptions(BaseModel):
    """Options of a tritonserver; unknown keys are refused.

    Attributes:
        explicit: Let clients load and unload models. Whoever may do that can run code on this machine: restrict
            ``model-repository``.
        load: Models to load at the start, in explicit mode; all of them if empty.
        ensemble: Load only the repository's ensembles, and what they run.
        restrict: ``APIS:KEY=VALUE``: endpoints that answer only requests with this header (over gRPC,
            ``triton-grpc-protocol-KEY``).
        grpc_tls_cert: PEM file of the server's certificate; needs ``grpc_tls_key``.
        grpc_tls_key: PEM file of its key.
        grpc_tls_root: PEM file of the authorities whose clients are let in; all clients must show a certificate then.
        http_max_input_size: Bytes that a request over HTTP may have; the server's own limit if None. The files of a
            version that is promoted travel in one, in Base64.
        log_level: What the server says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    explicit: bool = False
    load: tuple[str, ...] = ()
    ensemble: bool = False
    restrict: tuple[str, ...] = ()
    grpc_tls_cert: Path | None = None
    grpc_tls_key: Path | None = None
    grpc_tls_root: Path | None = None
    http_max_input_size: int | None = Field(default=None, gt=0)
    log_level: LogLevel = "info"

    def models(self, repository: Path) -> list[str]:
        """Return the models that the server loads by name.

        Raises:
            RepositoryError: There is no such model, or no ensemble in the repository.
        """
        names = model_names(repository)
        absent = [name for name in self.load if name not in names]
        if absent:
            raise RepositoryError(f"{repository} has no model {', '.join(absent)}.", hint=f"It has {', '.join(names)}.")
        if self.ensemble:
            names = [name for name in names if read_config(repository / name).platform == "ensemble"]
            if not names:
                raise RepositoryError(
                    f"{repository} holds no ensemble.", hint="Add one: trtdeploy package PLAN --ensemble ..."
                )
        return list(self.load) or names

    def arguments(self, repository: Path) -> list[str]:
        """Return tritonserver's arguments.

        Raises:
            UsageError: Two options contradict each other, a restriction has another form, or a file is missing.
            RepositoryError: See ``models``.
        """
        if self.load and not self.explicit:
            raise UsageError("--load chooses models in explicit mode only.", hint="Add --explicit.")
        if self.load and self.ensemble:
            raise UsageError("--load and --ensemble both choose the models.", hint="Give one of them.")
        arguments = self._log_arguments() + self._tls_arguments()
        if self.http_max_input_size is not None:
            arguments.append(f"--http-max-input-size={self.http_max_input_size}")
        restrictions = [self._restriction(text) for text in self.restrict]
        if self.explicit or self.ensemble:
            arguments.append("--model-control-mode=explicit")
            chosen = self.models(repository) if self.load or self.ensemble else ["*"]
            arguments += [f"--load-model={name}" for name in chosen]
        if self.ensemble and not self.explicit and not any("model-repository" in apis for apis, _, _ in restrictions):
            # Triton loads some of the models in explicit mode only; nobody has asked for more than that
            restrictions.append((["model-repository"], "trtdeploy-sealed", secrets.token_urlsafe(32)))
        for apis, key, value in restrictions:
            for option in ("http-restricted-api", "grpc-restricted-protocol"):
                arguments.append(f"--{option}={','.join(apis)}:{key}={value}")
        return arguments

    @property
    def health_headers(self) -> dict[str, str]:
        """HTTP headers that a request for the server's health needs."""
        restrictions = [self._restriction(text) for text in self.restrict]
        return {key: value for apis, key, value in restrictions if "health" in apis}

    def _restriction(self, text: str) -> tuple[list[str], str, str]:
        match = _RESTRICTION.fullmatch(text)
        apis = match[1].split(",") if match else []
        if match is None or not set(apis) <= set(APIS):
            # without the value: it is a secret
            raise UsageError(
                f"{text.partition('=')[0]!r} is no restriction of the form APIS:KEY=VALUE.",
                hint=f"APIS is a list, with commas, of {', '.join(APIS)}; KEY is in lower case, as gRPC sends it.",
            )
        return apis, match[2], match[3]

    def _tls_arguments(self) -> list[str]:
        cert, key, root = self.grpc_tls_cert, self.grpc_tls_key, self.grpc_tls_root
        if cert is None and key is None and root is None:
            return []
        if cert is None or key is None:
            raise UsageError(
                "TLS needs both a certificate and its key.", hint="Give --grpc-tls-cert and --grpc-tls-key."
            )
        for path in filter(None, (cert, key, root)):
            if not path.is_file():
                raise UsageError(f"There is no file {path}.", hint="TLS needs PEM files.")
        # Triton itself would only say that the port cannot be used
        ssl_context(ConnectionOptions(ca_certificate=root, client_certificate=cert, client_key=key))
        arguments = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={cert.resolve()}",
            f"--grpc-server-key={key.resolve()}",
        ]
        if root is not None:
            arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={root.resolve()}"]
        return arguments

    def _log_arguments(self) -> list[str]:
        if self.log_level == "verbose":
            return ["--log-verbose=1"]
        quiet = {"error": ("info", "warning"), "warning": ("info",), "info": ()}[self.log_level]
        return [f"--log-{level}=false" for level in quiet]
