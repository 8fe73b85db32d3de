"""Parts that can be recognized in any model, by their names or by what they compute: norms, feed-forwards, attention.

No architecture needs to be declared, and no weights are mapped.
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
from .probes.precision import precise
from .probes.silent_parts import FeedForward, Silence, feed_forwards, last_logits_change, silences
from .subject import EXISTENCE, Subject
from .watch.activations import FORMS, Activation, activations
from .watch.location import locate
from .watch.norms import LARGE, LINEAR, Norm, norms
from .watch.products import Attended, Weighed, sharing

ALONE = "check_parts.check_norms_act_on_each_token_alone"
SCALE = "check_parts.check_norms_take_out_the_scale"
MATTERS = "check_contract.check_every_block_matters"

TOUCHED = 1e-6  # of the largest output: change in a norm's output caused by another token, in float32
SCALED = 0.01  # of the output: change when a large input is scaled; usual epsilons cause 1e-6
TIMES = 4.0
SMALL = 0.03  # size of an input for which an epsilon of 1e-3 (as in Keras) leaves a norm two thirds of its output
HALF = 0.5  # of the output for a large input: below this, epsilon decides the output
NEAR = 0.05  # relative: a variance over C - 1 features, or an epsilon, makes less of a difference
SUMS = 1e-4  # distance from one of the sum of a softmax computed in half precision
FORMED = 0.03  # distance of an activation from its exact form between -5 and 5; the fastest GELU has 0.021
TOLD = 1e-9  # standard deviations of the logits: the least change that counts while a part is silenced
MEANS = 0.02  # of the mean: tolerance for subtracting all or none of it


def recognized(subject: Subject) -> tuple[nn.Module, list[Norm]]:
    """The model as initialized, and its norms. Raises NotApplicable if there are none."""
    model = precise(subject, None)
    found = norms(model, lambda: call(subject, model, subject.tokens(3, length(subject), seed=subject.seed)))
    if not found:
        raise NotApplicable("no module was recognized as a norm by its name or class")
    return model, found


def judged(model: nn.Module, found: list[Norm], judge: Callable[[nn.Module, Norm], Any]) -> None:
    """Judges every norm. `judge` returns None, or raises one of PyTorch's errors, if it cannot tell."""
    seen = {norm.name: _answer(judge, model, norm) for norm in found}
    known = {name: value for name, value in seen.items() if value is not None}
    if not known:
        raise NotApplicable("none of the modules named norm could be judged", called=[norm.name for norm in found])
    note(norms=known)


def _answer(judge: Callable[[nn.Module, Norm], Any], model: nn.Module, norm: Norm) -> Any:
    try:
        return judge(model, norm)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


@needs(*STEADY, CAUSAL, ROWS_APART, "check_gradients.check_rows_get_their_own_gradient")
def check_norms_act_on_each_token_alone(subject: Subject) -> None:
    """A norm's output for one token must not depend on any other token."""
    judged(*recognized(subject), expect_alone)


def expect_alone(model: nn.Module, norm: Norm) -> float:
    """The largest change of another token's output, in units of the largest output."""
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
        f"the norm {norm.name} mixes tokens: changing its input at {list(place)} of {list(x.shape[:-1])} changes its "
        f"output at {int((moves > TOUCHED).sum())} other places, first at {where}, by up to {float(moves.max()):.3g} "
        "of "
        "the largest output. Its mean or variance is not over the features of one token alone",
        where=locate(model, norm.name),
        likely=("norm-averages-over-the-past",),
        advice="Take the mean and the mean square over the last axis only: x.pow(2).mean(-1, keepdim=True).",
        first={"changed": list(place), "moved": where},
    )


@needs(*STEADY, ALONE)
def check_norms_take_out_the_scale(subject: Subject) -> None:
    """A norm's output must not depend on the scale of a large input, and it must subtract all of the mean or none."""
    judged(*recognized(subject), expect_scale_taken_out)


