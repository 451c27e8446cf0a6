import torch
from pairs import every_pair

from dnw_graph.ops.layout import batch_last, is_batch_last

SHAPES = [
    (128, 7, 5, 3),
    (17, 33, 3, 4),
    (16, 16, 1, 1),
    (33, 70, 2, 5),
    (1, 4, 3, 3),
    (4, 1, 2, 2),
    (3, 4),
    (2, 3, 4),
    (0, 3, 2, 2),
]


@every_pair(shape=SHAPES, nodes_last=[True, False], dtype=[torch.float32, torch.float64, torch.bfloat16])
def test_same_values_in_another_layout(shape, nodes_last, dtype):
    z = torch.randn(shape, dtype=dtype)
    if nodes_last:
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
    z.requires_grad_()
    out = batch_last(z)
    assert is_batch_last(out)
    assert torch.equal(out, z)
    grad = torch.randn(shape, dtype=dtype)
    for layout in (grad, batch_last(grad)):
        z.grad = None
        out.backward(layout, retain_graph=True)
        assert torch.equal(z.grad, grad)


def test_nothing_is_copied_twice():
    z = batch_last(torch.randn(4, 3, 2, 2))
    assert batch_last(z) is z


def test_second_derivatives():
    z = torch.randn(3, 4, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: batch_last(z) ** 3, z)
