"""How to call a foreign generate: its parameters by name, the form of its prompt by trying, its output by shape.

A `Decoder` is a subject's generate, function or method, behind one interface. Nothing here judges.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, advise
from ..meet.arguments import Unset
from ..subject import Companion, Subject

# Role of a parameter → the names it has in public code, in any case.
NAMES: dict[str, tuple[str, ...]] = {
    "model": ("model", "net", "lm", "gpt", "llm", "transformer", "decoder", "m", "network"),
    "prompt": (
        "prompt", "prompts", "idx", "index", "ids", "input_ids", "inputs", "input", "token_ids", "tokens", "context",
        "x", "start_tokens", "prompt_ids", "prompt_tokens", "start_ids", "input_tokens", "start", "start_context",
        "sequence", "text", "prefix", "src", "start_text", "starting_tokens", "idxs", "contexts", "start_token_ids",
    ),
    "count": (
        "max_new_tokens", "max_new_token", "max_tokens", "new_tokens", "num_tokens", "n_tokens", "num_new_tokens",
        "n_new_tokens", "steps", "length", "n", "max_gen_len", "n_tokens_to_generate", "max_length", "seq_len",
        "max_len", "gen_len", "num_steps", "max_steps", "num_tokens_to_generate", "count", "tokens_to_generate",
    ),
    "temperature": ("temperature", "temp", "tau"),
    "top_k": ("top_k", "topk", "k"),
    "top_p": ("top_p", "topp", "p", "nucleus", "nucleus_p"),
    "threshold": ("filter_thres", "thres"),  # the share of the vocabulary that is dropped
    "sample": ("do_sample", "sample", "sampling", "use_sampling"),
    "greedy": ("greedy",),
    "end": (
        "end", "eos", "eos_id", "eos_token_id", "eos_token", "stop_token", "stop_tokens", "end_token", "stop_id",
        "eot", "end_id", "eos_idx", "stop_token_id", "end_of_text_token", "eot_id", "stop_ids",
    ),
    "pad": ("pad", "pad_id", "pad_token_id", "pad_value", "pad_token", "padding_idx"),
    "mask": ("mask", "attention_mask", "prompt_mask", "attn_mask", "pad_mask", "padding_mask"),
    "generator": ("generator", "rng"),
    "seed": ("seed", "random_seed"),
    "use_cache": ("use_cache", "use_kv_cache", "use_kv", "cache_kv", "kv_cache", "cached", "with_cache"),
    "context_size": (
        "context_size", "block_size", "context_length", "max_seq_length", "max_context", "ctx_len", "context_len",
        "max_seq_len", "n_ctx", "window", "max_context_length",
    ),
    "tokenizer": ("tokenizer", "tok", "enc", "encoding"),
    "encode": ("encode", "encoder"),
    "decode": ("decode",),
    "batch_size": ("batch_size",),
    "device": ("device",),
    "copies": ("num_return_sequences", "num_samples", "n_samples"),
    "penalty": ("repetition_penalty", "repeat_penalty", "rep_penalty", "penalty"),  # 1 has no effect
    "charge": ("presence_penalty", "frequency_penalty", "freq_penalty", "alpha_presence"),  # 0 has none
    "beams": ("num_beams", "beam_size", "beam_width", "n_beams", "num_beam", "beams", "beam"),
    "length_penalty": ("length_penalty", "len_penalty", "length_alpha", "length_norm"),
    "quiet": ("verbose", "stream", "print_output", "streaming", "debug", "progress"),
}  # fmt: skip
ROLES = {name: role for role, names in NAMES.items() for name in names}
IN_ORDER = ("model", "prompt", "count")  # roles of the first parameters if their names are unknown

OF_TRANSFORMERS = {  # what the transformers library accepts besides its named parameters
    "count": "max_new_tokens", "sample": "do_sample", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "end": "eos_token_id", "pad": "pad_token_id", "mask": "attention_mask", "use_cache": "use_cache",
}  # fmt: skip

FORMS = ("rows", "row", "list", "lists", "text")  # of a prompt: [B, T], [T], ids, lists of ids, a string
FIRST_CHARACTER = 0x4E00  # stands for id 0, where a generate expects text

Rows = list[list[int]]


class Unreadable(ValueError):
    """Output of an unknown form."""


@dataclass(frozen=True)
class Decoder:
    """A subject's generate and how to call it: the role of each parameter, the form of its prompt and of its output."""

    name: str
    find: Callable[[nn.Module], Callable[..., Any]]  # the function, or a model's bound method
    takes: Mapping[str, str]  # role → parameter
    defaults: Mapping[str, Any]  # role → default, of the parameters that have one
    vocab_size: int
    block_size: int
    form: str = "rows"
    batched: bool = True  # whether it takes several rows at once
    with_prompt: bool = True  # whether the output begins with the prompt
    counts_prompt: bool = False  # whether its number of tokens includes the prompt

    def __call__(self, model: nn.Module, prompts: Tensor | Rows, n: int, **options: Any) -> Rows:
        """The new tokens of each row. `options` are roles of NAMES; by default temperature 1 and no filter."""
        answers = self.answers(model, prompts, n, **options)
        return [row[len(prompt) :] if self.with_prompt else row for row, prompt in answers]

    def answers(
        self, model: nn.Module, prompts: Tensor | Rows, n: int, **options: Any
    ) -> list[tuple[list[int], list[int]]]:
        """The output of each row, and its prompt. Rows go one at a time if the function takes no batch."""
        rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        found = []
        for group in [rows] if self.batched else [[row] for row in rows]:
            count = n + len(group[0]) if self.counts_prompt else n
            outputs = read_answer(self.raw(model, self.given(group, device(model)), len(group), count, **options))
            if len(outputs) != len(group):
                raise Unreadable(f"{self.name} returned {len(outputs)} rows for {len(group)} prompts")
            found += list(zip(outputs, group, strict=True))
        return found

    def raw(self, model: nn.Module, prompt: Any, B: int, n: int, **options: Any) -> Any:
        """The function's own output for a prompt in its own form; a generator's items in a list."""
        if "sample" in options:
            options["greedy"] = not options["sample"]
        roles = {**self.neutral(prompt, B, device(model)), **options, "model": model, "prompt": prompt, "count": n}
        call = self.find(model)
        named = {self.takes[role]: value for role, value in roles.items() if role in self.takes}
        answer = call(*positional(call, named), **named)
        return list(answer) if isinstance(answer, Iterator) else answer

    def given(self, rows: Rows, where: torch.device) -> Any:
        """Rows of ids in the form that the function expects."""
        match self.form:
            case "rows":
                return torch.tensor(rows, device=where)
            case "row":
                return torch.tensor(rows[0], device=where)
            case "list":
                return list(rows[0])
            case "lists":
                return [list(row) for row in rows]
            case _:
                return Alphabet().decode(rows[0])

    def neutral(self, prompt: Any, B: int, where: torch.device) -> dict[str, Any]:
        """Arguments with no effect: no filter, no end token, temperature 1, one output per row."""
        alphabet = Alphabet()
        asked = {
            "temperature": 1.0, "sample": True, "greedy": False, "threshold": 0.0, "copies": 1,
            "penalty": 1.0, "charge": 0.0, "quiet": False, "batch_size": B, "device": where,
            "context_size": self.block_size,
            "tokenizer": alphabet, "encode": alphabet.encode, "decode": alphabet.decode,
        }  # fmt: skip
        if self.defaults.get("top_k", ...) not in (None, 0):
            asked["top_k"] = self.vocab_size
        if self.defaults.get("top_p", ...) not in (None, 1.0):
            asked["top_p"] = 1.0
        end = self.defaults.get("end", ...)
        if end not in (None, (), []):  # some make a tensor of it, which fails for None
            asked["end"] = () if isinstance(end, tuple | list) else -1 if isinstance(end, int) else None
        if "end" not in self.defaults:
            asked["end"] = -1  # required; an id that never occurs
        required = (("pad", 0), ("use_cache", False), ("beams", 1), ("length_penalty", 1.0))
        asked |= {role: value for role, value in required if role not in self.defaults}
        if "mask" not in self.defaults and isinstance(prompt, Tensor):
            asked["mask"] = torch.ones_like(prompt)
        if self.of_transformers:  # which otherwise infers a mask from the ids that equal the pad
            asked |= {"mask": torch.ones_like(prompt), "top_k": 0, "end": None, "pad": self.vocab_size}
        return asked

    def without(self, roles: Iterable[str]) -> Decoder:
        """The same function, called without the arguments of these roles."""
        return replace(self, takes={role: name for role, name in self.takes.items() if role not in roles})

    def end_value(self, end: int) -> int | tuple[int]:
        """The end token as the function expects it: an id, or a tuple of ids."""
        return (end,) if isinstance(self.defaults.get("end"), tuple | list) else end

    @property
    def of_transformers(self) -> bool:
        return "generation_config" in self.takes.values()

    def wants(self, *roles: str) -> None:
        """Raises NotApplicable unless the function has a parameter for each of the roles."""
        missing = [role for role in roles if role not in self.takes]
        if missing:
            raise NotApplicable(
                f"{self.name} has no parameter for {' or '.join(missing)}", parameters=sorted(self.takes.values())
            )


