"""The step clock maps calls to steps, and refuses what is not the plan's schedule."""

from __future__ import annotations

import pytest
import torch

from ditfastattn import ConfigError
from ditfastattn.runtime.clock import StepClock, read_timestep

TIMESTEPS = (900.0, 600.0, 300.0)


class Late:
    """Stand for a timestep on its way from a device."""

    def __init__(self, timestep: float) -> None:
        self.timestep = timestep
        self.arrived = False

    def ready(self) -> bool:
        return self.arrived

    def value(self) -> float:
        assert self.arrived, "reading now would wait for the device"
        return self.timestep


def host(clock: StepClock, timestep: float) -> int:
    return clock.tick(read_timestep(torch.tensor([timestep, timestep])))


def test_steps_follow_the_timesteps_over_several_generations() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    assert [host(clock, t) for t in (*TIMESTEPS, *TIMESTEPS)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("clean", [0.0, 1000.0], ids=["falling", "rising"])
def test_tokens_that_stand_still_do_not_stop_the_clock(clean: float) -> None:
    def given(timestep: float) -> torch.Tensor:
        return torch.tensor([[clean, timestep, timestep], [timestep, timestep, timestep]])

    timesteps = [read_timestep(given(timestep)).value() for timestep in TIMESTEPS]
    clock = StepClock(timesteps, "timestep")
    steps = [clock.tick(read_timestep(given(t))) for t in (TIMESTEPS[0], *TIMESTEPS)]
    assert steps == [0, 0, 1, 2]  # the first generation is interrupted
    alike = [read_timestep(torch.full((1, 3), t)).value() for t in TIMESTEPS]
    assert alike == list(TIMESTEPS)


def test_the_first_timestep_begins_a_new_generation_at_any_time() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    assert [host(clock, t) for t in (900.0, 600.0, 900.0, 600.0)] == [0, 1, 0, 1]


def test_integer_and_scalar_timesteps_are_read() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    assert clock.tick(read_timestep(torch.tensor(900))) == 0


@pytest.mark.parametrize("sequence", [(600.0,), (900.0, 300.0), (900.0, 600.0, 600.0)])
def test_another_order_is_refused_with_got_and_expected(sequence: tuple[float, ...]) -> None:
    clock = StepClock(TIMESTEPS, "argument 'timestep'")
    for timestep in sequence[:-1]:
        host(clock, timestep)
    with pytest.raises(ConfigError, match=r"argument 'timestep'[\s\S]*got:[\s\S]*expected:"):
        host(clock, sequence[-1])
    assert host(clock, 900.0) == 0  # the clock is usable again from the first step


def test_repeated_timesteps_count_up() -> None:
    clock = StepClock((900.0, 900.0, 600.0, 600.0), "timestep")
    assert [host(clock, t) for t in (900.0, 900.0, 600.0, 600.0, 900.0)] == [0, 1, 2, 3, 0]


def test_a_device_timestep_is_not_waited_for() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    readers = [Late(t) for t in TIMESTEPS]
    assert [clock.tick(reader) for reader in readers] == [0, 1, 2]


def test_a_wrong_device_timestep_is_noticed_once_it_arrives() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    first, second = Late(900.0), Late(300.0)
    assert [clock.tick(first), clock.tick(second)] == [0, 1]
    first.arrived = second.arrived = True
    with pytest.raises(ConfigError, match="step 1 of 3"):
        clock.tick(Late(300.0))


def test_reset_forgets_the_generation() -> None:
    clock = StepClock(TIMESTEPS, "timestep")
    host(clock, 900.0)
    clock.reset()
    assert clock.tick(Late(900.0)) == 0


SCALES = {
    "integers": tuple(float(t) for t in range(999, 899, -1)),
    "thousandths": tuple(t / 1000 for t in range(1000, 900, -1)),
    "rising": tuple(1 - t / 1000 for t in range(1000, 900, -1)),
    "narrow": (1.0, 0.9995, 0.9990, 0.0),
}


@pytest.mark.parametrize("timesteps", SCALES.values(), ids=SCALES)
def test_an_interrupted_generation_is_noticed_at_any_scale(timesteps: tuple[float, ...]) -> None:
    clock = StepClock(timesteps, "timestep")
    for done in range(1, len(timesteps)):
        steps = [host(clock, t) for t in timesteps[:done]]
        assert steps == list(range(done))
    assert [host(clock, t) for t in timesteps] == list(range(len(timesteps)))


@pytest.mark.parametrize("timesteps", SCALES.values(), ids=SCALES)
def test_a_skipped_step_is_refused_at_any_scale(timesteps: tuple[float, ...]) -> None:
    clock = StepClock(timesteps, "timestep")
    host(clock, timesteps[0])
    with pytest.raises(ConfigError, match="step 1 of"):
        host(clock, timesteps[2])


@pytest.mark.parametrize("timesteps", SCALES.values(), ids=SCALES)
def test_rounding_is_not_another_timestep(timesteps: tuple[float, ...]) -> None:
    clock = StepClock(timesteps, "timestep")
    rounded = [t * (1 + 1e-7) for t in timesteps]  # as from another device
    assert [host(clock, t) for t in rounded] == list(range(len(timesteps)))


def test_a_schedule_shifted_by_a_part_of_a_step_is_refused() -> None:
    timesteps = tuple(1 - step / 20 for step in range(20))
    clock = StepClock(timesteps, "timestep")
    with pytest.raises(ConfigError, match="step 0 of 20"):
        host(clock, timesteps[0] - 0.001)


def test_a_single_step_has_a_tolerance_of_its_own() -> None:
    clock = StepClock((0.001,), "timestep")
    assert [host(clock, 0.001), host(clock, 0.001)] == [0, 0]
    with pytest.raises(ConfigError, match="step 0 of 1"):
        host(clock, 0.0015)
