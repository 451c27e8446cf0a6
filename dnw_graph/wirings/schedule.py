"""Values that change during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from dnw_graph.arguments import check_fields, require
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.wirings.view import View

# Progress from `start` to `end` as a function of progress in time from `begin` to `until`, both in 0 … 1.
SHAPES = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A value that goes from ``start`` to ``end`` between two moments of training.

    A moment is a step, counted from 0, as an integer; or a fraction of training, from 0.0 (the first step) to 1.0
    (the last one).

    Args:
        start: Value until ``begin``.
        end: Value from ``until`` on.
        begin: Moment at which the change begins.
        until: Moment at which it ends.
        shape: ``"linear"``; ``"cubic"``, fast at first: 1 - (1 - t)³ (Zhu and Gupta 2017); or ``"cosine"``.

    Raises:
        InputError: If a value is not finite, a moment is neither a step nor a fraction, or the shape is unknown.
    """

    start: float
    end: float
    begin: int | float = 0.0
    until: int | float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_fields(self, "{} of a schedule".format)
        for name, moment in (("begin", self.begin), ("until", self.until)):
            require(is_moment(moment), f"{name} of a schedule", MOMENT, moment)
        if type(self.begin) is type(self.until) and self.begin > self.until:
            raise InputError(f"a schedule cannot begin at {self.begin} and end earlier, at {self.until}")
        if self.shape not in tuple(SHAPES):
            raise unknown_name("shape of a schedule", self.shape, SHAPES)

    @property
    def in_fractions(self) -> bool:
        """Whether a moment is a fraction of training, so that the number of steps must be known."""
        return isinstance(self.begin, float) or isinstance(self.until, float)

    @property
    def constant(self) -> bool:
        """Whether the value never changes."""
        return self.start == self.end

    def at(self, view: View, *, after: int | None = None) -> float:
        """Return the value for the next step of a graph, or after a step.

        Args:
            view: The graph, with its numbers of steps so far and of the whole training.
            after: Number of steps done: 1.0 then means after the last step of training, not at that step.

        Raises:
            InputError: If a moment is a fraction and the number of steps is unknown.
        """
        if self.constant:
            return self.end
        step, done = (view.step, 0) if after is None else (after, 1)
        return self.value(step, view.num_steps + done if self.in_fractions else 0)

    def __str__(self) -> str:
        if self.constant:
            return f"{self.start:g}"
        return f"{self.start:g} to {self.end:g} from {self.begin} to {self.until}, {self.shape}"

    def value(self, step: int, num_steps: int) -> float:
        """Return the value at a step.

        Args:
            step: Step, counted from 0.
            num_steps: Number of steps of the whole training; used for fractions only.
        """
        last = max(num_steps - 1, 1)
        begin, until = (moment * last if isinstance(moment, float) else moment for moment in (self.begin, self.until))
        if step >= until:
            return self.end
        if step <= begin:
            return self.start
        return self.start + (self.end - self.start) * SHAPES[self.shape]((step - begin) / (until - begin))


MOMENT = "a step (an integer >= 0) or a fraction of training (0.0 … 1.0)"


def is_moment(value: int | float) -> bool:
    """Return whether a number is a step or a fraction of training."""
    return value >= 0 and (isinstance(value, int) or value <= 1)


def moment(view: View, value: int | float) -> int:
    """Return the step of a moment; a fraction of training is rounded to the nearest step."""
    return round(value * view.num_steps) if isinstance(value, float) else value


Changing = float | Schedule | Mapping[str, int | float | str]
"""A number, a schedule, or the arguments of one by name, as in a YAML file."""


def share_over_time(what: str, value: Changing) -> Schedule:
    """Return a schedule within 0 … 1, see :func:`as_schedule`."""
    schedule = as_schedule(what, value)
    require(max(schedule.start, schedule.end) <= 1, what, "a share within 0 … 1", value)
    return schedule


def as_schedule(what: str, value: Changing) -> Schedule:
    """Return a schedule >= 0, from one, from its arguments, or from a constant.

    Args:
        what: Name of the value in messages.
        value: The value.

    Raises:
        InputError: If the value is none of these.
    """
    if isinstance(value, Mapping):
        known = {field.name for field in fields(Schedule)}
        for name in value:
            if name not in known:
                raise unknown_name(f"argument of the schedule of {what}", str(name), known)
        if not {"start", "end"} <= set(value):
            raise InputError(f"the schedule of {what} needs start and end; got {dict(value)}")
        schedule = Schedule(**value)  # type: ignore[arg-type]  # checked by Schedule
    else:
        schedule = value if isinstance(value, Schedule) else Schedule(value, value, 0, 0)
    require(min(schedule.start, schedule.end) >= 0, what, "0 or more", value)
    return schedule
