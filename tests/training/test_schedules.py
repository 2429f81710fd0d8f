"""Learning rate schedules: those of transformers, at every step."""

import numpy as np
import pytest
import torch
import transformers
from transformers import optimization

from configs import common
from llava_jax.cli import UserError
from llava_jax.training import config_check
from llava_jax.training.schedules import SCHEDULES, learning_rate

PEAK = 2e-5


def wsd(optimizer, warmup, steps, share=0.1, shape="cosine", floor=0.0):
    return transformers.get_wsd_schedule(
        optimizer, warmup, int(np.ceil(steps * share)), steps, decay_type=shape, min_lr_ratio=floor
    )


# name, options of the configuration, the schedule of transformers as a function of the optimizer, warmup and steps
CASES = [
    ("cosine", {}, transformers.get_cosine_schedule_with_warmup),
    (
        "cosine",
        {"min_learning_rate_ratio": 0.1},
        lambda *given: optimization.get_cosine_with_min_lr_schedule_with_warmup(*given, min_lr_rate=0.1),
    ),
    ("linear", {}, transformers.get_linear_schedule_with_warmup),
    (
        "linear",
        {"min_learning_rate_ratio": 0.25},
        lambda *given: transformers.get_polynomial_decay_schedule_with_warmup(*given, lr_end=0.25 * PEAK),
    ),
    ("constant", {}, lambda optimizer, warmup, _: transformers.get_constant_schedule_with_warmup(optimizer, warmup)),
    ("wsd", {}, wsd),
    *(
        (
            "wsd",
            {"decay_ratio": 0.4, "decay_shape": shape, "min_learning_rate_ratio": 0.1},
            lambda *given, shape=shape: wsd(*given, 0.4, shape, 0.1),
        )
        for shape in ("cosine", "linear", "1-sqrt")
    ),
]


def config_of(name, warmup_ratio=0.03, **options):
    config = common.get_config()
    config.update(schedule=name, warmup_ratio=warmup_ratio, **options)
    config_check.check(config)
    return config


@pytest.mark.parametrize("steps,warmup_ratio", [(50, 0.1), (1299, 0.03), (7, 0.0), (1, 0.03)])
@pytest.mark.parametrize("name,options,theirs", CASES)
def test_the_schedule_is_that_of_transformers(name, options, theirs, steps, warmup_ratio):
    """Step k of both is the one with k steps before it."""
    rate = learning_rate(config_of(name, warmup_ratio, **options), PEAK, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = theirs(optimizer, int(np.ceil(steps * warmup_ratio)), steps)
    expected = schedule.get_last_lr()
    for _ in range(steps - 1):
        optimizer.step()
        schedule.step()
        expected += schedule.get_last_lr()
    np.testing.assert_allclose(rate(np.arange(steps)), expected, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_is_all_warmup_or_one_step_has_finite_rates(name):
    for steps, ratio in ((1, 0.5), (3, 1.0)):
        options = {"decay_ratio": 0.0} if name == "wsd" else {}
        rates = np.asarray([float(learning_rate(config_of(name, ratio, **options), PEAK, steps)(k)) for k in range(9)])
        assert np.isfinite(rates).all() and (rates >= 0).all() and (rates <= PEAK * (1 + 1e-6)).all()


def test_what_a_schedule_does_not_know_is_refused():
    for changes, message in (
        ({"name": "cosin"}, "config.schedule=cosin: is no such schedule; did you mean cosine. choose from cosine, lin"),
        ({"name": "wsd", "decay_ratio": 0.98}, "config.decay_ratio is 0.98, and warmup_ratio 0.03: together more th"),
        ({"name": "linear", "decay_ratio": 0.2}, "config.decay_ratio is 0.2, which is for schedule wsd, not linear"),
        (
            {"name": "constant", "min_learning_rate_ratio": 0.2},
            "min_learning_rate_ratio is 0.2, which is for schedule cosine or linear or wsd, not constant",
        ),
        ({"name": "wsd", "decay_shape": "sqrt"}, "config.decay_shape is 'sqrt', not one of 'cosine', 'linear', '1-sq"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(**changes)
