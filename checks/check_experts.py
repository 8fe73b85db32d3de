"""Mixtures of experts: which expert a token gets, by what weight, and what balances them.

A mixture is recognized by what it does, not by its names, and measured once for all checks (probes/experts.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .expect import STEADY, NotApplicable, advise, fail, needs, note
from .loss.returned import leaves, slots
from .probes.experts import NOTHING, ROUTED, Mixture, mixtures, used
from .probes.extra_arguments import targets_of
from .probes.influence import length
from .probes.precision import precise
from .subject import EXISTENCE, Subject
from .watch.draws import seeded

ALONE = "check_experts.check_other_tokens_leave_a_tokens_weights_alone"
REACHED = "check_experts.check_what_an_expert_computes_reaches_the_output"
FOLLOWS = "check_experts.check_a_raised_score_gives_its_expert_weight"
APART = 1e-3  # of a part: routers compute in float32, and a part is a difference of two outputs
LOST = 0.2  # of the outputs of experts; a weight may round to 0
BALANCE = 1e-5  # of the gradient of the cross entropy: what is left of it where the two are subtracted in float32


@needs(*STEADY)
def check_other_tokens_leave_a_tokens_weights_alone(subject: Subject) -> None:
    """A router score of one token must not change the weights that another token gives to its experts."""
    for mixture in mixtures(subject):
        for n, e, parts in mixture.nudged:
            _expect_others_alone(mixture, n, e, parts)


def _expect_others_alone(mixture: Mixture, n: int, e: int, parts: Tensor) -> None:
    before, after = mixture.parts.norm(dim=-1), parts.norm(dim=-1)
    was, is_now = used(mixture.parts), used(parts)
    moved = ((parts - mixture.parts).norm(dim=-1) > APART * before) & (was | is_now)
    moved[:, n] = False
    full = moved & ~(was & is_now)
    if bool(full.any()):  # an expert takes a limited number of tokens, or chooses them: the rules of rows judge
        advise(
            f"in {mixture.where.module}, the tokens compete for places in the experts: what one of them scores decides "
            "whether another one is dropped"
        )
    if not bool((moved & ~full).any()):
        return
    other, t = (int(i) for i in (moved & ~full).nonzero()[0])
    fail(
        f"the weights of a token's experts depend on other tokens: raising the router score of token {n} for expert "
        f"{e} by 1 multiplies the weight that token {t} gives to expert {other} by "
        f"{float(after[other, t] / before[other, t]):.4g}, should be 1; so it goes for {int(moved.any(0).sum())} of "
        f"{moved.shape[1] - 1} other tokens",
        where=mixture.where,
        likely=("router-normalised-over-tokens", "router-softmax-over-tokens"),
        advice=ROUTED,
        first={"changed": n, "moved": t, "expert": other},
    )


@needs(*STEADY)
def check_what_an_expert_computes_reaches_the_output(subject: Subject) -> None:
    """What an expert computes for the tokens that are routed to it must have a part in their outputs."""
    judged = []
    for mixture in mixtures(subject):
        (E, N), given = mixture.parts.shape[:2], sum(mixture.given)
        if given % N or not N < given < E * N or len(set(mixture.given)) == 1:
            continue  # every expert reads all tokens or as many as have room; or each token has one expert
        counts = int((mixture.parts != 0).any(-1).sum())
        judged.append([counts, given])
        if given - counts > LOST * given:
            fail(
                f"{given - counts} of {given} outputs of experts are lost: {given // N} experts compute something for "
                f"each of {N} tokens, but a token's output has a part of {counts / N:.3g} of them on average",
                where=mixture.where,
                likely=("expert-outputs-overwritten",),
                advice="Add the output of each expert to what the others gave: out.index_add_(0, tokens, weighted) or "
                "out[tokens] += weighted, not out[tokens] = weighted.",
                given=mixture.given,
            )
    if not judged:
        raise NotApplicable("no mixture was found in which each token is handed to several of the experts")
    note(judged=judged)


@needs(*STEADY, ALONE, REACHED)
def check_a_raised_score_gives_its_expert_weight(subject: Subject) -> None:
    """The expert for which the router scores a token far above all others must have a part in that token's output."""
    shares = []
    for mixture in mixtures(subject):
        tried = [
            (int(column), t, torch.where(used(raised.parts), raised.parts.norm(dim=-1), 0)[:, t])
            for raised in mixture.raised
            for t, column in enumerate(raised.column)
        ]
        left_out = [each for each in tried if not each[2][each[0]]]
        shares.append(1 - len(left_out) / len(tried))
        replaced = [each for each in left_out if bool(each[2].any())]
        # a full expert drops some tokens; learned biases of the choice outvote a sigmoid's score for some
        wrong = len(left_out) > len(tried) / 2 or (mixture.firm and len(replaced) > len(tried) / 10)
        if wrong and not _renamed(mixture, tried):
            _fail_left_out(mixture, left_out, len(tried))
    note(followed=shares)


