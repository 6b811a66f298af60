"""Authorities, certificates and keys for tests, made by openssl; and a TLS end in front of a plain port."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


class Authority:
    """An authority and the certificates that it signs, as PEM files in one folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE"]
        openssl("req", "-x509", *NEW_KEY, "-days", "2", "-subj", f"/CN={name}", *extensions,
                "-keyout", self._key, "-out", self.certificate)  # fmt: skip

    def sign(self, name: str, alternative_names: str) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key."""
        certificate, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative_names}\n")
        openssl("req", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
                "-days", "2", "-extfile", extensions, "-out", certificate)  # fmt: skip
        return certificate, key


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=300)


@contextlib.contextmanager
def tls_in_front_of(port: int, certificate: tuple[Path, Path], client_authority: Path | None = None) -> Iterator[str]:
    """Take TLS connections and hand what comes through them to a plain port of this machine; yields host:port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_authority)
    context.load_cert_chain(*certificate)
    if client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED

    def accept() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(plain,), daemon=True).start()

    def handle(plain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            secure = context.wrap_socket(plain, server_side=True)
            with secure, socket.create_connection(("127.0.0.1", port)) as behind:
                back = threading.Thread(target=pump, args=(behind, secure), daemon=True)
                back.start()
                pump(secure, behind)
                back.join(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(10)


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
