"""Moving averages of the weights in forms that users write: right ones of every kind pass, wrong ones are found."""

from __future__ import annotations

import pytest

from tests.test_companions import subject_of
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import judge

COPY, MOVES, BACK = (
    "check_an_average_is_a_copy",
    "check_an_average_moves_by_its_decay",
    "check_averaged_weights_are_put_back",
)
CHECKS = {check.__name__: check for check in checks_in("average")}
REGISTERED = """
    class EMA:
        def __init__(self, model, decay):
            self.model, self.decay, self.shadow, self.backup = model, decay, {}, {}

        def register(self):
            for name, param in self.model.named_parameters():
                if param.requires_grad:
                    self.shadow[name] = param.data.clone()

        def update(self):
            for name, param in self.model.named_parameters():
                if param.requires_grad:
                    average = (1.0 - self.decay) * param.data + self.decay * self.shadow[name]
                    self.shadow[name] = average.clone()

        def apply_shadow(self):
            for name, param in self.model.named_parameters():
                if param.requires_grad:
                    self.backup[name] = param.data
                    param.data = self.shadow[name]

        def restore(self):
            for name, param in self.model.named_parameters():
                if param.requires_grad:
                    param.data = self.backup[name]
"""
STATES = """
    class EMA:
        def __init__(self, model, decay=0.999):
            self.decay = decay
            self.shadow = {k: v.clone() for k, v in model.state_dict().items()}

        def update(self, model):
            for k, v in model.state_dict().items():
                self.shadow[k] = self.decay * self.shadow[k] + (1 - self.decay) * v.detach()

        def apply(self, model):
            self.saved = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(self.shadow)

        def restore(self, model):
            model.load_state_dict(self.saved)
"""
COPIED = """
    import copy

    class ModelEMA:
        def __init__(self, model, decay=0.9999, updates=0):
            self.ema, self.updates = copy.deepcopy(model).eval(), updates
            self.decay = lambda n: decay * (1 - math.exp(-n / 2000))

        @torch.no_grad()
        def update(self, model):
            self.updates += 1
            d, state = self.decay(self.updates), model.state_dict()
            for k, v in self.ema.state_dict().items():
                if v.dtype.is_floating_point:
                    v *= d
                    v += (1 - d) * state[k].detach()
"""
LISTED = """
    import contextlib

    class ExponentialMovingAverage:
        def __init__(self, parameters, decay, use_num_updates=True):
            self.decay, self.num_updates = decay, 0 if use_num_updates else None
            self.shadow_params = [p.clone().detach() for p in parameters if p.requires_grad]

        @torch.no_grad()
        def update(self, parameters):
            decay = self.decay
            if self.num_updates is not None:
                self.num_updates += 1
                decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
            for s, p in zip(self.shadow_params, parameters):
                s.sub_((s - p) * (1.0 - decay))

        def copy_to(self, parameters):
            for s, p in zip(self.shadow_params, parameters):
                p.data.copy_(s.data)

        def store(self, parameters):
            self.collected = [p.clone() for p in parameters]

        def restore(self, parameters):
            for c, p in zip(self.collected, parameters):
                p.data.copy_(c.data)
"""
RIGHT = {
    "registered apart, swapped by data": (REGISTERED, {COPY, MOVES, BACK}),
    "the state dictionary": (STATES, {COPY, MOVES, BACK}),
    "a copy of the model, its decay grows": (COPIED, {COPY, MOVES}),
    "a list of parameters, a decay that grows": (LISTED, {COPY, MOVES, BACK}),
    "PyTorch's": ("""
        class ExponentialMovingAverage(torch.optim.swa_utils.AveragedModel):
            def __init__(self, model, decay, device="cpu"):
                super().__init__(model, device, lambda old, new, n: decay * old + (1 - decay) * new, use_buffers=True)
        """, {COPY, MOVES}),
    "a module with buffers": ("""
        class LitEma(nn.Module):
            def __init__(self, model, decay=0.9999):
                super().__init__()
                self.names = {name: name.replace(".", "") for name, _ in model.named_parameters()}
                self.register_buffer("decay", torch.tensor(decay))
                self.register_buffer("num_updates", torch.tensor(0))
                for name, p in model.named_parameters():
                    self.register_buffer(self.names[name], p.clone().detach().data)

            @torch.no_grad()
            def forward(self, model):
                self.num_updates += 1
                share = 1.0 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
                mine = dict(self.named_buffers())
                for name, p in model.named_parameters():
                    mine[self.names[name]].sub_(share * (mine[self.names[name]] - p))

            def copy_to(self, model):
                for name, p in model.named_parameters():
                    p.data.copy_(getattr(self, self.names[name]))
        """, {COPY, MOVES, BACK}),
    "late, and every tenth step": ("""
        import copy

        class EMA(nn.Module):
            def __init__(self, model, beta=0.9999, update_after_step=100, update_every=10):
                super().__init__()
                self.online_model, self.ema_model = model, copy.deepcopy(model)
                self.beta, self.after, self.every, self.step = beta, update_after_step, update_every, 0

            @torch.no_grad()
            def update(self):
                self.step += 1
                if self.step % self.every:
                    return
                epoch = max(self.step - self.after - 1, 0)
                decay = min(self.beta, 1 - (1 + epoch) ** -0.67)
                for a, b in zip(self.ema_model.parameters(), self.online_model.parameters()):
                    a.lerp_(b, 1 - decay)
        """, {COPY, MOVES}),
    "a plain mean": ("""
        class WeightAverager:
            def __init__(self, net):
                self.n, self.kept = 0, [p.detach().clone() for p in net.parameters()]

            def update(self, net):
                self.n += 1
                for kept, p in zip(self.kept, net.parameters()):
                    kept += (p.detach() - kept) / (self.n + 1)
        """, {COPY, MOVES}),
    "tau is the share of the weights": ("""
        class TargetEMA:
            def __init__(self, model, tau=0.005):
                self.tau, self.target = tau, {n: p.detach().clone() for n, p in model.named_parameters()}

            @torch.no_grad()
            def update(self, model):
                for n, p in model.named_parameters():
                    self.target[n].lerp_(p, self.tau)
        """, {COPY, MOVES}),
    "they change places": ("""
        class EMA:
            def __init__(self, model, decay=0.999):
                self.model, self.decay = model, decay
                self.weights = [p.detach().clone() for p in model.parameters()]

            @torch.no_grad()
            def update(self):
                torch._foreach_lerp_(self.weights, [p.detach() for p in self.model.parameters()], 1 - self.decay)

            @torch.no_grad()
            def swap(self):
                for w, p in zip(self.weights, self.model.parameters()):
                    held = p.detach().clone()
                    p.copy_(w)
                    w.copy_(held)
        """, {COPY, MOVES, BACK}),
    "with a context": ("""
        import contextlib

        class EMA:
            def __init__(self, model, decay=0.999):
                self.decay, self.shadow = decay, {n: p.detach().clone() for n, p in model.named_parameters()}

            @torch.no_grad()
            def update(self, model, decay=None):
                for n, p in model.named_parameters():
                    self.shadow[n].lerp_(p, 1 - (self.decay if decay is None else decay))

            @contextlib.contextmanager
            def applied(self, model):
                kept = {n: p.detach().clone() for n, p in model.named_parameters()}
                for n, p in model.named_parameters():
                    p.data.copy_(self.shadow[n])
                try:
                    yield model
                finally:
                    for n, p in model.named_parameters():
                        p.data.copy_(kept[n])
        """, {COPY, MOVES, BACK}),
    "of the loss, not of weights": ("""
        class LossAverage:
            def __init__(self, beta=0.9):
                self.beta, self.value = beta, None

        class RunningEMA:
            def __init__(self, beta=0.9):
                self.beta, self.value = beta, None

            def update(self, x):
                self.value = x if self.value is None else self.beta * self.value + (1 - self.beta) * x
        """, set()),
}  # fmt: skip


