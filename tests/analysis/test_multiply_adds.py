"""Any module: the count against PyTorch's own counter, torchvision's published figures and counts by hand."""

import pytest
import torch
from pairs import rest_is_slow
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, get_model, get_model_weights

from dnw_graph import InputError, NeuralGraph
from dnw_graph.analysis.cost import CostRow, cost
from dnw_graph.models import MobileNetV1


def counted_by_pytorch(model, input_size):
    """Multiply-adds as PyTorch's own counter sees them.

    Not every version counts a fused attention: here it is computed by two products, and with gradients, without which
    a whole encoder layer can be fused.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


TWICE = nn.Conv2d(3, 3, 3, padding=1)
CONVOLUTIONS = [nn.Conv2d(4, 6, (3, 5), (2, 1), bias=False), nn.Conv2d(6, 6, 3, groups=3)]
TRANSPOSED = [nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 3, dilation=2)]
LAYERS = [
    ("convolutions", nn.Sequential(*CONVOLUTIONS), (4, 11, 13)),
    ("transposed", nn.Sequential(*TRANSPOSED), (4, 5, 7)),
    ("one dimension", nn.Sequential(nn.Conv1d(4, 6, 3, 2, groups=2), nn.ConvTranspose1d(6, 3, 4)), (4, 19)),
    ("three dimensions", nn.Sequential(nn.Conv3d(2, 4, (1, 3, 3)), nn.ConvTranspose3d(4, 2, 2)), (2, 4, 6, 5)),
    ("linear", nn.Sequential(nn.Flatten(), nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 3, 3)),
    ("linear at four places", nn.Linear(5, 3), (4, 5)),
    ("one layer twice", nn.Sequential(TWICE, nn.ReLU(), TWICE), (3, 6, 6)),
    ("transformer", nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (5, 16)),
    ("cells", nn.GRU(16, 8, batch_first=True), (5, 16)),
]
TORCHVISION = ["mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "resnet18", "mnasnet0_5", "convnext_tiny", "swin_t"]
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
MODELS = [
    ("MobileNetV1 ×0.25", lambda: MobileNetV1(0.25, num_classes=10), (3, 96, 64)),
    ("MobileNetV1 ×0.5", lambda: MobileNetV1(0.5, num_classes=10, stem_stride=1), (3, 32, 32)),
    ("vision transformer", lambda: VisionTransformer(**VIT), (3, 32, 32)),
    *((name, lambda name=name: get_model(name), (3, 64, 64)) for name in TORCHVISION),
]


def check_parameters(model, input_size, result):
    """All of them count, as in torchvision's figures; in the paper's, those of norms do not."""
    assert result.parameters == sum(p.numel() for p in model.parameters())
    norms = nn.BatchNorm2d | nn.LayerNorm
    kept = {p for m in model.modules() if not isinstance(m, norms) for p in m.parameters(recurse=False)}
    assert cost(model, input_size, paper=True).parameters == sum(p.numel() for p in kept)


@pytest.mark.parametrize(("name", "layer", "input_size"), LAYERS, ids=[name for name, *_ in LAYERS])
def test_layers_cost_what_pytorch_counts(name, layer, input_size):
    result = cost(layer, input_size)
    assert result.multiply_adds == counted_by_pytorch(layer, input_size) > 0
    check_parameters(layer, input_size, result)


@pytest.mark.parametrize(("name", "build", "input_size"), rest_is_slow(MODELS, 6), ids=[name for name, *_ in MODELS])
def test_dense_models_cost_what_pytorch_counts(name, build, input_size):
    model = build()
    result = cost(model, input_size)
    assert result.multiply_adds == counted_by_pytorch(model, input_size) > 0
    check_parameters(model, input_size, result)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0", "mnasnet0_5"])
def test_torchvision_s_models_cost_what_it_publishes(name):
    published = next(iter(get_model_weights(name))).meta
    model = get_model(name)
    result = cost(model, (3, 224, 224))
    assert result.parameters == published["num_params"]
    assert abs(result.multiply_adds / 1e9 - published["_ops"]) <= 0.0005001


@pytest.mark.parametrize(
    "name", rest_is_slow(["vit_tiny_patch16_224", "mobilenetv2_050", "mnasnet_small", "xception41"])
)
def test_timm_s_models_cost_what_pytorch_counts(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    size = (3, 224, 224) if name.startswith("vit") else (3, 64, 64)
    assert cost(model, size).multiply_adds == counted_by_pytorch(model, size)


def encoder_layer(tokens, width, hidden):
    """Four projections, a perceptron, and for every two tokens a product of their vectors in scores and in values."""
    return tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width


def test_an_encoder_layer_by_hand():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    assert cost(layer, (5, 16)).multiply_adds == encoder_layer(5, 16, 32) == 11_040


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_by_hand(need_weights):
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x[:, :3], x, x, need_weights=need_weights)[0]

    # Three queries, seven keys and values.
    by_hand = 2 * 3 * 8**2 + 2 * 7 * 8**2 + 2 * 3 * 7 * 8
    assert cost(Attention(8, 2, batch_first=True), (7, 8)).multiply_adds == by_hand


def test_timm_s_vision_transformer_by_hand():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224")
    tokens, width = 14**2 + 1, 192
    embedding, head = 14**2 * width * 3 * 16**2, width * 1000
    assert cost(model, (3, 224, 224)).multiply_adds == embedding + 12 * encoder_layer(tokens, width, 4 * width) + head


def test_parts_of_a_vision_transformer_by_hand():
    tokens, width, hidden = 17, 16, 24
    model = VisionTransformer(**VIT, num_classes=10)
    block = encoder_layer(tokens, width, hidden)
    assert [(row.name, row.multiply_adds) for row in cost(model, (3, 32, 32)).rows] == [
        ("VisionTransformer", 0),  # the class token
        ("conv_proj", 16 * width * 3 * 8**2),
        ("encoder", 2 * block),
        ("heads", width * 10),
    ]


def test_recurrent_layers_by_hand():
    lstm = nn.LSTM(6, 4, num_layers=2, batch_first=True, bias=False)
    per_step = 4 * 4 * (6 + 4) + 4 * 4 * (4 + 4)  # four gates of four units, in two layers
    assert cost(lstm, (5, 6)).rows == (CostRow("LSTM", per_step, 5 * per_step),)
    assert torch.backends.mkldnn.enabled


class Functional(nn.Module):
    """Products of its own around two layers, one of which it calls past the list that holds it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        self.blocks = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(4, 4, bias=False))
        self.blocks[1].weight = nn.Parameter(self.blocks[1].weight)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.blocks[0].weight

    def forward(self, x):
        z = F.linear(self.tied(self.blocks[0](x)), self.weight)  # 5 × 6 → 5 × 4
        z = torch.einsum("bij,bkj->bik", self.blocks[1](z), z)  # 5 × 5
        vector = z @ torch.ones(5)  # 5 × 5 → 5
        return torch.addmv(vector[0], z[0], vector[0]) + torch.dot(vector[0], vector[0])


