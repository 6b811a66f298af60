"""A served classifier as a target of validation."""

from __future__ import annotations

import threading
from collections import Counter

from trtdeploy.errors import UsageError
from trtdeploy.tensors import Array
from trtdeploy.triton.client import InferenceClient, LoopedClient, Reply, ServedModel
from trtdeploy.validation.target import ServerTotals, Target, scores_per_sample

Client = InferenceClient | LoopedClient
"""What a target can be asked through."""


class ServedTarget(Target):
    """A model on a Triton server.

    Args:
        client: The connection.
        model: Model name, or what the server has said of it.
        version: Version to ask; if empty, the server chooses for every request, as it does for most clients.

    Raises:
        ServerError: The server does not answer, or has no such model.
        UsageError: The model is no classifier: it has more than one input or output.

    Attributes:
        model: What the server has said of it.
    """

    stage = "served"

    def __init__(self, client: Client, model: str | ServedModel, version: str = "") -> None:
        self._client = client
        if isinstance(model, str):
            model = client.describe(model, version)
            check_classifier(model)
        if model.decoupled:
            raise UsageError(f"{model.name} may answer a request any number of times; a classifier answers once.")
        self.model = model
        self.name = model.name
        self.version = model.version
        self.input = model.inputs[0]
        self.max_batch_size = model.max_batch_size or None
        self.preprocessing = model.preprocessing
        self.labels = model.labels
        self.score_count = scores_per_sample(model.outputs[0])
        self.source = {
            "server": client.url,
            "transport": client.transport,
            "model": model.name,
            "version": model.version,
        }
        self.timeout_s = client.timeout_s
        self.instances = model.instances
        self.loop = client.loop if isinstance(client, LoopedClient) else None
        self._any_version = not version
        self._answered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def scores(self, batch: Array) -> Array:
        reply = self._client.request(self.model, {self.input.name: batch}, any_version=self._any_version)
        return self._counted(reply, len(batch))

    async def awaited_scores(self, batch: Array) -> Array:
        if not isinstance(self._client, LoopedClient):
            return await super().awaited_scores(batch)
        reply = await self._client.client.request(self.model, {self.input.name: batch}, any_version=self._any_version)
        return self._counted(reply, len(batch))

    def answered_by(self) -> Counter[str]:
        with self._lock:
            return Counter(self._answered)

    def server_totals(self) -> ServerTotals | None:
        if set(self.answered_by()) - {self.version}:
            return None  # versions were exchanged meanwhile: one version's sums do not tell where the time went
        stats = self._client.statistics(self.model)

        def total_ns(part: str) -> int:
            return int(stats.get(part, {}).get("ns", 0))

        return ServerTotals(
            requests=int(stats.get("success", {}).get("count", 0)),
            queue_ns=total_ns("queue"),
            input_ns=total_ns("compute_input"),
            infer_ns=total_ns("compute_infer"),
            output_ns=total_ns("compute_output"),
        )

    def _counted(self, reply: Reply, samples: int) -> Array:
        with self._lock:
            self._answered[reply.version] += samples
        return self._scores_of(reply)

    def _scores_of(self, reply: Reply) -> Array:
        return reply.outputs[self.model.outputs[0].name]


def check_classifier(model: ServedModel) -> None:
    """Refuse a model that is no classifier of tensors.

    Raises:
        UsageError: It has more than one input or output.
    """
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UsageError(
            f"{model.name} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; "
            "a classifier has one of each."
        )
