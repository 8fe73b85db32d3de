"""The three commands, train, generate and data: their options (command line or file), and what they do.

The options of `train` are the fields of ModelConfig and TrainConfig, documented by the comments beside these.
torch is imported by the command that needs it, so that help and error messages do not wait for it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from .suggestion import did_you_mean

if TYPE_CHECKING:
    from .trainer import Trainer

PROGRAM = "python -m transformer_checks.transformer"
SENTENCE = "I love machine learning"
CHECKPOINT, CONFIG = "checkpoint.pt", "config.json"


class Failure(Exception):
    """An error told to the user in one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(ArgumentParser):
    """Tells a mistake in one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        known = list(vars(getattr(ex, "subcommand_parser", self).get_defaults()))
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w-]+)", line)
        raise Failure(line + (did_you_mean(unknown[1], known) if unknown else ""), 2) from ex


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name. Raises Failure."""
    options = parse(arguments)
    command = {"train": train, "generate": generate, "data": data}[options.command]
    with explained():
        command(options[options.command])


def parse(arguments: Sequence[str]) -> Namespace:
    parser = build_parser(arguments)
    options = parser.parse_args(arguments)
    if options.command == "train" and options.train.resume:  # the options it was trained with, except those given now
        config = str(Path(options.train.out) / CONFIG)
        options = parser.parse_args(["train", "--config", config, *arguments[1:]])
    return options


@contextmanager
def explained() -> Iterator[None]:
    """A user's mistake or a failed training ends in one line; any other exception is a bug and keeps its traceback."""
    import torch

    from .distributed import ProcessLost
    from .trainer import Diverged

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failure(f"out of memory: try a smaller micro_batch_size. {first_line(error)}", 1) from error
    except (Diverged, ProcessLost) as error:
        raise Failure(first_line(error), 1) from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise Failure(f"cannot read or write{where}: {error.strerror or error}", 2) from error
    except ValueError as error:
        raise Failure(" ".join(str(error).split()), 2) from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# options


def build_parser(arguments: Sequence[str]) -> ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Train a transformer language model, and generate text with it.")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train_parser("train" in arguments), help="train a model on the sentence")
    commands.add_subcommand("generate", generate_parser(), help="complete a prompt with a trained model")
    commands.add_subcommand("data", data_parser(), help="write the examples of the sentence task")
    return parser


def train_parser(wanted: bool) -> ArgumentParser:
    parser = Parser(
        usage=f"{PROGRAM} train [options]",  # there are too many to list twice
        description="Train a model on the sentence. The defaults are the quick recipe.",
    )
    parser.add_argument("--config", action="config", help="a YAML or JSON file with values for these options")
    parser.add_argument("--out", default="out/sentence", help="folder for the checkpoint, the metrics and the config")
    parser.add_argument("--resume", action="store_true", help="continue the training in that folder")
    add_task_options(parser)
    if wanted:  # otherwise nobody reads them, and they cost the import of torch
        from .model import ModelConfig
        from .train_config import TrainConfig

        add_fields(parser, "the model", ModelConfig, vocab_size=None, block_size=None)
        add_fields(parser, "the training", TrainConfig)
    return parser


def generate_parser() -> ArgumentParser:
    parser = Parser(description="Print how a trained model completes a prompt.")
    parser.add_argument("--checkpoint", default="out/sentence/checkpoint.pt", help="written by train")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument(
        "--max_new_tokens", type=int | None, help="how many characters to generate; null: until the block size"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely character")
    parser.add_argument("--top_k", type=int | None, help="sample from the k most likely characters only")
    parser.add_argument(
        "--top_p", type=float | None, help="sample from the most likely characters, up to probability p"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    return parser


def data_parser() -> ArgumentParser:
    parser = Parser(description="Write the training, validation and test examples, one per line, and their numbers.")
    parser.add_argument("--out", default="out/data", help="folder to write to")
    add_task_options(parser)
    return parser


def add_task_options(parser: ArgumentParser) -> None:
    parser.add_argument("--sentence", default=SENTENCE, help="the text to learn")
    parser.add_argument("--skip", type=int, default=0, help="the first N characters carry no loss")


def add_fields(parser: ArgumentParser, title: str, config: type, **defaults: Any) -> None:
    """Adds every field of a config dataclass as an option; where the default given here is None, the task decides."""
    group = parser.add_argument_group(title, inspect.getdoc(config))
    comments, types = field_comments(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name, comment, kind = field.name, comments[field.name], types[field.name]
        if name in defaults:
            comment, kind = f"{comment}; None: the task's", kind | None
        comment = comment.replace("None:", "null:")  # as it is written here
        group.add_argument(f"--{name}", type=kind, default=defaults.get(name, field.default), help=comment)


def field_comments(config: type) -> dict[str, str]:
    """The comment beside each field of a dataclass."""
    found = re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(config), flags=re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in found}


def taken(options: Namespace, config: type) -> Any:
    """The config whose fields the options give."""
    return config(**{field.name: options[field.name] for field in dataclasses.fields(config)})


# commands


def train(options: Namespace) -> None:
    import torch

    from .data import SentenceTask
    from .distributed import joined
    from .model import ModelConfig, Transformer
    from .train_config import TrainConfig
    from .trainer import Trainer

    task = SentenceTask(options.sentence, options.skip)
    options.vocab_size = options.vocab_size or task.tokenizer.vocab_size
    options.block_size = options.block_size or task.block_size
    model_config, config = taken(options, ModelConfig), taken(options, TrainConfig)
    out = Path(options.out)
    if (out / CHECKPOINT).exists() and not options.resume:
        raise ValueError(f"{out} already holds a training: continue it with --resume, or choose another --out")
    with joined(config.device):
        torch.manual_seed(config.seed)
        trainer = Trainer(Transformer(model_config), task, config, folder=out)
        if options.resume:
            trainer.resume(out / CHECKPOINT)
        if trainer.processes.rank == 0:
            write_json(out / CONFIG, {k: v for k, v in options.items() if k not in ("config", "resume")})
        try:
            trainer.train()
        except KeyboardInterrupt:
            say(trainer, f"interrupted after step {trainer.steps_done}; continue with --out {out} --resume")
            raise
        say(trainer, f"{trainer.steps_done} steps, loss {trainer.loss:.3g}: {out / CHECKPOINT}")


def generate(options: Namespace) -> None:
    import torch

    from .checkpoint import load_model
    from .generation import generate

    model, tokenizer = load_model(options.checkpoint)
    prompt = [tokenizer.begin, *tokenizer.encode(options.prompt)]
    longest = model.config.block_size
    if len(prompt) > longest:
        raise ValueError(f"the prompt has {len(prompt) - 1} characters; the model takes at most {longest - 1}")
    count = options.max_new_tokens
    tokens = generate(
        model,
        torch.tensor([prompt]),
        longest + 1 - len(prompt) if count is None else count,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(tokenizer.decode(tokens[0, len(prompt) :]))


def data(options: Namespace) -> None:
    from .data import SentenceTask

    task = SentenceTask(options.sentence, options.skip)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split in ("train", "validation", "test"):
        texts = getattr(task, split)
        sizes[split] = len(texts)
        (out / f"{split}.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        print(f"{split}: {len(texts)} examples of {len(task.sentence)} characters in {out / split}.txt")
    write_json(out / "sizes.json", sizes)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(trainer: Trainer, line: str) -> None:
    if trainer.processes.rank == 0:
        print(line)
