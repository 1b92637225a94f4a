"""What arms of a study need before they can be counted or trained, such as a teacher's run; and what it scores.

`prepare` of a grid is name -> `command`, of `indiclip` or any other; `cpu_seconds` that it takes, for the plan; and
`scored: true` where the folder `{folder}/<name>` is a run whose scores are to stand beside the arms. They run one after
the other. A command with `--ckpt_path last` goes on where a slice ended.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _study_grid import PREPARED, Grid, digest_of, prepared_content
from _study_runs import begin_process, how_ended, spent
from _study_scores import Scores, score_encoder
from _study_slice import Task

from indiclip import json_lines


class Prepared:
    """The commands of a grid and what they left.

    Args:
        grid: Of the study.
        root: Its folder.
    """

    def __init__(self, grid: Grid, root: Path) -> None:
        self.grid, self.root, self.folder = grid, root, root / PREPARED
        self.items = grid.prepare

    def todo(self) -> Iterator[Task]:
        """The first that is not done; nothing where all are.

        Raises:
            ValueError: Another command was run under this name, or its config files have changed.
        """
        for name, item in self.items.items():
            state = self._state(name)
            if state and state != self._made_by(name):
                raise ValueError(
                    f"{self.grid.file}: prepare.{name}: was made by another command or other configs; remove "
                    f"{self.folder}, or give another --runs"
                )
            if not state:
                ended = partial(self._ended, name)
                yield Task(("prepare", name, "command"), item.cpu_seconds, partial(self._run, name), ended)
                return
            if item.scored and not self.scores(name):
                ended = partial(self._scoring_ended, name)
                yield Task(("prepare", name, "score"), 40.0, partial(self._score, name), ended)
                return

    def scores(self, name: str) -> Scores:
        """Of a run that was made here; nothing where it is not scored yet."""
        file = self.folder / f"{name}.scores.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        return content["scores"] if content.get("digest") == digest_of(self.grid.scores) else {}

    def cpu_seconds(self) -> float:
        """That what is left takes, as the grid says."""
        return sum(item.cpu_seconds for name, item in self.items.items() if not self._state(name))

    def _made_by(self, name: str) -> dict[str, Any]:
        return {"command": self.items[name].command, "digest": digest_of(prepared_content(self.grid, name))}

    def _state(self, name: str) -> dict[str, Any]:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _run(self, name: str) -> None:
        """In a process of its own, which another program than ours takes over; what that costs is not told."""
        begin_process(self._log(name), self.grid.environment(self.grid.screening.seed))
        words = shlex.split(self.items[name].command.replace("{folder}", str(self.folder)))
        if words[0] != "indiclip":
            os.execvp(words[0], words)
        from indiclip.cli import main

        status = main(words[1:])
        spent(self.root, "prepare", name, "prepare")
        sys.exit(status)

    def _ended(self, name: str, status: int) -> str:
        if status:
            return f"prepare.{name}: {how_ended(status)}, see {self._log(name)}"
        json_lines.write_whole(self.folder / f"{name}.json", json.dumps(self._made_by(name)).encode())
        return ""

    def _score(self, name: str) -> None:
        begin_process(self._log(name), self.grid.environment(self.grid.screening.seed))
        scores, _ = score_encoder(self.folder / name, self.grid.specs, self.grid.screening.seed, {})
        content = {"digest": digest_of(self.grid.scores), "scores": scores}
        json_lines.write_whole(self.folder / f"{name}.scores.json", json.dumps(content).encode())
        spent(self.root, "prepare", name, "score", 1)

    def _scoring_ended(self, name: str, status: int) -> str:
        return f"prepare.{name}: scoring ended with {status}, see {self._log(name)}" if status else ""

    def _log(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.log"
