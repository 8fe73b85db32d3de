"""The checks of training, optimizer, evaluation and data: what they report for each bug, and correct steps pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.controls_training import STEPS, next_token, step_subject
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.checks.training.met_step import met_step

THEMES = ("training", "optimizer", "evaluation", "data")
CHECKS = {check_id(check).partition(".")[2]: check for theme in THEMES for check in checks_in(theme)}
FOLLOWS, MICRO = "check_a_step_follows_the_gradient", "check_micro_batches_add_up_to_the_whole"
SCALE = "check_the_loss_scale_cancels"
CLIP, REPORTED = "check_clipping_scales_the_whole_gradient", "check_the_reported_loss_is_that_of_the_step"
RATE, WEIGHS = "check_the_learning_rate_follows_its_schedule", "check_evaluation_weighs_every_target_alike"
EPOCH, LOSS_MASK = "check_an_epoch_has_every_example_once", "check_the_loss_mask_drops_what_was_asked"

SAID = [
    ("zero-grad-missing", FOLLOWS, ["step 2", "what the steps before left in .grad"]),
    ("zero-grad-between-backward-and-step", FOLLOWS, ["step 1", "no weight changes"]),
    ("normalisation-missing", FOLLOWS, ["times as large", "the sum over the targets"]),
    ("step-uphill", FOLLOWS, ["180°", "uphill"]),
    ("step-with-stale-gradient", FOLLOWS, ["step 1", "the next step uses this gradient"]),
    ("accum-mean-of-means", MICRO, ["micro-batches of 2", "average of the micro-batches' means", "count more"]),
    ("accum-no-division", MICRO, ["the sum of the micro-batches' means"]),
    ("accum-double-normalised", MICRO, ["divided twice", "3 micro-batches"]),
    ("accum-divides-by-last-count", MICRO, ["targets of the last micro-batch"]),
    ("zero-grad-each-microbatch", MICRO, ["the last micro-batch alone"]),
    ("accum-partial-window-dropped", MICRO, ["5 examples in micro-batches of 2", "4 examples"]),
    ("clip-per-microbatch", MICRO, ["clipped after every micro-batch"]),
    ("clip-missing", CLIP, ["not clipped"]),
    ("clip-after-step", CLIP, ["only after the step"]),
    ("clip-per-parameter", CLIP, ["for each parameter separately", "°"]),
    ("clip-by-value", CLIP, ["value by value", "°"]),
    ("clip-always-normalises", CLIP, ["scaled up to the limit"]),
    ("clip-by-another-norm", CLIP, ["largest entry"]),
    ("clip-before-unscale", CLIP, ["before the division"]),
    ("reported-mean-of-means", REPORTED, ["the mean of the micro-batches' means"]),
    ("reported-last-micro-batch", REPORTED, ["the last micro-batch alone"]),
    ("reported-after-the-step", REPORTED, ["the weights after the step"]),
    ("train-mode-never-restored", "check_a_step_is_made_in_train_mode", ["after an evaluation", "eval mode"]),
    ("objective-counts-padding", "check_an_objective_sums_and_counts", ["the padding is counted"]),
    ("objective-target-is-input", "check_a_uniform_stream_is_never_learned", ["ln 17 = 2.833", "the token just read"]),
    ("optimizer-misses-embeddings", "check_the_optimizer_owns_each_parameter_once", ["misses embedding.weight"]),
    ("optimizer-holds-twice", "check_the_optimizer_owns_each_parameter_once", ["embedding.weight twice"]),
    ("norm-alias-in-decay-group", "check_decay_keeps_to_its_groups", ["norm.weight should not decay"]),
    ("decay-twice", "check_decay_keeps_to_its_groups", ["0.9409", "0.97"]),
    ("scheduler-per-microbatch", RATE, ["3 times per step", "once per micro-batch"]),
    ("scheduler-off-by-one", RATE, ["step 1", "the first is skipped"]),
    ("bf16-master-weights", "check_small_updates_survive_low_precision", ["bfloat16", "norm.weight"]),
    ("eval-mean-of-batch-means", WEIGHS, ["the mean of the batches' means", "[17, 14, 4]"]),
    ("eval-only-last-batch", WEIGHS, ["the last batch alone"]),
    ("eval-denominator-off-by-one", WEIGHS, ["divided by 42 instead of 35"]),
    ("eval-with-dropout", "check_evaluation_is_without_dropout", ["dropout is on"]),
    ("eval-not-restored", "check_evaluation_leaves_no_trace", ["18 of 18 modules in eval mode"]),
    (
        "dataset-target-off-by-one",
        "check_a_target_is_the_next_token",
        ["row 0, position 0", "is 3", "expected 7"],
    ),
    ("bptt-tail-mis-split", "check_a_row_is_its_sequence", ["row 0", "from position 6 on"]),
    ("padding-counted", LOSS_MASK, ["row 1", "4 padding targets"]),
    ("loss-mask-skips-others", LOSS_MASK, ["drops target 1", "expected target 0", "1 p", "late"]),
    (
        "eos-masked-because-pad-is-eos",
        "check_an_end_token_counts_though_it_pads",
        ["6 of 8 targets", "to stop"],
    ),
    ("data-last-window-dropped", EPOCH, ["steps with [3, 3, 3] examples"]),
    ("data-validation-leak", EPOCH, ["validation split"]),
    ("data-same-shuffle-every-epoch", "check_the_order_changes_with_the_epoch", ["same order"]),
    ("step-means-of-micro-batches", FOLLOWS, ["the average of the means of micro-batches of [2, 2, 1] rows"]),
    ("step-means-by-rows-of-targets", MICRO, ["a target weighs", "with few targets weighs as much"]),
    ("step-clips-too-late", CLIP, ["max_norm=", "only after the step"]),
    ("step-clips-scaled", SCALE, ["loss scale of 1024", "clipped while it is scaled"]),
    ("optimizer-steps-twice", FOLLOWS, ["called 2 times", "on the same gradient", "optimizer.step → optimizer.step"]),
    ("step-by-another-optimizer", FOLLOWS, ["never stepped", "moment estimates"]),
    ("step-pairs-other-rows", FOLLOWS, ["trained on the targets of row"]),
    ("step-ticks-per-micro-batch", RATE, ["stepped 6 times in 2 optimizer steps", "3 times too early"]),
    ("step-reseeds", "check_a_seed_decides_a_training", ["train_step seeds", "the same units at every step"]),
    ("dataloader-workers-same-seed", "check_processes_draw_from_streams_of_their_own", ["rank 0", "rank 1"]),
]


@pytest.mark.parametrize(("bug", "check", "facts"), SAID, ids=[bug for bug, _, _ in SAID])
def test_a_finding_names_the_mistake(bug, check, facts):
    """The step, the micro-batch weighting, the limit or the example is in the message, and the bug is a suspect."""
    verdict = judge(CHECKS[check], all_bugs()[bug].subject(), {})
    assert verdict.outcome == "failed"
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says
    others = ("objective-target-is-input", "optimizer-misses-embeddings")
    assert bug in verdict.likely or bug.startswith("step-") or bug in others


@pytest.mark.parametrize("name", STEPS)
def test_correct_steps_pass(name):
    """The steps of tutorials: any order of arguments, clipping, a loss sum, label smoothing, a penalty."""
    subject = step_subject(name)
    accused = [v.says for check in CHECKS.values() if (v := judge(check, subject, {})).outcome in ("failed", "error")]
    assert not accused


def wrong_step(pair=lambda logits, x, y: next_token(logits, y), *, resets=True, evaluates=False):
    def train_step(model, optimizer, batch):
        model.train(not evaluates)
        if resets:
            optimizer.zero_grad()
        loss = pair(model(batch[0]), *batch)
        loss.backward()
        optimizer.step()
        return loss

    return Subject("wrong", SimpleNamespace(build_model=reference_parts().build_model, train_step=train_step))


def flattened_then_shifted(logits, x, y):
    return F.cross_entropy(logits.flatten(0, 1)[:-1], y.flatten()[1:])


@pytest.mark.parametrize(
    ("subject", "fact"),
    [
        (wrong_step(resets=False), "the steps before left in .grad"),
        (wrong_step(lambda logits, x, y: next_token(logits, x)), "the token just read"),
        (wrong_step(lambda logits, x, y: next_token(logits[:, :-1], y[:, 1:])), "shifted twice"),
        (wrong_step(lambda logits, x, y: next_token(logits[:, :-1], y[:, :-1])), "without the last target"),
        (wrong_step(lambda logits, x, y: next_token(logits.softmax(-1), y)), "a second softmax"),
        (wrong_step(lambda logits, x, y: next_token(logits.transpose(0, 1), y)), "reshaped in different orders"),
        (wrong_step(lambda logits, x, y: -next_token(logits, y)), "uphill"),
        (wrong_step(flattened_then_shifted), "flattened before the shift"),
        (wrong_step(lambda logits, x, y: next_token(logits[:-1], y[:-1])), "without rows [4] of 5"),
        (
            wrong_step(lambda logits, x, y: next_token(logits, y) / len(y)),
            "divided once more, by the 5 rows of the batch",
        ),
        (wrong_step(lambda logits, x, y: 2 * next_token(logits, y)), "2 times the gradient of the mean loss"),
        (
            wrong_step(lambda logits, x, y: next_token(logits[:3], y[:3]) + next_token(logits[3:], y[3:])),
            "the sum (not divided) of the means of micro-batches of [3, 2] rows",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_train_step_is_named(subject, fact):
    """The direction of the update shows what a step trains on."""
    verdict = judge(CHECKS[FOLLOWS], subject, {})
    assert verdict.outcome == "failed"
    assert fact in verdict.says


def test_parameters_that_keep_old_gradients_are_named():
    def train_step(model, optimizer, batch):
        model.blocks.zero_grad()
        loss = next_token(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    parts = SimpleNamespace(build_model=reference_parts().build_model, train_step=train_step)
    says = judge(CHECKS[FOLLOWS], Subject("wrong", parts), {}).says
    assert "step 2" in says and "right for 12 of 16" in says and "embedding.weight" in says, says


def test_a_step_that_reports_another_number_is_not_accused_of_seeing_its_targets():
    """A reported loss that is divided by the rows is below ln V from the start."""

    def train_step(model, optimizer, batch):
        loss = next_token(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item() / len(batch[0])

    parts = SimpleNamespace(build_model=reference_parts().build_model, train_step=train_step)
    verdict = judge(CHECKS["check_a_uniform_stream_is_never_learned"], Subject("odd", parts), {})
    assert verdict.outcome == "not_applicable" and "not the mean" in verdict.says


def test_a_step_that_accumulates_over_calls_is_followed_to_its_update():
    assert met_step(step_subject("accumulates_over_calls")).calls == 4
    assert met_step(step_subject("two_lines")).calls == 1


def test_a_step_that_switches_to_eval_mode_fails():
    """A step that leaves the mode to its caller gets advice."""
    check = CHECKS["check_a_step_is_made_in_train_mode"]
    assert "eval mode" in judge(check, wrong_step(evaluates=True), {}).says
    left = judge(check, step_subject("two_lines"), {})
    assert (left.outcome, "model.train()" in left.remarks[0]) == ("passed", True)


def test_the_form_of_a_batch_is_found():
    """Pairs, a dict as in the transformers library, or tokens alone: the form in which the next token is trained."""
    assert met_step(step_subject("two_lines")).form == "(tokens, targets)"
    assert met_step(step_subject("shifts_inside")).form == "{input_ids, labels}, both alike"
    assert met_step(step_subject("takes_tokens_alone")).form == "tokens alone"


def test_a_step_with_an_unknown_parameter_is_not_applicable():
    """The unknown parameter is named."""
    parts = SimpleNamespace(build_model=reference_parts().build_model, train_step=lambda model, optimizer, reward: None)
    verdict = judge(CHECKS[FOLLOWS], Subject("unknown", parts), {})
    assert (verdict.outcome, "'reward'" in verdict.says) == ("not_applicable", True)


def test_a_subject_without_training_is_trained_by_our_own_trainer():
    """The model cannot learn uniform random tokens; the checks of trainers are not applicable."""
    subject = Subject("model alone", SimpleNamespace(build_model=reference_parts().build_model))
    outcomes = {name: judge(check, subject, {}).outcome for name, check in CHECKS.items()}
    assert outcomes.pop("check_a_uniform_stream_is_never_learned") == "passed"
    assert set(outcomes.values()) == {"not_applicable"}


def test_policies_of_an_undeclared_trainer_are_advice():
    """Decay of all parameters, clipping by value, sampling with replacement: choices unless declared otherwise."""
    for bug, check in [("decay-on-everything", "check_decay_keeps_to_its_groups"), ("clip-by-value", CLIP),
                       ("data-sampled-with-replacement", EPOCH)]:  # fmt: skip
        subject = all_bugs()[bug].subject()
        subject.parts.declares = {}
        verdict = judge(CHECKS[check], subject, {})
        assert verdict.outcome == "passed", bug
        assert verdict.remarks, bug


def test_checks_leave_the_callers_random_state_alone():
    """The checks neither draw from the user's random generators nor seed them."""
    subject = Subject("transformer", reference_parts())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in (FOLLOWS, "check_a_seed_decides_a_training", "check_evaluation_leaves_no_trace"):
        judge(CHECKS[name], subject, {})
    assert torch.equal(before, torch.get_rng_state())
