"""The model that a command is told as `module:call(...)`: read, never evaluated, and built without memory."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mics_core.errors import ConfigError
from mics_core.planner.workload import in_a_line


@dataclass(frozen=True)
class NamedModel:
    """`module:name(*arguments, **keywords)`, of plain literals."""

    module: str
    name: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, expression: str) -> NamedModel:
        """Read what the command was told. Nothing is evaluated."""
        module, colon, call = expression.partition(":")
        try:
            node = ast.parse(call.strip(), mode="eval").body
            node = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            if not colon or not module or not isinstance(node.func, ast.Name):
                raise ValueError
            if not len(set(names)) == len(names) == len(node.keywords):
                raise ValueError
            values = [ast.literal_eval(keyword.value) for keyword in node.keywords]
            arguments = tuple(ast.literal_eval(argument) for argument in node.args)
            return cls(module, node.func.id, arguments, tuple(zip(names, values, strict=True)))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"--model is {_cut(expression)!r}, expected a module and a call with plain literals, as in "
                "'mics_models:gpt(\"gpt-100b\")' or 'mymodel:Model(layers=80)': quote it for the shell"
            ) from error

    def __str__(self) -> str:
        given = [*map(repr, self.arguments), *(f"{name}={value!r}" for name, value in self.keywords)]
        return _cut(f"{self.module}:{self.name}({', '.join(given)})")

    def build(self) -> nn.Module:
        """The model, on the meta device. Modules of the current folder are found before installed ones."""
        here = os.getcwd()
        if not sys.flags.safe_path and not {"", here} & set(sys.path):
            sys.path.insert(0, here)  # as `python -m` has it
        try:
            make = getattr(import_module(self.module), self.name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise ConfigError(
                f"--model {self} names {self.name} of {self.module}, which cannot be imported: {in_a_line(error)}: "
                "name a function or class of a file in this folder, or of an installed module"
            ) from error
        except Exception as error:  # of a program of the user's, so of any kind
            raise ConfigError(
                f"--model {self}: {self.module} does more than define when it is imported, and fails "
                f"({in_a_line(error)}), expected definitions alone: put its program behind `if __name__ == "
                '"__main__":`'
            ) from error
        try:
            with torch.device("meta"):
                model = make(*self.arguments, **dict(self.keywords))
        except Exception as error:
            raise ConfigError(f"--model {self} failed: {in_a_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"--model {self} gave a {type(model).__name__}, expected a torch.nn.Module: name what builds the model"
            )
        return model

    def program(self) -> str | None:
        """What torchrun starts to train this model, if the model's package has a program that knows it by name."""
        package = self.module.partition(".")[0]
        told = str(dict(self.keywords).get("name", self.arguments[0] if self.arguments else ""))
        found = find_spec(package)
        if not told or not found or not found.submodule_search_locations or not find_spec(f"{package}.pretrain"):
            return None
        return f"-m {package}.pretrain model.name={told if '-' in told else f'{self.name}-{told}'}"


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."
