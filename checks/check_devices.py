"""What another kernel, precision or device must not change, and what a training step must not cost on one.

On CUDA all of it; elsewhere what the device has. A check says what it could not try.
"""

from __future__ import annotations

import copy
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
from .probes.backward import backward, needs_no_cache_inside
from .probes.precision import precision
from .probes.rounding import Promoted, naively
from .subject import EXISTENCE, Subject, cast
from .training.runs import refuse_chance
from .watch.draws import seeded
from .watch.dropout import set_rates
from .watch.location import locate
from .watch.memory import Held, peak_bytes
from .watch.waits import Waits

KERNELS = [kernel for name, kernel in SDPBackend.__members__.items() if name not in ("ERROR", "MATH", "OVERRIDEABLE")]
TIMES = {torch.float32: 20.0, torch.bfloat16: 4.0, torch.float16: 4.0}  # as in check_numerics
KERNELS_OWN = (
    0.1  # of the length, in half precision: a kernel's rounding is not the model's, another path is of order 1
)
ANOTHER_WAY = 0.5  # of a parameter's gradient; under autocast correct models: at most 0.1
MATTERS = 1e-3  # of the whole gradient's length, for a parameter's part of it to be judged
SCALES = 24  # halvings of a gradient scaler: from 65536 to 1/256
STEPS = 50
ROWS = 3


def needs_numbers(subject: Subject) -> None:
    if subject.device.type == "meta":
        raise NotApplicable("nothing is computed on the meta device")


def plain(subject: Subject, scheme: tuple[float, float] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in train mode without dropout; NotApplicable where chance is left in it."""
    model = subject.amplified(scheme, seed=subject.seed, dtype=dtype).train()
    set_rates(model, 0.0)
    refuse_chance(subject, model)
    return model


def tokens_of(subject: Subject, B: int = ROWS, T: int | None = None) -> Tensor:
    return subject.tokens(B, T or subject.sizes.block_size, seed=subject.seed)


def loss_of(subject: Subject, model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean next-token loss of these rows."""
    return cross_entropy(subject.logits(model, tokens[:, :-1]).float(), tokens[:, 1:]).mean()


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in trained]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def apart(a: Tensor, b: Tensor) -> float:
    """The length of the difference, of that of `b`."""
    return float((a - b).norm() / b.norm()) if b.any() else float(a.norm())


# -- kernels


class Attention(TorchFunctionMode):
    """Counts the calls of PyTorch's attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


@dataclass
class Computed:
    """What one kernel in one type gives: logits, and the gradient of the loss."""

    logits: Tensor
    gradient: Tensor

    @classmethod
    def by(cls, subject: Subject, model: nn.Module, kernel: SDPBackend) -> Computed:
        tokens = tokens_of(subject)
        model.zero_grad(set_to_none=True)
        with sdpa_kernel(kernel):
            logits = subject.logits(model, tokens[:, :-1])
            backward(cross_entropy(logits.float(), tokens[:, 1:]).mean())
        return cls(logits.detach().double(), gradient_of(model))


@needs(*READABLE, GRADIENTS)
def check_every_attention_kernel_agrees(subject: Subject) -> None:
    """Each of PyTorch's attention kernels, in each precision it takes, errs little more than the explicit path."""
    needs_numbers(subject)
    with torch.no_grad(), Attention() as attention:
        subject.logits(plain(subject), tokens_of(subject))
    if not attention.calls:
        raise NotApplicable("the model does not call scaled_dot_product_attention")
    tried, refused = [], {}
    for dtype in TIMES:
        if dtype == precision(subject).dtype:
            continue  # nothing finer to compare with
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
        raise NotApplicable("no attention kernel but the explicit path takes this model here", **refused)


