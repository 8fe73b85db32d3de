"""The three commands: their options, read from the command line and from files, and what they do.

The options of `train` are the fields of ModelConfig and TrainConfig, documented by the comments beside these.
torch is imported by the command that needs it, so that help and mistakes do not wait for it.
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
    """What goes wrong, in a line for the user."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(ArgumentParser):
    """Says in one line what is wrong, with the nearest option it knows."""

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
    if options.command == "train" and options.train.resume:  # as it was trained, but for what is asked now
        config = str(Path(options.train.out) / CONFIG)
        options = parser.parse_args(["train", "--config", config, *arguments[1:]])
    return options


@contextmanager
def explained() -> Iterator[None]:
    """A user's mistake and a failed training end in a line; any other exception is a bug and keeps its traceback."""
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
    parser = Parser(prog=PROGRAM, description="Trains a transformer language model and lets it speak.")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train_parser("train" in arguments), help="train a model on the sentence")
    commands.add_subcommand("generate", generate_parser(), help="let a trained model complete a prompt")
    commands.add_subcommand("data", data_parser(), help="write the examples of the sentence task")
    return parser


def train_parser(wanted: bool) -> ArgumentParser:
    parser = Parser(
        usage=f"{PROGRAM} train [options]",  # there are too many to list twice
        description="Trains a model on the sentence; by default as quickly as it can be learned.",
    )
    parser.add_argument("--config", action="config", help="a file with values of these options, as YAML or JSON")
    parser.add_argument("--out", default="out/sentence", help="folder of the checkpoint, the metrics and the config")
    parser.add_argument("--resume", action="store_true", help="go on with the training in that folder")
    add_task_options(parser)
    if wanted:  # else nobody reads them, and they cost the import of torch
        from .model import ModelConfig
        from .train_config import TrainConfig

        add_fields(parser, "the model", ModelConfig, vocab_size=None, block_size=None)
        add_fields(parser, "the training", TrainConfig)
    return parser


def generate_parser() -> ArgumentParser:
    parser = Parser(description="Prints how a trained model completes a prompt.")
    parser.add_argument("--checkpoint", default="out/sentence/checkpoint.pt", help="written by train")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument(
        "--max_new_tokens", type=int | None, help="characters to generate; null: until the block is full"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest character")
    parser.add_argument("--top_k", type=int | None, help="draw from this many likeliest characters only")
    parser.add_argument("--top_p", type=float | None, help="draw from the likeliest that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    return parser


def data_parser() -> ArgumentParser:
    parser = Parser(description="Writes the training, validation and test examples, a line each, and their numbers.")
    parser.add_argument("--out", default="out/data", help="folder to write to")
    add_task_options(parser)
    return parser


def add_task_options(parser: ArgumentParser) -> None:
    parser.add_argument("--sentence", default=SENTENCE, help="what is to be learned")
    parser.add_argument("--skip", type=int, default=0, help="the first so many characters carry no loss")


def add_fields(parser: ArgumentParser, title: str, config: type, **defaults: Any) -> None:
    """Every field of a config dataclass as an option; one with a default of None here follows from the task."""
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
        raise ValueError(f"{out} holds a training already: go on with --resume, or choose another --out")
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
            say(trainer, f"interrupted after step {trainer.steps_done}; {out} goes on with --resume")
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
        raise ValueError(f"the prompt has {len(prompt) - 1} characters; the model reads {longest - 1} at most")
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