class Alphabet:
    """A tokenizer for a generate that expects text: one character per id, for any vocabulary."""

    eos_token_id = None

    def encode(self, text: str, *_: Any, **__: Any) -> list[int]:
        return [ord(character) - FIRST_CHARACTER for character in text]

    def decode(self, ids: Any, *_: Any, **__: Any) -> str:
        return "".join(chr(FIRST_CHARACTER + i) for i in torch.as_tensor(ids).flatten().tolist())

    def __call__(self, text: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([self.encode(text)])}


def decoder(subject: Subject, model: nn.Module, vocab_size: int, further: Companion | None = None) -> Decoder:
    """The subject's own generate, or a further function that generates, and how to call it, found out by short calls.

    Raises NotApplicable if there is none or its parameters are not understood; its own errors are passed on.
    """
    name, find = locate_generate(subject, model) if further is None else locate_further(subject, model, further)
    takes, defaults = understand(name, find(model))
    known = Decoder(name, find, takes, defaults, vocab_size, subject.sizes.block_size)
    try:
        return learn_forms(known, model)
    except (ValueError, TypeError) as error:
        less = known.without(unpromised(known, model, str(error)))
        if less == known:
            raise
        try:
            found = learn_forms(less, model)
        except Exception:
            raise error from None
    left_out = ", ".join(sorted({*takes.values()} - {*found.takes.values()}))
    advise(f"{name} refuses {left_out}, which its signature does not name: it is called without")
    return found


