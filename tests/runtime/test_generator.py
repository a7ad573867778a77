"""The generator against its own pictures one by one, and its costs against counted runs."""

from dataclasses import replace

import pytest

from encache.errors import EncacheError
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.runtime.engines import GraphEngines
from encache.runtime.generator import Cost, Generator, Order, group
from encache.runtime.jobs import Job
from encache.runtime.opening import Opening, resolve_run
from encache.runtime.options import SamplingOptions


def open_generator(folder, batch_size=3):
    opening = Opening.of(folder, ModelOptions(), EngineOptions(), "onnxruntime", folder)
    sampling, size = SamplingOptions(steps=6, stride=2), SizeOptions()
    run = resolve_run(opening, sampling, size, range(batch_size), batch_size, None)
    generator = Generator(opening, run, size)
    generator.pipeline.set_progress_bar_config(disable=True)
    return generator, run.settings


@pytest.fixture(scope="module")
def opened(up2_folder):
    return open_generator(up2_folder)


def test_equal_plans_and_sizes_are_drawn_together(opened):
    generator, settings = opened
    other = replace(settings, steps=4)
    orders = [
        *(Order(Job("hot dog", seed), settings) for seed in range(4)),
        Order(Job("hot dog", 0), other),
        Order(Job("hot dog", 0, height=24), settings),
        Order(Job("red apple", 9, "green"), settings),
        Order(Job("red apple", 9), settings),
    ]
    batches = group(orders, 3)
    assert batches == [[0, 1, 2], [3, 7], [4], [5], [6]]
    drawn = dict(generator(orders))
    assert [*drawn] == [place for batch in batches for place in batch]
    assert drawn[5].size == (16, 24)
    for place, order in enumerate(orders):
        ((_, alone),) = generator([order])
        together = zip(drawn[place].tobytes(), alone.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in together) <= 1  # rounding, at most


def test_each_picture_avoids_its_own(opened):
    generator, settings = opened
    orders = [Order(Job("hot dog", 0, unwanted), settings) for unwanted in ("red apple", "")]
    first, second = (picture.tobytes() for _, picture in generator(orders))
    assert first != second
    ((_, alone),) = generator(orders[:1])
    assert max(abs(a - b) for a, b in zip(first, alone.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(("guidance_scale", "rows"), [(7.5, 2), (1.0, 1)])
def test_costs_are_what_is_run(opened, monkeypatch, guidance_scale, rows):
    generator, settings = opened
    settings = replace(settings, guidance_scale=guidance_scale)
    order = Order(Job("hot dog", 0), settings)
    counted = {"encode": [], "decode": []}
    for name in counted:
        run = getattr(GraphEngines, name)

        def count(self, *given, name=name, run=run):
            text = given[-3 if name == "encode" else -1]["text"]
            calls = 1 if name == "encode" else len(given[1])
            counted[name].append(calls * len(text))
            return run(self, *given)

        monkeypatch.setattr(GraphEngines, name, count)
    [*generator([order])]
    assert generator.cost(order) == Cost(
        len(counted["encode"]), sum(counted["encode"]), sum(counted["decode"])
    )
    assert generator.cost(order) == Cost(3, 3 * rows, 6 * rows)


@pytest.mark.parametrize(
    ("job", "changes"),
    [({"height": 20}, {}), ({}, {"steps": 2000}), ({}, {"steps": 1})],
)
def test_what_cannot_be_drawn_is_known_before(opened, job, changes):
    generator, settings = opened
    with pytest.raises(EncacheError):
        generator.cost(Order(Job("x", 0, **job), replace(settings, **changes)))
