"""Top-KAST: always sparse training."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.dnw import DNW
from dnw_graph.wirings.view import View


class TopKAST(DNW):
    r"""The k candidates of largest |w| are real; the M next ones are trained too (Jayakumar et al. 2021).

    arXiv 2106.03517. The forward pass uses E, the top k. The gradient and the optimiser reach B, the top k + M; all
    other candidates are frozen, with their optimiser state. With D = k/n, the penalty of the loss is

    .. math:: \frac{\lambda}{2} \left(\|w_E\|^2 + \frac{1}{D} \|w_{B \setminus E}\|^2\right);

    add :func:`dnw_graph.wiring_penalty` to the loss. In sparseml's version λ is multiplied by momentum; here it is an
    ordinary term of the loss. With M = n - k and λ = 0 this is ``"dnw"``.

    Args:
        extra: M: a number of candidates, or a share of all of them.
        strength: λ.

    Raises:
        InputError: If M or λ is negative, or M is a share above 1.
    """

    trained = "own"

    @checked
    def __init__(self, extra: int | float = 0.1, strength: float = 1e-4) -> None:
        super().__init__()
        possible = extra >= 0 and (isinstance(extra, int) or extra <= 1)
        require(possible, "extra", "a number of candidates, or a share of them within 0 … 1", extra)
        require(strength >= 0, "strength", "0 or more", strength)
        self.extra, self.strength = extra, strength

    def trained_edges(self, view: View) -> Tensor:
        """Return B."""
        extra = self.extra if isinstance(self.extra, int) else round(self.extra * view.num_candidates)
        return self.largest(view, min(view.k + extra, view.num_candidates))

    def penalty(self, view: View) -> Float[Tensor, ""] | None:
        """Return the penalty on B."""
        if not self.strength:
            return None
        squares = view.weight.square()
        real, both = (squares[index].sum() for index in (self.choose(view), self.trained_edges(view)))
        return self.strength / 2 * (real + (both - real) * view.num_candidates / view.k)
