"""The checks of decoding and sampling: what they report for each bug, and how foreign generates are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.controls_generation import LIBRARIES, LOOPS, loop_subject
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.generation.draws import scores, unlikely
from transformer_checks.checks.generation.met_generate import Alphabet, Decoder, read_answer, understand
from transformer_checks.checks.generation.scripted import dealt, ranked, stage
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.generation import generate

CHECKS = {check.__name__: check for theme in ("generation", "sampling") for check in checks_in(theme)}
SEED = 3
GREEDY = "check_greedy_equals_the_naive_loop"
FITS = "check_generate_reads_all_that_fits"
PADDED = "check_padded_prompts_continue_as_alone"


def verdict(bug: str, check: str) -> Verdict:
    found = judge(CHECKS[check], all_bugs()[bug].subject(seed=SEED), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    return found


def verdicts(subject: Subject) -> dict[str, Verdict]:
    earlier: dict[str, Verdict] = {}
    for check in CHECKS.values():
        earlier[check_id(check)] = judge(check, subject, earlier)
    return {name.partition(".")[2]: found for name, found in earlier.items()}


def findings(subject: Subject) -> dict[str, str]:
    return {
        name: f"{found.outcome}: {found.says}"
        for name, found in verdicts(subject).items()
        if found.outcome not in ("passed", "not_applicable", "blocked")
    }


def with_generate(function, **declared) -> Subject:
    parts = reference_parts()
    parts.generate = function
    return Subject("own generate", parts, **declared)


# -- what is reported for each bug


@pytest.mark.parametrize(
    ("bug", "check", "facts"),
    [
        ("generate-first-position-logits", GREEDY, ["position 0 of 3, not at the last, 2"]),
        ("generate-reads-earlier-position", GREEDY, ["position 1 of 3, not at the last, 2"]),
        ("same-token-for-whole-batch", GREEDY, ["Every row gets the token of row 0"]),
        ("cache-refeeds-full-context", GREEDY, ["step 2 all 4 tokens were read", "already held 3 of them"]),
        ("generate-crop-off-by-one", FITS, ["after 13 tokens only the last 12", "block size of 13"]),
        ("generate-no-context-crop", FITS, ["after 14 tokens, 1 past", "the first 13 tokens"]),
        ("generate-right-pad-last-logits", PADDED, ["position 4, which is padding", "padded on the left to 5"]),
        ("generate-forgets-padding", PADDED, ["called without a mask"]),
        ("generate-length-off-by-one", "check_generate_appends_tokens", ["asked for 1 new tokens", "has 2"]),
        ("continues-after-eos", "check_end_token_ends_its_row", ["produced the end token", "continues with"]),
        ("stops-when-any-row-eos", "check_end_token_ends_its_row", ["row 1 stops after 2 of 6 tokens"]),
        ("temperature-multiplied", "check_temperature_divides_the_logits", ["multiplied by 0.5, not by 2"]),
        ("temperature-ignored", "check_temperature_divides_the_logits", ["multiplied by 1, not by 2"]),
        ("temperature-zero-division", "check_temperature_zero_is_greedy", ["likeliest token is always"]),
        ("topk-off-by-one-more", "check_top_k_keeps_k", ["top_k=3 keeps 4 tokens, should keep 3"]),
        ("topk-strict-inequality", "check_top_k_keeps_k", ["top_k=3 keeps 2 tokens, should keep 3"]),
        ("topp-drops-crossing-token", "check_top_p_keeps_the_nucleus", ["keeps 7 tokens, should keep 8"]),
        ("topp-mask-not-unsorted", "check_top_p_keeps_the_nucleus", ["keeps 8 tokens, but not the likeliest"]),
        ("topp-threshold-inverted", "check_top_p_keeps_the_nucleus", ["keeps 4 tokens, should keep 8"]),
        ("generate-keeps-its-cache", GREEDY, ["prompts of 4 tokens goes wrong", "from the first call"]),
        ("argmax-over-another-axis", GREEDY, ["model's logits are right", "not the likeliest"]),
        ("multinomial-of-other-weights", "check_temperature_divides_the_logits", ["the sigmoid of the logits"]),
        ("sampling-is-greedy", "check_temperature_divides_the_logits", ["the same token in", "it is greedy"]),
        ("topk-skips-topp", "check_filters_work_together", ["top_p is ignored when both are given"]),
        ("topk-answers-a-place", "check_filters_work_together", ["drew the token of probability", "returns 0"]),
        ("generate-leaves-eval-mode", "check_generate_restores_the_mode", ["in train mode", "are in eval mode after"]),
        ("generate-without-eval", "check_generate_restores_the_mode", ["decodes in train mode"]),
        ("generate-keeps-graph", "check_generate_keeps_no_graph", ["at step 6", "graphs of 6 steps are alive"]),
        ("generate-mutates-prompt", "check_generate_leaves_prompt_and_weights", ["the prompt was", "after the call"]),
        ("generate-reseeds-global-state", "check_generate_leaves_random_states", ["PyTorch", "seeded inside"]),
        ("seed-fixed-inside-generate", "check_samples_differ_unless_seeded", ["without a seed are the same"]),
        ("generator-ignored", "check_samples_differ_unless_seeded", ["the same generator gives"]),
    ],
)  # fmt: skip
def test_a_message_has_the_facts_and_the_bug_is_the_likeliest(bug, check, facts):
    found = verdict(bug, check)
    for fact in facts:
        assert fact in found.says, found.says
    assert found.likely[0] == bug


def test_a_wrong_token_is_reported_with_its_row_its_step_and_the_right_token():
    found = verdict("generate-first-position-logits", GREEDY)
    row, step = found.evidence["row"], found.evidence["step"]
    assert found.evidence["said"][step] != found.evidence["naive"][step] and step == 0
    assert f"row {row} gives {found.evidence['said']}" in found.says


def test_a_dropped_token_is_shown_by_the_tokens_that_were_read():
    found = verdict("generate-drops-latest-token", GREEDY)
    read, text = (
        eval(part) for part in re.search(r"it read (\[.*?\]), but the text is (\[.*?\])", found.says).groups()
    )
    assert text[:-1] == read


def test_the_threshold_of_another_row_keeps_different_numbers_by_row():
    found = verdict("topk-threshold-of-another-row", "check_top_k_keeps_k")
    assert len(set(found.evidence["kept_by_row"])) > 1 and found.likely == ("topk-threshold-of-another-row",)


OURS = [bug for bug in all_bugs().values() if bug.component in ("decoding", "sampling")]


@pytest.mark.parametrize("bug", OURS, ids=lambda bug: bug.id)
def test_one_bug_gives_one_finding(bug):
    assert len(findings(bug.subject(seed=SEED))) == 1


@pytest.mark.parametrize("config", [{}, dict(positions="rotary", tied=False, norm="rms")], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reference_passes(config, seed):
    found = verdicts(Subject("transformer", reference_parts(**config), seed=seed))
    assert {name: (v.outcome, v.says) for name, v in found.items() if v.outcome != "passed"} == {}


# -- the forms of foreign generates


def nanogpt(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """Crops, divides, filters, draws: the loop of most tutorials."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1, :] / temperature
        if top_k is not None:
            values, _ = torch.topk(logits, min(top_k, logits.size(-1)))
            logits[logits < values[:, [-1]]] = -float("inf")
        idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
    return idx


