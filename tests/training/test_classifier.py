from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dnw_graph.training import Classifier, ImageData, RunOptions, cosine, read_checkpoint, run
from dnw_graph.training.data_module import DataModule


def test_cosine_is_that_of_pytorch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(41):
        assert cosine(40)(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()
    assert (cosine(40)(0), cosine(40)(40)) == (1, 0)


def test_a_run_is_sgd_over_the_same_batches(
    create: Callable[[int, int], nn.Module], small_digits: ImageData, options: Callable[..., RunOptions]
):
    """Against a plain loop, which reads the order from the sampler but does the rest by itself."""

    def without_dropout(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        model.dropout.p = 0.0
        return model

    chosen = options(epochs=2, lr=0.2, weight_decay=1e-2)
    run(without_dropout, {}, chosen, small_digits)
    trained = read_checkpoint(f"{chosen.output}/last.ckpt")["state_dict"]

    torch.manual_seed(chosen.seed)
    model = without_dropout(10, 8)
    data = DataModule(small_digits, chosen)
    from dnw_graph.training.images import TrainSamples
    from dnw_graph.training.order import TrainOrder

    samples = TrainSamples(small_digits.train, data.train_transform, chosen.seed)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(8):
        keys = next(iter(TrainOrder(70, 16, chosen.seed, lambda: step)))  # noqa: B023
        batch = [samples[key] for key in keys]
        x, y = torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        lr = 0.2 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8, dtype=torch.float64)).item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                momentum[name] = 0.9 * momentum[name] + p.grad + 1e-2 * p
                p -= lr * momentum[name]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"model.{name}"], value, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_the_scores(small_digits: ImageData):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(3 * 8 * 8, 10)

        def forward(self, x):
            return self.projection(x.flatten(1))

    torch.manual_seed(0)
    module = Classifier(Scores(), 10, cosine(1), 0.1, 0.9, 0.0, seed=0)
    data = DataModule(small_digits, RunOptions(image_size=8, batch_size=7, accelerator="cpu"))
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = trainer.validate(module, data, verbose=False)[0]
    images = small_digits.test
    x = torch.stack([data.test_transform(images.load(i)) for i in range(len(images))])
    y = torch.tensor(images.labels)
    with torch.no_grad():
        scores = module(x)
    best = scores.argsort(1, descending=True)
    assert found["val/top1"] == pytest.approx((best[:, 0] == y).double().mean().item())
    assert found["val/top5"] == pytest.approx((best[:, :5] == y[:, None]).any(1).double().mean().item())
    assert found["val/loss"] == pytest.approx(nn.functional.cross_entropy(scores, y).item(), rel=1e-5)
