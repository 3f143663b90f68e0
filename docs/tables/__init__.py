"""What fills the pages from the records: `python -m docs.tables`, from the root of a checkout."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