def unpromised(known: Decoder, model: nn.Module, refusal: str) -> set[str]:
    """The roles of arguments that a refusal names and the signature does not: these were our choice alone."""
    promised = signature(known.find(model)).parameters
    needed = {known.takes[role] for role in IN_ORDER if role in known.takes}
    return {
        role for role, name in known.takes.items()
        if name not in promised and name not in needed and re.search(rf"\b{name}\b", refusal)
    }  # fmt: skip


def locate_generate(subject: Subject, model: nn.Module) -> tuple[str, Callable[[nn.Module], Callable[..., Any]]]:
    if subject.brings("generate"):
        function = subject.parts.generate
        return getattr(function, "__name__", "generate"), lambda _: function
    if callable(getattr(model, "generate", None)):
        return f"{type(model).__name__}.generate", lambda model: model.generate
    raise NotApplicable(
        "your file defines no generate, neither as a function nor as a method of the model",
        unless="--with generate=FILE.py:NAME",
    )


def locate_further(
    subject: Subject, model: nn.Module, further: Companion
) -> tuple[str, Callable[[nn.Module], Callable[..., Any]]]:
    name = further.name.rpartition(".")[2]
    if name == further.name:
        return name, lambda _: inside(subject, further.value)
    if getattr(type(model), name, None) is not further.value:
        raise NotApplicable(f"it is no method of {type(model).__name__}")
    return further.name, lambda model: inside(subject, getattr(model, name))


