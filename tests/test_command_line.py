"""The command line: what it writes and prints, what its help says, and one clear line for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from transformer_checks.transformer import checkpoint, commands
from transformer_checks.transformer.__main__ import main
from transformer_checks.transformer.metrics import read_metrics
from transformer_checks.transformer.model import ModelConfig, llama
from transformer_checks.transformer.train_config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ["--n_embd", "16", "--n_head", "2"]
SLOW = ["--steps", "100000", "--learning_rate", "1e-9"]  # nothing is learned: it goes on


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def refused(capsys, *arguments: str) -> str:
    """The one line that a mistake gets."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


# --- train, generate, data


def test_the_sentence_is_trained_and_completed(capsys):
    assert main(["train", "--out", "out/a"]) == 0
    assert "out/a/checkpoint.pt" in capsys.readouterr().out.replace(os.sep, "/")
    assert sorted(os.listdir("out/a")) == ["checkpoint.pt", "config.json", "metrics.jsonl"]
    for prompt, rest in (("I l", "ove machine learning"), ("", "I love machine learning")):
        assert main(["generate", "--checkpoint", "out/a/checkpoint.pt", "--prompt", prompt]) == 0
        assert capsys.readouterr().out == rest + "\n"
    assert main(["generate", "--checkpoint", "out/a/checkpoint.pt", "--prompt", "I", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == " love\n"


def test_sampling_is_seeded_and_uses_what_is_asked(capsys):
    main(["train", *SMALL, "--steps", "1"])
    capsys.readouterr()

    def said(*options):
        assert main(["generate", *options]) == 0
        return capsys.readouterr().out

    hot = ("--temperature", "5")
    assert said(*hot, "--seed", "1") == said(*hot, "--seed", "1") != said(*hot, "--seed", "2")
    assert said(*hot, "--top_k", "1") == said() == said(*hot, "--top_p", "1e-9")


def test_data_writes_the_splits_and_their_sizes(capsys):
    assert main(["data", "--out", "d"]) == 0
    sizes = {"train": 100, "validation": 10, "test": 10}
    for split, size in sizes.items():
        assert Path(f"d/{split}.txt").read_text().splitlines() == ["I love machine learning"] * size
    assert json.loads(Path("d/sizes.json").read_text()) == sizes
    assert "train: 100 examples of 23 characters" in capsys.readouterr().out


def test_another_sentence_brings_its_own_sizes():
    assert main(["train", *SMALL, "--sentence", "hello", "--steps", "2", "--out", "o"]) == 0
    config = checkpoint.load("o/checkpoint.pt")["config"]
    assert (config["vocab_size"], config["block_size"]) == (5, 5)


# --- options, files, the effective config


def fields() -> list[tuple[type, dataclasses.Field]]:
    return [(config, field) for config in (ModelConfig, TrainConfig) for field in dataclasses.fields(config)]


def test_every_field_is_an_option_with_its_comment_in_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for config, field in fields():
        comment = commands.field_comments(config)[field.name].replace("None:", "null:")
        assert f"--{field.name} " in said
        assert comment.replace("%%", "%") in said, field.name


def another_value(config: type, field: dataclasses.Field) -> object:
    """Valid, and not the default."""
    special = {
        "vocab_size": 16, "block_size": 24, "n_head": 2, "n_embd": 64, "n_kv_head": 2, "n_hidden": 32,
        "positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "attention": "explicit", "dropout": 0.5,
        "beta1": 0.5, "beta2": 0.5, "optimizer": "adamw", "schedule": "cosine", "precision": "bfloat16",
        "device": "meta", "micro_batch_size": 1, "weight_decay": 0.5, "min_learning_rate": 0.5,
    }  # fmt: skip
    if field.name in special:
        return special[field.name]
    return not field.default if isinstance(field.default, bool) else 2 * field.default or 1


@pytest.mark.parametrize("way", ["command line", "file"])
def test_every_field_is_set_from_the_command_line_and_from_a_file(way):
    values = {field.name: another_value(config, field) for config, field in fields()}
    if way == "file":
        Path("c.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
        arguments = ["--config", "c.yaml"]
    else:
        arguments = [word for name, value in values.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    options = commands.parse(["train", *arguments]).train
    for config, field in fields():
        found = getattr(commands.taken(options, config), field.name)
        assert found == values[field.name] != field.default, field.name


def test_the_command_line_wins_over_files_and_later_files_over_earlier():
    Path("a.yaml").write_text("n_layer: 2\nseed: 2\nsteps: 2\n")
    Path("b.json").write_text('{"seed": 3, "steps": 3}')
    options = commands.parse(["train", "--config", "a.yaml", "--config", "b.json", "--steps", "4"]).train
    assert (options.n_layer, options.seed, options.steps) == (2, 3, 4)


def test_the_effective_config_repeats_the_training():
    main(["train", *SMALL, "--steps", "3", "--seed", "5", "--clip_norm", "null", "--out", "a"])
    assert json.loads(Path("a/config.json").read_text())["clip_norm"] is None
    main(["train", "--config", "a/config.json", "--out", "b"])
    first, second = (checkpoint.load(f"{name}/checkpoint.pt") for name in "ab")
    assert first["training"] == second["training"] and first["config"] == second["config"]
    assert all(tensor.equal(second["model"][name]) for name, tensor in first["model"].items())


def test_the_llama_config_file_is_what_it_says():
    options = commands.parse(["train", "--config", str(CONFIGS / "llama.yaml")]).train
    options.vocab_size, options.block_size = 15, 23
    assert commands.taken(options, ModelConfig) == llama()


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["data", "--help"], ["trian"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    code = (
        "import sys\nfrom transformer_checks.transformer.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert python("-c", code, *arguments).returncode == 0


def test_importing_the_trainer_imports_nothing_for_the_terminal():
    heavy = "{'rich', 'jsonargparse', 'matplotlib', 'yaml'}"
    code = f"import sys, transformer_checks.transformer.trainer; print({heavy} & {{*sys.modules}})"
    assert python("-c", code).stdout == "set()\n"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--n_layr", "2"], "did you mean 'n_layer'"),
        (["train", "--config", "c.yaml"], "did you mean 'learning_rate'"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--n_layer", "two"], "two"),
        (["train", "--optimizer", "sgd"], "sgd"),
        (["train", "--n_head", "3"], "n_embd (128) must be a multiple of n_head (3)"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--skip", "23"], "got 23"),
        (["train", "--vocab_size", "3", "--out", "v"], "outside the vocabulary: 0 to 2"),
        (["train", "--out", "c.yaml/out"], "Not a directory"),
        (["train", "--resume"], "config.json"),
        (["generate", "--checkpoint", "none.pt"], "none.pt: No such file"),
        (["generate", "--checkpoint", "c.yaml"], "c.yaml is"),
        (["data", "--out", "c.yaml"], "c.yaml: File exists"),
        (["trian"], "trian"),
        ([], "train,generate,data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line_that_names_it(capsys, arguments, said):
    Path("c.yaml").write_text("learning_rat: 1\n")
    assert said in refused(capsys, *arguments)


def test_a_prompt_that_cannot_be_is_refused(capsys):
    main(["train", *SMALL, "--steps", "1"])
    capsys.readouterr()
    assert "'z' at position 2 of 'I z'" in refused(capsys, "generate", "--prompt", "I z")
    said = refused(capsys, "generate", "--prompt", "I love machine learning")
    assert "23 characters; the model takes at most 22" in said
    assert "temperature" in refused(capsys, "generate", "--temperature", "-1")


def test_a_training_is_never_overwritten(capsys):
    main(["train", *SMALL, "--steps", "1", "--out", "o"])
    capsys.readouterr()
    before = Path("o/checkpoint.pt").read_bytes()
    assert "--resume" in refused(capsys, "train", "--out", "o")
    assert "norm.weight has shape [16]" in refused(
        capsys, "train", "--out", "o", "--resume", "--n_layer", "1", "--n_embd", "8"
    )
    assert Path("o/checkpoint.pt").read_bytes() == before


def test_a_training_that_diverges_ends_with_one_line_and_keeps_its_checkpoint(capsys, monkeypatch):
    forward, calls = torch.nn.LayerNorm.forward, 0

    def breaking(self, x):
        nonlocal calls
        calls += 1
        return forward(self, x) * (torch.nan if calls > 3 * 4 else 1)  # three norms a step

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", breaking)
    assert main(["train", *SMALL, "--steps", "9", "--save_interval", "2", "--out", "o"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the loss is nan at step 5") and "holds step 4" in said and said.count("\n") == 1
    assert checkpoint.load("o/checkpoint.pt")["trainer"]["steps_done"] == 4


def test_out_of_memory_advises_micro_batches(capsys, monkeypatch):
    def out_of_memory(self, x):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", out_of_memory)
    assert main(["train", *SMALL]) == 1
    said = capsys.readouterr().err
    assert "micro_batch_size" in said and "2 GiB" in said and said.count("\n") == 1


LIMITED = """
import resource, signal, sys
from transformer_checks.transformer.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="the size of files is limited on POSIX systems only")
@pytest.mark.parametrize(("room", "file"), [(20_000, "checkpoint.pt"), (2_000, "metrics.jsonl")])
def test_a_full_disk_is_one_line_that_names_the_file(room, file):
    done = python("-c", LIMITED, str(room), "train", *SMALL, "--steps", "40", "--stop_loss", "null", "--out", "o")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert file in done.stderr and "File too large" in done.stderr


# --- interrupted and resumed


def test_resuming_goes_on_with_the_config_of_the_folder_but_for_what_is_asked(capsys):
    main(["train", *SMALL, "--steps", "3", "--seed", "4", "--out", "o"])
    assert main(["train", "--resume", "--steps", "6", "--out", "o"]) == 0
    main(["train", *SMALL, "--steps", "6", "--seed", "4", "--out", "whole"])
    resumed, whole = (checkpoint.load(f"{name}/checkpoint.pt") for name in ("o", "whole"))
    assert resumed["training"] == whole["training"]
    assert all(tensor.equal(whole["model"][name]) for name, tensor in resumed["model"].items())
    steps = [record["step"] for record in read_metrics("o/metrics.jsonl") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGINT to send to a process")
def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130():
    command = [sys.executable, "-m", "transformer_checks.transformer", "train", *SMALL, *SLOW, "--out", "o"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: Path("o/metrics.jsonl").exists() and len(read_metrics("o/metrics.jsonl")) > 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out and err == ""
    step = checkpoint.load("o/checkpoint.pt")["trainer"]["steps_done"]
    assert f"after step {step}" in out and read_metrics("o/metrics.jsonl")[-1]["step"] == step


def wait_for(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
