import torch
from torch import nn

from peft_loramoe.analysis.adapted import device_of


def test_the_device_is_that_of_the_first_parameters_with_values():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert device_of(model) == torch.device("cpu")
