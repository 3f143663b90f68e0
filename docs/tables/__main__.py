"""Write the tables, numbers and verdicts of all pages from the records in docs/results/.

python -m docs.tables            rewrite them
python -m docs.tables --check    fail if one does not follow from its records
"""

import argparse
import sys

from docs.tables import pages


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    for path in pages.all_pages():
        text = pages.filled(path)
        if not check:
            path.write_text(text)
        elif text != path.read_text():
            sys.exit(f"{path.relative_to(pages.DOCS.parent)}: run python -m docs.tables")


if __name__ == "__main__":
    main()
