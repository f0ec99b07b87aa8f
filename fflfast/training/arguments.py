"""The command line and the YAML file of ``fflfast train``, read into the config dataclass by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from .. import methods
from ..data import task_of
from .config import RECIPE_FIELDS, ConfigError, TrainConfig, flag, naming, shorten, suggest

__all__ = ["build_parser", "check_types", "parse_arguments"]

Config = TypeVar("Config", bound=TrainConfig)

_OPTIONS = "the method's options by name (--options.temperature 3)"


class _Help(DefaultHelpFormatter):
    """Flags with hyphens, as people type them, and their defaults; choices and names say the types."""

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        if action.dest in RECIPE_FIELDS:
            return f"{text} (default: by the recipe)"
        if action.default in (None, argparse.SUPPRESS):
            return text
        default = str(action.default).lower() if isinstance(action.default, bool) else action.default
        return f"{text} (default: {default})"

    def format_help(self) -> str:
        text = re.sub(r", --[a-z_.]+\+ [A-Z_]+", "", super().format_help())  # --arch+ is how repeated flags collect
        text = text.replace("{true,false,null}", "{true,false}")  # null, to mean the recipe's, is for YAML
        return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), text)


def build_parser(method_options: type | None = None) -> ArgumentParser:
    """Return the parser of ``fflfast train``, with the options of one method under ``--options.``"""
    parser = ArgumentParser(
        prog="fflfast train",
        usage="fflfast train --data NAME --arch NAME --arch NAME [--FLAG VALUE ...]",
        description="Train a cohort of sub-networks that teach each other. A value is taken from the flags, else from "
        "--config, else from the recipe of the method and the data set.",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below as keys")
    parser.add_class_arguments(TrainConfig, skip={"options"})
    if method_options is not None:
        parser.add_class_arguments(method_options, "options")
        whole = next(action for action in parser._actions if action.dest == "options")
        whole.help = "YAML file with the options below as keys"
    return parser


def parse_arguments(argv: Sequence[str]) -> TrainConfig:
    """Turn the arguments of ``fflfast train`` into a config that holds only what was given; errors are ConfigError."""
    with naming("--method"):
        method_options = methods.resolve(_peek_method(argv)).Options
    parser = build_parser(method_options)
    values = _parse(parser, _normalised(argv)).as_dict()
    values.pop("config", None)
    return TrainConfig.from_dict(values)


def check_types(config: Config, method_options: type) -> Config:
    """Return the same config with every value of its field's type (an int given for a float becomes one).

    ``method_options``, the options class of a method, says the same of ``options``. ConfigError for another type.
    """
    given = {key: value for key, value in config.to_dict().items() if value is not None and value != {}}
    if not isinstance(given.get("options", {}), Mapping):
        raise ConfigError(f"--options: expected {_OPTIONS}, got {shorten(given['options'])}")
    parsed = _parse(build_parser(method_options), given).as_dict()
    return dataclasses.replace(config, **{key: parsed[key] for key in given})


def _peek_method(argv: Sequence[str]) -> str:
    """Find the method before the real parse, which needs to know its options."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--method", "--task", "--data", "--config", "--resume", "--out"):
        peek.add_argument(name)
    try:
        given, _ = peek.parse_known_args(list(argv))
    except argparse.ArgumentError:
        return "ffl"  # a flag without its value, which the real parse reports
    run = given.out if given.resume == "auto" else given.resume
    files = [given.config, run and Path(run) / "config.yaml"]
    method, task, data = given.method, given.task, given.data
    for file in filter(None, files):
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(values, dict):
            method, task, data = (a or values.get(k) for k, a in (("method", method), ("task", task), ("data", data)))
    if isinstance(method, str):
        return method
    try:
        return methods.default(task or task_of(str(data)))
    except ValueError:
        return "ffl"  # no such task, which `resolve` reports


def _parse(parser: ArgumentParser, given: Sequence[str] | Mapping[str, Any]) -> Any:
    try:
        if isinstance(given, Mapping):
            return parser.parse_object(dict(given), defaults=False)
        return parser.parse_args(list(given), defaults=False)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), parser)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: expected a text file in UTF-8, got other bytes ({error})") from None


def _one_line(message: str, parser: ArgumentParser) -> str:
    known = [action.dest for action in parser._actions if action.option_strings]
    if match := re.match(r"unrecognized arguments: (.*)", message):
        argument = match[1].split()[0]
        if not argument.startswith("--") or argument == "--":
            return f"unexpected argument {argument!r}; every setting is given as --name value"
        name = argument[2:].split("=")[0]
        group = name.partition(".")[0] + "." if "." in name else ""
        flags = [flag(other) for other in known if other.startswith(group)]
        return f"unknown flag {flag(name)}{suggest(flag(name), flags)}; see fflfast train --help"
    if match := re.match(r"Group '(.*?)' does not accept option '(.*?)'", message):
        key = f"{match[1]}.{match[2]}"
        why = (
            "; a file holds the options of its own method, leave them out for another" if match[1] == "options" else ""
        )
        alike = [name for name in known if name.startswith(f"{match[1]}.")]
        return f"unknown key {key!r}{suggest(key, alike)}{why}; see fflfast train --help"
    if match := re.match(r"Option '(.*?)' is not accepted", message):
        return f"unknown key {match[1]!r}{suggest(match[1], known)}; see fflfast train --help"
    if match := re.match(r'Parser key "(.*?)":?(.*)', message, re.DOTALL):
        action = next((action for action in parser._actions if action.dest == match[1]), None)
        value = re.match(r".*(?:Given value: |Got value: |Unable to load config )(.*)", match[2], re.DOTALL)
        if action is not None and value is not None:
            return f"{flag(match[1])}: expected {_type_name(action)}, got {shorten(value[1])}"
        return f"{flag(match[1])}: {' '.join(match[2].split())}"
    if match := re.match(r"Unexpected config: (.*)", message, re.DOTALL):
        return f"--config: expected a YAML file of 'setting: value' lines, got {' '.join(match[1].split())[:60]!r}"
    if message.startswith("Problems parsing config"):
        return f"--config: not a YAML file ({' '.join(message.split())})"
    if match := re.match(r"argument (--\S+).*: expected one argument", message):
        return f"{flag(match[1].split('/')[0][2:])}: expected a value after the flag"
    return " ".join(message.split())


def _type_name(action: Any) -> str:
    hint = str(getattr(action, "_typehint", _OPTIONS))
    if choices := re.search(r"Literal\[(.*?)\]", hint):
        return f"one of {choices[1]}"
    names = {"list[str]": "a list of names", "list[int]": "a list of whole numbers", "float": "a number"}
    names |= {"int": "a whole number", "bool": "true or false", "str": "a text"}
    return next((text for name, text in names.items() if name in hint), hint)


def _normalised(argv: Sequence[str]) -> list[str]:
    """Let ``--arch a --arch b`` collect, ``--baseline`` mean ``--baseline true`` and ``--data-dir`` mean data_dir."""
    hints = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    result: list[str] = []
    seen: set[str] = set()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            hint = hints.get(name, "")
            has_value = bool(equals) or (bool(tokens) and not tokens[0].startswith("--"))
            token = f"--{name}{equals}{value}"
            if "bool" in hint and not has_value:
                token = f"--{name}=true"
            elif "list" in hint and has_value:
                value = value if equals else tokens.pop(0)
                if not value.lstrip().startswith("["):
                    value = json.dumps([value]) if "str" in hint else f"[{value}]"
                token = f"--{name}{'+' if name in seen else ''}={value}"
                seen.add(name)
        result.append(token)
    return result