def rounded(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model in a type, and one in the finest with the same weights."""
    model, twin = (plain(subject, EXISTENCE[1]) for _ in range(2))
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(dtype))
    return cast(model, dtype), cast(twin, precision(subject).dtype)


def needs_one_way(subject: Subject, model: nn.Module | None = None) -> None:
    """Raises NotApplicable where the model sends tokens to experts: a rounding, or other rows, send them elsewhere."""
    twin = plain(subject, dtype=precision(subject).dtype) if model is None else model
    with naively(twin, torch.bfloat16) as mode:  # which follows what has a gradient
        subject.logits(twin, tokens_of(subject, 1, 3))
    if mode.routes:
        raise NotApplicable("the model sends tokens to experts: one rounding sends a token elsewhere")


def needs_finite(gradient: Tensor) -> None:
    if not bool(gradient.isfinite().all()):
        raise NotApplicable("the gradient is not finite to begin with")


def refuse_more_error(
    name: str, what: str, got: Tensor, explicit: Tensor, exact: Tensor, *, dtype: torch.dtype
) -> None:
    error, unavoidable = apart(got, exact), apart(explicit, exact)
    bound = TIMES[dtype] * unavoidable + 8 * torch.finfo(dtype).eps
    if dtype != torch.float32:
        bound = max(bound, KERNELS_OWN)
    if not error <= bound:
        fail(
            f"with PyTorch's attention kernel {name} the {what} is off by {error:.3g} of its length, where the "
            f"explicit path in the same type is off by {unavoidable:.3g}; allowed {bound:.3g}",
            likely=("path-chosen-by-kernel-switches",),
            advice="look for code that asks which kernels are enabled, and for a mask that kernels read in other ways",
            error=error,
            unavoidable=unavoidable,
        )


# -- precisions


@needs(*READABLE, GRADIENTS)
def check_mixed_precision_keeps_the_gradient(subject: Subject) -> None:
    """Under autocast, in bfloat16 and in float16 with a gradient scaler, each gradient points as in float32."""
    needs_numbers(subject)
    needs_one_way(subject)
    model, tokens = plain(subject), tokens_of(subject)
    with seeded(subject.seed):
        backward(loss_of(subject, model, tokens))
    want, worst = gradient_of(model), {}
    needs_finite(want)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            got, scale = scaled_gradient(subject, model, tokens, dtype)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # a type that the model refuses
            note(**{f"refused: {name}": (str(error) or type(error).__name__).splitlines()[0][:200]})
            continue
        if broken := int((~got.isfinite()).sum()):
            scales = f" at every loss scale down to {scale:g}" if dtype == torch.float16 else ""
            fail(
                f"under autocast to {name} {broken} of the gradient's {len(got)} numbers are not finite{scales}",
                likely=("fp16-autocast-mask-overflow",),
                advice="fill masks with -inf by masked_fill, not with a large number times 0",
            )
        off, parameter = farthest_off(model, got, want)
        worst[name] = off
        if off > ANOTHER_WAY:
            fail(
                f"under autocast to {name} the gradient of {parameter} is off from that of float32 by {off:.2g} of its "
                f"length, allowed {ANOTHER_WAY:g}",
                where=locate(model, parameter.rpartition(".")[0]),
                likely=("autocast-cuts-the-gradient",),
                advice="cast with .to(dtype), never through .data, detach() or torch.tensor(x)",
            )
    note(off=worst)
    if not worst:
        raise NotApplicable("neither bfloat16 nor float16 is taken under autocast here")


def farthest_off(model: nn.Module, got: Tensor, want: Tensor) -> tuple[float, str]:
    """The parameter whose gradient is farthest off, among those that matter (a key bias has rounding only)."""
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    parts = zip(named, got.split([n for _, n in named]), want.split([n for _, n in named]), strict=True)
    least = MATTERS * want.norm()
    return max(((apart(a, b), name) for (name, _), a, b in parts if b.norm() > least), default=(0.0, ""))


def scaled_gradient(subject: Subject, model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The gradient under autocast, unscaled, and the scale of the loss: 1, or for float16 the first that fits."""
    kind = subject.device.type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(SCALES if scaler.is_enabled() else 1):
        scale = scaler.get_scale()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype), seeded(subject.seed):
            loss = loss_of(subject, model, tokens)
        backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        gradient = gradient_of(model)
        if bool(gradient.isfinite().all()):
            break
        scaler.step(optimizer)  # which skips it
        scaler.update()
    return gradient, scale


