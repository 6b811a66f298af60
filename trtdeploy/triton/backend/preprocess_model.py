"""Turns image files into model input. `trtdeploy package --ensemble` copies this file to <model>_preprocess/1/."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trtdeploy import Preprocessing, TrtDeployError

LARGEST_FILE_BYTES = 64 << 20


class TritonPythonModel:
    """The preprocessing that the model was trained with, over the images of all requests at once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the specification from the model's config."""
        config = json.loads(args["model_config"])
        self.preprocessing = Preprocessing.from_json(config["parameters"]["trtdeploy.preprocessing"]["string_value"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        self.threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # Pillow decodes without the interpreter's lock

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; a bad image fails its own request only."""
        files = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().ravel() for request in requests]
        images = [self.threads.map(self.decode, request) for request in files]
        return [self.respond(list(results)) for results in images]

    def decode(self, content: bytes) -> Any:
        """Return one image as model input, or the error that it deserves."""
        try:
            if len(content) > LARGEST_FILE_BYTES:
                return f"A file of {len(content)} bytes is too large; at most {LARGEST_FILE_BYTES} are decoded."
            return self.preprocessing([content])
        except TrtDeployError as error:
            return str(error)
        except Exception as error:  # a decoder's own failure is still this image's alone
            return f"The image cannot be decoded: {type(error).__name__}: {error}."

    def respond(self, results: list[Any]) -> Any:
        """Answer one request with its batch, or with the first bad image's error."""
        for index, result in enumerate(results):
            if isinstance(result, str):
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(f"Image {index + 1} of {len(results)}: {result}")
                )
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.concatenate(results))])

    def finalize(self) -> None:
        """End the threads."""
        self.threads.shutdown()
