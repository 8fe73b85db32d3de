"""The same numbers with every kernel, precision and device, and no training step that waits or hoards memory.

On CUDA everything is tried, elsewhere what the device has. A check notes what it could not try.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .expect import GRADIENTS, READABLE, NotApplicable, advise, fail, needs, note
from .loss.formula import cross_entropy
from .probes.backward import (
    ROWS,
    apart,
    backward,
    gradient_of,
    gradients_in,
    loss_of,
    needs_finite,
    needs_no_cache_inside,
    needs_numbers,
    scaled_gradient,
    tokens_of,
    without_chance,
)
from .probes.module_state import buffers_kept
from .probes.precision import precision
from .probes.rounding import Promoted, naively
from .subject import EXISTENCE, Subject, cast
from .watch.draws import seeded
from .watch.location import locate
from .watch.memory import Held, peak_bytes
from .watch.waits import Waits

KERNELS = [kernel for name, kernel in SDPBackend.__members__.items() if name not in ("ERROR", "MATH", "OVERRIDEABLE")]
TIMES = {torch.float32: 20.0, torch.bfloat16: 4.0, torch.float16: 4.0}  # as in check_numerics
KERNELS_OWN = 0.1  # relative error of a kernel's own rounding in half precision; a wrong path is of order 1
ANOTHER_WAY = 0.5  # relative error of a parameter's gradient; correct models under autocast: at most 0.1
MATTERS = 1e-3  # norm of a parameter's gradient, relative to that of all, below which it is not judged
STEPS, TIMES_HELD = 50, 5  # training steps, and how many times among them memory is read


# -- kernels


class Attention(TorchFunctionMode):
    """Counts calls of PyTorch's scaled_dot_product_attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


@dataclass
class Computed:
    """The logits and the gradient of the loss with one kernel in one type."""

    logits: Tensor
    gradient: Tensor

    @classmethod
    def by(cls, subject: Subject, model: nn.Module, kernel: SDPBackend) -> Computed:
        tokens = tokens_of(subject)
        model.zero_grad(set_to_none=True)
        with sdpa_kernel(kernel), buffers_kept(model):
            logits = subject.logits(model, tokens[:, :-1])
            backward(cross_entropy(logits.float(), tokens[:, 1:]).mean())
        return cls(logits.detach().double(), gradient_of(model))


@needs(*READABLE, GRADIENTS)
def check_every_attention_kernel_agrees(subject: Subject) -> None:
    """Every PyTorch attention kernel, in every precision it supports, must be about as exact as the math kernel."""
    needs_numbers(subject)
    with torch.no_grad(), Attention() as attention:
        subject.logits(without_chance(subject), tokens_of(subject))
    if not attention.calls:
        raise NotApplicable("the model does not call scaled_dot_product_attention")
    tried, refused = [], {}
    for dtype in TIMES:
        if dtype == precision(subject).dtype:
            continue  # nothing finer to compare with
        if slow := subject.too_slow_in(dtype):
            refused[str(dtype).removeprefix("torch.")] = slow
            continue
        model, twin = rounded(subject, dtype)
        needs_one_way(subject, twin)
        exact = Computed.by(subject, twin, SDPBackend.MATH)
        needs_finite(exact.gradient)
        for kernel in KERNELS:
            name = f"{kernel.name.lower().replace('_attention', '')} in {str(dtype).removeprefix('torch.')}"
            try:
                explicit = Computed.by(subject, model, SDPBackend.MATH)
                got = Computed.by(subject, model, kernel)
            except (RuntimeError, AssertionError) as error:  # no such kernel, type or mask here
                refused[name] = (str(error) or type(error).__name__).splitlines()[0][:120]
                continue
            tried.append(name)
            for what in ("logits", "gradient"):
                refuse_more_error(name, what, *(getattr(x, what) for x in (got, explicit, exact)), dtype=dtype)
    note(kernels=tried, refused=refused)
    if not tried:
        raise NotApplicable("no attention kernel except the math kernel runs this model here", **refused)


