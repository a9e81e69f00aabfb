"""Text to token ids and back.

The Rust tokenizer is used directly: it needs neither torch nor transformers, whose import costs a serving process
seconds and hundreds of megabytes. transformers is asked only where a folder has no `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_backend.errors import TemplateError, ValidationError
from lorax_backend.serving.chat import ChatTemplate
from lorax_backend.serving.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TokenizerPool:
    """The tokenizer and chat template of one model folder. All methods may be called from any thread; encoding
    releases the GIL.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json (or files that transformers can convert).
        model_folder: where config.json, which bounds the ids, lies; `folder` if None.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, model_folder: Path | None = None) -> None:
        self.folder = Path(folder)
        self._config = _read_json(self.folder / "tokenizer_config.json")
        self._tokenizer = _load(self.folder, self._config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = _special_tokens(self.folder, self._config)
        self.vocab_size = _vocab_size(Path(model_folder or folder)) or self._tokenizer.get_vocab_size()
        self.eos_token_ids = _eos_ids(Path(model_folder or folder), self._tokenizer, self.special_tokens)
        self._template = ChatTemplate.from_folder(self.folder, self._config, self.special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template_variables(self) -> frozenset[str]:
        """Names that the chat template reads; a template that does not read `tools` ignores them."""
        return frozenset() if self._template is None else self._template.variables

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; texts of special tokens inside it become those tokens.

        Raises:
            ValidationError: the text holds surrogate code points, which no encoding of text can carry.
        """
        self._check(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
        """The tokens of a text as `{id, text, start, stop}`: the vocabulary's own spelling, and where the token lies in
        the text, in characters (0 and 0 for a token that was added).

        Raises:
            ValidationError: see `encode`.
        """
        self._check(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [
            {"id": token_id, "text": piece, "start": start, "stop": stop}
            for token_id, piece, (start, stop) in zip(
                encoding.ids, encoding.tokens, encoding.offsets, strict=True
            )
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @staticmethod
    def _check(text: str) -> None:
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(
                f"text_input: not valid Unicode (a lone surrogate at character {error.start}); send UTF-8 text"
            ) from None

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, special tokens included; empty for an id the tokenizer does not know."""
        if token_id in self.special_ids:
            return self._tokenizer.id_to_token(token_id) or ""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        guideline: str | None = None,
    ) -> str:
        """The prompt of a chat; it holds its own special tokens, so encode it without adding any.

        Raises:
            TemplateError: the model has no chat template, or it failed.
        """
        if self._template is None:
            raise TemplateError("messages: this model has no chat template; send text_input instead")
        return self._template.render(messages, tools, guideline)

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> IncrementalDetokenizer:
        """A detokenizer for the continuation of a prompt."""
        return IncrementalDetokenizer(self.decode, prompt_ids)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _load(folder: Path, config: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
        _apply_added_specials(tokenizer, folder, config)
        return tokenizer
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer.json; set tokenizer_id to a model that has one")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer


def _apply_added_specials(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Begin and end tokens as tokenizer_config.json asks, where it says so; tokenizer.json decides otherwise."""
    explicit = [key for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)]
    if not explicit:
        return
    from tokenizers.processors import TemplateProcessing

    special = _special_tokens(folder, config)
    before = special.get("bos_token") if config.get("add_bos_token") else None
    after = special.get("eos_token") if config.get("add_eos_token") else None
    used = [(text, tokenizer.token_to_id(text)) for text in (before, after) if text]
    if any(token_id is None for _, token_id in used):
        return
    single = " ".join(part for part in (before, "$A", after) if part)
    tokenizer.post_processor = TemplateProcessing(
        single=single.split(" "), pair=None, special_tokens=[pair for pair in used if pair[1] is not None]
    )


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Texts of the named special tokens; each is a text or an object with `content`."""
    merged = _read_json(folder / "special_tokens_map.json") | config
    result = {}
    for name in _SPECIAL_NAMES:
        value = merged.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            result[name] = text
    return result


def _model_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def _vocab_size(folder: Path) -> int | None:
    size = _model_config(folder).get("vocab_size")
    return size if isinstance(size, int) else None


def _eos_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """End tokens of generation_config.json, else of config.json, and the tokenizer's own.

    The tokenizer's belongs to them because fine-tuned chat models often set only that one.
    """
    ids: list[int] = []
    for config in (_read_json(folder / "generation_config.json"), _model_config(folder)):
        value = config.get("eos_token_id")
        ids = [value] if isinstance(value, int) else [int(item) for item in value or ()]
        if ids:
            break
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own])]))
