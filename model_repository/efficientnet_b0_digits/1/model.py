"""Serves a trtdeploy plan with Triton's Python backend. `trtdeploy package` copies this file to <model>/<version>/."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trtdeploy import Engine, TrtDeployError


class TritonPythonModel:
    """One instance of the model: an engine, run once for all the requests that Triton has batched."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the plan that lies beside this file."""
        config = json.loads(args["model_config"])
        contexts = int(config["parameters"]["trtdeploy.contexts"]["string_value"])
        self.batched = int(config["max_batch_size"]) > 0
        self.engine = Engine.load(Path(__file__).with_name("engine.plan"), contexts=contexts)
        self.names = [spec.name for spec in self.engine.inputs]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; one that fails does not take the others with it."""
        inputs = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names}
            for request in requests
        ]
        if self.batched and len(requests) > 1:
            try:
                return self.respond_to_batch(inputs)
            except TrtDeployError:
                pass  # one of the requests is bad; alone, each gets its own answer
        return [self.respond(arrays) for arrays in inputs]

    def respond_to_batch(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """Run all requests as one batch and cut the outputs apart again."""
        batch = {name: np.concatenate([arrays[name] for arrays in inputs]) for name in self.names}
        ends = np.cumsum([len(arrays[self.names[0]]) for arrays in inputs])[:-1]
        parts = {name: np.split(output, ends) for name, output in self.engine.infer(batch).items()}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, parts[name][index]) for name in parts])
            for index in range(len(inputs))
        ]

    def respond(self, arrays: dict[str, Any]) -> Any:
        """Run one request alone."""
        try:
            outputs = self.engine.infer(arrays)
        except TrtDeployError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in outputs.items()])

    def finalize(self) -> None:
        """Release the engine."""
        self.engine.close()