def rounded(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model in a type, and one with the same weights in the finest type."""
    model, twin = (without_chance(subject, EXISTENCE[1]) for _ in range(2))
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(dtype))
    return cast(model, dtype), cast(twin, precision(subject).dtype)


def needs_one_way(subject: Subject, model: nn.Module | None = None) -> None:
    """Raises NotApplicable where the model routes tokens to experts: rounding, or other rows, change the route."""
    twin = without_chance(subject, dtype=precision(subject).dtype) if model is None else model
    with naively(twin, torch.bfloat16) as mode:  # follows what has a gradient
        subject.logits(twin, tokens_of(subject, 1, 3))
    if mode.routes:
        raise NotApplicable("the model routes tokens to experts, and rounding can change the route")


def refuse_more_error(
    name: str, what: str, got: Tensor, explicit: Tensor, exact: Tensor, *, dtype: torch.dtype
) -> None:
    error, unavoidable = apart(got, exact), apart(explicit, exact)
    bound = TIMES[dtype] * unavoidable + 8 * torch.finfo(dtype).eps
    if dtype != torch.float32:
        bound = max(bound, KERNELS_OWN)
    if not error <= bound:
        fail(
            f"with PyTorch's attention kernel {name} the {what} {'has' if what == 'gradient' else 'have'} a relative "
            f"error of {error:.3g}, allowed {bound:.3g}; the math kernel in the same precision has {unavoidable:.3g}",
            likely=("path-chosen-by-kernel-switches",),
            advice="look for code that asks which kernels are enabled, and for a mask that kernels read differently",
            error=error,
            unavoidable=unavoidable,
        )


# -- precisions


@needs(*READABLE, GRADIENTS)
def check_mixed_precision_keeps_the_gradient(subject: Subject) -> None:
    """Under autocast to bfloat16, or to float16 with a gradient scaler, each gradient must be close to float32's."""
    needs_numbers(subject)
    needs_one_way(subject)
    model, tokens = without_chance(subject), tokens_of(subject)
    with seeded(subject.seed):
        backward(loss_of(subject, model, tokens))
    want, worst = gradient_of(model), {}
    needs_finite(want)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if slow := subject.too_slow_in(dtype):
            note(**{f"refused: {name}": slow})
            continue
        try:
            got, scale = scaled_gradient(subject, model, tokens, dtype)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # the model refuses this type
            note(**{f"refused: {name}": (str(error) or type(error).__name__).splitlines()[0][:200]})
            continue
        if broken := int((~got.isfinite()).sum()):
            scales = f" at any loss scale down to {scale:g}" if dtype == torch.float16 else ""
            fail(
                f"under autocast to {name}, {broken} of the gradient's {len(got)} numbers are not finite{scales}",
                likely=("fp16-autocast-mask-overflow",),
                advice="mask with masked_fill and -inf, not by multiplying a mask by a large number",
            )
        off, parameter = farthest_off(model, got, want)
        worst[name] = off
        if off > ANOTHER_WAY:
            fail(
                f"under autocast to {name} the gradient of {parameter} has a relative error of {off:.2g} against "
                f"float32, allowed {ANOTHER_WAY:g}",
                where=locate(model, parameter.rpartition(".")[0]),
                likely=("autocast-cuts-the-gradient",),
                advice="convert with .to(dtype), never through .data, detach() or torch.tensor(x)",
            )
    note(off=worst)
    if not worst:
        raise NotApplicable("the model runs under autocast neither to bfloat16 nor to float16 here")


def farthest_off(model: nn.Module, got: Tensor, want: Tensor) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and its name; tiny ones (a key's bias) are left out."""
    parts, others = gradients_in(model, got), gradients_in(model, want).values()
    least = MATTERS * want.norm()
    pairs = zip(parts, parts.values(), others, strict=True)
    return max(((apart(a, b), name) for name, a, b in pairs if b.norm() > least), default=(0.0, ""))


@needs(*READABLE)
def check_precision_switches_are_left_alone(subject: Subject) -> None:
    """A training step must not change PyTorch's TF32 setting, which applies to the whole process."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        model = without_chance(subject)
        if (chosen := torch.get_float32_matmul_precision()) != "highest":
            advise(f"building the model sets torch's float32 matmul precision to {chosen!r} for the whole process")
        torch.set_float32_matmul_precision("highest")
        backward(loss_of(subject, model, tokens_of(subject)))
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    if after != "highest":
        fail(
            f"a training step sets torch's float32 matmul precision from 'highest' to {after!r}: on a GPU all later "
            "matrix products of the process then keep 10 mantissa bits instead of 23, in other models too",
            likely=("forward-turns-tf32-on",),
            advice="leave torch.set_float32_matmul_precision and allow_tf32 to the training script",
        )


# -- another device


@needs(*READABLE)
def check_device_agrees_with_the_cpu(subject: Subject) -> None:
    """In float32 on its device the model must agree with float64 on the CPU up to rounding, with TF32 off and on."""
    needs_numbers(subject)
    if subject.device.type == "cpu":
        raise NotApplicable("the checks run on the CPU; --gpu or --device compares another device with it")
    expect_agreement(subject, subject.changed(device="cpu"))


def expect_agreement(subject: Subject, home: Subject) -> None:
    """Fails unless the subject's logits equal those of `home`, in float64 on the CPU, up to rounding."""
    fine, tokens = precision(home).dtype, tokens_of(subject)
    twin = cast(without_chance(home, EXISTENCE[1]), fine).eval()
    with torch.no_grad(), Promoted(fine):
        exact = home.logits(twin, tokens.cpu()).double()
    model = without_chance(subject, EXISTENCE[1]).eval()
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in twin.state_dict().items()})
    # TF32 keeps ten mantissa bits of a factor, as float16 does.
    for setting, rounding, times in (("highest", torch.float32, 20.0), ("high", torch.float16, 4.0)):
        with naively(twin, rounding), Promoted(fine):
            naive = home.logits(twin, tokens.cpu()).detach().double()
        with float32_products(setting), torch.no_grad():
            own = subject.logits(model, tokens).cpu().double()
        error, unavoidable = apart(own, exact), apart(naive, exact)
        bound = times * unavoidable + 2 * torch.finfo(rounding).eps
        note(**{f"error, {setting}": error, f"unavoidable, {setting}": unavoidable})
        if not error <= bound:
            fail(
                f"on {subject.device} in float32 (matmul precision {setting!r}) the logits have a relative error of "
                f"{error:.3g} against float64 on the CPU, allowed {bound:.3g}; rounding alone gives {unavoidable:.3g}",
                likely=("another-scale-on-the-device",),
                advice="look for code that depends on the device (is_cuda, device.type)",
            )


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- what a step costs


