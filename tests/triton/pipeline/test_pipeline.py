"""Image files sent to a real tritonserver: the ensemble's answers, what it refuses, and the batches around that."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import LIMIT_S, wait_until
from trtdeploy.engine import Engine
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

grpc = pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

TOP_K = 3
BATCH = 4


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A pipeline whose batches are complete with four images, and models with several contexts."""
    repository = tmp_path_factory.mktemp("pipeline") / "models"
    package_pipeline(qdq_plan.path, repository, "digits", top_k=TOP_K)
    for part in ("preprocess", "postprocess"):
        path = repository / f"digits_{part}" / "config.pbtxt"
        waiting = "dynamic_batching {\n  preferred_batch_size: 4\n  max_queue_delay_microseconds: 100000\n"
        path.write_text(path.read_text().replace("dynamic_batching {\n", waiting))
    package(qdq_plan.path, repository, "several", options=PackageOptions(contexts=3))
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    connection = grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def engine(qdq_plan: Plan) -> Iterator[Engine]:
    with Engine.load(qdq_plan.path) as loaded:
        yield loaded


def picture(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def png(side: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims ``side`` x ``side`` pixels, of these chunks."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


def zeros(count: int) -> bytes:
    return zlib.compress(b"\0" * count)


def ask(client: Any, files: list[bytes]) -> tuple[Any, Any]:
    tensor = grpc.InferInput("image", [len(files), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(files, object).reshape(-1, 1))
    answer = client.infer("digits_pipeline", [tensor], client_timeout=LIMIT_S)
    return answer.as_numpy("labels"), answer.as_numpy("probabilities")


def expected(engine: Engine, plan: Plan, files: list[bytes]) -> tuple[Array, Array]:
    preprocessing, labels = plan.manifest.preprocessing, plan.manifest.labels
    assert preprocessing is not None
    assert labels is not None
    logits = engine.infer({"input": preprocessing(files)})["logits"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1)[:, :TOP_K]
    return np.array(labels)[best], np.take_along_axis(probabilities, best, axis=1)


def test_files_of_several_sizes_and_kinds_in_one_request(client: Any, engine: Engine, qdq_plan: Plan) -> None:
    files = [picture(1), picture(2, (20, 300), "PNG"), picture(3, (32, 32), "PNG")]
    labels, probabilities = ask(client, files)
    names, values = expected(engine, qdq_plan, files)
    assert labels.astype(str).tolist() == names.tolist()
    np.testing.assert_allclose(probabilities, values, rtol=1e-4)
    assert probabilities.dtype == np.float32


BAD = {
    "bomb": (png(60000, (b"IDAT", zeros(1000))), "3600000000 pixels"),
    "bomb-in-text": (png(32, (b"zTXt", b"a\0\0" + zeros(64 << 20))), "cannot be decoded: Decompressed data too large"),
    "truncated": (picture(4, (200, 200))[:5000], "cannot be decoded: .*truncated"),
    "no image": (b"GET / HTTP/1.1\r\n", "16 bytes are no JPEG, PNG"),
    "empty": (b"", "0 bytes are no JPEG, PNG"),
    "too large": (b"\xff" * ((64 << 20) + 1), "67108865 bytes is too large; at most"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gets_its_error_and_the_others_of_its_batch_their_labels(
    kind: str, client: Any, engine: Engine, qdq_plan: Plan
) -> None:
    content, words = BAD[kind]
    requests = [[picture(10)], [picture(11)], [content], [picture(12)]]

    def outcome(files: list[bytes]) -> Any:
        try:
            return ask(client, files)[0]
        except grpc.InferenceServerException as error:
            return error

    with ThreadPoolExecutor(BATCH) as threads:
        answers = list(threads.map(outcome, requests))
    with pytest.raises(grpc.InferenceServerException, match=f"Image 1 of 1: .*{words}"):
        raise answers[2]
    for index in (0, 1, 3):
        assert answers[index].astype(str).tolist() == expected(engine, qdq_plan, requests[index])[0].tolist()
    with pytest.raises(grpc.InferenceServerException, match=f"Image 2 of 2: .*{words}"):
        ask(client, [picture(13), content])


def infer(client: Any, batch: Array, model: str = "several") -> Any:
    tensor = grpc.InferInput("input", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch)
    return client.infer(model, [tensor], client_timeout=LIMIT_S).as_numpy("logits")


def test_a_model_with_several_contexts_gives_each_request_its_own_answer(client: Any, engine: Engine) -> None:
    generator = np.random.default_rng(5)
    requests = [generator.standard_normal((1 + number % 3, 3, 32, 32)).astype(np.float32) for number in range(200)]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda batch: infer(client, batch), requests))
    for batch, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4)


def test_what_clients_cancel_does_not_harm_what_they_wait_for(client: Any, engine: Engine) -> None:
    batch = np.random.default_rng(6).standard_normal((32, 3, 32, 32)).astype(np.float32)
    tensor = grpc.InferInput("input", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch)
    errors: list[Any] = []
    done = threading.Semaphore(0)

    def keep(result: Any, error: Any) -> None:
        errors.append(error)
        done.release()

    calls = [client.async_infer("several", [tensor], keep) for _ in range(40)]
    for call in calls[1:]:
        call.cancel()
    wait_until(lambda: len(errors) == len(calls), "every call has ended")
    cancelled = [error for error in errors if error is not None]
    assert cancelled
    assert all("ancel" in str(error) for error in cancelled)
    np.testing.assert_allclose(infer(client, batch), engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4)
