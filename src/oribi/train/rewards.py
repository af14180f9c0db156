"""Functions that score answers for stage grpo: found by `file.py:function` or `module:function`, called, and checked.

A function takes what TRL hands out: prompts, completions, completion_ids, each column of the data, trainer_state, log_extra and
log_metric, all by keyword, and returns one number for each completion; None says nothing about one. It need not take them all.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oribi.errors import ConfigError, TrainingError
from oribi.text import did_you_mean

# what TRL adds to the columns of the data
_ONE_PER_ANSWER = ("prompts", "completions", "completion_ids")


class RewardFunction:
    """A user's function under its name, whose failures name the row.

    Args:
        function: as the user wrote it. source: `file.py:function` or `module:function`. name: in logs.
        code: text of the file that it comes from.
    """

    def __init__(self, function: Callable[..., Any], source: str, name: str, code: bytes) -> None:
        self.function, self.source, self.__name__ = function, source, name
        self.fingerprint = f"{name} {hashlib.sha256(code).hexdigest()[:16]}"
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        self.takes = {one.name for one in parameters}

    def __call__(self, **keywords: Any) -> list[float | None]:
        """One reward for each completion.

        Raises:
            TrainingError: the function failed, or what it returned are not rewards; it names the row.
        """
        try:
            found = self._ask(keywords)
        except Exception as error:
            raise TrainingError(self._failure(keywords, error)) from error
        count = len(keywords["completions"])
        if isinstance(found, str) or not isinstance(found, Sequence) and not hasattr(found, "tolist"):
            raise TrainingError(
                f"{self.source} returned {found!r}; return a list of one number for each of the {count} answers"
            )
        found = found.tolist() if hasattr(found, "tolist") else list(found)
        if not isinstance(found, list) or len(found) != count:
            given = len(found) if isinstance(found, list) else repr(found)
            raise TrainingError(
                f"{self.source} returned {given} rewards for {count} answers; return one for each"
            )
        return [self._number(value, place, keywords) for place, value in enumerate(found)]

    def _ask(self, keywords: dict[str, Any]) -> Any:
        given = (
            keywords
            if self.takes_all
            else {name: value for name, value in keywords.items() if name in self.takes}
        )
        found = self.function(**given)
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    def _number(self, value: Any, place: int, keywords: dict[str, Any]) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise TrainingError(
                f"{self.source} returned {value!r} for {_row(keywords, place)}; a reward is a finite number, or None"
            )
        return number

    def _failure(self, keywords: dict[str, Any], error: Exception) -> str:
        """What failed, with the first row that fails alone."""
        where = _place_of(error, self.function)
        said = f"{self.source} failed{where}: {type(error).__name__}: {error}"
        count = len(keywords["completions"])
        for place in range(count):
            alone = {
                name: value[place : place + 1] if isinstance(value, list) and len(value) == count else value
                for name, value in keywords.items()
            }
            try:
                self._ask(alone)
            except Exception:
                return f"{said}. It fails on {_row(keywords, place)}"
        return f"{said}. It fails on no row alone, only on the {count} answers together"


def _place_of(error: Exception, function: Callable[..., Any]) -> str:
    """The line of the function's own file where it failed."""
    file, found, trace = (
        getattr(function, "__code__", None) and function.__code__.co_filename,
        None,
        error.__traceback__,
    )
    while trace is not None:
        found = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else found
        trace = trace.tb_next
    return "" if found is None else f" in line {found}"


def _row(keywords: dict[str, Any], place: int) -> str:
    """A row of the data and the answer to it, for a message."""
    origins = keywords.get("origin")
    origin = f"{origins[place]}, " if isinstance(origins, list) else ""
    prompt, said = (_text(keywords[name][place]) for name in ("prompts", "completions"))
    return f"{origin}prompt {prompt[-120:]!r}, answer {said[:120]!r}"


def _text(words: Any) -> str:
    return words if isinstance(words, str) else str(words[-1].get("content", "")) if words else ""


def load_reward_functions(sources: Sequence[str]) -> list[RewardFunction]:
    """The functions that a config names.

    Args:
        sources: `file.py:function` or `module:function`.

    Raises:
        ConfigError: naming everything that is wrong with all of them.
    """
    found, problems = [], []
    for source in sources:
        try:
            function, code = _load(source)
        except ConfigError as error:
            problems.append(str(error))
            continue
        name = function.__name__ if hasattr(function, "__name__") else source.rpartition(":")[2]
        taken = {one.__name__ for one in found}
        if name in taken:
            name = f"{Path(source.rpartition(':')[0]).stem}.{name}"
        if name in taken:
            problems.append(f"reward_funcs = {source}: given twice")
            continue
        found.append(RewardFunction(function, source, name, code))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _load(source: str) -> tuple[Callable[..., Any], bytes]:
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"reward_funcs = {source}: must be file.py:function or module:function")
    module = _file_module(source, Path(place)) if place.endswith(".py") else _named_module(source, place)
    function = module
    for part in name.split("."):
        if not hasattr(function, part):
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ConfigError(f"reward_funcs = {source}: {place} has no {name}{did_you_mean(name, names)}")
        function = getattr(function, part)
    if not callable(function):
        raise ConfigError(
            f"reward_funcs = {source}: {name} is a {type(function).__name__}, which cannot be called"
        )
    file = getattr(module, "__file__", None)
    return function, Path(file).read_bytes() if file and Path(file).is_file() else source.encode()


def _named_module(source: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"reward_funcs = {source}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _file_module(source: str, path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(
            f"reward_funcs = {source}: there is no file {path}; paths count from the config file"
        )
    name = f"oribi_rewards_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ConfigError(
            f"reward_funcs = {source}: {path} fails when it is run: {type(error).__name__}: {error}"
        ) from error
    return module
