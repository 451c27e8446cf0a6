"""Real images, and models as training leaves them."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import nn

from dnw_graph import CandidateEdges


@pytest.fixture(scope="session")
def photos():
    """Crops of scikit-learn's two photographs, [4, 3, 64, 64], float64, about normalised."""
    china, flower = (torch.tensor(image).permute(2, 0, 1) / 128 - 1.0 for image in load_sample_images().images)
    crops = [image[:, y : y + 256, x : x + 256] for image in (china, flower) for y, x in ((0, 0), (120, 300))]
    return F.interpolate(torch.stack(crops).double(), size=64, mode="area")


@pytest.fixture
def trained():
    """A function that gives a model norms with statistics of real images and with any scales and shifts."""

    def train(model, x):
        model.to(x.dtype).train()
        for module in model.modules():
            if isinstance(module, CandidateEdges):  # As large as they get, so that maps do not fade on their way.
                with torch.no_grad():
                    module.weight /= module.weight.abs().max()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
        with torch.no_grad():
            for _ in range(3):
                model(x)
        return model.eval()

    return train
