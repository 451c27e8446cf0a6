"""Steps of training that leave the weights as they are."""

import torch

from dnw_graph import attach


def attached(model, num_steps=None, **options):
    """Attach a model to an optimiser that moves nothing; returns its ``step``."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    attach(model, optimiser, num_steps, **options)
    return optimiser.step
