"""Losses of codec training: arithmetic by hand, and the balance between losses of any size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from speechllm.codec.layers import LogMel
from train.codec_losses import (
    Balancer,
    Discriminator,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    mel_loss,
    spectral_loss,
)

MEL = LogMel(16000, 32)


def mel(made: Tensor, real: Tensor) -> Tensor:
    return mel_loss(made, real, MEL)


@pytest.mark.parametrize("loss", [spectral_loss, mel])
def test_spectral_losses_are_zero_for_the_same_and_grow_with_the_difference(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    wav, noise = (torch.randn(2, 8000, generator=generator) for _ in range(2))
    losses = [loss(0.1 * wav + scale * noise, 0.1 * wav).item() for scale in (0.0, 0.01, 0.1)]
    assert losses[0] == 0
    assert losses[0] < losses[1] < losses[2]


def test_mel_loss_of_half_the_amplitude() -> None:
    wav = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    # the natural log of a power that is a quarter, on the scale of the features (a fourth)
    assert mel(0.5 * wav, wav).item() == pytest.approx(torch.tensor(4.0).log().item() / 4, rel=1e-4)


def test_hinge_losses_by_hand() -> None:
    made = [torch.tensor([[-3.0, -0.5]]), torch.tensor([2.0])]
    real = [torch.tensor([[0.5, 4.0]]), torch.tensor([-1.0])]
    # real: (0.5 + 0) / 2 and 2; made: (0 + 0.5) / 2 and 3
    assert hinge_discriminator(made, real).item() == pytest.approx((0.25 + 0.25 + 2 + 3) / 2)
    # (4 + 1.5) / 2 and 0
    assert hinge_generator(made).item() == pytest.approx(2.75 / 2)


def test_feature_distance_is_relative_to_the_real_features() -> None:
    real = [[torch.tensor([1.0, -3.0]), torch.tensor([10.0])], [torch.tensor([0.0, 0.5])]]
    made = [[torch.tensor([2.0, -3.0]), torch.tensor([5.0])], [torch.tensor([0.0, 0.5])]]
    # (1 + 0) / 2 by a mean of 2; 5 by 10; nothing
    assert feature_distance(made, real).item() == pytest.approx((0.25 + 0.5 + 0) / 3)


def test_discriminator_learns_to_tell_and_the_codec_to_deceive() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(filters=2, windows=(128, 64))
    seconds = torch.arange(1600) / 16000
    real = torch.sin(2 * torch.pi * torch.tensor([[200.0], [300.0]]) * seconds)
    made = (0.3 * torch.randn(2, 1600)).requires_grad_()
    assert discriminator(real, real).features.item() == pytest.approx(0, abs=1e-6)

    own = list(discriminator.parameters())
    optimizer = torch.optim.Adam(own, 0.01)
    first = discriminator(made, real)
    for _ in range(30):
        optimizer.zero_grad()
        discriminator(made, real).discriminator.backward(inputs=own)
        optimizer.step()
    assert made.grad is None
    last = discriminator(made, real)
    assert last.discriminator < 0.5 * first.discriminator
    assert last.adversarial > first.adversarial

    optimizer.zero_grad()
    Balancer({"adversarial": 1.0, "features": 1.0}).backward(
        {"adversarial": last.adversarial, "features": last.features}, made
    )
    assert made.grad is not None
    assert all(parameter.grad is None for parameter in own)
    last.discriminator.backward(inputs=own)  # the graph is still there for its own loss
    assert all(parameter.grad is not None for parameter in own)


def gradient(balancer: Balancer, point: list[float], targets: dict[str, list[float]], scale: float = 1.0) -> Tensor:
    """The balanced gradient at ``point`` of half the squared distances from ``targets``; the last times ``scale``."""
    source = torch.tensor(point, requires_grad=True)
    output = source * 1.0
    losses = {name: 0.5 * (output - torch.tensor(target)).square().sum() for name, target in targets.items()}
    last = list(losses)[-1]
    losses[last] = losses[last] * scale
    balancer.backward(losses, output)
    assert source.grad is not None
    return source.grad


def test_balancer_by_hand() -> None:
    """Gradients are (3, 4) and (0, -2): norms 5 and 2. Weights 3 and 1."""
    made = gradient(Balancer({"a": 3.0, "b": 1.0}), [3.0, 4.0], {"a": [0.0, 0.0], "b": [3.0, 6.0]})
    assert made.tolist() == pytest.approx([0.75 * 0.6, 0.75 * 0.8 - 0.25])


def test_balancer_divides_by_the_average_norm_of_all_steps() -> None:
    balancer = Balancer({"a": 1.0}, decay=0.5)
    assert gradient(balancer, [4.0], {"a": [0.0]}).item() == pytest.approx(1)
    # norms 4 and 1, the older counting half: (2 + 1) / 1.5
    assert gradient(balancer, [1.0], {"a": [0.0]}).item() == pytest.approx(0.5)


def test_balancer_starts_each_loss_when_it_first_comes() -> None:
    balancer = Balancer({"a": 1.0, "b": 1.0})
    for _ in range(3):
        assert gradient(balancer, [8.0], {"a": [0.0]}).item() == pytest.approx(1)  # alone it has the whole gradient
    assert gradient(balancer, [8.0], {"a": [0.0], "b": [10.0]}).item() == pytest.approx(0.5 - 0.5)
    assert gradient(Balancer({"a": 1.0}), [0.0], {"a": [0.0]}).item() == 0  # no gradient at all: nothing to divide by


def test_the_scale_of_a_loss_does_not_matter() -> None:
    plain, scaled = (Balancer({"a": 1.0, "b": 2.0}) for _ in range(2))
    for point in ([1.0, 2.0], [-3.0, 0.5], [0.1, 0.1]):
        targets = {"a": [0.0, 1.0], "b": [5.0, -1.0]}
        expected = gradient(plain, point, targets)
        assert torch.allclose(gradient(scaled, point, targets, scale=1000.0), expected, rtol=1e-5)


def test_balancer_propagates_the_loss_beside_as_it_is() -> None:
    source = torch.tensor([2.0, 5.0], requires_grad=True)
    output = source * 3
    Balancer({"a": 1.0}).backward({"a": 100 * output[0]}, output, beside=7 * source[1])
    assert source.grad is not None
    assert source.grad.tolist() == [3.0, 7.0]


def test_a_balancer_that_was_saved_goes_on_the_same() -> None:
    steps = [torch.randn(2, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
    whole, stopped = (Balancer({"a": 1.0, "b": 2.0}, decay=0.9) for _ in range(2))
    targets = {"a": [0.0, 1.0], "b": [5.0, -1.0]}
    expected = [gradient(whole, point, targets) for point in steps]
    for point in steps[:3]:
        gradient(stopped, point, targets)
    resumed = nn.ModuleDict({"balancer": Balancer({"a": 1.0, "b": 2.0}, decay=0.9)})
    resumed.load_state_dict(nn.ModuleDict({"balancer": stopped}).state_dict())
    balancer = resumed["balancer"]
    assert isinstance(balancer, Balancer)
    for point, found in zip(steps[3:], expected[3:], strict=True):
        assert torch.equal(gradient(balancer, point, targets), found)
