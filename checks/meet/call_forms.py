"""The ways to call a model on tokens [B, T], by the names of its forward's parameters; the plainest first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import vocabulary
from .arguments import Parameter
from .build import FunctionModule
from .logits import Unreadable, described, tensors_in
from .sizes import sizes_of

SOURCE_LENGTH = 5  # of an encoder's input; differs from the other lengths of the trial batch
HEADS = ("generator", "lm_head", "head", "project", "projection", "proj", "to_logits", "unembed", "output_layer",
         "fc_out", "hidden_state_to_token", "out_proj", "output", "out", "decoder", "linear", "fc", "projection_layer",
         "final_layer", "classifier", "embed_out", "unembedding")  # fmt: skip
METHODS = ("forward_inference", "logits", "get_logits", "forward_logits", "predict", "forward_pass")


@dataclass(frozen=True)
class CallForm:
    """One way to call a model on tokens [B, T]; `run(model, tokens, **more)` returns what the model returns."""

    says: str  # forward(idx, targets)
    run: Callable[..., Any]
    assumed: str = ""
    from_loss: bool = False  # the logits are those that the model passes to its loss
    padded: bool = False  # shorter sequences are padded to the block size on the right
    guessed: tuple[str, ...] = ()  # required parameters of unknown meaning, which are given the tokens
    beside: Callable[[Tensor, nn.Module], dict[str, Any]] = lambda tokens, model: {}  # what forward gets by name


def parameters_of(model: nn.Module) -> list[Parameter]:
    """The parameters of the model's forward, or of the function behind it."""
    function = model.function if isinstance(model, FunctionModule) else model.forward
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [Parameter("tokens")]
    return [
        Parameter(
            p.name,
            vocabulary.MISSING if p.default is p.empty else p.default,
            None if p.annotation is p.empty else p.annotation,
        )
        for p in found
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ] or [Parameter("tokens")]


def call_forms(model: nn.Module, vocab_size: int, block_of: Callable[[nn.Module], int]) -> Iterator[CallForm]:
    """The call forms to try, the plainest first."""
    if type(model).forward is nn.Module.forward:
        yield from _methods(model, vocab_size)
        return
    parameters = parameters_of(model)
    direct = list(_direct(parameters, vocab_size))
    yield from direct
    for form in direct[:4]:
        yield _padded(form, block_of)
    if any(vocabulary.squash(p.name) in vocabulary.STARTS for p in parameters):
        yield _one_by_one(parameters)
    if hasattr(model, "setup_caches"):
        yield from (_prepared(form, block_of) for form in direct)
    if isinstance(model, FunctionModule):
        yield CallForm("f(array)", _on_array, "the model is called with NumPy arrays")
        yield _row_by_row()
    for form in direct[:4]:
        yield _one_sequence(form)
    yield from _methods(model, vocab_size)


Argument = Callable[[Tensor, nn.Module], Any]


def _direct(parameters: list[Parameter], vocab_size: int) -> Iterator[CallForm]:
    first, rest = parameters[0], parameters[1:]
    second = _second(parameters)
    if second is not None:
        yield from _encoder_decoder(parameters, second, vocab_size)
    required = [p for p in rest if p.default is vocabulary.MISSING]
    choices = [list(_choices(p)) for p in required]
    targets = next((p for p in rest if vocabulary.squash(p.name) in vocabulary.TARGETS and p not in required), None)
    extra: list[list[tuple[Parameter, Argument]]] = [[]]
    if targets is not None:
        extra.append([(targets, lambda x, m: x.clone())])
    optional = [p for p in rest if p not in required]
    extra += [[(p, next(_choices(p)))] for p in optional if vocabulary.squash(p.name) in vocabulary.POSITIONS]
    extra += [[(p, lambda x, m: True), *given] for p in optional if _asks_logits(p) for given in list(extra)]
    extra += [[(p, _empty_caches)] for p in optional if vocabulary.squash(p.name) in vocabulary.CACHES]
    extra += [
        [(p, lambda x, m: False)]
        for p in optional
        if vocabulary.squash(p.name) == "usecache" and p.default is not False
    ]
    for more, chosen in product(extra, product(*choices)):
        given = [*zip(required, chosen, strict=True), *more]
        says = ", ".join([first.name, *(p.name for p, _ in given)])
        guessed = tuple(p.name for p, make in given if make is _the_tokens)
        beside = _arguments(given)
        yield CallForm(f"forward({says})", _caller(beside), guessed=guessed, beside=beside)


