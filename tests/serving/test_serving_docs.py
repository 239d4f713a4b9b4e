"""docs/serving.md names what there is."""

import re
from pathlib import Path
from typing import Any

import pytest
from all_metrics import metric_names

from jpaged.cli.parser import build_parser
from jpaged.serving import protocol
from jpaged.serving.app import create_app
from jpaged.serving.protocol_chat import ChatCompletionRequest
from jpaged.serving.settings import ServerSettings
from jpaged.serving.tool_parsers import TOOL_PARSERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text()
WITHOUT_CODE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


def section(title: str) -> str:
    return WITHOUT_CODE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def quoted(text: str) -> set[str]:
    """Names in backquotes; of `a=b` or `a B` the first word."""
    return {re.split(r"[ =:]", name)[0] for name in re.findall(r"`([^`]+)`", text)}


def flags(command: str) -> set[str]:
    choices: Any = next(a for a in build_parser()._actions if a.dest == "command").choices
    return {flag for action in choices[command]._actions for flag in action.option_strings}


def test_every_flag_exists():
    known = set().union(*(flags(c) for c in ("serve", "bench", "run-batch", "chat")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    elsewhere = {"--gpus", "--no-deps", "--profile", "--build"}  # of docker and pip
    assert named - known - elsewhere == set()


def test_fields_are_those_of_the_protocol():
    accepted, refused = section("Fields").split("\nRefused,")
    fields = protocol.CompletionRequest.model_fields.keys() | (
        ChatCompletionRequest.model_fields.keys()
    )
    assert fields <= quoted(accepted)
    named = {name.rstrip("*") for name in quoted(refused.partition(" So are ")[0])}
    assert not {name for name in named if not any(f.startswith(name) for f in protocol.REFUSED)}


def test_routes_are_those_of_the_server(engine):
    app = create_app(engine, ServerSettings())
    paths = {re.sub(r"\{\w+(:path)?\}", "{name}", getattr(r, "path", "")) for r in app.routes}
    told = set(re.findall(r"(?<=[` ])/[\w/{}.]*", section("Routes")))
    internal = {path for path in paths if path.startswith(("/static", "/docs/"))}
    assert told == paths - internal


def test_metrics_are_those_of_the_server():
    named = quoted(section("Metrics and logs").partition("\nLogs ")[0])
    others = {"/metrics", "jpaged", "model_name", "_total", "finished_reason"}
    told = {name for name in metric_names() if not name.endswith("_created")}
    assert named - others == told


def test_parsers_are_those_that_exist():
    assert set(TOOL_PARSERS) <= quoted(section("Flags"))


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_linked_file_exists(link):
    assert (ROOT / "docs" / link).exists()


@pytest.mark.parametrize("anchor", re.findall(r"\]\(#([^)]+)\)", TEXT))
def test_linked_heading_exists(anchor):
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