@needs(*READABLE)
def check_precision_switches_are_left_alone(subject: Subject) -> None:
    """A training step leaves PyTorch's switch for TF32, which is the whole process's, as it was."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        model = plain(subject)
        if (chosen := torch.get_float32_matmul_precision()) != "highest":
            advise(f"building the model sets torch's float32 matmul precision to {chosen!r} for the whole process")
        torch.set_float32_matmul_precision("highest")
        backward(loss_of(subject, model, tokens_of(subject)))
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    if after != "highest":
        fail(
            f"a training step sets torch's float32 matmul precision from 'highest' to {after!r}: on a GPU every later "
            "product in the process, of other models too, keeps 10 bits in place of 23",
            likely=("forward-turns-tf32-on",),
            advice="leave torch.set_float32_matmul_precision and allow_tf32 to the script that runs the training",
        )


# -- another device


@needs(*READABLE)
def check_device_agrees_with_the_cpu(subject: Subject) -> None:
    """On its device the model in float32 is as near to float64 on the CPU as rounding allows, with TF32 off and on."""
    needs_numbers(subject)
    if subject.device.type == "cpu":
        raise NotApplicable("the checks run on the CPU: --gpu or --device compare another device with it")
    home = copy.copy(subject)
    home.device = torch.device("cpu")
    expect_agreement(subject, home)


def expect_agreement(subject: Subject, home: Any) -> None:
    """Fails unless the subject's logits are those of `home`, in float64 on the CPU, but for rounding."""
    fine, tokens = precision(home).dtype, tokens_of(subject)
    twin = cast(plain(home, EXISTENCE[1]), fine).eval()
    with torch.no_grad(), Promoted(fine):
        exact = home.logits(twin, tokens.cpu()).double()
    model = plain(subject, EXISTENCE[1]).eval()
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in twin.state_dict().items()})
    # TF32 keeps ten bits of a factor, as float16 does
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
                f"on {subject.device} in float32 (matmul precision {setting!r}) the logits are off from the CPU's "
                f"float64 by {error:.3g} of their length, where rounding costs {unavoidable:.3g}; allowed {bound:.3g}",
                likely=("another-scale-on-the-device",),
                advice="look for code that asks for the device (is_cuda, device.type)",
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
    """The number of times that a step waits for the device, to read a number, does not grow with the length."""
    needs_numbers(subject)
    longest = subject.sizes.block_size
    lengths = sorted({max(3, longest // 3), max(4, longest // 2), max(5, longest - 1)})
    if longest < 8 or len(lengths) < 3:
        raise NotApplicable(f"lengths up to {longest} are too few to see growth")
    model = plain(subject)
    backward(loss_of(subject, model, tokens_of(subject, ROWS, lengths[0])))  # what is read once is read here
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
        a_token = [round((more - less) / (long - short), 6) for (less, more), (short, long) in
                   zip(pairwise(grown), pairwise(lengths), strict=True)]  # fmt: skip
        if min(a_token) >= 1 and len(set(a_token)) == 1:
            fail(
                f"a step on {ROWS} rows of {lengths[-1]} tokens reads a number {most} times, {a_token[0]:g} times for "
                f"each position ({', '.join(map(str, grown))} times at {', '.join(map(str, lengths))} tokens): on a "
                "GPU each reading waits until the device has done all that it was given",
                where=line,
                likely=("number-read-at-each-token",),
                advice="no .item(), int(…), bool(…) or .tolist() in a loop over positions: compute on whole tensors",
            )
    if counts[-1]:
        places = ", ".join(sorted({str(line) for line in counts[-1]})[:4])
        advise(f"a step reads numbers {sum(counts[-1].values())} times ({places}): on a GPU it waits each time")


@needs(*READABLE)
def check_memory_does_not_grow(subject: Subject) -> None:
    """Fifty training steps hold no more at their end than ten."""
    needs_numbers(subject)
    model, tokens = plain(subject), tokens_of(subject, 2, min(8, subject.sizes.block_size))  # growth shows in small
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        backward(loss_of(subject, model, tokens))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    held = held_after(step, subject.device)
    note(bytes_held=held)
    grown = [more - less for less, more in pairwise(held)]
    if min(grown) > 0:
        needs_no_cache_inside(model)
        fail(
            f"every training step keeps {grown[-1] / 10:,.0f} bytes more: {held[0]:,} after 10 steps, {held[-1]:,} "
            f"after {STEPS}",
            likely=("forward-keeps-its-activations",),
            advice="look for a list that a forward appends to, and for losses kept with their graphs (keep .item() or "
            ".detach())",
        )


def held_after(step: Callable[[], None], device: torch.device) -> list[int]:
    """Bytes held by tensors after each ten of the steps, beyond those before the first."""
    if device.type in ("cuda", "xpu"):
        allocator = getattr(torch, device.type)
        return [after_ten(step, lambda: allocator.memory_allocated(device)) for _ in range(STEPS // 10)]
    with Held() as held:
        return [after_ten(step, lambda: held.now) for _ in range(STEPS // 10)]


def after_ten(step: Callable[[], None], held: Callable[[], int]) -> int:
    for _ in range(10):
        step()
    gc.collect()  # what refers to itself waits for it
    return held()


@needs(*READABLE)
def check_memory_grows_no_faster_than_the_batch(subject: Subject) -> None:
    """What a step holds at its peak grows in proportion to the rows of its batch."""
    needs_numbers(subject)
    needs_one_way(subject)
    model, one = plain(subject), tokens_of(subject, 2)

    def peak(rows: int) -> int:
        tokens = one.repeat(rows // 2, 1)
        try:
            backward(loss_of(subject, model, tokens))  # what is made once is made here
            model.zero_grad(set_to_none=True)
            return peak_bytes(lambda: backward(loss_of(subject, model, tokens)), subject.device)
        except (RuntimeError, ValueError) as error:
            raise NotApplicable(f"{rows} rows are refused", error=str(error).splitlines()[0]) from None
        finally:
            model.zero_grad(set_to_none=True)

    peaks = {rows: peak(rows) for rows in (2, 4, 8)}
    note(rows=list(peaks), peak_bytes=list(peaks.values()))
    if peaks[8] - peaks[4] <= 3 * max(peaks[4] - peaks[2], 1):
        return
    # What is highest at one moment of a step may not be at another: of few rows the gradients of large tables are. But
    # no sum of a constant and a proportional part more than doubles with its rows, nor does the largest of several.
    more = {rows: peak(rows) for rows in (16, 32)}
    if more[32] > 2 * more[16]:
        with Held() as held:
            backward(loss_of(subject, model, one.repeat(4, 1)))
        size, shape, line = held.largest
        fail(
            f"a step holds {peaks[4]:,} bytes at its peak for 4 rows, {peaks[8]:,} for 8, {more[16]:,} for 16 and "
            f"{more[32]:,} for 32: {more[32] / more[16]:.2g} times as many for twice the rows, where 2 times is in "
            f"proportion; the largest tensor for 8 rows is {list(shape)}, {size:,} bytes",
            where=line,
            likely=("every-row-with-every-row",),
            advice="two batch axes that should be one have met by broadcasting: an unsqueeze too many",
        )


@needs(*READABLE, "check_modes.check_dropout_draws_anew")
def check_deterministic_algorithms_repeat_the_step(subject: Subject) -> None:
    """With PyTorch's deterministic algorithms two steps from the same seed have the same gradient, bit for bit."""
    needs_numbers(subject)
    sizes = dict(dropout=0.3) if subject.can_vary("dropout") else {}
    model, tokens = subject.build(seed=subject.seed, **sizes).train(), tokens_of(subject)
    found = []
    try:
        with deterministic():
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                with seeded(subject.seed):
                    backward(loss_of(subject, model, tokens))
                found.append(gradient_of(model))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        says = str(error).splitlines()[0][:200]
        advise(f"the step cannot be repeated bit for bit: {says}")
        raise NotApplicable(f"PyTorch has no deterministic algorithm for this model here: {says}") from None
    needs_finite(found[0])
    if not torch.equal(*found):
        fail(
            f"two steps from one seed have gradients {apart(*found):.2g} of their length apart, though "
            "torch.use_deterministic_algorithms is on",
            likely=("jitter-no-seed-reaches",),
            advice="draw from PyTorch's global generator, or from one that the training seeds",
        )


@contextmanager
def deterministic() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
