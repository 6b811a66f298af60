"""PyTriton serving an ONNX file with ONNX Runtime, until it is ended: the peer of ``benchmarks.serving_throughput``.

Arguments: MODEL.onnx NAME MAX_BATCH THREADS INSTANCES HTTP_PORT GRPC_PORT METRICS_PORT
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig


def main() -> None:
    """Serve until SIGTERM."""
    onnx, name, max_batch, threads, instances, http, grpc, metrics = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    # threads that spin would take the processor from the other instances
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [
        onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"]) for _ in range(int(instances))
    ]
    (given,), (made,) = sessions[0].get_inputs(), sessions[0].get_outputs()

    def answering(session: Any) -> Any:
        @batch
        def infer(**inputs: Any) -> dict[str, Any]:
            return {made.name: session.run(None, inputs)[0]}

        return infer

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = TritonConfig(
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        metrics_address="127.0.0.1",
        http_port=int(http),
        grpc_port=int(grpc),
        metrics_port=int(metrics),
    )
    # no restriction: perf_analyzer reads the model's config and statistics
    with Triton(config=config, security_config=TritonSecurityConfig(restricted_endpoints=[])) as triton:
        triton.bind(
            name,
            infer_func=[answering(session) for session in sessions],
            inputs=[Tensor(name=given.name, dtype=np.float32, shape=tuple(given.shape[1:]))],
            outputs=[Tensor(name=made.name, dtype=np.float32, shape=tuple(made.shape[1:]))],
            config=ModelConfig(max_batch_size=int(max_batch), batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
