"""Hugging Face language models from a folder on this disk: the architecture, and text by their tokenizer.

Nothing is downloaded, and no code of a model's folder is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.errors import ConfigError, UnsupportedError
from qat.training.text import TextDataModule, as_tokens


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UnsupportedError("Hugging Face models need the extra llm: pip install '.[llm]'.") from None
    return transformers


def causal_lm(path: str, dtype: str | None = None) -> nn.Module:
    """The causal language model that ``path/config.json`` describes, with weights that are yet to be loaded.

    Its forward takes tokens (batch, length) and returns an object with ``logits`` (batch, length, vocabulary). The
    cache of keys and values is off, since training and calibration need none; ``generate(use_cache=True)`` has it.

    Args:
        path: the model's folder.
        dtype: floating point type of the weights, such as ``bfloat16``; None: as the config says, else float32.

    Raises:
        ConfigError: no such folder; a config that cannot be read, or that is of no causal language model.
        UnsupportedError: transformers is not installed.
    """
    transformers = _transformers()
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path: {path} is not the folder of a Hugging Face model: it has no config.json.")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"model.dtype: {dtype!r} is not a floating point type such as float32 or bfloat16.")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        kind = getattr(torch, dtype) if dtype else getattr(config, "dtype", None) or torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: {path}: {str(error).strip().splitlines()[0]}") from error
    model.config.use_cache = False
    return model


def rename_weights(network: nn.Module, source: Path, target: Path) -> None:
    """Write the weights in ``source`` to the folder ``target`` by the names that ``network`` has for them.

    Some models (mixtures of experts, mostly) have one parameter where their files have many; transformers knows how
    they fit, and reads them whole for it.

    Args:
        network: a model of transformers, as :func:`causal_lm` makes it; it may be without weights.

    Raises:
        ConfigError: transformers cannot read them.
    """
    try:
        loaded = type(network).from_pretrained(  # type: ignore[attr-defined]
            source, config=network.config, dtype=next(network.parameters()).dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"pretrained: {source}: {str(error).strip().splitlines()[0]}") from error
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors, seen = {}, set()
    for name, value in loaded.state_dict().items():
        if (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            tensors[name] = value.contiguous()
    for number, (name, value) in enumerate(tensors.items()):
        save_file({name: value}, draft / f"{number:05}.safetensors")
    draft.rename(target)


def decoding(model: nn.Module, tokens: Tensor) -> Callable[[], Any] | None:
    """A function that makes one step of decoding each time: one token, on a cache that holds ``tokens`` to begin with.

    Args:
        tokens: (batch, length).

    Returns:
        None for a model that does not generate text.
    """
    if not hasattr(model, "generate") or getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        return None
    seen = model(tokens, use_cache=True)
    cache, last = getattr(seen, "past_key_values", None), seen.logits[:, -1:].argmax(-1)
    return None if cache is None else lambda: model(last, past_key_values=cache, use_cache=True)


class TokenDataModule(TextDataModule):
    """Windows of the tokens of any text, for a language model with a tokenizer of its own.

    Args:
        path: the text: a text file, a folder of them, a parquet or arrow file, as ``dataset`` of
            :class:`~qat.training.TextDataModule`. None: the sources of Python's standard library.
        tokenizer: the folder of a Hugging Face tokenizer; None: bytes are the tokens.
        Others: as for ``TextDataModule``; ``length`` counts tokens.

    Raises:
        ConfigError: on setup: a folder without tokenizer; less text than one window needs.
    """

    def __init__(self, path: str | None = None, tokenizer: str | None = None, length: int = 512,
                 eval_windows: int | None = 64, batch_size: int = 4, **options: Any) -> None:
        super().__init__(path, length=length, eval_windows=eval_windows, batch_size=batch_size, **options)
        self.tokenizer = tokenizer
        self._read: Any = None

    def tokens(self, documents: Sequence[bytes]) -> Tensor:
        if self.tokenizer is None:
            return as_tokens(documents)
        if self._read is None:
            self._read = self._tokenizer()
        end = self._read.eos_token_id
        numbers: list[int] = []
        for document in documents:
            text = document.decode("utf-8", errors="replace")
            numbers += self._read(text, add_special_tokens=False, verbose=False)["input_ids"]
            if end is not None:
                numbers.append(end)
        return torch.tensor(numbers)

    def _tokenizer(self) -> Any:
        try:
            return _transformers().AutoTokenizer.from_pretrained(
                self.tokenizer, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"data.tokenizer: {self.tokenizer} holds no tokenizer that can be read "
                              f"({str(error).strip().splitlines()[0]}). data.tokenizer=null takes bytes as tokens."
                              ) from error
