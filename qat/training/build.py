"""Objects from plain configuration: ``{"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}``.

A configuration may come out of a checkpoint or a run folder that somebody else made, so a ``_target_`` is resolved only
when its dotted path *and* the module that defines the object begin with a prefix on the allow-list. Checking the path
alone is not enough: ``torch.nn.modules.module.os.system`` begins with ``torch.nn.`` too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from qat.errors import ConfigError, nearest

TRUSTED: tuple[str, ...] = ("qat.", "torch.nn.", "torch.optim.", "torchmetrics.", "torchvision.", "transformers.")
_allowed: list[str] = []


def allow_targets(*prefixes: str) -> None:
    """Let ``_target_`` strings with these prefixes be built in this process: ``allow_targets("mypackage.")``.

    The permission belongs to the process, never to a file: nothing that is read from a checkpoint can extend it.
    """
    for prefix in prefixes:
        if not prefix.strip("."):
            raise ConfigError("An allowed prefix must name a package, such as 'mypackage.'.")
        _allowed.append(prefix.rstrip(".") + ".")


def plain(value: Any, where: str = "config") -> Any:
    """A copy made of dict, list, str, int, float, bool and None only, so that a checkpoint which holds it loads safely.

    Raises:
        ConfigError: for anything else (a partial, a class, a tensor), naming where it stands.
    """
    if isinstance(value, DictConfig | ListConfig):
        return plain(OmegaConf.to_container(value, resolve=True), where)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ConfigError(
        f"{where} is a {type(value).__name__}; a stored configuration holds plain values only. "
        "Write the object as a dict with a `_target_`."
    )


def resolve(target: str) -> Callable[..., Any]:
    """The class or function that ``target`` names, if it is allowed.

    Raises:
        ConfigError: where the path or the defining module is not on the allow-list, or does not exist.
    """
    trusted = (*TRUSTED, *_allowed)
    if not target.startswith(trusted):
        raise ConfigError(
            f"`_target_: {target}` is not allowed: it must begin with one of {', '.join(trusted)}. For your own "
            "package say allow_targets=[mypackage] on the command line, or qat.training.allow_targets(...)."
        )
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                if cut == 1:
                    raise ConfigError(f"`_target_: {target}`: the package {parts[0]!r} is not installed.") from error
                continue
            raise
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise ConfigError(f"`_target_: {target}`: {name} has no {part!r}{nearest(part, dir(found)) or '.'}")
            found = getattr(found, part)
        home = str(getattr(found, "__module__", ""))
        if not callable(found) or not f"{home}.".startswith(trusted):
            raise ConfigError(f"`_target_: {target}` is not allowed: it leads to {home or type(found).__name__}.")
        return found
    raise ConfigError(f"`_target_: {target}` names no module.")


def check_arguments(call: Callable[..., Any], names: Sequence[str], where: str) -> None:
    """Refuse argument names that ``call`` does not take, with the nearest valid name."""
    parameters = inspect.signature(call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise ConfigError(f"{where} has no option {name!r}{nearest(name, parameters) or '.'}")


def build(config: Mapping[str, Any], where: str = "config", **extra: Any) -> Any:
    """The object that ``config["_target_"]`` names, called with the other keys (inner configs built) and ``extra``.

    >>> build({"_target_": "torch.nn.Sequential"})
    Sequential()

    Raises:
        ConfigError: a target that is not allowed, an unknown or missing argument.
    """
    call, values = check(config, where, *extra)
    return call(**{key: _build_inner(value, f"{where}.{key}") for key, value in values.items()}, **extra)


def check(config: Mapping[str, Any], where: str, *extra: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `build` would call, and its plain arguments; nothing is called. ``extra`` names arguments that come later.

    Raises:
        ConfigError: a target that is not allowed, an unknown or missing argument.
    """
    values = plain(config, where)
    if not isinstance(values, dict) or "_target_" not in values:
        raise ConfigError(f"{where} needs a `_target_`: the dotted path of the class to build.")
    target = values.pop("_target_")
    if values.get("trust_remote_code"):
        raise ConfigError(f"{where}: trust_remote_code would run code that is not on this machine yet; it is refused.")
    call = resolve(target)
    check_arguments(call, [*values, *extra], f"{where} ({target})")
    try:
        inspect.signature(call).bind(**values, **dict.fromkeys(extra))
    except TypeError as error:
        raise ConfigError(f"{where} ({target}): {error}.") from error
    return call, values


def _build_inner(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_build_inner(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if "_target_" in value:
            return build(value, where)
        return {key: _build_inner(item, f"{where}.{key}") for key, item in value.items()}
    return value