def test_products_of_the_model_itself_and_tied_weights_by_hand():
    assert cost(Functional(), (5, 6)).rows == (
        CostRow("Functional", 24, 5 * 24 + 5 * 4 * 5 + 5 * 5 + 5 * 5 + 5),
        CostRow("blocks", 36 + 16, 5 * 36 + 5 * 16),
        CostRow("tied", 0, 5 * 36),  # its weight is counted where it was first met
    )


def test_entries_of_a_list_have_rows_of_their_own():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 3)])])

        def forward(self, x):
            return self.layers[1][0](self.layers[0](x))

    assert [row.name for row in cost(Lists(), (2,)).rows] == ["layers.0", "layers.1.0"]


@pytest.mark.parametrize("propagation", ["block", "message_passing", "auto"])
def test_dense_products_around_a_graph_are_counted_and_its_zeros_are_not(propagation):
    graph = NeuralGraph((4, 3), 5, node_function=nn.Identity(), propagation=propagation)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), graph, nn.Linear(3, 2, bias=False))
    assert [row.multiply_adds for row in cost(model, (4,)).rows] == [16, 5, 6]


def test_half_precision_and_models_without_parameters():
    assert cost(nn.Conv2d(3, 2, 1).to(torch.bfloat16), (3, 4, 4)).multiply_adds == 96
    assert cost(nn.ReLU(), (3, 4, 4)).multiply_adds == 0


def test_a_fused_operator_without_a_formula_is_refused():
    class Both(nn.Bilinear):
        def forward(self, x):
            return super().forward(x, x)

    with pytest.raises(InputError, match=r"operator aten::\w+ are unknown.*register_flop_formula"):
        cost(Both(3, 3, 2), (3,))
    with pytest.raises(InputError, match="scripted"):
        cost(nn.Sequential(torch.jit.script(nn.Linear(4, 3))), (4,))


def test_a_formula_makes_an_operator_countable():
    @torch.library.custom_op("dnw_graph_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Twice(nn.Module):
        def forward(self, x):
            return twice(x)

    with pytest.raises(InputError, match="dnw_graph_test::twice"):
        cost(Twice(), (3, 2))
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operator = torch.ops.dnw_graph_test.twice
    register_flop_formula(operator)(lambda x, **_: 2 * x[1] * x[2])
    try:
        assert cost(Twice(), (3, 2)).multiply_adds == 6
    finally:
        del flop_registry[operator]


@pytest.mark.parametrize("input_size", [(), (3, 0, 4), 224, "224", (3, 4.0, 4)])
def test_a_size_that_is_none_is_refused(input_size, unchecked):
    with pytest.raises(
        InputError,
        match=r"such as \(3, 224, 224\); got|input_size must be a sequence of integers; got",
    ):
        cost(nn.Conv2d(3, 2, 1), input_size)


@pytest.mark.parametrize("input_size", [(4, 8, 8), (3, 8), (3, 2, 2)])
def test_an_image_that_the_model_cannot_take_is_refused(input_size, unchecked):
    with pytest.raises(InputError, match=r"Conv2d cannot take one image of size \(.*\) \(RuntimeError: .*; give the"):
        cost(nn.Conv2d(3, 2, 3), input_size)
    with pytest.raises(InputError, match="AssertionError"):
        cost(VisionTransformer(**VIT), (3, 16, 16))
    with pytest.raises(InputError, match=r"the input must be a tensor of float32 \[batch, 2, "):
        cost(NeuralGraph((2, 3), 3), (5, 4, 4))


def test_lazy_modules_are_refused():
    with pytest.raises(InputError, match="lazy modules"):
        cost(nn.Sequential(nn.LazyLinear(3)), (4,))