def _second(parameters: list[Parameter]) -> int | None:
    """Which parameter takes the decoder's input in an encoder-decoder; None in any other model."""
    plain = [vocabulary.squash(p.name) for p in parameters]
    decoded = next((i for i, name in enumerate(plain[1:], 1) if _is_decoded(name)), None)
    if decoded is not None and _is_source(plain[0]) and parameters[decoded].default is vocabulary.MISSING:
        return decoded
    return next((i for i, name in enumerate(plain[1:], 1) if _is_decoders(name)), None)


def _is_source(plain: str) -> bool:
    return plain in vocabulary.SOURCES or (plain.startswith(("src", "source", "enc")) and "mask" not in plain)


def _is_decoded(plain: str) -> bool:
    return plain in vocabulary.DECODED or (plain.startswith(("tgt", "trg", "target", "dec")) and "mask" not in plain)


def _is_decoders(plain: str) -> bool:
    """Whether the name says that a decoder reads it, so that there is an encoder: decoder_input_ids=None."""
    return plain in vocabulary.DECODED and plain.startswith("dec")


def _choices(parameter: Parameter) -> Iterator[Argument]:
    """Values to try for a required parameter of forward."""
    name = vocabulary.squash(parameter.name)
    if name in vocabulary.TARGETS or name in vocabulary.DECODED:
        yield lambda x, m: x.clone()
    elif name in vocabulary.STARTS:
        yield lambda x, m: 0
        yield lambda x, m: torch.arange(x.shape[1], device=x.device)
    elif name in vocabulary.POSITIONS:
        yield lambda x, m: torch.arange(x.shape[1], device=x.device)
        yield lambda x, m: torch.arange(x.shape[1], device=x.device).expand(x.shape).contiguous()
    elif "mask" in name or name == "ignore":
        yield from _masks()
    elif name in vocabulary.CACHES:
        yield lambda x, m: None
        yield lambda x, m: _called(m, "init_hidden", x.shape[1])
        yield lambda x, m: _called(m, "init_hidden", x.shape[0])
    elif name in ("training", "train", "istraining", "usecache", "inference"):
        yield lambda x, m: False
    else:
        size = vocabulary.size_of(parameter.name)
        if size == "block_size":
            yield lambda x, m: x.shape[1]
        yield lambda x, m: None
        yield _the_tokens


def _the_tokens(tokens: Tensor, model: nn.Module) -> Tensor:
    """For targets under an unknown name, which change no logit: `find_forward` tries that."""
    return tokens.clone()


def _asks_logits(parameter: Parameter) -> bool:
    """Whether it is like `get_logits=False`: forward returns logits only if it is True."""
    return parameter.default is False and "logit" in parameter.name and "last" not in parameter.name


def _empty_caches(tokens: Tensor, model: nn.Module) -> list[None]:
    """One place per block, for code that fills them whether or not a cache is used."""
    return [None] * (sizes_of(model)["n_layer"] or 1)


def _called(model: nn.Module, method: str, *arguments: Any) -> Any:
    return getattr(model, method)(*arguments)


def _masks() -> Iterator[Argument]:
    yield lambda x, m: None
    yield lambda x, m: causal(x)
    yield lambda x, m: causal(x).float().log()
    yield lambda x, m: torch.zeros_like(x, dtype=torch.bool)
    yield lambda x, m: causal(x)[None, None].expand(x.shape[0], 1, -1, -1)


def causal(tokens: Tensor) -> Tensor:
    """[T, T], True where a query may look."""
    T = tokens.shape[1]
    return torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()


def _arguments(given: list[tuple[Parameter, Argument]]) -> Callable[[Tensor, nn.Module], dict[str, Any]]:
    return lambda tokens, model: {p.name: make(tokens, model) for p, make in given}


def _caller(beside: Callable[[Tensor, nn.Module], dict[str, Any]]) -> Callable[..., Any]:
    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        return model(tokens, **{**beside(tokens, model), **more})

    return run


# -- encoder-decoders: the same fixed source for every row


