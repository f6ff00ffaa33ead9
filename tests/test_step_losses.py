"""What a step tells the host is what its micro batches gave."""

import math

import pytest
import torch
from torch import Tensor

from train.step_losses import StepLosses


def losses(loss: float, sums: list[float], **others: float) -> dict[str, Tensor]:
    scalars = {name: torch.tensor(value) for name, value in ({"loss": loss} | others).items()}
    return scalars | {"tasks": torch.tensor([sums, [2.0, 3.0], [1.0, 0.5]])}


def test_each_value_comes_back_under_its_name() -> None:
    told = StepLosses.fetch([losses(0.5, [4.0, 6.0], aux=1.25), losses(-2.5, [8.0, 0.0], aux=3.0)])
    assert told.scalars == [{"loss": 0.5, "aux": 1.25}, {"loss": -2.5, "aux": 3.0}]
    assert told.tasks.tolist() == [[[4, 6], [2, 3], [1, 0.5]], [[8, 0], [2, 3], [1, 0.5]]]
    assert told.everywhere.tolist() == [[12, 6], [4, 6]]
    assert told.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_noticed(bad: float) -> None:
    told = StepLosses.fetch([losses(1.0, [1.0, 1.0]), losses(bad, [bad, 1.0]), losses(2.0, [1.0, 1.0])])
    assert not told.finite
    assert [math.isfinite(scalars["loss"]) for scalars in told.scalars] == [True, False, True]
