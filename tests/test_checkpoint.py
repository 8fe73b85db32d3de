"""Checkpoints: whole or not at all, without code, and refused by name and shape where they do not fit."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from transformer_checks.transformer import checkpoint
from transformer_checks.transformer.checkpoint import CheckpointError, from_fields, load, load_model, load_weights, save
from transformer_checks.transformer.data import SentenceTask
from transformer_checks.transformer.model import ModelConfig, Transformer, llama
from transformer_checks.transformer.train_config import TrainConfig
from transformer_checks.transformer.trainer import Trainer

SMALL = dict(n_embd=16, n_head=2)


def run_python(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, step=1, weights=torch.arange(5.0))
    return path


def expect_previous(path, leftovers: int = 0) -> None:
    assert load(path)["step"] == 1
    assert len(os.listdir(path.parent)) == 1 + leftovers


# saved whole or not at all


def test_what_is_saved_comes_back(path):
    state = load(path)
    assert state["step"] == 1 and state["weights"].equal(torch.arange(5.0))
    expect_previous(path)


def test_what_is_saved_does_not_follow_the_weights(path):
    weights = torch.zeros(3)
    save(path, weights=weights)
    weights += 1
    assert load(path)["weights"].equal(torch.zeros(3))


KILLED = """
import os, signal, sys, torch
from transformer_checks.transformer import checkpoint

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(state, file, save=torch.save):
    file.write(bytes(1000))
    file.flush()
    die()

moment = sys.argv[2]
if moment == "while writing":
    torch.save = half
elif moment == "before the disk has it":
    os.fsync = die
else:
    os.replace = die
checkpoint.save(sys.argv[1], step=2, weights=torch.zeros(1000))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX systems")
@pytest.mark.parametrize("moment", ["while writing", "before the disk has it", "before it has the name"])
def test_killed_during_a_save_the_previous_checkpoint_loads(path, moment):
    assert run_python(KILLED, path, moment).returncode == -9
    expect_previous(path, leftovers=1)
    save(path, step=3)  # the next one is not hindered
    assert load(path)["step"] == 3 and len(os.listdir(path.parent)) == 1


def test_a_save_that_fails_leaves_the_previous_checkpoint_and_no_litter(path):
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        save(path, step=2, code=lambda: None)
    expect_previous(path)


FULL = """
import resource, signal, sys, torch
from transformer_checks.transformer import checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(sys.argv[1], step=2, weights=torch.zeros(int(sys.argv[2])))
except checkpoint.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="the size of files is limited on POSIX systems only")
@pytest.mark.parametrize("numbers", [30_000, 3_000_000])
def test_without_room_the_error_says_so_and_the_previous_checkpoint_remains(path, numbers):
    done = run_python(FULL, path, numbers)
    assert str(path) in done.stdout and "File too large" in done.stdout, done.stderr
    expect_previous(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*No such file"):
        save(tmp_path / "nowhere" / "checkpoint.pt", step=1)


# loaded without running code


class Code:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["plain pickle", "torch archive"])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(tmp_path, form):
    path, footprint = tmp_path / "bad.pt", tmp_path / "footprint"
    state = {"model": Code(footprint)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    footprint.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"bad\.pt is refused"):
        load(path)
    assert not footprint.exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: No such file"):
        load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_checkpoint_is_named(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)


@pytest.mark.parametrize("content", [b"once upon a time", b"\x80\x02."])
def test_another_file_is_no_checkpoint(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)


def test_another_archive_is_no_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter", "dear reader")
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(CheckpointError, match="Tensor"):
        load(path)


# a model and its tokenizer


@pytest.mark.parametrize("config", [ModelConfig(**SMALL), llama(**SMALL, n_kv_head=1)], ids=["gpt2", "llama"])
def test_a_model_comes_back_with_its_tokenizer(tmp_path, config):
    task = SentenceTask()
    torch.manual_seed(0)
    trainer = Trainer(Transformer(config), task, TrainConfig())
    trainer.step()
    trainer.save(tmp_path / "checkpoint.pt")
    model, tokenizer = load_model(tmp_path / "checkpoint.pt")
    assert model.config == config and not model.training
    assert tokenizer.encode(task.sentence) == task.tokenizer.encode(task.sentence)
    tokens = task.batch(task.train[:1]).tokens
    assert model(tokens).equal(trainer.model.eval()(tokens))
    assert (model.head.weight is model.embedding.weight) == config.tied


def test_a_foreign_model_has_weights_but_no_config(tmp_path):
    task = SentenceTask()
    foreign = nn.Sequential(nn.Embedding(15, 8), nn.Linear(8, 15))
    Trainer(foreign, task, TrainConfig()).save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"no config.*load_weights"):
        load_model(tmp_path / "checkpoint.pt")
    load_weights(foreign, load(tmp_path / "checkpoint.pt")["model"])


def test_weights_that_do_not_fit_are_refused_by_name_and_shape_and_nothing_changes():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    weights["norm.weight"] = torch.zeros(17)
    weights["extra"] = weights.pop("norm.bias")
    with pytest.raises(CheckpointError) as refused:
        load_weights(model, weights)
    for said in ("norm.bias is missing", "extra is unknown", "norm.weight has shape [17], the model's has [16]"):
        assert said in str(refused.value)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'n_layr': did you mean 'n_layer'"):
        from_fields(ModelConfig, {"n_layr": 2})
    with pytest.raises(ValueError, match=r"'zzz': known are vocab_size, block_size"):
        from_fields(ModelConfig, {"zzz": 2})


def test_a_checkpoint_of_other_fields_is_refused(path):
    save(path, model={}, config={"n_layr": 2}, tokenizer={})
    with pytest.raises(ValueError, match="n_layr"):
        load_model(path)
    assert checkpoint.CheckpointError.__mro__[1] is ValueError  # one except clause catches both
