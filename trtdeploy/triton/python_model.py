"""Serves a trtdeploy plan with Triton's Python backend. `trtdeploy package` copies this file to <model>/<version>/."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trtdeploy import Engine, TrtDeployError
from trtdeploy.runtimes.config import LoadOptions


class TritonPythonModel:
    """One instance of the model: an engine, run once for all the requests that Triton has batched."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the plan that lies beside this file."""
        config = json.loads(args["model_config"])
        contexts = int(config["parameters"]["trtdeploy.contexts"]["string_value"])
        self.batched = int(config["max_batch_size"]) > 0
        # Triton says which GPU an instance is for; the model has to go there by itself
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        plan = Path(__file__).with_name("engine.plan")
        self.engine = Engine.load(plan, contexts=contexts, options=LoadOptions(device=device))
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
            except (TrtDeployError, ValueError):
                pass  # one of the requests is bad, or they do not join; alone, each gets its own answer
        return [self.respond(arrays) for arrays in inputs]

    def respond_to_batch(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """Run all requests as one batch and cut the outputs apart again."""
        batch = {name: np.concatenate([arrays[name] for arrays in inputs]) for name in self.names}
        ends = np.cumsum([len(arrays[self.names[0]]) for arrays in inputs])
        outputs = self.engine.infer(batch)
        if any(len(output) != ends[-1] for output in outputs.values()):
            raise ValueError("an output has not one row per sample: it cannot be cut apart")
        parts = {name: np.split(output, ends[:-1]) for name, output in outputs.items()}
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
