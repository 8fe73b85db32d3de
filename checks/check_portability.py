"""The same numbers on another code path: attention backends, compilers, export, recomputation, another device."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .expect import READABLE, REPEATS, Bound, NotApplicable, advise, expect_close, fail, needs, note, slow
from .probes.influence import block_of_tokens
from .probes.padding import real, with_and_without
from .probes.precision import clearly_differ, precise, precision, spread
from .probes.recomputation import checkpointing
from .subject import Subject
from .watch.calls import first_breaking
from .watch.devices import Homeless
from .watch.draws import seeded

COMPILED = 1e-4  # standard deviations of the logits in float32; correct models: 2e-6
ROWS = 3
RATE = 0.3
AttentionPath = Callable[[], AbstractContextManager[None]]  # inside it attention is computed in another way


def _masks(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    long = tokens.shape[1] > 3  # so that padding leaves a row with more than one token
    return (case for case in with_and_without(subject, tokens) if long or case[1] is None)


@needs(*READABLE)
def check_forward_stays_on_its_device(subject: Subject) -> None:
    """Forward must create its tensors on the device of its tokens and weights, not on the default device."""
    model, tokens = subject.build(seed=subject.seed), block_of_tokens(subject, ROWS)
    masks = dict(_masks(subject, tokens))
    owned = [*model.parameters(), *model.buffers(), tokens, *(mask for mask in masks.values() if mask is not None)]
    watch = Homeless(owned)
    for given, mask in masks.items():
        with torch.no_grad(), watch.during(given):
            subject.logits(model, tokens, mask)
    if not watch.found:
        return
    given, maker, operation, line = watch.found
    says = (
        f"forward ({given}) creates a tensor with torch.{maker} on the default device and combines it with the model's "
        f"tensors in {operation}, which raises an error on a GPU"
    )
    advice = f"create it on the model's device: torch.{maker}(…, device=tokens.device)"
    if subject.device.type == "cpu" and not watch.aware:  # written for the CPU, where it works
        advise(f"{says} ({line}); {advice}")
    else:
        fail(
            f"{says}; other tensors are created on the model's device",
            where=line,
            likely=("device-hardcoded",),
            advice=advice,
        )


@needs(*READABLE, REPEATS)
def check_attention_backends_agree(subject: Subject) -> None:
    """PyTorch's math kernel, and every other attention path of the model, must give the same logits."""
    model, tokens = precise(subject), block_of_tokens(subject, ROWS)
    tried = []
    for given, mask in _masks(subject, tokens):
        forward = partial(subject.logits, model, tokens, mask)
        with torch.no_grad():
            want = forward()
            for name, path in _paths(model):
                again = partial(_inside, path, forward)
                try:
                    got = again()
                except Exception as error:  # a path that this model or machine does not have
                    note(**{f"refused: {name}": f"{type(error).__name__}: {error}"[:200]})
                    continue
                tried.append(name)
                expect_close(
                    real(got, mask),
                    real(want, mask),
                    bound=precision(subject).bound(want) if name == KERNEL else _loosely(want),
                    says=f"with {name} ({given}) the logits are different",
                    where=partial(first_breaking, model, forward, again, clearly_differ),
                    likely=("backends-disagree",),
                    advice="give both paths the same mask, scale, softcap and alignment of queries and keys",
                )
    note(tried=sorted(set(tried)))
    if not tried:
        raise NotApplicable("the model has a single attention path")


def _inside(path: AttentionPath, forward: Callable[[], Tensor]) -> Tensor:
    with path():
        return forward()


def _loosely(logits: Tensor) -> Bound:
    return Bound(1e-5 * spread(logits), "1e-05 standard deviations of the logits: either path may compute in float32")


KERNEL = "PyTorch's math kernel"
FLAG = re.compile(
    r"^(use_|enable_|is_|_)*(flash|sdpa|fused|efficient|fast|memory_efficient)(_?(attn|attention|path))?$"
)


def _paths(model: nn.Module) -> Iterator[tuple[str, AttentionPath]]:
    """Other ways to compute attention: PyTorch's math kernel, the model's own switches, its library's switch."""
    yield KERNEL, partial(sdpa_kernel, SDPBackend.MATH)
    flags = sorted(
        {key for m in model.modules() for key, v in vars(m).items() if isinstance(v, bool) and FLAG.match(key)}
    )
    for flag in flags:
        yield f"the attribute {flag} inverted", partial(_switched, model, flag)
    if hasattr(model, "set_attn_implementation") and hasattr(model, "config"):
        now = getattr(model.config, "_attn_implementation", None)
        for other in {"eager", "sdpa"} - {now}:
            yield f"{other} attention", partial(_implemented, model, other, now)


@contextmanager
def _switched(model: nn.Module, flag: str) -> Iterator[None]:
    held = [(module, vars(module)[flag]) for module in model.modules() if isinstance(vars(module).get(flag), bool)]
    for module, value in held:
        setattr(module, flag, not value)
    try:
        yield
    finally:
        for module, value in held:
            setattr(module, flag, value)


