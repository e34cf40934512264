"""Builds sdist and wheel, compares the wheel with .ci/wheel_contents.txt, and asks the demo from the installed wheel.

    python .ci/check_wheel.py [--out DIR] [--with-dependencies]

The wheel is built from the sdist. It is installed in a new virtual environment, which sees the dependencies of the
environment that runs this script, or installs them itself (--with-dependencies). Exits with 1 if anything differs.
Needs the package `build`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / ".ci" / "wheel_contents.txt"
QUESTION, ANSWER = "What is 37 + 48?", "85"


def fits(name: str, pattern: str) -> bool:
    """Whether a path of the wheel matches a line of the list; `*` does not cross folders."""
    path = PurePosixPath(name)
    return len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern)


def tracked() -> set[str]:
    """The package's files in the repository, as the wheel names them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "mlx_mimo", "convert"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = {f"mlx_mimo/{name}" if name.startswith("convert/") else name for name in names}
    return {name for name in files if (ROOT / name).is_file()}


def differences(names: set[str], patterns: list[str], wanted: set[str]) -> list[str]:
    """One line for each file that should not be in the wheel, each that is missing, and each pattern without a file."""
    return (
        [f"{name}: in the wheel, not in {LIST.name}" for name in sorted(names) if not any_fits(name, patterns)]
        + [f"{name}: in the repository, not in the wheel" for name in sorted(wanted - names)]
        + [
            f"{line}: in {LIST.name}, nothing in the wheel"
            for line in patterns
            if not any(fits(n, line) for n in names)
        ]
    )


def any_fits(name: str, patterns: list[str]) -> bool:
    return any(fits(name, pattern) for pattern in patterns)


def built(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def ask(wheel: Path, folder: Path, with_dependencies: bool) -> str:
    """Installs the wheel in a new environment in `folder`; returns what the demo answers to QUESTION."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    scripts = folder / "venv" / "bin"
    install = [scripts / "python", "-m", "pip", "install", "-q", wheel]
    subprocess.run([*install, *([] if with_dependencies else ["--no-deps"])], check=True)
    if not with_dependencies:
        # As plain paths: an editable install of the package itself in there stays out of sight.
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    where = folder / "elsewhere"
    where.mkdir()
    options = {"cwd": where, "env": environment, "check": True, "stdout": subprocess.PIPE, "text": True}
    code = "import mlx_mimo.convert; print(mlx_mimo.convert.__file__)"
    found = subprocess.run([scripts / "python", "-c", code], **options).stdout.strip()
    if not Path(found).is_relative_to(folder):
        raise SystemExit(f"mlx_mimo.convert was imported from {found}, not from the wheel")
    return subprocess.run([scripts / "mlx_mimo", "generate", "--prompt", QUESTION], **options).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps sdist and wheel")
    parser.add_argument("--with-dependencies", action="store_true", help="install the dependencies too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        wheel = built(args.out or folder / "dist")
        names = set(zipfile.ZipFile(wheel).namelist())
        lines = LIST.read_text(encoding="utf-8").splitlines()
        patterns = [line for line in lines if line and not line.startswith("#")]
        found = differences(names, patterns, tracked())
        answer = ask(wheel, folder, args.with_dependencies)
    if answer != ANSWER:
        found.append(f"{QUESTION} {ANSWER} expected, {answer!r} found")
    print("\n".join(found) if found else f"{wheel.name}: {len(names)} files as listed; {QUESTION} {answer}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
