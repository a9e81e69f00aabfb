"""Where the base model's files come from: a folder, a hub repository, or the built-in model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorax_backend.config import ServerConfig
from lorax_backend.smollm2 import ModelSourceError, ensure_smollm2

Progress = Callable[[str], None]

BUILT_IN = "smollm2"
_TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json",
]  # fmt: skip
_MODEL_FILES = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"]

# Patterns match whole paths. Some repositories hold the weights a second time, in other layouts.
_NOT_OURS = ["*/*", "consolidated*.safetensors"]


def resolve_model(config: ServerConfig, progress: Progress | None = None) -> Path:
    """Folder with the files of the base model `config.model_id`, fetched or converted first if need be.

    Raises:
        ModelSourceError: the model cannot be had; the message names it and says what to do.
    """
    folder = _resolve(config.model_id, config.revision, _MODEL_FILES + _TOKENIZER_FILES, config, progress)
    if not (folder / "config.json").is_file():
        raise ModelSourceError(
            f"model_id {config.model_id}: {folder} has no config.json, so it is not a model folder"
        )
    if config.load_format != "dummy" and not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"model_id {config.model_id}: {folder} has no .safetensors files; convert the model to safetensors first"
        )
    return folder


def resolve_tokenizer(config: ServerConfig, model_path: Path, progress: Progress | None = None) -> Path:
    """Folder with the tokenizer: of `config.tokenizer_id`, else the model's own.

    Raises:
        ModelSourceError: as `resolve_model`.
    """
    if not config.tokenizer_id:
        return model_path
    return _resolve(config.tokenizer_id, "", _TOKENIZER_FILES, config, progress)


def _resolve(
    model_id: str, revision: str, patterns: list[str], config: ServerConfig, progress: Progress | None
) -> Path:
    if model_id == BUILT_IN:
        return ensure_smollm2(progress=progress)
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model_id.startswith(("/", "./", "../", "~")) or model_id.count("/") > 1:
        raise ModelSourceError(f"model_id {model_id}: no such folder")
    name, _, own_revision = model_id.partition("@")
    if own_revision and revision and own_revision != revision:
        raise ModelSourceError(
            f"model_id {model_id}: names another revision than the option revision, {revision}"
        )
    return _download(name, own_revision or revision, patterns, config, progress)


def _download(
    name: str, revision: str, patterns: list[str], config: ServerConfig, progress: Progress | None
) -> Path:
    """Fetch a repository's files into the hub's cache; unfinished downloads are resumed by huggingface_hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"model_id {name}" + (f" at revision {revision}" if revision else "")
    if progress is not None:
        progress(f"fetching {what} from the hub")
    try:
        path = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=_NOT_OURS,
            cache_dir=config.hub_cache or None,
        )
    except GatedRepoError as error:
        raise ModelSourceError(
            f"{what}: access must be granted on its hub page first; then set HF_TOKEN to a token of that account"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelSourceError(f"{what}: the repository has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"{what}: no such repository on the hub, or it is private; check the name, or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise ModelSourceError(f"{what}: neither a folder nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"{what}: not in the local cache, and the hub cannot be reached: {error}"
        ) from error
    except Exception as error:  # the hub client lets errors of its network library through
        raise ModelSourceError(f"{what}: download failed: {type(error).__name__}: {error}") from error
    return Path(path)
