"""Defaults of options: a file, profiles in it, and the environment; and `kvgen config`, which shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import typer
from platformdirs import user_config_path
from rich.text import Text

from kvgen.cli import options
from kvgen.cli.escape import escape_controls
from kvgen.cli.render import print_note, terminal, write_json
from kvgen.errors import KvgenError, NotFoundError, UsageError

_PROFILES = "profile"


@dataclass(frozen=True)
class Setting:
    """A default that someone chose. command: that it is for; "" for all. source: where it was chosen."""

    name: str
    value: Any
    command: str
    source: str


def config_path() -> Path:
    """$KVGEN_CONFIG, or the file in the user's folder for configuration."""
    chosen = os.environ.get("KVGEN_CONFIG")
    return Path(chosen).expanduser() if chosen else user_config_path("kvgen", appauthor=False) / "config.toml"


def read_settings(profile: str | None, commands: Mapping[str, Iterable[str]]) -> list[Setting]:
    """The settings, those that count more later: of the file for all commands, for one, of the profile, of the
    environment.

    commands: the options of each command. Raises UsageError for what is no option, or a file that is no TOML,
    NotFoundError for a profile that is not there.
    """
    path = config_path()
    content = _parsed(path)
    profiles = content.pop(_PROFILES, {})
    settings = _table(content, commands, str(path))
    if profile is not None:
        if not isinstance(profiles, dict) or not isinstance(profiles.get(profile), dict):
            known = ", ".join(profiles) if isinstance(profiles, dict) and profiles else "there are none"
            raise NotFoundError(f"no profile {profile!r} in {path}: {known}")
        settings += _table(profiles[profile], commands, f"{path}, profile {profile}")
    every = sorted({name for names in commands.values() for name in names})
    for name in every:
        variable = f"KVGEN_{name.upper()}"
        if os.environ.get(variable):
            settings.append(Setting(name, os.environ[variable], "", variable))
    return settings


def complete_profile(incomplete: str) -> list[str]:
    """Names of profiles, for the shell's completion; none if the file cannot be read."""
    try:
        profiles = _parsed(config_path()).get(_PROFILES, {})
    except KvgenError:
        return []
    return [name for name in profiles if name.startswith(incomplete)] if isinstance(profiles, dict) else []


def defaults_of(settings: Iterable[Setting], command: str, names: Iterable[str]) -> dict[str, Any]:
    """The defaults of one command's options."""
    known = set(names)
    return {s.name: s.value for s in settings if s.name in known and s.command in ("", command)}


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if "KVGEN_CONFIG" in os.environ:
            raise NotFoundError(f"{path}: cannot be read (KVGEN_CONFIG names it)") from None
        return {}
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from None
    return content


def _table(table: Mapping[str, Any], commands: Mapping[str, Iterable[str]], source: str) -> list[Setting]:
    """A table of settings, with tables for single commands in it. Those for all come first."""
    every = {name for names in commands.values() for name in names}
    general, special = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            if key not in commands:
                raise UsageError(f"{source}: [{key}] is no command")
            for name, chosen in value.items():
                special.append(Setting(_option(name, set(commands[key]), source), chosen, key, f"{source}, [{key}]"))
        else:
            general.append(Setting(_option(key, every, source), value, "", source))
    return general + special


def _option(key: str, known: set[str], source: str) -> str:
    name = key.replace("-", "_")
    if name not in known:
        raise UsageError(f"{source}: {key!r} is no option there")
    return name


def option_names(command: Any) -> list[str]:
    """The options of a click command that may have defaults."""
    return [p.name for p in command.params if p.param_type_name == "option" and p.name not in ("help", "version")]


def config(context: typer.Context, *, json: options.Json = False) -> None:
    """Show the defaults that are chosen in the file and in the environment, and where each comes from.

    The file is KVGEN_CONFIG or config.toml in the user's folder for configuration. Options stand in it by their long
    names; for one command alone under [generate], for `kvgen --profile NAME` under [profile.NAME]. In the environment
    they are KVGEN_TEMPERATURE and so on.
    """
    settings: list[Setting] = (context.obj or {}).get("settings", [])
    if json:
        write_json({"file": str(config_path()), "settings": [vars(setting) for setting in settings]})
        return
    if not settings:
        print_note(f"nothing is chosen in {config_path()} or in the environment")
    console = terminal(sys.stdout)
    for setting in settings:
        where = f"{setting.command} " if setting.command else ""
        line = f"{where}{setting.name.replace('_', '-')} = {setting.value!r}  ({setting.source})"
        console.print(Text(escape_controls(line)), soft_wrap=True)
