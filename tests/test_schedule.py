"""Multipliers of each step, against hand-computed points of the shape."""

import itertools

import pytest

from nanochat_hf.optim.schedule import Schedule

SHAPE = Schedule(num_iterations=1000, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)


@pytest.mark.parametrize(
    "step,lr", [(0, 1 / 40), (19, 0.5), (39, 1.0), (40, 1.0), (350, 1.0), (675, 0.525), (1000, 0.05)]
)
def test_the_rate_warms_up_stays_and_falls(step, lr):
    assert SHAPE.at(step).lr == pytest.approx(lr)


def test_the_rate_never_jumps():
    rates = [SHAPE.lr(step) for step in range(1001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 1 / 39


@pytest.mark.parametrize("step,momentum", [(0, 0.85), (200, 0.91), (400, 0.97 - 0.07 * 50 / 650), (1000, 0.90)])
def test_momentum_rises_for_400_steps_and_ends_lower(step, momentum):
    assert SHAPE.at(step).momentum == pytest.approx(momentum)


def test_weight_decay_follows_a_cosine_to_zero():
    assert [SHAPE.at(step).weight_decay for step in (0, 500, 1000)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_the_first_generation_is_constant_then_linear_to_zero():
    shape = Schedule(100, warmdown_ratio=0.2, momentum=(0.85, 0.95, 0.95), momentum_steps=300)
    assert [shape.lr(step) for step in (0, 79, 80, 90, 99, 100)] == pytest.approx([1, 1, 1, 0.5, 0.05, 0])


def test_without_a_decay_nothing_divides_by_zero():
    assert Schedule(10).at(10) == (1.0, 0.0, pytest.approx(0.853))