def _renamed(mixture: Mixture, tried: list[tuple[int, int, Tensor]]) -> bool:
    """Whether every column of the router belongs to one expert, of another number: as good as in their order."""
    owners: dict[int, set[int]] = {}
    for column, _, sizes in tried:
        owners.setdefault(column, set()).add(int(sizes.argmax()) if bool(sizes.any()) else -1)
    known = {column: owner for column, found in owners.items() for owner in found}
    renamed = all(len(found) == 1 for found in owners.values()) and len({*known.values()} - {-1}) == len(known)
    if renamed:
        pairs = ", ".join(f"{column} to expert {owner}" for column, owner in sorted(known.items()))
        advise(f"in {mixture.where.module}, the router's columns lead to experts of other numbers: {pairs}")
    return renamed


def _fail_left_out(mixture: Mixture, left_out: list[tuple[int, int, Tensor]], of: int) -> None:
    column, t, sizes = left_out[0]
    other = int(sizes.argmax())
    instead = f"expert {other} does instead" if bool(sizes[other]) else "nor does any other"
    fail(
        f"the router's scores do not decide which expert counts: with the score of expert {column} raised by 1e4 for "
        f"token {t}, expert {column} has no part in that token's output ({instead}); so it goes in {len(left_out)} of "
        f"{of} trials",
        where=mixture.where,
        likely=("expert-weights-swapped", "least-likely-experts"),
        advice="Take weights and indices from one topk, and use weights[token, slot] with indices[token, slot]: "
        "sorting or indexing one of the two alone pairs an expert with the weight of another.",
        first={"expert": column, "token": t, "sizes": [float(f"{float(s):.3g}") for s in sizes]},
    )


@needs(*STEADY, ALONE, FOLLOWS)
def check_expert_weights_are_shares(subject: Subject) -> None:
    """A token's weights for its experts must not be negative. If experts compete for weight, their sum must not exceed
    the weight that one expert has alone.
    """
    totals = []
    for mixture in mixtures(subject):
        weights, full = coefficients(mixture, mixture.parts, [raised.own for raised in mixture.raised])
        negative = (weights < 0).nonzero()
        if len(negative):
            _fail_negative(mixture, weights, negative)
        total = torch.where(full, weights.nan_to_num(), 0).sum(0)  # [N]
        compete = torch.stack([_alone(raised.parts, raised.column) for raised in mixture.raised]).all(0)
        totals.append(float(torch.where(compete, total, 0).max()))
        _expect_weights_of_their_own(mixture, weights)
        counted = weights[weights > APART]
        if totals[-1] > 1 + APART and float(counted.max() - counted.min()) > APART:  # else it is a plain average
            _fail_sum(mixture, torch.where(compete, total, 0), weights)
    note(largest_sums=totals, bound=1 + APART)


