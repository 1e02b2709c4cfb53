import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips; where it was promised, STEPKIT_REAL_DATA, it must be there."""
    named = os.environ.get("STEPKIT_REAL_DATA")
    if not named:
        pytest.skip("STEPKIT_REAL_DATA is not set: the real clips are not on this machine")
    folder = Path(named).resolve()  # tests link to it from elsewhere
    if not (folder / "ucf101-24").is_dir():
        pytest.fail(f"STEPKIT_REAL_DATA={named} holds no ucf101-24 folder")
    return folder