@needs(*READABLE)
def check_step_does_not_wait_at_each_token(subject: Subject) -> None:
    """How many numbers a training step reads back from the device must not grow with the sequence length."""
    needs_numbers(subject)
    longest = subject.sizes.block_size
    lengths = sorted({max(3, longest // 3), max(4, longest // 2), max(5, longest - 1)})
    if longest < 8 or len(lengths) < 3:
        raise NotApplicable(f"a block size of {longest} is too short to show growth")
    model = without_chance(subject)
    backward(
        loss_of(subject, model, tokens_of(subject, ROWS, lengths[0]))
    )  # numbers that are read only once are read here
    counts: list[Any] = []
    said: list[int] = []
    for T in lengths:
        with Waits(subject.device) as waits:
            backward(loss_of(subject, model, tokens_of(subject, ROWS, T)))
        counts.append(waits.by_line)
        said.append(waits.said)
    note(lengths=lengths, waits=[sum(found.values()) for found in counts], cuda_says=said)
    for line, most in counts[-1].items():
        grown = [found.get(line, 0) for found in counts]
        rates = [round((more - less) / (long - short), 6) for (less, more), (short, long) in
                   zip(pairwise(grown), pairwise(lengths), strict=True)]  # fmt: skip
        if min(rates) >= 1 and len(set(rates)) == 1:
            fail(
                f"a training step on {ROWS} rows of {lengths[-1]} tokens reads a number "
                f"from the device {most} times, {rates[0]:g} per "
                f"position ({', '.join(map(str, grown))} times at {', '.join(map(str, lengths))} tokens): on a GPU it "
                "waits each time until all earlier work is done",
                where=line,
                likely=("number-read-at-each-token",),
                advice="compute on whole tensors: no .item(), int(…), bool(…) or .tolist() in a loop over positions",
            )
    if counts[-1]:
        places = ", ".join(sorted({str(line) for line in counts[-1]})[:4])
        read = sum(counts[-1].values())
        often = f"{read} numbers" if read > 1 else "a number"
        advise(f"a training step reads {often} from the device ({places}) and, on a GPU, waits for each")


@needs(*READABLE)
def check_memory_does_not_grow(subject: Subject) -> None:
    """Training must not hold more memory with every step: in 50 steps there must be ten after which no more is held."""
    needs_numbers(subject)
    model, tokens = (
        without_chance(subject),
        tokens_of(subject, 2, min(8, subject.sizes.block_size)),
    )  # growth shows at small sizes too
    each = subject.affordable(3 * tokens.numel(), STEPS // TIMES_HELD, least=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        backward(loss_of(subject, model, tokens))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    held = held_after(step, each, subject.device)
    note(bytes_held=held, steps_between=each)
    grown = [more - less for less, more in pairwise(held)]
    if min(grown) > 0:
        needs_no_cache_inside(model)
        fail(
            f"every training step holds {grown[-1] / each:,.0f} bytes more: {held[0]:,} after {each} steps, "
            f"{held[-1]:,} after {each * TIMES_HELD}",
            likely=("forward-keeps-its-activations",),
            advice="look for a list that forward appends to, and for losses stored with their graph (store .item() or "
            ".detach())",
        )


def held_after(step: Callable[[], None], each: int, device: torch.device) -> list[int]:
    """Bytes that tensors hold after every few steps, beyond those held before the first, for as long as they grow."""
    if device.type in ("cuda", "xpu"):
        allocator = getattr(torch, device.type)
        return while_growing(step, each, lambda: allocator.memory_allocated(device))
    with Held() as held:
        return while_growing(step, each, lambda: held.now)


def while_growing(step: Callable[[], None], each: int, held: Callable[[], int]) -> list[int]:
    found: list[int] = []
    while len(found) < TIMES_HELD:
        for _ in range(each):
            step()
        gc.collect()  # frees reference cycles
        found.append(held())
        if len(found) > 1 and found[-1] <= found[-2]:
            break
    return found


@needs(*READABLE)
def check_memory_grows_no_faster_than_the_batch(subject: Subject) -> None:
    """The peak memory of a training step must grow no faster than linearly with the batch size."""
    needs_numbers(subject)
    needs_one_way(subject)
    model, one = without_chance(subject), tokens_of(subject, 2, 8 if subject.large else None)

    def peak(rows: int) -> int:
        tokens = one.repeat(rows // 2, 1)
        try:
            backward(loss_of(subject, model, tokens))  # tensors that are made only once are made here
            model.zero_grad(set_to_none=True)
            return peak_bytes(lambda: backward(loss_of(subject, model, tokens)), subject.device)
        except (RuntimeError, ValueError) as error:
            raise NotApplicable(f"the model refuses a batch of {rows} rows", error=str(error).splitlines()[0]) from None
        finally:
            model.zero_grad(set_to_none=True)

    peaks = {rows: peak(rows) for rows in (2, 4, 8)}
    note(rows=list(peaks), peak_bytes=list(peaks.values()))
    if peaks[8] - peaks[4] <= 3 * max(peaks[4] - peaks[2], 1):
        return
    # With few rows the peak may be at another moment of the step (the gradients of large tables). But a constant plus a
    # part that is linear in the rows at most doubles when the rows double, and so does the maximum of several of these.
    more = {rows: peak(rows) for rows in (16, 32)}
    if more[32] > 2 * more[16]:
        with Held() as held:
            backward(loss_of(subject, model, one.repeat(4, 1)))
        size, shape, line = held.largest
        fail(
            f"the peak memory of a training step is {peaks[4]:,} bytes for 4 rows, {peaks[8]:,} for 8, {more[16]:,} "
            f"for 16 and {more[32]:,} for 32: × {more[32] / more[16]:.2g} for twice the rows, should be at most × 2; "
            f"the largest tensor for 8 rows is {list(shape)} ({size:,} bytes)",
            where=line,
            likely=("every-row-with-every-row",),
            advice="look for an unsqueeze too many, which broadcasts the batch against itself",
        )


@needs(*READABLE, "check_modes.check_dropout_draws_anew")
def check_deterministic_algorithms_repeat_the_step(subject: Subject) -> None:
    """With PyTorch's deterministic algorithms, two steps from the same seed must give exactly the same gradient."""
    needs_numbers(subject)
    sizes: dict[str, Any] = dict(dropout=0.3) if subject.can_vary("dropout") else {}
    model, tokens = subject.build(seed=subject.seed, **sizes).train(), tokens_of(subject)
    found = []
    try:
        with deterministic():
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                with seeded(subject.seed), buffers_kept(model):
                    backward(loss_of(subject, model, tokens))
                found.append(gradient_of(model))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        says = str(error).splitlines()[0][:200]
        advise(f"a training step cannot be repeated exactly: {says}")
        raise NotApplicable(f"PyTorch has no deterministic algorithm for this model here: {says}") from None
    needs_finite(found[0])
    if not torch.equal(*found):
        fail(
            f"two steps from one seed give different gradients (relative difference {apart(*found):.2g}), although "
            "torch.use_deterministic_algorithms is on",
            likely=("jitter-no-seed-reaches",),
            advice="draw from PyTorch's global generator, or from one that the training script seeds",
        )


@contextmanager
def deterministic() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
