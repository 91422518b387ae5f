"""A program that uses the library and the real huggingface_hub: HF_ENDPOINT and HF_HOME are read when it is imported, hence a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

WORKER = """
import io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
names = {"__name__": "__main__"}
for line in sys.stdin:
    given = json.loads(line)
    names.update(given["names"], result=None)
    try:
        exec(compile(given["code"], "<test>", "exec"), names)
        answer = {"result": names["result"]}
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": [cls.__name__ for cls in type(error).__mro__], "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class RemoteError(Exception):
    """What the code in the client raised: `kinds` are the names of its class and of the classes above it."""

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message


class Client:
    """One process with a cache of its own; `run` executes code there. The names that code sets stay."""

    def __init__(self, home: Path, endpoint: str, token: str | None = None, offline: bool = False) -> None:
        home.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_OFFLINE": str(int(offline)), "PYTHONPATH": str(ROOT),
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
                        "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}  # fmt: skip
        self.log = home / "client.log"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER], env=environment, cwd=home, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def run(self, code: str, **names: Any) -> Any:
        """What the code assigns to `result`.

        Raises:
            RemoteError: the code raised.
        """
        names = {name: str(value) if isinstance(value, Path) else value for name, value in names.items()}
        self._process.stdin.write(json.dumps({"code": code, "names": names}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client died:\n{self.log.read_text()[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"], answer["message"])
        return answer["result"]

    def stop(self) -> None:
        self._process.kill()  # it has nothing to finish, and leaving an interpreter takes seconds
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
