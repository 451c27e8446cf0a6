"""Values that change while training goes on, and the rules that have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from dnw_graph.arguments import check_fields, checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.saved import refuse_counts

# Share of the way from `start` to `end`, at a share of the time between `begin` and `until`.
SHAPES = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A value that goes from ``start`` to ``end`` between two moments of training.

    A moment is a step, counted from 0, as a whole number; or a fraction of training, from 0.0 (the first step) to 1.0
    (the last one).

    Args:
        start: Value until ``begin``.
        end: Value from ``until`` on.
        begin: Moment at which it starts to move.
        until: Moment at which it has arrived.
        shape: ``"linear"``; ``"cubic"``, fast at first: 1 - (1 - t)³ (Zhu and Gupta 2017); or ``"cosine"``.

    Raises:
        InputError: If a value is not finite, a moment is none, or the shape is unknown.
    """

    start: float
    end: float
    begin: int | float = 0.0
    until: int | float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_fields(self, "{} of a schedule".format)
        for name, moment in (("begin", self.begin), ("until", self.until)):
            possible = moment >= 0 and (isinstance(moment, int) or moment <= 1)
            expected = "a step (an integer from 0 up) or a fraction of training (0.0 … 1.0)"
            require(possible, f"{name} of a schedule", expected, moment)
        if type(self.begin) is type(self.until) and self.begin > self.until:
            raise InputError(f"a schedule cannot begin at {self.begin} and end before, at {self.until}")
        if self.shape not in tuple(SHAPES):
            raise unknown_name("shape of a schedule", self.shape, SHAPES)

    @property
    def in_fractions(self) -> bool:
        """Whether a moment is a fraction of training, so that the number of steps must be known."""
        return isinstance(self.begin, float) or isinstance(self.until, float)

    def __str__(self) -> str:
        if self.start == self.end:
            return f"{self.start:g}"
        return f"{self.start:g} to {self.end:g} from {self.begin} to {self.until}, {self.shape}"

    def value(self, step: int, num_steps: int) -> float:
        """Return the value at a step.

        Args:
            step: Step, counted from 0.
            num_steps: Steps of the whole training; used for fractions only.
        """
        last = max(num_steps - 1, 1)
        begin, until = (moment * last if isinstance(moment, float) else moment for moment in (self.begin, self.until))
        if step >= until:
            return self.end
        if step <= begin:
            return self.start
        return self.start + (self.end - self.start) * SHAPES[self.shape]((step - begin) / (until - begin))


def as_schedule(what: str, value: float | Schedule | Mapping[str, int | float | str]) -> Schedule:
    """Return a schedule from one, from its arguments by name (as in a YAML file), or from a constant.

    Args:
        what: What the value is, for messages.
        value: What was given.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        known = {field.name for field in fields(Schedule)}
        for name in value:
            if name not in known:
                raise unknown_name(f"argument of the schedule of {what}", str(name), known)
        if not {"start", "end"} <= set(value):
            raise InputError(f"the schedule of {what} needs start and end; got {dict(value)}")
        return Schedule(**value)  # type: ignore[arg-type]  # checked by Schedule
    return Schedule(value, value, 0, 0)


class Scheduled(Wiring):
    """A rule with values that depend on the step of training.

    The rule counts its own steps, one per forward pass in training, and the ``state_dict`` holds the count: a resumed
    run goes on where the schedule was. Schedules in fractions need the number of steps of the whole training: from
    ``num_steps``, from :meth:`set_num_steps`, which ``dnw_graph.training.run`` calls, or from a checkpoint.

    Args:
        num_steps: Steps of the whole training, if known.

    Attributes:
        step: Steps so far.
        num_steps: Steps of the whole training; 0 as long as it is not known.
        counters: Names of the whole numbers that the ``state_dict`` holds, as scalars. They are kept on the host, which
            would have to wait for a device at every look.

    Raises:
        InputError: If ``num_steps`` is not a whole number from 1 up; in the first forward pass of training, if it is
            not known and a schedule needs it.
    """

    counters: ClassVar[tuple[str, ...]] = ("step", "num_steps")

    @checked
    def __init__(self, num_steps: int | None = None) -> None:
        super().__init__()
        _check_num_steps(num_steps)
        self.given_num_steps = num_steps
        self.name = "graph"
        self.step = 0
        self.num_steps = num_steps or 0

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Start to count anew."""
        self.step = 0
        self.name = name

    @checked
    def set_num_steps(self, num_steps: int) -> None:
        """Take the number of steps of the whole training, unless the rule was given one of its own."""
        _check_num_steps(num_steps)
        if self.given_num_steps is None:
            self.num_steps = num_steps

    def now(self, schedule: Schedule) -> float:
        """Return a value at the step in progress: that of the last forward pass in training.

        Args:
            schedule: The value's schedule.
        """
        if schedule.in_fractions and not self.num_steps:
            raise InputError(
                f"{self.name}: {type(self).__name__} has a schedule in fractions of training, but does not know how "
                "many steps training has: give it num_steps=…, call graph.wiring.set_num_steps(…), or give steps"
            )
        return schedule.value(max(self.step - 1, 0), self.num_steps)

    def begin_step(self, *schedules: Schedule) -> None:
        """Count one step of training, unless one of the rule's schedules cannot be followed."""
        for schedule in schedules:
            self.now(schedule)
        self.step += 1

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse counters that are no numbers of steps."""
        refuse_counts(saved, self.counters, f"{name}: wiring")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: torch.tensor(getattr(self, name)) for name in self.counters})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {prefix + name: name for name in self.counters}
        others = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for key, name in keys.items():
            if key in state_dict:
                setattr(self, name, int(state_dict[key]))
            elif strict:
                missing_keys.append(key)


def _check_num_steps(num_steps: int | None) -> None:
    require(num_steps is None or num_steps >= 1, "num_steps", "an integer from 1 up", num_steps)
