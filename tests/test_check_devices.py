"""What the checks of devices say, on the CPU: their facts, and what they leave alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.check_devices import expect_agreement
from transformer_checks.checks.expect import CheckFailed
from transformer_checks.checks.reference import reference, reference_parts
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.checks.watch.waits import Waits
from transformer_checks.transformer.model import Attention, Transformer

CHECKS = {check.__name__: check for theme in ("devices", "distributed") for check in checks_in(theme)}


def verdict(bug: str, check: str, **declared):
    found = judge(CHECKS[check], all_bugs()[bug].subject(seed=3, **declared), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    return found


def test_a_kernel_that_disagrees_is_named_with_its_type():
    found = verdict("path-chosen-by-kernel-switches", "check_every_attention_kernel_agrees")
    assert "flash in float32" in found.says and found.evidence["error"] > 100 * found.evidence["unavoidable"]


def test_a_model_without_pytorchs_attention_has_no_kernels_to_compare():
    explicit = Subject("explicit", reference_parts(attention="explicit"), seed=3)
    found = judge(CHECKS["check_every_attention_kernel_agrees"], explicit, {})
    assert found.outcome == "not_applicable" and "scaled_dot_product_attention" in found.says


def test_a_gradient_that_no_scale_saves_is_counted():
    found = verdict("fp16-autocast-mask-overflow", "check_mixed_precision_keeps_the_gradient")
    assert "float16" in found.says and "not finite" in found.says and "scale" in found.says


def test_waiting_is_named_by_its_line_and_its_rate():
    found = verdict("number-read-at-each-token", "check_step_does_not_wait_at_each_token")
    assert "1 per position (3, 5, 11 times at 4, 6, 12 tokens)" in found.says
    assert found.where.type == "Testing" and found.where.file.endswith("devices_and_kernels.py")


def test_one_reading_a_step_is_advice():
    def build_model(**sizes):
        class Asserting(Transformer):
            def embed(self, tokens):
                assert int(tokens.max()) < self.config.vocab_size
                return super().embed(tokens)

        model = reference_parts().build_model(**sizes)
        model.__class__ = Asserting
        return model

    found = judge(
        CHECKS["check_step_does_not_wait_at_each_token"], Subject("x", SimpleNamespace(build_model=build_model)), {}
    )
    assert found.outcome == "passed"
    assert "reads a number from the device" in found.remarks[0] and "test_check_devices.py" in found.remarks[0]


def test_memory_that_grows_is_told_in_bytes_a_step():
    found = verdict("forward-keeps-its-activations", "check_memory_does_not_grow")
    width, rows, length, layers = 32, 2, 7, 2
    assert f"holds {4 * width * rows * length * layers:,} bytes more" in found.says


def test_memory_that_outgrows_the_batch_names_the_largest_tensor_and_its_line():
    found = verdict("every-row-with-every-row", "check_memory_grows_no_faster_than_the_batch")
    assert "[256, 12, 12]" in found.says  # 8 · 8 pairs of rows with 4 heads
    assert found.where.module == "scores" and found.where.type == "Crossed"


def test_a_large_table_hides_what_few_rows_hold_and_is_no_growth():
    class LongTable(Transformer):
        def __init__(self, config):
            super().__init__(config)
            self.long = nn.Parameter(torch.zeros(1, 1000, config.n_embd))

        def embed(self, tokens):
            return super().embed(tokens) + self.long[:, : tokens.shape[1]]

    def build_model(**sizes):
        return LongTable(reference_parts().build_model(**sizes).config)

    check = CHECKS["check_memory_grows_no_faster_than_the_batch"]
    found = judge(check, Subject("x", SimpleNamespace(build_model=build_model)), {})
    few, some, many = found.evidence["peak_bytes"]
    assert many - some > 3 * (some - few)  # or this tests nothing
    assert found.outcome == "passed"


def test_tf32_left_on_is_told_and_put_back():
    before = torch.get_float32_matmul_precision()
    found = verdict("forward-turns-tf32-on", "check_precision_switches_are_left_alone")
    assert "from 'highest' to 'high'" in found.says
    assert torch.get_float32_matmul_precision() == before


def test_a_step_that_no_seed_repeats_is_told():
    assert (
        "two steps from one seed"
        in verdict("jitter-no-seed-reaches", "check_deterministic_algorithms_repeat_the_step").says
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_device_is_compared_with_the_cpu_in_float64():
    """The CPU in float32 stands for the device; the bug shows in float32 only, as on a device it would there."""

    def build_model(**sizes):
        class Elsewhere(Attention):
            def attend(self, q, k, v, visible):
                return super().attend(q if q.dtype == torch.float64 else q * 1.01, k, v, visible)

        model = reference_parts().build_model(**sizes)
        for block in model.blocks:
            block.attention.__class__ = Elsewhere
        return model

    home = reference(seed=3)
    expect_agreement(home, home)
    with pytest.raises(CheckFailed, match="against float64 on the CPU"):
        expect_agreement(Subject("elsewhere", SimpleNamespace(build_model=build_model), seed=3), home)


@pytest.mark.parametrize("check", CHECKS)
def test_on_the_meta_device_nothing_is_decided(check):
    found = judge(CHECKS[check], reference(seed=3, device="meta"), {})
    assert found.outcome in ("not_applicable", "passed"), found.says
    if check != "check_precision_switches_are_left_alone":
        assert found.outcome == "not_applicable"


def test_every_reading_of_a_number_is_seen():
    x = torch.arange(6.0)
    with Waits(torch.device("cpu")) as waits:
        x.sum().item(), bool((x > 2).any()), x.nonzero(), x[x > 2], float(x.max()), x.unique()
    assert sum(waits.by_line.values()) == 6
    assert all(line.file.endswith("test_check_devices.py") for line in waits.by_line)


@pytest.mark.parametrize("check", CHECKS)
def test_a_model_that_is_made_to_decode_only_is_not_accused(check):
    """Its forward fills a cache of its own, through which a second step would reach back into the first."""

    def build_model(**sizes):
        class Decoding(Transformer):
            def embed(self, tokens):
                x = super().embed(tokens)
                x = x if self.kept is None else x + 0 * self.kept.mean()
                self.kept = x
                return x

        model = reference_parts().build_model(**sizes)
        model.__class__, model.kept = Decoding, None
        return model

    found = judge(CHECKS[check], Subject("decoding", SimpleNamespace(build_model=build_model), seed=3), {})
    assert found.outcome in ("passed", "not_applicable"), found.says


# -- two processes


def test_a_parameter_without_a_part_is_named():
    found = verdict("parameter-never-used", "check_two_processes_train_as_one")
    assert "second_head.bias" in found.says and found.likely[0] == "parameter-never-used"


def test_what_a_process_keeps_of_its_batches_is_named():
    found = verdict("running-statistics-in-forward", "check_two_processes_train_as_one")
    assert "batch 1" in found.says and "running_mean" in found.says


def test_a_students_file_is_met_in_both_processes(tmp_path, monkeypatch):
    (tmp_path / "student.py").write_text(STUDENT)
    monkeypatch.chdir(tmp_path)
    found = judge(CHECKS["check_two_processes_train_as_one"], subject_of("student.py", seed=3), {})
    assert found.outcome == "passed", found.says


def test_an_instance_has_no_way_to_another_process():
    fixed = subject_of(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), seed=3)
    assert judge(CHECKS["check_two_processes_train_as_one"], fixed, {}).outcome == "not_applicable"


def test_a_model_that_no_name_leads_to_has_no_way_to_another_process():
    unnamed = Subject("made here", reference_parts(), seed=3)
    found = judge(CHECKS["check_two_processes_train_as_one"], unnamed, {})
    assert found.outcome == "not_applicable" and "cannot load" in found.says


STUDENT = """
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(1))
"""


@pytest.mark.parametrize("anew", [False, True])
def test_what_a_training_forward_counts_into_buffers_is_no_difference_between_steps(anew):
    """As experts' balancing biases do: in place, or as a new tensor."""

    def change(model):
        model.register_buffer("balance", torch.zeros(17))

        def count(module, given, logits):
            out = logits + module.balance
            if module.training:
                step = 0.1 * logits.detach().mean((0, 1)).sign()
                module.balance = module.balance + step if anew else module.balance.add_(step)
            return out

        model.register_forward_hook(count)

    subject = Subject("balanced", changed(change))
    for check in ("check_deterministic_algorithms_repeat_the_step", "check_every_attention_kernel_agrees"):
        found = judge(CHECKS[check], subject, {})
        assert found.outcome in ("passed", "not_applicable"), found.says
    assert judge(CHECKS["check_deterministic_algorithms_repeat_the_step"], subject, {}).outcome == "passed"