def source(tokens: Tensor, vocab_size: int) -> Tensor:
    """[B, 5]: the source sentence, always the same."""
    ids = torch.arange(1, SOURCE_LENGTH + 1, device=tokens.device) % vocab_size
    return ids.expand(tokens.shape[0], -1).contiguous()


SEEN_SOURCES: tuple[Callable[[Tensor], Any], ...] = (
    lambda s: None,
    lambda s: torch.ones(s.shape[0], 1, 1, s.shape[1], dtype=torch.bool, device=s.device),
    lambda s: torch.ones(s.shape[0], 1, s.shape[1], dtype=torch.bool, device=s.device),
    lambda s: torch.zeros(s.shape[1], s.shape[1], dtype=torch.bool, device=s.device),
)
SEEN_TARGETS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: None,
    lambda x: causal(x)[None, None].expand(x.shape[0], -1, -1, -1),
    lambda x: causal(x)[None].expand(x.shape[0], -1, -1),
    lambda x: ~causal(x),
)


def _encoder_decoder(parameters: list[Parameter], second: int, vocab_size: int) -> Iterator[CallForm]:
    first, decoded = parameters[0], parameters[second]
    required = [p for p in parameters if p.default is vocabulary.MISSING and p not in (first, decoded)]
    of_source = [p for p in required if "mask" in p.name and any(s in p.name for s in ("src", "source", "enc", "mem"))]
    of_target = [p for p in required if "mask" in p.name and p not in of_source]
    others = [p for p in required if p not in of_source + of_target]
    for of_s, of_t in _mask_pairs(bool(of_source or of_target)):

        def run(model: nn.Module, tokens: Tensor, of_s: Any = of_s, of_t: Any = of_t, **more: Any) -> Any:
            fixed = source(tokens, vocab_size)
            given = {**{p.name: of_s(fixed) for p in of_source}, **{p.name: of_t(tokens) for p in of_target}}
            given |= {p.name: next(_choices(p))(tokens, model) for p in others}
            return model(**{first.name: fixed, decoded.name: tokens}, **{**given, **more})

        says = ", ".join(p.name for p in (first, decoded, *required))
        yield CallForm(f"forward({says})", run, f"{first.name} is a fixed source sentence")


def _mask_pairs(any_masks: bool) -> Iterator[tuple[Any, Any]]:
    """Masks of source and target that go together; None and None last, since they may mean no causal mask."""
    if any_masks:
        yield from zip(SEEN_SOURCES[1:], SEEN_TARGETS[1:], strict=True)
        yield SEEN_SOURCES[1], SEEN_TARGETS[2]
    yield SEEN_SOURCES[0], SEEN_TARGETS[0]


def _methods(model: nn.Module, vocab_size: int) -> Iterator[CallForm]:
    """For models whose forward gives no logits: encode, decode and project, or a method that gives logits."""
    parts = [getattr(model, name, None) for name in ("encode", "decode", "project")]
    if callable(parts[0]) and callable(parts[1]):
        head = parts[2] or next((h for n in HEADS if (h := getattr(model, n, None)) is not None and callable(h)), None)
        for of_s, of_t in _mask_pairs(True):

            def run(model: Any, tokens: Tensor, of_s: Any = of_s, of_t: Any = of_t, **more: Any) -> Any:
                fixed = source(tokens, vocab_size)
                seen = of_s(fixed)
                memory = model.encode(fixed, seen)
                arguments = _in_order(model.decode, memory, seen, tokens, of_t(tokens))
                hidden = model.decode(**arguments)
                return getattr(model, "project", head)(hidden) if head is not None else hidden

            yield CallForm("encode, decode, project", run, "the source sentence is fixed")
    others = (name for name in dir(type(model)) if name.startswith("forward_"))  # forward_train: all positions
    for name in dict.fromkeys((*METHODS, *others)):
        method = getattr(type(model), name, None)
        if inspect.isfunction(method) and name != "forward":
            yield from _method(name, method)


