"""Names that do not exist are refused with the names that come near and those that are known."""

import pytest

from dnw_graph import InputError, NeuralGraph
from dnw_graph.models import create_model, model_names
from dnw_graph.node_functions import NormReluConv
from dnw_graph.propagation import MessagePassingPropagation


@pytest.mark.parametrize(
    ("make", "kind", "near"),
    [
        (lambda: NeuralGraph((3, 4), 2, wiring="DNV"), "wiring", "dnw"),
        (lambda: NeuralGraph((3, 4), 2, wiring="randomgraph"), "wiring", "random_graph"),
        (lambda: NeuralGraph((3, 4), 2, node_function="norm_relu_con"), "node function", "norm_relu_conv"),
        (lambda: NeuralGraph((3, 4), 2, dynamics="statik"), "dynamics", "static"),
        (lambda: NeuralGraph((3, 4), 2, propagation="blocks"), "propagation", "block"),
        (lambda: NeuralGraph((3, 4), 2, propagation="message-passing"), "propagation", "message_passing"),
        (lambda: NeuralGraph((3, 4), 2, propagation="Auto"), "propagation", "auto"),
        (lambda: MessagePassingPropagation("cst"), "adjacency", "csr"),
        (lambda: NormReluConv(3, norm="batchnorm"), "norm", "batch"),
        (lambda: create_model("mobilenetv1_dnw"), "model", "mobilenet_v1_dnw"),
        (lambda: create_model("mobilenet_v1_dnw", widht=0.5), "option of model 'mobilenet_v1_dnw'", "width"),
        (lambda: create_model("mobilenet_v1", num_class=10), "option of model 'mobilenet_v1'", "num_classes"),
    ],
)
def test_near_names_are_offered(make, kind, near):
    with pytest.raises(InputError) as error:
        make()
    message = str(error.value)
    assert message.startswith(f"unknown {kind} ")
    assert f"'{near}'" in message.split("did you mean")[1].split("?")[0]
    assert "known are" in message
    assert "\n" not in message


def test_without_a_near_name_the_known_ones_are_listed():
    with pytest.raises(InputError) as error:
        create_model("zzz")
    assert "did you mean" not in str(error.value)
    assert all(repr(name) in str(error.value) for name in model_names())


@pytest.mark.parametrize("option", ["wiring", "dynamics", "propagation"])
def test_what_is_neither_a_name_nor_an_object_is_refused(option, unchecked):
    with pytest.raises(InputError, match=f"NeuralGraph: {option} must be a string or a {option.title()}; got 7"):
        NeuralGraph((3, 4), 2, **{option: 7})
