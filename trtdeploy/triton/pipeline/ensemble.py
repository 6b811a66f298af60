"""An ensemble of models, built edge by edge: each edge's data type and shape is checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtdeploy.errors import ModelError
from trtdeploy.triton.config import schema


class Ensemble:
    """A builder of an ensemble's ``ModelConfig``.

    Triton checks an ensemble only when it loads it, and names neither both ends nor both shapes of a bad edge. So each
    ``connect`` compares the configs of the two models that it joins.

    Args:
        name: Model name of the ensemble.
        max_batch_size: Its largest batch; each step must take as many.
    """

    def __init__(self, name: str, *, max_batch_size: int) -> None:
        self.name = name
        self._config = schema().ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch_size)
        self._tensors: dict[str, tuple[str, Any]] = {}  # by the ensemble's name: who makes it, and what it is

    def input(self, name: str, like: Any) -> None:
        """Give the ensemble an input like that of a step's config (data type and dims)."""
        self._config.input.add(name=name, data_type=like.data_type, dims=like.dims)
        self._tensors[name] = (f"{self.name}.{name}", like)

    def step(self, model: Any, *, takes: Mapping[str, str], gives: Mapping[str, str]) -> None:
        """Add a step that runs a model's newest version.

        Args:
            model: The model's ``ModelConfig``.
            takes: The ensemble's tensor by the name of the model's input; every input needs one.
            gives: The ensemble's name of each of the model's outputs that is used, by the output's name.

        Raises:
            ModelError: An edge joins different data types or shapes, or begins or ends at a tensor that is not there;
                an input is left open; or the step takes smaller batches than the ensemble.
        """
        ours = self._config.max_batch_size
        if model.max_batch_size < ours or (ours == 0) != (model.max_batch_size == 0):
            raise ModelError(
                f"The step {model.name} takes batches of up to {model.max_batch_size}, the ensemble {self.name} "
                f"of up to {ours}.",
                hint="All steps must be packaged with one batch size.",
            )
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        left_open = sorted(set(inputs) - set(takes))
        if left_open:
            raise ModelError(f"Nothing feeds {', '.join(f'{model.name}.{name}' for name in left_open)}.")
        for name, source in takes.items():
            self._check_edge(source, f"{model.name}.{name}", inputs.get(name))
        for name, target in gives.items():
            if name not in outputs:
                raise ModelError(f"{model.name} has no output {name!r}; it has {', '.join(sorted(outputs))}.")
            if target in self._tensors:
                raise ModelError(f"{target!r} is made twice: by {self._tensors[target][0]} and {model.name}.{name}.")
            self._tensors[target] = (f"{model.name}.{name}", outputs[name])
        self._config.ensemble_scheduling.step.add(
            model_name=model.name, model_version=-1, input_map=dict(takes), output_map=dict(gives)
        )

    def output(self, name: str) -> None:
        """Make a tensor of a step an output of the ensemble.

        Raises:
            ModelError: No step makes it.
        """
        _, tensor = self._source(name, f"{self.name}.{name}")
        self._config.output.add(name=name, data_type=tensor.data_type, dims=tensor.dims)

    def config(self) -> Any:
        """Return the ensemble's ``ModelConfig``."""
        return self._config

    def _source(self, name: str, target: str) -> tuple[str, Any]:
        if name not in self._tensors:
            raise ModelError(
                f"The edge {name} -> {target} begins nowhere: no step before it makes {name!r}.",
                hint=f"There are {', '.join(sorted(self._tensors))}.",
            )
        return self._tensors[name]

    def _check_edge(self, source: str, target: str, taken: Any) -> None:
        maker, given = self._source(source, target)
        if taken is None:
            raise ModelError(f"The edge {maker} -> {target} ends nowhere: the model has no such input.")
        if given.data_type != taken.data_type:
            raise ModelError(
                f"The edge {maker} -> {target} joins {_described(given)} to {_described(taken)}: other data types.",
                hint="Export the model so that the two agree.",
            )
        fits = len(given.dims) == len(taken.dims) and all(
            ours in (-1, theirs) or theirs == -1 for ours, theirs in zip(given.dims, taken.dims, strict=True)
        )
        if not fits:
            raise ModelError(
                f"The edge {maker} -> {target} joins {_described(given)} to {_described(taken)}: other shapes.",
                hint="Is the preprocessing, or are the labels, those of this model?",
            )


def _described(tensor: Any) -> str:
    kind = schema().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return f"{kind} {list(tensor.dims)}"
