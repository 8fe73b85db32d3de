"""Optimizers in forms that users write: right ones of every name pass, wrong ones are found and explained."""

from __future__ import annotations

import pytest
import torch

from tests.test_companions import subject_of
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.training.rules import RIGHT as RULES
from transformer_checks.checks.training.rules import Settings

RULE, APART = "check_an_optimizer_follows_the_rule_of_its_name", "check_an_optimizer_keeps_its_parameters_apart"
CHECKS = {check.__name__: check for check in checks_in("optimizer")}
STATEFUL = """
    class AdamW(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
            super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                b1, b2 = group["betas"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    grad, state = p.grad, self.state[p]
                    if not state:
                        state["t"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                    state["t"] += 1
                    state["m"].mul_(b1).add_(grad, alpha=1 - b1)
                    state["v"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
                    rate = group["lr"] * math.sqrt(1 - b2 ** state["t"]) / (1 - b1 ** state["t"])
                    p.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-rate)
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
"""
LISTED = """
    class Adam:
        def __init__(self, params, lr=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8):
            self.params = list(params)
            self.lr, self.b1, self.b2, self.eps, self.t = lr, beta1, beta2, epsilon, 0
            self.m, self.v = [0] * len(self.params), [0] * len(self.params)

        @torch.no_grad()
        def step(self):
            self.t += 1
            for i, p in enumerate(self.params):
                if p.grad is None:
                    continue
                self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * p.grad
                self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * p.grad**2
                m_hat, v_hat = self.m[i] / (1 - self.b1**self.t), self.v[i] / (1 - self.b2**self.t)
                p -= self.lr * m_hat / (v_hat.sqrt() + self.eps)

        def zero_grad(self):
            for p in self.params:
                p.grad = None
"""
LION = """
    class Lion(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
            super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                lr, (beta1, beta2) = group["lr"], group["betas"]
                for p in (p for p in group["params"] if p.grad is not None):
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.data.mul_(1 - lr * group["weight_decay"])
                    p.add_(m.clone().mul_(beta1).add(p.grad, alpha=1 - beta1).sign_(), alpha=-lr)
                    m.mul_(beta2).add_(p.grad, alpha=1 - beta2)
"""
MUON = """
    def zeropower_via_newtonschulz5(G, steps=5):
        a, b, c = (3.4445, -4.7750, 2.0315)
        X = G.bfloat16()
        if G.size(0) > G.size(1):
            X = X.T
        X = X / (X.norm() + 1e-7)
        for _ in range(steps):
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        return X.T if G.size(0) > G.size(1) else X

    class Muon(torch.optim.Optimizer):
        def __init__(self, params, lr=0.02, weight_decay=0, momentum=0.95, nesterov=True):
            super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov))

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buf, group["momentum"]) if group["nesterov"] else buf
                    update = zeropower_via_newtonschulz5(update)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)
"""
SQUARES = """
    class RMSProp:
        def __init__(self, params, lr=0.01, decay_rate=0.9, epsilon=1e-8):
            self.params, self.lr, self.rho, self.eps = list(params), lr, decay_rate, epsilon
            self.s = [torch.zeros_like(p) for p in self.params]

        @torch.no_grad()
        def step(self):
            for s, p in zip(self.s, self.params):
                if p.grad is not None:
                    s.mul_(self.rho).addcmul_(p.grad, p.grad, value=1 - self.rho)
                    p -= self.lr * p.grad / torch.sqrt(s + self.eps)

        def zero_grad(self): ...
"""
MOMENTUM = """
    class SGDMomentum:
        def __init__(self, params, lr=0.01, momentum=0.9):
            self.params, self.lr, self.mu = list(params), lr, momentum
            self.v = [torch.zeros_like(p) for p in self.params]

        @torch.no_grad()
        def step(self):
            for v, p in zip(self.v, self.params):
                if p.grad is not None:
                    v.mul_(self.mu).sub_(self.lr * p.grad)
                    p.add_(v)

        def zero_grad(self): ...
"""
RIGHT = {
    "PyTorch's own": "\n".join(f"    class {name}(torch.optim.{name}): ..."
                               for name in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")),
    "the rate is corrected, decay comes last": STATEFUL,
    "lists": LISTED,
    "Lion": LION,
    "Muon": MUON,
    "Muon by singular values": """
        class Muon(torch.optim.Optimizer):
            def __init__(self, params, lr=0.02, momentum=0.95):
                super().__init__(params, dict(lr=lr, momentum=momentum))

            @torch.no_grad()
            def step(self):
                for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
                    buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                    u, _, v = torch.linalg.svd(buf.mul_(0.95).add_(p.grad), full_matrices=False)
                    p.sub_(self.param_groups[0]["lr"] * u @ v)
        """,
    "eps inside the root": SQUARES,
    "the rate inside the momentum": MOMENTUM,
    "a rate that falls": """
        class SGD(torch.optim.Optimizer):
            def __init__(self, params, lr=1e-3):
                super().__init__(params, {"lr": lr})

            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            t = self.state[p].get("t", 0)
                            p.data -= group["lr"] / math.sqrt(t + 1) * p.grad.data
                            self.state[p]["t"] = t + 1
        """,
    "numbers of its own": """
        class AdamOptimizer:
            def __init__(self, params, lr=0.001):
                self.params, self.lr, self.t, self.m, self.v = list(params), lr, 0, {}, {}

            @torch.no_grad()
            def step(self):
                self.t += 1
                for p in (p for p in self.params if p.grad is not None):
                    m = self.m[p] = 0.9 * self.m.get(p, 0) + 0.1 * p.grad
                    v = self.v[p] = 0.95 * self.v.get(p, 0) + 0.05 * p.grad**2
                    p -= self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.95**self.t)) ** 0.5 + 1e-6)

            def zero_grad(self): ...
        """,
}  # fmt: skip


@pytest.mark.parametrize("code", RIGHT.values(), ids=RIGHT)
def test_right_optimizers_pass_both_laws(tmp_path, code):
    subject = subject_of(tmp_path, code)
    for law in (RULE, APART):
        found = judge(CHECKS[law], subject, {})
        assert found.outcome == "passed", found.says
        assert not found.remarks


PAPER = STATEFUL.replace('-group["lr"] * group["weight_decay"]', '-group["weight_decay"]')
COUPLED = STATEFUL.replace("grad, state = p.grad,", 'grad, state = p.grad + group["weight_decay"] * p,').replace(
    'p.add_(p, alpha=-group["lr"] * group["weight_decay"])', "")  # fmt: skip
CORRECTION = ' * math.sqrt(1 - b2 ** state["t"]) / (1 - b1 ** state["t"])'
SECOND = "self.v[i] / (1 - self.b2**self.t)"
BETAS = "b1, b2 = group"
SIGNED, LATER = "m.clone().mul_(beta1).add(p.grad, alpha=1 - beta1)", "m.mul_(beta2).add_(p.grad, alpha=1 - beta2)"
EARLY = LION.replace("\n                    " + LATER, "").replace(SIGNED, LATER + ".clone()")
TALL = MUON.replace("if G.size(0) > G.size(1):\n            X = X.T", "").replace(
    "return X.T if G.size(0) > G.size(1) else X", "return X if G.size(0) <= G.size(1) else G")  # fmt: skip
COUNTED = LISTED.replace("            self.t += 1\n", "").replace(
    "                    continue\n", "                    continue\n                self.t += 1\n")  # fmt: skip
DECAYING = 'if p.grad is None and p.mul_(1 - group["lr"] * group["weight_decay"]) is not None:'
WRONG = {
    "no bias correction": (RULE, ["after 1 step,", "no bias correction"], STATEFUL.replace(CORRECTION, "")),
    "half of it": (RULE, ["only the first moment is corrected"], LISTED.replace(SECOND, "self.v[i]")),
    "not counted": (RULE, ["after 2 steps,", "are not counted"], LISTED.replace("self.t += 1", "self.t = 1")),
    "decay in the gradient": (RULE, ["part of the gradient (L2, as in Adam)"], COUPLED),
    "betas swapped": (RULE, ["beta1 and beta2 have changed places"], STATEFUL.replace(BETAS, "b2, b1 = group")),
    "eps forgotten": (RULE, ["nan", "eps is left out"], LISTED.replace("(v_hat.sqrt() + self.eps)", "v_hat.sqrt()")),
    "eps squared": (RULE, ["the published rule"], LISTED.replace("+ self.eps)", "+ self.eps**2)")),
    "no root": (RULE, ["the root of the second moment"], LISTED.replace("v_hat.sqrt()", "v_hat")),
    "no square": (RULE, ["|g|, not of g²"], LISTED.replace("p.grad**2", "p.grad.abs()")),
    "upwards": (RULE, ["by -0.1089, should be +0.1089"], MOMENTUM.replace("p.add_(v)", "p.sub_(v)")),
    "momentum lost": (RULE, ["the momentum is not kept"], MOMENTUM.replace("v.mul_(self.mu)", "v.mul_(0)")),
    "no root of squares": (RULE, ["root of the squares"], SQUARES.replace("torch.sqrt(s + self.eps)", "(s + 0.01)")),
    "Lion without sign": (RULE, ["not by its sign"], LION.replace(".sign_()", "")),
    "Lion too early": (RULE, ["beta1 has no effect"], EARLY),
    "Muon without a pass": (RULE, ["singular values", "should be about equal"], MUON.replace("steps=5", "steps=0")),
    "Muon of tall matrices": (RULE, ["8×5", "about equal"], TALL),
    "counted for each parameter": (APART, ["parameter 0 of 3", "alone"], COUNTED),
    "one state": (APART, ["together raises"], LISTED.replace("[i]", "[0]")),
    "no gradient, and yet": (APART, ["moves a parameter that has no gradient"],
                             STATEFUL.replace("if p.grad is None:", DECAYING)),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "code"), WRONG.values(), ids=WRONG)
