"""QAT in a loop of one's own: ``from training import prepare, calibrate, learn_ranges, refresh_ranges, export``."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import training
from training import QuantizationSpec, calibrate, export, learn_ranges, prepare, refresh_ranges
from training.checkpoints.checkpoint import load_checkpoint
from training.quantization import quantized_layers, quantizers
from training.quantization.layers import range_of
from trtdeploy.errors import ModelError, QuantizationError, UsageError
from trtdeploy.runtimes.onnxruntime.witness import Witness


class Segmenter(nn.Module):
    """A small U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = functional.relu(self.down(images))
        return self.head(torch.cat([self.up(functional.relu(self.deep(fine))), fine], 1))


class Encoder(nn.Module):
    """Tokens, an input that may be left out, an option, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.position = nn.Embedding(50, 16), nn.Linear(4, 16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, places: Tensor | None = None, double: bool = False
    ) -> dict[str, Tensor]:
        tokens = self.words(ids)
        if places is not None:
            tokens = tokens + self.position(places)
        if mask is not None:
            tokens = tokens * mask[..., None]
        if double:
            tokens = tokens * 2
        tokens = tokens + self.second(functional.gelu(self.first(tokens)))
        return {"scores": self.head(tokens.mean(1)), "tokens": tokens}


class WithAuxiliary(Segmenter):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Any:
        masks = super().forward(images)
        return (masks, self.auxiliary(self.down(images))) if self.training else masks


IMAGES = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def segmenter(**options) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(Segmenter(), IMAGES[0][:1], **options)
    calibrate(model, IMAGES)
    return model


def train(model: nn.Module, *groups: dict[str, object], steps: int = 3) -> None:
    optimizer = torch.optim.Adam([{"params": list(model.parameters())}, *groups], lr=1e-2)
    model.train()
    for step in range(steps):
        outputs = model(IMAGES[step % len(IMAGES)])
        optimizer.zero_grad()
        functional.cross_entropy(outputs, torch.full((4, 16, 16), step)).backward()
        optimizer.step()


def scales_in(path: Path) -> dict[str, np.ndarray]:
    """Return the scales of weights by the name of the quantizer, as the file has them."""
    graph = onnx.load(path).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    constants |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"
    }
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear" and "_weight_quantizer" in node.name]
    return {node.name.split("/")[1]: constants[node.input[1]] for node in nodes}


def test_a_segmenter_from_float_to_a_file_that_computes_the_same(tmp_path):
    torch.manual_seed(0)
    network = Segmenter()
    weights = dict(network.named_parameters())
    model = prepare(network, IMAGES[0][:1])
    assert all(dict(model.named_parameters())[name] is weight for name, weight in weights.items())
    count = calibrate(model, IMAGES)
    assert (set(count.quantized), count.in_float) == ({"down", "deep", "up", "head"}, ())
    assert model.training
    before = model.eval()(IMAGES[0]).detach()
    train(model)
    assert not torch.allclose(model.eval()(IMAGES[0]), before)
    model.train()
    exported = export(model, tmp_path / "m.onnx", IMAGES[0][:1], check_on=IMAGES)
    assert model.training
    assert exported.parity.images == 12
    assert exported.float_parity.relative_error < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [(each.name, each.shape[0]) for each in session.get_inputs()] == [("images", "batch")]
    assert [(each.name, each.shape[0]) for each in session.get_outputs()] == [("output", "batch")]
    with torch.no_grad():
        wanted = model.eval()(IMAGES[1]).numpy()
    [found] = Witness((tmp_path / "m.onnx").read_bytes())({"images": IMAGES[1].numpy()})
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.1 * wanted.std()


def test_the_ranges_of_weights_follow_the_weights_without_a_call(tmp_path):
    model = segmenter()
    for layer in quantized_layers(model):
        with torch.no_grad():
            layer.weight.mul_(3)
    export(model, tmp_path / "m.onnx", IMAGES[0])  # no forward in between
    found = scales_in(tmp_path / "m.onnx")
    for name, layer in model.named_modules():
        if name in found:
            wanted = range_of(layer, layer.weight).flatten() / 127
            assert np.allclose(found[name], wanted.numpy(), rtol=1e-6)
            layer.weight.data.mul_(2)
    assert set(found) == {"down", "deep", "up", "head"}
    model.eval()(IMAGES[0])
    assert all(torch.equal(each.weight_quantizer.amax, range_of(each, each.weight)) for each in quantized_layers(model))
    model.down.weight.data.mul_(2)
    refresh_ranges(model)
    assert torch.equal(model.down.weight_quantizer.amax, range_of(model.down, model.down.weight))


def test_ranges_of_activations_are_learned_where_it_is_wanted(tmp_path):
    model = segmenter()
    keys = set(model.state_dict())
    before = {name: quantizer.amax.clone() for name, quantizer in quantizers(model) if quantizer.of_activation}
    train(model)
    assert all(torch.equal(model.get_submodule(name).amax, amax) for name, amax in before.items())
    parameters = learn_ranges(model)
    assert len(parameters) == len(before)
    train(model, {"params": parameters, "weight_decay": 0.0})
    refresh_ranges(model)
    moved = {name: model.get_submodule(name).amax.clone() for name in before}
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    assert set(model.state_dict()) == keys
    parameters[0].data.add_(1)
    model.eval()(IMAGES[0])
    assert float(quantizer_of(model, 0).amax) == pytest.approx(float(moved[next(iter(before))]) * np.e, rel=1e-5)
    assert export(model, tmp_path / "m.onnx", IMAGES[0]).quantize_nodes > 0


def quantizer_of(model, index):
    return [quantizer for _, quantizer in quantizers(model) if quantizer.of_activation][index]


def test_several_inputs_and_outputs_by_name_or_by_position(tmp_path):
    torch.manual_seed(0)
    ids, places = torch.randint(0, 50, (2, 7)), torch.randn(2, 7, 4)
    by_name = {"ids": ids, "places": places, "double": True}
    model = prepare(Encoder(), by_name)
    calibrate(model, [by_name, (ids, None, places * 2, True)])
    names = {"ids": {0: "batch", 1: "length"}, "places": {0: "batch", 1: "length"}, "scores": {0: "batch"}}
    exported = export(
        model, tmp_path / "m.onnx", by_name, dynamic_axes=names | {"tokens": {0: "batch", 1: "length"}}, labels="abc"
    )
    assert exported.quantize_nodes == 2 * 4
    witness = Witness((tmp_path / "m.onnx").read_bytes())
    assert [each.name for each in witness.inputs] == ["ids", "places"]
    assert witness.outputs == ["scores", "tokens"]
    longer = {"ids": torch.randint(0, 50, (3, 11)), "places": torch.randn(3, 11, 4)}
    with torch.no_grad():
        wanted = model.eval()(longer["ids"], None, longer["places"], True)
    found = dict(zip(wanted, witness({name: value.numpy() for name, value in longer.items()}), strict=True))
    for name, values in wanted.items():
        assert np.sqrt(np.mean((found[name] - values.numpy()) ** 2)) < 0.1 * float(values.std())


def test_a_state_dict_goes_into_a_network_that_was_prepared_alike():
    torch.manual_seed(0)
    model = prepare(WithAuxiliary().eval(), IMAGES[0][:1])
    count = calibrate(model, IMAGES)
    assert [layer.name for layer in count.in_float] == ["auxiliary"]
    assert isinstance(model.train()(IMAGES[0]), tuple)
    other = prepare(WithAuxiliary().eval(), IMAGES[0][:1])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES[0]), model.eval()(IMAGES[0]))
    assert isinstance(other.train()(IMAGES[0]), tuple)
    assert torch.equal(deepcopy(model).eval()(IMAGES[0]), model.eval()(IMAGES[0]))


@pytest.mark.filterwarnings("ignore")
def test_under_compile_and_distributed_data_parallel(tmp_path):
    model = segmenter()
    compiled = torch.compile(model, backend="eager")
    train(compiled)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        train(parallel)
        calibrate(parallel, IMAGES)
        exported = export(parallel, tmp_path / "m.onnx", IMAGES[0], check_on=IMAGES)
    finally:
        torch.distributed.destroy_process_group()
    assert exported.quantize_nodes == export(compiled, tmp_path / "c.onnx", IMAGES[0]).quantize_nodes > 0


def test_the_command_line_is_its_user(digits, float_file, ptq_file):
    start, made = load_checkpoint(float_file), load_checkpoint(ptq_file)
    model = prepare(start.model, torch.zeros(1, *start.facts.preprocessing.sample_shape))
    batches = digits.split("calibration").batches(start.facts.preprocessing, 64)
    layout = torch.channels_last
    count = calibrate(model, (torch.from_numpy(each.inputs).to(memory_format=layout) for each in batches), method="max")
    assert count == made.facts.layers
    found = dict(quantizers(model))
    assert all(torch.equal(found[name].amax, known.amax) for name, known in quantizers(made.model))


def test_onnxruntimes_rules_and_codes(tmp_path):
    model = segmenter(spec=QuantizationSpec(target="onnxruntime"))
    export(model, tmp_path / "m.onnx", IMAGES[0], check_on=IMAGES)
    types = {each.data_type for each in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in types


def test_labels_and_preprocessing_travel_with_the_file(tmp_path, float_file):
    start = load_checkpoint(float_file)
    shape = start.facts.preprocessing.sample_shape
    export(
        start.model,
        tmp_path / "m.onnx",
        torch.zeros(2, *shape),
        labels=start.facts.labels,
        preprocessing=start.facts.preprocessing,
    )
    carried = {each.key: each.value for each in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert carried["trtdeploy.preprocessing"] == start.facts.preprocessing.to_json()
    assert "trtdeploy.labels" in carried


class Sorting(nn.Module):
    """Calls what ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.layer(values)[:, None] * values[..., None])


