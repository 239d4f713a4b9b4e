"""What a user may set on the HTTP server: `ServerSettings`, checked on construction."""

import dataclasses
import ipaddress
import pathlib
from typing import Literal

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
LOG_FORMATS = ("text", "json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Options of the server; the engine has its own (`EngineConfig`).

    Attributes:
        host: Address to listen on; all IPv4 addresses by default.
        port: TCP port; 0 takes a free one.
        uds: Path of a Unix socket, instead of host and port.
        api_keys: Any of them opens the server; without one it is open to all.
        ssl_keyfile: Key of the certificate in `ssl_certfile`.
        ssl_certfile: Makes the server speak TLS.
        ssl_keyfile_password: Of an encrypted key.
        ssl_ca_certs: Certificate authorities that must have signed the clients' certificates.
        ssl_ciphers: OpenSSL's names of the ciphers that are allowed.
        root_path: Path under which a proxy shows the server.
        served_model_names: What clients may call the model; the first is in answers. The engine's
            own name for it if empty.
        chat_template: Text of a template instead of the model's own.
        trust_request_chat_template: Whether a request may bring its own template.
        response_role: Role of the answers' messages.
        enable_auto_tool_choice: Whether the model may choose to call tools.
        tool_call_parser: Name of the format in which the model writes calls.
        return_tokens_as_token_ids: Tokens in log-probabilities are shown as "token_id:ID".
        enable_force_include_usage: Streams end with a usage chunk unless the request says no.
        sse_keep_alive_interval_s: Silence after which a stream gets a comment; 0: never.
        enable_request_id_headers: Whether answers carry X-Request-Id.
        disable_fastapi_docs: No /docs, /redoc and /openapi.json.
        enable_log_requests: One line a request in the log, without its text.
        disable_access_log: No line of uvicorn for each HTTP request.
        log_level: Of all logs.
        allowed_origins: Origins whose pages may call the server (CORS); none by default.
        allowed_methods: Methods they may use.
        allowed_headers: Headers they may send.
        allow_credentials: Whether they may send cookies and authorization.
        max_body_bytes: Largest body of a request.
        body_timeout_s: Longest time that a request's head, and then its body, may take to come.
        write_timeout_s: Longest time that a client may take to read what was sent.
        max_prompts: Most prompts in one completions request, each counted `n` times.
        max_n: Most continuations of one prompt.
        max_num_queued_reqs: Most requests that wait for the engine; None: no limit.
        max_num_queued_tokens: Most prompt tokens that wait; None: no limit.
        shutdown_timeout_s: How long open requests may go on once the server is told to stop.
        log_format: "text", or "json" for one object a line.
        otlp_traces_endpoint: The collector that spans of requests are sent to (OTLP over HTTP).
    """

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None
    ssl_ciphers: str | None = None
    root_path: str = ""
    served_model_names: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    sse_keep_alive_interval_s: float = 0.0
    enable_request_id_headers: bool = False
    disable_fastapi_docs: bool = False
    enable_log_requests: bool = True
    disable_access_log: bool = False
    log_level: str = "info"
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_body_bytes: int = 16 * 2**20
    body_timeout_s: float = 60.0
    write_timeout_s: float = 120.0
    max_prompts: int = 1024
    max_n: int = 128
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    shutdown_timeout_s: float = 0.0
    log_format: Literal["text", "json"] = "text"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        """Refuses what no server could do.

        Raises:
            ValueError: naming the option, what it may be and what it was.
        """
        self._check_address()
        self._check_tls()
        self._check_texts()
        for name, low in (
            ("max_body_bytes", 1024),
            ("max_prompts", 1),
            ("max_n", 1),
            ("max_num_queued_reqs", 1),
            ("max_num_queued_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("sse_keep_alive_interval_s", "shutdown_timeout_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more seconds, got {getattr(self, name)}")
        for name in ("body_timeout_s", "write_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0 seconds, got {getattr(self, name)}")

    @property
    def is_tls(self) -> bool:
        """Whether the server speaks TLS."""
        return self.ssl_certfile is not None

    def _check_address(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        if self.uds is not None and self.host is not None:
            raise ValueError("uds and host exclude each other, got both")
        if self.host is not None and ":" in self.host:
            try:
                ipaddress.ip_address(self.host)
            except ValueError:
                raise ValueError(
                    f"host must be a name or an address without a port, got {self.host!r}"
                ) from None
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path must begin with /, got {self.root_path!r}")

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_ciphers"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs ssl_certfile")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not pathlib.Path(path).is_file():
                raise ValueError(f"{name} must be a file, got {path!r}")

    def _check_texts(self) -> None:
        if self.log_level not in LOG_LEVELS:
            raise ValueError(
                f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}"
            )
        if self.log_format not in LOG_FORMATS:
            raise ValueError(
                f"log_format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}"
            )
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("api_keys must be printable ASCII texts, got one that is not")
        if any(not name for name in self.served_model_names):
            raise ValueError("served_model_names must not hold an empty name")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint must be an http(s) address, got {endpoint!r}")
        if not self.response_role:
            raise ValueError("response_role must not be empty")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice needs tool_call_parser")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError('allow_credentials needs allowed_origins by name, got "*"')
