"""What a model holds: its mode, set without a walk over its modules where nothing is to change."""

import pytest
from torch import nn

from transformer_checks.checks.probes.module_state import set_mode


@pytest.mark.parametrize("training", [True, False])
def test_one_submodule_left_in_the_other_mode_is_seen(training):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1), nn.ReLU())).train(training)
    model[1][0].train(not training)
    set_mode(model, training)
    assert [module.training for module in model.modules()] == [training] * 5


def test_a_train_method_of_its_own_is_called_only_for_a_change():
    class Counts(nn.Module):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    model = Counts()
    set_mode(model, False)
    set_mode(model, False)
    assert model.calls == 1 and not model.training
