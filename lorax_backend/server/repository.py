"""The Triton model repository: `config.pbtxt` of the three models, generated from `tensors`, and their
`model.py`.

`model_repository/` of the checkout is this generator's output with no options filled in, so it takes all
options from the environment. `python -m lorax_backend.server.repository DEST` writes it anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorax_backend.tensors import (
    GENERATION_INPUTS,
    INPUTS,
    OUTPUTS,
    PROMPT_INPUTS,
    TOKENIZER_INPUTS,
    TOKENIZER_OUTPUTS,
    TensorSpec,
)

ENGINE_MODEL = "lorax"
TOKENIZER_MODEL = "lorax_tokenizer"
ENSEMBLE_MODEL = "lorax_ensemble"
MODELS = (ENGINE_MODEL, TOKENIZER_MODEL, ENSEMBLE_MODEL)

_MODEL_FILES = {
    ENGINE_MODEL: "from lorax_backend.triton_model import TritonPythonModel as TritonPythonModel\n",
    TOKENIZER_MODEL: "from lorax_backend.tokenizer_model import TritonPythonModel as TritonPythonModel\n",
}
_HEADER = (
    "# Written by lorax_backend/server/repository.py from lorax_backend/tensors.py; do not edit by hand.\n"
)
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


def config_type(datatype: str) -> str:
    """The name a model configuration uses for a datatype of the wire: BYTES is TYPE_STRING, INT32 is
    TYPE_INT32."""
    return _CONFIG_TYPES.get(datatype, f"TYPE_{datatype}")


def _quote(text: str) -> str:
    """A string literal of the protobuf text format, which reads JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _tensor_block(field: str, specs: Iterable[TensorSpec], optional: bool) -> str:
    items = []
    for spec in specs:
        dims = ", ".join(str(size) for size in spec.dims)
        tail = ", optional: true" if optional else ""
        kind = config_type(spec.datatype)
        items.append(
            f"  # {spec.doc}\n  {{ name: {_quote(spec.name)}, data_type: {kind}, dims: [ {dims} ]{tail} }}"
        )
    return f"{field} [\n" + ",\n".join(items) + "\n]\n"


def _parameter_blocks(parameters: Mapping[str, str]) -> str:
    return "".join(
        f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}\n"
        for key, value in sorted(parameters.items())
    )


def _instances(count: int) -> str:
    # KIND_MODEL leaves the choice of device to the model; without a group Triton would start one copy a GPU.
    return f"instance_group [ {{ kind: KIND_MODEL, count: {count} }} ]\n"


def _map_block(field: str, pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"      {field} {{ key: {_quote(key)} value: {_quote(value)} }}\n" for key, value in pairs)


def _step(model: str, inputs: Iterable[tuple[str, str]], outputs: Iterable[tuple[str, str]]) -> str:
    return (
        "    {\n"
        f"      model_name: {_quote(model)}\n"
        "      model_version: -1\n"
        + _map_block("input_map", inputs)
        + _map_block("output_map", outputs)
        + "    }"
    )


def engine_config(parameters: Mapping[str, str]) -> str:
    """`config.pbtxt` of `lorax`: decoupled, one instance, no batch dimension (the engine batches by
    itself)."""
    return (
        _HEADER
        + f'name: "{ENGINE_MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
        + "model_transaction_policy { decoupled: true }\n"
        + _instances(1)
        + _parameter_blocks(parameters)
        + _tensor_block("input", INPUTS, optional=True)
        + _tensor_block("output", OUTPUTS, optional=False)
    )


def tokenizer_config(parameters: Mapping[str, str], instances: int) -> str:
    """`config.pbtxt` of `lorax_tokenizer`: text or messages in, ids out, `instances` processes."""
    return (
        _HEADER
        + f'name: "{TOKENIZER_MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
        + _instances(instances)
        + _parameter_blocks(parameters)
        + _tensor_block("input", TOKENIZER_INPUTS, optional=True)
        + _tensor_block("output", TOKENIZER_OUTPUTS, optional=False)
    )


def ensemble_config() -> str:
    """`config.pbtxt` of `lorax_ensemble`: tokenizer, then engine.

    Nothing may stand behind the decoupled step: its responses would cost twice as much, and a stream would be
    cut when the server drains.
    """
    prompt = {spec.name for spec in PROMPT_INPUTS}
    passed_on = [(spec.name, spec.name) for spec in GENERATION_INPUTS if spec.name not in prompt]
    ids = TOKENIZER_OUTPUTS[0].name
    steps = (
        _step(TOKENIZER_MODEL, [(spec.name, spec.name) for spec in TOKENIZER_INPUTS], [(ids, "prompt_ids")]),
        _step(ENGINE_MODEL, [(ids, "prompt_ids"), *passed_on], [(spec.name, spec.name) for spec in OUTPUTS]),
    )
    return (
        _HEADER
        + f'name: "{ENSEMBLE_MODEL}"\nplatform: "ensemble"\nmax_batch_size: 0\n'
        + _tensor_block("input", GENERATION_INPUTS, optional=True)
        + _tensor_block("output", OUTPUTS, optional=False)
        + "ensemble_scheduling {\n  step [\n"
        + ",\n".join(steps)
        + "\n  ]\n}\n"
    )


def repository_files(parameters: Mapping[str, str], tokenizer_instances: int = 1) -> dict[str, str]:
    """Path below the repository -> text, for every file of it."""
    files = {
        f"{ENGINE_MODEL}/config.pbtxt": engine_config(parameters),
        f"{TOKENIZER_MODEL}/config.pbtxt": tokenizer_config(parameters, tokenizer_instances),
        f"{ENSEMBLE_MODEL}/config.pbtxt": ensemble_config(),
        f"{ENSEMBLE_MODEL}/1/.gitkeep": "",
    }
    files |= {f"{model}/1/model.py": text for model, text in _MODEL_FILES.items()}
    return files


def write_repository(
    dest: Path, config_overrides: Mapping[str, str] | None = None, tokenizer_instances: int = 1
) -> Path:
    """Write the model repository to `dest` and return it.

    `config_overrides` are options of `config.ServerConfig` as text; they become `parameters` of both Python
    models and win over the environment. Files of the same names are replaced, others are left alone.
    """
    for name, text in repository_files(config_overrides or {}, tokenizer_instances).items():
        path = dest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return dest


if __name__ == "__main__":
    write_repository(Path(sys.argv[1]))
