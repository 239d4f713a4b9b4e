import logging

import pytest

from jpaged.pallas_kernels import registry


def test_takes_the_first_that_has_no_reason_against_it_and_logs_why(caplog):
    caplog.set_level(logging.INFO)
    assert registry.choose("some_op", None, {"reference": list, "xla": list}) == "xla"
    assert "some_op: xla" in caplog.text


def test_an_explicit_name_never_falls_back():
    with pytest.raises(NotImplementedError, match="xla cannot run here: too odd"):
        registry.choose("op", "xla", {"xla": lambda: ["too odd"], "reference": list})


def test_unknown_name():
    with pytest.raises(ValueError, match="implementation must be one of"):
        registry.choose("op", "triton", {"xla": list})  # pyright: ignore[reportArgumentType]


def test_nothing_serves_it():
    with pytest.raises(NotImplementedError, match="xla refused: too odd"):
        registry.choose("op", None, {"xla": lambda: ["too odd"]})