@contextmanager
def _implemented(model: Any, name: str, before: Any) -> Iterator[None]:
    with _quietly():
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        with _quietly():
            model.set_attn_implementation(before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences libraries and compilers, which report much about what they cannot do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@needs(*READABLE, REPEATS)
def check_compiled_model_agrees(subject: Subject) -> None:
    """Captured by torch.compile (without generating code), the model must give the same logits and gradients."""
    _expect_compiled(subject, "eager")  # "aot_eager" captures PyTorch's own operations too, and takes twice as long


@slow("Inductor generates and compiles code for 20 to 35 seconds")
@needs(*READABLE, "check_portability.check_compiled_model_agrees")
def check_inductor_agrees(subject: Subject) -> None:
    """Compiled by Inductor, the model must give the same logits and gradients."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise NotApplicable("no C++ compiler was found")
    _expect_compiled(subject, "inductor")


def _expect_compiled(subject: Subject, backend: str) -> None:
    if not subject.learns:
        raise NotApplicable("the model has no parameters, so PyTorch does not compute it")
    sizes: dict[str, Any] = dict(n_layer=1) if subject.can_vary("n_layer") else {}
    model = subject.amplified(seed=subject.seed, dtype=torch.float32, **sizes)
    tokens = block_of_tokens(subject, ROWS)
    want, gradients = _with_gradients(subject, model, tokens)
    forward = model.forward
    torch._dynamo.reset()
    try:
        with _quietly():
            model.forward = torch.compile(forward, backend=backend)  # every call of the model now goes here
            got, theirs = _with_gradients(subject, model, tokens)
    except Exception as error:  # a compiler that fails changes no number
        advise(f"torch.compile(backend={backend!r}) fails: {type(error).__name__}")
        raise NotApplicable(f"torch.compile fails: {str(error).splitlines()[0][:200]}") from None
    finally:
        vars(model).pop("forward", None)
        torch._dynamo.reset()
    finding: dict[str, Any] = dict(
        likely=("other-path-when-compiled",),
        advice="look for torch.compiler.is_compiling() and is_tracing(), and for Python state that forward changes",
    )
    compiled = f"compiled by torch.compile(backend={backend!r})"
    expect_close(got, want, bound=_single(want), says=f"{compiled}, the logits are different", **finding)
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    bound = Bound(COMPILED * largest, f"{COMPILED:.0e} of the largest gradient")
    for name, gradient in gradients.items():
        axes = [f"index {axis}" for axis in range(gradient.dim())]
        says = f"{compiled}, the gradient of {name} is different"
        expect_close(theirs[name], gradient, bound=bound, says=says, axes=axes, **finding)


def _single(logits: Tensor) -> Bound:
    return Bound(COMPILED * spread(logits), f"{COMPILED:.0e} standard deviations of the logits, in float32")


def _with_gradients(subject: Subject, model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    with seeded(subject.seed):
        logits = subject.logits(model, tokens)
        if logits.requires_grad:
            torch.autograd.backward(logits.square().mean())
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@needs(*READABLE, REPEATS)
def check_exported_model_agrees(subject: Subject) -> None:
    """Exported by torch.export, the model must give the same logits, for other tokens than it was exported with."""
    model, tokens = subject.amplified(seed=subject.seed, dtype=torch.float32), block_of_tokens(subject, ROWS)
    others = subject.tokens(*tokens.shape, seed=subject.seed + 1)
    with torch.no_grad():
        subject.logits(model, tokens)
        try:
            with _quietly():
                exported = torch.export.export(_AsModule(subject, model), (tokens,)).module()
        except Exception as error:  # data-dependent control flow, for example
            raise NotApplicable(f"torch.export refuses the model: {str(error).splitlines()[0][:200]}") from None
        got, want = exported(others), subject.logits(model, others)
    expect_close(
        got,
        want,
        bound=_single(want),
        says="exported by torch.export, the model gives different logits",
        likely=("other-path-when-compiled", "constant-baked-in"),
        advice="look for .item(), int(tensor) and torch.compiler.is_compiling(): export freezes their values",
    )


class _AsModule(nn.Module):
    """The call of the subject as a module, so that the logits are exported whatever the model returns."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.call = partial(subject.logits, model)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.call(tokens)


@needs(*READABLE, "check_gradients.check_training_gradients_equal_finite_differences")
def check_recomputation_changes_nothing(subject: Subject) -> None:
    """Activation checkpointing must change neither logits nor gradients, with dropout on."""
    sizes: dict[str, Any] = dict(dropout=RATE) if subject.can_vary("dropout") else {}
    model, tokens = precise(subject, **sizes).train(), block_of_tokens(subject, ROWS)
    switch = checkpointing(model)
    if switch is None:
        raise NotApplicable(
            "the model has no switch for activation checkpointing: neither gradient_checkpointing_enable() nor a flag"
        )
    want, gradients = _with_gradients(subject, model, tokens)
    switch()
    calls = []
    original = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with patch.object(torch.utils.checkpoint, "checkpoint", counted):
        got, theirs = _with_gradients(subject, model, tokens)
    if not calls:
        note(recomputed="not seen: torch.utils.checkpoint.checkpoint may have been imported by name")
    finding: dict[str, Any] = dict(
        likely=("recomputation-drops-other-units", "recomputation-under-no-grad"),
        advice="use torch.utils.checkpoint.checkpoint(…, use_reentrant=False) and keep preserve_rng_state on",
    )
    bound = precision(subject).bound(want)
    expect_close(got, want, bound=bound, says="with activation checkpointing the logits are different", **finding)
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    for name, gradient in gradients.items():
        missing = name not in theirs
        expect_close(
            torch.zeros_like(gradient) if missing else theirs[name],
            gradient,
            bound=Bound(1e-6 * largest, "1e-06 of the largest gradient"),
            says=f"with activation checkpointing {name} gets {'no' if missing else 'a different'} gradient",
            axes=[f"index {axis}" for axis in range(gradient.dim())],
            **finding,
        )
