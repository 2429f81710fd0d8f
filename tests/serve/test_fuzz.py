"""Requests that nobody thought of, made by schemathesis from the API's own OpenAPI schema."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import tiny_engine

from llava_jax.inference.constraints import KINDS
from llava_jax.serve.app import create_app

CHAT = ("POST", "/v1/chat/completions")
WRITTEN = [("POST", path) for path in ("/v1/completions", "/v1/responses", "/tokenize", "/detokenize")]
READ = [("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/health"), ("GET", "/metrics")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with tiny_engine(tmp_path_factory.mktemp("fuzz"), slots=4, queue=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def api(engine):
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, "tiny"))


def fuzz(api, method: str, path: str, mode: GenerationMode, examples: int, model: str | None = None) -> list:
    """Sends requests that follow the schema, or that violate it; -> the responses, all of which are as it says."""
    responses = []

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        if model is None:
            responses.append(case.call_and_validate())
        else:
            case.body |= {"model": model, "max_tokens": 5, "max_completion_tokens": None}
            responses.append(case.call_and_validate(excluded_checks=[positive_data_acceptance]))

    check()
    return responses


@pytest.mark.parametrize(
    "method, path, mode, examples",
    [
        (*CHAT, GenerationMode.NEGATIVE, 100),
        *((*operation, GenerationMode.NEGATIVE, 30) for operation in WRITTEN),
        *((*operation, GenerationMode.POSITIVE, 10) for operation in READ),
    ],
)
def test_every_response_is_one_that_the_schema_has(api, method, path, mode, examples):
    assert fuzz(api, method, path, mode, examples)


def test_what_reaches_the_engine_is_answered_or_refused(api, engine):
    responses = fuzz(api, *CHAT, GenerationMode.POSITIVE, 100, model="tiny")
    assert {response.status_code for response in responses} == {200, 400}
    assert engine.stats().failed == 0
    refused = [response.json()["error"] for response in responses if response.status_code == 400]
    # What a schema cannot say: the order of roles, what an image is, which fields go together, how much is held, which
    # tokens there are, what a grammar is, and whether the template has a format for tools.
    unsaid = {None, "continue_final_message", "n", "logit_bias", "tools", "response_format", "structured_outputs"}
    unsaid |= {f"guided_{kind}" for kind in KINDS}
    strange = [error for error in refused if error["param"] not in unsaid]
    assert all(error["param"].startswith("messages") for error in strange), strange


def test_every_path_is_fuzzed(api):
    found = {(result.ok().method.upper(), result.ok().path) for result in api.get_all_operations()}
    assert found == {CHAT, *WRITTEN, *READ}
