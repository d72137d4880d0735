"""Options of a model that contradict each other."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("load_balancing=aux_loss", "`aux_loss` needs a load_balancing_coefficient"),
        ("load_balancing_coefficient=0.001", "load_balancing is `none`; choose a loss for it"),
        ("load_balancing=seq_aux_loss", "expected 'none', 'aux_loss' or 'global_aux_loss', got 'seq_aux_loss'"),
    ],
)
def test_losses_of_routers_and_their_coefficients_go_together(small, write, override, message) -> None:
    with pytest.raises(UserError, match=f"model.router.*: .*{message}"):
        load_config(write("run.yaml", small), [f"model.router.{override}"])
