"""The arguments of `jpaged serve` that are about the server; names are vLLM's."""

import argparse

SERVER_PREFIX = "server_"
"""Begins the destinations that are fields of `ServerSettings`."""

SERVE_EXAMPLES = """\
examples:
  jpaged serve                                   the default model on port 8000
  jpaged serve ./my-checkpoint --api-key SECRET --served-model-name my-model
  jpaged serve --host 127.0.0.1 --max-num-queued-reqs 256
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hi"}]}'

API keys come from --api-key, --api-key-file and $JPAGED_API_KEY together; the
command line of a process can be read by others on the machine, a file need
not. Everything but /health and /ping needs one as "Authorization: Bearer KEY".
Exit code 2: an argument is wrong or the engine cannot start; 1: it died."""


def add_serve_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the server; the engine's are added by the caller."""
    _add_address(command)
    _add_security(command)
    _add_api(command)
    _add_limits(command)
    _add_logs(command)


def _group(command: argparse.ArgumentParser, title: str):
    group = command.add_argument_group(title)

    def add(flag: str, text: str, default: object = None, *, dest: str = "", **options) -> None:
        shown = "" if default is None else f" (default: {default})"
        name = dest or flag.removeprefix("--").replace("-", "_")
        if options.pop("switch", False):
            options |= {"action": "store_const", "const": True}
        group.add_argument(flag, dest=SERVER_PREFIX + name, help=text + shown, **options)

    return add


def _add_address(command: argparse.ArgumentParser) -> None:
    add = _group(command, "address")
    add("--host", "address to listen on (default: all IPv4 addresses)", metavar="HOST")
    add("--port", "TCP port; 0 takes a free one", 8000, type=int, metavar="N")
    add("--uds", "listen on this Unix socket instead", metavar="PATH")
    add("--root-path", "path under which a proxy shows the server", metavar="PATH")


def _add_security(command: argparse.ArgumentParser) -> None:
    add = _group(command, "security")
    add("--api-key", "a key that opens the server; may be repeated", action="append", metavar="KEY")
    add("--api-key-file", "a file with one key a line", metavar="FILE")
    add("--ssl-certfile", "speak TLS with this certificate", metavar="FILE")
    add("--ssl-keyfile", "key of the certificate, if it is not in the same file", metavar="FILE")
    add("--ssl-keyfile-password", "of an encrypted key", metavar="TEXT")
    add("--ssl-ca-certs", "clients need a certificate signed by these", metavar="FILE")
    add("--ssl-ciphers", "ciphers that are allowed, by OpenSSL's names", metavar="LIST")
    add("--allowed-origins", "origins whose pages may call (CORS)", nargs="+", metavar="ORIGIN")
    add("--allowed-methods", "methods they may use", "*", nargs="+", metavar="METHOD")
    add("--allowed-headers", "headers they may send", "*", nargs="+", metavar="HEADER")
    add("--allow-credentials", "they may send cookies and authorization", switch=True)
    add("--disable-fastapi-docs", "no /docs, /redoc and /openapi.json", switch=True)
    add("--trust-request-chat-template", "requests may bring templates of their own", switch=True)


def _add_api(command: argparse.ArgumentParser) -> None:
    add = _group(command, "API")
    add(
        "--served-model-name",
        "what clients call the model; several may follow (default: the model's name)",
        dest="served_model_names",
        nargs="+",
        metavar="NAME",
    )
    add("--chat-template", "file with a template instead of the model's own", metavar="FILE")
    add("--response-role", "role of the answers' messages", "assistant", metavar="ROLE")
    add("--enable-auto-tool-choice", "the model may choose to call tools", switch=True)
    add("--tool-call-parser", "format in which the model writes calls", metavar="NAME")
    add("--return-tokens-as-token-ids", 'logprobs show tokens as "token_id:ID"', switch=True)
    add("--enable-force-include-usage", "streams end with their usage", switch=True)
    add("--enable-request-id-headers", "answers carry X-Request-Id", switch=True)
    add(
        "--sse-keep-alive-interval",
        "seconds of silence after which a stream gets a comment; 0: never",
        0,
        dest="sse_keep_alive_interval_s",
        type=float,
        metavar="S",
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    add = _group(command, "limits")
    add("--max-num-queued-reqs", "requests that may wait (default: any)", type=int, metavar="N")
    add("--max-num-queued-tokens", "the same of prompt tokens", type=int, metavar="N")
    add("--max-n", "most continuations of a prompt", 128, type=int, metavar="N")
    add(
        "--max-prompts",
        "most prompts of a request, each counted n times",
        1024,
        type=int,
        metavar="N",
    )
    add("--max-body-bytes", "largest body of a request", 16777216, type=int, metavar="N")
    add(
        "--body-timeout",
        "seconds that a request's head, and then its body, may take to come",
        60,
        dest="body_timeout_s",
        type=float,
        metavar="S",
    )
    add(
        "--write-timeout",
        "seconds that a client may take to read what was sent",
        120,
        dest="write_timeout_s",
        type=float,
        metavar="S",
    )
    add(
        "--shutdown-timeout",
        "seconds that open requests may go on once the server is told to stop",
        0,
        dest="shutdown_timeout_s",
        type=float,
        metavar="S",
    )


def _add_logs(command: argparse.ArgumentParser) -> None:
    add = _group(command, "logs")
    add("--log-level", "critical, error, warning, info, debug or trace", "info", metavar="LEVEL")
    add("--log-format", "text, or json for one object a line", "text", metavar="FORMAT")
    add(
        "--otlp-traces-endpoint",
        "send a span of each request to this OpenTelemetry collector (OTLP over HTTP)",
        metavar="URL",
    )
    add("--disable-access-log", "no line for each HTTP request", switch=True)
    add(
        "--disable-log-requests",
        "no line for each request for text",
        dest="enable_log_requests",
        action="store_const",
        const=False,
    )
