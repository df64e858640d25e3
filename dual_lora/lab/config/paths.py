"""Where the repository, its configuration and the run records are, and paths that a setting gives."""

import os
from pathlib import Path

from dual_lora.lab.errors import UserError, get_first_line, require

ROOT = Path(__file__).resolve().parents[3]
RUNS = Path(os.path.expanduser(os.environ.get("DUAL_LORA_RUNS") or ROOT / "runs"))
BUNDLED = Path(__file__).parents[1] / "model" / "bundled"
CONF = ROOT / "conf"


def resolve_path(key: str, value: str) -> Path:
    """Return the path that a setting gives, ~ filled in; whether anything is there is for its reader to say.

    Raises:
        UserError: nothing can be there, or it may not be looked at.
    """
    try:
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user
        reason = getattr(error, "strerror", None) or get_first_line(error)
        raise UserError(f"{key}={value[:80]}: cannot be read ({reason}); give another path") from error
    return path


ELSEWHERE_REMEDY = "set DUAL_LORA_RUNS=DIR to keep runs elsewhere"


def check_writable(folder: Path, mend: str = ELSEWHERE_REMEDY) -> None:
    """Refuse a folder that cannot be written, or made, before anything is computed for it."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    able = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(able, f"{folder}: {there} is no folder that can be written; {mend}")
