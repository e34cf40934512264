"""One line for several runs of pytest: `python .ci/sum.py FILE.xml ...`, the files that --junitxml wrote.

Exits with 1 if a test failed, or if there is no file.
"""

import sys
from xml.etree import ElementTree


def main(paths: list[str]) -> int:
    suites = [suite for path in paths for suite in ElementTree.parse(path).getroot().iter("testsuite")]
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed += errors
    print(f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not suites else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
