"""What a declared architecture fixes besides logits: gradients, epsilon, weights, initialization, dropout, decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from power.foreign import source_of
from tests import variants_of_attention  # noqa: F401  (adds its controls)
from tests.controls import CONTROLS
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.family.aspects.constants import scale_that_differs
from transformer_checks.checks.family.aspects.learning import dropouts, gradients, initialization
from transformer_checks.checks.family.fit import fit_to
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Spec, Subject

HERE = Path(__file__).parent
CHECKS = {check.__name__: check for check in checks_in("spec")}


def verdict(subject: Subject, name: str, spec: str = "gpt2") -> Verdict:
    subject.spec = Spec(spec)
    return judge(CHECKS[name], subject, {})


@pytest.mark.parametrize(
    "name, spec",
    [("gpt2", "gpt2"), ("reference-gpt2-explicit", "gpt2"), ("llama", "llama"), ("llama-grouped-tied-biased", "llama"),
     ("grouped-and-tiled", "llama")],
)  # fmt: skip
def test_no_correct_model_fails(name, spec):
    subject = CONTROLS[name](seed=2)
    for check in CHECKS:
        found = verdict(subject, check, spec)
        assert found.outcome in ("passed", "not_applicable"), f"{check}: {found.says}"


def test_without_a_declaration_nothing_is_judged():
    for check in CHECKS:
        assert verdict(CONTROLS["alibi"](seed=0), check, "auto").outcome in ("passed", "not_applicable")


def test_gradients_agree_to_rounding():
    found = fit_to(CONTROLS["gpt2"](seed=0), "gpt2")
    compared = gradients(found)
    assert max(pair.error for pair in compared) < 1e-12
    assert "blocks.0.attention.qkv.weight" in {pair.part for pair in compared}


def test_a_gradient_that_is_scaled_names_the_weight_and_the_factor():
    def halve(model: nn.Module) -> None:
        for block in model.blocks:
            block.attention.output.weight.register_hook(lambda gradient: gradient / 2)

    found = verdict(Subject("changed", changed(halve)), "check_gradients_agree")
    assert found.outcome == "failed" and "0.5 times" in found.says
    assert set(found.evidence["gradients"]) == {f"blocks.{n}.attention.output.weight" for n in range(3)}


def test_an_epsilon_used_as_a_floor_shows_at_tiny_embeddings():
    subject = all_bugs()["norm-epsilon-is-a-floor"].subject(seed=0)
    assert fit_to(subject, "llama").agrees
    tiny = scale_that_differs(fit_to(subject, "llama"))
    assert tiny is not None and tiny.factor <= 1e-4


def test_an_unusual_epsilon_fails_and_any_power_of_ten_passes():
    found = verdict(all_bugs()["norm-epsilon-doubled"].subject(seed=0), "check_tiny_activations_agree")
    assert found.outcome == "failed" and "epsilon of 2e-05" in found.says and found.where is not None
    assert found.where.module == "norm"
    for eps in (0.0, 1e-6, 1e-12, torch.finfo(torch.float32).eps):
        subject = Subject("another epsilon", reference_parts(norm_eps=eps))
        assert verdict(subject, "check_tiny_activations_agree").outcome == "passed", eps


def test_a_head_that_starts_as_a_copy_is_not_tied():
    found = verdict(all_bugs()["tied-weights-broken"].subject(seed=0), "check_weights_are_the_familys")
    assert found.outcome == "failed" and "head.weight" in found.says and "embedding.weight" in found.says


def test_an_untied_head_is_advice():
    found = verdict(Subject("untied", reference_parts(tied=False)), "check_weights_are_the_familys")
    assert found.outcome == "passed" and any("not tied" in remark for remark in found.remarks)


def test_weights_that_gpt2_lacks_are_counted():
    found = verdict(all_bugs()["weights-without-a-place"].subject(seed=0), "check_weights_are_the_familys")
    assert found.evidence["of_them_without_a_place"] == 3 * 2 * 60


@pytest.mark.parametrize("seed", range(5))
def test_a_correct_initialization_fits(seed):
    matrices, constants = initialization(fit_to(Subject("transformer", reference_parts(), seed=seed), "gpt2"))
    assert all(one.fits for one in (*matrices, *constants))
    assert {"token embedding", "position table", "attention output"} <= {one.role for one in matrices}


@pytest.mark.parametrize("factor", [0.94, 1.06])
def test_a_deviation_off_by_six_percent_fails(factor):
    def rescale(model: nn.Module) -> None:
        with torch.no_grad():
            for block in model.blocks:
                block.feed_forward.output.weight.mul_(factor)

    found = verdict(Subject("changed", changed(rescale)), "check_initialization_is_the_familys")
    assert found.outcome == "failed" and found.evidence["role"] == "feed-forward output"


def test_an_unscaled_residual_projection_is_named():
    subject = all_bugs()["residual-init-unscaled"].subject(seed=0)
    found = verdict(subject, "check_initialization_is_the_familys")
    assert found.likely == ("residual-init-unscaled",) and found.evidence["role"] == "attention output"


def test_every_dropout_is_seen_with_its_place():
    sites = dropouts(fit_to(CONTROLS["gpt2"](seed=0), "gpt2"))
    assert [(site.part, site.block) for site in sites[:4]] == [
        ("embedded tokens and positions", None), ("attention weights", 0), ("attention output", 0),
        ("feed-forward output", 0),
    ]  # fmt: skip
    assert {site.rate for site in sites} == {0.3} and len(sites) == 1 + 3 * 3


KERNEL = (
    "y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.attn_drop.p if self.training else 0.0)"
)


@pytest.mark.parametrize("fused", [False, True])
def test_the_dropouts_of_heads_in_a_list_count_as_one(fused, tmp_path):
    """Each head drops its own attention weights, by a module or in the kernel."""
    source = source_of("homework")
    if fused:
        source = source.replace("y = weights @ v", KERNEL)
        source = source.replace("weights = self.attn_drop(weights)", "")
    path = tmp_path / "model.py"
    path.write_text(source)
    sites = dropouts(fit_to(subject_of(str(path), seed=0), "gpt2"))
    assert [site.block for site in sites if site.part == "attention weights"] == [0, 1, 2]


@pytest.mark.parametrize(
    "id, what",
    [("dropout-site-missing", "no dropout on the feed-forward's output"), ("dropout-twice", "twice"),
     ("dropout-before-the-softmax", "applied to the attention scores of block 0"),
     ("dropout-on-the-norm", "applied to the norm before attention of block 0"),
     ("dropout-inside-the-feed-forward", "applied to the activation of block 0")],
)  # fmt: skip
def test_a_misplaced_dropout_is_named(id, what):
    found = verdict(all_bugs()[id].subject(seed=0), "check_dropout_sites_are_the_familys")
    assert found.outcome == "failed" and what in found.says and found.likely == (id,)


def test_an_unusual_scale_is_advice_without_a_declaration():
    found = verdict(CONTROLS["scale-by-width-of-head"](seed=0), "check_attention_scale_is_usual", "auto")
    assert found.outcome == "passed" and any("0.3162 times" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    "id, what",
    [("last-position-is-the-first", "position 0"), ("last-position-of-the-last-row", "last row of the batch")],
)
def test_another_position_than_the_last_is_named(id, what):
    found = verdict(all_bugs()[id].subject(seed=0), "check_last_position_agrees")
    assert found.outcome == "failed" and what in found.evidence["these_are"] and found.likely == (id,)
    assert "logits_to_keep=1" in found.evidence["how"]


def test_the_call_without_targets_is_compared_too():
    right = subject_of(str(HERE / "foreign" / "last_position.py"), seed=0)
    found = verdict(right, "check_last_position_agrees")
    assert found.outcome == "passed" and found.evidence["calls"] == ["forward(idx) without targets"]


def test_the_call_without_targets_may_be_wrong_alone(tmp_path):
    text = (HERE / "foreign" / "last_position.py").read_text()
    assert "x[:, [-1]]" in text
    (tmp_path / "model.py").write_text(text.replace("x[:, [-1]]", "x[:, [0]]"))
    wrong = subject_of(str(tmp_path / "model.py"), seed=0)
    assert verdict(wrong, "check_logits_agree").outcome == "passed"
    assert verdict(wrong, "check_last_position_agrees").evidence["these_are"] == "position 0"


def test_the_distribution_that_generate_draws_from_is_compared():
    right = verdict(Subject("transformer", reference_parts(), seed=0), "check_generation_draws_from_the_logits")
    assert right.outcome == "passed" and right.evidence["draws"] == 6 and right.evidence["powers"] == [1.0]
    wrong = verdict(all_bugs()["generation-of-the-last-row"].subject(seed=0), "check_generation_draws_from_the_logits")
    assert wrong.outcome == "failed" and wrong.evidence["row"] == 0 and wrong.where is None


def test_a_fixed_temperature_is_advice():
    parts = reference_parts()
    draw = parts.generate
    parts.generate = lambda model, prompt, max_new_tokens, temperature=1.0: draw(
        model, prompt, max_new_tokens, temperature=temperature * 0.8
    )
    found = verdict(Subject("cooler", parts, seed=0), "check_generation_draws_from_the_logits")
    assert found.outcome == "passed" and any("at temperature 0.8" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    "name, spec, what",
    [("fused_by_head", "gpt2", "holds keys, values, queries head by head"),
     ("split_feature_first", "gpt2", "no biases"), ("llama_fused", "llama", "stored minus one"),
     ("separate_heads", "gpt2", "the head has a bias")],
)  # fmt: skip
def test_what_published_weights_would_not_fit_is_advice(name, spec, what):
    found = verdict(subject_of(str(HERE / "foreign" / f"{name}.py"), seed=0), "check_weights_are_the_familys", spec)
    assert found.outcome == "passed" and any(what in remark for remark in found.remarks), found.remarks


def test_a_query_matrix_named_key_is_advice(tmp_path):
    text = (HERE / "foreign" / "llama_complex.py").read_text().replace("args.n_kv_heads", "args.n_heads")
    assert "(self.wq, self.wk, self.wv)" in text
    (tmp_path / "model.py").write_text(text.replace("(self.wq, self.wk, self.wv)", "(self.wk, self.wq, self.wv)"))
    found = verdict(subject_of(str(tmp_path / "model.py"), seed=0), "check_weights_are_the_familys", "llama")
    assert found.outcome == "passed"
    assert any("wk.weight computes the queries" in remark for remark in found.remarks), found.remarks
