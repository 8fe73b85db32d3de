"""What parts do that can be recognized in any model, by what they are called or by what they compute: norms,
feed-forwards, attention. Nothing is mapped, and no architecture need be declared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .expect import CAUSAL, REACHES, ROWS_APART, STEADY, NotApplicable, Where, advise, fail, needs, note
from .probes.influence import call, length
from .probes.precision import precise, spread
from .probes.silent_parts import FeedForward, Silence, feed_forwards, narrowing_in_blocks
from .subject import EXISTENCE, Subject
from .watch.activations import FORMS, Activation, activations
from .watch.location import locate
from .watch.norms import LARGE, Norm, norms
from .watch.products import Attended, Weighed, sharing

ALONE = "check_parts.check_norms_act_on_each_token_alone"
SCALE = "check_parts.check_norms_take_out_the_scale"
MATTERS = "check_contract.check_every_block_matters"

TOUCHED = 1e-6  # of the largest output: what another token changes at most in a norm, if it computes in float32
LINEAR = 1e-5  # of the largest output: how far from linear what is linear may be in float32
SCALED = 0.01  # of the output: how much it may still change with the scale of a large input; usual epsilons give 1e-6
TIMES = 4.0
SMALL = 0.03  # an input's deviation: epsilons of 1e-3 (Keras has it) and less leave a norm two thirds of its size there
HALF = 0.5  # of a norm's size for large inputs: with less, epsilon and not the input decides what it gives
NEAR = 0.05  # of a size: a deviation over C - 1 features, or an epsilon, makes less of a difference
SUMS = 1e-4  # of one: how far from it what a softmax computed in half precision may add up to
FORMED = 0.03  # of an activation, at any number from -5 to 5: the quickest approximation of GELU is 0.021 from it
TOLD = 1e-9  # standard deviations of the logits: what other tokens change at least where a part is silent
MEANS = 0.02  # of the mean: how exactly none or all of it is taken away


def recognized(subject: Subject) -> tuple[nn.Module, list[Norm]]:
    """The model as initialized, and its norms. NotApplicable where there are none."""
    model = precise(subject, None)
    found = norms(model, lambda: call(subject, model, subject.tokens(3, length(subject), seed=subject.seed)))
    if not found:
        raise NotApplicable("no module is recognized as a norm, by its name or that of its class")
    return model, found


def judged(model: nn.Module, found: list[Norm], judge: Callable[[nn.Module, Norm], Any]) -> None:
    """Holds `judge` to every norm; it gives None where it cannot tell, as where the norm refuses inputs of ours."""
    seen = {norm.name: _answer(judge, model, norm) for norm in found}
    known = {name: value for name, value in seen.items() if value is not None}
    if not known:
        raise NotApplicable("of what is called a norm, nothing can be told so", called=[norm.name for norm in found])
    note(norms=known)


def _answer(judge: Callable[[nn.Module, Norm], Any], model: nn.Module, norm: Norm) -> Any:
    try:
        return judge(model, norm)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


@needs(*STEADY, CAUSAL, ROWS_APART, "check_gradients.check_rows_get_their_own_gradient")
def check_norms_act_on_each_token_alone(subject: Subject) -> None:
    """A norm's output for one token depends on no other token."""
    judged(*recognized(subject), expect_alone)


