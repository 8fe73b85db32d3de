"""The checks of decoding: what they report for each bug, and how foreign generates are called."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from tests.controls_generation import LIBRARIES, LOOPS, loop_subject
from tests.decoding_verdicts import (
    CHECKS,
    SEED,
    changed,
    findings,
    greedy_only,
    nanogpt,
    verdict,
    verdicts,
    with_generate,
)
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.generation.met_generate import Alphabet, Decoder, read_answer, understand
from transformer_checks.checks.generation.scripted import ranked, stage
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.generation import generate

GREEDY = "check_greedy_equals_the_naive_loop"
FITS = "check_generate_reads_all_that_fits"
PADDED = "check_padded_prompts_continue_as_alone"


# -- what is reported for each bug


@pytest.mark.parametrize(
    ("bug", "check", "facts"),
    [
        ("generate-first-position-logits", GREEDY, ["position 0, expected the last position, 2"]),
        ("generate-reads-earlier-position", GREEDY, ["position 1, expected the last position, 2"]),
        ("same-token-for-whole-batch", GREEDY, ["Every row gets the token of row 0"]),
        ("cache-refeeds-full-context", GREEDY, ["step 2 all 4 tokens were read", "already held 3 of them"]),
        ("generate-crop-off-by-one", FITS, ["after 13 tokens only the last 12", "block size of 13"]),
        ("generate-no-context-crop", FITS, ["after 14 tokens, 1 past", "the first 13 tokens"]),
        ("generate-right-pad-last-logits", PADDED, ["position 4, which is padding", "padded on the left to 5"]),
        ("generate-forgets-padding", PADDED, ["called without a mask"]),
        ("generate-length-off-by-one", "check_generate_appends_tokens", ["asked for 1 new token,", "has 2"]),
        ("continues-after-eos", "check_end_token_ends_its_row", ["produced the end token", "continues with"]),
        ("stops-when-any-row-eos", "check_end_token_ends_its_row", ["row 1 stops after 2 of 6 tokens"]),
        ("generate-keeps-its-cache", GREEDY, ["prompts of 4 tokens goes wrong", "from the first call"]),
        ("argmax-over-another-axis", GREEDY, ["model's logits are right", "not the likeliest"]),
        ("generate-leaves-eval-mode", "check_generate_restores_the_mode", ["in train mode", "are in eval mode after"]),
        ("generate-without-eval", "check_generate_restores_the_mode", ["decodes in train mode"]),
        ("generate-keeps-graph", "check_generate_keeps_no_graph", ["at step 6", "graphs of 6 steps are alive"]),
        ("generate-mutates-prompt", "check_generate_leaves_prompt_and_weights", ["the prompt was", "after the call"]),
        ("generate-reseeds-global-state", "check_generate_leaves_random_states", ["PyTorch", "seeded inside"]),
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


OURS = [bug for bug in all_bugs().values() if bug.component in ("decoding", "sampling")]


@pytest.mark.parametrize("bug", OURS, ids=lambda bug: bug.id)
def test_one_bug_gives_one_finding(bug):
    assert len(findings(bug.subject(seed=SEED))) == 1


@pytest.mark.parametrize("config", [{}, dict(positions="rotary", tied=False, norm="rms")], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reference_passes(config, seed):
    found = verdicts(Subject("transformer", reference_parts(**config), seed=seed))
    reasons = ("no parameter for", "no function that generates beside generate")
    lacks = {n for n, v in found.items() if v.outcome == "not_applicable" and any(r in v.says for r in reasons)}
    assert lacks == {check.__name__ for check in checks_in("decoding")}  # neither beams, a penalty nor another function
    assert {name: v.says for name, v in found.items() if v.outcome != "passed" and name not in lacks} == {}


# -- the forms of foreign generates


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


def test_a_generate_that_calls_the_models_parts_is_judged_without_their_tokens(tmp_path):
    """Its head is given vectors, so the script cannot know the token just read; a wrong position is still found."""
    text = (Path(__file__).parent / "conventions" / "blocks_of_dataclasses.py").read_text()
    latest = "(self.head(x)[:, -1] / temperature)"
    assert latest in text
    for name, source, outcome in (
        ("right", text, "passed"),
        ("wrong", text.replace(latest, "(self.head(x)[:, -2] / temperature)"), "failed"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        found = judge(CHECKS[GREEDY], subject_of(str(tmp_path / f"{name}.py"), seed=SEED), {})
        assert found.outcome == outcome, found.says
        assert outcome == "passed" or "position 1, expected the last position, 2" in found.says


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


def test_logits_with_an_entry_for_padding_are_told(tmp_path):
    source = (Path(__file__).parent / "conventions" / "padding_id.py").read_text()
    (tmp_path / "model.py").write_text(source + GENERATES)
    found = judge(CHECKS["check_generate_appends_tokens"], subject_of(str(tmp_path / "model.py"), seed=SEED), {})
    assert found.outcome == "not_applicable" and "18 entries, one of them for padding" in found.says


GENERATES = """

