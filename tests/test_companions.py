"""What files have beside a model, in forms that users write: named in the header by its kind, judged by its laws."""

from __future__ import annotations

import textwrap

import pytest

from transformer_checks.checks.meet.companions import KINDS
from transformer_checks.checks.meet.foreign import foreign
from transformer_checks.checks.run.order import CHECKS as CHECKED
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import judge

CHECKS = {check_id(check).partition(".")[2]: check for t in ("evaluation", "preference") for check in checks_in(t)}
ALONE, UNIFORM, ALIKE, NEXT = (
    "check_a_function_that_evaluates_leaves_the_model_alone",
    "check_perplexity_of_uniform_logits_is_the_vocabulary",
    "check_every_token_of_a_text_weighs_alike",
    "check_an_evaluation_predicts_the_next_token",
)
MASKS, PREFERS, LN_2, ZERO = (
    "check_a_loss_learns_from_the_tokens_of_its_mask",
    "check_a_preference_loss_prefers_the_chosen_answer",
    "check_a_preference_loss_is_ln_2_at_its_reference",
    "check_a_distillation_loss_is_zero_at_its_teacher",
)
MODEL = """
import math
import torch
from torch import nn
from torch.nn import functional as F


class GPT(nn.Module):
    def __init__(self, vocab_size=17, block_size=13, n_embd=32):
        super().__init__()
        self.block_size = block_size
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.mix, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx{targets}):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        x = x + self.mix(x).cumsum(1) / torch.arange(1, idx.size(1) + 1)[:, None]
        logits = self.head(x)
        {returns}
"""
PLAIN = MODEL.format(targets="", returns="return logits")
WITH_LOSS = MODEL.format(
    targets=", targets=None",
    returns="return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
)


def subject_of(tmp_path, code: str, model: str = PLAIN):
    file = tmp_path / "model.py"
    file.write_text(model + textwrap.dedent(code))
    return foreign(str(file))


def verdict(tmp_path, check: str, code: str, model: str = PLAIN):
    return judge(CHECKS[check], subject_of(tmp_path, code, model), {})


EVALUATIONS = {
    "the loss of the model, over batches": (WITH_LOSS, """
        @torch.no_grad()
        def evaluate(net, val_loader, device):
            net.eval()
            losses = [net(x.to(device), y.to(device))[1].item() for x, y in val_loader]
            net.train()
            return sum(losses) / len(losses)
        """),
    "perplexity of windows side by side": (PLAIN, """
        def compute_perplexity(model, tokens, seq_len):
            with torch.no_grad():
                nll, n = 0.0, 0
                for i in range(0, len(tokens) - seq_len, seq_len):
                    x = tokens[i : i + seq_len + 1]
                    nll += F.cross_entropy(model(x[None, :-1])[0], x[1:], reduction="sum").item()
                    n += len(x) - 1
                return math.exp(nll / n)
        """),
    "masked labels, as in the guide of the transformers library": (PLAIN, """
        def perplexity(model, encodings, max_length=13, stride=6):
            nll_sum = n_tokens = prev_end = 0
            for begin in range(0, encodings.size(1), stride):
                end = min(begin + max_length, encodings.size(1))
                ids = encodings[:, begin:end]
                labels = ids.clone()
                labels[:, : -(end - prev_end)] = -100
                with torch.no_grad():
                    logits = model(ids)
                losses = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
                nll_sum += losses
                n_tokens += (labels[0, 1:] != -100).sum()
                prev_end = end
                if end == encodings.size(1):
                    break
            return torch.exp(nll_sum / n_tokens)
        """),
    "loss and perplexity in a dictionary": (WITH_LOSS, """
        @torch.no_grad()
        def evaluate_model(model, loader, max_batches=None):
            was = model.training
            model.eval()
            total = count = 0
            for batch in loader:
                x, y = batch["input_ids"], batch["labels"]
                logits, _ = model(x[:, :-1])
                total += F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), reduction="sum")
                count += y[:, 1:].numel()
            model.train(was)
            return {"loss": total.item() / count, "ppl": math.exp(total.item() / count)}
        """),
    "draws of its own generator": (PLAIN, """
        @torch.no_grad()
        def estimate_loss(model, data, batch_size, block_size, eval_iters):
            generator = torch.Generator().manual_seed(0)
            total = 0.0
            for _ in range(eval_iters):
                at = torch.randint(len(data) - block_size, (batch_size,), generator=generator)
                x = torch.stack([data[i : i + block_size] for i in at])
                y = torch.stack([data[i + 1 : i + block_size + 1] for i in at])
                total += F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
            return total / eval_iters
        """),
    "bits of a character": (PLAIN, """
        @torch.no_grad()
        def eval_bpc(model, text):
            losses = []
            for i in range(1, len(text)):
                logits = model(text[None, max(0, i - 13) : i])[:, -1]
                losses.append(F.cross_entropy(logits, text[i : i + 1]) / math.log(2))
            return torch.stack(losses).mean()
        """),
}  # fmt: skip


