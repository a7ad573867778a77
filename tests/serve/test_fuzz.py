"""Requests that schemathesis makes of the OpenAPI schema: no answer is one it does not document."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.served import Served

schemathesis = pytest.importorskip("schemathesis", reason="it makes these requests")
POSTED = ["/v1/images/generations", "/sdapi/v1/txt2img", "/v1/plans"]


@pytest.fixture(scope="module")
def served(engine_folder):
    with Served(engine_folder, max_images=2, max_steps=4) as one:
        yield one


def fuzz(served, route, mode, examples):
    """Make so many requests of a route, which fit the schema or do not, and check the answers."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    # What fits the schema may still be impossible: a stride beyond the steps, a size of 7 pixels.
    excluded = [positive_data_acceptance]
    (operation,) = schema[route].values()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers_as_documented(case):
        answer = case.call_and_validate(excluded_checks=excluded)
        assert "Traceback" not in answer.text

    answers_as_documented()
    assert served.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("route", POSTED)
def test_every_answer_is_documented(served, route, mode):
    fuzz(served, route, mode, 20)


@pytest.mark.parametrize(
    ("route", "examples"),
    [
        ("/v1/images/files/{name}", 20),
        *((route, 1) for route in ("/v1/models", "/healthz", "/readyz", "/metrics", "/")),
    ],
)
def test_what_is_fetched_is_documented(served, route, examples):
    fuzz(served, route, schemathesis.GenerationMode.POSITIVE, examples)