def inside(subject: Subject, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run as the subject's own code is."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with subject.running():
            return function(*args, **kwargs)

    return run


def generate_in(scope: Mapping[str, Any], module: str) -> str | None:
    """The name of the only function that generates from a model, a prompt and a number of tokens, by those names.

    None where a class has a generate of its own, and where several functions may be meant.
    """
    own = {name: value for name, value in scope.items() if getattr(value, "__module__", None) == module}
    if any(inspect.isclass(value) and callable(getattr(value, "generate", None)) for value in own.values()):
        return None
    found = [name for name, value in own.items() if inspect.isfunction(value) and _is_generate(name, value)]
    return found[0] if len(found) == 1 else None


def _is_generate(name: str, function: Callable[..., Any]) -> bool:
    if not re.match(r"(generate|sample|complete)(_|$)", name) or "beam" in name:
        return False
    parameters = [p for p in signature(function).parameters.values() if p.kind not in VARIADIC]
    roles = {p.name: ROLES.get(p.name.lower(), "") for p in parameters}
    known = all(roles[p.name] for p in parameters if p.default is p.empty)
    return known and {"model", "prompt", "count"} <= {*roles.values()} and "beams" not in roles.values()


def generates(function: Callable[..., Any], *, method: bool) -> bool:
    """Whether a function of a name that says so continues a prompt: by what its parameters are called.

    A function is handed a model; a method, its model being `self`, a prompt and how many tokens to add.
    """
    try:
        names = [p.name for p in signature(function).parameters.values() if p.kind not in VARIADIC]
    except (TypeError, ValueError):
        return False
    roles = {ROLES.get(name.lower(), "") for name in (names[1:] if method else names)}
    return roles >= {"prompt", "count"} if method else "model" in roles and bool(roles & {"prompt", "count"})


def understand(name: str, function: Callable[..., Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Role → parameter, role → default. A required parameter of unknown name gets its role by its position."""
    parameters = [p for p in signature(function).parameters.values() if p.kind not in VARIADIC]
    takes: dict[str, str] = {}
    for parameter in parameters:
        takes.setdefault(ROLES.get(parameter.name.lower(), ""), parameter.name)
    takes.pop("", None)
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in takes.values()]
    for role in IN_ORDER if len(unknown) > 0 else ():
        free = role not in takes and not (role == "model" and inspect.ismethod(function))
        if unknown and free:
            takes[role] = unknown.pop(0)
    if any(p.name == "generation_config" for p in parameters):
        takes |= {**OF_TRANSFORMERS, "prompt": "inputs", "config": "generation_config"}
    if unknown or "prompt" not in takes or "count" not in takes:
        refuse_signature(name, function, unknown)
    of_name = {parameter: role for role, parameter in takes.items()}
    defaults = {of_name[p.name]: p.default for p in parameters if p.default is not p.empty and p.name in of_name}
    return takes, defaults


def refuse_signature(name: str, function: Callable[..., Any], unknown: Sequence[str]) -> None:
    what = f"unknown parameter {', '.join(unknown)}" if unknown else "no parameter for the prompt or the token count"
    raise NotApplicable(
        f"{name}{signature(function)} cannot be called: {what}. {wrapper(name)}",
        signature=str(signature(function)),
    )


def wrapper(name: str) -> str:
    return (
        "To fix this, add a wrapper:\n"
        "def generate(model, prompt, max_new_tokens):  # prompt: token ids [B, T]\n"
        f"    return {name}(...)  # token ids [B, T + max_new_tokens]"
    )


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of the function itself, even if a decorator hides it behind *args and **kwargs."""
    found = inspect.signature(function)
    if any(p.kind not in VARIADIC for p in found.parameters.values()):
        return found
    inner = getattr(function, "__func__", function)
    for cell in getattr(inner, "__closure__", None) or ():
        if inspect.isfunction(cell.cell_contents):
            hidden = inspect.signature(cell.cell_contents)
            own = list(hidden.parameters.values())[1 if inspect.ismethod(function) else 0 :]
            return hidden.replace(parameters=own)
    return found


def positional(call: Callable[..., Any], named: dict[str, Any]) -> list[Any]:
    """Removes from `named` the arguments that can only be passed by position, and returns them."""
    only = [p.name for p in signature(call).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    return [named.pop(name) for name in only if name in named]


def learn_forms(known: Decoder, model: nn.Module) -> Decoder:
    """Tries the forms of a prompt, the likeliest first, several rows before one, until the output can be read."""
    T, n = max(1, min(5, known.block_size - 2)), 2
    rows = [[(7 * i + 3 * b + 1) % known.vocab_size for i in range(T)] for b in range(2)]
    first: Exception | None = None
    for form in likely_forms(known, model):
        for batched in (True, False) if form in ("rows", "lists") else (False,):
            attempt = replace(known, form=form, batched=batched)
            try:
                return learn_lengths(attempt, model, rows, n)
            except Exception as error:  # the wrong form, or a bug: if no form works, the first of these is raised
                first = first or error
    assert first is not None
    if isinstance(first, Unset):  # raised by our placeholder for an argument, not by the model
        raise NotApplicable(
            f"{known.name} needs the model's own tokenizer, which is not available here: {first}. {wrapper(known.name)}"
        )
    raise first


def learn_lengths(attempt: Decoder, model: nn.Module, rows: Rows, n: int) -> Decoder:
    """Finds out whether the output includes the prompt, and whether the number of tokens does."""
    output, prompt = attempt.answers(model, rows, n)[0]
    attempt = replace(attempt, with_prompt=len(output) >= len(prompt))
    if len(attempt(model, rows, n)[0]) == n:
        return attempt
    total = replace(attempt, counts_prompt=True)
    return total if len(total(model, rows, n)[0]) == n else attempt


def likely_forms(known: Decoder, model: nn.Module) -> list[str]:
    annotation = str(signature(known.find(model)).parameters.get(known.takes["prompt"]))
    if "str" in annotation.replace("string", "str").partition(":")[2]:
        return ["text", *FORMS[:-1]]
    if "list" in annotation.lower():
        return ["lists", "list", "rows", "row"] if annotation.lower().count("list") > 1 else ["list", "lists", "rows"]
    return [*FORMS] if {"tokenizer", "encode"} & known.takes.keys() else [*FORMS[:-1]]


def read_answer(answer: Any) -> Rows:
    """Rows of ids from a tensor, an array, lists, text, or an object that holds one of these."""
    if isinstance(answer, str):
        return [Alphabet().encode(answer)]
    if isinstance(answer, Tensor) or hasattr(answer, "__array__"):
        return read_ids(torch.as_tensor(answer))
    if isinstance(answer, Mapping):
        return read_answer(next((answer[key] for key in HOLDS if key in answer), next(iter(answer.values()), None)))
    if isinstance(answer, tuple) and answer and not isinstance(answer[0], int):
        return read_answer(answer[0])
    if isinstance(answer, list | tuple):
        return read_list(list(answer))
    for key in HOLDS:
        if hasattr(answer, key):
            return read_answer(getattr(answer, key))
    raise Unreadable(f"output of type {type(answer).__name__} is not understood")


HOLDS = ("sequences", "generated_ids", "output_ids", "tokens", "ids", "token_ids", "text")


def read_ids(ids: Tensor) -> Rows:
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise Unreadable(f"output of shape {list(ids.shape)} and {ids.dtype} is not understood")
    rows: Rows = ids.tolist() if ids.dim() == 2 else [ids.tolist()]
    return rows


def read_list(items: list[Any]) -> Rows:
    """A row of ids; rows of ids; or what a generator yielded: one token per step, or all tokens so far."""
    if not items:
        return [[]]
    if all(isinstance(item, Tensor) for item in items):
        if len(items) > 1 and items[-1].numel() > items[0].numel():
            return read_answer(items[-1])
        columns = [item.reshape(len(item) if item.dim() == 2 else 1, -1) for item in items]
        return read_ids(torch.cat(columns, dim=1))
    if all(isinstance(item, str) for item in items):
        return [Alphabet().encode("".join(items))]
    if all(isinstance(item, list | tuple) for item in items):
        return [[int(i) for i in row] for row in items]
    return [[int(i) for i in items]]


def device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
