"""Where the recordings of the reference are: the full set beside the repository, else the subset committed in it."""

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def golden_root() -> Path:
    """Folder with `ckpt/`, `components/` and maybe `scenarios/`."""
    full = REPOSITORY.parent / "shared" / "golden"
    return full if full.is_dir() else REPOSITORY / "tests" / "golden"


def checkpoints() -> list[Path]:
    """The tiny checkpoint folders that are there, at least one."""
    found = sorted(path.parent for path in golden_root().glob("ckpt/*/config.json"))
    assert found, f"no checkpoint under {golden_root()}"
    return found


def checkpoint(name: str) -> Path | None:
    """The tiny checkpoint of that name, None where the set lacks it."""
    path = golden_root() / "ckpt" / name
    return path if path.is_dir() else None


def component(name: str) -> Any:
    """The parsed `components/NAME.json`."""
    return json.loads((golden_root() / "components" / f"{name}.json").read_text(encoding="utf-8"))


def scenarios() -> list[dict[str, Any]]:
    """The scenario recordings that are there and whose checkpoint is; may be none in the committed subset."""
    found = sorted(golden_root().glob("scenarios/*.json"))
    recordings = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return [recording for recording in recordings if checkpoint(recording["checkpoint"]) is not None]
