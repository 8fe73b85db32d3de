"""Which token of the text each prediction is trained on, of every head that a model has."""

from __future__ import annotations

from .expect import NotApplicable, fail, needs, note
from .loss.heads import heads_of
from .subject import Subject


@needs("check_loss.check_a_place_is_trained_on_its_own_target", "check_causality.check_future_cannot_change_past")
def check_every_head_predicts_the_token_after_what_it_read(subject: Subject) -> None:
    """Each prediction must be trained on the token after the last that it has read; more heads, on those after it."""
    if not subject.causal:
        raise NotApplicable("a model that is not causal need not predict the next token")
    heads = heads_of(subject)
    note(heads=[{"read": head.read, "ahead": head.ahead} for head in heads])
    for number, head in enumerate(heads):
        alike = {other.ahead for other in heads if other.read == head.read}
        want = next(n for n in range(1, len(heads) + 2) if n not in alike)
        if 0 < head.ahead < want:
            continue
        which = "the prediction" if len(heads) == 1 else f"prediction {number + 1} of {len(heads)}"
        if head.ahead < 1:
            why = "which it has already read, so it learns to copy"
        elif want == 1:
            why = "its labels are shifted once more than its input" if head.ahead == 2 else "the next one is skipped"
        else:
            why = f"and none is trained on token {_place(head.read + want)}: its labels are shifted too far"
        fail(
            f"{which} at position t has read the text up to token {_place(head.read)} and is trained on token "
            f"{_place(head.read + head.ahead)}, expected {_place(head.read + want)}: {why}",
            where=head.where,
            likely=("second-head-copies",) if head.ahead < 1 else ("labels-shifted-again", "second-head-skips-a-token"),
            advice="Where the input of a head is shifted to hold token t + 1, its labels are those of t + 2: targets "
            "that are already shifted lose one place for each step further, targets[:, 1:], and not two.",
            heads=[{"read": other.read, "ahead": other.ahead} for other in heads],
        )


def _place(offset: int) -> str:
    return f"t {'+' if offset > 0 else '-'} {abs(offset)}" if offset else "t"