def expect_alone(model: nn.Module, norm: Norm) -> float:
    """How far one token changes another's output at most, in units of the largest output."""
    x = norm.random(1)
    changed = x.clone()
    place = tuple(n // 2 for n in x.shape[:-1])
    changed[place] = norm.random(2)[place] * 3
    moves = (norm(changed) - norm(x)).abs().amax(-1) / norm(x).abs().max().clamp(min=1e-30)
    itself = moves[place].item()
    moves[place] = 0.0
    if not itself > 0 or not float(moves.max()) > TOUCHED:
        return float(moves.max())
    where = [int(i) for i in (moves > TOUCHED).nonzero()[0]]
    fail(
        f"{norm.name} is called a norm, and changing its input at {list(place)} of {list(x.shape[:-1])} changes its "
        f"output at {int((moves > TOUCHED).sum())} other places, first at {where}, by {float(moves.max()):.3g} of the "
        "largest output: its mean or deviation is taken over more than the features of one token",
        where=locate(model, norm.name),
        likely=("norm-averages-over-the-past",),
        advice="Take mean and mean square over the last axis alone: x.pow(2).mean(-1, keepdim=True).",
        first={"changed": list(place), "moved": where},
    )


@needs(*STEADY, ALONE)
def check_norms_take_out_the_scale(subject: Subject) -> None:
    """A norm gives the same for a large input and for several times it, and takes away the whole mean or none of it."""
    judged(*recognized(subject), expect_scale_taken_out)


def expect_scale_taken_out(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    with norm.shaken():
        x = norm.random(1) * LARGE
        one, four = norm.odd(x), norm.odd(x * TIMES)
        if not bool(one.isfinite().all() and four.isfinite().all() and one.any()):
            return None
        alone = acts_on_features_alone(norm)
        linear = float((four - TIMES * one).abs().max()) <= LINEAR * float(four.abs().max())
        if alone and not (linear and norm.named_norm and norm.vectors and not ignores_its_vectors(norm)):
            return None  # a tanh in a norm's place, or a norm that is switched off
        change = float((four - one).abs().max() / one.abs().max())
        if change > SCALED:
            fail_scale(model, norm, one, four, linear)
    share = mean_left(norm)
    learned = any(p.numel() == 1 for p in norm.module.parameters())  # it may be how much of the mean is taken
    if share is not None and not learned and MEANS < abs(share) and MEANS < abs(share - 1):
        fail_mean(model, norm, share)
    return dict(change=change) if share is None else dict(change=change, mean_taken=share)


def acts_on_features_alone(norm: Norm) -> bool:
    """Whether every feature of the output depends on the same feature of the input alone."""
    x = norm.random(3)
    changed = x.clone()
    changed[..., 0] += 3.0
    return torch.equal(norm(x)[..., 1:], norm(changed)[..., 1:])


def ignores_its_vectors(norm: Norm) -> bool:
    x = norm.random(3)
    before = norm(x)
    with norm.holding({name: p.detach() + 1 for name, p in norm.vectors.items()}):
        return torch.equal(before, norm(x))


def fail_scale(model: nn.Module, norm: Norm, one: Tensor, four: Tensor, linear: bool) -> None:
    ratio = float(four.square().mean().sqrt() / one.square().mean().sqrt())
    power = math.log(ratio) / math.log(TIMES) if ratio > 0 else math.nan
    what = "it divides by nothing that grows with its input" if linear else f"it grows as the input's power {power:.2g}"
    fail(
        f"{norm.name} is called a norm, and for {TIMES:g} times a large input it gives {ratio:.4g} times the output, "
        f"where a norm gives the same: {what}",
        where=locate(model, norm.name),
        likely=("norm-divides-by-variance", "norm-divides-by-nothing"),
        advice="Divide by the root of the mean square: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps).",
        ratio=ratio,
        power=power,
    )


def mean_left(norm: Norm) -> float | None:
    """How much of the mean is taken away, 1 in a layer norm and 0 in an RMS norm; None where it is no such norm."""
    ones = {name: torch.ones_like(p) for name, p in norm.vectors.items()}
    with norm.holding(ones):
        x = (norm.random(4) + 0.7) * LARGE
        out = norm.odd(x).flatten(0, -2)
    x = x.double().flatten(0, -2)
    mean = x.mean(-1, keepdim=True).expand_as(x)
    fitted = torch.linalg.lstsq(torch.stack((x, mean), dim=-1), out[..., None])
    factors = fitted.solution[..., 0]  # [N, 2]
    rest = out - (factors[:, :1] * x + factors[:, 1:] * mean)
    if not float(rest.abs().max()) <= LINEAR * float(out.abs().max()):
        return None
    return float((-factors[:, 1] / factors[:, 0]).median())


def fail_mean(model: nn.Module, norm: Norm, share: float) -> None:
    fail(
        f"{norm.name} is called a norm, and it takes away {share:.4g} times the mean of its input, where a layer norm "
        "takes away all of it and an RMS norm none",
        where=locate(model, norm.name),
        likely=("norm-adds-the-mean",),
        advice="(x - x.mean(-1, keepdim=True)) for a layer norm, x alone for an RMS norm.",
        taken=share,
    )


@needs(*STEADY, ALONE, SCALE)
def check_epsilon_does_not_rule_a_norm(subject: Subject) -> None:
    """What a norm gives for what the model feeds it as initialized is decided by that input, not by its epsilon."""
    judged(*recognized(subject), expect_small_epsilon)


def expect_small_epsilon(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    with norm.shaken():
        if acts_on_features_alone(norm):
            return None
        unit = norm.random(1)
        small = share_of_full(norm, unit * SMALL)
        size = norm.seen.double().square().mean(-1).sqrt().median()
        if not (float(size) > 0 and math.isfinite(small)):
            return None
        here = share_of_full(norm, norm.seen)
    if small < HALF and here < HALF:
        epsilon = SMALL**2 * (1 / max(small, 1e-9) ** 2 - 1)
        fail(
            f"{norm.name} is called a norm, and what it is fed as initialized (of size {float(size):.3g}) comes out at "
            f"{here:.3g} of the size that a large input comes out at: its epsilon decides, and not the input. It acts "
            f"as one of about {epsilon:.2g} added to the mean square, where 1e-5 is usual",
            where=locate(model, norm.name),
            likely=("norm-epsilon-of-one", "norm-wrong-eps"),
            advice="epsilon (1e-5 or 1e-6) is added to the variance under the root, and only keeps it from being zero",
            share=here,
            size=float(size),
            epsilon=epsilon,
        )
    return dict(share=here)


def share_of_full(norm: Norm, x: Tensor) -> float:
    """How large the output is beside that for the same input made large, a median over tokens."""
    size = x.double().square().mean(-1, keepdim=True).sqrt()
    large = (x / size.clamp(min=1e-30).to(x)) * LARGE
    sizes = [norm.odd(each).square().mean(-1).sqrt() for each in (x, large)]
    return float((sizes[0] / sizes[1]).nanmedian())


@needs(*STEADY, ALONE)
def check_gain_multiplies_and_bias_adds(subject: Subject) -> None:
    """A norm's gain multiplies what depends on the input, and its bias is added whatever the input is."""
    judged(*recognized(subject), expect_factors)


GAINS, BIASES = ("weight", "gain", "gamma", "scale"), ("bias", "beta", "shift")


def expect_factors(model: nn.Module, norm: Norm) -> dict[str, str] | None:
    """What each vector of the norm does: "multiplies", "adds" or, where it is not used, "nothing"."""
    if ignores_its_vectors(norm):
        return None
    acts = {name: what_it_does(norm, name) for name in norm.vectors}
    for name, does in acts.items():
        start = norm.vectors[name].detach()
        word = name.lower().strip("_")
        if does == "adds" and bool((start == 1).all()) and (word in GAINS or is_constant(norm)):
            fail_factor(model, norm, name, "is added, whatever the input is, and multiplies nothing", 1)
        if does == "multiplies" and word in BIASES and bool((start == 0).all()) and is_constant(norm):
            fail_factor(model, norm, name, "multiplies what depends on the input, and starts at zero", 0)
    return acts or None


def what_it_does(norm: Norm, name: str) -> str:
    x, other = norm.random(1), norm.random(2)
    with norm.shaken():
        before = norm(x), norm(other)
        with norm.holding({name: norm.vectors[name].detach() + 1}):
            moves = norm(x) - before[0], norm(other) - before[1]
    size = float(before[0].abs().max())
    if not float(moves[0].abs().max()) > LINEAR * size:
        return "nothing"
    return "adds" if float((moves[0] - moves[1]).abs().max()) <= LINEAR * size else "multiplies"


def is_constant(norm: Norm) -> bool:
    return torch.equal(norm(norm.random(1)), norm(norm.random(2)))


def fail_factor(model: nn.Module, norm: Norm, name: str, does: str, start: int) -> None:
    constant = "; as initialized it gives the same for every input" if is_constant(norm) else ""
    likely = ("norm-gain-and-bias-swapped", "norm-gain-added")
    fail(
        f"{norm.name} is called a norm, and its {name}, which starts at {start}, {does}{constant}",
        where=locate(model, norm.name),
        likely=likely if constant else likely[::-1],
        advice="normed * gain + bias, or F.layer_norm(x, shape, weight, bias, eps): gain first, then bias.",
        parameter=name,
    )


@needs(*STEADY, ALONE, SCALE, "check_parts.check_gain_multiplies_and_bias_adds")
def check_norms_are_what_they_are_called(subject: Subject) -> None:
    """What is called an RMS norm leaves the mean, and like a layer norm it gives numbers of its gain's size."""
    judged(*recognized(subject), expect_as_called)


def expect_as_called(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    kind = type(norm.module).__name__
    root, layer = re.search("rms", kind, re.IGNORECASE), re.search("layer_?norm", kind, re.IGNORECASE)
    if not (root or layer) or acts_on_features_alone(norm):
        return None
    share = mean_left(norm)
    if root and share is not None and abs(share - 1) < MEANS:
        fail_called(model, norm, "takes the mean away, as a layer norm does", "rms-subtracts-mean")
    times = size_beside_gain(norm)
    if share is None or times is None:
        return None
    C = norm.seen.shape[-1]
    if abs(times * C**0.5 - 1) < NEAR:
        says = f"gives numbers of size {times:.3g}, which is 1/√{C}: it divides by the root of the sum of squares"
        fail_called(model, norm, f"{says}, not of their mean", "rms-sum-not-mean")
    if abs(times - 2) < NEAR and norm.vectors:  # harmless, and so in the transformers library's Nemotron
        advise(f"{norm.name} ({kind}) gives numbers of twice its gain's size as initialized: is one added to a gain "
               "that is one already?")  # fmt: skip
    return dict(times_the_gain=times)


def size_beside_gain(norm: Norm) -> float | None:
    """How large its output is as initialized, for a large input; None where its gain does not start at ones."""
    gains = [p for name, p in norm.vectors.items() if what_it_does(norm, name) == "multiplies"]
    if len(gains) > 1 or any(bool((p != 1).any()) for p in gains):
        return None
    return float(norm.odd(norm.random(6) * LARGE).square().mean(-1).sqrt().median())


def fail_called(model: nn.Module, norm: Norm, does: str, bug: str) -> None:
    kind = type(norm.module).__name__
    fail(
        f"{norm.name} is called {kind}, and {does}",
        where=locate(model, norm.name),
        likely=(bug,),
        advice="x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain is an RMS norm; a layer norm takes the "
        "mean from x first.",
        called=kind,
    )


@needs(*STEADY)
def check_feed_forward_is_not_linear(subject: Subject) -> None:
    """Between a matrix that widens a feed-forward's input and the one that narrows it again, something bends."""
    model = precise(subject, EXISTENCE[1])
    tokens = subject.tokens(3, length(subject), seed=subject.seed)
    pairs = feed_forwards(model, lambda: subject.logits(model, tokens)) if tokens.shape[1] > 1 else []
    if not pairs:
        raise NotApplicable("no product widens what another narrows again, token by token")
    note(feed_forwards=len({pair.narrow.matrix for pair in pairs}))
    for pair in pairs:
        if pair.passed_on is not None:
            gated = sum(other.narrow is pair.narrow for other in pairs) > 1
            fail_linear(pair, pair.passed_on, gated)


def fail_linear(pair: FeedForward, factor: float, gated: bool) -> None:
    outer, inner = pair.wide.rows.shape[-1], pair.wide.gives.shape[-1]
    changed = "as it is" if factor == 1 else f"times {factor:.4g}"
    fail(
        f"the matrix that narrows {inner} features to {outer} (at {pair.narrow.where}) is given what the one that "
        f"widens {outer} to {inner} (at {pair.wide.where}) gives {changed}, whatever it is: two linear maps in a row "
        "are one, and the wider width is for nothing",
        where=pair.narrow.where,
        likely=("gate-added",) if gated else ("mlp-no-activation", "activation-after-second-linear"),
        advice="Put the activation between the two, output(gelu(input(x))); a gate multiplies: output(silu(gate(x)) * "
        "input(x)).",
        widths=[outer, inner],
        factor=factor,
    )


@needs(*STEADY)
def check_activations_are_what_they_are_called(subject: Subject) -> None:
    """What the model's own code calls GELU, SiLU, Swish or ReLU gives the numbers of one, usual approximations too."""
    model = precise(subject, None)
    tokens = subject.tokens(1, length(subject), seed=subject.seed)
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    apart: dict[str, float] = {}
    for one in activations(model, lambda: call(subject, model, tokens)):
        gives = one(x)
        if gives is not None:
            farthest = min(float((gives - form(x)).abs().nan_to_num(torch.inf).max()) for form in FORMS[one.kind])
            apart[one.named] = farthest
            if farthest > FORMED:
                fail_activation(one, x, gives)
    if not apart:
        raise NotApplicable("no activation of the model's own is called by a known name")
    note(apart=apart, bound=FORMED)


def fail_activation(one: Activation, x: Tensor, gives: Tensor) -> None:
    wanted = FORMS[one.kind][0](x)
    at, one_at = int((gives - wanted).abs().nan_to_num(torch.inf).argmax()), int((x - 1).abs().argmin())
    fail(
        f"{one.named}, and it makes {float(gives[at]):.4g} of {float(x[at]):g}, where that gives "
        f"{float(wanted[at]):.4g}; at 1 it gives {float(gives[one_at]):.4g} instead of {float(wanted[one_at]):.4g}",
        where=one.where,
        likely=("gelu-written-wrong",),
        advice="nn.GELU() (approximate='tanh' for GPT-2's), nn.SiLU() and nn.ReLU() are there; "
        "GELU is 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).",
        at=float(x[at]),
    )


@needs(*STEADY, REACHES, MATTERS)
def check_tokens_get_past_a_silent_part(subject: Subject) -> None:
    """With every attention giving zeros a token still reaches its logits; with every feed-forward, the past does."""
    if length(subject) < 2:
        raise NotApplicable("one token is too short to tell attention from a feed-forward")
    best: dict[str, float] = {}
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        silences = parts_to_silence(subject, model)
        best = {part: max(best.get(part, 0.0), told(subject, model, s)) for part, s in silences.items()}
        if best and min(best.values()) > TOLD:
            break
    if not best:
        raise NotApplicable("neither attention nor a feed-forward was recognized in blocks that stand in a list")
    note(changes=best, bound=TOLD)
    lost = [part for part, size in best.items() if size <= TOLD]
    if len(lost) == 1 < len(best):
        fail_lost(subject, model, lost[0], silences[lost[0]])
    for part in lost:
        advise(f"with every {part} silent nothing gets past it to the logits: a design without residuals, or a slip")


def parts_to_silence(subject: Subject, model: nn.Module) -> dict[str, Silence]:
    T = length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    attention = Silence(model, T)
    with attention:
        call(subject, model, tokens)
    matrices = narrowing_in_blocks(model, lambda: subject.logits(model, tokens))
    parts = {"attention": attention} if attention.found else {}
    return parts | ({"feed-forward": Silence(model, T, matrices)} if matrices else {})


def told(
    subject: Subject, model: nn.Module, silence: Silence, *, only: int | None = None, itself: bool | None = None
) -> float:
    """How far other tokens move the last logits where this is silent, in standard deviations of the logits.

    A token must get past attention on its own. Past a feed-forward all must get that attention has found, which is
    looked at with the last token left as it is; `itself` changes it too.
    """
    tokens = subject.tokens(3, length(subject), seed=subject.seed)
    others = (tokens + 1 + torch.arange(tokens.shape[1], device=tokens.device) % 3) % subject.sizes.vocab_size
    if not (silence.matrices is None if itself is None else itself):
        others[:, -1] = tokens[:, -1]
    logits = []
    for each in (tokens, others):
        silence.only = only
        silence.found.clear()
        with silence:
            logits.append(call(subject, model, each)[:, -1])
    moves = float((logits[0] - logits[1]).abs().max()) / spread(call(subject, model, tokens))
    return moves if math.isfinite(moves) else math.inf  # where silence breaks the model nothing is known


def fail_lost(subject: Subject, model: nn.Module, part: str, silence: Silence) -> None:
    own = told(subject, model, silence, itself=True) > TOLD
    places = list(silence.found)
    alone = [n for n in range(len(places)) if told(subject, model, silence, only=n) <= TOLD]
    where = places[alone[0] if alone else 0]
    if own:
        why = "a token alone gets past it, but not what attention has found, which never joins the residual stream"
    else:
        why = "nothing gets past it: what it gives replaces the residual stream instead of joining it"
    fail(
        f"with every {part} giving zeros the last logits are the same whatever the {'earlier ' * own}tokens are; {why}"
        + (f" ({len(alone)} of {len(places)} do so alone, {where.module} first)" if alone else ""),
        where=where,
        likely=(f"{part}-residual-missing", *(["residual-from-the-blocks-input"] if own else [])),
        advice="x = x + attention(norm(x)), then x = x + feed_forward(norm(x)): every part adds to what it read.",
        alone=alone,
    )


@needs(*STEADY, CAUSAL, ROWS_APART)
def check_attention_weights_sum_to_one(subject: Subject) -> None:
    """What a softmax weighs the values by sums to one over the keys of every query, in evaluation mode."""
    seen = [attended(subject, scheme).weighed for scheme in (None, EXISTENCE[1])]
    if not all(seen) or len(seen[0]) != len(seen[1]):
        raise NotApplicable("no softmax was seen whose result, as it is or times a number, meets values in a product")
    note(attentions=len(seen[0]), farthest=max(w.off for w in seen[0]), bound=SUMS)
    for one, other in zip(*seen, strict=True):
        learned = abs(one.factor - other.factor) > SUMS * abs(one.factor)
        if one.off > SUMS and other.off > SUMS and not learned:
            fail_sum(one)


def attended(subject: Subject, scheme: tuple[float, float] | None) -> Attended:
    model = precise(subject, scheme)
    T = length(subject)
    with Attended(model, T) as seen:
        call(subject, model, subject.tokens(3, T, seed=subject.seed))
    return seen


def fail_sum(seen: Weighed) -> None:
    total = seen.weights.double().sum(seen.axis)
    low, high = float(total.min()), float(total.max())
    likely: tuple[str, ...] = ("scale-after-softmax",)
    why = f"they are the softmax's result times {seen.factor:.6g}"
    if seen.along != seen.axis:
        likely = ("softmax-over-heads-masked-after", "softmax-over-heads", "softmax-over-queries")
        why = f"the softmax runs along axis {seen.along}, and not along the keys, axis {seen.axis}"
    fail(
        f"the weights by which attention sums the values add up to {low:.4g} … {high:.4g} over a query's keys, not to "
        f"1: {why}; so equal values do not come out as they went in",
        where=seen.where,
        likely=likely,
        advice="weights = (q @ k.transpose(-2, -1) / head_width ** 0.5 + mask).softmax(dim=-1), nothing after it but "
        "dropout",
        sums=[low, high],
        factor=seen.factor,
        axis=seen.along,
    )


@needs(*STEADY)
def check_heads_that_share_keys_share_values(subject: Subject) -> None:
    """Where query heads share key-value heads, those that share keys share values, and equally many share each."""
    pairs = attended(subject, EXISTENCE[1]).pairs
    maps = [(sharing(k), sharing(v), where) for k, v, where in pairs if k.dim() == v.dim() > 2 and k.any() and v.any()]
    groups = [(k, v, where) for k, v, where in maps if len(k) == len(v) and 1 < len(set(k)) == len(set(v)) < len(k)]
    if not groups:
        raise NotApplicable(
            "no heads were seen that share their keys and values with some others", attentions=len(pairs)
        )
    note(heads_read=groups[0][0])
    for keys, values, where in groups:
        sizes = Counter(keys)
        if keys != values:
            fail_groups(keys, values, where)
        if len(set(sizes.values())) > 1 and len(keys) % len(sizes) == 0:
            fail_sizes(keys, where)


def fail_groups(keys: list[int], values: list[int], where: Where | None) -> None:
    head = next(h for h in range(len(keys)) if keys[h] != values[h])
    fail(
        f"query head {head} reads the keys of head {keys[head]} and the values of head {values[head]}: keys are shared "
        f"by heads {groups_of(keys)}, values by heads {groups_of(values)}",
        where=where,
        likely=("gqa-k-v-grouping-mismatch",),
        advice="Repeat keys and values alike: repeat_interleave(n_head // n_kv_head, dim=1) for both.",
        keys=keys,
        values=values,
    )


def fail_sizes(keys: list[int], where: Where | None) -> None:
    fail(
        f"{len(keys)} query heads share {len(set(keys))} key-value heads, and not equally many share each: "
        f"{groups_of(keys)}",
        where=where,
        likely=("gqa-groups-of-different-sizes",),
        advice="Query head h reads key-value head h // (n_head // n_kv_head): repeat_interleave, dim=1.",
        keys=keys,
    )


def groups_of(heads: list[int]) -> str:
    """`0+1, 2+3`."""
    return ", ".join("+".join(str(h) for h, g in enumerate(heads) if g == group) for group in dict.fromkeys(heads))
