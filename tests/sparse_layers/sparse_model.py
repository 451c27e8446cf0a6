"""A small vision transformer, images to train it on, and a loop."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from dnw_graph import SparseMomentum, TargetedDropout, attach

RULES = {
    "dnw": "dnw",
    "random_graph": "random_graph",
    "sparse_momentum": SparseMomentum(0.5, every=2),
    "targeted_dropout": TargetedDropout(0.5),
}


def make_model(dtype=torch.float64, num_layers=1):
    torch.manual_seed(4)
    model = VisionTransformer(
        image_size=8, patch_size=2, num_layers=num_layers, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts from zeros
    return model.to(dtype)


def batches(count=6, size=16, dtype=torch.float64):
    """Batches of digits as images of three channels, and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=dtype).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 8 - 1
    y = torch.tensor(labels)
    return [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(count)]


def train(model, data, call=None, optimiser=None):
    """A plain loop; the losses."""
    call = model if call is None else call
    optimiser = optimiser or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(call, optimiser, len(data))
    losses = []
    for x, y in data:
        optimiser.zero_grad()
        loss = F.cross_entropy(call(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
