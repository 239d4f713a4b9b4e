"""Fake engines and input for the commands."""

import io
import signal
import sys

import pytest
from fake_llm import FakeLLM

from jpaged.cli import engine


@pytest.fixture
def llms(monkeypatch) -> list[FakeLLM]:
    """Puts fake engines in place; the list holds those that were made."""
    made = []

    def make_llm(options):
        made.append(FakeLLM(options))
        return made[-1]

    monkeypatch.setattr(engine, "make_llm", make_llm)
    return made


@pytest.fixture
def stdin(monkeypatch):
    def give(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    give("")
    return give


@pytest.fixture
def sigint():
    """Ctrl-C as a terminal has it; what starts a process in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
