"""Turns logits into the best labels. `trtdeploy package --ensemble` copies this file to <model>_postprocess/1/."""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The classes of the highest probability (softmax of the logits), best first."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read labels and their number from the model's config."""
        config = json.loads(args["model_config"])
        self.labels = np.array(
            [label.encode() for label in json.loads(config["parameters"]["trtdeploy.labels"]["string_value"])], object
        )
        self.input = config["input"][0]["name"]
        self.count = int(config["output"][0]["dims"][0])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request."""
        return [self.respond(pb_utils.get_input_tensor_by_name(request, self.input).as_numpy()) for request in requests]

    def respond(self, logits: Any) -> Any:
        """Answer one request; logits that are not finite have no probabilities."""
        logits = logits.astype(np.float32)
        if not np.isfinite(logits).all():
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError("The model gave values that are not finite: no class can be chosen.")
            )
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        # stable: of equal classes the first is the better one, on every machine
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.count]
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("labels", self.labels[best]),
                pb_utils.Tensor("probabilities", np.take_along_axis(probabilities, best, axis=1)),
            ]
        )