def _method(name: str, method: Callable[..., Any]) -> Iterator[CallForm]:
    required = [
        Parameter(p.name) for p in list(inspect.signature(method).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    for chosen in product(*(list(_choices(p)) for p in required[1:])):

        def run(model: nn.Module, tokens: Tensor, chosen: Any = chosen, **more: Any) -> Any:
            given = {p.name: make(tokens, model) for p, make in zip(required[1:], chosen, strict=True)}
            return getattr(model, name)(tokens, **{**given, **more})

        yield CallForm(f"{name}({', '.join(p.name for p in required)})", run)


def _in_order(decode: Any, memory: Any, seen: Any, tokens: Tensor, causal_mask: Any) -> dict[str, Any]:
    """The arguments of a decode method, by its parameters' names."""
    given = {}
    for name in inspect.signature(decode).parameters:
        plain = vocabulary.squash(name)
        if "mask" in plain:
            given[name] = causal_mask if any(w in plain for w in ("tgt", "trg", "target", "dec")) else seen
        elif plain in vocabulary.DECODED or plain in ("tokens", "idx"):
            given[name] = tokens
        elif any(w in plain for w in ("enc", "memory", "mem", "src")):
            given[name] = memory
    return given


# -- forms for models that read other inputs than whole batches of any length


def _padded(form: CallForm, block_of: Callable[[nn.Module], int]) -> CallForm:
    """For a model that reads only inputs of exactly block-size tokens."""

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        B, T = tokens.shape
        filled = torch.cat((tokens, tokens.new_zeros(B, max(block_of(model) - T, 0))), dim=1)
        return _cut(form.run(model, filled, **more), B, filled.shape[1], T)

    assumed = "forward needs exactly block-size tokens: shorter inputs are padded on the right"
    return replace(form, run=run, padded=True, assumed=assumed)


def _cut(output: Any, B: int, S: int, T: int) -> Any:
    """The first T positions of every tensor with S positions."""
    if isinstance(output, tuple | list):
        return [_cut(item, B, S, T) for item in output]
    if isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == (B, S):
        return output[:, :T]
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[0] == B * S:
        return output.view(B, S, -1)[:, :T]
    return output


def _one_by_one(parameters: list[Parameter]) -> CallForm:
    start = next(p.name for p in parameters if vocabulary.squash(p.name) in vocabulary.STARTS)

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        steps = []
        for t in range(tokens.shape[1]):
            output = model(tokens[:, t : t + 1].contiguous(), **{start: t}, **more)
            step = output[0] if isinstance(output, tuple | list) else output
            steps.append(step.view(tokens.shape[0], 1, step.shape[-1]))
        return torch.cat(steps, dim=1)

    return CallForm(f"forward({parameters[0].name}, {start})", run, "the model is called with one token at a time")


def _on_array(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
    return model(tokens.cpu().numpy(), **more)


def _row_by_row() -> CallForm:
    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        rows = [torch.as_tensor(model(row.tolist(), **more)) for row in tokens]
        return torch.stack(rows)

    return CallForm("f(ids)", run, "the model is called with one row of ids at a time")


def _one_sequence(form: CallForm) -> CallForm:
    """For a model without a batch axis: it reads token ids [T] and gives logits [T, V]."""

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        def of_row(value: Any, i: int) -> Any:
            return value[i] if isinstance(value, Tensor) and value.dim() and len(value) == len(tokens) else value

        rows = []
        for i, row in enumerate(tokens):
            output = form.run(model, row, **{name: of_row(value, i) for name, value in more.items()})
            found = next((x for _, x in tensors_in(output) if x.dim() == 2 and len(x) == len(row)), None)
            if found is None:
                raise Unreadable(f"expected logits [{len(row)}, V] of one sequence, got {described(output)}")
            rows.append(found)
        return torch.stack(rows)

    return replace(
        form, run=run, assumed="the model is called with one sequence [T] at a time, as it has no batch axis"
    )


def _prepared(form: CallForm, block_of: Callable[[nn.Module], int]) -> CallForm:
    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        set_up_caches(model, tokens.shape[0], block_of(model), tokens.device, anew=not more)
        return form.run(model, tokens, **more)

    return replace(form, run=run, assumed="setup_caches(B, block size) is called before each forward")


def set_up_caches(model: Any, B: int, capacity: int, device: Any, *, anew: bool) -> None:
    """Has the model set up its caches; caches for a larger batch do not fit a smaller one and are dropped first.

    `anew` if the call continues no text: whatever an earlier call left, its autograd graph included, is dropped.
    """
    if hasattr(model, "max_batch_size") and (anew or model.max_batch_size > B):
        model.max_batch_size = 0
    with torch.device(device):
        model.setup_caches(B, capacity)
