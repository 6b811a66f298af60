from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny_model import tiny
from training.checkpoints.checkpoint import (
    METADATA_KEY,
    CheckpointFacts,
    load_checkpoint,
    save_checkpoint,
)
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import CheckpointError
from trtdeploy.files import sha256_file

TINY = "tiny_model:tiny"


def facts(**changes):
    values = {"kind": "float", "model": TINY, "labels": ("a", "b", "c"), "preprocessing": Preprocessing.square(16)}
    return CheckpointFacts(**(values | changes))


@pytest.fixture
def state():
    torch.manual_seed(3)
    return tiny(10).state_dict()


def load_foreign(path, digits, **options):
    return load_checkpoint(path, model=TINY, image_size=16, dataset=digits, **options)


def test_a_saved_checkpoint_comes_back_whole(tmp_path):
    network = tiny(3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = tmp_path / "c.safetensors"
    digest = save_checkpoint(path, network.state_dict(), facts())
    loaded = load_checkpoint(path)
    assert loaded.facts == facts()
    assert loaded.sha256 == digest == sha256_file(path)
    assert not loaded.model.training
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_ranges_of_a_quantized_checkpoint_come_back(ptq_file):
    stored = load_file(ptq_file)
    ranges = {key for key in stored if key.endswith("_amax")}
    assert len(ranges) == 7
    loaded = load_checkpoint(ptq_file)
    for key in ranges:
        assert torch.equal(loaded.model.state_dict()[key], stored[key])
    assert loaded.facts.calibration.method == "max"


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_foreign_torch_files(tmp_path, digits, state, key, prefix):
    content = {prefix + name: value for name, value in state.items()}
    path = tmp_path / "foreign.pt"
    torch.save({key: content, "epoch": 3} if key else content, path)
    loaded = load_foreign(path, digits)
    assert loaded.facts.labels == digits.classes
    assert torch.equal(loaded.model.state_dict()["head.weight"], state["head.weight"])


def test_a_foreign_half_precision_file_becomes_single_precision(tmp_path, digits, state):
    path = tmp_path / "foreign.safetensors"
    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)
    weight = load_foreign(path, digits).model.state_dict()["head.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["head.weight"].half().float())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda state: state.pop("head.bias"), "1 missing: head.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda state: state.update({"head.weight": torch.zeros(10, 5)}), r"head.weight is \[10, 5\]"),
        (lambda state: state["stem.weight"].fill_(float("nan")), "NaN or infinity: stem.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_key(tmp_path, digits, state, damage, expected):
    damage(state)
    path = tmp_path / "broken.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_foreign(path, digits)
    assert str(path) in str(caught.value)


def test_the_output_must_have_one_score_per_label(tmp_path, digits):
    path = tmp_path / "seven.safetensors"
    save_file(tiny(7).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"\[1, 7\].*\[1, 10\]"):
        load_checkpoint(path, model="tiny_model:always_seven", image_size=16, dataset=digits)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02garbage", b"PK\x03\x04" + bytes(40)])
def test_corrupt_files_are_refused(tmp_path, digits, suffix, content):
    path = tmp_path / f"corrupt{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        load_foreign(path, digits)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path, digits, state, suffix):
    path = tmp_path / f"cut{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=path.name):
        load_foreign(path, digits)


def test_a_missing_file_is_refused(tmp_path, digits):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_foreign(tmp_path / "none.pt", digits)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, digits, protocol):
    proof = tmp_path / "pwned"
    path = tmp_path / "evil.pt"
    content = {"state_dict": {"head.weight": Payload(proof)}}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="never done"):
        load_foreign(path, digits)
    assert not proof.exists()
    if protocol == "pickle":  # the payload does work where it is let in
        pickle.loads(path.read_bytes())
        assert proof.exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"a": "text"}}])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, digits, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="state dict"):
        load_foreign(path, digits)


@pytest.mark.parametrize("text", ["{}", "not json", facts().model_dump_json()[:-1] + ', "surprise": 1, "dev": 1}'])
def test_damaged_facts_are_refused(tmp_path, text):
    path = tmp_path / "c.safetensors"
    save_file(tiny(3).state_dict(), path, metadata={METADATA_KEY: text})
    with pytest.raises(CheckpointError, match="facts that this version"):
        load_checkpoint(path)


def test_options_that_contradict_the_checkpoint_are_refused(float_file):
    with pytest.raises(CheckpointError, match="--image-size 16, not 99"):
        load_checkpoint(float_file, image_size=99)
    with pytest.raises(CheckpointError, match="--model"):
        load_checkpoint(float_file, model="efficientnet_b0")


def test_nan_weights_are_never_written(tmp_path):
    state = tiny(3).state_dict()
    state["head.bias"][1] = float("inf")
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        save_checkpoint(tmp_path / "c.safetensors", state, facts())
    assert list(tmp_path.iterdir()) == []


def test_quantizers_that_are_elsewhere_now_are_no_fault_of_the_model(ptq_file, tmp_path):
    known, state = load_checkpoint(ptq_file).facts, load_file(ptq_file)
    lacking = tmp_path / "lacking.safetensors"
    save_checkpoint(lacking, {key: value for key, value in state.items() if "_pooled_quantizer" not in key}, known)
    with pytest.raises(CheckpointError, match="Calibrate the float checkpoint again"):
        load_checkpoint(lacking)
    save_checkpoint(lacking, {key: value for key, value in state.items() if not key.startswith("stem")}, known)
    with pytest.raises(CheckpointError, match="the --model it was trained as"):
        load_checkpoint(lacking)
