"""Small runs for the tests of files."""

import torch


def network():
    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)]
    return torch.nn.Sequential(*layers)


def trained(optimizer=torch.optim.AdamW, groups=lambda model: model.parameters(), model=None, **options):
    torch.manual_seed(0)
    model = network() if model is None else model
    opt = optimizer(groups(model), **{"lr": 0.01} | options)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        opt.step()
    return model, opt


def two_groups(model):
    """As transformers' Trainer makes them: what is decayed, then what is not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
