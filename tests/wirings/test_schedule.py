import copy
import math

import pytest
import torch
from alone import run_alone
from step_loops import attached

from dnw_graph import InputError, L1Anneal, NeuralGraph, Schedule, TargetedDropout
from dnw_graph.wirings.schedule import as_schedule

# From 2 to 10 between the steps 4 and 12: value at a quarter, half and three quarters of the way.
BY_HAND = {
    "linear": (4.0, 6.0, 8.0),
    "cubic": (2 + 8 * 37 / 64, 2 + 8 * 7 / 8, 2 + 8 * 63 / 64),
    "cosine": (6 - 4 * math.sqrt(0.5), 6.0, 6 + 4 * math.sqrt(0.5)),
}


@pytest.mark.parametrize("shape", BY_HAND)
@pytest.mark.parametrize("turn", [1, -1])
def test_values_by_hand(shape, turn):
    schedule = Schedule(2.0 * turn, 10.0 * turn, 4, 12, shape)
    values = [schedule.value(step, 0) * turn for step in (0, 3, 4, 6, 8, 10, 12, 13, 1000)]
    assert values == pytest.approx([2, 2, 2, *BY_HAND[shape], 10, 10, 10], rel=1e-12)
    assert values[:3] == [2, 2, 2]
    assert values[6:] == [10, 10, 10]


@pytest.mark.parametrize("shape", BY_HAND)
def test_fractions_are_of_the_way_from_the_first_step_to_the_last(shape):
    # 41 steps: the last one is 40, a tenth of the way is step 4, three tenths step 12.
    steps, fractions = Schedule(2.0, 10.0, 4, 12, shape), Schedule(2.0, 10.0, 0.1, 0.3, shape)
    for step in range(41):
        assert fractions.value(step, 41) == pytest.approx(steps.value(step, 41), abs=1e-9)
    whole = Schedule(2.0, 10.0, shape=shape)
    assert (whole.value(0, 41), whole.value(40, 41)) == (2, 10)
    assert whole.value(39, 41) < 10


def test_a_step_and_a_fraction_may_be_mixed():
    schedule = Schedule(0.0, 1.0, 10, 0.5)
    assert [schedule.value(step, 101) for step in (10, 30, 50, 51)] == [0, 0.5, 1, 1]
    assert schedule.value(10, 11) == 1  # the end lies before the beginning


def test_a_jump():
    schedule = Schedule(1.0, 3.0, 5, 5)
    assert [schedule.value(step, 0) for step in (4, 5, 6)] == [1, 3, 3]
    assert Schedule(1.0, 3.0, 0.0, 0.0).value(0, 1) == 3


def test_training_of_a_single_step():
    assert Schedule(1.0, 3.0).value(0, 1) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": math.nan}, "start of a schedule must be a finite number; got nan"),
        ({"end": math.inf}, "end of a schedule must be a finite number; got inf"),
        ({"start": "low"}, "start of a schedule must be a finite number; got 'low'"),
        ({"end": True}, "must be a finite number; got True"),
        ({"begin": -1}, "a fraction of training .* got -1"),
        ({"until": 1.5}, "a fraction of training .* got 1.5"),
        ({"begin": -0.1}, "a fraction of training .* got -0.1"),
        ({"until": math.nan}, "until of a schedule must be a finite number; got nan"),
        ({"begin": True}, "begin of a schedule must be .* got True"),
        ({"until": "end"}, "until of a schedule must be .* got 'end'"),
        ({"begin": 5, "until": 4}, "cannot begin at 5 and end earlier, at 4"),
        ({"begin": 0.5, "until": 0.4}, "cannot begin at 0.5 and end earlier, at 0.4"),
        ({"shape": "cubik"}, "unknown shape of a schedule 'cubik': did you mean 'cubic'"),
    ],
)
def test_what_is_no_schedule_is_refused(values, message, unchecked):
    with pytest.raises(InputError, match=message) as error:
        Schedule(**{"start": 0.0, "end": 1.0, **values})
    assert "\n" not in str(error.value)


def test_schedules_by_name_and_constants():
    given = {"start": 0.5, "end": 1.0, "begin": 3, "until": 9, "shape": "cosine"}
    assert as_schedule("rho", given) == Schedule(0.5, 1.0, 3, 9, "cosine")
    assert as_schedule("rho", Schedule(0.5, 1.0)) == Schedule(0.5, 1.0)
    constant = as_schedule("rho", 0.9)
    assert [constant.value(step, 0) for step in (0, 1, 99)] == [0.9] * 3
    assert not constant.in_fractions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": 0.5}, "the schedule of rho needs start and end; got {'start': 0.5}"),
        ({"start": 0.5, "ende": 1}, "unknown argument of the schedule of rho 'ende': did you mean 'end'"),
        (None, "must be a finite number; got None"),
    ],
)
def test_what_cannot_become_a_schedule_is_refused(given, message, unchecked):
    with pytest.raises(InputError) as error:
        as_schedule("rho", given)
    assert message in str(error.value)