def _expect_weights_of_their_own(mixture: Mixture, weights: Tensor) -> None:
    """Of a token's several experts, with weights that vary from token to token, each must have its own."""
    several = [w[w.isfinite() & (w > APART)] for w in weights.T]
    several = [w for w in several if len(w) > 1]
    firsts = torch.stack([w[0] for w in several]) if several else torch.zeros(0)
    if len(several) < 2 or any(float(w.max() - w.min()) > APART * APART for w in several):
        return
    if float(firsts.max() - firsts.min()) > APART:  # else all weights are alike: an average, without a router's weights
        t = next(t for t, w in enumerate(weights.T) if int((w > APART).sum()) > 1)
        e, other = (int(i) for i in (weights[:, t] > APART).nonzero()[:2, 0])
        fail(
            f"all experts of a token have one weight: experts {e} and {other} of token {t} both count "
            f"{float(weights[e, t]):.4g}, with router scores {float(mixture.scores[t, e]):.4g} and "
            f"{float(mixture.scores[t, other]):.4g}",
            where=mixture.where,
            likely=("weight-of-the-first-expert",),
            advice="Use the weight of the slot in which the expert was chosen: weights[token, slot], not "
            "weights[token, 0].",
            token=t,
        )


def coefficients(mixture: Mixture, parts: Tensor, alone: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[E, N]: parts [E, N, C] in units of what an expert gives when its score is raised, and where they are known.

    They are nan where that was not tried, and where the direction of a part changes with its weight, as where a weight
    multiplies the expert's input.
    """
    weights, at_work = parts.new_full(parts.shape[:2], torch.nan), used(parts)
    tokens = torch.arange(parts.shape[1])
    for raised, unit in zip(mixture.raised, alone, strict=True):
        part, size = parts[raised.column, tokens], unit.norm(dim=-1)
        weight = (part * unit).sum(-1) / size.square()
        straight = (part - weight[:, None] * unit).norm(dim=-1) <= APART * part.norm(dim=-1)
        known = straight & (size > NOTHING * size.max())
        weight = torch.where(at_work[raised.column, tokens], torch.where(known, weight, torch.nan), 0)
        weights[raised.column, tokens] = weight
    return weights, weights.isfinite()


def _alone(parts: Tensor, column: Tensor) -> Tensor:
    """[N], True where the expert whose score was raised is the only one with a part: weights are shares of a whole."""
    others = used(parts)
    others[column, torch.arange(len(column))] = False
    return ~others.any(0)


def _fail_negative(mixture: Mixture, weights: Tensor, negative: Tensor) -> None:
    e, t = (int(i) for i in negative[0])
    fail(
        f"{len(negative)} of {int(weights.isfinite().sum())} weights of experts are negative: the first is that of "
        f"expert {e} for token {t}, whose router score is {float(mixture.scores[t, e]):.3g}. The expert's output is "
        "subtracted instead of added",
        where=mixture.where,
        likely=("raw-scores-as-weights",),
        advice="Put the scores through a softmax or a sigmoid before they multiply the experts' outputs.",
        first={"expert": e, "token": t, "score": float(mixture.scores[t, e])},
    )


def _fail_sum(mixture: Mixture, total: Tensor, weights: Tensor) -> None:
    t = int(total.argmax())
    each = [f"{float(w):.3g}" for w in weights[:, t] if bool(w.isfinite()) and float(w) > APART]
    fail(
        f"the weights of a token's experts add up to {float(total[t]):.4g} at token {t} ({' + '.join(each)}), should "
        "be at most 1, the weight that one expert has when its score is far above the others",
        where=mixture.where,
        likely=("router-normalised-by-its-norm",),
        advice="Divide by the sum of the chosen weights (weights / weights.sum(-1, keepdim=True)), not by their norm "
        "or largest, and multiply by a factor only after that.",
        token=t,
        sum=float(total[t]),
    )


@needs(*STEADY, ALONE, FOLLOWS)
def check_an_experts_bias_is_weighted_with_it(subject: Subject) -> None:
    """The last bias of an expert must be multiplied by the same weight as the rest of its output."""
    biased = [mixture for mixture in mixtures(subject) if mixture.biases]
    if not biased:
        raise NotApplicable("no mixture was found that keeps the biases of all experts in one tensor")
    judged = 0
    for mixture in biased:
        whole, known = coefficients(mixture, mixture.parts, [raised.own for raised in mixture.raised])
        for name, (parts, raised_parts) in mixture.biases.items():
            tokens = torch.arange(parts.shape[1])
            units = [p[r.column, tokens] for p, r in zip(raised_parts, mixture.raised, strict=True)]
            bias, of_bias = coefficients(mixture, parts, units)
            wrong = (known & of_bias & ((bias - whole).abs() > APART)).nonzero()
            judged += int((known & of_bias).sum())
            if len(wrong):
                _fail_bias(mixture, name, whole, bias, wrong)
    note(judged=judged)


def _fail_bias(mixture: Mixture, name: str, whole: Tensor, bias: Tensor, wrong: Tensor) -> None:
    e, t = (int(i) for i in wrong[0])
    fail(
        f"the bias {name} of an expert is not weighted as the expert is: expert {e} has {float(whole[e, t]):.3g} times "
        f"its full part in the output for token {t}, its bias {float(bias[e, t]):.3g} times; so it goes in "
        f"{len(wrong)} cases",
        where=mixture.where,
        likely=("expert-bias-not-weighted",),
        advice="Add the bias before the weight multiplies: weight * (hidden @ w2 + b2).",
        first={"expert": e, "token": t, "weight": float(whole[e, t]), "bias": float(bias[e, t])},
    )


@needs(*STEADY)
def check_what_balances_experts_has_a_gradient(subject: Subject) -> None:
    """What a mixture of experts adds to the loss that forward returns must have a gradient."""
    found = mixtures(subject)
    model = precise(subject, EXISTENCE[1]).train()
    parameter = targets_of(subject)
    if parameter is None:
        raise NotApplicable("forward takes no targets")
    holders = [model.get_submodule(mixture.where.module) for mixture in found]
    weights = [p for holder in holders for p in holder.parameters() if p.requires_grad]
    tokens, targets = (subject.tokens(3, length(subject), seed=subject.seed + n) for n in (1, 2))
    added, entropy = _added(subject, model, tokens, {parameter.name: targets})
    if abs(float(added)) <= BALANCE * abs(float(entropy)):
        raise NotApplicable("forward returns the cross entropy, to which nothing is added")
    of_added, of_entropy = (_largest(value, weights) for value in (added, entropy))
    note(added=float(added), gradient=of_added, of_cross_entropy=of_entropy)
    if of_added > BALANCE * of_entropy:
        return
    with torch.no_grad():
        for p in weights:
            p.mul_(1 + 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p))
        again, _ = _added(subject, model, tokens, {parameter.name: targets})
    if abs(float(again - added)) <= APART * abs(float(added)):
        raise NotApplicable("what forward adds to the cross entropy does not depend on the experts or their router")
    fail(
        f"what the model adds to its loss for its experts has no gradient: it is {float(added):.4g} here and "
        f"{float(again):.4g} with other weights of the router, yet backward gives the router and the experts nothing "
        "of it. It balances nothing",
        where=found[0].where,
        likely=("balance-loss-detached",),
        advice="Let the mean router probability of each expert carry the gradient: experts * (share_of_tokens * "
        "mean_probability).sum(). Counts of chosen tokens alone have none.",
        added=float(added),
    )


def _added(subject: Subject, model: nn.Module, tokens: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the returned loss is beyond the mean cross entropy of the returned logits, and that cross entropy."""
    (targets,), V = more.values(), subject.sizes.vocab_size
    try:
        with seeded(subject.seed):
            found = [x for x in leaves([*slots(model(tokens, **more)).values()]) if isinstance(x, Tensor)]
    except Exception as error:
        raise NotApplicable(
            f"forward cannot be called with tokens and {next(iter(more))} alone",
            error=f"{type(error).__name__}: {error}",
        ) from None
    losses = [x for x in found if x.is_floating_point() and x.numel() == 1]
    logits = [x for x in found if x.is_floating_point() and x.numel() == targets.numel() * subject.width]
    if not losses or not logits:
        raise NotApplicable("with targets forward does not return a loss and the logits of all positions")
    rows = logits[0].reshape(*targets.shape, -1)[..., :V].double()
    read = [F.cross_entropy(rows[:, : rows.shape[1] - n].flatten(0, 1), targets[:, n:].flatten()) for n in (0, 1)]
    entropy = min(read, key=lambda value: abs(float(losses[0] - value)))
    return losses[0].double() - entropy, entropy


def _largest(value: Tensor, weights: list[nn.Parameter]) -> float:
    """The largest entry of the gradient."""
    if not value.requires_grad:
        return 0.0
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return max((float(g.abs().max()) for g in found if g is not None), default=0.0)