def generate(model, idx, max_new_tokens):
    import torch
    for _ in range(max_new_tokens):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx
"""


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


def library_like(refusing: str, promised: bool):
    """A generate of the library's signature that refuses one argument, and perhaps names it in its signature."""

    def generate(model, inputs=None, generation_config=None, *, max_new_tokens=20, do_sample=True, temperature=1.0,
                 top_k=None, **model_kwargs):  # fmt: skip
        if refusing in model_kwargs:
            raise ValueError(f"The following arguments are not used by the model: ['{refusing}']")
        return torch.no_grad()(nanogpt)(model, inputs, max_new_tokens, temperature, top_k or None)

    if promised:
        mask = inspect.Parameter(refusing, inspect.Parameter.KEYWORD_ONLY, default=None)
        named = inspect.signature(generate)
        *before, rest = named.parameters.values()
        generate.__signature__ = named.replace(parameters=[*before, mask, rest])
    return generate


@pytest.mark.parametrize(("promised", "outcome"), [(False, "passed"), (True, "error")])
def test_an_argument_of_our_own_choice_is_left_out_where_generate_refuses_it(promised, outcome):
    """One that its signature names is promised: to refuse that is a fault."""
    subject = with_generate(library_like("attention_mask", promised), seed=SEED)
    found = verdicts(subject)["check_generate_appends_tokens"]
    assert found.outcome == outcome, found.says
    if promised:
        assert "attention_mask" in found.says
    else:
        assert "mask" not in stage(subject).decoder.takes
        assert "refuses attention_mask, which its signature does not name" in found.remarks[0]
        assert verdicts(subject)[GREEDY].outcome == "passed"


def test_a_refusal_that_leaving_it_out_does_not_cure_stays_a_fault():
    def generate(model, inputs=None, generation_config=None, **kwargs):
        raise ValueError("attention_mask: none is made here, and none is taken")

    assert "error: ValueError: attention_mask" in findings(with_generate(generate))["check_generate_appends_tokens"]


def test_a_generate_may_look_up_what_the_forward_takes():
    """While the model's modules are watched, their forwards keep their signatures."""

    def looks_it_up(model, prompt, max_new_tokens):
        if "mask" not in inspect.signature(model.forward).parameters:
            raise ValueError("the model takes no mask")
        return torch.no_grad()(nanogpt)(model, prompt, max_new_tokens)

    assert findings(with_generate(looks_it_up)) == {}


def test_a_generate_that_crashes_is_one_error():
    def broken(model, prompt, max_new_tokens):
        raise RuntimeError("boom")

    found = findings(with_generate(broken))
    assert list(found) == ["check_generate_appends_tokens"] and "boom" in found["check_generate_appends_tokens"]


def test_eval_mode_left_to_the_caller_is_advice():
    found = verdicts(with_generate(nanogpt))
    assert "call model.eval()" in found["check_generate_restores_the_mode"].remarks[0]


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


def test_the_reference_has_its_own_generate():
    assert reference_parts().generate is generate
    assert isinstance(stage(Subject("transformer", reference_parts())).decoder, Decoder)
