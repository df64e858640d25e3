"""Where tests find the repository, their golden files, and official data."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
DATA = Path(os.environ.get("DUAL_LORA_DATA", ROOT.parent / "shared" / "data"))