def expect_scale_taken_out(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    with norm.shaken():
        x = norm.random(1) * LARGE
        one, four = norm.odd(x), norm.odd(x * TIMES)
        if not bool(one.isfinite().all() and four.isfinite().all() and one.any()):
            return None
        alone = norm.featurewise
        linear = float((four - TIMES * one).abs().max()) <= LINEAR * float(four.abs().max())
        if alone and not (linear and norm.named_norm and norm.vectors and not norm.ignores_its_vectors):
            return None  # a tanh that replaces a norm, or a norm that is switched off
        change = float((four - one).abs().max() / one.abs().max())
        if change > SCALED:
            fail_scale(model, norm, one, four, linear)
    share = norm.mean_taken()
    learned = any(p.numel() == 1 for p in norm.module.parameters())  # the share may be a parameter
    if share is not None and not learned and MEANS < abs(share) and MEANS < abs(share - 1):
        fail_mean(model, norm, share)
    return dict(change=change) if share is None else dict(change=change, mean_taken=share)


def fail_scale(model: nn.Module, norm: Norm, one: Tensor, four: Tensor, linear: bool) -> None:
    ratio = float(four.square().mean().sqrt() / one.square().mean().sqrt())
    power = math.log(ratio) / math.log(TIMES) if ratio > 0 else math.nan
    what = (
        "it does not divide by the size of its input"
        if linear
        else f"the output goes as the input to the power {power:.2g}"
    )
    fail(
        f"the norm {norm.name} does not remove the scale: {TIMES:g} times a large input gives {ratio:.4g} times the "
        f"output, should be 1 times ({what})",
        where=locate(model, norm.name),
        likely=("norm-divides-by-variance", "norm-divides-by-nothing"),
        advice="Divide by the root mean square: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps).",
        ratio=ratio,
        power=power,
    )


def fail_mean(model: nn.Module, norm: Norm, share: float) -> None:
    fail(
        f"the norm {norm.name} subtracts {share:.4g} times the mean of its input, should be 1 times (layer norm) or 0 "
        "times (RMS norm)",
        where=locate(model, norm.name),
        likely=("norm-adds-the-mean",),
        advice="Use x - x.mean(-1, keepdim=True) in a layer norm, and x alone in an RMS norm.",
        taken=share,
    )


@needs(*STEADY, ALONE, SCALE)
def check_epsilon_does_not_rule_a_norm(subject: Subject) -> None:
    """At initialization, a norm's output must depend on its input and not be dominated by its epsilon."""
    judged(*recognized(subject), expect_small_epsilon)


def expect_small_epsilon(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    with norm.shaken():
        if norm.featurewise:
            return None
        unit = norm.random(1)
        small = norm.share_of_full(unit * SMALL)
        size = norm.seen.double().square().mean(-1).sqrt().median()
        if not (float(size) > 0 and math.isfinite(small)):
            return None
        here = norm.share_of_full(norm.seen)
    if small < HALF and here < HALF:
        epsilon = SMALL**2 * (1 / max(small, 1e-9) ** 2 - 1)
        fail(
            f"the epsilon of the norm {norm.name} is too large: at initialization its input has size "
            f"{float(size):.3g}, "
            f"and its output only {here:.3g} of the size that a large input gives. That is the effect of about "
            f"{epsilon:.2g} "
            "added to the mean square, where 1e-5 is usual",
            where=locate(model, norm.name),
            likely=("norm-epsilon-of-one", "norm-wrong-eps"),
            advice="Add an epsilon of 1e-5 or 1e-6 to the variance, under the root. It only has to prevent division "
            "by 0.",
            share=here,
            size=float(size),
            epsilon=epsilon,
        )
    return dict(share=here)


@needs(*STEADY, ALONE)
def check_gain_multiplies_and_bias_adds(subject: Subject) -> None:
    """A norm's gain must multiply the normalized input, and its bias must be added to it."""
    judged(*recognized(subject), expect_factors)


GAINS, BIASES = ("weight", "gain", "gamma", "scale"), ("bias", "beta", "shift")


def expect_factors(model: nn.Module, norm: Norm) -> dict[str, str] | None:
    """What each vector of the norm does: "multiplies", "adds", or "nothing" if it is not used."""
    if norm.ignores_its_vectors:
        return None
    acts = {name: norm.effect(name) for name in norm.vectors}
    for name, does in acts.items():
        start = norm.vectors[name].detach()
        word = name.lower().strip("_")
        if does == "adds" and bool((start == 1).all()) and (word in GAINS or norm.constant):
            fail_factor(model, norm, name, "is added to the output and multiplies nothing", 1)
        if does == "multiplies" and word in BIASES and bool((start == 0).all()) and norm.constant:
            fail_factor(model, norm, name, "multiplies the normalized input", 0)
    return acts or None


def fail_factor(model: nn.Module, norm: Norm, name: str, does: str, start: int) -> None:
    constant = ". At initialization the output is the same for every input" if norm.constant else ""
    likely = ("norm-gain-and-bias-swapped", "norm-gain-added")
    fail(
        f"in the norm {norm.name}, {name} (which starts at {start}) {does}{constant}",
        where=locate(model, norm.name),
        likely=likely if constant else likely[::-1],
        advice="Compute normed * gain + bias. F.layer_norm(x, shape, weight, bias, eps) takes the gain before the "
        "bias.",
        parameter=name,
    )


@needs(*STEADY, ALONE, SCALE, "check_parts.check_gain_multiplies_and_bias_adds")
def check_norms_are_what_they_are_called(subject: Subject) -> None:
    """An RMS norm must not subtract the mean, and the output of an RMS or layer norm must have the size of its gain."""
    judged(*recognized(subject), expect_as_called)


def expect_as_called(model: nn.Module, norm: Norm) -> dict[str, float] | None:
    kind = type(norm.module).__name__
    root, layer = re.search("rms", kind, re.IGNORECASE), re.search("layer_?norm", kind, re.IGNORECASE)
    if not (root or layer) or norm.featurewise:
        return None
    share = norm.mean_taken()
    if root and share is not None and abs(share - 1) < MEANS:
        fail_called(model, norm, "subtracts the mean, as a layer norm does", "rms-subtracts-mean")
    times = norm.size_beside_gain()
    if share is None or times is None:
        return None
    C = norm.seen.shape[-1]
    if abs(times * C**0.5 - 1) < NEAR:
        does = f"its output has size {times:.3g} = 1/√{C}, should be 1: it divides by the root of the sum of squares"
        fail_called(model, norm, f"{does}, not of their mean", "rms-sum-not-mean")
    if abs(times - 2) < NEAR and norm.vectors:  # harmless, and so in the transformers library's Nemotron
        advise(
            f"at initialization the output of {norm.name} ({kind}) has twice the size of its gain: is one added to a "
            "gain that is already one?"
        )
    return dict(times_the_gain=times)


def fail_called(model: nn.Module, norm: Norm, does: str, bug: str) -> None:
    kind = type(norm.module).__name__
    fail(
        f"{norm.name} is called {kind}, but {does}",
        where=locate(model, norm.name),
        likely=(bug,),
        advice="Write an RMS norm as x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain. Only a layer norm "
        "subtracts the mean from x first.",
        called=kind,
    )


@needs(*STEADY)
def check_feed_forward_is_not_linear(subject: Subject) -> None:
    """A feed-forward must not be linear between the matrix that widens its input and the one that narrows it again."""
    model = precise(subject, EXISTENCE[1])
    tokens = subject.tokens(3, length(subject), seed=subject.seed)
    pairs = feed_forwards(model, lambda: subject.logits(model, tokens)) if tokens.shape[1] > 1 else []
    if not pairs:
        raise NotApplicable(
            "no feed-forward was recognized: no product widens each token's features and another narrows them again"
        )
    note(feed_forwards=len({pair.narrow.matrix for pair in pairs}))
    for pair in pairs:
        if pair.passed_on is not None:
            gated = sum(other.narrow is pair.narrow for other in pairs) > 1
            fail_linear(pair, pair.passed_on, gated)


def fail_linear(pair: FeedForward, factor: float, gated: bool) -> None:
    outer, inner = pair.wide.rows.shape[-1], pair.wide.gives.shape[-1]
    changed = "unchanged" if factor == 1 else f"times {factor:.4g}"
    fail(
        f"the feed-forward is linear: the matrix that narrows {inner} features to {outer} (at {pair.narrow.where}) "
        "gets "
        f"the output of the one that widens {outer} to {inner} (at {pair.wide.where}) {changed}. Two linear maps in a "
        "row are one linear map",
        where=pair.narrow.where,
        likely=("gate-added",) if gated else ("mlp-no-activation", "activation-after-second-linear"),
        advice="Put the activation between the two, as in output(gelu(input(x))). A gate multiplies: "
        "output(silu(gate(x)) "
        "* input(x)).",
        widths=[outer, inner],
        factor=factor,
    )


@needs(*STEADY)
def check_activations_are_what_they_are_called(subject: Subject) -> None:
    """What the model's code calls GELU, SiLU, Swish or ReLU must compute it, or a usual approximation of it."""
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
        raise NotApplicable("the model's own code defines no activation with a known name")
    note(apart=apart, bound=FORMED)


def fail_activation(one: Activation, x: Tensor, gives: Tensor) -> None:
    wanted = FORMS[one.kind][0](x)
    at, one_at = int((gives - wanted).abs().nan_to_num(torch.inf).argmax()), int((x - 1).abs().argmin())
    fail(
        f"{one.named}, but at {float(x[at]):g} it gives {float(gives[at]):.4g}, should be {float(wanted[at]):.4g}, and "
        f"at 1 it gives {float(gives[one_at]):.4g}, should be {float(wanted[one_at]):.4g}",
        where=one.where,
        likely=("gelu-written-wrong",),
        advice="Use nn.GELU() (approximate='tanh' for GPT-2's), nn.SiLU() or nn.ReLU(). The tanh form of GELU is "
        "0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).",
        at=float(x[at]),
    )


@needs(*STEADY, REACHES, MATTERS)
def check_tokens_get_past_a_silent_part(subject: Subject) -> None:
    """With every attention set to zero, a token must still affect its own logits; with every feed-forward set to zero,
    earlier tokens must still affect later logits.
    """
    if length(subject) < 2:
        raise NotApplicable("the model reads one token only: attention cannot be told from a feed-forward")
    best: dict[str, float] = {}
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        parts = silences(subject, model)
        best = {part: max(best.get(part, 0.0), last_logits_change(subject, model, s)) for part, s in parts.items()}
        if best and min(best.values()) > TOLD:
            break
    if not best:
        raise NotApplicable("no attention and no feed-forward was recognized in a list of blocks")
    note(changes=best, bound=TOLD)
    lost = [part for part, size in best.items() if size <= TOLD]
    if len(lost) == 1 < len(best):
        fail_lost(subject, model, lost[0], parts[lost[0]])
    for part in lost:
        advise(f"with every {part} set to zero the logits ignore the tokens: no residual connection goes around it")


def fail_lost(subject: Subject, model: nn.Module, part: str, silence: Silence) -> None:
    own = last_logits_change(subject, model, silence, itself=True) > TOLD
    places = list(silence.found)
    alone = [n for n in range(len(places)) if last_logits_change(subject, model, silence, only=n) <= TOLD]
    where = places[alone[0] if alone else 0]
    if own:
        why = "what attention computes is not added to the residual stream, only each token's own vector is"
    else:
        why = f"the output of the {part} replaces the residual stream instead of being added to it"
    fail(
        f"with every {part} set to zero, the logits at the last position do not depend on the {'earlier ' * own}tokens"
        f": {why}"
        + (
            f". Zeroing one alone does the same for {len(alone)} of {len(places)}, first {where.module}"
            if alone
            else ""
        ),
        where=where,
        likely=(f"{part}-residual-missing", *(["residual-from-the-blocks-input"] if own else [])),
        advice="Add every part to its input: x = x + attention(norm(x)), then x = x + feed_forward(norm(x)).",
        alone=alone,
    )


@needs(*STEADY, CAUSAL, ROWS_APART)
def check_attention_weights_sum_to_one(subject: Subject) -> None:
    """In evaluation mode, the attention weights of every query must sum to one over the keys."""
    seen = [attended(subject, scheme).weighed for scheme in (None, EXISTENCE[1])]
    if not all(seen) or len(seen[0]) != len(seen[1]):
        raise NotApplicable("no softmax was seen whose result, scaled or not, multiplies values")
    note(attentions=len(seen[0]), farthest=max(w.off for w in seen[0]), bound=SUMS)
    for one, other in zip(*seen, strict=True):
        learned = abs(one.factor - other.factor) > SUMS * abs(one.factor)
        if one.off > SUMS and other.off > SUMS and not learned:
            fail_sum(one)


def attended(subject: Subject, scheme: tuple[float, float] | None) -> Attended:
    model = precise(subject, scheme)
    T = length(subject)
    seen = Attended(model, T)
    with seen:
        call(subject, model, subject.tokens(3, T, seed=subject.seed))
    return seen


def fail_sum(seen: Weighed) -> None:
    total = seen.weights.double().sum(seen.axis)
    low, high = float(total.min()), float(total.max())
    sums = f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"
    likely: tuple[str, ...] = ("scale-after-softmax",)
    why = f"the result of the softmax is multiplied by {seen.factor:.6g}"
    if seen.along != seen.axis:
        likely = ("softmax-over-heads-masked-after", "softmax-over-heads", "softmax-over-queries")
        why = f"the softmax is over axis {seen.along}, should be over the keys (axis {seen.axis})"
    fail(
        f"the attention weights of a query add up to {sums} over the keys, should be 1: {why}",
        where=seen.where,
        likely=likely,
        advice="Scale and mask before the softmax, and apply nothing but dropout after it: weights = (q @ "
        "k.transpose(-2, -1) / head_width ** 0.5 + mask).softmax(dim=-1).",
        sums=[low, high],
        factor=seen.factor,
        axis=seen.along,
    )


@needs(*STEADY)
def check_heads_that_share_keys_share_values(subject: Subject) -> None:
    """Query heads that share keys must share values, and each key-value head must serve equally many query heads."""
    pairs = attended(subject, EXISTENCE[1]).pairs
    maps = [(sharing(k), sharing(v), where) for k, v, where in pairs if k.dim() == v.dim() > 2 and k.any() and v.any()]
    groups = [(k, v, where) for k, v, where in maps if len(k) == len(v) and 1 < len(set(k)) == len(set(v)) < len(k)]
    if not groups:
        raise NotApplicable(
            "no query heads were seen that share keys and values with other query heads", attentions=len(pairs)
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
        f"query head {head} uses the keys of head {keys[head]} but the values of head {values[head]}: keys are shared "
        f"by heads {groups_of(keys)}, values by heads {groups_of(values)}",
        where=where,
        likely=("gqa-k-v-grouping-mismatch",),
        advice="Repeat keys and values the same way: repeat_interleave(n_head // n_kv_head, dim=1) for both.",
        keys=keys,
        values=values,
    )


def fail_sizes(keys: list[int], where: Where | None) -> None:
    fail(
        f"{len(keys)} query heads share {len(set(keys))} key-value heads unevenly: {groups_of(keys)}, should be "
        f"{len(keys) // len(set(keys))} query heads each",
        where=where,
        likely=("gqa-groups-of-different-sizes",),
        advice="Let query head h use key-value head h // (n_head // n_kv_head): repeat_interleave with dim=1.",
        keys=keys,
    )


def groups_of(heads: list[int]) -> str:
    """`0+1, 2+3`."""
    return ", ".join("+".join(str(h) for h, g in enumerate(heads) if g == group) for group in dict.fromkeys(heads))
