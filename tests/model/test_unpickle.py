"""A pickle's tensors come out of it, and nothing in it is run."""

import io
import pickle
import random
import sys
import types
import zipfile

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from encache.errors import CheckpointError
from encache.model.unpickle import main, read_pickled_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2, dtype=torch.float16)}


def assert_equal(tensors, wanted=WEIGHTS):
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.fixture
def trainer(monkeypatch):
    """A class of a training tool that whoever reads the file does not have."""
    module = types.ModuleType("some_trainer.callbacks")

    class ModelCheckpoint:
        def __init__(self):
            self.best = 0.5

    ModelCheckpoint.__module__ = "some_trainer.callbacks"
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setitem(sys.modules, "some_trainer", types.ModuleType("some_trainer"))
    monkeypatch.setitem(sys.modules, "some_trainer.callbacks", module)
    return ModelCheckpoint


def test_a_checkpoint_as_trainers_write_it(tmp_path, trainer, monkeypatch):
    path = tmp_path / "model.ckpt"
    state = {"callbacks": {trainer: {"best": 1}}, "last": trainer(), "global_step": 7}
    torch.save({**state, "state_dict": {**WEIGHTS, "steps": 3}}, path)
    for name in ("some_trainer", "some_trainer.callbacks"):
        monkeypatch.delitem(sys.modules, name)
    assert_equal(read_pickled_tensors(path))


@pytest.mark.parametrize("new_format", [True, False])
def test_bare_weights(tmp_path, new_format):
    path = tmp_path / "model.bin"
    shared = {**WEIGHTS, "c.weight": WEIGHTS["a.weight"]}  # one memory under two names
    torch.save(shared, path, _use_new_zipfile_serialization=new_format)
    result = CliRunner().invoke(main, [str(path), str(tmp_path / "model.safetensors")])
    assert result.exit_code == 0, result.output
    assert_equal(load_file(tmp_path / "model.safetensors"), shared)


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [exec, eval, __import__("os").system, print])
def test_nothing_is_run(tmp_path, capfd, function):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": WEIGHTS, "x": Evil(function, "print('executed')")}, path)
    result = CliRunner().invoke(main, [str(path), str(tmp_path / "model.safetensors")])
    assert "executed" not in capfd.readouterr().out + result.output
    assert result.exit_code == 0 or "cannot be read safely" in result.stderr


def test_mistakes(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": 1}, tmp_path / "none.ckpt")
    torch.save(WEIGHTS, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-30])
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    (tmp_path / "empty.ckpt").write_bytes(empty.getvalue())
    for name in ("text", "plain", "none", "cut", "empty"):
        with pytest.raises(CheckpointError, match=f"{name}.ckpt"):
            read_pickled_tensors(tmp_path / f"{name}.ckpt")


def test_damaged_bytes(tmp_path):
    path = tmp_path / "model.ckpt"
    draw = random.Random(0)
    for _ in range(200):
        torch.save({"state_dict": WEIGHTS, "steps": [1, 2.5, "three"]}, path)
        content = bytearray(path.read_bytes())
        start = content.index(b"data.pkl") + 8
        content[draw.randrange(start, start + 300)] = draw.randrange(256)
        path.write_bytes(content)
        try:
            read_pickled_tensors(path)
        except CheckpointError as error:
            assert "model.ckpt" in str(error)  # noqa: PT017


def test_nothing_is_overwritten(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_text("mine")
    result = CliRunner().invoke(main, [str(tmp_path / "a.bin"), str(tmp_path / "b.safetensors")])
    assert result.exit_code == 1
    assert "not overwritten" in result.stderr
    assert (tmp_path / "b.safetensors").read_text() == "mine"