def test_what_cannot_be_done_is_said_and_nothing_is_written(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(UsageError, match="has no quantizers"):
        calibrate(Segmenter(), IMAGES)
    model = prepare(Segmenter(), IMAGES[0])
    with pytest.raises(QuantizationError, match="no batch"):
        calibrate(model, iter(()))
    with pytest.raises(QuantizationError, match="calibrate first"):
        export(model, path, IMAGES[0])
    with pytest.raises(UsageError, match="no range to learn from"):
        learn_ranges(model)
    with pytest.raises(UsageError, match="does not take these inputs"):
        prepare(Encoder(), {"idx": torch.zeros(1, 4)})
    with pytest.raises(UsageError, match="does not take these inputs"):
        prepare(Segmenter(), (IMAGES[0], IMAGES[1]))
    with pytest.raises(UsageError, match=r"cannot run on the example inputs \(\[2, 5\]\)"):
        prepare(Segmenter(), torch.zeros(2, 5))
    calibrate(model, IMAGES)
    with pytest.raises(UsageError, match="3 labels"):
        export(model, path, IMAGES[0], labels=["a", "b", "c"])
    with pytest.raises(UsageError, match="a name of its own"):
        export(model, path, IMAGES[0], output_names=["a", "b"])
    with pytest.raises(UsageError, match="dynamic_axes names image;"):
        export(model, path, IMAGES[0], dynamic_axes={"image": {0: "batch"}})
    with pytest.raises(ModelError, match="torch cannot export Sorting"):
        export(Sorting(), path, torch.randn(2, 4))
    assert not path.exists()


def test_the_public_names_are_there_and_torch_is_imported_when_they_are_used():
    assert all(getattr(training, name) for name in training.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fold'"):
        training.fold  # noqa: B018
    code = (
        "import sys, training\n"
        "assert 'torch' not in sys.modules\n"
        "from training import calibrate\n"
        "assert calibrate.__module__ == 'training.ptq.ranges'"
    )
    root = str(Path(training.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
