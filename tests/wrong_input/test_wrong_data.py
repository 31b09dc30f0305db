"""--data that names nothing."""
import pytest

from kit import data
from kit.cli import UserError


def test_unknown_sets(tmp_path):
    with pytest.raises(UserError):
        data.load(str(tmp_path / "nothing"))
