import pytest

from jpaged.serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 65536}, r"port must be in \[0, 65535\], got 65536"),
        ({"uds": "/tmp/x", "host": "a"}, "uds and host exclude each other"),
        ({"host": "localhost:8000"}, "host must be a name or an address without a port"),
        ({"root_path": "api"}, "root_path must begin with /"),
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_ciphers": "ALL"}, "ssl_ciphers needs ssl_certfile"),
        ({"ssl_certfile": "/no/such/file"}, "ssl_certfile must be a file"),
        ({"log_level": "loud"}, "log_level must be one of critical, error"),
        ({"api_keys": ("",)}, "api_keys must be printable ASCII texts"),
        ({"api_keys": ("schlüssel",)}, "api_keys must be printable ASCII texts"),
        ({"served_model_names": ("",)}, "served_model_names must not hold an empty name"),
        ({"response_role": ""}, "response_role must not be empty"),
        ({"enable_auto_tool_choice": True}, "enable_auto_tool_choice needs tool_call_parser"),
        (
            {"allow_credentials": True, "allowed_origins": ("*",)},
            "allow_credentials needs allowed_origins by name",
        ),
        ({"max_body_bytes": 10}, "max_body_bytes must be at least 1024, got 10"),
        ({"max_n": 0}, "max_n must be at least 1, got 0"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs must be at least 1, got 0"),
        ({"sse_keep_alive_interval_s": -1.0}, "sse_keep_alive_interval_s must be 0 or more"),
        ({"shutdown_timeout_s": float("nan")}, "shutdown_timeout_s must be 0 or more"),
        ({"body_timeout_s": 0.0}, "body_timeout_s must be more than 0"),
        ({"write_timeout_s": float("inf")}, "write_timeout_s must be more than 0"),
    ],
)
def test_impossible_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ServerSettings(**options)


def test_addresses():
    assert ServerSettings(host="::1").host == "::1"
    assert ServerSettings(host="localhost").port == 8000


def test_tls_needs_a_certificate(tmp_path):
    file = tmp_path / "cert.pem"
    file.write_text("")
    assert ServerSettings(ssl_certfile=str(file)).is_tls
    assert not ServerSettings().is_tls
