"""Penalties and beam search: what is reported for each bug, and right loops of other forms that must pass."""

from __future__ import annotations

import pytest
import torch

from power.foreign import source_of
from tests.decoding_verdicts import SEED, findings, verdict, verdicts, with_generate
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.search import penalizing, searching
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.subject import Subject

PENALTY = "check_a_penalty_makes_no_used_token_likelier"
BEAMS = "check_beam_search_finds_the_likeliest"
LENGTH = "check_beam_length_is_that_of_the_new_tokens"


@pytest.mark.parametrize(
    ("bug", "check", "facts"),
    [
        ("penalty-divides-negative-logits", PENALTY, ["repetition_penalty=4", "logit -40", "logits are negative"]),
        ("penalty-ignored", PENALTY, ["the penalty has no effect"]),
        ("beams-keep-old-caches", BEAMS, ["of log-probability", "must follow the beams"]),
        ("beams-all-alike", BEAMS, ["what greedy decoding gives"]),
        ("beam-length-counts-prompt", LENGTH, ["a prompt of 2 tokens", "repeated to 8", "counts the prompt"]),
    ],
)
def test_a_message_has_the_facts_and_the_bug_is_the_likeliest(bug, check, facts):
    found = verdict(bug, check)
    for fact in facts:
        assert fact in found.says, found.says
    assert found.likely[0] == bug


@pytest.mark.parametrize("bug", [bug for bug in all_bugs().values() if bug.component == "search"], ids=lambda b: b.id)
def test_one_bug_gives_one_finding(bug):
    assert len(findings(bug.subject(seed=SEED))) == 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("parts", [penalizing, searching], ids=["penalty", "beams"])
def test_right_loops_pass(parts, seed):
    found = verdicts(Subject("right", parts(), seed=seed))
    assert {name: v.says for name, v in found.items() if v.outcome in ("failed", "error", "blocked")} == {}
    assert any(found[name].outcome == "passed" for name in (PENALTY, BEAMS))


def choose(logits, do_sample):
    odds = logits.softmax(-1)
    return torch.multinomial(odds, 1) if do_sample else odds.argmax(-1, keepdim=True)


@torch.no_grad()
def subtracts(model, idx, max_new_tokens, do_sample=False, presence_penalty=0.0):
    """A constant is subtracted from what occurs in the text."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1]
        logits = logits - presence_penalty * torch.zeros_like(logits).scatter(1, idx, 1.0)
        idx = torch.cat((idx, choose(logits, do_sample)), dim=1)
    return idx


@torch.no_grad()
def adds(model, idx, max_new_tokens, do_sample=False, presence_penalty=0.0):
    return subtracts(model, idx, max_new_tokens, do_sample, -presence_penalty)


@torch.no_grad()
def divides_probabilities(model, idx, max_new_tokens, do_sample=False, repetition_penalty=1.0):
    """Probabilities have one sign."""
    for _ in range(max_new_tokens):
        odds = model(idx[:, -model.config.block_size :])[:, -1].softmax(-1)
        odds = odds.scatter(1, idx, odds.gather(1, idx) / repetition_penalty)
        idx = torch.cat((idx, choose(odds.log(), do_sample)), dim=1)
    return idx


@torch.no_grad()
def penalizes_new_tokens_only(model, idx, max_new_tokens, do_sample=False, repetition_penalty=1.0):
    T = idx.shape[1]
    for _ in range(max_new_tokens):
        logits, new = model(idx[:, -model.config.block_size :])[:, -1], idx[:, T:]
        used = logits.gather(1, new)
        used = torch.where(used > 0, used / repetition_penalty, used * repetition_penalty)
        idx = torch.cat((idx, choose(logits.scatter(1, new, used), do_sample)), dim=1)
    return idx


@pytest.mark.parametrize("function", [subtracts, divides_probabilities, penalizes_new_tokens_only])
def test_penalties_of_other_forms_pass(function):
    found = verdicts(with_generate(function, seed=SEED))
    assert found[PENALTY].outcome == "passed", found[PENALTY].says


def test_a_penalty_that_is_added_is_found():
    found = verdicts(with_generate(adds, seed=SEED))[PENALTY]
    assert found.outcome == "failed" and "presence_penalty=60" in found.says


def test_a_penalty_with_a_range_of_its_own_is_not_judged():
    def refusing(model, idx, max_new_tokens, repetition_penalty=1.0):
        if repetition_penalty > 2:
            raise ValueError("the repetition penalty must be at most 2")
        return subtracts(model, idx, max_new_tokens, True)

    found = verdicts(with_generate(refusing, seed=SEED))[PENALTY]
    assert found.outcome == "not_applicable" and "at most 2" in found.says


def test_a_beam_search_that_stops_at_a_likely_end_is_no_row_that_stops_for_another():
    found = verdicts(Subject("beams", searching(), seed=SEED))
    assert found["check_end_token_ends_its_row"].outcome == "passed"
    assert found[LENGTH].evidence["new_tokens"][0] == found[LENGTH].evidence["new_tokens"][1]


# -- further functions that generate, in a file that has a generate or none

MORE = """