@pytest.mark.parametrize(("code", "laws"), RIGHT.values(), ids=RIGHT)
def test_right_averages_pass_the_laws_that_apply(tmp_path, code, laws):
    subject = subject_of(tmp_path, code)
    verdicts = {name: judge(check, subject, {}) for name, check in CHECKS.items()}
    assert not [v.says for v in verdicts.values() if v.outcome not in ("passed", "not_applicable")]
    assert {name for name, v in verdicts.items() if v.outcome == "passed"} == laws


WRONG = {
    "the state dictionary is not copied": (COPY, ["6 of 6", "was made"], STATES.replace("v.clone() for", "v for", 1)),
    "the first update hands over the weights": (COPY, ["was first updated"], """
        class EMA:
            def __init__(self, model, decay):
                self.decay, self.n, self.shadow = decay, 0, {k: p.data.clone() for k, p in model.named_parameters()}

            def update(self, model):
                self.n += 1
                for k, p in model.named_parameters():
                    old = self.shadow[k]
                    self.shadow[k] = p.data if self.n == 1 else self.decay * old + (1 - self.decay) * p.data
        """),
    "an average of the weights in place": (COPY, ["changes the model's own weights (6 of 6"], LISTED.replace(
        "s.sub_((s - p) * (1.0 - decay))", "s.copy_(p.data.mul_(1 - decay).add_(s * decay))")),
    "decay the other way round": (MOVES, ["keeps 0.1", "should be 0.9", "changed places"], REGISTERED.replace(
        "(1.0 - self.decay) * param.data + self.decay *", "self.decay * param.data + (1.0 - self.decay) *")),
    "the shares do not add up": (MOVES, ["not changed", "1.9 times"], STATES.replace("(1 - self.decay) * v", "v")),
    "a squared decay": (MOVES, ["keeps 0.81", "should be 0.9"], STATES.replace(
        "self.decay *", "self.decay**2 *").replace("(1 - self.decay)", "(1 - self.decay**2)")),
    "the result is dropped": (MOVES, ["does not move in 6 updates"], LISTED.replace("s.sub_(", "s.sub(")),
    "only matrices": (MOVES, ["moves 4 of 6 parameters"], REGISTERED.replace(
        "average = (1", "if param.dim() < 2: continue\n                    average = (1")),
    "neighbours": (MOVES, ["not changed differs", "by up to"], STATES.replace("v.detach()", "v.flip(0)")),
    "one update late": (MOVES, ["does not move", "of it aside"], """
        class EMA:
            def __init__(self, model, decay):
                self.decay, self.kept, self.last = decay, [p.detach().clone() for p in model.parameters()], None

            @torch.no_grad()
            def update(self, model):
                weights = [p.detach().clone() for p in model.parameters()]
                for kept, p in zip(self.kept, self.last or weights):
                    kept.mul_(self.decay).add_(p, alpha=1 - self.decay)
                self.last = weights
        """),
    "the backup is overwritten": (BACK, ["6 of 6 tensors differ", "still the averaged ones"], STATES.replace(
        "self.saved = {k: v.clone() for k, v in model.state_dict().items()}", "self.saved = model.state_dict()")),
    "restored too little": (BACK, ["4 of 6 tensors differ"], REGISTERED.replace(
        "param.data = self.backup[name]", "param.data = self.backup[name] if param.dim() < 2 else param.data")),
    "applied too little": (BACK, ["gives the model 4 of 6"], REGISTERED.replace(
        "param.data = self.shadow[name]", "param.data = self.shadow[name] if param.dim() > 1 else param.data")),
    "the average is lost": (BACK, ["changes the average itself"], REGISTERED.replace(
        "self.backup[name] = param.data", "self.backup[name] = param.data.clone()").replace(
        "param.data = self.backup[name]", "param.data.copy_(self.backup[name])")),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "code"), WRONG.values(), ids=WRONG)
def test_wrong_averages_are_found(tmp_path, check, facts, code):
    subject = subject_of(tmp_path, code)
    found = judge(CHECKS[check], subject, {})
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says
    assert found.where.line > 20
    if check != COPY:
        assert judge(CHECKS[COPY], subject, {}).outcome == "passed"
