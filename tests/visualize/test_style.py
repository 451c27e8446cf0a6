"""The colours of pictures are told apart with any kind of colour vision."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dnw_graph.visualize import style

MEANINGS = ("POSITIVE", "NEGATIVE", "BORN", "GONE", "KEPT", "LIVE")
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colour, seen):
    """CIELAB of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ (seen @ linear).clip(0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", SEEN)
def test_no_two_meanings_look_alike(kind):
    found = {name: lab(getattr(style, name), np.array(SEEN[kind])) for name in MEANINGS}
    for one, other in combinations(MEANINGS, 2):
        assert np.linalg.norm(found[one] - found[other]) > 15, (one, other)
    assert min(np.linalg.norm(lab("white", np.array(SEEN[kind])) - each) for each in found.values()) > 15
