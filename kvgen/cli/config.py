"""Defaults of options from the configuration file, its profiles and the environment; and `kvgen config`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import typer
from platformdirs import user_config_path

from kvgen.cli import options
from kvgen.cli.render import escape_controls, print_note, terminal, write_json
from kvgen.errors import KvgenError, NotFoundError, UsageError
from kvgen.system import path_of_variable


@dataclass(frozen=True)
class Setting:
    """A configured default. command: the command it applies to; "" for all. source: the file or variable it is from."""

    name: str
    value: Any
    command: str
    source: str


def config_path() -> Path:
    """Return $KVGEN_CONFIG, or config.toml in the user's configuration folder."""
    return path_of_variable("KVGEN_CONFIG") or user_config_path("kvgen", appauthor=False) / "config.toml"


def apply_settings(context: typer.Context, profile: str | None) -> None:
    """Set the defaults of the command that runs from the configuration.

    The options of all commands, which take long to look up, matter only where a file or a profile sets some, or
    `kvgen config` shows them.
    """
    commands = context.command.commands  # type: ignore[attr-defined]
    running = str(context.invoked_subcommand)
    content = _read_file(config_path())
    names = commands if running == "config" or profile is not None or any(content) else [running]
    known = {name: _option_names(commands[name]) for name in names}
    settings = _read_settings(*content, profile, known)
    context.obj = {"settings": settings}
    context.default_map = {
        running: {s.name: s.value for s in settings if s.name in known[running] and s.command in ("", running)}
    }


def _option_names(command: Any) -> set[str]:
    options_ = (parameter.name for parameter in command.params if parameter.param_type_name == "option")
    return {*options_} - {"help", "version"}


def _read_settings(
    content: dict[str, Any], profiles: dict[str, Any], profile: str | None, commands: Mapping[str, Collection[str]]
) -> list[Setting]:
    """Read all settings; later ones override earlier ones.

    The order is: the file for all commands, the file for one command, the profile (likewise), the environment.
    content, profiles: of the file. commands: the option names of each command. Raises UsageError for unknown options,
    NotFoundError for an unknown profile.
    """
    path = config_path()
    settings = _read_table(content, commands, str(path))
    if profile is not None:
        if not isinstance(profiles.get(profile), dict):
            raise NotFoundError(f"no profile {profile!r} in {path}: {', '.join(profiles) or 'there are none'}")
        settings += _read_table(profiles[profile], commands, f"{path}, profile {profile}")
    for name in sorted(set().union(*commands.values())):
        variable = f"KVGEN_{name.upper()}"
        if os.environ.get(variable):
            settings.append(Setting(name, os.environ[variable], "", variable))
    return settings


def complete_profile(incomplete: str) -> list[str]:
    """Complete profile names in the shell; none if the file cannot be read."""
    try:
        _, profiles = _read_file(config_path())
    except KvgenError:
        return []
    return [name for name in profiles if name.startswith(incomplete)]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings and the profiles of a file. Raises UsageError for invalid TOML, NotFoundError for no file."""
    try:
        if path.exists() and not path.is_file():
            raise NotFoundError(f"{path}: not a file")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if os.environ.get("KVGEN_CONFIG"):
            raise NotFoundError(f"{path}: cannot be read (KVGEN_CONFIG names it)") from None
        return {}, {}
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from None
    profiles = content.pop("profile", {})
    return content, profiles if isinstance(profiles, dict) else {}


def _read_table(table: Mapping[str, Any], commands: Mapping[str, Collection[str]], source: str) -> list[Setting]:
    """Read a table of settings and its subtables for single commands, which come last."""

    def setting(key: str, value: Any, command: str, known: Collection[str], source: str) -> Setting:
        name = key.replace("-", "_")
        if name not in known:
            owner = f"kvgen {command}" if command else "any command"
            raise UsageError(f"{source}: {key!r} is not an option of {owner}")
        if not all(_is_plain(item) for item in (value if isinstance(value, list) else [value])):
            raise UsageError(f"{source}: {key!r} is no text, finite number, true or false, nor a list of them")
        return Setting(name, value, command, source)

    general, special = [], []
    for key, value in table.items():
        if not isinstance(value, dict):
            general.append(setting(key, value, "", set().union(*commands.values()), source))
        elif key not in commands:
            raise UsageError(f"{source}: [{key}] is not a command")
        else:
            special += [setting(k, v, key, commands[key], f"{source}, [{key}]") for k, v in value.items()]
    return general + special


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def config(context: typer.Context, *, json: options.Json = False) -> None:
    """Show the configured defaults and where each comes from.

    Defaults come from the environment (KVGEN_TEMPERATURE and so on) and from config.toml in your configuration folder,
    or the file in KVGEN_CONFIG. Use the long names of options. Options of one command go under [generate], those of
    `kvgen --profile NAME` under [profile.NAME].
    """
    settings: list[Setting] = (context.obj or {}).get("settings", [])
    if json:
        write_json({"file": str(config_path()), "settings": [asdict(setting) for setting in settings]})
        return
    if not settings:
        print_note(f"no defaults in {config_path()} or in the environment")
    from rich.text import Text

    console = terminal(sys.stdout)
    for setting in settings:
        command = f"{setting.command} " if setting.command else ""
        line = f"{command}{setting.name.replace('_', '-')} = {setting.value!r}  ({setting.source})"
        console.print(Text(escape_controls(line)), soft_wrap=True)
