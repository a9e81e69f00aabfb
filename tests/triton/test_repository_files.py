"""The checked-in model repository and what the generator writes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lorax_backend.config import load_config
from lorax_backend.server.repository import MODELS, repository_files, write_repository
from lorax_backend.tensors import GENERATION_INPUTS, INPUTS, OUTPUT_FLAGS, OUTPUTS

CHECKOUT = Path(__file__).parents[2] / "model_repository"


def parse(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture
def configs() -> dict[str, model_config_pb2.ModelConfig]:
    files = repository_files({})
    return {model: parse(files[f"{model}/config.pbtxt"]) for model in MODELS}


def test_the_checked_in_repository_is_the_generators_output(tmp_path):
    write_repository(tmp_path)

    generated = {
        path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    checked_in = {
        path.relative_to(CHECKOUT): path.read_text()
        for path in CHECKOUT.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert checked_in == generated, "run: python -m lorax_backend.server.repository model_repository"


@pytest.mark.parametrize("model", ["lorax", "lorax_tokenizer"])
def test_a_model_file_is_one_import_line(model):
    body = ast.parse((CHECKOUT / model / "1" / "model.py").read_text()).body

    assert [type(statement) for statement in body] == [ast.ImportFrom]


def test_the_engine_model_is_decoupled_and_loaded_once_wherever_it_runs(configs):
    config = configs["lorax"]

    assert config.backend == "python"
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled
    groups = [(group.kind, group.count) for group in config.instance_group]
    assert groups == [(model_config_pb2.ModelInstanceGroup.KIND_MODEL, 1)]


@pytest.mark.parametrize("model", MODELS)
def test_every_input_is_optional(configs, model):
    assert configs[model].input
    assert all(tensor.optional for tensor in configs[model].input)


def test_the_tensors_of_the_configuration_are_those_of_the_table(configs):
    assert [tensor.name for tensor in configs["lorax"].input] == [spec.name for spec in INPUTS]
    for model in ("lorax", "lorax_ensemble"):
        assert [tensor.name for tensor in configs[model].output] == [spec.name for spec in OUTPUTS]
    assert [tensor.name for tensor in configs["lorax_ensemble"].input] == [
        spec.name for spec in GENERATION_INPUTS
    ]


def test_the_ensemble_passes_every_input_on_and_ends_with_the_decoupled_model(configs):
    config = configs["lorax_ensemble"]
    steps = config.ensemble_scheduling.step

    assert [step.model_name for step in steps] == ["lorax_tokenizer", "lorax"]
    used = {tensor for step in steps for tensor in step.input_map.values()}
    assert {tensor.name for tensor in config.input} <= used
    assert set(steps[1].output_map.values()) == {tensor.name for tensor in config.output}
    for step in steps:
        inputs = {tensor.name for tensor in configs[step.model_name].input}
        outputs = {tensor.name for tensor in configs[step.model_name].output}
        assert set(step.input_map) <= inputs
        assert set(step.output_map) <= outputs


def test_every_optional_output_has_an_input_that_asks_for_it():
    inputs = {spec.name for spec in INPUTS}
    outputs = {spec.name for spec in OUTPUTS}

    assert set(OUTPUT_FLAGS.values()) <= inputs
    assert outputs - {"text_output", "embedding", "sequence_index"} == set(OUTPUT_FLAGS)


def test_options_become_parameters_that_the_configuration_reads_back(tmp_path):
    awkward = 'C:\\models "new"/ünï'
    write_repository(tmp_path, {"model_id": awkward, "max_total_tokens": "77"}, tokenizer_instances=3)

    for model in ("lorax", "lorax_tokenizer"):
        config = parse((tmp_path / model / "config.pbtxt").read_text())
        options = load_config(
            {key: value.string_value for key, value in config.parameters.items()}, environ={}
        )
        assert (options.model_id, options.max_total_tokens) == (awkward, 77)
    assert parse((tmp_path / "lorax_tokenizer" / "config.pbtxt").read_text()).instance_group[0].count == 3