@pytest.mark.parametrize(("model", "code"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_right_evaluations_are_met_and_pass(tmp_path, model, code):
    """The first two laws apply to each; none may fail."""
    subject = subject_of(tmp_path, code, model)
    verdicts = {name: judge(CHECKS[name], subject, {}) for name in (ALONE, UNIFORM, ALIKE, NEXT)}
    assert verdicts[ALONE].outcome == "passed", verdicts[ALONE].says
    drawn = "estimate_loss" in code
    assert drawn or verdicts[UNIFORM].outcome == verdicts[ALIKE].outcome == "passed", verdicts
    assert not [v.says for v in verdicts.values() if v.outcome not in ("passed", "not_applicable")]


WRONG_EVALUATIONS = {
    "means of windows, as the guide had it": (ALIKE, ["target", "times as much"], PLAIN, """
        def perplexity(model, encodings, max_length=13, stride=6):
            nlls, prev_end = [], 0
            for begin in range(0, encodings.size(1), stride):
                end = min(begin + max_length, encodings.size(1))
                ids = encodings[:, begin:end]
                labels = ids.clone()
                labels[:, : -(end - prev_end)] = -100
                with torch.no_grad():
                    nlls.append(F.cross_entropy(model(ids)[0, :-1], labels[0, 1:], ignore_index=-100))
                prev_end = end
                if end == encodings.size(1):
                    break
            return torch.exp(torch.stack(nlls).mean())
        """),
    "mean of perplexities": (ALIKE, ["weighs", "should be"], WITH_LOSS, """
        @torch.no_grad()
        def perplexity(model, loader):
            values = [math.exp(model(x, y)[1].item()) for x, y in loader]
            return sum(values) / len(values)
        """),
    "two to the power of nats": (UNIFORM, ["uniform logits", "should be 17"], PLAIN, """
        @torch.no_grad()
        def ppl(model, ids):
            loss = F.cross_entropy(model(ids[None, :12])[0], ids[1:13])
            return 2 ** loss.item()
        """),
    "a batch is not shifted": (NEXT, ["should be 0", "the token just read"], PLAIN, """
        @torch.no_grad()
        def perplexity(model, ids):
            loss = F.cross_entropy(model(ids[None, :12])[0], ids[:12])
            return loss.exp().item()
        """),
    "half precision is left": (ALONE, ["changes the weights"], PLAIN, """
        @torch.no_grad()
        def evaluate(model, loader):
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
            return sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in loader) / len(loader)
        """),
    "averaged weights are copied in": (ALONE, ["changes the weights", "6 of 6"], PLAIN, """
        class WeightAverager:
            def __init__(self, net, beta=0.99):
                self.beta, self.kept = beta, [p.detach().clone() for p in net.parameters()]

            def update(self, net):
                for kept, p in zip(self.kept, net.parameters()):
                    kept.mul_(self.beta).add_(p.detach(), alpha=1 - self.beta)

            def copy_to(self, net):
                for kept, p in zip(self.kept, net.parameters()):
                    p.data.copy_(kept)

        @torch.no_grad()
        def validate(net, loader, averager):
            averager.copy_to(net)
            return sum(F.cross_entropy(net(x).flatten(0, 1), y.flatten()).item() for x, y in loader) / len(loader)
        """),
    "seeded": (ALONE, ["PyTorch", "same state"], PLAIN, """
        @torch.no_grad()
        def evaluate(model, loader, seed=0):
            torch.manual_seed(seed)
            return sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in loader) / len(loader)
        """),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "model", "code"), WRONG_EVALUATIONS.values(), ids=WRONG_EVALUATIONS)
def test_wrong_evaluations_are_found(tmp_path, check, facts, model, code):
    found = verdict(tmp_path, check, code, model)
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says
    assert found.where.line > 20


LOGPS = """
    def sequence_logps(model, ids, labels):
        logits = model(ids)[:, :-1]
        labels = labels[:, 1:].clone()
        keep = labels != -100
        labels[~keep] = 0
        return (torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2) * keep).sum(-1)

"""
ANSWERS = {
    "sums of log-probabilities are handed over": """
        def dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1
        ):
            chosen = beta * (policy_chosen_logps - reference_chosen_logps)
            rejected = beta * (policy_rejected_logps - reference_rejected_logps)
            return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()
        """,
    "labels of -100": LOGPS + """
    def direct_dpo(policy, ref_policy, chosen_ids, rejected_ids, chosen_labels, rejected_labels, beta):
        with torch.no_grad():
            ref = sequence_logps(ref_policy, chosen_ids, chosen_labels)
            ref = ref - sequence_logps(ref_policy, rejected_ids, rejected_labels)
        pi = sequence_logps(policy, chosen_ids, chosen_labels) - sequence_logps(policy, rejected_ids, rejected_labels)
        return F.softplus(-beta * (pi - ref)).mean()
    """,
    "winners and losers in one batch": """
        def logps(model, x, mask):
            return (model(x)[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)

        def dpo_step_loss(model, ref_model, winner, loser, winner_mask, loser_mask, beta=0.2):
            x, mask = torch.cat([winner, loser]), torch.cat([winner_mask, loser_mask])
            pi = logps(model, x, mask).chunk(2)
            with torch.no_grad():
                ref = logps(ref_model, x, mask).chunk(2)
            return -torch.log(torch.sigmoid(beta * ((pi[0] - ref[0]) - (pi[1] - ref[1])))).mean()
        """,
    "no reference, mean of log-probabilities": """
        def simpo_loss(chosen_logps, rejected_logps, beta=2.0, gamma=0.5):
            return -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma).mean()
        """,
    "odds ratio": """
        def orpo_loss(policy_chosen_logps, policy_rejected_logps, lam=0.1):
            odds = (policy_chosen_logps - policy_rejected_logps) - (
                torch.log1p(-torch.exp(policy_chosen_logps)) - torch.log1p(-torch.exp(policy_rejected_logps)))
            return -policy_chosen_logps.mean() - lam * F.logsigmoid(odds).mean()
        """,
    "a mask of what to hide": """
        def dpo(policy, reference, chosen, rejected, chosen_prompt_mask, rejected_prompt_mask, beta=0.1):
            def logp(model, ids, hide):
                lp = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                return lp.masked_fill(hide[:, 1:].bool(), 0.0).sum(-1)
            with torch.no_grad():
                base = logp(reference, chosen, chosen_prompt_mask) - logp(reference, rejected, rejected_prompt_mask)
            now = logp(policy, chosen, chosen_prompt_mask) - logp(policy, rejected, rejected_prompt_mask)
            return -F.logsigmoid(beta * (now - base)).mean()
        """,
    "squared margin": """
        def ipo_loss(pi_chosen_logps, pi_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
            margin = (pi_chosen_logps - pi_rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
            return ((margin - 1 / (2 * beta)) ** 2).mean()
        """,
    "hinton": """
        def distillation_loss(student_logits, teacher_logits, labels, T=2.0, alpha=0.5):
            V = student_logits.size(-1)
            student, teacher = F.log_softmax(student_logits / T, -1), F.softmax(teacher_logits / T, -1)
            soft = F.kl_div(student, teacher, reduction="batchmean") * T * T
            hard = F.cross_entropy(student_logits.view(-1, V), labels.reshape(-1), ignore_index=-100)
            return alpha * soft + (1 - alpha) * hard
        """,
    "reverse, masked": """
        def reverse_kl(student_logits, teacher_logits, loss_mask, temperature=1.0):
            s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
            return ((s.exp() * (s - t)).sum(-1) * loss_mask).sum() / loss_mask.sum()
        """,
}  # fmt: skip


@pytest.mark.parametrize("code", ANSWERS.values(), ids=ANSWERS)
def test_right_losses_of_answers_are_met_and_pass(tmp_path, code):
    subject = subject_of(tmp_path, code)
    verdicts = {name: judge(CHECKS[name], subject, {}) for name in (MASKS, PREFERS, LN_2, ZERO)}
    assert not [v.says for v in verdicts.values() if v.outcome not in ("passed", "not_applicable")]
    law = ZERO if "teacher" in code else PREFERS
    assert verdicts[law].outcome == "passed", verdicts[law].says
    assert verdicts[LN_2].outcome == "passed" or "dpo" not in code, verdicts[LN_2].says


WRONG_ANSWERS = {
    "answers swapped": (PREFERS, ["wrong way round"], """
        def dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1
        ):
            gap = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
            return F.logsigmoid(beta * gap).mean()
        """),
    "reference added": (LN_2, ["should be ln 2"], """
        def dpo_loss(pi_chosen_lp, pi_rejected_lp, ref_chosen_lp, ref_rejected_lp, beta=0.1):
            gap = (pi_chosen_lp - pi_rejected_lp) + (ref_chosen_lp - ref_rejected_lp)
            return -F.logsigmoid(beta * gap).mean()
        """),
    "labels not masked": (MASKS, ["masked tokens"], """
        def dpo(policy, ref_policy, chosen_ids, rejected_ids, chosen_labels, rejected_labels, beta=0.1):
            def logp(model, ids, labels):
                return model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].sum(-1)
            with torch.no_grad():
                ref = logp(ref_policy, chosen_ids, chosen_labels) - logp(ref_policy, rejected_ids, rejected_labels)
            pi = logp(policy, chosen_ids, chosen_labels) - logp(policy, rejected_ids, rejected_labels)
            return -F.logsigmoid(beta * (pi - ref)).mean()
        """),
    "only the prompts": (MASKS, ["the mask is the wrong way round"], """
        def dpo(model, ref_model, chosen, rejected, chosen_mask, rejected_mask, beta=0.1):
            def logp(net, ids, mask):
                lp = net(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                return lp.masked_fill(mask[:, 1:].bool(), 0.0).sum(-1)
            with torch.no_grad():
                ref = logp(ref_model, chosen, chosen_mask) - logp(ref_model, rejected, rejected_mask)
            now = logp(model, chosen, chosen_mask) - logp(model, rejected, rejected_mask)
            return -F.logsigmoid(beta * (now - ref)).mean()
        """),
    "logits for log-probabilities": (ZERO, ["should be 0"], """
        def kd_loss(student_logits, teacher_logits, temperature=2.0):
            teacher = (teacher_logits / temperature).softmax(-1)
            return F.kl_div(student_logits / temperature, teacher, reduction="batchmean")
        """),
    "the temperature is the student's alone": (ZERO, ["should be 0"], """
        def kd_loss(student_logits, teacher_logits, temperature=2.0):
            student = (student_logits / temperature).log_softmax(-1)
            return F.kl_div(student, teacher_logits.softmax(-1), reduction="batchmean")
        """),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "code"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_wrong_losses_of_answers_are_found(tmp_path, check, facts, code):
    found = verdict(tmp_path, check, code)
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says


def test_the_header_names_what_was_found_by_its_kind(tmp_path):
    code = """
        def get_lr(it):
            return 1e-3

        class EMA:
            def update(self, model): ...

        class CharTokenizer:
            def encode(self, text): ...
            def decode(self, ids): ...

        class Lion(torch.optim.Optimizer): ...

        def validate(model, loader): ...

        def helper(model): ...
    """
    header = subject_of(tmp_path, code).header
    found = "get_lr (schedule), EMA (average), CharTokenizer (tokenizer), Lion (optimizer), validate (evaluation)"
    assert header.endswith(f"also found: {found} · not checked: helper")


def test_every_kind_is_judged():
    asked = "".join(path.read_text() for path in CHECKED.glob("check_*.py"))
    assert {kind for kind in KINDS if f'"{kind}"' in asked} == set(KINDS)


def test_what_cannot_be_called_is_named_with_the_reason(tmp_path):
    code = """
        def evaluate(model, tracker):
            return 1.0
    """
    found = verdict(tmp_path, ALONE, code)
    assert found.outcome == "not_applicable"
    assert "evaluate was found" in found.says and "'tracker'" in found.says
