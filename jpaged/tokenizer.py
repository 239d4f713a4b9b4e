"""Text to token ids and back: loading, chat templates, and decoding as tokens arrive.

Everything rests on the package `tokenizers`; transformers is imported only for a directory that
has no `tokenizer.json`. A GGUF's tokenizer is rebuilt from its vocabulary and merges.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from jpaged.chat_template import render_chat_template
from jpaged.gguf_tokenizer import backend_from_gguf
from jpaged.models.config import as_token_ids
from jpaged.models.gguf import GGUFFile
from jpaged.models.sources import read_json, resolve_source

_OLDER_FILES = ("tokenizer.model", "vocab.json")
_CONTEXT_IDS = 6  # enough of a prompt's end to decode the first new token as its neighbour would


class Tokenizer:
    """A vocabulary with its text rules, special tokens and chat template.

    Attributes:
        backend: the tokenizer of the package `tokenizers`.
        vocab_size: how many ids there are, special ones included.
        bos_token_id: the id that begins a text, if there is one.
        eos_token_ids: the ids that end a text.
        chat_template: the model's own template, if it has one.
        tool_template: the one that it uses instead where tools are given, if it has one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        special_ids: Sequence[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
    ):
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.tool_template = tool_template
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(special_ids) | {i for i, token in added.items() if token.special}

    @property
    def eos_token_id(self) -> int | None:
        """The first of the ids that end a text."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens written in it become their own ids.

        Raises:
            ValueError: the text is no Unicode text.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what `tokenizers` makes of a lone surrogate
            raise ValueError("text must be Unicode, got a string with a lone surrogate") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become replacement characters."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str:
        """Returns the text of one id by itself, special tokens included, as logprobs show it."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it, if it is there."""
        return self.backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Returns whether an id stands for control rather than for text."""
        return token_id in self._special

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as the prompt text the model was trained on.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            tools: descriptions that the template may show.
            chat_template: a template instead of the model's own.
            **variables: further names the template may use.

        Raises:
            ValueError: no template, options that exclude each other, or a template that fails.
        """
        own = self.tool_template if tools and self.tool_template else self.chat_template
        template = chat_template or own
        if template is None:
            raise ValueError("chat_template must be given: the model has none of its own")
        special = {
            name: "" if token is None else self.backend.id_to_token(token)
            for name, token in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id))
        }
        return render_chat_template(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=special | variables,
        )


class IncrementalDetokenizer:
    """Turns ids into text as they arrive; never emits part of a character.

    Attributes:
        text: all that was emitted so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ):
        self.text = ""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._spaces_between_special_tokens = spaces_between_special_tokens
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []
        self._after_special = False
        # The end of the prompt decides whether the first new word keeps its space (SentencePiece).
        for token_id in prompt_token_ids[-_CONTEXT_IDS:]:
            self._step(token_id)

    def append(self, ids: Sequence[int]) -> str:
        """Takes new ids and returns the text that became final with them."""
        new = "".join(self._step(token_id) for token_id in ids)
        self.text += new
        return new

    def finish(self) -> str:
        """Returns what was held back: replacement characters for an unfinished character."""
        new = self._tokenizer.decode(self._held, self._skip_special_tokens)
        self._held.clear()
        self.text += new
        return new

    def _step(self, token_id: int) -> str:
        special = self._tokenizer.is_special(token_id)
        if special and self._skip_special_tokens and not self._held:
            return ""
        unspaced = special and self._after_special and not self._spaces_between_special_tokens
        self._after_special = special
        self._held.append(token_id)
        try:
            new = self._stream.step(self._tokenizer.backend, token_id)
        except Exception as error:  # the library raises this type itself for its one failure
            if "prefix" not in str(error):
                raise
            # Bytes that are no UTF-8 decoded differently once more came: start afresh here.
            self._stream = decoders.DecodeStream(skip_special_tokens=self._skip_special_tokens)
            new = self._stream.step(self._tokenizer.backend, token_id)
        if new is None:
            return ""
        self._held.clear()
        return new.lstrip(" ") if unspaced else new


def load_tokenizer(source: str | Path | None = None, *, revision: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a model source, of the same forms as `load_model` takes.

    Raises:
        ValueError: there is no tokenizer, or one of an unsupported kind.
        RuntimeError: the default model is not installed, or the hub cannot be reached.
    """
    path = resolve_source(source, revision=revision)
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        try:
            return _tokenizer_from_gguf(file)
        except KeyError as error:
            raise ValueError(f"{path}: metadata {error.args[0]!r} is missing") from error
        except Exception as error:  # `tokenizers` raises bare Exception for a bad vocabulary
            raise ValueError(f"{path}: {error}") from error
    return _tokenizer_from_directory(path if path.is_dir() else path.parent)


def _tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    data = file.metadata
    ends = [data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Tokenizer(
        backend_from_gguf(data),
        bos_token_id=data.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=data.get("tokenizer.chat_template"),
        tool_template=data.get("tokenizer.chat_template.tool_use"),
    )


def _tokenizer_from_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
        # Left over from training; here they would silently shorten or lengthen a prompt.
        backend.no_truncation()
        backend.no_padding()
    else:
        backend = _backend_from_transformers(directory)
    # Older checkpoints name their special tokens in a file of their own.
    config = read_json(directory / "special_tokens_map.json")
    config |= read_json(directory / "tokenizer_config.json")
    names = {
        name: value["content"] if isinstance(value := config.get(name), dict) else value
        for name in ("bos_token", "eos_token")
    }
    bos = backend.token_to_id(names["bos_token"]) if names["bos_token"] else None
    ends = [backend.token_to_id(names["eos_token"])] if names["eos_token"] else []
    for name in ("config.json", "generation_config.json"):
        ends += as_token_ids(read_json(directory / name).get("eos_token_id"))
    template, tool_template = _read_chat_templates(directory, config)
    return Tokenizer(
        backend,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=template,
        tool_template=tool_template,
    )


def _read_chat_templates(
    directory: Path, config: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Returns the default template and the one for tools: from own files, or from the config."""
    given = config.get("chat_template")
    named = (
        {entry["name"]: entry["template"] for entry in given}
        if isinstance(given, list)
        else {"default": given}
    )
    files = {
        "default": directory / "chat_template.jinja",
        "tool_use": directory / "additional_chat_templates" / "tool_use.jinja",
    }
    named |= {
        name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()
    }
    return named.get("default"), named.get("tool_use")


def _backend_from_transformers(directory: Path) -> tokenizers.Tokenizer:
    if not any((directory / name).is_file() for name in _OLDER_FILES):
        raise ValueError(
            f"{directory} must hold a tokenizer.json (or, older, {' or '.join(_OLDER_FILES)}), "
            "got none"
        )
    import transformers  # slow to import; only older checkpoints come here

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
        return loaded.backend_tokenizer
    except Exception as error:  # transformers lets many kinds through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{directory} must hold a tokenizer.json: {reason}") from error
