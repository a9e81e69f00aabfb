"""Flags of `lorax-triton serve`."""

from __future__ import annotations

import socket
from dataclasses import fields

import pytest

from lorax_backend.cli.main import build_parser, main
from lorax_backend.cli.options import ServeOptions, read_serve_options, taken_ports
from lorax_backend.config import ServerConfig, load_config, split_secrets


def read(*flags: str) -> ServeOptions:
    return read_serve_options(build_parser().parse_args(["serve", *flags]))


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        build_parser().parse_args(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("field", fields(ServerConfig), ids=lambda field: field.name)
def test_every_option_of_the_server_is_a_flag_that_reaches_its_configuration(field) -> None:
    other = {
        "bool": str(not field.default).lower(),
        "int": str(int(field.default or 0) + 7) if field.type == "int" else "",
        "float": "0.125",
        "str": next((choice for choice in field.metadata["choices"] if choice != field.default), "something"),
    }[field.type]
    flag = "--" + field.name.replace("_", "-")
    options = read(flag, other)
    assert options.parameters == {field.name: other}
    value = getattr(options.config, field.name)
    assert str(value).lower() == other
    assert value != field.default


def test_the_help_of_every_flag_is_the_options_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(ServerConfig):
        assert field.metadata["help"] in text, field.name


def test_a_flag_wins_over_the_environment_and_only_flags_are_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_TOTAL_TOKENS", "100")
    monkeypatch.setenv("BLOCK_SIZE", "32")
    options = read("--max-total-tokens", "200")
    assert (options.config.max_total_tokens, options.config.block_size) == (200, 32)
    assert options.parameters == {"max_total_tokens": "200"}


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--prefix-caching"], True),
        (["--prefix-caching", "false"], False),
        (["--prefix-caching=true"], True),
        (["--no-prefix-caching"], False),
    ],
)
def test_a_switch_can_be_named_negated_or_given_a_value(flags: list[str], value: bool) -> None:
    assert read(*flags).config.prefix_caching is value


def test_the_loraxs_name_of_the_hub_cache_is_accepted() -> None:
    assert read("--huggingface-hub-cache", "/data").config.hub_cache == "/data"


def test_values_that_cannot_be_read_are_reported_together_and_nothing_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--max-total-tokens", "many", "--dtype", "int7"]) == 2
    message = capsys.readouterr().err
    assert "max_total_tokens: 'many' is not a number" in message
    assert "dtype: 'int7' is not one of" in message


def test_a_misspelt_flag_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    message = usage_error(capsys, "serve", "--max-total-token", "5")
    assert "did you mean --max-total-tokens?" in message
    assert "'5'" not in message


def test_a_flag_only_lorax_has_is_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    message = usage_error(capsys, "serve", "--quantize", "awq")
    assert "--quantize is an option of LoRAX that this server does not have" in message


def test_a_stray_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unexpected argument 'smollm2'" in usage_error(capsys, "serve", "smollm2")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a port" in usage_error(capsys, "serve", f"--grpc-port={port}")


def test_the_same_port_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must be different ports"):
        read("--grpc-port", "8000")


def test_the_gateways_port_is_recorded() -> None:
    assert read("--port", "8081").port == 8081
    assert read().port == 8080


def test_a_port_somebody_listens_on_is_named_with_its_flag() -> None:
    with socket.socket() as listener, socket.socket() as free:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        free.bind(("127.0.0.1", 0))
        taken, unused = listener.getsockname()[1], free.getsockname()[1]
        free.close()
        options = read(
            "--hostname", "127.0.0.1", "--grpc-port", str(taken), "--triton-http-port", str(unused)
        )
        problems = [problem for problem in taken_ports(options) if "--metrics-port" not in problem]
    assert len(problems) == 1
    assert problems[0].startswith(f"--grpc-port {taken}: ")


def test_a_secret_option_goes_by_the_environment_and_shows_nowhere() -> None:
    shown, environment = split_secrets({"admin_api_key": "sesame", "max_batch_size": "4"})
    assert shown == {"max_batch_size": "4"}
    assert environment == {"ADMIN_API_KEY": "sesame"}
    config = load_config({}, environment)
    assert config.admin_api_key == "sesame"
    assert "sesame" not in repr(config)