def test_wrong_optimizers_are_found(tmp_path, check, facts, code):
    subject = subject_of(tmp_path, code)
    found = judge(CHECKS[check], subject, {})
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says
    assert found.where.line > 20
    assert check == RULE or judge(CHECKS[RULE], subject, {}).outcome == "passed"


def test_decay_without_the_rate_is_a_remark_as_the_paper_has_it(tmp_path):
    found = judge(CHECKS[RULE], subject_of(tmp_path, PAPER), {})
    assert found.outcome == "passed"
    assert "not multiplied by the learning rate" in found.remarks[0]


OTHERS = {
    "no published rule is known": "class RAdam(torch.optim.RAdam): ...",
    "settings of its own (caution)": """
        class Lion(torch.optim.SGD):
            def __init__(self, params, lr, caution=0.0): super().__init__(params, lr)
        """,
    "settings of its own (amsgrad)": """
        class Adam(torch.optim.Adam):
            def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=True):
                super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
        """,
    "stepping it raises RuntimeError": """
        class SGD(torch.optim.SGD):
            def step(self): raise RuntimeError("no process group")
        """,
    "it chooses betas": """
        class Adam(torch.optim.Adam):
            def __init__(self, params, lr): super().__init__(params, lr, betas=(0.5, 0.6))
        """,
}


@pytest.mark.parametrize(("reason", "code"), OTHERS.items(), ids=OTHERS)
def test_what_has_no_known_rule_is_not_judged(tmp_path, reason, code):
    found = judge(CHECKS[RULE], subject_of(tmp_path, code), {})
    assert found.outcome == "not_applicable"
    assert reason in found.says


@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop", "Adagrad", "SGD"])
def test_the_rules_are_those_of_pytorch(name):
    """The first of each, by itself."""
    h = Settings(nesterov=False)
    adam = {"betas": h.betas, "eps": h.eps}
    given = {"AdamW": adam, "Adam": adam, "SGD": {"momentum": h.momentum},
             "RMSprop": {"alpha": h.alpha, "eps": h.eps}, "Adagrad": {"eps": h.eps}}[name]  # fmt: skip
    p = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([p], lr=h.lr, weight_decay=h.weight_decay, **given)
    grads = list(torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    rules = RULES[name.lower()]
    start = p.detach().clone()
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    assert any(torch.allclose(rule(start, grads, h)[-1], p.detach(), rtol=1e-10, atol=0) for rule in rules)
