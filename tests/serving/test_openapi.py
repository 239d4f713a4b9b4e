"""What the OpenAPI document promises holds: schemathesis asks, within bounds, and checks."""

import fake_engine
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode, checks

from jpaged.serving.app import create_app
from jpaged.serving.settings import ServerSettings

OPERATIONS = [
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("get", "/health"),
    ("get", "/ping"),
    ("post", "/ping"),
    ("get", "/version"),
    ("get", "/load"),
    ("get", "/pool"),
    ("get", "/metrics"),
]
EXAMPLES = 40
SUPPRESSED = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]
# Rules between fields, and what the model's vocabulary allows, are not in a schema.
EXCLUDED = [checks.positive_data_acceptance]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    tokenizer = fake_engine.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    app = create_app(fake_engine.FakeEngine(tokenizer), ServerSettings())
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_operation_is_asked(schema):
    found = {
        (method, path) for path, methods in schema.raw_schema["paths"].items() for method in methods
    }
    assert found == set(OPERATIONS)


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(*place, RIGHT) for place in OPERATIONS] + [(*place, WRONG) for place in OPERATIONS[:4]]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_answer_breaks_the_document(schema, method, path, mode):
    operation = schema[path][method]

    @hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=SUPPRESSED)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        case.call_and_validate(excluded_checks=EXCLUDED)

    ask()


def test_document_names_every_answer_and_body(schema):
    document = schema.raw_schema
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "200" in operation["responses"], (method, path)
            assert ("requestBody" in operation) == (method == "post" and path != "/ping")
    schemas = document["components"]["schemas"]
    assert schemas["CompletionRequest"]["additionalProperties"] is False
    fields = schemas["CompletionRequest"]["properties"].keys()
    assert {"prompt", "top_k", "stream_options"} <= fields
    assert "ErrorEnvelopeAnswer" in schemas
