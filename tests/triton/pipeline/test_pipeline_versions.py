"""A pipeline on a real tritonserver whose inner model is published anew and promoted while clients send it images."""

from __future__ import annotations

import io
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.plan import Plan
from trtdeploy.tensors import ShapeRange
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.differences.drift import find_drift
from trtdeploy.triton.repository.live_promotion import promote_live
from trtdeploy.triton.repository.versions import publish
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

grpc = pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")


def negated_plan(qdq_onnx: Path, folder: Path) -> Path:
    """The plan of the same classifier with the opposite scores."""
    model = onnx.load(qdq_onnx)
    model.graph.node[-1].output[0] = "positive"
    model.graph.node.append(helper.make_node("Neg", ["positive"], ["logits"]))
    onnx.save(model, folder / "negated.onnx")
    shapes = ShapeRange(min=(1, 3, 32, 32), opt=(1, 3, 32, 32), max=(32, 3, 32, 32))
    config = BuildConfig(profiles=({"input": shapes},), timing_rounds=1)
    return build(folder / "negated.onnx", folder / "negated.plan", config).path


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class Senders:
    """Threads that send one image without pause, and count the answers by their best label."""

    def __init__(self, url: str, count: int = 3) -> None:
        self._address = url.removeprefix("grpc://")
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(count)]
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []

    def __enter__(self) -> Senders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for(self, more: int) -> None:
        """Wait until so many further images have been answered, or one has not."""
        enough = sum(self.answers.values()) + more
        while sum(self.answers.values()) < enough and not self.failures:
            assert not self._ending.wait(0.01)

    def _send(self) -> None:
        client = grpc.InferenceServerClient(self._address, channel_args=[("grpc.enable_http_proxy", 0)])
        tensor = grpc.InferInput("image", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[picture()]], object))
        while not self._ending.is_set():
            try:
                labels = client.infer("m_pipeline", [tensor], client_timeout=30).as_numpy("labels")
            except grpc.InferenceServerException as error:
                self.failures.append(str(error))
                return
            self.answers[labels[0, 0].decode()] += 1
        client.close()


def test_no_image_is_lost_while_the_inner_model_changes(qdq_plan: Plan, qdq_onnx: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    package_pipeline(qdq_plan.path, repository, "m")
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(
        repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=options
    ) as server:
        publish(negated_plan(qdq_onnx, tmp_path), repository, "m")
        with Senders(server.grpc_url) as senders:
            senders.wait_for(20)
            (first,) = senders.answers
            promote_live(repository, "m", url=server.http_url)
            senders.answers.clear()
            senders.wait_for(20)
            promote_live(repository, "m", url=server.http_url, step="rollback")
            senders.wait_for(20)
        assert senders.failures == []
        assert len(senders.answers) == 2
        assert senders.answers[first] >= 10  # the first version is back
        assert find_drift(repository, server.http_url) == []
