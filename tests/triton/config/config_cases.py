"""A config that Triton takes, and changes to it; each is also shown to a real server beside it."""

from __future__ import annotations

from pathlib import Path

MODEL = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]))
        return answers
"""
X = 'input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }'
X3 = 'input { name: "x" data_type: TYPE_FP32 dims: [ 1, 2, 2 ] %s }'
Y = 'output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }'
HEAD = 'backend: "python" max_batch_size: 8'
BASE = f"{HEAD} {X} {Y}"
WARM = 'model_warmup { name: "w" batch_size: %s inputs { key: "x" value { data_type: %s dims: [ %s ] %s } } }'
STEP = (
    'step { model_name: "plain" model_version: -1 input_map { key: "x" value: "%s" } '
    'output_map { key: "y" value: "%s" } }'
)
ENSEMBLE = f'platform: "ensemble" max_batch_size: 8 {X} {Y} ensemble_scheduling {{ %s }}'
POLICY = "default_queue_policy { timeout_action: %s default_timeout_microseconds: %s }"
START = 'control_input { name: "s" control { kind: CONTROL_SEQUENCE_START %s } }'

GOOD = {
    "base": BASE,
    "preferred": BASE + " dynamic_batching { preferred_batch_size: [ 2, 8 ] max_queue_delay_microseconds: 100 }",
    "priorities": BASE + " dynamic_batching { priority_levels: 3 default_priority_level: 2 priority_queue_policy "
    "{ key: 1 value { timeout_action: DELAY default_timeout_microseconds: 5 max_queue_size: 9 } } }",
    "ordering": BASE + f" dynamic_batching {{ preserve_ordering: true {POLICY % ('REJECT', 5)} }}",
    "instances": BASE + " instance_group { count: 2 kind: KIND_CPU rate_limiter { priority: 2 } }",
    "resources": BASE + ' instance_group { kind: KIND_CPU rate_limiter { resources { name: "r" count: 2 } } }',
    "cache": BASE + " response_cache { enable: true }",
    "reshape": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] reshape {{ shape: [ 2, 2 ] }} }} {Y}',
    "warm-up": BASE + WARM % (1, "TYPE_FP32", 4, "zero_data: true"),
    "warm-up-batch": BASE + WARM % (8, "TYPE_FP32", 4, "random_data: true"),
    "policy": BASE + " version_policy { specific { versions: [ 1 ] } }",
    "all": BASE + " version_policy { all { } }",
    "sequence": BASE + " sequence_batching { " + START % "int32_false_true: [ 0, 1 ]" + " }",
    "dynamic-dims": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }} {Y}',
    "no-batch": f'backend: "python" {X} {Y}',
    "decoupled": BASE + " model_transaction_policy { decoupled: true }",
    "ensemble": ENSEMBLE % (STEP % ("x", "y")),
    "chain": ENSEMBLE % (STEP % ("x", "m") + STEP % ("m", "y")),
}

BAD = {
    "unknown-field": BASE + " max_batches: 3",
    "unknown-nested": BASE + " dynamic_batching { delay: 3 }",
    "garbage": BASE + " {{",
    "not-an-enum": BASE.replace("TYPE_FP32", "FP32"),
    "name-of-another": BASE + ' name: "another"',
    "no-type": f'{HEAD} input {{ name: "x" dims: [ 4 ] }} {Y}',
    "no-dims": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 }} {Y}',
    "no-name": f"{HEAD} input {{ data_type: TYPE_FP32 dims: [ 4 ] }} {Y}",
    "dim-0": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 0 ] }} {Y}',
    "dim--2": f'{HEAD} {X} output {{ name: "y" data_type: TYPE_FP32 dims: [ -2 ] }}',
    "format": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] format: FORMAT_NHWC }} {Y}',
    "shape-tensor": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] is_shape_tensor: true }} {Y}',
    "non-linear": f"{HEAD} {X3 % 'is_non_linear_format_io: true'} {Y}",
    "reshape-0": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] reshape {{ shape: [ 0 ] }} }} {Y}',
    "reshape-other": f'{HEAD} input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] reshape {{ shape: [ 3 ] }} }} {Y}',
    "reshape-empty": f'backend: "python" input {{ name: "x" data_type: TYPE_FP32 dims: [ 1 ] reshape {{ }} }} {Y}',
    "reshape-dynamic": f"{HEAD} {X3 % 'reshape { shape: [ 4, -1 ] }'} {Y}",
    "batch-negative": f'backend: "python" max_batch_size: -1 {X} {Y}',
    "batch-text": f'backend: "python" max_batch_size: "8" {X} {Y}',
    "batch-huge": f'backend: "python" max_batch_size: 3000000000 {X} {Y}',
    "preferred-0": BASE + " dynamic_batching { preferred_batch_size: [ 0 ] }",
    "preferred-large": BASE + " dynamic_batching { preferred_batch_size: [ 9 ] }",
    "preferred-negative": BASE + " dynamic_batching { preferred_batch_size: [ -1 ] }",
    "preferred-no-batch": f'backend: "python" {X} {Y} dynamic_batching {{ preferred_batch_size: [ 2 ] }}',
    "delay-negative": BASE + " dynamic_batching { max_queue_delay_microseconds: -1 }",
    "timeout-negative": BASE + f" dynamic_batching {{ {POLICY % ('REJECT', -5)} }}",
    "timeout-action": BASE + f" dynamic_batching {{ {POLICY % ('DROP', 5)} }}",
    "queue-size": BASE + " dynamic_batching { default_queue_policy { max_queue_size: -1 } }",
    "priority-default": BASE + " dynamic_batching { priority_levels: 3 default_priority_level: 4 }",
    "priority-none": BASE + " dynamic_batching { priority_levels: 3 }",
    "priority-policy": BASE + " dynamic_batching { priority_levels: 3 default_priority_level: 1 priority_queue_policy "
    "{ key: 4 value { } } }",
    "ordering-levels": BASE
    + " dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
    "ordering-delay": BASE + f" dynamic_batching {{ preserve_ordering: true {POLICY % ('DELAY', 5)} }}",
    "two-batchers": BASE + " dynamic_batching { } sequence_batching { }",
    "gpu": BASE + " instance_group { kind: KIND_GPU }",
    "cpu-gpus": BASE + " instance_group { kind: KIND_CPU gpus: [ 0 ] }",
    "model-gpus": BASE + " instance_group { kind: KIND_MODEL gpus: [ 0 ] }",
    "profile": BASE + ' instance_group { kind: KIND_CPU profile: "0" }',
    "kind": BASE + " instance_group { kind: KIND_TPU }",
    "count-text": BASE + " instance_group { count: two }",
    "platform": BASE + ' platform: "tensorrt_plan"',
    "platform-onnx": BASE + ' platform: "onnxruntime_onnx"',
    "backend": BASE.replace('"python"', '"pyton"'),
    "file": BASE + ' default_model_filename: "absent.py"',
    "labels": BASE.replace("dims: [ 4 ] }", 'dims: [ 4 ] label_filename: "absent.txt" }').replace(
        'label_filename: "absent.txt" } output', "} output"
    ),
    "policy-absent": BASE + " version_policy { specific { versions: [ 7 ] } }",
    "policy-two": BASE + " version_policy { all { } latest { num_versions: 1 } }",
    "policy-latest-0": BASE + " version_policy { latest { num_versions: 0 } }",
    "policy-negative": BASE + " version_policy { latest { num_versions: -1 } }",
    "resource-name": BASE + " instance_group { kind: KIND_CPU rate_limiter { resources { count: -1 } } }",
    "resource-0": BASE + ' instance_group { kind: KIND_CPU rate_limiter { resources { name: "r" count: 0 } } }',
    "cache-decoupled": BASE + " response_cache { enable: true } model_transaction_policy { decoupled: true }",
    "cache-sequence": BASE + " response_cache { enable: true } sequence_batching { }",
    "warm-up-type": BASE + WARM % (1, "TYPE_INT32", 4, "zero_data: true"),
    "warm-up-dims": BASE + WARM % (1, "TYPE_FP32", 5, "zero_data: true"),
    "warm-up-rank": BASE + WARM % (1, "TYPE_FP32", "1, 4", "zero_data: true"),
    "warm-up-batch": BASE + WARM % (9, "TYPE_FP32", 4, "zero_data: true"),
    "warm-up-negative": BASE + WARM % (-1, "TYPE_FP32", 4, "zero_data: true"),
    "warm-up-dynamic": BASE + WARM % (1, "TYPE_FP32", -1, "zero_data: true"),
    "warm-up-file": BASE + WARM % (1, "TYPE_FP32", 4, 'input_data_file: "absent"'),
    "warm-up-small": BASE + WARM % (1, "TYPE_FP32", 4, 'input_data_file: "three-bytes"'),
    "warm-up-name": BASE + (WARM % (1, "TYPE_FP32", 4, "zero_data: true")).replace('key: "x"', 'key: "z"'),
    "warm-up-nothing": BASE + ' model_warmup { name: "w" batch_size: 1 }',
    "warm-up-no-data": BASE + WARM % (1, "TYPE_FP32", 4, ""),
    "sequence-no-name": BASE
    + " sequence_batching { "
    + START.replace('"s"', '""') % "int32_false_true: [ 0, 1 ]"
    + " }",
    "sequence-values": BASE + " sequence_batching { " + START % "int32_false_true: [ 0 ]" + " }",
    "sequence-none": BASE + " sequence_batching { " + START % "" + " }",
    "sequence-both": BASE
    + " sequence_batching { "
    + START % "int32_false_true: [ 0, 1 ] fp32_false_true: [ 0, 1 ]"
    + " }",
    "sequence-twice": BASE + " sequence_batching { " + (START % "int32_false_true: [ 0, 1 ]") * 2 + " }",
    "sequence-slot": BASE + " sequence_batching { direct { minimum_slot_utilization: 2 } }",
    "sequence-oldest": BASE
    + " sequence_batching { oldest { max_candidate_sequences: 4 preferred_batch_size: [ 9 ] } }",
    "batch-input": BASE + ' batch_input { kind: BATCH_ELEMENT_COUNT target_name: "b" data_type: TYPE_FP32 }',
    "batch-input-type": BASE + ' batch_input { kind: BATCH_ELEMENT_COUNT target_name: "b" data_type: TYPE_INT8 '
    'source_input: "x" }',
    "batch-input-source": BASE + ' batch_input { kind: BATCH_ELEMENT_COUNT target_name: "b" data_type: TYPE_FP32 '
    'source_input: "z" }',
    "batch-output": BASE + ' batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "z" source_input: "x" }',
    "ensemble-no-steps": ENSEMBLE % "",
    "ensemble-no-scheduling": f'platform: "ensemble" max_batch_size: 8 {X} {Y}',
    "ensemble-cycle": ENSEMBLE % (STEP % ("m", "n") + STEP % ("n", "m") + STEP % ("x", "y")),
    "ensemble-absent-model": ENSEMBLE % (STEP % ("x", "y")).replace("plain", "absent"),
    "ensemble-no-model": ENSEMBLE % (STEP % ("x", "y")).replace("plain", ""),
    "ensemble-unused-input": ENSEMBLE % (STEP % ("x", "y")) + ' input { name: "z" data_type: TYPE_FP32 dims: [ 4 ] }',
    "ensemble-unwritten": ENSEMBLE % (STEP % ("x", "m")),
    "ensemble-twice": ENSEMBLE % (STEP % ("x", "y") + STEP % ("x", "y")),
    "ensemble-type": (ENSEMBLE % (STEP % ("x", "y"))).replace("TYPE_FP32", "TYPE_INT32"),
    "ensemble-dims": (ENSEMBLE % (STEP % ("x", "y"))).replace("dims: [ 4 ]", "dims: [ 5 ]"),
    "ensemble-batch": (ENSEMBLE % (STEP % ("x", "y"))).replace("max_batch_size: 8", "max_batch_size: 9"),
    "ensemble-input-name": ENSEMBLE % (STEP % ("x", "y")).replace('key: "x"', 'key: "w"'),
    "ensemble-instances": ENSEMBLE % (STEP % ("x", "y")) + " instance_group { count: 1 }",
    "ensemble-warm-up": ENSEMBLE % (STEP % ("x", "y")) + WARM % (1, "TYPE_FP32", 4, "zero_data: true"),
    "ensemble-optimization": ENSEMBLE % (STEP % ("x", "y")) + " optimization { }",
    "ensemble-backend": 'backend: "python" ' + ENSEMBLE % (STEP % ("x", "y")),
    "scheduling-without-platform": BASE + f" ensemble_scheduling {{ {STEP % ('x', 'y')} }}",
    "metrics": BASE + " model_metrics { metric_control { } }",
}


def write_model(repository: Path, name: str, config: str) -> Path:
    """A model of one version with this config."""
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "warmup").mkdir(exist_ok=True)
    (folder / "warmup" / "three-bytes").write_bytes(b"abc")
    (folder / "1" / "model.py").write_text(MODEL)
    (folder / "config.pbtxt").write_text(config)
    return folder