@torch.no_grad()
def sample(model, idx, max_new_tokens, temperature=1.0):
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size :])
        probs = (logits[:, -1] / temperature).softmax(-1)
        idx = torch.cat((idx, torch.multinomial(probs, 1)), 1)
    model.train(was_training)
    return idx


def greedy_decode(model, prompt_ids, max_tokens):
    ids = prompt_ids
    for _ in range(max_tokens):
        ids = torch.cat((ids, model(ids[:, -model.config.block_size :])[0][:, -1].argmax(-1, keepdim=True)), 1)
    return ids[:, prompt_ids.shape[1] :]


def sample_top_p(probs, p):
    return probs


def beam_encoded(model, text, alphabet):
    return text
"""
BEAMS_OF_THE_MODEL = """
    @torch.no_grad()
    def beam_generate(self, idx, max_new_tokens, beam_width=3):
        found = []
        for prompt in idx:
            beams = [(0.0, prompt)]
            for _ in range(max_new_tokens):
                grown = []
                for score, ids in beams:
                    log_p = self(ids[None, -self.config.block_size :])[0][0, -1].log_softmax(-1)
                    top = log_p.topk(min(beam_width, len(log_p)))
                    grown += [(score + float(v), torch.cat((ids, t[None]))) for v, t in zip(top.values, top.indices)]
                beams = sorted(grown, key=lambda beam: -beam[0])[:beam_width]
            found.append(beams[0][1])
        return torch.stack(found)
"""
FORM = source_of("nanogpt")
METHOD = FORM.replace(
    "    @torch.no_grad()\n    def generate(", f"{BEAMS_OF_THE_MODEL}\n    @torch.no_grad()\n    def generate("
)


def of_file(folder, text, old="", new=""):
    assert old in text
    (folder / "model.py").write_text(text.replace(old, new) if old else text)
    return subject_of(str(folder / "model.py"), seed=SEED)


FURTHER = "check_further_functions_follow_the_model"


@pytest.mark.parametrize("text", [FORM + MORE, METHOD], ids=["functions", "method"])
def test_right_further_functions_pass(tmp_path, text):
    subject = of_file(tmp_path, text)
    found = verdicts(subject)
    assert {name: v.says for name, v in found.items() if v.outcome in ("failed", "error", "blocked")} == {}
    assert found[FURTHER].outcome == "passed"
    assert (found[BEAMS].outcome == "passed") == (text is METHOD)
    names = "GPT.beam_generate (generation)" if text is METHOD else "sample (generation), greedy_decode (generation)"
    assert names in subject.header and "sample_top_p (generation)" not in subject.header
    left = [
        remark for remark in found[FURTHER].remarks if "beam_encoded was found in your file but not checked" in remark
    ]
    assert bool(left) == (text is not METHOD)


@pytest.mark.parametrize(
    ("text", "old", "new", "check", "facts"),
    [
        (FORM + MORE, "logits[:, -1] / temperature).soft", "logits[:, 0] / temperature).soft", FURTHER,
         ["sample: greedy decoding", "position 0"]),
        (FORM + MORE, "range(max_tokens)", "range(max_tokens - 1)", FURTHER, ["greedy_decode: asked for 4", "has 3"]),
        (METHOD, "(score + float(v),", "(float(v),", BEAMS, ["GPT.beam_generate: with 3 beams"]),
        (METHOD, "topk(min(beam_width, len(log_p)))", "topk(1)", BEAMS, ["what greedy decoding gives"]),
    ],
)  # fmt: skip
def test_a_wrong_further_function_is_named_with_its_line(tmp_path, text, old, new, check, facts):
    found = verdicts(of_file(tmp_path, text, old, new))
    wrong = [name for name, v in found.items() if v.outcome in ("failed", "error")]
    assert wrong == [check]
    assert not [fact for fact in facts if fact not in found[check].says], found[check].says
    where = found[check].where
    assert where is not None and f"def {where.module.rpartition('.')[2]}(" in "".join(
        (tmp_path / "model.py").read_text().splitlines()[where.line - 1 : where.line + 1]
    )


def test_the_only_function_that_generates_is_used_as_generate(tmp_path):
    text = FORM.replace("def generate(self", "def _continue(self") + MORE.partition("def greedy_decode")[0]
    subject = of_file(tmp_path, text.replace("def sample(", "def sample_text("))
    assert "sample_text is used as generate" in subject.header and "(generation)" not in subject.header
    assert verdicts(subject)["check_greedy_equals_the_naive_loop"].outcome == "passed"