def continuation_only(model, prompt, steps):
    return torch.no_grad()(nanogpt)(model, prompt, steps)[:, prompt.shape[1] :]


def one_row_list(model, tokens: list[int], max_tokens):
    return torch.no_grad()(nanogpt)(model, torch.tensor([tokens]), max_tokens)[0].tolist()


def stream(model, ids: list[int], max_tokens):
    yield from one_row_list(model, ids, max_tokens)[len(ids) :]


def of_text(model, tokenizer, prompt: str, max_new_tokens):
    return tokenizer.decode(one_row_list(model, tokenizer.encode(prompt), max_new_tokens))


def flat(model, x, n):
    return torch.no_grad()(nanogpt)(model, x[None], n)[0] if x.dim() == 1 else _refuse()


def _refuse():
    raise ValueError("one row of ids, please")


def total_length(model, input_ids, max_length):
    return torch.no_grad()(nanogpt)(model, input_ids, max_length - input_ids.shape[1])


@torch.no_grad()
def greedy_only(model, idx, max_new_tokens, context_size):
    for _ in range(max_new_tokens):
        idx = torch.cat((idx, model(idx[:, -context_size:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize(
    ("function", "form", "batched", "with_prompt"),
    [
        (nanogpt, "rows", True, True),
        (continuation_only, "rows", True, False),
        (one_row_list, "list", False, True),
        (stream, "list", False, False),
        (of_text, "text", False, True),
        (flat, "row", False, True),
        (total_length, "rows", True, True),
        (greedy_only, "rows", True, True),
    ],
)
def test_a_foreign_generate_is_understood_and_passes(function, form, batched, with_prompt):
    subject = with_generate(function, seed=1)
    decoder = stage(subject).decoder
    assert (decoder.form, decoder.batched, decoder.with_prompt) == (form, batched, with_prompt)
    assert findings(subject) == {}


def changed(line: str, by: str):
    """nanoGPT's loop with one line of it changed."""
    import inspect

    source = inspect.getsource(nanogpt)
    assert line in source
    scope = {"torch": torch, "F": F}
    exec(source.replace(line, by), scope)
    return torch.no_grad()(scope["nanogpt"])


@pytest.mark.parametrize(
    ("function", "check", "facts"),
    [
        (changed("idx = torch.cat((idx, torch", "idx = torch.cat((idx.flip(0), torch"),
         "check_generate_appends_tokens", ["does not begin with the prompt"]),
        (changed("logits = model(idx[:, -model.config.block_size :])[:, -1, :]",
                 "logits = model(idx[:, -model.config.block_size :])[:, -1, :].flip(0)"),
         GREEDY, ["The rows are in another order", "row 0 gets the token of row 16"]),
        (changed("logits = model(idx[:, -model.config.block_size :])[:, -1, :]",
                 "logits = model(idx[:, -model.config.block_size :])[-1:, -1, :].repeat(len(idx), 1)"),
         GREEDY, ["Every row gets the token of row 16"]),
        (changed('-float("inf")', "0.0"), "check_top_k_keeps_k",
         ["keeps all 17 tokens", "to -∞, not to 0"]),
        (changed("if top_k is not None", "if top_k is not None and idx.shape[1] > 2"), "check_top_k_keeps_k",
         ["keeps all 17 tokens, should keep 3", "not applied to the first new token"]),
        (changed("values[:, [-1]]]", "values[:1, [-1]]]"), "check_top_k_keeps_k", ["should keep 3", "row"]),
        (changed("F.softmax(logits, dim=-1)", "F.softmax(logits, dim=0)"), "check_temperature_divides_the_logits",
         ["a softmax over rows"]),
        (changed("F.softmax(logits, dim=-1)", "F.softmax(logits, dim=-1).clamp(min=1e-3)"),
         "check_temperature_divides_the_logits", ["rank 17", "after the softmax"]),
        (changed("range(max_new_tokens)", "range(max_new_tokens + (idx.shape[1] == 1))"), GREEDY,
         ["is", "should be nothing"]),
    ],
)  # fmt: skip
def test_a_bug_in_a_foreign_loop_is_named(function, check, facts):
    found = judge(CHECKS[check], with_generate(function, seed=SEED), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    for fact in facts:
        assert fact in found.says, found.says


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LOOPS)
def test_correct_loops_pass(name, seed):
    """Top-k, nucleus, a cache, left padding, generators, buffers, a banned token: as tutorials and users write them."""
    assert findings(loop_subject(name, seed=seed)) == {}


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_loops_of_libraries_pass(name):
    """With their own caches: returned as past_key_values, cropped past the block size."""
    subject = LIBRARIES[name](seed=1)
    earlier: dict[str, Verdict] = {}
    for theme in ("cache", "generation", "sampling"):
        for check in checks_in(theme):
            earlier[check_id(check)] = judge(check, subject, earlier)
    assert not {n: v.says for n, v in earlier.items() if v.outcome in ("failed", "error")}
    cached = earlier["check_cache.check_cached_pieces_equal_full"].outcome
    assert cached == ("not_applicable" if name.startswith("x-") else "passed")


def test_a_banned_token_and_a_prompt_with_an_end_token_get_advice():
    def stops_at_once(model, prompt, max_new_tokens, eos_id=None):
        if eos_id is not None and bool((prompt == eos_id).any()):
            return torch.cat((prompt, prompt.new_full((len(prompt), max_new_tokens), eos_id)), 1)
        return LOOPS["with_context_size"](model, prompt, max_new_tokens, 13)

    banned = verdicts(loop_subject("bans_a_token"))["check_generate_appends_tokens"]
    assert banned.outcome == "passed" and "never generates token id 0" in banned.remarks[0]
    on = stage(with_generate(stops_at_once))
    assert on.banned == ()
    from transformer_checks.checks.check_generation import advise_of_prompts_with_an_end
    from transformer_checks.checks.expect import remarks

    with remarks() as said:
        advise_of_prompts_with_an_end(on)
    assert "does not continue a prompt that contains the end token" in said.advice[0]


def test_a_call_that_ends_early_must_restore_the_mode_too():
    """A return inside the loop skips the lines after it."""

    @torch.no_grad()
    def returns_early(model, prompt, max_new_tokens, eos_id=None):
        mode = model.training
        model.eval()
        for _ in range(max_new_tokens):
            following = model(prompt[:, -model.config.block_size :])[:, -1].argmax(-1, keepdim=True)
            prompt = torch.cat((prompt, following), 1)
            if bool((following == (-1 if eos_id is None else eos_id)).all()):
                return prompt
        model.train(mode)
        return prompt

    found = judge(CHECKS["check_generate_restores_the_mode"], with_generate(returns_early), {})
    assert found.outcome == "failed" and "stopped early" in found.says


def test_a_greedy_generate_is_not_judged_as_a_sampler():
    found = verdicts(with_generate(greedy_only))
    assert found[GREEDY].outcome == "passed"
    assert found["check_temperature_divides_the_logits"].outcome == "not_applicable"
    assert found["check_samples_differ_unless_seeded"].outcome == "not_applicable"


def of_the_likeliest(least: int):
    """A sampler that keeps a fixed number of tokens, or one more than exist."""

    def generate(model, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits = model(idx[:, -13:])[:, -1]
            kept, ids = logits.softmax(-1).topk(least or logits.shape[-1] + 1, dim=-1)
            idx = torch.cat((idx, ids.gather(1, torch.multinomial(kept, 1))), dim=1)
        return idx

    return generate


def test_a_sampler_that_keeps_fifty_tokens_gets_a_larger_vocabulary():
    subject = with_generate(of_the_likeliest(50))
    assert not findings(subject) and stage(subject).vocab_size > 50
    assert verdicts(subject)[GREEDY].outcome == "passed"
    assert "error" in findings(with_generate(of_the_likeliest(0)))["check_generate_appends_tokens"]


def test_without_a_generate_or_with_an_unknown_signature_it_is_not_applicable():
    for function, words in ((None, "no generate"), (lambda a, b, c, d, e: a, "max_new_tokens")):
        found = judge(CHECKS["check_generate_appends_tokens"], with_generate(function), {})
        assert found.outcome == "not_applicable" and words in found.says


def test_a_placeholder_tokenizer_is_not_the_models_fault():
    """The constructor takes a tokenizer, of which we know only sizes; generate asks that tokenizer for ids."""
    subject = subject_of(str(Path(__file__).parent / "conventions" / "tokenizer_argument.py"), seed=SEED)
    found = judge(CHECKS["check_generate_appends_tokens"], subject, {})
    assert found.outcome == "not_applicable", found.says
    assert "own tokenizer" in found.says and "'encode'" in found.says


def test_a_generate_that_crashes_is_one_error():
    def broken(model, prompt, max_new_tokens):
        raise RuntimeError("boom")

    found = findings(with_generate(broken))
    assert list(found) == ["check_generate_appends_tokens"] and "boom" in found["check_generate_appends_tokens"]


def test_eval_mode_left_to_the_caller_and_temperature_zero_refused_are_advice():
    found = verdicts(with_generate(nanogpt))
    assert "call model.eval()" in found["check_generate_restores_the_mode"].remarks[0]
    assert "temperature 0 raises" in found["check_temperature_zero_is_greedy"].remarks[0]


def gumbel(model, prompt, max_new_tokens, temperature=1.0, top_k=None, wrong=False):
    """A sampler that does not call torch.multinomial: argmax of logits plus Gumbel noise."""
    for _ in range(max_new_tokens):
        logits = model(prompt[:, -model.config.block_size :])[:, -1] * (temperature if wrong else 1 / temperature)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(min(top_k + wrong, 17)).values[:, -1:], -torch.inf)
        noise = -(-torch.rand_like(logits).clamp(min=1e-12).log()).log()
        prompt = torch.cat((prompt, (logits + noise).argmax(-1, keepdim=True)), dim=1)
    return prompt


@pytest.mark.parametrize("seed", range(4))
def test_a_sampler_without_multinomial_is_judged_by_its_counts(seed):
    assert findings(with_generate(torch.no_grad()(gumbel), seed=seed)) == {}

    def wrong(model, prompt, max_new_tokens, temperature=1.0, top_k=None):
        return torch.no_grad()(gumbel)(model, prompt, max_new_tokens, temperature, top_k, wrong=True)

    subject = with_generate(wrong, seed=seed)
    for check in ("check_temperature_divides_the_logits", "check_top_k_keeps_k"):
        found = judge(CHECKS[check], subject, {})
        assert found.outcome == "failed" and "χ²" in found.says, found.says


# -- the parts


def test_parameters_are_recognized_by_name_and_by_position():
    takes, defaults = understand("f", lambda a, b, c, topk=5: None)
    assert takes == {"model": "a", "prompt": "b", "count": "c", "top_k": "topk"} and defaults == {"top_k": 5}


def test_output_is_read_in_every_form():
    ids = [[1, 2], [3, 4]]
    assert read_answer(torch.tensor(ids)) == ids == read_answer(ids) == read_answer({"sequences": torch.tensor(ids)})
    assert read_answer((torch.tensor(ids), "more")) == ids
    assert read_answer([torch.tensor([[1], [3]]), torch.tensor([[2], [4]])]) == ids
    assert read_answer(Alphabet().decode([7, 8])) == [[7, 8]]
    with pytest.raises(ValueError, match="not understood"):
        read_answer(torch.zeros(2, 2))


def test_the_script_never_repeats_a_token_and_keeps_the_order_of_the_others():
    logits, tokens = torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[0]])
    assert ranked(logits, tokens).argsort(dim=-1, descending=True).tolist() == [[[1, 2, 0]]]
    assert float(ranked(logits, tokens).exp().max()) > 1 - 1e-12


def test_every_row_gets_its_own_probabilities():
    given = scores(17, 3, seed=0)
    assert torch.allclose(given.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    logits = dealt(given)(torch.zeros(3, 5, 17, dtype=torch.float64), None)
    assert torch.equal(logits[:, 4], given) and len({float(row.max()) for row in given}) == 3


def test_chi_square_accepts_correct_draws_and_rejects_impossible_ones():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    rare = sum(
        unlikely(torch.multinomial(p, 768, True, generator=torch.Generator().manual_seed(i)).bincount(minlength=4), p)
        < 0.05
        for i in range(400)
    )
    assert 5 <= rare <= 40  # 20 expected
    assert unlikely(torch.tensor([500, 300, 199, 1]), p) == 0.0
    assert unlikely(torch.tensor([500, 200, 300, 0]), p) < 1e-6


def test_the_reference_has_its_own_generate():
    assert reference_parts().generate is generate
    assert isinstance(stage(Subject("transformer", reference_parts())).decoder, Decoder)
