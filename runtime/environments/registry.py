"""Opens all environments of a server: TextWorld, the configured task files and classes, and installed plug-ins.

A plug-in is a package with an entry point in the group `ratchet.environments`: its name is the environment's, its value
the class. It needs no configuration; a section `[environments.<its name>.options]` gives it keyword arguments.
Invariant: an environment that cannot be offered fails the start with a message that names the remedy.
Hazard: names are stored in rows: renaming an environment orphans its trajectories.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from memory.names import check_name
from runtime.config import EnvironmentConfig
from runtime.environments.base import Environment
from runtime.environments.graders.base import Complete, GradingFunction, GradingResources
from runtime.environments.graders.critic import Critic
from runtime.environments.task_files.environment import open_task_file
from runtime.environments.textworld import TextWorld
from runtime.errors import EnvironmentRefused
from runtime.settings import BadSettings, read_key

GROUP = "ratchet.environments"


def open_environments(
    configured: Mapping[str, EnvironmentConfig], directory: Path, complete: Complete | None = None
) -> dict[str, Environment]:
    """Return all environments by name. Blocks: it reads whole task files and imports the operator's modules.

    `directory` holds what the environments keep; `complete` is the critic, if there is one.

    Raises:
        EnvironmentRefused: one of them cannot be offered.
    """
    environments: dict[str, Environment] = {"textworld": TextWorld(directory)}
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    for name in [*configured, *(name for name in plugins if name not in configured)]:
        if name in environments:
            raise EnvironmentRefused(f"environments.{name}: this environment comes with the project; choose a new name")
        config = configured.get(name, EnvironmentConfig())
        environments[name] = _open(name, config, plugins.get(name), directory, complete)
    return environments


def choose_environment(names: Collection[str], made_for: str | None) -> str | None:
    """Return the environment of a cycle that names none: the one that the model is made for, else the only one that was
    added to what comes with the project; None where there is no such one."""
    if made_for is not None:
        return made_for
    added = [name for name in names if name != TextWorld.name]
    return added[0] if len(added) == 1 else None


def _open(
    name: str, config: EnvironmentConfig, plugin: EntryPoint | None, directory: Path, complete: Complete | None
) -> Environment:
    if config.tasks is not None:
        return open_task_file(
            name,
            config.tasks,
            GradingResources(load_functions(name, config), complete, open_critics(name, config, os.environ)),
            names_path=directory / f"{name}.names.json",
            system_prompt=config.system_prompt,
            temperature=config.temperature,
            max_output_tokens=config.max_output_tokens,
        )
    if config.class_path is not None:
        return _construct(name, load_object(f"environments.{name}", config.class_path), config.options)
    if plugin is None:
        raise EnvironmentRefused(
            f"environments.{name} names neither tasks nor a class, and no installed package has an entry point "
            f"{name!r} in the group {GROUP!r}"
        )
    try:
        made = plugin.load()
    except Exception as error:  # a plug-in's own code may raise anything
        raise EnvironmentRefused(f"the plug-in {name!r} ({plugin.value}) cannot be loaded: {error!r}") from error
    return _construct(name, made, config.options)


def load_object(source: str, path: str) -> object:
    """Return what stands at `package.module:name`. Raises: EnvironmentRefused, which names `source`."""
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        raise EnvironmentRefused(
            f"{source}: {path!r} cannot be imported: {error}; name it package.module:name, and set PYTHONPATH to the "
            "directory that its package lies in"
        ) from error


def load_functions(name: str, config: EnvironmentConfig) -> dict[str, GradingFunction]:
    """Return the functions that an environment's task file may name. Raises: EnvironmentRefused."""
    functions: dict[str, GradingFunction] = {}
    for key, path in config.functions.items():
        function = load_object(f"environments.{name}.functions", path)
        if not callable(function):
            raise EnvironmentRefused(f"environments.{name}.functions: {path!r} is no function")
        functions[key] = function
    return functions


def load_resources(file: Path, configured: Mapping[str, EnvironmentConfig]) -> GradingResources:
    """Return what the environments that are made of a task file give to its graders. Raises: EnvironmentRefused."""
    functions: dict[str, GradingFunction] = {}
    critics: dict[str, Critic] = {}
    for name, config in configured.items():
        if config.tasks is not None and config.tasks.resolve() == file.resolve():
            functions |= load_functions(name, config)
            critics |= open_critics(name, config, os.environ)
    return GradingResources(functions, critics=critics)


def open_critics(name: str, config: EnvironmentConfig, environ: Mapping[str, str]) -> dict[str, Critic]:
    """Return the critics behind URLs that an environment's task file may name.

    Raises:
        EnvironmentRefused: the variable with the key of one is missing.
    """
    critics: dict[str, Critic] = {}
    for key, critic in config.critics.items():
        try:
            api_key = read_key(f"environments.{name}.critics.{key}.api_key", critic.api_key, environ)
        except BadSettings as error:
            raise EnvironmentRefused(str(error)) from None
        critics[key] = Critic(key, critic, api_key=api_key)
    return critics


def _construct(name: str, made: object, options: Mapping[str, Any]) -> Environment:
    if not (isinstance(made, type) and issubclass(made, Environment)):
        raise EnvironmentRefused(f"environments.{name}: {made!r} is no class of runtime.environments.base.Environment")
    try:
        environment = made(**options)
        environment.name = check_name(name)
    except Exception as error:  # the class's own code may raise anything
        raise EnvironmentRefused(f"environments.{name}: {made.__name__}({dict(options)!r}) raised {error!r}") from error
    return environment
