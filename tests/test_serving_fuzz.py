"""The endpoints against requests drawn from their own OpenAPI schema, right and wrong ones."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")


def asked(operation, mode, counts: Counter) -> None:
    """Requests of one endpoint: no server error, and every response is one that the schema says."""
    # any bytes are a picture to a schema
    pictured = any("multipart" in body.media_type for body in operation.body)
    unjudged = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")] if pictured else []

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case) -> None:
        response = case.call(timeout=60)
        case.validate_response(response, excluded_checks=unjudged)
        counts[operation.label, response.status_code] += 1

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_requests_of_the_schema(served, right):
    """Right requests are taken, wrong ones are not."""
    engine, counts = served.Held(), Counter()
    engine.release()
    mode = schemathesis.GenerationMode.POSITIVE if right else schemathesis.GenerationMode.NEGATIVE
    with served.live(engine, served.BOTH, queue=64) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for operation in (result.ok() for result in schema.get_all_operations()):
            # nothing can be wrong with an address alone
            if right or operation.body:
                asked(operation, mode, counts)
        assert not running.batcher.error
    images = {f"POST /v1/images/{name}" for name in served.BOTH.endpoints}
    assert images <= {label for label, _ in counts} and not any(status >= 500 for _, status in counts)
    if right:
        assert counts["POST /v1/images/generations", 200] >= 20
    else:
        assert all(counts[label, 400] >= 20 for label in images) and engine.batches == []
