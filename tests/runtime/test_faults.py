"""A damaged engine store gives the right picture or one true sentence."""

import pytest

from tests.runtime.faults import FAULTS, Trial, copying_instead_of_building


@pytest.fixture(scope="module")
def trial(tmp_path_factory, model_folder, engine_folder, up2_folder, fp16_folder):
    built = [
        (model_folder, "none", "fp32", engine_folder),
        (model_folder, "up2", "fp32", up2_folder),
        (model_folder, "up2", "fp16", fp16_folder),
    ]
    trial = Trial(tmp_path_factory.mktemp("faults"), built)
    with copying_instead_of_building(trial.store):
        yield trial


@pytest.mark.parametrize("kind", range(len(FAULTS)), ids=[fault.__name__ for fault in FAULTS])
def test_faults(trial, kind):
    for number in range(5):
        trial.run(number * len(FAULTS) + kind)
