"""The journal of the files that a conversion has finished, by which the same command goes on after an interruption.

It has one JSON object a line: the job first, then a line for each finished file. A file whose line was cut short counts
as not finished. The directory is locked while a converter works in it.
"""

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path

from mlx_mimo.errors import MimoError

from .writer import PART, Report

NAME = "mlx_mimo-journal.jsonl"


class DirectoryLock:
    """A lock that one process holds at a time; the system releases it when the process ends, however that happens.

    Raises MimoError where another process holds it.
    """

    def __init__(self, directory: Path):
        self._handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise MimoError(f"{directory}: another conversion is writing here; wait for it or choose another") from None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._handle)


class Journal:
    """The journal of `directory`. `job` is what is converted and how. Raises MimoError for a journal of another job."""

    def __init__(self, directory: Path, job: dict):
        self.path = directory / NAME
        self.finished: dict[str, Report] = {}
        job = json.loads(json.dumps(job))
        lines = self._read()
        if lines:
            self._check(directory, lines[0], job)
            for line in lines[1:]:
                report = Report(**line)
                if self._still_there(directory, report):
                    self.finished[report.name] = report
        # The journal is rewritten, so that no line is appended to one that was cut short.
        part = self.path.with_name(NAME + PART)
        with open(part, "w", encoding="utf-8") as file:
            for line in (job, *(asdict(report) for report in self.finished.values())):
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close or remove

    def add(self, report: Report) -> None:
        """Adds a file that has been written and named. The journal is on the disk when this returns."""
        self._file.write(json.dumps(asdict(report)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.finished[report.name] = report

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink()

    def _read(self) -> list[dict]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def _check(self, directory: Path, old: dict, job: dict) -> None:
        for key in job:
            if old.get(key) != job[key]:
                raise MimoError(
                    f"{directory}: an unfinished conversion with another {key} lies here; repeat its command, "
                    f"or delete {directory} to begin anew"
                )

    @staticmethod
    def _still_there(directory: Path, report: Report) -> bool:
        path = directory / report.name
        return path.is_file() and path.stat().st_size == report.nbytes
