"""Schedules of the learning rate in forms that users write: right ones of every kind pass, wrong ones are found."""

from __future__ import annotations

import pytest

from tests.test_companions import subject_of
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import judge

BOUNDS, WARMS, FALLS, ENDS = (
    "check_a_schedule_keeps_its_bounds",
    "check_a_warm_up_ends_where_the_schedule_goes_on",
    "check_a_schedule_does_not_rise_again",
    "check_a_schedule_ends_at_its_minimum",
)
CHECKS = {check.__name__: check for check in checks_in("schedule")}
NANO = """
    learning_rate, min_lr = 6e-4, 6e-5
    warmup_iters, lr_decay_iters = 2000, 60000

    def get_lr(it):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (learning_rate - min_lr)
"""
FACTORY = """
    from torch.optim.lr_scheduler import LambdaLR

    def get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps, num_cycles=0.5, last_epoch=-1):
        def lr_lambda(current_step):
            if current_step < num_warmup_steps:
                return float(current_step) / float(max(1, num_warmup_steps))
            progress = (current_step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress)))
        return LambdaLR(optimizer, lr_lambda, last_epoch)
"""
ADJUST = """
    def adjust_learning_rate(optimizer, epoch, args):
        if epoch < args.warmup_epochs:
            lr = args.lr * epoch / args.warmup_epochs
        else:
            done = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
            lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
"""
STEPPED = """
    class CosineSchedule:
        def __init__(self, optimizer, warmup_steps, max_steps, max_lr, min_lr=1e-6):
            self.optimizer, self.warmup_steps, self.max_steps = optimizer, warmup_steps, max_steps
            self.max_lr, self.min_lr, self.n = max_lr, min_lr, 0

        def step(self):
            self.n += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.get_lr()

        def get_lr(self):
            if self.n < self.warmup_steps:
                return self.max_lr * self.n / self.warmup_steps
            done = min(1.0, (self.n - self.warmup_steps) / (self.max_steps - self.warmup_steps))
            return self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
"""
RIGHT = {
    "nanoGPT's, of numbers of the file": (NANO, {BOUNDS, WARMS, FALLS, ENDS}),
    "of the transformers library, by a lambda": (FACTORY, {BOUNDS, WARMS, FALLS}),
    "sets the optimizer, of a configuration": (ADJUST, {BOUNDS, WARMS, FALLS, ENDS}),
    "a class that steps": (STEPPED, {BOUNDS, WARMS, FALLS, ENDS}),
    "Noam's": ("""
        class NoamOpt:
            def __init__(self, model_size, factor, warmup, optimizer):
                self.optimizer, self.warmup, self.factor, self.model_size = optimizer, warmup, factor, model_size
                self._step = 0

            def step(self):
                self._step += 1
                for p in self.optimizer.param_groups:
                    p["lr"] = self.rate()
                self.optimizer.step()

            def rate(self, step=None):
                step = self._step if step is None else step
                return self.factor * self.model_size**-0.5 * min(step**-0.5, step * self.warmup**-1.5)
        """, {BOUNDS, WARMS, FALLS}),
    "a product of warm-up and cosine": ("""
        class CosineWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
            def __init__(self, optimizer, warmup, max_iters):
                self.warmup, self.max_num_iters = warmup, max_iters
                super().__init__(optimizer)

            def get_lr(self):
                factor = 0.5 * (1 + math.cos(math.pi * self.last_epoch / self.max_num_iters))
                if self.last_epoch <= self.warmup:
                    factor *= self.last_epoch / self.warmup
                return [base_lr * factor for base_lr in self.base_lrs]
        """, {BOUNDS, WARMS, FALLS}),
    "stable, then a line": ("""
        def wsd_lr(step, total_steps, max_lr, min_lr, warmup_steps=100, decay_frac=0.2):
            start = int(total_steps * (1 - decay_frac))
            if step < warmup_steps:
                return max_lr * (step + 1) / warmup_steps
            if step < start:
                return max_lr
            return max_lr + (min_lr - max_lr) * min(1.0, (step - start) / (total_steps - start))
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "stable, by the lengths of its parts": ("""
        def get_wsd_schedule(optimizer, num_warmup_steps, num_stable_steps, num_decay_steps, min_lr_ratio=0.1):
            def factor(s):
                if s < num_warmup_steps:
                    return s / max(1, num_warmup_steps)
                p = max(0.0, (s - num_warmup_steps - num_stable_steps) / num_decay_steps)
                return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, p)))
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "of a course": ("""
        def lr_cosine_schedule(t, a_max, a_min, T_w, T_c):
            if t < T_w:
                return t / T_w * a_max
            if t <= T_c:
                return a_min + 0.5 * (1 + math.cos((t - T_w) / (T_c - T_w) * math.pi)) * (a_max - a_min)
            return a_min
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "restarts": ("""
        def cosine_restarts_lr(step, warmup_steps, max_steps, lr, min_lr=0.0, cycles=3):
            if step < warmup_steps:
                return lr * step / warmup_steps
            p = (step - warmup_steps) / (max_steps - warmup_steps) * cycles % 1.0
            return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * p))
        """, {BOUNDS, WARMS}),
    "constant": ("""
        def get_constant_schedule_with_warmup(optimizer, num_warmup_steps):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / max(1.0, num_warmup_steps)))
        """, {BOUNDS, WARMS, FALLS}),
    "a multiplier with a warm-down, by shares": ("""
        num_iterations, warmup_ratio, warmdown_ratio, final_lr_frac = 1000, 0.05, 0.4, 0.0

        def get_lr_multiplier(it):
            warmup_iters, warmdown_iters = round(warmup_ratio * num_iterations), round(warmdown_ratio * num_iterations)
            if it < warmup_iters:
                return (it + 1) / warmup_iters
            if it <= num_iterations - warmdown_iters:
                return 1.0
            progress = (num_iterations - it) / warmdown_iters
            return progress * 1.0 + (1 - progress) * final_lr_frac
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "the decay has a length of its own": ("""
        def warmup_cosine_lr(step, warmup_steps, decay_steps, peak_lr, end_lr):
            if step < warmup_steps:
                return peak_lr * step / warmup_steps
            p = min((step - warmup_steps) / decay_steps, 1.0)
            return end_lr + 0.5 * (1 + math.cos(math.pi * p)) * (peak_lr - end_lr)
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "its minimum is a share": ("""
        def get_scheduler_with_floor(optimizer, warmup_steps, total_steps, min_lr=0.1):
            def factor(s):
                if s < warmup_steps:
                    return (s + 1) / warmup_steps
                p = min(1.0, (s - warmup_steps) / (total_steps - warmup_steps))
                return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * p))
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "its warm-up alone": ("""
        def warmup_lr(step, warmup_steps, max_lr):
            return max_lr * (step + 1) / (warmup_steps + 1)
        """, {BOUNDS, WARMS, FALLS}),
    "steps that alternate by design": ("""
        def chebyshev_lr_schedule(step, total_steps, lr):
            return lr * (1 + 0.5 * (-1) ** step)
        """, {BOUNDS}),
    "a function of a factory": ("""
        def make_lr_schedule(warmup, total, lr):
            return lambda s: lr * min((s + 1) / warmup, max(0.0, (total - s) / (total - warmup)))
        """, {BOUNDS, WARMS, FALLS}),
    "a table": ("""
        def cosine_lr_schedule(lr, min_lr, total_steps, warmup_steps):
            cosine = 0.5 * (1 + torch.cos(torch.linspace(0, math.pi, total_steps - warmup_steps)))
            return torch.cat([torch.linspace(0, lr, warmup_steps), min_lr + (lr - min_lr) * cosine])
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "one after the other, by PyTorch": ("""
        from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

        def build_scheduler(optimizer, warmup_steps, total_steps, min_lr=1e-5):
            warm = LinearLR(optimizer, start_factor=1e-3, total_iters=warmup_steps)
            cosine = CosineAnnealingLR(optimizer, T_max=total_steps - warmup_steps, eta_min=min_lr)
            return SequentialLR(optimizer, [warm, cosine], milestones=[warmup_steps])
        """, {BOUNDS, WARMS, FALLS, ENDS}),
    "ten times less, without a declared minimum": ("""
        def get_lr(current_step, total_steps, lr):
            return lr / 10 + 0.5 * lr * (1 + math.cos(math.pi * current_step / total_steps))
        """, {BOUNDS, FALLS}),
}  # fmt: skip


@pytest.mark.parametrize(("code", "laws"), RIGHT.values(), ids=RIGHT)
def test_right_schedules_pass_the_laws_that_apply(tmp_path, code, laws):
    subject = subject_of(tmp_path, code)
    verdicts = {name: judge(check, subject, {}) for name, check in CHECKS.items()}
    assert not [v.says for v in verdicts.values() if v.outcome not in ("passed", "not_applicable")]
    assert {name for name, v in verdicts.items() if v.outcome == "passed"} == laws


SWAPPED = NANO.replace("min_lr + coeff * (learning_rate - min_lr)", "learning_rate + coeff * (min_lr - learning_rate)")
WRONG = {
    "the warm-up is counted": (WARMS, ["step 1999", "does not start where the warm-up ends"],
                               NANO.replace("(it - warmup_iters) / (lr_decay_iters - warmup_iters)", "it / 60000")),
    "swapped": (WARMS, ["starts at the minimum"], SWAPPED),
    "integers": (WARMS, ["stays at 0 during the warm-up"],
                 STEPPED.replace("return self.max_lr * self.n / self.warm", "return self.n // self.warm")),
    "no warm-up": (WARMS, ["falls during its warm-up of 12 steps"],
                   FACTORY.replace("current_step < num", "0 > num").replace("step - num_warmup_steps)", "step)")),
    "a whole cosine": (FALLS, ["rises again from step"], ADJUST.replace("math.pi *", "2 * math.pi *")),
    "degrees": (FALLS, ["rises again from step"], ADJUST.replace("math.pi *", "180 *")),
    "the warm-up comes again": (FALLS, ["rises again from step 24"], """
        def get_lr(it, warmup_iters, max_iters, learning_rate):
            if it % (2 * warmup_iters) < warmup_iters:
                return learning_rate * (it % (2 * warmup_iters) + 1) / warmup_iters
            return learning_rate * (max_iters - it) / (max_iters - warmup_iters)
        """),
    "no clamp": (FALLS, ["after its last step 60000", "lr_decay_iters is where the decay ends"],
                 NANO.replace("if it > lr", "if it < 0 * lr")),
    "the minimum is added": (BOUNDS, ["at most 0.0006 (learning_rate)", "0.00066", "minimum 6e-05 is added"],
                             NANO.replace("coeff * (learning_rate - min_lr)", "coeff * learning_rate")),
    "below zero": (BOUNDS, ["gives -", "0 or more until its last step, 100"], """
        def linear_lr_schedule(step, warmup_steps, total_steps, lr):
            return lr * min(step / warmup_steps, 1 - (step + warmup_steps) / total_steps)
        """),
    "stops short": (ENDS, ["0.000208 at its last step (total_steps = 100), should be 0.0001"], """
        def get_linear_schedule(optimizer, warmup_steps, total_steps, min_lr_ratio=0.1):
            def factor(s):
                if s < warmup_steps:
                    return s / warmup_steps
                return 1 - (1 - min_lr_ratio) * (s - warmup_steps) / total_steps
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        """),
    "radians twice": (ENDS, ["0.0009993", "should be 0.0001 (min_lr)"],
                      ADJUST.replace("math.pi * done", "math.radians(math.pi * done)")),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "code"), WRONG.values(), ids=WRONG)
def test_wrong_schedules_are_found(tmp_path, check, facts, code):
    subject = subject_of(tmp_path, code)
    found = judge(CHECKS[check], subject, {})
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says
    assert found.where.line > 20
    earlier = list(CHECKS)[: list(CHECKS).index(check)]
    assert not [v.says for name in earlier if (v := judge(CHECKS[name], subject, {})).outcome == "failed"]


UNDECLARED = {
    "neither its warm-up nor its last step": """
        def step_decay_lr(epoch, lr=0.1, drop=0.5, every=10):
            return lr * drop ** (epoch // every)
    """,
    "required parameter 'T_0'": """
        def sgdr_lr(step, T_0, lr_max, lr_min):
            return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * (step % T_0) / T_0))
    """,
    "raises AttributeError: power_t": """
        def get_lr(step, config):
            return config.lr * (1 - step / config.max_steps) ** config.power_t
    """,
    "the end of a schedule alone": """
        def linear_cooldown_lr(step, warmup_steps, stable_steps, cooldown_steps):
            return 1 - (step - warmup_steps - stable_steps) / cooldown_steps
    """,
    "takes no optimizer": """
        class BatchScheduler:
            def __init__(self, max_steps): self.n = 0
            def step(self): self.n += 1; return self.n % 3
    """,
}


@pytest.mark.parametrize(("reason", "code"), UNDECLARED.items(), ids=UNDECLARED)
def test_what_is_not_declared_is_not_judged(tmp_path, reason, code):
    found = judge(CHECKS[BOUNDS], subject_of(tmp_path, code), {})
    assert found.outcome == "not_applicable"
    assert reason in found.says


def test_a_decay_that_rises_after_the_last_step_of_training_is_a_remark(tmp_path):
    found = judge(CHECKS[FALLS], subject_of(tmp_path, FACTORY), {})
    assert found.outcome == "passed"
    assert any("after its last step 100" in remark for remark in found.remarks)
