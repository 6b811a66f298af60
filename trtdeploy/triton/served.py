"""A served classifier as a target of validation."""

from __future__ import annotations

import threading
from collections import Counter

from trtdeploy.errors import UsageError
from trtdeploy.tensors import Array
from trtdeploy.triton.client import InferenceClient
from trtdeploy.validation.target import ServerTotals, Target


class ServedTarget(Target):
    """A model on a Triton server.

    Args:
        client: The connection.
        model: Model name.
        version: Version to ask; if empty, the server chooses for every request, as it does for most clients.

    Raises:
        ServerError: The server does not answer, or has no such model.
        UsageError: The model is no classifier: it has more than one input or output.
    """

    stage = "served"

    def __init__(self, client: InferenceClient, model: str, version: str = "") -> None:
        self._client = client
        self._model = client.describe(model, version)
        if len(self._model.inputs) != 1 or len(self._model.outputs) != 1:
            raise UsageError(
                f"{model} has {len(self._model.inputs)} inputs and {len(self._model.outputs)} outputs; "
                "a classifier has one of each."
            )
        self.name = model
        self.version = self._model.version
        self.input = self._model.inputs[0]
        self.max_batch_size = self._model.max_batch_size or None
        self.preprocessing = self._model.preprocessing
        self.labels = self._model.labels
        self.source = {"server": client.url, "model": model, "version": self._model.version}
        self.timeout_s = client.timeout_s
        self.instances = self._model.instances
        self._any_version = not version
        self._answered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def scores(self, batch: Array) -> Array:
        reply = self._client.request(self._model, {self.input.name: batch}, any_version=self._any_version)
        with self._lock:
            self._answered[reply.version] += len(batch)
        return reply.outputs[self._model.outputs[0].name]

    def answered_by(self) -> Counter[str]:
        with self._lock:
            return Counter(self._answered)

    def server_totals(self) -> ServerTotals | None:
        if set(self.answered_by()) - {self.version}:
            return None  # versions were exchanged meanwhile: one version's sums do not tell where the time went
        stats = self._client.statistics(self._model)

        def total_ns(part: str) -> int:
            return int(stats.get(part, {}).get("ns", 0))

        return ServerTotals(
            requests=int(stats.get("success", {}).get("count", 0)),
            queue_ns=total_ns("queue"),
            input_ns=total_ns("compute_input"),
            infer_ns=total_ns("compute_infer"),
            output_ns=total_ns("compute_output"),
        )
