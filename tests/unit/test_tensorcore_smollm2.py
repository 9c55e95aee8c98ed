"""heal against FP32 on SmolLM2's own activations and weights.

Below some 10 rows MKL's FP32 kernel keeps more partial sums and errs half as much, so the
comparison is made with more rows than that.
"""

import pytest
import torch

from healpass.integrations import smollm2
from healpass.tensorcore import heal_matmul

pytestmark = pytest.mark.model
IDS = torch.arange(100, 132)[None]


@pytest.fixture(scope="module")
def layers():
    """Inputs `[T, K]` and BF16 weights `[N, K]` of the first two blocks' linear layers."""
    model, _ = smollm2.load(torch.float32)
    found = []
    for module in model.model.layers[:2].modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda m, inputs: found.append((inputs[0][0], m.weight.detach().bfloat16()))
            )
    with torch.no_grad():
        model(IDS)
    return found


@pytest.mark.parametrize("rule", ["fp32", "v100", "a100", "h100"])
def test_errors_are_at_most_those_of_fp32(layers, rule):
    ratios = []
    for activation, weight in layers:
        exact = activation.double() @ weight.double().t()
        heal = heal_matmul(activation, weight.t(), rule).double()
        fp32 = (activation @ weight.float().t()).double()
        ratios.append(((heal - exact).norm() / (fp32 - exact).norm()).item())
    print(f"{rule}: median {sorted(ratios)[len(ratios) // 2]:.2f}, worst {max(ratios):.2f}")
    assert sorted(ratios)[len(ratios) // 2] <= 1
    assert max(ratios) <= 1.2
