"""The table of a model's weights: printed, read back, partial or complete, and refused with the wrong name."""

from __future__ import annotations

import json

import pytest

from tests.test_family_weights import FOREIGN, STYLES, family, foreign
from transformer_checks.checks.family import fit
from transformer_checks.checks.family.fit import fit_to
from transformer_checks.checks.family.weights.planning import undetermined
from transformer_checks.checks.family.weights.roles import NoPlan
from transformer_checks.checks.family.weights.table import pattern, shown
from transformer_checks.checks.meet.errors import UsageError
from transformer_checks.checks.run.notebook import check_model
from transformer_checks.checks.subject import Spec

pytest_plugins = ("pytester",)


def with_table(name, table, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(table))
    subject = foreign(name, spec=f"{family(name)}:{path}")
    return fit_to(subject, family(name))


@pytest.mark.parametrize("name", STYLES)
def test_what_is_shown_can_be_read_back(name, tmp_path):
    table = shown(fit_to(foreign(name), family(name)).plan)
    again = with_table(name, table, tmp_path)
    assert again.agrees
    assert shown(again.plan) == table


@pytest.mark.parametrize("name", STYLES)
def test_a_complete_table_needs_no_plan_of_ours(name, tmp_path, monkeypatch):
    table = shown(fit_to(foreign(name), family(name)).plan)

    def nothing(inventory, shape):
        raise NoPlan("nothing is found")

    monkeypatch.setattr("transformer_checks.checks.family.weights.table.plans", nothing)
    again = with_table(name, table, tmp_path)
    assert again.agrees, (again.error, again.why_not)
    assert shown(again.plan) == table


def test_the_table_says_which_weight_is_which():
    table = shown(fit_to(foreign("separate_heads"), "gpt2").plan)
    assert table["blocks.*.sa.heads.*.key.weight"] == "blocks.*.attention.key.weight"
    assert table["blocks.*.ffwd.net.2.bias"] == "blocks.*.feed_forward.output.bias"
    assert table["position_embedding_table.weight"] == "positions.table.weight"
    tied = shown(fit_to(foreign("llama_fused"), "llama").plan)
    assert tied["embed.weight"] == "embedding.weight" and tied["unembed.weight"] == "head.weight"
    assert tied["layers.*.gate_up.weight"] == "blocks.*.feed_forward.gate_and_input.weight"


def test_a_partial_table_leaves_the_rest_to_be_found(tmp_path):
    right = with_table("split_feature_first", {"z.*.three.b.weight": "blocks.*.attention.query.weight"}, tmp_path)
    assert right.agrees
    assert right.tried < fit_to(foreign("split_feature_first"), "gpt2").tried


def test_a_wrong_table_does_not_agree(tmp_path):
    wrong = with_table("split_feature_first", {"z.*.three.a.weight": "blocks.*.attention.query.weight"}, tmp_path)
    assert not wrong.agrees


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        ("wte.weight", "embeding.weight", "embedding.weight"),
        ("h.*.attn.c_atn.weight", "blocks.*.attention.qkv.weight", "h.*.attn.c_attn.weight"),
        ("h.0.attn.c_attn.weight", "blocks.0.attention.qkv.weight", "blocks.*.attention.qkv.weight"),
        ("h.0.attn.c_attn.weight", "blocks.*.attention.qkv.weight", "write *"),
        ("h.*.attn.c_proj.weight", "blocks.*.attention.qkv.weight", "no entry for"),
    ],
)
def test_a_wrong_entry_is_named(theirs, ours, said, tmp_path):
    with pytest.raises(UsageError) as error:
        with_table("conv1d_fused", {theirs: ours}, tmp_path)
    assert said in str(error.value)


def test_a_wrong_shape_and_missing_entries_are_named(tmp_path):
    table = shown(fit_to(foreign("conv1d_fused"), "gpt2").plan)
    swapped = dict(table)
    swapped["h.*.c_fc.weight"], swapped["h.*.attn.c_attn.weight"] = (
        table["h.*.attn.c_attn.weight"], table["h.*.c_fc.weight"])  # fmt: skip
    with pytest.raises(UsageError, match=r"rows|cannot be"):
        with_table("conv1d_fused", swapped, tmp_path)
    part = {t: o for t, o in table.items() if "c_fc" not in t and "ln_1" not in t} | {"ln_f.bias": "norm.weight"}
    with pytest.raises(UsageError) as error:
        with_table("conv1d_fused", part, tmp_path)
    assert "blocks.*.feed_forward.input.weight" in str(error.value) and "h.*.c_fc.weight" in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"wte.weight": 3}'])
def test_a_file_without_a_table_is_refused(text, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.json"):
        foreign("conv1d_fused", spec=f"gpt2:{tmp_path / 'bad.json'}")


@pytest.mark.parametrize("spec", ["bert", "auto:x.json", "gpt2:not/there.json"])
def test_an_invalid_declaration_is_refused(spec):
    with pytest.raises(UsageError) as error:
        foreign("conv1d_fused", spec=spec)
    assert spec.rpartition(":")[2] in str(error.value)


def test_weights_that_cannot_be_told_apart_are_named():
    """Three matrices of the same shape, used in another order than q, k, v: only the logits tell them apart."""
    plan = fit_to(foreign("split_feature_first"), "gpt2").plan
    assert undetermined(plan) == [f"z.0.three.{letter}.weight" for letter in "abc"]
    assert undetermined(fit_to(foreign("llama_complex"), "llama").plan) == []


def test_the_finding_names_weights_that_cannot_be_told_apart(monkeypatch):
    real = fit.disagreement
    monkeypatch.setattr(fit, "disagreement", lambda *args: max(real(*args), 0.5))
    report = check_model(str(FOREIGN / "split_feature_first.py"), checks=["check_logits_agree"], spec="gpt2", seed=1)
    evidence = report["check_logits_agree"].evidence
    assert evidence["unsettled"] == [f"z.0.three.{letter}.weight" for letter in "abc"]
    assert evidence["weights"]["x.weight"] == "embedding.weight"


def test_the_command_to_reproduce_has_the_table(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("{}")
    subject = foreign("conv1d_fused", spec=f"gpt2:{path}")
    assert f"--spec gpt2:{path}" in subject.reproduce(test_the_command_to_reproduce_has_the_table)


def test_minus_v_prints_the_table(pytester):
    file = FOREIGN / "conv1d_fused.py"
    result = pytester.runpytest("-v", "--model", file, "--spec", "gpt2", "--seed", "1", "-k", "logits_agree")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(['*"h.[*].attn.c_attn.weight": "blocks.[*].attention.qkv.weight"*'])
    pytester.makefile(".json", weights='{"wte.waight": "embedding.weight"}')
    result = pytester.runpytest("--model", file, "--spec", "gpt2:weights.json", "-k", "logits_agree")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*wte.waight*wte.weight*"])


def test_a_pattern_has_a_star_for_what_differs():
    assert pattern(["h.0.w1", "h.1.w1"]) == "h.*.w1"
    assert pattern(["h.0.head.0.w", "h.0.head.1.w", "h.1.head.0.w", "h.1.head.1.w"]) == "h.*.head.*.w"
    assert Spec().table == {}