RULES = {
    "l1_anneal": lambda: L1Anneal(removal=Schedule(0.0, 1.0)),
    "l1_anneal, strength": lambda: L1Anneal(Schedule(0.0, 1.0), Schedule(0.0, 1.0, 0, 5)),
    "targeted_dropout": lambda: TargetedDropout(Schedule(0.0, 1.0)),
}


def loss(graph):
    return graph(torch.rand(2, 3, 4, 4)).sum() + (graph.penalty() or 0)


@pytest.mark.parametrize("rule", RULES)
def test_fractions_need_to_know_how_long_training_is(rule):
    graph = NeuralGraph((3, 4, 2), 9, wiring=RULES[rule](), name="stage4")
    with pytest.raises(InputError, match=r"how many steps training has: give it to dnw_graph\.attach") as error:
        loss(graph)
    assert "\n" not in str(error.value)
    graph.eval()(torch.rand(2, 3, 4, 4))  # evaluation needs no schedule
    attached(graph, 8)
    loss(graph.train()).backward()


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "ten"])
def test_what_is_no_number_of_steps_is_refused(given, unchecked):
    with pytest.raises(InputError, match=f"num_steps must be an integer( or None| >= 1)?; got {given!r}"):
        attached(NeuralGraph((3, 4, 2), 9), given)


def test_steps_of_the_optimiser_count_and_nothing_else():
    graph = NeuralGraph((3, 4, 2), 9, wiring=TargetedDropout(0.5))
    step = attached(graph)
    count = Schedule(0.0, 100.0, 0, 100)
    seen = [count.at(graph.view())]
    for _ in range(3):
        for mode in (True, True, False):  # two passes in training, one in evaluation
            graph.train(mode)(torch.rand(2, 3, 4, 4))
        seen.append(count.at(graph.view()))
        step()
        seen.append(count.at(graph.view()))
    assert seen == [0, 0, 1, 1, 2, 2, 3]
    graph.reset_parameters()
    assert count.at(graph.view()) == 0


@pytest.mark.parametrize("rule", RULES)
def test_the_count_is_part_of_the_state(rule):
    graph, other = (NeuralGraph((3, 4, 2), 9, wiring=RULES[rule]()) for _ in range(2))
    step = attached(graph, 8)
    for _ in range(3):
        loss(graph)
        step()
    state = graph.state_dict()
    assert (state["wiring.step"].tolist(), state["wiring.num_steps"].tolist()) == (3, 8)
    assert state["wiring.seed"] > 0
    other.load_state_dict(state)
    for _ in range(3):
        edges = [each.wiring.choose_to_train(each.view()).tolist() for each in (graph, copy.deepcopy(other), other)]
        assert edges[0] == edges[1] == edges[2]
        graph.wiring.step += 1
        other.wiring.step += 1
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "wiring.steps"'):
        other.load_state_dict(state | {"wiring.steps": torch.tensor(3)})
    counters = {"wiring.step", "wiring.num_steps", "wiring.seed"}
    other.load_state_dict({name: value for name, value in state.items() if name not in counters})
    assert (other.wiring.step, other.wiring.num_steps) == (3, 8)


# In a process of its own: the compiler cannot look through the type checks that the other tests run under.
PROGRAM = """
import torch

from dnw_graph import L1Anneal, NeuralGraph, Schedule, TargetedDropout, attach

for rule in (L1Anneal(removal=Schedule(0.0, 1.0, 0, 30)), TargetedDropout(Schedule(0.2, 0.8, 0, 30))):
    torch.compiler.reset()
    graph = NeuralGraph((3, 5, 4), 11, wiring=rule, propagation="block")
    compiled = torch.compile(graph, backend="aot_eager")
    optimiser = torch.optim.SGD(graph.parameters(), 0.1)
    attach(compiled, optimiser)
    for step in range(9):
        with torch.compiler.set_stance("default" if step < 3 else "fail_on_recompile"):
            compiled(torch.rand(2, 3, 4, 4)).square().mean().backward()
        optimiser.step()
    print(graph.wiring.step)
"""


@pytest.mark.slow
def test_compiled_training_is_not_compiled_anew_for_every_step():
    run = run_alone(PROGRAM)
    assert run.stdout == "9\n9\n", run.stderr
