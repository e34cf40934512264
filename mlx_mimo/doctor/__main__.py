"""`python -m mlx_mimo.doctor`: checks the machine and a model directory, one line a check."""

import argparse
import gc
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ..arguments import add_machine_arguments, given, run
from ..errors import UsageError
from .directory_checks import directory_checks
from .machine_checks import FAILED, OK, SKIPPED, WARNING, Check, disk_kind, machine_checks

SCHEMA_VERSION = 1
MARKS = {OK: "ok", WARNING: "warn", FAILED: "FAIL", SKIPPED: "-"}
COLOURS = {OK: "\x1b[32m", WARNING: "\x1b[33m", FAILED: "\x1b[31m", SKIPPED: "\x1b[2m"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo doctor",
        description="Checks the machine and, where one is named, a model directory: its files, and what they would do "
        "on this machine or on one that the flags describe. "
        "Exits with 0 if nothing failed, 1 if something did, 2 for a wrong command line.",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a converted directory")
    parser.add_argument("--deep", action="store_true", help="read every byte and compare with the manifest's sha256")
    add_machine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    return parser


def doctor(args: argparse.Namespace) -> int:
    if args.deep and args.directory is None:
        raise UsageError("--deep: name a directory to read")
    machine = given(args)
    checks = list(machine_checks(machine))
    if args.directory is not None:
        directory = Path(args.directory).expanduser()
        if not directory.is_dir():
            raise UsageError(f"{args.directory}: no such directory")
        checks += directory_checks(directory, args.deep, machine)
    elif not machine.elsewhere:
        check = disk_kind(Path.cwd())
        checks.append(replace(check, found=f"{check.found}, where this runs"))
    failed = any(check.status == FAILED for check in checks)
    if args.json:
        fields = {"schema_version": SCHEMA_VERSION, "ok": not failed, "directory": args.directory}
        fields["simulated"] = {name: value for name, value in asdict(machine).items() if value is not None}
        print(json.dumps(fields | {"checks": [asdict(check) for check in checks]}, ensure_ascii=False))
    else:
        for check in checks:
            print_check(check)
    return 1 if failed else 0


def print_check(check: Check) -> None:
    mark = f"{MARKS[check.status]:<4}"
    if sys.stdout.isatty():
        mark = f"{COLOURS[check.status]}{mark}\x1b[0m"
    print(f"{mark}  {check.id:<18}  {check.found}")
    if check.hint and check.status != OK:
        print(f"{'':6}{'':18}  → {check.hint}")


def main() -> int:
    args = build_parser().parse_args()
    gc.disable()  # it would take a quarter of the time with 109,000 tensors, and frees nothing that matters
    return run(lambda: doctor(args), computes=False)


if __name__ == "__main__":
    raise SystemExit(main())
