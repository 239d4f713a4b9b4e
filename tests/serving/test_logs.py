import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jpaged.serving import logs

ROOT = Path(__file__).parents[2]
logger = logging.getLogger("jpaged.test")


def _run(code, **options):
    script = "import logging, os\nfrom jpaged.serving import logs\n" + code
    return subprocess.run(
        [sys.executable, "-c", script],
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_a_line_tells_its_request():
    done = _run(
        "with logs.logging_to_stderr('info', 'json'):\n"
        "    logs.request_id.set('r1')\n"
        "    logging.getLogger('a').info('%s done', 'it')\n"
        "    logging.getLogger('a').debug('not this')\n"
    )
    (line,) = done.stderr.splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {"level": "info", "logger": "a", "message": "it done", "request_id": "r1"}


def test_a_line_of_text_ends_with_its_request_unless_it_names_it():
    done = _run(
        "with logs.logging_to_stderr():\n"
        "    logs.request_id.set('r1')\n"
        "    logging.getLogger('a').info('done')\n"
        "    logging.getLogger('a').info('r1 done')\n"
    )
    first, second = done.stderr.splitlines()
    assert first.endswith("INFO     a: done [r1]")
    assert second.endswith("INFO     a: r1 done")


def test_nobody_can_write_lines_of_their_own():
    done = _run(
        "with logs.logging_to_stderr():\n"
        "    logging.getLogger('a').info('GET %s', '/\\n2026 INFO all is well\\x1b[2J')\n"
    )
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("GET /\\x0a2026 INFO all is well\\x1b[2J\n")


def test_an_exception_is_told_with_its_traceback():
    done = _run(
        "with logs.logging_to_stderr('error', 'json'):\n"
        "    try:\n"
        "        1 / 0\n"
        "    except ZeroDivisionError:\n"
        "        logging.getLogger('a').exception('bad')\n"
    )
    fields = json.loads(done.stderr)
    assert fields["message"] == "bad"
    assert fields["exception"].endswith("ZeroDivisionError: division by zero")


def test_a_full_disk_loses_lines_and_nothing_else():
    with open("/dev/full", "w") as full:
        done = _run(
            "with logs.logging_to_stderr() as writer:\n"
            "    for _ in range(5):\n"
            "        logging.getLogger('a').info('x' * 10_000)\n"
            "assert writer.num_lost == 5\n",
            stderr=full,
        )
    assert done.returncode == 0


def test_a_reader_that_does_not_read_holds_up_nobody(monkeypatch):
    """The writer's thread waits for the pipe; the logger goes on and drops what is too much."""
    monkeypatch.setattr(logs, "_MAX_WAITING", 3)
    reader, writer = os.pipe()

    class Stderr:
        def fileno(self):
            return writer

    monkeypatch.setattr(logs.sys, "__stderr__", Stderr())
    with logs.logging_to_stderr() as lines:
        for _ in range(100):
            logger.info("x" * 10_000)
        assert lines.num_lost > 0
        # The block ends only when all is written: read what there is until then.
        reading = threading.Thread(target=_read_all, args=(reader,))
        reading.start()
    os.close(writer)
    reading.join()
    os.close(reader)


def _read_all(descriptor):
    while os.read(descriptor, 1 << 16):
        pass


def test_logging_is_as_before_after_the_block():
    root = logging.getLogger()
    before = root.handlers, root.level
    with logs.logging_to_stderr("trace"):
        assert root.level == 5
    assert (root.handlers, root.level) == before


@pytest.mark.parametrize("level", ["critical", "error"])
def test_the_ready_line_comes_at_any_level(level):
    done = _run(
        f"with logs.logging_to_stderr({level!r}):\n"
        "    logging.getLogger('a').log(logs.READY, 'here')\n"
        "    logging.getLogger('a').warning('not this')\n"
    )
    assert done.stderr.count("\n") == 1
    assert "READY    a: here" in done.stderr
