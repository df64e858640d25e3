"""The largest Hessian eigenvalue: of quadratics, of a tiny adapted model against torch.func, of runs at their start."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, hessian

from dual_lora import DualLoraConfig, set_update_scale
from dual_lora.analysis.curvature import compute_curvature
from dual_lora.lab.weights.curvature import compute_loss


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quadratic(eigenvalues, seed=0):
    """Return the parameters and the loss x^T H x / 2 for an H with these eigenvalues."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed))).Q
    H = Q @ torch.diag(torch.tensor(eigenvalues)) @ Q.T
    parts = [torch.randn(size, generator=generator(), requires_grad=True) for size in ((n - 4), (2, 2))]

    def loss():
        x = torch.cat([part.flatten() for part in parts])
        return x @ H @ x / 2

    return parts, loss, H


@pytest.mark.parametrize("eigenvalues", [[float(i) for i in range(30)], [-50.0, *[0.1] * 18, 7.0], [-3.0] * 8])
def test_the_largest_eigenvalue_of_a_quadratic_whatever_the_negative_ones(eigenvalues):
    parts, loss, _ = quadratic(eigenvalues)
    found = compute_curvature(loss, parts)
    assert found.eigenvalue == pytest.approx(max(eigenvalues), rel=1e-2)
    assert found.loss == pytest.approx(loss().item()) and 0 < found.products < 200
    assert compute_curvature(loss, parts) == found


def test_rates_of_their_own_scale_the_hessian():
    parts, loss, H = quadratic([1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0])
    scales = np.sqrt([1.0] * 3 + [16.0] * 4)
    expected = np.linalg.eigvalsh(scales[:, None] * H.double().numpy() * scales).max()
    assert compute_curvature(loss, parts, [1.0, 16.0]).eigenvalue == pytest.approx(expected, rel=1e-2)


def test_a_linear_loss_has_none_and_an_unused_parameter_counts_as_zeros():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert compute_curvature(lambda: x.sum(), [x]).eigenvalue == 0
    assert compute_curvature(lambda: (x**2).sum(), [x, unused]).eigenvalue == pytest.approx(2, rel=1e-3)
    assert compute_curvature(lambda: -(x**2).sum(), [x, unused]).eigenvalue == pytest.approx(0, abs=1e-5)


CONFIGS = {
    "lora": LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"]),
    "dora": LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], use_dora=True),
    "dual_lora": DualLoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], init_std=0.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tiny_adapted_model_has_the_curvature_of_torch_func(name):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), CONFIGS[name]).eval()
    if name == "dual_lora":
        set_update_scale(model, 1.0)
    x, y = torch.randn(16, 4, generator=generator()), torch.randint(3, (16,), generator=generator())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return nn.functional.cross_entropy(functional_call(model, values, (x,)), y)

    found = compute_curvature(lambda: loss({}), list(trained.values()))
    blocks = hessian(loss)({n: p.detach() for n, p in trained.items()})
    whole = torch.cat(
        [torch.cat([blocks[a][b].reshape(trained[a].numel(), -1) for b in trained], dim=1) for a in trained]
    )
    torch.testing.assert_close(whole, whole.T, atol=1e-5, rtol=1e-4)  # also with Sign's straight-through gradient
    assert found.eigenvalue == pytest.approx(torch.linalg.eigvalsh(whole).max().item(), rel=1e-2)


@pytest.mark.parametrize("form", ["classes", "generation"])
def test_the_loss_is_smoothed_as_in_training(form):
    shape, labels = (
        ((2, 5, 7), torch.tensor([[-100, 3, 1, 2, 6], [-100, -100, 4, 0, 5]]))
        if form == "generation"
        else ((4, 3), torch.tensor([0, 2, 1, 1]))
    )
    logits = torch.randn(shape, generator=generator())
    settings = SimpleNamespace(task=SimpleNamespace(label_smoothing=0.1))
    found = compute_loss(lambda labels: {"logits": logits}, {"labels": labels}, settings, SimpleNamespace(form=form))
    if form == "generation":  # a token is predicted from those before it
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
