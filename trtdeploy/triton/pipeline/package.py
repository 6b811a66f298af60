"""Packaging a classifier with its pipeline: NAME_preprocess, NAME, NAME_postprocess, and the ensemble NAME_pipeline."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.errors import ModelError, RepositoryError
from trtdeploy.files import atomic_write, locked, sync_folder
from trtdeploy.onnxgraph.reading.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.plan import Manifest, read_manifest
from trtdeploy.triton import backend
from trtdeploy.triton.config import PackageOptions, config_text, make_config, schema
from trtdeploy.triton.pipeline.ensemble import Ensemble
from trtdeploy.triton.repository.history import HISTORY_FILE
from trtdeploy.triton.repository.layout import CONFIG_FILE, active_version, inside, read_config
from trtdeploy.triton.repository.package import PackagedModel, package

DEFAULT_TOP_K = 5
IMAGE = "image"
SOURCES = (*(backend.FOLDER / f"{part}_model.py" for part in ("preprocess", "postprocess")), None)
"""The code of the models around a classifier, in the order of ``make_pipeline``; an ensemble has none."""
_FLOATS = ("TYPE_FP32", "TYPE_FP16", "TYPE_FP64")


@dataclass(frozen=True)
class PackagedPipeline:
    """A model and the pipeline around it.

    Attributes:
        model: The packaged plan.
        pipeline: Name of the ensemble that clients ask: BYTES ``image`` in, ``labels`` and ``probabilities`` out.
    """

    model: PackagedModel
    pipeline: str


def package_pipeline(
    plan: str | Path,
    repository: str | Path,
    name: str,
    *,
    version: int | None = None,
    options: PackageOptions | None = None,
    top_k: int = DEFAULT_TOP_K,
) -> PackagedPipeline:
    """Package a classifier's plan, and the models that lead from an image file to labels.

    Every edge is checked before anything is written. The ensemble always runs the newest version of each model that
    the server has loaded. A pipeline that is there already is kept if it is the same, else replaced. Where the model is
    published, its new version is not served before it is promoted: the pipeline has to fit the one that is served, too.

    Args:
        plan: A plan whose manifest has a preprocessing specification.
        repository: The model repository; made if it is not there.
        name: Model name; the others are called after it.
        version: Version number of the model; the next free one if None.
        options: How the model shall be served; the defaults if None.
        top_k: How many labels the pipeline answers with; all of them if there are fewer.

    Raises:
        ModelError: The plan is no classifier of images, or two models do not fit together; the edge is named.
        RepositoryError: A published model takes smaller batches than the pipeline would send; or as for ``package``.
        TrtDeployError: What ``package`` raises.
    """
    manifest = read_manifest(plan)
    configs = make_pipeline(manifest, name, make_config(manifest, name, options or PackageOptions()), top_k)
    root = Path(repository)
    for config in configs:
        inside(root, root / config.name)
        _check_replaceable(root / config.name, config)
    _check_served(root / name, configs[-1])
    packaged = package(
        plan, root, name, version=version, options=options, replacing=[config.name for config in configs]
    )
    try:
        for config, source in zip(configs, SOURCES, strict=True):  # the ensemble last: it needs the others
            _write_model(root, config, source)
    except OSError as error:
        raise RepositoryError(f"The model repository {root} cannot be written: {error}.") from error
    return PackagedPipeline(packaged, configs[-1].name)


def make_pipeline(manifest: Manifest, name: str, model: Any, top_k: int) -> tuple[Any, Any, Any]:
    """Return the configs of preprocessing, postprocessing and the ensemble around a model's config.

    Raises:
        ModelError: See ``package_pipeline``.
    """
    if manifest.preprocessing is None:
        raise ModelError(
            f"The plan of {name} carries no preprocessing specification: nothing says how an image becomes its input.",
            hint="Export the model with one, or package it without --ensemble.",
        )
    if len(model.input) != 1 or len(model.output) != 1 or model.max_batch_size < 1:
        raise ModelError(
            f"{name} has {len(model.input)} inputs and {len(model.output)} outputs, and max_batch_size "
            f"{model.max_batch_size}; a pipeline needs one of each, and a dynamic batch.",
            hint="Package it without --ensemble.",
        )
    pb = schema()
    given, made = model.input[0], model.output[0]
    kind = pb.DataType.Name(made.data_type)
    if len(made.dims) != 1 or made.dims[0] < 1 or kind not in _FLOATS:
        raise ModelError(
            f"The output {name}.{made.name} is {kind.removeprefix('TYPE_')} {list(made.dims)}; labels need one row of "
            "floating-point scores with a fixed number of classes."
        )
    labels = manifest.labels if manifest.labels is not None else [str(index) for index in range(made.dims[0])]
    spec = manifest.preprocessing
    prepare = _python_model(pb, f"{name}_preprocess", model.max_batch_size)
    prepare.input.add(name=IMAGE, data_type=pb.TYPE_STRING, dims=[1])
    prepare.output.add(name="tensor", data_type=pb.TYPE_FP32, dims=spec.sample_shape)
    prepare.parameters[PREPROCESSING_KEY].string_value = spec.to_json()
    choose = _python_model(pb, f"{name}_postprocess", model.max_batch_size)
    choose.input.add(name="scores", data_type=made.data_type, dims=[len(labels)])
    count = min(top_k, len(labels))
    choose.output.add(name="labels", data_type=pb.TYPE_STRING, dims=[count])
    choose.output.add(name="probabilities", data_type=pb.TYPE_FP32, dims=[count])
    choose.parameters[LABELS_KEY].string_value = json.dumps(list(labels))
    ensemble = Ensemble(f"{name}_pipeline", max_batch_size=model.max_batch_size)
    ensemble.input(IMAGE, prepare.input[0])
    ensemble.step(prepare, takes={IMAGE: IMAGE}, gives={"tensor": "tensor"})
    ensemble.step(model, takes={given.name: "tensor"}, gives={made.name: "scores"})
    ensemble.step(choose, takes={"scores": "scores"}, gives={"labels": "labels", "probabilities": "probabilities"})
    ensemble.output("labels")
    ensemble.output("probabilities")
    return prepare, choose, ensemble.config()


def _python_model(pb: Any, name: str, max_batch_size: int) -> Any:
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    if max_batch_size > 1:
        config.dynamic_batching.SetInParent()
    return config


def _check_replaceable(folder: Path, config: Any) -> None:
    """Refuse to replace a model that is not part of a pipeline of ours."""
    if not folder.exists():
        return
    deployed = read_config(folder)
    if (deployed.backend, deployed.platform) != (config.backend, config.platform) or [
        tensor.name for tensor in deployed.input
    ] != [tensor.name for tensor in config.input]:
        raise RepositoryError(
            f"{folder} is there already and is no part of a pipeline.", hint="Package the plan under another name."
        )


def _check_served(folder: Path, ensemble: Any) -> None:
    """Refuse an ensemble that a published model does not fit as it is served; ``package`` leaves it served so.

    Its inputs, outputs, labels and preprocessing are those of the new plan, or ``package`` refuses that.
    """
    if not (folder / HISTORY_FILE).exists() or active_version(folder) is None:
        return
    served = read_config(folder).max_batch_size
    if served < ensemble.max_batch_size:
        raise RepositoryError(
            f"{folder.name} is published, and served with batches of up to {served}; {ensemble.name} would send "
            f"{ensemble.max_batch_size}.",
            hint=f"Give --max-batch-size {served}; or publish and promote the plan first, then package the pipeline.",
        )


def _write_model(root: Path, config: Any, source: Path | None) -> None:
    """Write a model's folder, which appears as a whole; of one that is there, the files are replaced one by one."""
    folder = root / config.name
    with locked(folder, error=RepositoryError):
        if folder.exists():
            if source is not None:
                atomic_write(folder / "1" / "model.py", source.read_bytes())
            atomic_write(folder / CONFIG_FILE, config_text(config))
            return
        try:
            # Beside the repository: a server that starts meanwhile takes every folder inside for a model
            _write_new(root.resolve().parent / f".{root.resolve().name}.staging-{config.name}", folder, config, source)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            _write_new(root / f".staging-{config.name}", folder, config, source)


def _write_new(staging: Path, folder: Path, config: Any, source: Path | None) -> None:
    shutil.rmtree(staging, ignore_errors=True)  # left by somebody who was killed
    try:
        (staging / "1").mkdir(parents=True)
        if source is not None:
            atomic_write(staging / "1" / "model.py", source.read_bytes())
        atomic_write(staging / CONFIG_FILE, config_text(config))
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_folder(folder.parent)
