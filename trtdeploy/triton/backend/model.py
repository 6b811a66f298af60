"""Serves a trtdeploy plan with Triton's Python backend. `trtdeploy package` copies this file to <model>/<version>/."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trtdeploy import Engine
from trtdeploy.engine.batching import fastest_batch
from trtdeploy.plan import read_manifest
from trtdeploy.runtimes.config import LoadOptions

# To ask whether a client has cancelled takes messages to the server and back, 0.2 ms of the processor's time for each
# request. Triton itself drops what is cancelled while it waits in its queue.
LONG_RUN_S = 0.05


class TritonPythonModel:
    """One instance of the model: an engine, run once for all the requests that Triton has batched.

    With one context, ``execute`` returns the answers, so that Triton's statistics hold the computing time. With more,
    it hands a batch to a free context and returns: the next batch forms and starts meanwhile. Every answer is sent when
    it is there, by a thread that computes nothing: sending waits for the server. Triton's statistics then count the
    handing over only.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the plan that lies beside this file."""
        config = json.loads(args["model_config"])
        self.contexts = contexts = int(config["parameters"]["trtdeploy.contexts"]["string_value"])
        # Triton says which GPU an instance is for; the model has to go there by itself
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        plan = Path(__file__).with_name("engine.plan")
        # the instances of a model share the processor, each a process of its own
        instances = sum(int(group["count"]) for group in config["instance_group"])
        tactic = read_manifest(plan).tactic
        threads = tactic.threads_each(instances * contexts) if tactic else None
        options = LoadOptions(device=device, threads=threads)
        self.engine = Engine.load(plan, contexts=contexts, timeout_s=None, options=options)
        self.names = [spec.name for spec in self.engine.inputs]
        self.max_batch_size = int(config["max_batch_size"])
        profiles = [profile.values() for profile in self.engine.manifest.profiles if profile]
        largest = [min(shapes.max[0] for shapes in profile) for profile in profiles]
        self.largest_batch = max(largest) if largest and self.max_batch_size else self.max_batch_size
        self.sharing = 1
        if self.engine.manifest.device.kind == "cpu":
            # several contexts use a processor better than one large batch does: they share what has been batched
            self.sharing = contexts
            self.largest_batch = fastest_batch(self.engine, self.largest_batch)
        self.free_contexts = threading.Semaphore(contexts) if contexts > 1 else None
        self.last_run_s = math.inf
        self.answering = ThreadPoolExecutor(contexts, thread_name_prefix="answering")

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answer every request; one that fails, or that its client has cancelled, does not take others with it."""
        free = self.free_contexts
        asked = [Asked(request, self.names, later=free is not None) for request in requests]
        for part in self.parts(asked):
            if free is None:
                self.run(part)
            else:
                free.acquire()
                self.start(part, free.release)
        return [one.response for one in asked] if free is None else None

    def parts(self, asked: list["Asked"]) -> Iterator[list["Asked"]]:
        """Group requests, in their order, into what one run of the engine can and should take."""
        share = -(-sum(one.samples for one in asked) // self.sharing)
        most = min(self.largest_batch, share)
        part: list[Asked] = []
        samples = 0
        for one in asked:
            if part and samples + one.samples > most:
                yield part
                part, samples = [], 0
            part.append(one)
            samples += one.samples
        yield part

    def run(self, part: list["Asked"]) -> None:
        """Run requests together, here and now, without a copy of a single one's arrays."""
        part = self.wanted(part)
        if part:
            begun = time.monotonic()
            self.answer(part, lambda: self.engine.infer(self.joined(part)))
            self.last_run_s = time.monotonic() - begun

    def start(self, part: list["Asked"], done: Callable[[], None]) -> None:
        """Begin to run requests together; ``done`` is called when they have been answered."""
        part = self.wanted(part)
        begun = time.monotonic()
        try:
            # the arrays of a request stay as they are until it has been answered
            future = self.engine.submit(self.joined(part), copy=False) if part else None
        except Exception:  # one of them is bad, or they do not join
            self.answer_alone(part)
            future = None
        if future is None:
            done()
            return

        def finish(future: Future[dict[str, Any]]) -> None:
            self.last_run_s = time.monotonic() - begun
            self.answering.submit(self.answer, part, future.result)
            done()

        future.add_done_callback(finish)

    def wanted(self, part: list["Asked"]) -> list["Asked"]:
        """Leave out what clients have cancelled, where a run takes so long that asking is worth it."""
        if self.last_run_s < LONG_RUN_S:
            return part
        return [one for one in part if not one.is_cancelled()]

    def joined(self, part: list["Asked"]) -> dict[str, Any]:
        """Return the arrays of all requests as one batch."""
        if len(part) == 1:
            return part[0].arrays
        return {name: np.concatenate([one.arrays[name] for one in part]) for name in self.names}

    def answer(self, part: list["Asked"], outcome: Callable[[], dict[str, Any]]) -> None:
        """Cut the outputs apart again and answer each request, whatever happens."""
        try:
            outputs = outcome()
            ends = np.cumsum([one.samples for one in part])
            if len(part) > 1 and any(len(output) != ends[-1] for output in outputs.values()):
                raise ValueError("an output has not one row per sample: it cannot be cut apart")
        except Exception as error:
            if len(part) > 1:
                self.answer_alone(part)
            else:
                part[0].fail(str(error))
            return
        if len(part) == 1:
            part[0].answer(outputs)
            return
        pieces = {name: np.split(output, ends[:-1]) for name, output in outputs.items()}
        for index, one in enumerate(part):
            one.answer({name: piece[index] for name, piece in pieces.items()})

    def answer_alone(self, part: list["Asked"]) -> None:
        """Run each request by itself: the one that cannot be run gets its error, the others their outputs."""
        for one in part:
            self.answer([one], partial(self.engine.infer, one.arrays))

    def finalize(self) -> None:
        """Send what is left to answer, and release the engine."""
        if self.free_contexts is not None:
            for _ in range(self.contexts):
                self.free_contexts.acquire()
        self.answering.shutdown()
        self.engine.close()


class Asked:
    """A request: its arrays, which lie in the memory that Triton shares, and what becomes of it."""

    def __init__(self, request: Any, names: list[str], *, later: bool) -> None:
        self.request = request
        self.sender = request.get_response_sender() if later else None
        self.arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        self.samples = len(self.arrays[names[0]])
        self.response: Any = None

    def is_cancelled(self) -> bool:
        """Say whether the client has cancelled the request; if so, it has been answered."""
        if not self.request.is_cancelled():
            return False
        error = pb_utils.TritonError("The client has cancelled the request.", pb_utils.TritonError.CANCELLED)
        self.respond(pb_utils.InferenceResponse(error=error))
        return True

    def answer(self, outputs: dict[str, Any]) -> None:
        """Answer with outputs."""
        self.respond(pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in outputs.items()]))

    def fail(self, message: str) -> None:
        """Answer with an error."""
        self.respond(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)))

    def respond(self, response: Any) -> None:
        """Keep a response for ``execute``, or send it."""
        self.response = response
        if self.sender is not None:
            self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
