"""Weights that are ranked together, with their rule and k; decides when the real edges are chosen."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph._compat import backward_pass, in_backward_pass
from dnw_graph.arguments import checked, require, wrong
from dnw_graph.candidates import CandidateEdges, RankedWeight
from dnw_graph.chosen import Chosen
from dnw_graph.errors import InputError
from dnw_graph.ops.layout import plain_eager, transformed
from dnw_graph.seeding import generator_state
from dnw_graph.wirings import WIRINGS, View, Wiring, make_wiring, wiring_name, wiring_names
from dnw_graph.wirings.base import COUNTERS
from dnw_graph.wirings.saved import refuse_edges, saved_number

T = TypeVar("T")

NUMBERS = ("num_edges", "rule")
"""Entries of a graph's state besides weights and the rule's state; older files lack them."""


class Ranking(nn.Module):
    """Candidate weights, a rule and k: the common base of neural graphs and the weights of sparse layers.

    In training the real edges are chosen once per forward pass. In evaluation they are chosen after a switch from
    training, after ``load_state_dict``, and when the weights have changed, judging by object, storage, version and a
    sample of the values: all weights up to 2,048, otherwise about 128 per block and 64 real edges. This detects fused
    optimisers and averages that are copied in. After writing single weights of a large graph through ``.data``, call
    :meth:`update_wiring`.

    A subclass defines its ``weights``, and calls :meth:`rewire` once they exist.

    Args:
        name: Name in messages.

    Attributes:
        name: Name in messages.
        full_name: Name in the model after :func:`dnw_graph.attach`; before that ``name``.
        origin: Checksum of the state of PyTorch's generator when the graph was created.
        wiring: The rule.
        weights: The candidate weights: parameters, or parts of them.
        candidates: The candidates as blocks of sources × targets.
    """

    weights: Sequence[RankedWeight]
    candidates: CandidateEdges
    wiring: Wiring

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = self.full_name = name
        self.origin = 0
        self._chosen: Chosen | None = None
        self._updates: weakref.ref[Any] | None = None  # Calls the rule after a step.
        self._backward_pass: int | None = None  # The first one of a rule that needs steps.
        self.register_load_state_dict_post_hook(_forget)

    def tensors(self) -> list[Tensor]:
        """Return the parameters that hold the weights."""
        return [weight.parameter for weight in self.weights]

    @property
    def num_candidates(self) -> int:
        """Number of candidate edges."""
        return sum(weight.numel for weight in self.weights)

    @property
    def num_edges(self) -> int:
        """The budget of real edges, k: the given number, unless a rule moves budgets between graphs.

        Some rules keep another number of edges, see :attr:`num_real_edges`.
        """
        return self.wiring.num_edges(self._num_edges)

    @property
    def num_real_edges(self) -> int:
        """Current number of real edges, the length of :attr:`real_index`."""
        return self.real_index.numel()

    @property
    def rule(self) -> int:
        """Hash of the rule's name, as in the ``state_dict``, whose names must be attributes for DCP."""
        return rule_hash(type(self.wiring))

    @property
    def real_index(self) -> Int[Tensor, " edges"]:
        """Flat indices of the real edges among the candidates, ascending, for the current weights; a copy.

        Even in training, these are the edges that evaluation would use.
        """
        return (self._choose() if self.training else self.real_edges(self.tensors())).clone()

    @property
    def real_weight(self) -> Float[Tensor, " edges"]:
        """Values of the real edges, in the order of :attr:`real_index`; gradients flow through them."""
        return self.wiring.values(self.view().weight)[self.real_index]

    @property
    def edge_weight(self) -> Float[Tensor, " edges"]:
        """Values of the real edges, a copy without a gradient. See :attr:`real_weight`."""
        return self.real_weight.detach()

    @property
    def recomputes(self) -> bool:
        """Whether a forward pass now is a recomputation within a backward pass, which must see the same edges."""
        return self._chosen is not None and in_backward_pass()

    def full_name_at(self, path: str) -> str:
        """Return the graph's name in a model.

        Args:
            path: The path of its module there; empty if it is the model itself.
        """
        return path or self.name

    def view(self, tensors: Sequence[Tensor] | None = None, **options: Any) -> View:
        """Return the rule's view of the graph."""
        return View(self, self.wiring, self._num_edges, tensors, **options)

    @checked
    def rewire(self, wiring: str | Wiring, num_edges: int) -> None:
        """Give the graph another wiring, or another number of edges.

        The candidate weights do not change, unless the rule has its own weights (:class:`~dnw_graph.wirings.FineTune`,
        :class:`~dnw_graph.wirings.LotteryTicket`) or sets hallucinated ones to zero. ``"random_graph"`` keeps the
        strongest of trained weights; see :class:`~dnw_graph.RandomGraph`. Rewire before ``DistributedDataParallel``
        wraps the model, which makes what a rule draws, and its own parameters, equal on all ranks.

        Args:
            wiring: Rule that chooses the real edges; an object is copied.
            num_edges: Number of real edges k.

        Raises:
            InputError: If k is not in 1 … number of candidates, the name is unknown, or the rule refuses.
        """
        self.take(self.prepare(wiring, num_edges))

    def prepare(self, wiring: str | Wiring, num_edges: int | None, default: int | None = None) -> View:
        """Set up a rule for the current weights, without changing the graph.

        Args:
            wiring: The rule; an object is copied.
            num_edges: k; None for the rule's own number.
            default: k if the rule has no number of its own. Default: all candidates.
        """
        rule = make_wiring(wiring).to(self.weights[0].parameter.device)
        if rule.trained == "real" and type(rule).choose_to_train is not Wiring.choose_to_train:
            raise InputError(
                f"{self.name}: {type(rule).__name__} has choose_to_train, so trained = 'real' is ambiguous: set "
                "trained = 'own' and define trained_edges"
            )
        own = rule.own_num_edges(View(self, rule, 0))
        if num_edges is None:
            num_edges = next(number for number in (own, default, self.num_candidates) if number is not None)
        if own not in (None, num_edges):
            raise InputError(
                f"{self.name}: the rule {type(rule).__name__} has {own:,} of {self.num_candidates:,} edges; got "
                f"num_edges = {num_edges:,}: leave num_edges or density out"
            )
        require(num_edges >= 1, f"{self.name}: num_edges", "an integer >= 1", num_edges)
        if num_edges > self.num_candidates:
            raise InputError(
                f"{self.name}: num_edges = {num_edges:,} is more than the {self.num_candidates:,} candidate edges; ask "
                "for fewer edges, or more nodes"
            )
        if not hasattr(self, "wiring"):
            self.origin = generator_state(self.weights[0].parameter.device)
        return self._set_up(rule, num_edges)

    def _set_up(self, rule: Wiring, num_edges: int, *, loaded: bool = False) -> View:
        view = View(self, rule, num_edges, copy=True)
        with torch.no_grad():
            (rule.setup_loaded if loaded else rule.setup)(view)
        return view

    def set_up_anew(self, *, loaded: bool = False) -> None:
        """Restart the rule after the weights were redrawn, or after they were loaded."""
        self.forget()
        self.take(self._set_up(self.wiring, self._num_edges, loaded=loaded))

    def take(self, view: View) -> None:
        """Adopt a prepared rule."""
        view.write_back()
        before = getattr(self, "wiring", view.wiring)
        self.wiring = view.wiring.train(self.training)
        self._needs_attach = self.wiring.needs_attach  # Not read in a forward pass: the compiler cannot trace it.
        self.wiring.step = 0
        for name in ("num_steps", "steps_per_epoch", "seed"):
            setattr(self.wiring, name, getattr(before, name))
        self._num_edges = view.k
        self.forget()

    @checked
    def load_weights(self, state: Mapping[str, Any] | Tensor) -> None:
        """Load the candidate weights alone, from a graph with another k or another rule, for fine-tuning.

        The rule is set up again for them. SET, RigL and sparse momentum start from the k edges of largest |w| instead
        of random ones, and set the others to zero; fine tune and lottery ticket keep their edges; ``"random_graph"``
        keeps the strongest, unless it has ``separate_scores``.

        Args:
            state: The ``state_dict`` of a graph with the same candidates, or a vector ``[num_candidates]``; for sparse
                layers, the ``state_dict`` of the model that was given to ``sparsify``, dense or sparse.

        Raises:
            InputError: If the state lacks the weights, or one is NaN or infinite; nothing is changed then.
        """
        flat = state if isinstance(state, Tensor) else self._weights_in(state)
        numbers = flat is not None and flat.is_floating_point() and flat.layout is torch.strided and not flat.is_meta
        if flat is None or not numbers or flat.shape != (self.num_candidates,):
            expected = f"the {self.num_candidates:,} candidate weights, as a vector or in a state_dict"
            raise wrong(f"{self.name}: the state", expected, state if flat is None else flat)
        if not flat.isfinite().all():
            raise InputError(f"{self.name}: the state has candidate weights that are NaN or infinite")
        with torch.no_grad():
            view = self.view(copy=True)
            view.weight.copy_(flat)
            view.write_back()
        self.set_up_anew(loaded=True)

    def _weights_in(self, state: Mapping[str, Any]) -> Tensor | None:
        found = state.get("candidates.weight")
        return found if isinstance(found, Tensor) else None

    def update_wiring(self) -> None:
        """Choose the real edges again, from the current weights."""
        self._keep(self.tensors(), self._choose())

    def penalty(self) -> Float[Tensor, ""] | None:
        """Return the rule's penalty term of the loss, or None; see :func:`dnw_graph.wiring_penalty`."""
        return self.wiring.penalty(self.view())

    def real_edges(self, tensors: Sequence[Tensor]) -> Int[Tensor, " edges"]:
        """Return the flat indices for a forward pass; choose them again if necessary.

        Args:
            tensors: The parameters as the forward pass sees them.
        """
        if torch.compiler.is_compiling() or transformed():
            # Compiled code recomputes anyway, and cannot detect changes of the weights. Tensors within a transform
            # of torch.func have no storage to detect them by, and must not outlive the transform.
            choose = self.wiring.choose_to_train if self.training else self.wiring.choose
            return choose(self.view(tensors))
        if self._chosen is not None and (in_backward_pass() if self.training else self._chosen.fits(tensors)):
            return self._chosen.index
        # Training may use them after an evaluation in inference mode, whose own tensors autograd cannot save.
        with torch.inference_mode(False), torch.no_grad():
            index = self._choose(tensors, to_train=self.training)
            self._keep(tensors, index)
        return index

    def derived(self, index: Int[Tensor, " edges"], make: Callable[[], T]) -> T:
        """Return an object derived from the edges of a forward pass; cached together with the edges."""
        chosen = self._chosen
        if chosen is None or chosen.index is not index:
            return make()
        if chosen.derived is None:
            chosen.derived = make()
        return chosen.derived

    def trained_edges(self) -> Int[Tensor, " trained"] | None:
        """Return the flat indices of the trained candidates, for the current weights; None for all."""
        return self._edges_of(self.wiring.trained)

    def learning_edges(
        self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]
    ) -> Int[Tensor, " learning"] | None:
        """Return the flat indices of the candidates whose gradient is added to ``.grad``; None for all.

        Args:
            index: The real edges of the forward pass.
            tensors: The parameters as the forward pass sees them.
        """
        return self._edges_of(self.wiring.gradient or self.wiring.trained, index, tensors)

    def _edges_of(
        self, kind: str, real: Tensor | None = None, tensors: Sequence[Tensor] | None = None
    ) -> Tensor | None:
        if kind == "all":
            return None
        if kind == "own":
            index = self.wiring.trained_edges(self.view(tensors))
            return index if torch.compiler.is_compiling() else self._checked(index, "trained edges", self.training)
        return self.wiring.choose(self.view(tensors)) if real is None else real

    def guarded(self, weight: Tensor) -> Tensor:
        """Raise an error at the second backward pass if the rule needs an attached optimiser that it has not.

        A compiled model cannot count passes and raises it in the first one.

        Args:
            weight: A tensor through which the gradients of the weights flow.
        """
        if not self._needs_attach or not self.training:
            return weight
        if torch.compiler.is_compiling():
            if self._updates is None and torch.is_grad_enabled():
                raise self._unattached()
            return weight
        if self.updates is not None and self.updates.steps_parameters(self.wiring):
            return weight
        weight = weight.view_as(weight)
        if weight.requires_grad:
            weight.register_hook(self._refuse_second_pass)
        return weight

    def _refuse_second_pass(self, grad: Tensor) -> None:
        if self._backward_pass is None:
            self._backward_pass = backward_pass()
        elif self._backward_pass != backward_pass():
            raise self._unattached()

    def _unattached(self) -> InputError:
        rule = self.wiring
        why = "needs the steps of an optimiser, but none is attached"
        if not rule.needs_steps or self.updates is not None:
            why = "has parameters of its own, but no attached optimiser has them"
        return InputError(
            f"{self.name}: {type(rule).__name__} {why}: call dnw_graph.attach(model, optimizer) before training, and "
            "again after rewire, for another optimiser or a copy"
        )

    @property
    def updates(self) -> Any:
        """The object that calls the rule after a step, see :func:`dnw_graph.attach`, or None."""
        return None if self._updates is None else self._updates()

    def attached(self, updates: Any, full_name: str) -> None:
        """Remember the object that calls the rule after a step.

        Args:
            updates: The object, held weakly, so that it lives as long as its optimiser; None for none.
            full_name: The graph's name in the model.
        """
        self._updates = None if updates is None else weakref.ref(updates)
        self._backward_pass, self.full_name = None, full_name

    def forget(self) -> None:
        """Choose the edges again at their next use, after weights or the rule's state were replaced."""
        self._chosen = None
        self.wiring.forget_weights()
        if self.updates is not None:
            self.updates.renew(self)

    def forget_edges(self) -> None:
        """Choose the edges again at their next use, after a step."""
        self._chosen = None

    def _choose(self, tensors: Sequence[Tensor] | None = None, *, to_train: bool = False) -> Tensor:
        rule, view = self.wiring, self.view(tensors)
        index = rule.choose_to_train(view) if to_train else rule.choose(view)
        if not to_train:
            rule.raise_non_finite()
        return self._checked(index, "choice", to_train)

    def _checked(self, index: Tensor, what: str, to_train: bool) -> Tensor:
        rule = type(self.wiring)
        # Only a rule from outside this package can choose wrongly. A training step reads nothing from a device.
        own = rule.__module__.startswith("dnw_graph.")
        read = not own and plain_eager() and isinstance(index, Tensor) and (index.is_cpu or not to_train)
        what = f"{self.name}: the {what} of {rule.__name__}"
        refuse_edges(index, self.num_candidates, what, read=read, hint="mask.nonzero().flatten(), index.sort().values")
        return index

    def _keep(self, tensors: Sequence[Tensor], index: Tensor) -> None:
        self._chosen = Chosen(index, tensors)
        if not self.training:
            self._chosen.remember(self.weights, self.wiring.parameters())

    def train(self, mode: bool = True) -> Ranking:
        """Switch between training and evaluation; evaluation then chooses the real edges again."""
        if self.wiring.training and not mode:
            self._chosen = None
        super().train(mode)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "num_edges"] = torch.tensor(self._num_edges)
        destination[prefix + "rule"] = torch.tensor(self.rule)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_saved(self, state_dict, prefix)
        # A file may lack them; then the model keeps its own.
        numbers = {prefix + name for name in NUMBERS}
        others = {key: value for key, value in state_dict.items() if key not in numbers}
        super()._load_from_state_dict(others, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": None, "_updates": None, "_backward_pass": None}


def rule_hash(rule: type[Wiring]) -> int:
    """Return a hash of a rule's name, in 0 … 2²⁰ - 1, the same in every process.

    Averaging in float32 preserves integers as small as this. The name is ``package.module.Class``, whether the rule is
    registered or not; for rules of this package and of a script, whose path may change, the registered name.
    """
    registered = rule.__module__.startswith(("dnw_graph.", "__main__", "__mp_main__"))
    return _hash(wiring_names(rule)[0 if registered else -1]) >> 36


def has_hash(rule: type[Wiring], number: int) -> bool:
    """Return whether a saved hash is that of a rule, by any of its names; older files have 56 bits of it."""
    hashes = [_hash(name) for name in wiring_names(rule)]
    return number in (*hashes, *(each >> 36 for each in hashes))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def saved_rule(number: int) -> str:
    """Return the name of the rule with a hash, for messages."""
    names = (repr(name) for name, rule in WIRINGS.items() if has_hash(rule, number))
    return next(names, "a rule that is not registered here (register_wiring)")


def rankings(model: nn.Module) -> Iterator[tuple[str, Ranking]]:
    """Yield the neural graphs and the graphs of sparse layers of a model, each once, with the path of its module."""
    for path, module in model.named_modules():
        if isinstance(module, Ranking):
            yield path, module


def wiring_penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Return the sum of the penalty terms of all rules of a model; zero for most rules.

    :class:`~dnw_graph.wirings.L1Anneal` needs it, for example. In a training loop of your own, after the forward pass:
    ``loss = cross_entropy(scores, labels) + wiring_penalty(model)``.

    Args:
        model: Any module with neural graphs or sparse layers in it.
    """
    if not isinstance(model, nn.Module):
        raise wrong("wiring_penalty: model", "a Module", model)
    terms = [term for _, graph in rankings(model) if (term := graph.penalty()) is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def check_saved(graph: Ranking, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse saved edges that a graph cannot have, before anything of the graph is loaded.

    Args:
        graph: The graph.
        state_dict: What is loaded.
        prefix: The prefix of the graph's names in it.

    Raises:
        InputError: If the number of edges or the rule differs, or the edges are invalid for this graph; see
            :meth:`~dnw_graph.wirings.Wiring.check_saved`.
    """
    k = graph._num_edges  # A view refuses weights that are sharded.
    saved_k, rule = (saved_number(state_dict, prefix + name, f"{graph.name}: {name}") for name in NUMBERS)
    if saved_k not in (None, k) and not graph.wiring.ignores_k:
        raise InputError(
            f"{graph.name}: the state has num_edges = {saved_k:,}, the graph {k:,}: create the model with "
            "that number, or load the weights alone with graph.load_weights(state)"
        )
    prefix += "wiring."
    saved = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if rule is not None and not has_hash(type(graph.wiring), rule) and saved.keys() - set(COUNTERS):
        own = wiring_name(type(graph.wiring))
        raise InputError(
            f"{graph.name}: the edges of the state were chosen by {saved_rule(rule)}, not by {own!r}: "
            "create the model with that rule, or load the weights alone with graph.load_weights(state)"
        )
    graph.wiring.check_saved(saved, graph.num_candidates, k, graph.name)


def _forget(graph: Ranking, *_: Any) -> None:
    graph.forget()
