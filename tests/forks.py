"""Programs in processes of their own, which have imported what is asked for and nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# Of the seconds that a program takes, imports take nearly all: they are done once, and forks run the programs.
SERVER = """
import importlib, json, os, sys, tempfile
importlib.import_module(sys.argv[2])
done = []
for program in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            exec(program, {"__name__": "__main__"})
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done.append([status, *(file.seek(0) or file.read() for file in (out, err))])
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    status: int
    stdout: str
    stderr: str


def run(programs: Mapping[str, str], imported: str, **environment: str) -> dict[str, Done]:
    """Each program's end, one after the other."""
    command = [sys.executable, "-c", SERVER, json.dumps(list(programs.values())), imported]
    ran = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return {name: Done(*done) for name, done in zip(programs, json.loads(ran.stdout), strict=True)}
